"""The pictures of a verdict as PNG files, each made only if it was asked for."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt

from intra.data.images import encode_png
from intra.evaluation.pictures import heat, heatmap_overlay, outline, shrink, to_rgb8
from intra.inspection.detector import Prediction

__all__ = ["KINDS", "Drawn", "MapScale", "draw", "map_scale"]

HEAT_SIDE_PX = 1024  # of the heat picture, which is for the page: the map itself is not finer
COMPRESS_LEVEL = 1  # a third of the time of the usual 6, for files that are fetched once


class MapScale(NamedTuple):
    """A map's value is offset + step · the pixel of its 16-bit picture."""

    offset: float
    step: float


class Drawn(NamedTuple):
    """PNG files by kind; the scale of the map, if it is among them."""

    files: dict[str, bytes]
    scale: MapScale | None


def map_scale(anomaly_map: Float[np.ndarray, "h w"]) -> MapScale:
    """The scale that spreads a map over 16 bits; a flat one gets step 0."""
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    return MapScale(low, (high - low) / 65535)


def draw(photo: Shaped[np.ndarray, "h w c"], prediction: Prediction, kinds: Sequence[str]) -> Drawn:
    """The pictures of these kinds. Raises KeyError for another kind than those of KINDS."""
    files = {kind: encode_png(KINDS[kind](photo, prediction), compress_level=COMPRESS_LEVEL) for kind in kinds}
    return Drawn(files, map_scale(prediction.anomaly_map) if "map" in files else None)


def _map16(photo: Shaped[np.ndarray, "h w c"], prediction: Prediction) -> UInt[np.ndarray, "h w"]:
    scale = map_scale(prediction.anomaly_map)
    return np.rint((prediction.anomaly_map - scale.offset) / (scale.step or 1)).astype(np.uint16)


def _heat8(photo: Shaped[np.ndarray, "h w c"], prediction: Prediction) -> UInt[np.ndarray, "h w"]:
    small = shrink(prediction.anomaly_map, HEAT_SIDE_PX)
    return np.rint(heat(small, prediction.threshold) * 255).astype(np.uint8)


KINDS: dict[str, Callable[[np.ndarray, Prediction], np.ndarray]] = {  # kind: what draws it
    "photo": lambda photo, prediction: to_rgb8(photo),  # for browsers, which know fewer formats
    "repaired": lambda photo, prediction: to_rgb8(prediction.repaired),
    "map": _map16,  # the raw anomaly map, 16-bit grey
    "heat": _heat8,  # the map on the report's scale: 8-bit grey, the threshold at 127.5
    "mask": lambda photo, prediction: prediction.mask.astype(np.uint8) * 255,
    "overlay": lambda photo, prediction: heatmap_overlay(photo, prediction.anomaly_map, prediction.threshold),
    "outline": lambda photo, prediction: outline(photo, prediction.mask),
}
