"""Pictures of a verdict for people: the photo, its heatmap and its outlines, as uint8 RGB.

Colours mean the same in every picture: they follow the anomaly map in units of the threshold, never of one image's own
range, so two pictures can be compared and a good part stays grey.
"""

import base64
import io

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image

from intra.errors import InTraError

__all__ = ["PREDICTED", "TRUTH", "data_uri", "heat", "heat_colors", "heatmap_overlay", "outline",
           "paint_opacity", "shrink", "to_rgb8"]

PREDICTED = (255, 96, 0)  # outline of what was found
TRUTH = (0, 229, 255)  # outline of what is marked; told apart from PREDICTED with any kind of colour vision
WEBP_QUALITY = 82  # no artefact to be seen at thumbnail size, about 20 KB each

# Nine evenly spaced colours of matplotlib's inferno (CC0), evenly rising in lightness.
INFERNO = np.array([(0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51),
                    (249, 140, 10), (249, 201, 50), (252, 255, 164)], dtype=np.float32)  # fmt: skip
VISIBLE_FROM, FULL_AT = 1 / 3, 2 / 3  # heat at half and at twice the threshold: not painted below, strongest above
STRONGEST = 0.8  # the photo still shows through
ROWS_AT_ONCE = 256

RGB8 = UInt8[np.ndarray, "h w 3"]


def to_rgb8(image: np.ndarray) -> RGB8:
    """Any image as 8-bit RGB: integers by their full range, floats from [0, 1], the first three of more channels.

    Two channels are averaged. Raises InTraError on other shapes and types.
    """
    if np.issubdtype(image.dtype, np.integer):
        unit = image.astype(np.float32) / np.iinfo(image.dtype).max
    elif image.dtype == bool or np.issubdtype(image.dtype, np.floating):
        unit = image.astype(np.float32)
    else:
        raise InTraError(f"image has values of type {image.dtype}; expected integers, or floats in [0, 1]")
    if unit.ndim == 2:
        unit = unit[..., None]
    if unit.ndim != 3 or unit.shape[2] == 0:
        raise InTraError(f"image has shape {image.shape}; expected (height, width) or (height, width, channels)")
    rgb = unit[..., :3] if unit.shape[2] >= 3 else np.repeat(unit.mean(axis=2, keepdims=True), 3, axis=2)
    return np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)


def heat(values: Float[np.ndarray, "*shape"], threshold: float) -> Float[np.ndarray, "*shape"]:
    """Scores or maps on the scale of the report, [0, 1): 0 stays 0, the threshold is 0.5, three times it is 0.75."""
    ratio = np.maximum(values, 0) / max(abs(threshold), np.finfo(np.float32).tiny)
    return 1 - 1 / (1 + ratio)


def heat_colors(heats: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape 3"]:
    """The colour of each heat in [0, 1], as floats in [0, 255]."""
    at = np.linspace(0, 1, len(INFERNO))
    return np.stack([np.interp(heats, at, channel) for channel in INFERNO.T], axis=-1)


def paint_opacity(heats: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """How strongly each heat is painted over the photo, in [0, STRONGEST]."""
    return STRONGEST * np.clip((heats - VISIBLE_FROM) / (FULL_AT - VISIBLE_FROM), 0, 1)


def heatmap_overlay(
    image: Shaped[np.ndarray, "h w *c"], anomaly_map: Float[np.ndarray, "h w"], threshold: float
) -> RGB8:
    """The grey photo with the anomaly map painted over it; red is at the threshold, yellow far above."""
    grey = to_rgb8(image).astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
    picture = np.empty((*grey.shape, 3), np.uint8)
    for row in range(0, len(grey), ROWS_AT_ONCE):  # bounds the memory of large photos
        rows = slice(row, row + ROWS_AT_ONCE)
        heats = heat(anomaly_map[rows], threshold)
        paint = paint_opacity(heats)[..., None]
        picture[rows] = np.rint((1 - paint) * grey[rows, :, None] + paint * heat_colors(heats))
    return picture


def outline(
    image: Shaped[np.ndarray, "h w *c"], mask: Bool[np.ndarray, "h w"], truth: Bool[np.ndarray, "h w"] | None = None
) -> RGB8:
    """The photo with a line around what was found, and one in another colour around what is marked as a defect.

    The lines lie outside, so that the defect itself stays visible, also one of a single pixel.
    """
    picture = to_rgb8(image).copy()
    line = max(1, min(round(max(mask.shape) / 160), min(mask.shape) // 8))  # px; thin in narrow pictures too
    if truth is not None:
        picture[_ring(truth, line)] = TRUTH
    picture[_ring(mask, line)] = PREDICTED
    return picture


def shrink(image: np.ndarray, max_side: int) -> np.ndarray:
    """A uint8 RGB picture, a float32 map or a bool mask with sides of at most `max_side` px; never enlarged.

    A mask keeps its smallest regions.
    """
    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    if scale >= 1:
        return image
    size = max(1, round(width * scale)), max(1, round(height * scale))  # Pillow's order
    if image.dtype == bool:
        return np.asarray(Image.fromarray(image.astype(np.float32)).resize(size, Image.Resampling.BOX)) > 0
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def data_uri(picture: RGB8) -> str:
    """A picture as the text that an HTML page shows without any other file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="WEBP", quality=WEBP_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _ring(mask: Bool[np.ndarray, "h w"], line: int) -> Bool[np.ndarray, "h w"]:
    """The line around each region; along the border of the image it lies inside."""
    if not mask.any():
        return mask
    from scipy import ndimage  # slow to import: good photos do not wait for it

    grown = ndimage.maximum_filter(mask, size=2 * line + 1, mode="constant", cval=0)
    return grown & ~ndimage.minimum_filter(grown, size=2 * line + 1, mode="constant", cval=0)
