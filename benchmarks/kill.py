"""Kill -9 at random moments of training, evaluating, watching and saving; what was reported must be there afterwards.

    python benchmarks/kill.py [--kills 50] [--seed 0] [--out FILE]

Each work runs in a process of its own that is killed at a random moment, and begun again, until its share of the kills
is used up and it ends by itself. Checked after each kill, and at the end:

    training    every model.safetensors and last.ckpt loads; the checkpoint never goes back; resuming always works; the
                weights at the end equal those of a training that nobody killed, bit for bit
    evaluating  results.json, report.html and every map are whole or not there; the figures at the end are those of an
                evaluation that nobody killed
    watching    every verdict that was printed is in the record, with its score; each photo has one row; the webhook got
                every verdict at least once, duplicates under the same id
    saving      the model file loads, and is never older than the last that was reported as saved

Exit 1 if anything is otherwise. The processes are forked from one that has loaded everything, so that the kills meet
the work and not the start; not for Windows.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that is forked must have no threads

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load_file

from intra.data.demo import make_demo
from intra.data.folder import find_category
from intra.deploy.record import Record, export_csv
from intra.deploy.watch import Watcher, watch
from intra.errors import InTraError
from intra.evaluation.evaluate import evaluate_category
from intra.inspection.detector import Detector
from intra.provenance import measured_on
from intra.training import engine
from intra.training.checkpoint import read_header
from intra.training.run import train

TINY = {"model.patch_size": "8", "model.embed_dim": "48", "model.depth": "3", "model.num_heads": "4",
        "model.segmenter_width": "4", "train.precision": "fp32", "scoring.precision": "fp32",
        "scoring.blur_size": "7", "scoring.scales": "1,2"}  # fmt: skip
SHARES = {"training": 0.32, "evaluating": 0.2, "watching": 0.28, "saving": 0.2}  # of the kills
STEPS = 60


class BrokenPromiseError(AssertionError):
    """A promise that was not kept."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="the outcome as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine.CHECKPOINT_EVERY_S = 0.2
    started = time.perf_counter()
    counts = {name: max(1, round(share * options.kills)) for name, share in SHARES.items()}
    counts["training"] += options.kills - sum(counts.values())
    with tempfile.TemporaryDirectory() as folder:
        results = _all_works(Path(folder), counts, random.Random(options.seed))
    failures = [f"{name}: {one['failure']}" for name, one in results.items() if one["failure"]]
    found = {"kills": sum(one["kills"] for one in results.values()), "failures": failures, "seed": options.seed,
             "works": results, "elapsed_s": round(time.perf_counter() - started, 1),
             "sqlite": sqlite3.sqlite_version, **measured_on()}
    text = json.dumps(found, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return bool(failures)


def _all_works(folder: Path, counts: dict[str, int], rng: random.Random) -> dict[str, dict[str, Any]]:
    gear = make_demo(folder / "photos", size_px=64, num_train=12, num_test_good=4, num_per_defect=2)[1]
    _run(lambda: train(gear, folder / "whole", steps=STEPS, image_size=64, settings=TINY, device="cpu"))
    results = {}
    for name, work in (("training", _training), ("evaluating", _evaluating), ("watching", _watching),
                       ("saving", _saving)):  # fmt: skip
        outcome: dict[str, Any] = {"kills": 0, "failure": None}
        try:
            work(folder, gear, counts[name], rng, outcome)
        except (BrokenPromiseError, InTraError) as failure:
            outcome["failure"] = str(failure)
        results[name] = outcome
        print(f"{name}: {outcome}", file=sys.stderr, flush=True)
    return results


def _training(folder: Path, gear: Path, kills: int, rng: random.Random, outcome: dict[str, Any]) -> None:
    out = folder / "run"
    step_before = 0

    def work() -> None:
        is_begun = (out / "last.ckpt").exists()
        train(gear, out, steps=STEPS, image_size=None if is_begun else 64, settings=None if is_begun else TINY,
              resume=True, device="cpu")

    def check() -> None:
        nonlocal step_before
        if (out / "last.ckpt").exists():
            step = read_header(out / "last.ckpt")["progress"]["step"]
            _demand(step >= step_before, f"the checkpoint went back from step {step_before} to {step}")
            step_before = step
        if (out / "model.safetensors").exists():
            Detector.load(out, device="cpu")

    while outcome["kills"] < kills:  # a run that has come to its end is begun anew, until all kills are used up
        _kill_often(work, check, kills, rng, outcome, longest_s=2.5, is_over=(out / "model.safetensors").exists)
        _run(work)
        _demand(_same(out / "model.safetensors", folder / "whole" / "model.safetensors"),
                "the weights are not those of a training that nobody killed")
        outcome["finished_runs"] = outcome.get("finished_runs", 0) + 1
        outcome["leftover_files"] = outcome.get("leftover_files", 0) + len(list(out.glob(".*.part")))
        shutil.rmtree(out)
        step_before = 0


def _evaluating(folder: Path, gear: Path, kills: int, rng: random.Random, outcome: dict[str, Any]) -> None:
    category, out = find_category(gear), folder / "results"

    def work(place: Path = out) -> None:
        evaluate_category(Detector.load(folder / "whole", device="cpu"), category, out=place)

    def check() -> None:
        if (out / "results.json").exists():
            json.loads((out / "results.json").read_text())
        if (out / "report.html").exists():
            _demand((out / "report.html").read_text().rstrip().endswith("</html>"), "half a report")
        for path in out.rglob("*.tiff"):
            with PIL.Image.open(path) as opened:
                _demand(np.asarray(opened).shape == (64, 64), f"half a map: {path}")

    _run(lambda: work(folder / "expected"))
    while outcome["kills"] < kills:
        shutil.rmtree(out, ignore_errors=True)
        _kill_often(work, check, kills, rng, outcome, longest_s=1.5, is_over=(out / "report.html").exists)
    _run(work)
    expected, found = (json.loads((place / "results.json").read_text()) for place in (folder / "expected", out))
    _demand(found["images"] == expected["images"], "other scores than those of an evaluation that nobody killed")


def _watching(folder: Path, gear: Path, kills: int, rng: random.Random, outcome: dict[str, Any]) -> None:
    camera, out, said = folder / "camera", folder / "watched", folder / "said.txt"
    camera.mkdir()
    sources = sorted((gear / "test").rglob("*.png"))
    num_photos = 0
    got: list[str] = []
    server, address = _receiver(got)

    def work() -> None:
        with said.open("a") as file:
            def report(verdict: Any) -> None:
                file.write(f"{verdict.id} {verdict.prediction.score!r}\n")
                file.flush()

            watch(folder / "whole", Watcher(camera, out, once=True, settle_s=0.0, save_images=True, webhook=address),
                  device="cpu", on_verdict=report)  # fmt: skip

    def check() -> None:
        if not _has_text(said):  # nothing was reported; the record may not be there, or still be empty
            return
        record = Record(out / "record.sqlite")
        (state,) = record._base.execute("PRAGMA integrity_check").fetchone()
        rows = list(record.rows())
        record.close()
        _demand(state == "ok", f"the record is damaged: {state}")
        scores = {row["id"]: row["score"] for row in rows}
        for line in said.read_text().split("\n")[:-1]:
            number, score = line.split()
            _demand(scores.get(int(number)) == float(score), f"verdict {number} was reported and is not in the record")
        _demand(len({row["path"] for row in rows}) == len(rows), "a photo has two rows")
        for row in rows:
            _demand((out / f"{row['pictures']}_overlay.png").exists(), "a row without its pictures")

    def is_over() -> bool:
        return _has_text(said) and _num_rows(out) >= num_photos

    while outcome["kills"] < kills:  # a fast machine has seen all photos before: then more come
        for number in range(num_photos, num_photos + 40 * (kills - outcome["kills"])):
            (camera / f"{number:05}.png").write_bytes(sources[number % len(sources)].read_bytes())
            num_photos = number + 1
        _kill_often(work, check, kills, rng, outcome, longest_s=1.2, is_over=is_over)
    _run(work)
    deadline = time.monotonic() + 300
    while len(set(got)) < num_photos and time.monotonic() < deadline:  # what had failed waits for its next try
        _run(work)
    server.shutdown()
    check()
    record = Record(out / "record.sqlite")
    outcome["photos"] = export_csv(record, folder / "rows.csv")
    _demand(outcome["photos"] == num_photos, f"{outcome['photos']} rows for {num_photos} photos")
    _demand(record.counts().num_undelivered == 0, "messages were not delivered")
    record.close()
    _demand(len(set(got)) == num_photos, f"the webhook got {len(set(got))} of {num_photos} verdicts")
    outcome["messages_sent_twice"] = len(got) - len(set(got))
    _demand(not list(out.rglob(".*.part")), "leftovers")


def _saving(folder: Path, gear: Path, kills: int, rng: random.Random, outcome: dict[str, Any]) -> None:
    detector = Detector.load(folder / "whole", device="cpu")
    file, said = folder / "saved" / "model.safetensors", folder / "saved.txt"

    def work() -> None:
        with said.open("a") as reported:
            for number in range(_last_number(said) + 1, 10**9):
                detector.provenance["number"] = number
                detector.save(file)
                reported.write(f"{number}\n")
                reported.flush()

    def check() -> None:
        if _last_number(said) >= 0:
            number = Detector.load(file, device="cpu").provenance["number"]
            _demand(number >= _last_number(said), f"{_last_number(said)} was reported as saved, {number} is there")

    _kill_often(work, check, kills, rng, outcome, longest_s=0.5, is_over=lambda: False)
    outcome["saved"] = _last_number(said) + 1


def _kill_often(
    work: Callable[[], None], check: Callable[[], None], kills: int, rng: random.Random, outcome: dict[str, Any], *,
    longest_s: float, is_over: Callable[[], bool],
) -> None:  # fmt: skip
    """Begins the work and kills it at a random moment, until the kills are used up or the work has come to its end."""
    while outcome["kills"] < kills and not is_over():
        child = _forked(work)
        _wait_until_it_has_worked(child, rng.uniform(0, longest_s))
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            _demand(status == 0, f"begun again after {outcome['kills']} kills, the work failed with status {status}")
        else:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            outcome["kills"] += 1
        check()


def _wait_until_it_has_worked(child: int, how_long_s: float) -> None:
    """By its processor time, where the system tells it: by the clock, a busy machine would have only starts killed."""
    stat, deadline = Path(f"/proc/{child}/stat"), time.monotonic() + 60 * how_long_s
    if not stat.exists():
        time.sleep(how_long_s)
        return
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    while time.monotonic() < deadline:
        fields = stat.read_text().rpartition(")")[2].split()
        if fields[0] == "Z" or (int(fields[11]) + int(fields[12])) * tick_s >= how_long_s:
            return
        time.sleep(0.003)


def _run(work: Callable[[], Any]) -> None:
    _, status = os.waitpid(_forked(work), 0)
    _demand(status == 0, f"the work failed with status {status}")


def _forked(work: Callable[[], Any]) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:  # the parent's clean-up is not ours
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def _receiver(got: list[str]) -> tuple[HTTPServer, str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["id"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

        def handle(self) -> None:
            with suppress(ConnectionError, ValueError, TypeError):  # the sender was killed
                super().handle()

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


def _has_text(file: Path) -> bool:
    return file.exists() and file.stat().st_size > 0


def _num_rows(out: Path) -> int:
    record = Record(out / "record.sqlite")
    try:
        return record.counts().num_photos
    finally:
        record.close()


def _last_number(file: Path) -> int:
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return int(lines[-1]) if lines else -1


def _same(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _demand(so: bool, otherwise: str) -> None:
    if not so:
        raise BrokenPromiseError(otherwise)


if __name__ == "__main__":
    sys.exit(main())
