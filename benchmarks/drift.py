"""What raises the setup alarm: good and defective photos as they are, and good ones with everything changed.

    python benchmarks/drift.py DATA... [--runs RUNS] [--json FILE]

Without --runs, the setup is fitted to the good training photos, as `intra train` does; no network is needed. With it,
RUNS/CATEGORY holds a trained model of each category, whose alarm and verdicts are counted: SETUP wherever the alarm is
raised, else DEFECT or good. Gamma, blur, shift and rotation are applied to the good test photos at their own size (px,
borders repeated); the size is the model's.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from intra.config import preset
from intra.data.files import write_atomically
from intra.data.folder import Category, find_categories
from intra.data.images import auto_channels, auto_image_size, prepare, read_image, read_info, read_set, to_unit
from intra.errors import InTraError
from intra.inspection.detector import Detector
from intra.inspection.setup import Setup

Change = Callable[[np.ndarray], np.ndarray]  # of a photo (H, W, C) in [0, 1]


@dataclass(frozen=True)
class Judge:
    """What judges the photos of a category."""

    size: tuple[int, int]
    setup: Setup
    verdict: Callable[[np.ndarray], tuple[str, bool | None]]  # why the alarm is raised, or ""; DEFECT, if known


def changes() -> dict[str, Change]:
    """By their names."""
    return {
        "as it is": lambda photo: photo,
        **{f"gamma {gamma}": lambda photo, gamma=gamma: photo**gamma for gamma in (0.6, 0.8, 1.25, 1.6)},
        **{f"blur, sigma {sigma} px": lambda photo, sigma=sigma: ndimage.gaussian_filter(photo, (sigma, sigma, 0),
                                                                                         mode="nearest")
           for sigma in (1, 2, 3)},
        **{f"shift {px} px": lambda photo, px=px: ndimage.shift(photo, (px, 0, 0), order=1, mode="nearest")
           for px in (5, 10, 15)},
        **{f"rotation {angle}°": lambda photo, angle=angle: ndimage.rotate(photo, angle, reshape=False, order=1,
                                                                           mode="nearest") for angle in (3, 6, 10)},
    }


def main() -> None:
    """Prints a table for each category."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--runs", type=Path, help="holds a trained model for each category, by its name")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    args = parser.parse_args()
    rows = []
    for category in (found for data in args.data for found in find_categories(data)):
        judge = judge_of_model(args.runs / category.name) if args.runs else judge_of_setup(category)
        print(f"\n{category.name}: {len(category.train)} good photos, {judge.size[0]}×{judge.size[1]} px, alarm above "
              f"{judge.setup.threshold:.2f}\n", flush=True)
        print("| photos | | SETUP | DEFECT | good | named |\n|---|---|---|---|---|---|", flush=True)
        good = [image.path for image in category.test if not image.label]
        for name, change in changes().items():
            verdicts = [judge.verdict(changed(read_image(path), change)) for path in good]
            rows.append({"category": category.name} | row(f"good, {name}", verdicts))
        for defect in sorted({image.defect for image in category.test if image.label}):
            verdicts = [judge.verdict(read_image(image.path)) for image in category.test if image.defect == defect]
            rows.append({"category": category.name} | row(f"defective: {defect}", verdicts))
    if args.json:
        write_atomically(args.json, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")


def judge_of_model(run: Path) -> Judge:
    """The alarm and the verdict of a trained model."""
    detector = Detector.load(run)
    if detector.setup is None:
        raise InTraError(f"{run} was trained on too few photos to have a setup alarm")

    def verdict(photo: np.ndarray) -> tuple[str, bool | None]:
        found = detector.predict(photo, repair_twice=False)
        return found.setup_reason, found.is_anomalous

    return Judge(detector.config.model.image_size, detector.setup, verdict)


def judge_of_setup(category: Category) -> Judge:
    """The alarm alone, fitted to the good training photos."""
    settings = preset("fast").model
    infos = [read_info(path) for path in category.train]
    size = auto_image_size([info.size for info in infos], patch_size=settings.patch_size,
                           window_size=settings.window_size)
    channels = auto_channels(infos)
    setup = Setup.of(read_set(category.train, size=size, channels=channels))

    def verdict(photo: np.ndarray) -> tuple[str, bool | None]:
        return setup.check(to_unit(prepare(photo, size=size, channels=channels))[None])[0].reason, None

    return Judge(size, setup, verdict)


def changed(image: np.ndarray, change: Change) -> np.ndarray:
    """The photo with everything changed: uint8 if it was, else float32 in [0, 1]."""
    if image.dtype == np.uint8:
        return np.rint(255 * change(image / 255).clip(0, 1)).astype(np.uint8)
    whole = to_unit(prepare(image, size=image.shape[:2], channels=image.shape[2]))
    return change(whole.permute(1, 2, 0).numpy()).clip(0, 1).astype(np.float32)


def row(name: str, verdicts: list[tuple[str, bool | None]]) -> dict[str, Any]:
    """One line of the table, printed and as it goes into the JSON."""
    reasons = Counter(reason for reason, _ in verdicts if reason)
    found = {"photos": name, "num": len(verdicts), "num_alarms": reasons.total(), "reasons": dict(reasons),
             "num_defect": None, "num_defect_and_alarm": None}
    if all(is_anomalous is not None for _, is_anomalous in verdicts):
        found["num_defect"] = sum(bool(is_anomalous) for _, is_anomalous in verdicts)
        found["num_defect_and_alarm"] = sum(bool(is_anomalous and reason) for reason, is_anomalous in verdicts)
    print(line(found), flush=True)
    return found


def line(found: dict[str, Any]) -> str:
    """A row of the table: the verdicts, which are SETUP wherever the alarm is raised."""
    num, num_alarms = found["num"], found["num_alarms"]
    shares = [f"{num_alarms / num:.0%}", "–", "–"]
    if found["num_defect"] is not None:
        num_defects = found["num_defect"] - found["num_defect_and_alarm"]
        shares[1:] = [f"{num_defects / num:.0%}", f"{(num - num_alarms - num_defects) / num:.0%}"]
    listed = ", ".join(f"{reason} {count}" for reason, count in Counter(found["reasons"]).most_common())
    return f"| {found['photos']} | {num} | {' | '.join(shares)} | {listed} |"


if __name__ == "__main__":
    main()
