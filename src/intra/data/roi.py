"""A region of interest as its file holds it: a mask over the photo, and the box around what it marks."""

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

import numpy as np
from jaxtyping import Bool

from intra.data.decode import opened
from intra.data.files import write_atomically
from intra.data.images import Box, box_slices, encode_png, pixels_digest, read_mask
from intra.data.layout import MASK_SUFFIXES
from intra.errors import InTraError

__all__ = ["EARLIER_ROI_FILE", "ROI_FILE", "check_roi", "read_roi", "roi_box", "roi_digest", "roi_text", "save_roi"]

ROI_FILE = "roi.png"  # in a run's folder, so that it resumes with the same region
EARLIER_ROI_FILE = "roi_earlier.png"
LARGEST_MISFIT = 0.02  # of the photos' aspect ratio: further off, a mask is another camera's
LEAST_SIDE = 32  # px: a region of fewer than this squared, in the photos' pixels, shows nothing


def read_roi(path: str | Path) -> Bool[np.ndarray, "h w"]:
    """The mask in an image file of any size: True, inside, where any channel is not zero.

    Raises UnreadableError as `read_image` does, and InTraError if nothing is inside, or if the file may hold another
    region than was painted: formats that blur, and transparency, which reading drops.
    """
    if Path(path).suffix.lower() not in MASK_SUFFIXES:
        raise InTraError(f"the region in {path} may be blurred at its border, as by JPEG; expected one of "
                         f"{', '.join(sorted(MASK_SUFFIXES))}; save it as .png")
    with opened(path) as file:
        if file.has_transparency_data:
            raise InTraError(f"the region in {path} has an alpha channel, which does not count; expected white where "
                             "photos are to be inspected and black elsewhere; save it without transparency")
    mask = read_mask(path)
    if not mask.any():
        raise InTraError(f"the region in {path} is empty: all of its pixels are 0; expected others where photos are to "
                         "be inspected; paint them white")
    return mask


def check_roi(mask: Bool[np.ndarray, "h w"], sizes: Sequence[tuple[int, int]]) -> None:
    """Raises InTraError where a mask does not fit photos of these heights and widths, or marks too little of them."""
    height, width = mask.shape
    found, expected = height / width, median(size[0] / size[1] for size in sizes)
    if not 1 / (1 + LARGEST_MISFIT) <= found / expected <= 1 + LARGEST_MISFIT:
        usual = min(sizes, key=lambda size: abs(size[0] / size[1] - expected))
        raise InTraError(f"the region's mask is {height}x{width} px, height/width {found:.3f}; the photos are about "
                         f"{usual[0]}x{usual[1]} px, {expected:.3f}; at most {LARGEST_MISFIT:.0%} between the two is "
                         "taken; paint the mask over one of the photos")
    area = float(mask.mean()) * median(height * width for height, width in sizes)
    if area < LEAST_SIDE**2:
        raise InTraError(f"the region covers {area:.0f} px of a photo; expected at least {LEAST_SIDE}x{LEAST_SIDE}; "
                         "paint a larger region")


def roi_box(mask: Bool[np.ndarray, "h w"]) -> Box:
    """The smallest box around all that is inside.

    >>> roi_box(np.array([[False, False], [False, True]]))
    (0.5, 0.5, 1.0, 1.0)
    """
    (height, width), (rows, cols) = mask.shape, (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return (float(rows[0] / height), float(cols[0] / width), float((rows[-1] + 1) / height),
            float((cols[-1] + 1) / width))


def roi_text(mask: Bool[np.ndarray, "h w"], sizes: Sequence[tuple[int, int]]) -> str:
    """For people: how much of photos of these heights and widths is inside, and the box in the most usual of them.

    >>> roi_text(np.array([[False, False], [False, True]]), [(480, 640)])
    'region: 25.0 % of the photo, box 240x320 px'
    """
    size = Counter(sizes).most_common(1)[0][0]
    rows, cols = box_slices(size, roi_box(mask))
    return (f"region: {100 * mask.mean():.1f} % of the photo, box {rows.stop - rows.start}x{cols.stop - cols.start} "
            "px")


def roi_digest(mask: Bool[np.ndarray, "h w"]) -> str:
    """The same for the same mask, whatever its file."""
    return pixels_digest(mask[:, :, None]).hex()


def save_roi(mask: Bool[np.ndarray, "h w"] | None, path: Path) -> None:
    """Writes a PNG, white inside: whole or not at all. Another one there, of a run before or painted by hand, is kept
    beside it as EARLIER_ROI_FILE, in place of the one before it; without a region none stays.
    """
    content = None if mask is None else encode_png(mask.astype(np.uint8) * 255)
    with suppress(OSError):
        if path.read_bytes() == content:
            return
        path.replace(path.with_name(EARLIER_ROI_FILE))
    if content is not None:
        write_atomically(path, content)
