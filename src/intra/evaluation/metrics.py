"""How well scores and anomaly maps tell good from anomalous: pure functions, exact, without bins or sampling.

A higher score means more anomalous; labels and masks are True where anomalous. A metric that the data cannot give (one
class only) is None, never a made-up number; `missing_class` says why. Image-level metrics are scikit-learn's. All
pixel-level metrics come from one sort of the good pixels and one of the anomalous: the 12 million pixels of a usual
category take half a second where scikit-learn takes nine, and little more memory than the maps.

AUPRO: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.2.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import integrate, ndimage
from sklearn import metrics as sk

from intra.errors import InTraError

__all__ = ["MAX_FALSE_POSITIVE_RATE", "PixelCurve", "aupro", "auroc", "average_precision", "f1_max",
           "false_reject_rate", "missing_class", "pixel_curve", "recall", "roc_curve"]

MAX_FALSE_POSITIVE_RATE = 0.3  # where MVTec cuts the PRO curve
TOUCHING = np.ones((3, 3), dtype=int)  # pixels of one region touch at a side or a corner, as in MVTec's evaluation
NUM_PLOT_POINTS = 300  # of a thinned curve; more cannot be seen

Scores = Float[np.ndarray, " n"]
Labels = Bool[np.ndarray, " n"]
Points = Float[np.ndarray, "_ 2"]  # false positive rate, then the rate of what is found; both in [0, 1]
Maps = Sequence[Float[np.ndarray, "_ _"]]  # one per image, each of its own height and width
Masks = Sequence[Bool[np.ndarray, "_ _"]]


def auroc(scores: Scores, labels: Labels) -> float | None:
    """The chance that an anomalous item scores above a good one (a tie counts half)."""
    return None if _unusable(scores, labels) else float(sk.roc_auc_score(labels, scores))


def average_precision(scores: Scores, labels: Labels) -> float | None:
    """The precision averaged over the steps of the recall, without interpolation."""
    return None if _unusable(scores, labels) else float(sk.average_precision_score(labels, scores))


def f1_max(scores: Scores, labels: Labels) -> float | None:
    """The largest harmonic mean of precision and recall over all thresholds, so what the best of them would give."""
    if _unusable(scores, labels):
        return None
    precision, found, _ = sk.precision_recall_curve(labels, scores)
    return float(np.max(2 * precision * found / np.maximum(precision + found, np.finfo(float).tiny)))


def roc_curve(scores: Scores, labels: Labels) -> Points | None:
    """False and true positive rate at every threshold, thinned for a plot."""
    if _unusable(scores, labels):
        return None
    false_positive_rate, true_positive_rate, _ = sk.roc_curve(labels, scores)
    return _thinned(false_positive_rate, true_positive_rate)


def recall(scores: Scores, labels: Labels, threshold: float) -> float | None:
    """The share of anomalous items that score above the threshold."""
    _refuse_nan(scores)
    return float(np.mean(scores[labels] > threshold)) if labels.any() else None


def false_reject_rate(scores: Scores, labels: Labels, threshold: float) -> float | None:
    """The share of good items that score above the threshold."""
    _refuse_nan(scores)
    return float(np.mean(scores[~labels] > threshold)) if not labels.all() else None


def missing_class(labels: Labels) -> str | None:
    """Why no metric can compare these test images, or None if both classes are there."""
    missing = [name for name, there in (("good", (~labels).any()), ("anomalous", labels.any())) if not there]
    return f"no {' and no '.join(missing)} test images" if missing else None


def aupro(maps: Maps, masks: Masks, *, max_false_positive_rate: float = MAX_FALSE_POSITIVE_RATE) -> float | None:
    """The normalised area under the PRO curve up to a false positive rate; see `PixelCurve.aupro`."""
    curve = pixel_curve(maps, masks)
    return None if curve is None else curve.aupro(max_false_positive_rate)


@dataclass(frozen=True)
class PixelCurve:
    """What is found in the pixels of all images as the threshold falls: the curves' corners, from (0, 0) to the end.

    Two corners for each distinct value of an anomalous pixel: above it, and with it. Between them the curves are
    straight lines, which is how a tie of good and anomalous pixels counts half.
    """

    false_positives: Float[np.ndarray, " corners"]  # good pixels of all images that are above the threshold
    true_positives: Float[np.ndarray, " corners"]  # anomalous pixels that are
    region_overlap: Float[np.ndarray, " corners"]  # the share found of each region, averaged over the regions

    @property
    def false_positive_rate(self) -> Float[np.ndarray, " corners"]:
        """In [0, 1], rising."""
        return self.false_positives / self.false_positives[-1]

    def auroc(self) -> float:
        """The chance that an anomalous pixel lies above a good one (a tie counts half)."""
        area = integrate.trapezoid(self.true_positives, self.false_positives)
        return float(area / (self.true_positives[-1] * self.false_positives[-1]))

    def average_precision(self) -> float:
        """The precision averaged over the steps of the recall, without interpolation."""
        found, false = self.true_positives[2::2], self.false_positives[2::2]  # the second corner of each value
        steps = np.diff(found, prepend=0)
        return float(np.sum(steps * found / (found + false)) / found[-1])

    def aupro(self, max_false_positive_rate: float = MAX_FALSE_POSITIVE_RATE) -> float:
        """The area under the PRO curve up to a false positive rate, divided by that rate: in [0, 1].

        Every region counts the same, however small. Chance gives half the rate: 0.15 at 0.3.
        """
        if not 0 < max_false_positive_rate <= 1:
            raise InTraError(f"max_false_positive_rate is {max_false_positive_rate}; it must lie in (0, 1]")
        x, y, limit = self.false_positive_rate, self.region_overlap, max_false_positive_rate
        inside = int(np.searchsorted(x, limit, side="right"))
        area = integrate.trapezoid(y[:inside], x[:inside])
        if inside < len(x):  # the corner beyond the limit: cut its line at the limit
            rise = (y[inside] - y[inside - 1]) * (limit - x[inside - 1]) / (x[inside] - x[inside - 1])
            area += (limit - x[inside - 1]) * (y[inside - 1] + rise / 2)
        return float(min(area / limit, 1.0))

    def roc_points(self) -> Points:
        """False and true positive rate, thinned for a plot."""
        return _thinned(self.false_positive_rate, self.true_positives / self.true_positives[-1])

    def pro_points(self) -> Points:
        """False positive rate and mean region overlap, thinned for a plot."""
        return _thinned(self.false_positive_rate, self.region_overlap)


def pixel_curve(maps: Maps, masks: Masks) -> PixelCurve | None:
    """The curve over all pixels of all images; None if no pixel is anomalous or none is good.

    A region is one connected part of a mask, touching corners included. Raises InTraError on NaN and if a map and its
    mask differ in size.
    """
    good, anomalous, weights = _split(maps, masks)
    if not len(good) or not len(anomalous):
        return None
    good.sort()
    order = np.argsort(-anomalous, kind="stable")
    values = anomalous[order]
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # of each run of equal values
    found, overlap = last + 1.0, np.cumsum(weights[order])[last]
    above = len(good) - np.searchsorted(good, values[last], side="right")
    with_it = len(good) - np.searchsorted(good, values[last], side="left")

    corners = np.empty((3, 2 * len(last) + 2))
    corners[:, 0] = 0
    corners[:, -1] = len(good), len(anomalous), 1
    corners[0, 1:-1:2], corners[0, 2:-1:2] = above, with_it
    for row, reached in ((1, found), (2, overlap / overlap[-1])):
        corners[row, 1:-1:2], corners[row, 2:-1:2] = np.append(0, reached[:-1]), reached
    return PixelCurve(*corners)


def _split(maps: Maps, masks: Masks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The values of all good pixels, of all anomalous pixels, and of each of these 1 / the area of its region."""
    if len(maps) != len(masks):
        raise InTraError(f"{len(maps)} anomaly maps came with {len(masks)} masks; pass one mask for each map")
    dtype = np.result_type(np.float32, *{anomaly_map.dtype for anomaly_map in maps})
    good, num_good = np.empty(sum(mask.size - np.count_nonzero(mask) for mask in masks), dtype), 0
    anomalous: list[np.ndarray] = [np.empty(0, np.float32)]
    weights: list[np.ndarray] = [np.empty(0)]
    for anomaly_map, mask in zip(maps, masks, strict=True):
        if anomaly_map.shape != mask.shape:
            raise InTraError(f"an anomaly map of {anomaly_map.shape} px came with a mask of {mask.shape} px; "
                             "both must have the size of the image")
        _refuse_nan(anomaly_map)
        part = anomaly_map[~mask]
        good[num_good : num_good + len(part)] = part
        num_good += len(part)
        if mask.any():
            regions = ndimage.label(mask, structure=TOUCHING)[0][mask]
            anomalous.append(anomaly_map[mask])
            weights.append(1 / np.bincount(regions)[regions])
    return good, np.concatenate(anomalous), np.concatenate(weights)


def _unusable(scores: Scores, labels: Labels) -> bool:
    _refuse_nan(scores)
    return missing_class(labels) is not None


def _refuse_nan(values: np.ndarray) -> None:
    if np.isnan(values).any():
        raise InTraError(f"{np.isnan(values).sum()} of {values.size} scores are NaN, so nothing can be ranked; "
                         "train the model again, or check its input images")


def _thinned(x: np.ndarray, y: np.ndarray) -> Points:
    """At most NUM_PLOT_POINTS + 1 corners, evenly spread along the curve; both ends stay."""
    length = x + y  # both rise from 0 to 1: the way along the curve, measured along the axes
    picks = np.searchsorted(length, np.linspace(0, length[-1], NUM_PLOT_POINTS))
    picks = np.unique(np.append(picks, len(x) - 1))
    return np.stack([x[picks], y[picks]], axis=1)
