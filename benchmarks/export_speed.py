"""How quick exported models are, and what they cost in accuracy: a table and a JSON file.

    python benchmarks/export_speed.py RUN DATA --out benchmarks/results/export/NAME

RUN is a run's folder, DATA the category that it was trained on, with tests. Each export is checked as `intra export`
checks it; one that is refused is named with its reason. Then the same photos go through the run's own model and through
every file, from reduced photo to anomaly map, one by one and in batches, each contender in turn, round after round, so
that other work on the machine meets all alike. A time is the median over the rounds, on all cores. The figures of
quality are those of `intra evaluate` with each.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import intra
from intra.data.files import write_atomically
from intra.data.folder import find_category
from intra.data.images import prepare, read_image, to_unit
from intra.deploy.export import SUFFIXES, TOLERANCES, ParityError, export
from intra.evaluation.evaluate import evaluate_category
from intra.inspection.detector import Detector
from intra.inspection.device import uses_bf16
from intra.provenance import commit_of_the_code, processor

BATCHES = (1, 8)
FIGURES = ("image_auroc", "pixel_auroc", "pixel_aupro")


def exported(run: Path, data: Path, folder: Path) -> tuple[dict[str, Detector], dict[str, Any]]:
    """The run's own model and those files that pass the check, by name; what the check found of each."""
    own = Detector.load(run, device="cpu")
    own_precision = "bf16" if uses_bf16(own.device, own.config.scoring.precision) else "fp32"
    contenders, checks = {f"torch {own_precision}": own}, {}
    for file_format, suffix in SUFFIXES.items():
        for precision in TOLERANCES:
            name, file = f"{file_format} {precision}", folder / f"{precision}{suffix}"
            try:
                found = export(run, file, format=file_format, precision=precision, data=data)
            except ParityError as error:
                checks[name] = {"refused": str(error).replace(str(folder), "")}
                continue
            contenders[name] = Detector.load(file)
            checks[name] = asdict(found.parity) | {"size_mib": found.size_mib}
            print(name, checks[name], flush=True)
    return contenders, checks


def times(contenders: dict[str, Detector], photos: torch.Tensor, rounds: int) -> dict[str, Any]:
    """ms an image of each contender and batch: medians; the first round warms up."""
    samples: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in BATCHES} for name in contenders}
    for _ in range(rounds + 1):
        for name, detector in contenders.items():
            for batch in BATCHES:
                started = time.perf_counter()
                detector.inspect(photos[:batch])
                samples[name][batch].append(time.perf_counter() - started)
    return {name: {str(batch): 1000 * statistics.median(found[1:]) / batch for batch, found in batches.items()}
            for name, batches in samples.items()}


def quality(contenders: dict[str, Detector], data: Path, folder: Path) -> dict[str, dict[str, float | None]]:
    """FIGURES of each contender on the category's test photos."""
    category, found = find_category(data), {}
    for name, detector in contenders.items():
        results = evaluate_category(detector, category, out=folder / name, save_maps=False)
        found[name] = {figure: results[figure] for figure in FIGURES}
        print(name, found[name], flush=True)
    return found


def table(found: dict[str, Any]) -> str:
    """What the documents show."""
    lines = ["| model | ms an image, single | in batches of 8 | file, MiB | largest map difference | image AUROC | "
             "pixel AUROC | AUPRO |", "|---|---|---|---|---|---|---|---|"]
    for name, speed in found["times"].items():
        check = found["checks"].get(name)
        ms = " | ".join(f"{speed[str(batch)]:.1f}" for batch in BATCHES)
        checked = "— | —" if check is None else f"{check['size_mib']:.1f} | {check['largest_difference']:.1e}"
        figures = " | ".join("—" if value is None else f"{value:.4f}" for value in found["quality"][name].values())
        lines.append(f"| {name} | {ms} | {checked} | {figures} |")
    lines += [f"| {name} | refused: {check['refused']} | | | | | | |" for name, check in found["checks"].items()
              if "refused" in check]
    return "\n".join(lines)


def hardware() -> dict[str, Any]:
    """The machine, and what runs on it."""
    return {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "commit": commit_of_the_code(), "python": platform.python_version(), "torch": torch.__version__,
            "intra": intra.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        contenders, checks = exported(arguments.run, arguments.data, Path(folder))
        own = next(iter(contenders.values())).config
        config, box = own.model, own.data.box
        paths = [test.path for test in find_category(arguments.data).test][: max(BATCHES)]
        photos = torch.stack([to_unit(prepare(read_image(path), size=config.image_size, channels=config.channels,
                                              box=box))
                              for path in paths])
        found = {"times": times(contenders, photos, arguments.rounds), "checks": checks,
                 "quality": quality(contenders, arguments.data, Path(folder)), "hardware": hardware(),
                 "image_size": config.image_size, "rounds": arguments.rounds}
    write_atomically(arguments.out / "speed.json", json.dumps(found, indent=2) + "\n")
    write_atomically(arguments.out / "table.md", table(found) + "\n")
    print(table(found))
    print(found["hardware"])


if __name__ == "__main__":
    main()
