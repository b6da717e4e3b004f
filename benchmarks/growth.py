"""What image side, channels and number of training photos cost on this machine: table and JSON.

    python benchmarks/growth.py --out benchmarks/results/growth/NAME [--sides 256,512] [--images 50,500]

Preset `fast`. For each side (px, three channels) and each number of channels (256 px): a step of training, an
inspection from decoded photo to verdict, and the model file, with random weights. For each number of training photos
(JPEG, --photo-side px): the time that decoding them on all cores takes, with Pillow alone; that from the start of
`train` to its first step, when the photos are new and when they were read before; the time that their statistics and
the threshold take after the last step, the model file and the memory. Each row has a process of its own; its memory is
the highest resident size.
"""

import argparse
import io
import json
import math
import os
import statistics
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import PIL.Image
from speed import alone, counted, detector_of, hardware, photos, resolved, synchronised, training_step

from intra.data.files import write_atomically
from intra.evaluation.evaluate import peak_memory_mib
from intra.inspection.detector import Detector
from intra.inspection.device import pick_device
from intra.inspection.model_file import MODEL_FILE
from intra.training import engine
from intra.training.run import train

REPEATS = 5
STEPS = 2  # of a training
NUM_DRAWN = 20  # different photos; the others are these with another end of the file, decoded like any other


@dataclass(frozen=True)
class Size:
    """What a side, or a number of channels, costs: medians."""

    side_px: int
    channels: int
    step_ms: float
    step_gflop: float
    inspection_ms: float
    inspection_gflop: float
    model_mib: float
    memory_mib: float


@dataclass(frozen=True)
class Photos:
    """What a number of training photos costs."""

    num_photos: int
    decoding_s: float  # all of them, on all cores, and nothing else
    first_start_s: float  # to the first step
    next_start_s: float  # the same for a second training on the same photos
    calibration_s: float  # from the last step to the model file
    model_mib: float
    memory_mib: float


def size(side: int, channels: int) -> Size:
    """Measured in this process."""
    config, device = resolved("fast", side, channels), pick_device("cpu")
    step, _ = training_step(config, device)
    detector = detector_of(config, "cpu")
    array = photos(config, 1)[0]
    inspection = lambda: detector.predict(array)  # noqa: E731  one expression
    found = []
    for work in (step, inspection):
        gflop = counted(work)
        found += [1000 * statistics.median(synchronised(device, work) for _ in range(REPEATS)), gflop]
    return Size(side, channels, *found, _size_of(detector), peak_memory_mib() or math.nan)


def _size_of(detector: Detector) -> float:
    """MiB of the model file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / MODEL_FILE
        detector.save(file)
        return file.stat().st_size / 2**20


def many(count: int, photo_side: int) -> Photos:
    """Measured in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["INTRA_CACHE"] = str(folder / "cache")
        _draw(folder / "part" / "train" / "good", count, photo_side)
        decoding_s = _decoding(sorted((folder / "part" / "train" / "good").iterdir()))
        starts, calibrations = [], []
        engine.REPORT_EVERY_S = 0.0  # the first step is told of at once
        for attempt in range(2):
            marks: dict[str, float] = {}
            begun = time.perf_counter()
            run = train(folder / "part", folder / f"run{attempt}", preset="fast", steps=STEPS, image_size=256,
                        device="cpu", on_report=lambda _, marks=marks: marks.setdefault("started", time.perf_counter()),
                        on_calibration=lambda *_, marks=marks: marks.setdefault("calibrates", time.perf_counter()))
            starts.append(marks["started"] - begun)
            calibrations.append(time.perf_counter() - marks["calibrates"])
        file = run.path / MODEL_FILE
        return Photos(count, decoding_s, starts[0], starts[1], min(calibrations), file.stat().st_size / 2**20,
                      peak_memory_mib() or math.nan)


def _decoding(paths: list[Path]) -> float:
    """Seconds that decoding takes on all cores."""

    def decode(path: Path) -> None:
        with PIL.Image.open(path) as image:
            image.load()

    begun = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        deque(pool.map(decode, paths), maxlen=0)
    return time.perf_counter() - begun


def _draw(folder: Path, count: int, side: int) -> None:
    """Writes the photos."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    row, col = np.mgrid[:side, :side] / side
    drawn = []
    for _ in range(NUM_DRAWN):
        shade = 120 + 60 * np.sin(20 * row + rng.uniform(0, 0.2)) * np.cos(15 * col) + rng.uniform(0, 20)
        pixels = (shade[..., None] + rng.normal(0, 6, (side, side, 3))).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "jpeg", quality=90)
        drawn.append(file.getvalue())
    for index in range(count):
        (folder / f"{index:05}.jpg").write_bytes(drawn[index % NUM_DRAWN] + f"{index:05}".encode())


def table(sizes: list[Size], counts: list[Photos]) -> str:
    """What the documents show; of what was not measured nothing."""
    tables = []
    if sizes:
        tables.append([
            "| side, px | channels | step of 8, ms | GFLOP | inspection, ms | GFLOP | model file, MiB | memory, MiB |",
            "|---|---|---|---|---|---|---|---|",
            *(f"| {each.side_px} | {each.channels} | {each.step_ms:,.0f} | {each.step_gflop:,.0f} | "
              f"{each.inspection_ms:,.0f} | {each.inspection_gflop:,.1f} | {each.model_mib:,.1f} | "
              f"{each.memory_mib:,.0f} |" for each in sizes)])
    if counts:
        tables.append([
            "| photos to train on | decoding alone, s | to the first step, s | the same again, s | statistics and "
            "threshold, s | model file, MiB | memory, MiB |",
            "|---|---|---|---|---|---|---|",
            *(f"| {each.num_photos:,} | {each.decoding_s:,.1f} | {each.first_start_s:,.1f} | {each.next_start_s:,.1f} "
              f"| {each.calibration_s:,.1f} | {each.model_mib:,.1f} | {each.memory_mib:,.0f} |" for each in counts)])
    return "\n\n".join("\n".join(lines) for lines in tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sides", default="256,384,512,768,1024")
    parser.add_argument("--channels", default="1,3,8", help="at 256 px")
    parser.add_argument("--images", default="50,500,5000")
    parser.add_argument("--photo-side", type=int, default=1024, help="px, of the training photos on the disk")
    arguments = parser.parse_args()
    sides, channels, images = ([int(part) for part in text.split(",") if part]
                               for text in (arguments.sides, arguments.channels, arguments.images))
    cases = [(side, 3) for side in sides] + [(256, each) for each in channels if each != 3]
    sizes = [alone(size, *case) for case in cases]
    counts = [alone(many, count, arguments.photo_side) for count in images]
    content = {"hardware": hardware("cpu"), "photo_side_px": arguments.photo_side,
               "sizes": [asdict(each) for each in sizes], "photos": [asdict(each) for each in counts]}
    write_atomically(arguments.out / "growth.json", json.dumps(content, indent=2) + "\n")
    write_atomically(arguments.out / "table.md", table(sizes, counts) + "\n")


if __name__ == "__main__":
    main()
