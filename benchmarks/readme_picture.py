"""The README's picture, from what `make demo` left: photo, repaired image, heatmap and outline of two defective parts.

    .venv/bin/python benchmarks/readme_picture.py demo docs/images/demo.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

import intra
from intra.evaluation.pictures import heatmap_overlay, outline

PARTS = (("fabric", "hole/001"), ("gear", "missing_tooth/001"))
GAP_PX = 6


def row(demo: Path, category: str, name: str) -> np.ndarray:
    """The four pictures of one part, side by side."""
    photo = np.asarray(Image.open(demo / "data" / category / "test" / f"{name}.png"))
    found = intra.Detector.load(demo / "runs" / category).predict(photo)
    pictures = (photo, found.repaired, heatmap_overlay(photo, found.anomaly_map, found.threshold),
                outline(photo, found.mask))
    gap = np.full((photo.shape[0], GAP_PX, 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)


def main(demo: Path, target: Path) -> None:
    """Writes the picture."""
    rows = [row(demo, category, name) for category, name in PARTS]
    gap = np.full((GAP_PX, rows[0].shape[1], 3), 255, np.uint8)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate([rows[0], gap, rows[1]])).save(target, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
