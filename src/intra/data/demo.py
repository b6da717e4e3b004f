"""The built-in demo set: photographs, drawn by code, of a woven fabric and of a brass gear, good and defective.

Each picture is a scene (shape, light, lens, sensor), drawn at twice its size and reduced. A defective picture is a
scene drawn with and without its defect, so the ground truth is exact. Lengths are in units of half the image's side, x
to the right and y down from its centre: a set looks the same at every size, but a yarn stays at least 6 px wide. Every
draw depends on (seed, category, kind, index) only: a smaller set is the beginning of a larger one.
"""

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from intra.data.files import write_atomically
from intra.errors import InTraError

__all__ = ["DEFECTS", "demo_photo", "make_demo"]

Floats = NDArray[np.floating]  # float32 throughout
Bytes = NDArray[np.uint8]

MIN_SIZE_PX, OVERSAMPLING = 48, 2
VISIBLE = 12 / 255  # a pixel belongs to the defect if a channel changes by more than this, before noise
NUM_YARNS = 22  # side by side across the image, where that leaves them 6 px
NUM_TEETH, NUM_HOLES, HOLE_RADIUS = 24, 5, 0.455  # the last: of the circle on which the holes lie
FABRIC_COLOURS = np.array([(0.27, 0.37, 0.55), (0.83, 0.78, 0.68), (0.07, 0.07, 0.08)], np.float32)  # warp, weft, table
GEAR_COLOURS = np.array([(0.86, 0.70, 0.44), (1, 1, 1), (0.23, 0.26, 0.29)], np.float32)  # brass, its glint, the mat
GREASE = np.array((0.075, 0.062, 0.050), np.float32)
THREADS = np.array([(0.62, 0.10, 0.10), (0.10, 0.10, 0.11), (0.93, 0.92, 0.90), (0.78, 0.55, 0.12)], np.float32)
SPILLS = np.array([(0.90, 1.0, 1.25), (1.1, 1.0, 0.80)], np.float32)  # light that coffee and ink swallow, by channel


def make_demo(out: str | Path, *, size_px: int = 256, num_train: int = 60, num_test_good: int = 20,
              num_per_defect: int = 6, seed: int = 0) -> list[Path]:
    """The folders of the two categories, `fabric` and `gear`, newly written under `out` in MVTec's layout.

    The same arguments write the same bytes; smaller numbers write the first files of the larger set. Raises InTraError
    on a size below 48 px, a number below 1, a negative seed, or an `out` that is a file or holds images of another set.
    """
    for name, value, least in (("size_px", size_px, MIN_SIZE_PX), ("num_train", num_train, 1), ("seed", seed, 0),
                               ("num_test_good", num_test_good, 1), ("num_per_defect", num_per_defect, 1)):
        if value < least:
            raise InTraError(f"{name} is {value}; it must be at least {least}")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InTraError(f"{out} is a file; the demo set needs a folder, choose another --out")
    photos: dict[Path, tuple[str, str, int]] = {}
    for category, defects in DEFECTS.items():
        numbers = {"train/good": num_train, "test/good": num_test_good} | {f"test/{d}": num_per_defect for d in defects}
        for kind, number in numbers.items():
            photos |= {out / category / kind / f"{i:03d}.png": (category, kind, i) for i in range(number)}
    masks = {path: path.parents[2] / "ground_truth" / path.parent.name / f"{path.stem}_mask.png" for path in photos
             if path.parent.name != "good"}
    for path in sorted(path for category in DEFECTS for path in (out / category).rglob("*.png")):
        if path not in photos and path not in masks.values():
            raise InTraError(f"{path} is no part of this demo set; choose an empty folder as --out, or delete it")
    for path, (category, kind, index) in photos.items():
        image, _, mask = demo_photo(category, kind, index, size_px=size_px, seed=seed)
        for file, pixels in ((path, image), (masks.get(path), mask)):
            if file:
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, "PNG", compress_level=3)
                write_atomically(file, content.getvalue())
    return [out / category for category in DEFECTS]


def demo_photo(category: str, kind: str, index: int, *, size_px: int = 256,
               seed: int = 0) -> tuple[Bytes, Bytes, Bytes]:
    """One picture of a kind such as `train/good` or `test/hole`; the same without its defect; the defect's mask.

    Pictures are (size, size, 3), the mask is (size, size) of 0 and 255, all 0 on a good picture.
    """
    render, defect, side = _SCENES[category], kind.split("/")[1], size_px * OVERSAMPLING
    def draws(what: str) -> Generator:
        return np.random.default_rng([seed, zlib.crc32(f"{category}/{kind}/{what}".encode()), index])

    shown = clean = _through_lens(render(draws("scene"), side, None))
    if defect != "good":
        maker, rng = DEFECTS[category][defect], draws("defect")
        shown = _through_lens(render(draws("scene"), side, lambda *scene: maker(rng, *scene)))
    differs = np.pad(np.abs(shown - clean).max(axis=2) > VISIBLE, 2)
    closed = ndimage.binary_closing(differs, iterations=2)[2:-2, 2:-2]
    parts, _ = ndimage.label(closed, np.ones((3, 3)))
    sizes = np.bincount(parts.ravel()) * (np.arange(parts.max() + 1) > 0)  # part 0 is the background
    mask = (closed & (sizes >= 0.02 * sizes.max())[parts]).astype(np.uint8) * np.uint8(255)  # less its specks
    noise = draws("sensor").standard_normal(clean.shape, dtype=np.float32)
    pair = np.stack([shown, clean])
    pair += noise * (0.006 + 0.012 * np.sqrt(pair.clip(0, 1)))  # read noise and photon noise
    image, good = (pair * 255).round().clip(0, 255).astype(np.uint8)
    return image, good, mask


def _through_lens(scene: Floats) -> Floats:
    """The scene at its final size, slightly out of focus."""
    image = 0.25 * (scene[::2, ::2] + scene[1::2, ::2] + scene[::2, 1::2] + scene[1::2, 1::2])
    return ndimage.gaussian_filter(image, (0.55, 0.55, 0), truncate=2)


# --- Shapes and light ------------------------------------------------------------------------------------------------
@dataclass
class _Flaw:
    """What a defect does to a scene: first to its shape, then to its light, then as a layer over it."""
    shift: tuple[Floats | float, Floats | float] = (0.0, 0.0)  # fabric: displacement of warp and weft, in yarns
    missing: tuple[Floats | float, Floats | float] = (0.0, 0.0)  # fabric: warp and weft, 0 to 1
    floating: Floats | float = 0.0  # fabric: weft that passes over every warp yarn, 0 to 1
    relief: Floats | float = 0.0  # gear: added height
    limit: Floats | float = 2.0  # gear: largest radius that is left
    undrilled: int = -1  # gear: number of a hole
    shade: Floats | float = 1.0  # factor, (side, side, 1 or 3)
    cover: Floats | float = 0.0  # opacity of the layer, (side, side, 1)
    colour: Floats | float = 0.0  # of the layer, (side, side, 3)

    def laid_over(self, rgb: Floats) -> Floats:
        return rgb * self.shade * (1 - self.cover) + self.cover * self.colour


def _axes(side: int) -> tuple[Floats, Floats]:
    """y as a column and x as a row, from -1 to 1."""
    line = ((np.arange(side) + 0.5) * 2 / side - 1).astype(np.float32)
    return line[:, None], line[None, :]


def _turned(y: Floats, x: Floats, angle: float) -> tuple[Floats, Floats]:
    """Coordinates along and across an axis at this angle to x."""
    c, s = float(np.cos(angle)), float(np.sin(angle))
    return x * c + y * s, y * c - x * s


def _step(distance: Floats, width: float) -> Floats:
    """0 outside to 1 inside, over a border of this width."""
    return (distance * (1 / width) + 0.5).clip(0, 1)


@cache
def _spline_basis(side: int, cells: int) -> Floats:
    """(side, cells + 3): the weights of the control points of a uniform cubic B-spline."""
    d = np.abs((np.arange(side)[:, None] + 0.5) / side * cells + 1 - np.arange(cells + 3))
    return np.where(d < 1, 2 / 3 - d**2 + d**3 / 2, (2 - d).clip(0) ** 3 / 6).astype(np.float32)


def _field(rng: Generator, side: int, cells: int) -> Floats:
    """A smooth random field of about unit spread, with hills about side / cells wide."""
    basis = _spline_basis(side, cells)
    return 2 * (basis @ rng.standard_normal((cells + 3, cells + 3)).astype(np.float32) @ basis.T)


def _blob(rng: Generator, side: int, centre: tuple[float, float], radius: float, roughness: float) -> Floats:
    """Distance to the border of an irregular ellipse, positive inside."""
    y, x = _axes(side)
    along, across = _turned(y - centre[0], x - centre[1], rng.uniform(0, np.pi))
    stretch = rng.uniform(1.0, 1.5)
    return radius + radius * roughness * _field(rng, side, 12) - np.hypot(along / stretch, across * stretch)


def _line(rng: Generator, side: int, centre: tuple[float, float], *, length: float, bend: float,
          angle: float | None = None) -> tuple[Floats, Floats]:
    """The way along a bent line, -1 to 1 between its ends, and the signed distance from it."""
    y, x = _axes(side)
    along, across = _turned(y - centre[0], x - centre[1], rng.uniform(0, np.pi) if angle is None else angle)
    s, curvature, wave = along * (2 / length), bend * rng.uniform(-1, 1), bend * rng.uniform(0.1, 0.3)
    return s, across - curvature * (s * s - 0.4) - wave * np.sin(3 * s + rng.uniform(0, 6.3))


def _place(rng: Generator, reach: float) -> tuple[float, float]:
    return rng.uniform(-reach, reach), rng.uniform(-reach, reach)


def _lit(height: Floats) -> tuple[Floats, Floats]:
    """Lambert's shade and Blinn's (1977) highlight of a relief under a lamp at the upper left, 0 to 1."""
    slope_y, slope_x = (slope * (height.shape[0] / 2) for slope in np.gradient(height))
    norm = 1 / np.sqrt(1 + slope_x * slope_x + slope_y * slope_y)
    half_way = (0.22 * slope_x + 0.27 * slope_y + 0.94) * norm  # between lamp and camera
    return ((0.42 * slope_x + 0.50 * slope_y + 0.76) * norm).clip(0, 1), half_way.clip(0, 1) ** 24


def _lamp(rng: Generator, side: int) -> Floats:
    """(side, side, 1): light that falls off away from the lamp and, by the lens, towards the corners."""
    y, x = _axes(side)
    fall = 0.09 * _turned(y, x, rng.normal(-2.2, 0.15))[0] - 0.06 * (x * x + y * y)
    return (rng.uniform(0.97, 1.03) * (1 + fall + 0.012 * _field(rng, side, 3)))[..., None]


# --- Fabric: a plain weave of indigo warp (along y) and ecru weft (along x) ------------------------------------------
def _fabric(rng: Generator, side: int, make_flaw: Callable[..., _Flaw] | None) -> Floats:
    """(side, side, 3): the scene, with a defect if `make_flaw` is given."""
    pitch = max(2 / NUM_YARNS, 6 * 2 * OVERSAMPLING / side)
    flaw = make_flaw(side, pitch) if make_flaw else _Flaw()
    axes = _turned(*_axes(side), rng.uniform(-0.012, 0.012))
    # the camera is triggered by the yarn: the weave lies the same in each photo, to about a pixel
    u, v = (axis * (1 / pitch) + shift + 96 + rng.uniform(-0.1, 0.1) + 0.05 * _field(rng, side, 4)
            + 0.025 * _field(rng, side, 24) for axis, shift in zip(axes, flaw.shift, strict=True))  # in yarns
    lamp = _lamp(rng, side)
    tables = rng.uniform(-1, 1, (2, 3, 256)).astype(np.float32)  # of each yarn: place, width, tone
    fuzz = 1 + 0.035 * rng.standard_normal((side, side), dtype=np.float32)
    heights, tones = [], []
    for own, other, table, parity in ((u, v, tables[0], 0), (v, u, tables[1], 1)):
        yarn = np.floor(own)
        place, width, tone = table.take(yarn.astype(np.int32) & 255, axis=1)
        d = (own - yarn - 0.5 + 0.05 * place) / (0.47 + 0.03 * width)
        bulge = 1 - d * d
        crimp = np.cos(np.float32(np.pi) * (other - 0.5 + yarn + parity))  # 1 where this yarn is on top
        heights.append(0.55 * bulge + 0.42 * crimp)
        twist = np.sin(11.9 * other + 3.5 * d + 9 * place)
        tones.append((1 + 0.07 * tone + 0.07 * twist) * (0.62 + 0.38 * bulge.clip(0, 1)) * fuzz)
    return flaw.laid_over(_woven(heights, tones, flaw, pitch) * lamp @ FABRIC_COLOURS)


def _woven(heights: list[Floats], tones: list[Floats], flaw: _Flaw, pitch: float) -> Floats:
    """(side, side, 3): how much of warp, weft and table shows at each place, shaded by the relief."""
    warp, weft = heights
    warp = warp * (1 - 0.6 * flaw.floating) - 3 * flaw.missing[0]
    weft = weft + 0.7 * flaw.floating * (1.07 - weft) - 3 * flaw.missing[1]
    top = np.maximum(np.maximum(warp, weft), -0.45)
    shade, _ = _lit(top * (0.16 * pitch))
    upper, yarn = _step(weft - warp, 0.12), _step(top + 0.30, 0.25)
    light = (0.25 + shade) * (0.72 + 0.30 * top).clip(0.3, 1.1) * yarn  # less of it between the yarns
    return np.stack([tones[0] * (1 - upper) * light, tones[1] * upper * light, 1 - yarn], axis=-1)


def _hole(rng: Generator, side: int, pitch: float) -> _Flaw:
    """Yarns torn away; a few ends remain across the gap."""
    blob = _blob(rng, side, _place(rng, 0.6), rng.uniform(0.10, 0.20), 0.22)
    frayed = blob + 0.03 * _field(rng, side, 40)
    first, second = rng.permutation([0.0, 0.06]).tolist()
    pull = 0.5 * (1 - (blob / 0.15) ** 2).clip(0, 1) ** 2 * _field(rng, side, 10)
    return _Flaw(missing=(_step(frayed - first, 0.02), _step(frayed - second, 0.02)), shift=(pull, -pull))


def _stain(rng: Generator, side: int, _pitch: float) -> _Flaw:
    """A dried spill, darkest at its rim."""
    blob = _blob(rng, side, _place(rng, 0.6), rng.uniform(0.13, 0.26), 0.2)
    rim = 0.22 * np.exp(-(((blob - 0.018) / 0.022) ** 2))
    soak = rng.uniform(0.35, 0.60) * _step(blob, 0.03) * (1 + 0.15 * _field(rng, side, 14)) + rim
    return _Flaw(shade=(1 - soak[..., None] * SPILLS[rng.integers(2)]).clip(0.08, 1))


def _thread(rng: Generator, side: int, pitch: float) -> _Flaw:
    """A foreign thread that lies on the fabric."""
    width = max(rng.uniform(0.025, 0.045), 4 / side)
    s, d = _line(rng, side, _place(rng, 0.4), length=rng.uniform(0.6, 1.3), bend=0.2)
    ends = _step(1 - np.abs(s), 0.04)
    shadow = 0.5 * _step(1.5 * width - np.abs(d - 0.7 * width), 1.2 * width) * ends
    across = (d / width).clip(-1, 1)
    light = 0.45 + 0.55 * np.sqrt(1 - 0.9 * (across + 0.25).clip(-1, 1) ** 2) + 0.10 * np.sin(80 * s + 4 * across)
    return _Flaw(shade=(1 - shadow)[..., None], cover=(_step(width - np.abs(d), 4 / side) * ends)[..., None],
                 colour=light[..., None] * THREADS[rng.integers(4)])


def _weave_fault(rng: Generator, side: int, _pitch: float) -> _Flaw:
    """Weft that floats over many warp yarns, and yarns dragged out of line around it."""
    half = rng.uniform(0.06, 0.16)
    s, d = _line(rng, side, _place(rng, 0.6), length=rng.uniform(0.35, 0.7), bend=0.0, angle=rng.normal(0, 0.03))
    near = (1 - (d / (1.8 * half)) ** 2).clip(0, 1) ** 2 * (1 - s**4 / 2).clip(0, 1) ** 2
    dragged = near * rng.uniform(0.6, 1.0) * (1 - 2 * int(rng.integers(2)))
    return _Flaw(shift=(0.5 * dragged * np.sin(2 * s), dragged),
                 floating=_step(half - np.abs(d), 0.05) * _step(1 - np.abs(s), 0.1))


# --- Gear: turned brass with a hub, five holes and a keyway, on a rubber mat -----------------------------------------
def _gear(rng: Generator, side: int, make_flaw: Callable[..., _Flaw] | None) -> Floats:
    """(side, side, 3): the scene, with a defect if `make_flaw` is given."""
    flaw = make_flaw(side) if make_flaw else _Flaw()
    (y, x), (offset_y, offset_x), turn = _axes(side), _place(rng, 0.012), rng.uniform(-0.026, 0.026)
    y, x = y - offset_y, x - offset_x
    lamp, marks = _lamp(rng, side), 0.03 * rng.standard_normal(512, dtype=np.float32)
    grain = 1 + 0.10 * rng.standard_normal((side // 2, side // 2), dtype=np.float32).repeat(2, 0).repeat(2, 1)
    r, theta = np.hypot(x, y), np.arctan2(y, x)
    outline, hole = _gear_edges(r, theta - turn, _turned(y, x, turn), flaw)
    web, rim = _step(np.minimum(r - 0.29, 0.62 - r), 0.035), np.exp(-(((r - 0.655) / 0.010) ** 2))
    chamfers = 0.022 * (outline / 0.03).clip(0, 1) + 0.018 * (hole / 0.022).clip(0, 1)
    shade, glint = _lit(chamfers - 0.024 * web + 0.006 * rim + flaw.relief)
    turned = marks.take((r * 300).astype(np.int32))  # a lathe's rings, and their bow-tie of light
    sheen = np.exp(-((np.sin(theta + 2.2) / 0.42) ** 2)) * (0.25 + turned)
    brass, white = 0.11 + 0.62 * shade * (1 + turned) + 0.78 * sheen, 0.40 * glint**2 * (0.4 + sheen)
    shadow = np.maximum(_step(0.83 - np.hypot(x - 0.05, y - 0.06), 0.16), _step(outline + 0.01, 0.05))
    solid = _step(np.minimum(outline, hole), 3 / side)
    seen = np.stack([brass * solid, white * solid, grain * (1 - 0.75 * shadow) * (1 - solid)], axis=-1)
    return flaw.laid_over(seen * lamp @ GEAR_COLOURS)


def _gear_edges(r: Floats, theta: Floats, turned: tuple[Floats, Floats], flaw: _Flaw) -> tuple[Floats, Floats]:
    """Distances, positive in the metal, to the toothed outline and to the nearest hole."""
    outline = np.minimum(0.76 + 0.06 * (1.5 * np.cos(NUM_TEETH * theta)).clip(-1, 1), flaw.limit) - r
    sector = np.floor(theta * (NUM_HOLES / (2 * np.pi)) + 0.5)
    local = theta - sector * (2 * np.pi / NUM_HOLES)
    holes = np.hypot(r * np.cos(local) - HOLE_RADIUS, r * np.sin(local)) - 0.088
    holes = np.where(sector % NUM_HOLES == flaw.undrilled, np.float32(1), holes)
    keyway = np.maximum(np.abs(turned[0]) - 0.04, np.abs(turned[1] + 0.1) - 0.09)
    return outline, np.minimum(holes, np.minimum(r - 0.13, keyway))


def _between_holes(rng: Generator) -> tuple[float, float]:
    angle, r = (rng.integers(NUM_HOLES) + rng.uniform(0.3, 0.7)) * 2 * np.pi / NUM_HOLES, rng.uniform(0.36, 0.60)
    return float(r * np.sin(angle)), float(r * np.cos(angle))


def _scratch(rng: Generator, side: int) -> _Flaw:
    """A groove with bright, torn lips."""
    width = max(rng.uniform(0.009, 0.016), 4 / side)
    s, d = _line(rng, side, _between_holes(rng), length=rng.uniform(0.3, 0.7), bend=0.08)
    depth = np.sqrt((1 - s * s).clip(0, 1)) * (0.85 + 0.15 * np.sin(9 * s))
    profile = 1.7 * np.exp(-((d / (1.7 * width)) ** 2)) - 2.7 * np.exp(-((d / width) ** 2))
    return _Flaw(relief=1.5 * width * depth * profile)


def _dent(rng: Generator, side: int) -> _Flaw:
    """A blow's mark: a hollow with a raised border."""
    radius, depth = rng.uniform(0.09, 0.14), rng.uniform(0.6, 0.9)
    blob = _blob(rng, side, _between_holes(rng), radius, 0.10) / radius
    return _Flaw(relief=radius * (0.15 * np.exp(-((blob / 0.22) ** 2)) - depth * blob.clip(0, 1) ** 1.5))


def _missing_tooth(rng: Generator, side: int) -> _Flaw:
    """One to three teeth broken off at or near the root."""
    number, first, root = int(rng.integers(1, 4)), int(rng.integers(NUM_TEETH)), rng.uniform(0.69, 0.74)
    y, x = _axes(side)
    way = np.arctan2(y, x) * (NUM_TEETH / (2 * np.pi)) - (first + number / 2 - 0.5)  # round the gear, in teeth
    away = np.abs((way + NUM_TEETH / 2) % NUM_TEETH - NUM_TEETH / 2)
    broken = _step(number / 2 + 0.05 - away, 0.25)
    ragged = 0.010 * _field(rng, side, 60) + 0.008 * _field(rng, side, 16)
    rough = ragged * broken * _step(np.hypot(x, y) - root + 0.03, 0.02)
    return _Flaw(limit=root + ragged + 0.4 * (1 - broken), relief=rough)


def _missing_hole(rng: Generator, side: int) -> _Flaw:
    """A hole that was not drilled; at most its centre was punched."""
    number, (y, x) = int(rng.integers(NUM_HOLES)), _axes(side)
    along, across = _turned(y, x, number * 2 * np.pi / NUM_HOLES)
    d = np.hypot(along - HOLE_RADIUS, across)
    return _Flaw(undrilled=number, relief=-0.02 * int(rng.integers(2)) * (1 - d / 0.03).clip(0, 1))


def _contamination(rng: Generator, side: int) -> _Flaw:
    """A smear of dark grease."""
    blob = _blob(rng, side, _between_holes(rng), rng.uniform(0.11, 0.17), 0.30)
    _, gloss = _lit(0.5 * blob.clip(0, 0.06) + 0.005 * _field(rng, side, 24))
    return _Flaw(cover=_step(blob, 0.02)[..., None] * rng.uniform(0.75, 0.92),
                 colour=GREASE * (1 + 5 * gloss**3)[..., None])


DEFECTS: dict[str, dict[str, Callable[..., _Flaw]]] = {  # category: defect: what draws it
    "fabric": {"hole": _hole, "stain": _stain, "thread": _thread, "weave_fault": _weave_fault},
    "gear": {"scratch": _scratch, "dent": _dent, "missing_tooth": _missing_tooth, "missing_hole": _missing_hole,
             "contamination": _contamination},
}
_SCENES: dict[str, Callable[..., Floats]] = {"fabric": _fabric, "gear": _gear}
