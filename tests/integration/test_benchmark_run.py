"""Whole benchmarks on small photos: nothing is done twice, nothing is lost, and one failure ends nothing else."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import TINY

from intra.data.folder import find_category
from intra.errors import InTraError
from intra.evaluation.benchmark import Benchmark, Event, benchmark
from intra.evaluation.cell import Cell, Stopped, fingerprint_of, run_cell
from intra.evaluation.methods import parse_methods
from intra.inspection.detector import Detector
from intra.training.checkpoint import read_header
from intra.training.run import Run, recalibrate

ROOT = Path(__file__).parents[2]
WORDS = " ".join(f"{key}={value}" for key, value in (TINY | {"data.image_size": "64x64"}).items())
SPREAD, FLAT = f"spread: fast {WORDS}", f"flat: fast {WORDS} scoring.cell_sizes=8"
STEPS = 4


def measure(photos: Path, out: Path, on_cell=None) -> Benchmark:
    return benchmark(photos, out=out, methods=[SPREAD, FLAT], seeds=[0, 1], steps=STEPS, jobs=2, on_cell=on_cell)


def cells_of(out: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((out / "cells").iterdir())}


def changes(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped_once(photos, tmp_path_factory) -> tuple[Path, list[str], Benchmark]:
    """Two methods, two categories, two seeds: stopped after the first cell, then gone on with."""
    out = tmp_path_factory.mktemp("benchmark")
    early: list[str] = []

    def stop_at_first(event: Event) -> None:
        if event.state == "done":
            early.append(event.cell)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(photos, out, stop_at_first)
    assert not multiprocessing.active_children()
    return out, early, measure(photos, out)


def test_it_goes_on_where_it_was_stopped(stopped_once):
    out, early, found = stopped_once
    assert len(early) == 1
    assert set(early) <= set(found.kept)
    assert len(found.done) + len(found.kept) == len(cells_of(out)) == 8
    assert not found.failed
    assert [row.seeds for row in found.table.rows] == [(0, 1), (0, 1)]
    assert found.table.categories == ("fabric", "gear")
    table = json.loads((out / "table.json").read_text())
    assert table["rows"][0]["scores"]["gear"]["image_auroc"]["num"] == 2
    assert (out / "table.md").read_text().startswith("| method | seeds | fabric | gear | mean |")


def test_a_second_call_measures_nothing(stopped_once, photos):
    out, _, _ = stopped_once
    before = changes(out / "cells") | changes(out / "runs")
    events: list[Event] = []
    found = measure(photos, out, events.append)
    assert [event.state for event in events] == ["kept"] * 8
    assert (len(found.kept), found.done) == (8, ())
    assert changes(out / "cells") | changes(out / "runs") == before


def test_a_cell_says_where_its_figures_come_from(stopped_once):
    out, _, _ = stopped_once
    cell = cells_of(out)["spread__gear__1"]
    results = json.loads((out / "runs/spread__gear__1/results/results.json").read_text())
    assert {key: results[key] for key in cell["results"]} == cell["results"]
    assert {"image_auroc", "pixel_aupro", "per_defect", "threshold", "reasons"} <= cell["results"].keys()
    assert not {"images", "model"} & cell["results"].keys()
    assert cell["training"]["num_steps"] == STEPS
    assert cell["training"]["windows_per_s"] > 0
    assert 0 < cell["training"]["best_validation_loss"] < 10
    assert cell["num_parameters"] > 10_000
    assert 50 < cell["peak_memory_mib"] < 4000
    assert cell["hardware"]["jobs"] == 2
    assert cell["hardware"]["threads"] >= 1
    assert cell["data"]["num_train"] + cell["data"]["num_validation"] == 16
    assert cell["data"]["image_size"] == [64, 64]
    assert not list((out / "runs").rglob("*.tiff"))
    assert (out / "runs/spread__gear__1/results/report.html").exists()


def test_the_commit_is_the_checkouts(stopped_once):
    out, _, _ = stopped_once
    known = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    for cell in cells_of(out).values():
        assert cell["commit"] is None if known.returncode else cell["commit"].startswith(known.stdout.strip())


def flat(values: dict, prefix: str = "") -> dict:
    """A dict of dicts as one; None and text stay."""
    return {name: each for key, value in values.items() for name, each in (
        flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}).items()}


def test_shared_weights_give_the_figures_of_training_anew(stopped_once, photos, tmp_path):
    out, early, _ = stopped_once
    shared = cells_of(out)
    assert {cell["weights_from"] for name, cell in shared.items() if name.startswith("spread")} == {None}
    assert shared["flat__gear__1"]["weights_from"] == "spread__gear__1"
    assert early[0].startswith("spread")
    category = find_category(photos / "gear")
    (method,) = parse_methods([FLAT])
    cell = Cell(method, category, 1, {"steps": STEPS}, fingerprint_of(category), tmp_path, "auto", 1, 1)
    anew = run_cell(cell, lambda share, text: None)
    assert anew["weights_from"] is None
    found, expected = ({key: value for key, value in flat(cell["results"]).items() if key != "seconds_per_image"}
                       for cell in (anew, shared["flat__gear__1"]))
    numbers = {key for key, value in expected.items() if isinstance(value, float)}
    assert {key: found[key] for key in found.keys() - numbers} == {
        key: expected[key] for key in expected.keys() - numbers}
    assert {key: found[key] for key in numbers} == pytest.approx(  # another number of threads rounds otherwise
        {key: expected[key] for key in numbers}, rel=1e-2)
    assert anew["results"]["threshold"] != shared["spread__gear__1"]["results"]["threshold"]


@pytest.mark.parametrize(("change", "said"), [
    ({"steps": STEPS + 1}, "the budget steps=4, asked is steps=5"),
    ({"steps": None, "minutes": 1.0}, "asked is minutes=1"),
    ({"methods": [SPREAD + " train.batch_size=4"]}, "train.batch_size=8, asked is 4"),
])  # fmt: skip
def test_what_was_measured_otherwise_is_refused(stopped_once, photos, change, said):
    out, _, _ = stopped_once
    before = changes(out)
    with pytest.raises(InTraError, match=said):
        benchmark(photos, **({"out": out, "methods": [SPREAD], "steps": STEPS} | change))
    assert changes(out) == before


def test_other_photos_are_refused(stopped_once, photos, tmp_path):
    out, _, _ = stopped_once
    copy = shutil.copytree(photos / "gear", tmp_path / "gear")
    next((copy / "test" / "good").iterdir()).unlink()
    with pytest.raises(InTraError, match="other photos or masks"):
        benchmark(copy, out=out, methods=[SPREAD], steps=STEPS)


def test_a_stopped_training_goes_on(photos, tmp_path, monkeypatch):
    """In this process: a report that is told to stop leaves a checkpoint; the cell then ends as if uninterrupted."""
    monkeypatch.setattr("intra.training.engine.REPORT_EVERY_S", 0.0)
    category = find_category(photos / "gear")
    (method,) = parse_methods([SPREAD])
    cell = Cell(method, category, 0, {"steps": 30}, fingerprint_of(category), tmp_path / "a", "auto", 1, 1)

    def stop(share: float, text: str) -> None:
        if text.startswith("step") and share < 0.2:
            return
        raise Stopped

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped):
        run_cell(cell, stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not cell.file.exists()
    assert 0 < read_header(cell.run / "last.ckpt")["progress"]["step"] < 30
    with pytest.raises(InTraError, match="asked is steps=31"):
        replace(cell, budget={"steps": 31}).check()
    resumed = run_cell(cell, lambda share, text: None)
    whole = run_cell(replace(cell, out=tmp_path / "b"), lambda share, text: None)
    for key in ("image_auroc", "pixel_auroc", "threshold"):
        assert resumed["results"][key] == whole["results"][key]


def test_ctrl_c_leaves_a_checkpoint_and_the_next_call_ends_it(photos, tmp_path):
    """As a terminal does it: SIGINT to the command and to its processes at once."""
    words = [photos / "gear", "--out", tmp_path, "--minutes", "0.07", "--method", SPREAD]
    process = subprocess.Popen([sys.executable, "-m", "intra.cli", "benchmark", *map(str, words)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    run = tmp_path / "runs" / "spread__gear__0"
    deadline = time.monotonic() + 120
    while not (run / "log.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "the same command goes on" in said
    assert not list(tmp_path.glob("cells/*.json"))
    stopped = read_header(run / "last.ckpt")["progress"]
    assert 0 < stopped["elapsed_s"] < 4.2
    assert not stopped["finished"]
    found = benchmark(photos / "gear", out=tmp_path, minutes=0.07, methods=[SPREAD])
    assert found.done == ("spread__gear__0",)
    assert cells_of(tmp_path)["spread__gear__0"]["training"]["num_steps"] > stopped["step"]


def test_a_failed_cell_is_reported_while_the_others_finish(photos, tmp_path):
    for category in ("gear", "broken"):
        shutil.copytree(photos / "gear", tmp_path / "data" / category)
    (tmp_path / "data/broken/train/good/003.png").write_bytes(b"no picture")
    words = [tmp_path / "data", "--out", tmp_path / "out", "--steps", "2", "--jobs", "2", "--method", SPREAD]
    done = subprocess.run([sys.executable, "-m", "intra.cli", "benchmark", *map(str, words)], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "spread__broken__0: failed" in done.stdout
    assert "003.png" in done.stdout
    assert "1 measured, 0 kept, 1 failed" in done.stdout
    assert list(cells_of(tmp_path / "out")) == ["spread__gear__0"]
    shutil.copy(photos / "gear/train/good/003.png", tmp_path / "data/broken/train/good/003.png")
    mended = benchmark(tmp_path / "data", out=tmp_path / "out", methods=[SPREAD], steps=2)
    assert (mended.done, mended.kept, mended.failed) == (("spread__broken__0",), ("spread__gear__0",), {})


def test_a_killed_process_is_a_failed_cell_and_so_is_what_needs_its_weights(photos, tmp_path):
    def kill(event: Event) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    found = benchmark(photos / "gear", out=tmp_path, methods=[SPREAD, FLAT], steps=2, on_cell=kill)
    assert "killed by signal 9" in found.failed["spread__gear__0"]
    assert "the training of spread__gear__0 failed" in found.failed["flat__gear__0"]
    assert found.table.rows == ()


def test_wrong_words_on_the_command_line(photos, tmp_path):
    words = [photos, "--out", tmp_path / "out", "--jobs", "0", "--method", "fsat", "--method",
             "a: fast train.batchsize=3"]
    done = subprocess.run([sys.executable, "-m", "intra.cli", "benchmark", *map(str, words)], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 2
    for part in ("did you mean 'fast'", "did you mean 'train.batch_size'", "--jobs is 0"):
        assert part in done.stderr
    assert not (tmp_path / "out").exists()


def test_recalibrated_weights(run: Run, photos, tmp_path):
    """The same settings give the same detector; what is not scoring, or from other photos, is refused."""
    again = recalibrate(run.path, photos / "gear", out=tmp_path / "same", settings={})
    first, second = Detector.load(run.path), Detector.load(again.path)
    assert first.held_out_scores == second.held_out_scores
    assert (again.num_steps, again.elapsed_s) == (60, pytest.approx(run.elapsed_s, abs=0.1))
    assert second.provenance["recalibrated"]["settings"] == {}
    with pytest.raises(InTraError, match=r"train\.flips cannot be changed"):
        recalibrate(run.path, photos / "gear", out=tmp_path / "other", settings={"train.flips": "off"})
    with pytest.raises(InTraError, match="no longer those"):
        recalibrate(run.path, photos / "fabric", out=tmp_path / "other", settings={})
    with pytest.raises(InTraError, match="choose another --out"):
        recalibrate(run.path, photos / "gear", out=run.path, settings={})


def test_peak_memory_is_the_process_own():
    """Not what the process held that started it, which getrusage counts too."""
    inner = "from intra.evaluation.evaluate import peak_memory_mib; print(peak_memory_mib())"
    outer = ("import subprocess, sys; much = b'x' * 800_000_000; "
             f"subprocess.run([sys.executable, '-c', {inner!r}], check=True)")
    done = subprocess.run([sys.executable, "-c", outer], capture_output=True, text=True, check=True)
    if sys.platform == "linux":
        assert 50 < float(done.stdout) < 760  # the bytes alone take 763 MiB


def test_the_papers_run_in_two_sittings(photos, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("paper", ROOT / "benchmarks" / "paper.py")
    paper = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(paper)
    settings = TINY | {"data.image_size": "64x64", "model.window_size": "3", "model.segmenter_width": "0",
                       "train.batch_size": "16"}
    category = replace(find_category(photos / "gear"), name="screw")  # so that there are figures of the paper
    for sitting in (1, 2):
        lines = paper.sit(category, tmp_path, minutes=0.02, name="paper", settings=settings, device="cpu")
        assert len(lines) == sitting
    first, last = lines
    assert 0 < first["steps"] < last["steps"]
    assert last["windows"] == 16 * last["steps"]
    assert last["elapsed_s"] >= 2.4
    assert last["flops"] / last["steps"] == first["flops"] / first["steps"] > 1e6
    assert 0 < first["share"] < last["share"] < 1
    assert (last["paper_image_auroc"], last["paper_pixel_auroc"]) == pytest.approx((0.957, 0.995))
    assert paper.table(lines).count("\n") == 3
    run = SimpleNamespace(interrupted=False, num_steps=last["steps"], elapsed_s=last["elapsed_s"])
    monkeypatch.setattr(paper, "train", lambda *args, **kw: run)  # patience has ended the training
    with pytest.raises(InTraError, match="training had ended before"):
        paper.sit(category, tmp_path, minutes=0.02, name="paper", settings=settings, device="cpu")
    for share in (last["share"], 1.02):  # killed while it evaluated; of a full budget nothing is trained any more
        paper._write(tmp_path, [first, last | {"image_auroc": None, "pixel_auroc": None, "share": share}])
        completed = paper.sit(category, tmp_path, minutes=0.02, name="paper", settings=settings, device="cpu")
        same = set(last) - {"date", "share"}
        assert [{key: line[key] for key in same} for line in completed] == [
            {key: line[key] for key in same} for line in (first, last)]
        monkeypatch.setattr(paper, "train", lambda *args, **kw: pytest.fail("trained beyond the budget"))
    with pytest.raises(InTraError, match=r"train\.schedule=constant"):
        paper.sit(category, tmp_path / "fast", minutes=0.02, name="fast", settings=TINY, device="cpu")
