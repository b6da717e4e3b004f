"""Memory and time of `intra watch` on a folder of very many photos.

    python benchmarks/watch_many.py [--photos 100000] [--out FILE] [--folder DIR]

The photos are small and the model is replaced by one that calls everything good, so that what is measured is the
watching: looking, waiting, decoding, recording. A real model adds its own time to each photo and the same memory once.
Linux only.
"""

import argparse
import json
import os
import sqlite3
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from intra.deploy import watch as module
from intra.deploy.arrivals import Arrivals
from intra.deploy.record import Record
from intra.deploy.watch import Verdict, Watcher, watch
from intra.inspection.detector import Prediction
from intra.provenance import measured_on

PER_FOLDER = 1000


class Lenient:
    """Stands in for a detector."""

    def predict(self, image: np.ndarray, *, repair_twice: bool) -> Prediction:
        empty = np.zeros(image.shape[:2])
        return Prediction(0.0, False, 1.0, empty, empty > 0, image, ())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="the outcome as JSON")
    parser.add_argument("--folder", type=Path, help="where photos and record lie for the time being")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = _measure(Path(folder), options.photos)
    found |= {"sqlite": sqlite3.sqlite_version, **measured_on()}
    text = json.dumps(found, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return 0


def _measure(folder: Path, count: int) -> dict[str, Any]:
    camera, out, model = folder / "camera", folder / "out", folder / "model.safetensors"
    model.touch()
    _make_photos(camera, count)
    module.Detector = type("Stub", (), {"load": staticmethod(lambda *_, **__: Lenient())})  # type: ignore[misc]
    memory: dict[int, float] = {}
    started = time.perf_counter()

    def on_verdict(verdict: Verdict) -> None:
        if verdict.id == 1 or verdict.id % max(1, count // 10) == 0:
            memory[verdict.id] = _memory_mib()
            print(f"{verdict.id} photos, {memory[verdict.id]} MiB, {time.perf_counter() - started:.0f} s",
                  file=sys.stderr, flush=True)

    counts = watch(model, Watcher(camera, out, once=True, settle_s=0.0), on_verdict=on_verdict)
    elapsed_s = time.perf_counter() - started
    record = Record(out / "record.sqlite")
    arrivals = Arrivals(camera, is_known=lambda photo: record.knows(photo.key, photo.size_bytes, photo.mtime_ns),
                        settle_s=0.0, skipped=frozenset())
    started, cpu = time.perf_counter(), time.process_time()
    assert arrivals.look() == []
    look_s, look_cpu_s = time.perf_counter() - started, time.process_time() - cpu
    record.close()
    return {"photos": counts.num_photos, "memory_mib_after_photos": memory, "elapsed_s": round(elapsed_s, 1),
            "photos_per_s": round(count / elapsed_s, 1), "look_at_all_known_s": round(look_s, 2),
            "look_at_all_known_cpu_s": round(look_cpu_s, 2), "record_mib": round((out / "record.sqlite").stat().st_size
                                                                                 / 2**20, 1)}  # fmt: skip


def _make_photos(camera: Path, count: int) -> None:
    camera.mkdir()
    photo = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for number in range(count):
        folder = camera / f"{number // PER_FOLDER:04}"
        if number % PER_FOLDER == 0:
            folder.mkdir()
            photo.save(folder / ".photo", "PNG")
        os.link(folder / ".photo", folder / f"{number:07}.png")  # a photo is known by its path, too


def _memory_mib() -> float:
    """What the process holds now, without what it shares with others."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return round(int(fields["RssAnon"].split()[0]) / 1024, 1)


if __name__ == "__main__":
    sys.exit(main())
