"""Metrics against hand-computed cases, against slow independent implementations, and against scikit-learn."""

import itertools
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate
from sklearn import metrics as sk

from intra.errors import InTraError
from intra.evaluation import metrics


def _regions(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Connected parts, touching corners included, by flooding."""
    left = {(int(r), int(c)) for r, c in zip(*np.nonzero(mask), strict=True)}
    regions = []
    while left:
        region, queue = set(), deque([left.pop()])
        while queue:
            row, col = queue.popleft()
            region.add((row, col))
            near = {(row + dr, col + dc) for dr in (-1, 0, 1) for dc in (-1, 0, 1)} & left
            left -= near
            queue.extend(near)
        regions.append(region)
    return regions


def slow_aupro(maps: list[np.ndarray], masks: list[np.ndarray], limit: float) -> float:
    """The definition, threshold by threshold, in plain loops."""
    regions = [(i, region) for i, mask in enumerate(masks) for region in _regions(mask)]
    num_good = sum(int((~mask).sum()) for mask in masks)
    points = [(0.0, 0.0)]
    for threshold in sorted({float(v) for m in maps for v in m.ravel()}, reverse=True):
        found = [m >= threshold for m in maps]
        false = sum(int((f & ~mask).sum()) for f, mask in zip(found, masks, strict=True)) / num_good
        overlaps = [sum(bool(found[i][place]) for place in region) / len(region) for i, region in regions]
        points.append((false, sum(overlaps) / len(overlaps)))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit:
            break
        end = min(x1, limit)
        height = y1 if x1 <= limit else y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        area += (end - x0) * (y0 + height) / 2
    return area / limit


def slow_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """The share of pairs that are ranked right, a tie counting half."""
    pairs = [(a > g) + 0.5 * (a == g) for a in scores[labels] for g in scores[~labels]]
    return sum(pairs) / len(pairs)


def _random_case(seed: int, levels: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Maps of several sizes with many ties, and masks of blobs and single pixels; one image is good."""
    rng = np.random.default_rng(seed)
    sizes = [(5, 7), (8, 8), (6, 3), (4, 9)]
    maps = [rng.integers(0, levels, size).astype(np.float32) / levels for size in sizes]
    masks = [rng.random(size) < 0.25 for size in sizes]
    masks[1][:] = False
    masks[0][0, 0] = True
    return maps, masks


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_aupro_equals_the_definition(levels: int, limit: float) -> None:
    for seed in range(5):
        maps, masks = _random_case(seed, levels)
        assert metrics.aupro(maps, masks, max_false_positive_rate=limit) == pytest.approx(
            slow_aupro(maps, masks, limit), abs=1e-12)


@given(seed=st.integers(0, 10**6), levels=st.integers(1, 6), limit=st.floats(0.01, 1.0))
@settings(max_examples=40, deadline=None)
def test_aupro_equals_the_definition_for_any_case(seed: int, levels: int, limit: float) -> None:
    maps, masks = _random_case(seed, levels)
    assert metrics.aupro(maps, masks, max_false_positive_rate=limit) == pytest.approx(
        slow_aupro(maps, masks, limit), abs=1e-9)


def _two_regions() -> np.ndarray:
    """10×10 px: one region of 1 px, one of 9 px, 90 good pixels."""
    mask = np.zeros((10, 10), bool)
    mask[0, 0] = True
    mask[5:8, 5:8] = True
    return mask


def test_aupro_by_hand() -> None:
    mask = _two_regions()
    perfect = mask.astype(np.float32)
    assert metrics.aupro([perfect], [mask]) == pytest.approx(1.0)
    # one step from (0, 0) to (1, 1): 0.3 * 0.3 / 2 of area, over 0.3
    assert metrics.aupro([np.zeros_like(perfect)], [mask]) == pytest.approx(0.15)
    # all good pixels come before any anomalous one: nothing is found below a false positive rate of 1
    assert metrics.aupro([1 - perfect], [mask]) == pytest.approx(0.0)


def test_a_small_region_weighs_as_much_as_a_large_one() -> None:
    mask = _two_regions()
    only_small, only_large = np.zeros((2, 10, 10), np.float32)
    only_small[0, 0] = 1
    only_large[5:8, 5:8] = 1
    # from (0, 0.5) a straight line to (1, 1), up to 0.3: (0.5 + 0.65) / 2
    assert metrics.aupro([only_small], [mask]) == pytest.approx(0.575)
    assert metrics.aupro([only_large], [mask]) == pytest.approx(0.575)
    curve = metrics.pixel_curve([only_small], [mask])
    assert curve is not None
    assert curve.auroc() == pytest.approx(0.55)  # pixels, not regions: 0.1 of them found, so (0.1 + 1) / 2


def test_regions_that_touch_at_a_corner_are_one() -> None:
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = mask[1, 1] = mask[3, 3] = True  # two regions: two pixels, and one
    found = np.zeros((4, 4), np.float32)
    found[0, 0] = 1
    curve = metrics.pixel_curve([found], [mask])
    assert curve is not None
    assert curve.region_overlap[2] == pytest.approx((1 / 2 + 0) / 2)


def test_aupro_over_images_counts_false_positives_of_all() -> None:
    # good image: 10 of its 100 px lie above every defect; 10 / (100 + 90) of the good pixels
    mask = _two_regions()
    good = np.zeros((10, 10), np.float32)
    good[0] = 2
    limit = 20 / 190
    assert metrics.aupro([mask.astype(np.float32), good], [mask, np.zeros_like(mask)],
                         max_false_positive_rate=limit) == pytest.approx(0.5)


@pytest.mark.parametrize("levels", [2, 7, 10_000])
def test_pixel_metrics_equal_scikit_learn(levels: int) -> None:
    maps, masks = _random_case(3, levels)
    scores, labels = (np.concatenate([a.ravel() for a in arrays]) for arrays in (maps, masks))
    curve = metrics.pixel_curve(maps, masks)
    assert curve is not None
    assert curve.auroc() == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    assert curve.average_precision() == pytest.approx(sk.average_precision_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("levels", [1, 3, 1000])
def test_image_metrics_equal_slow_ones(levels: int) -> None:
    rng = np.random.default_rng(levels)
    scores, labels = rng.integers(0, levels, 40) / levels, rng.random(40) < 0.4
    assert metrics.auroc(scores, labels) == pytest.approx(slow_auroc(scores, labels))
    cuts = []
    for threshold in np.unique(scores)[::-1]:
        above = scores >= threshold
        cuts.append((float((above & labels).sum() / above.sum()), float((above & labels).sum() / labels.sum())))
    steps = np.diff([0, *(r for _, r in cuts)])
    assert metrics.average_precision(scores, labels) == pytest.approx(sum(p * s for (p, _), s in zip(cuts, steps,
                                                                                                   strict=True)))
    assert metrics.f1_max(scores, labels) == pytest.approx(max(2 * p * r / (p + r) if p + r else 0 for p, r in cuts))


def test_image_metrics_by_hand() -> None:
    scores, labels = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert metrics.auroc(scores, labels) == 0.75
    assert metrics.average_precision(scores, labels) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert metrics.f1_max(scores, labels) == pytest.approx(0.8)  # everything from 0.35 up: precision 2/3, recall 1
    assert metrics.recall(scores, labels, 0.35) == 0.5  # a score at the threshold is not above it
    assert metrics.false_reject_rate(scores, labels, 0.35) == 0.5
    points = metrics.roc_curve(scores, labels)
    assert points is not None
    assert points.tolist() == [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]]


IMAGE_METRICS = [metrics.auroc, metrics.average_precision, metrics.f1_max, metrics.roc_curve]


@pytest.mark.parametrize("metric", IMAGE_METRICS)
@pytest.mark.parametrize("anomalous", [False, True])
def test_one_class_alone_has_no_metric(metric, anomalous: bool) -> None:
    labels = np.full(5, anomalous)
    assert metric(np.arange(5.0), labels) is None
    assert metrics.missing_class(labels) == ("no good test images" if anomalous else "no anomalous test images")


def test_rates_of_a_missing_class_are_none() -> None:
    scores, good = np.arange(4.0), np.zeros(4, bool)
    assert metrics.recall(scores, good, 1.0) is None
    assert metrics.false_reject_rate(scores, good, 1.0) == 0.5
    assert metrics.recall(scores, ~good, 1.0) == 0.5
    assert metrics.false_reject_rate(scores, ~good, 1.0) is None
    assert metrics.missing_class(np.array([True, False])) is None
    assert metrics.missing_class(np.empty(0, bool)) == "no good and no anomalous test images"


@pytest.mark.parametrize("mask", [np.zeros((3, 4), bool), np.ones((3, 4), bool)])
def test_no_pixel_metric_without_both_kinds_of_pixels(mask: np.ndarray) -> None:
    flat = np.ones((3, 4), np.float32)
    assert metrics.pixel_curve([flat], [mask]) is None
    assert metrics.aupro([flat], [mask]) is None
    assert metrics.pixel_curve([], []) is None


def test_a_mask_that_fills_an_image_is_one_region() -> None:
    maps = [np.ones((3, 4), np.float32), np.zeros((2, 2), np.float32)]
    masks = [np.ones((3, 4), bool), np.zeros((2, 2), bool)]
    assert metrics.aupro(maps, masks) == pytest.approx(1.0)


def test_order_of_images_does_not_matter() -> None:
    maps, masks = _random_case(1, 6)
    order = [2, 0, 3, 1]
    shuffled = [maps[i] for i in order], [masks[i] for i in order]
    assert metrics.aupro(*shuffled) == pytest.approx(metrics.aupro(maps, masks), abs=1e-12)


@given(st.sampled_from([np.exp, np.cbrt, lambda x: 1000 * x - 7]), st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_only_the_ranking_matters(transform, seed: int) -> None:
    maps, masks = _random_case(seed, 50)
    changed = [transform(m.astype(np.float64)) for m in maps]
    assert metrics.aupro(changed, masks) == pytest.approx(metrics.aupro(maps, masks), abs=1e-12)
    before, after = metrics.pixel_curve(maps, masks), metrics.pixel_curve(changed, masks)
    assert before is not None
    assert after is not None
    assert after.auroc() == pytest.approx(before.auroc(), abs=1e-12)
    scores, labels = maps[0].ravel(), masks[0].ravel()
    for metric in (metrics.auroc, metrics.average_precision, metrics.f1_max):
        assert metric(transform(scores.astype(np.float64)), labels) == pytest.approx(metric(scores, labels))


def test_nan_is_refused() -> None:
    labels = np.array([True, False])
    for metric in IMAGE_METRICS:
        with pytest.raises(InTraError, match="1 of 2 scores are NaN"):
            metric(np.array([np.nan, 1.0]), labels)
    with pytest.raises(InTraError, match="NaN"):
        metrics.recall(np.array([np.nan, 1.0]), labels, 0.5)
    with pytest.raises(InTraError, match="NaN"):
        metrics.aupro([np.full((2, 2), np.nan, np.float32)], [np.eye(2, dtype=bool)])


def test_maps_and_masks_must_fit() -> None:
    with pytest.raises(InTraError, match=r"\(2, 3\) px came with a mask of \(3, 2\)"):
        metrics.aupro([np.zeros((2, 3), np.float32)], [np.ones((3, 2), bool)])
    with pytest.raises(InTraError, match="1 anomaly maps came with 2 masks"):
        metrics.aupro([np.zeros((2, 3), np.float32)], [np.ones((2, 3), bool)] * 2)
    with pytest.raises(InTraError, match="max_false_positive_rate is 0"):
        metrics.aupro([np.zeros((2, 2), np.float32)], [np.eye(2, dtype=bool)], max_false_positive_rate=0.0)


def test_a_thinned_curve_keeps_its_ends_and_its_area() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((200, 200)) < 0.1
    found = (rng.random((200, 200)) + 0.5 * mask).astype(np.float32)
    curve = metrics.pixel_curve([found], [mask])
    assert curve is not None
    points = curve.roc_points()
    assert len(points) <= metrics.NUM_PLOT_POINTS + 1
    assert points[0].tolist() == [0, 0]
    assert points[-1].tolist() == [1, 1]
    assert integrate.trapezoid(points[:, 1], points[:, 0]) == pytest.approx(curve.auroc(), abs=1e-3)
    assert (np.diff(curve.pro_points(), axis=0) >= 0).all()
