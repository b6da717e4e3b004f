"""Categories with planted defects, made from good photos alone, to choose settings on without any real label.

    python benchmarks/planted.py DATA --out DIR [--size 256] [--seed 0]

Of DATA's good training photos a quarter (at most 60) is held out: half of those stay good, each of the others gets one
defect of the kinds below, with its mask. They are drawn by other code than training/defects.py, which teaches the
segmenter, but lines, blots and blurred regions are near relatives of what it makes: only `dent` is like none of them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
from scipy import ndimage

from intra.data.folder import find_categories
from intra.data.images import read_image
from intra.errors import InTraError

Planted = tuple[np.ndarray, np.ndarray]  # photo (H, W, C) in [0, 1], softness of the mask (H, W)


def scratch(photo: np.ndarray, rng: np.random.Generator, wander: float = 0.12) -> Planted:
    """A thin line that wanders, brighter or darker than the part."""
    height, width = photo.shape[:2]
    mark = np.zeros((height, width))
    place, angle = rng.uniform(0.25, 0.75, 2) * (height, width), rng.uniform(0, 2 * np.pi)
    for _ in range(int(rng.uniform(0.15, 0.5) * min(height, width))):
        angle += rng.normal(0, wander)
        place += np.array([np.sin(angle), np.cos(angle)])
        row, col = int(place[0]), int(place[1])
        if 0 <= row < height and 0 <= col < width:
            mark[row, col] = 1
    thickness = rng.uniform(0.7, 1.6)
    mark = np.clip(ndimage.gaussian_filter(mark, thickness) * thickness * 2.5, 0, 1)
    return photo + (rng.choice([-1, 1]) * rng.uniform(0.15, 0.45) * mark)[..., None], mark


def crack(photo: np.ndarray, rng: np.random.Generator) -> Planted:
    """A line that turns sharply."""
    return scratch(photo, rng, wander=0.5)


def stain(photo: np.ndarray, rng: np.random.Generator) -> Planted:
    """A translucent blot of some colour."""
    mark = np.exp(-_distance(photo, rng, 0.05, 0.14) ** 3)
    return photo * (1 - 0.7 * mark[..., None] * (1 - rng.uniform(0, 1, photo.shape[2]))), mark


def dent(photo: np.ndarray, rng: np.random.Generator) -> Planted:
    """Light on one side, shade on the other."""
    height, width = photo.shape[:2]
    row, col = np.mgrid[:height, :width] - (rng.uniform(0.25, 0.75, 2) * (height, width))[:, None, None]
    reach, angle = rng.uniform(0.03, 0.1) * min(height, width), rng.uniform(0, 2 * np.pi)
    mark = np.exp(-(row**2 + col**2) / (2 * reach**2))
    slope = (row * np.sin(angle) + col * np.cos(angle)) / reach
    return photo + (rng.uniform(0.15, 0.4) * slope * mark)[..., None], 1.2 * mark


def smear(photo: np.ndarray, rng: np.random.Generator) -> Planted:
    """A region wiped in one direction."""
    mark = (_distance(photo, rng, 0.09, 0.2) < 1).astype(float)
    wiped = ndimage.uniform_filter1d(photo, int(rng.uniform(15, 35)), axis=int(rng.integers(2)))
    return photo + mark[..., None] * (wiped - photo), mark


def missing(photo: np.ndarray, rng: np.random.Generator) -> Planted:
    """A region that shows only the mean colour of its border."""
    inside = _distance(photo, rng, 0.05, 0.15) < 1
    border = ndimage.binary_dilation(inside, iterations=5) & ~inside
    mark = ndimage.gaussian_filter(inside.astype(float), 1.2)
    return photo + mark[..., None] * (photo[border].mean(0) - photo), mark


def uneven(photo: np.ndarray, rng: np.random.Generator) -> Planted:
    """A large region, up to half of the photo, with another finish: fainter or stronger texture, another shade."""
    height, width = photo.shape[:2]
    if rng.random() < 0.5:  # all that lies on one side of a line
        row, col = np.mgrid[:height, :width] - (rng.uniform(0.3, 0.7, 2) * (height, width))[:, None, None]
        angle = rng.uniform(0, 2 * np.pi)
        inside = (row * np.sin(angle) + col * np.cos(angle) > 0).astype(float)
    else:
        inside = (_distance(photo, rng, 0.2, 0.4) < 1).astype(float)
    mark = ndimage.gaussian_filter(inside, rng.uniform(0.5, 2))
    smooth = ndimage.gaussian_filter(photo, (8, 8, 0))
    contrast, shade = rng.choice([rng.uniform(0.3, 0.7), rng.uniform(1.4, 2.0)]), rng.uniform(0.8, 1.2)
    return photo + mark[..., None] * (smooth * shade + contrast * (photo - smooth) - photo), mark


KINDS: tuple[Callable[[np.ndarray, np.random.Generator], Planted], ...] = (
    scratch, crack, stain, dent, smear, missing, uneven)  # fmt: skip
LEAST_CHANGE = 0.03  # mean change over 5 x 5 px that a person can see


def _distance(photo: np.ndarray, rng: np.random.Generator, least: float, most: float) -> np.ndarray:
    """From the centre of an ellipse somewhere in the middle of the photo, in units of its radii."""
    height, width = photo.shape[:2]
    row, col = np.mgrid[:height, :width] - (rng.uniform(0.25, 0.75, 2) * (height, width))[:, None, None]
    radius = rng.uniform(least, most) * min(height, width)
    return np.hypot(row / radius, col / (radius * rng.uniform(0.5, 1)))


def plant(photo: np.ndarray, kind: Callable[[np.ndarray, np.random.Generator], Planted], rng: np.random.Generator
          ) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The photo with a defect that can be seen, and its mask; tries other places until it can."""
    for _ in range(50):
        changed, mark = kind(photo, rng)
        changed = changed.clip(0, 1)
        mask = (mark > 0.3) & (ndimage.uniform_filter(np.abs(changed - photo).max(2), 5) > LEAST_CHANGE)
        if mask.sum() >= 30:
            return changed, mask
    raise InTraError(f"no {kind.__name__} can be seen on this photo; choose another --seed")


def main() -> None:
    """Writes one planted category for each category of DATA."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=256, help="px: the longer side of what is written")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for category in (found for data in args.data for found in find_categories(data)):
        rng = np.random.default_rng(args.seed)
        folder = args.out / f"{category.name}_planted"
        paths = [category.train[i] for i in rng.permutation(len(category.train))]
        num_held_out = min(60, len(paths) // 4)
        for number, path in enumerate(paths):
            pixels = read_image(path)
            if pixels.dtype != np.uint8 or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3)):
                raise InTraError(f"{path} is no grey or RGB photo of 8 bits; others cannot be planted yet")
            image = PIL.Image.fromarray(np.squeeze(pixels))
            image.thumbnail((args.size, args.size), PIL.Image.Resampling.LANCZOS)
            if number >= num_held_out or number % 2:
                _save(image, folder / ("train" if number >= num_held_out else "test") / "good" / f"{number:04}.png")
                continue
            photo = np.atleast_3d(np.asarray(image) / 255)
            kind = KINDS[number // 2 % len(KINDS)]
            changed, mask = plant(photo, kind, rng)
            changed = np.rint(255 * np.squeeze(changed)).astype(np.uint8)
            _save(PIL.Image.fromarray(changed), folder / "test" / kind.__name__ / f"{number:04}.png")
            _save(PIL.Image.fromarray(mask), folder / "ground_truth" / kind.__name__ / f"{number:04}_mask.png")
        print(f"{folder}: {len(paths) - num_held_out} to train on, {num_held_out} to test")


def _save(image: PIL.Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


if __name__ == "__main__":
    main()
