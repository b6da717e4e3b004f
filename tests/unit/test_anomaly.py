"""Anomaly maps and thresholds: what they mean, and what they promise."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intra.config import ScoringConfig
from intra.errors import InTraError
from intra.inspection.anomaly import (
    Reference,
    anomaly_map,
    difference_map,
    evidence_kinds,
    image_score,
    tails_of,
)
from intra.inspection.calibration import calibrate, choose_threshold, given_threshold, p_value


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def deviation_map(differences: torch.Tensor, reference: Reference, deviation: str) -> torch.Tensor:
    scoring = dataclasses.replace(ScoringConfig(), deviation=deviation)
    return anomaly_map(differences, reference, kinds=("difference",), scoring=scoring)


def test_the_papers_map_by_hand():
    reference = Reference.of(torch.stack([torch.full((1, 4, 4), 0.1), torch.full((1, 4, 4), 0.3)]), spread=False)
    differences = torch.tensor([0.2, 0.5, 0.0])[:, None, None, None].expand(3, 1, 4, 4)
    squared = deviation_map(differences, reference, "squared")
    torch.testing.assert_close(image_score(squared), torch.tensor([0.0, 0.09, 0.04]))
    clipped = deviation_map(differences, reference, "clipped")
    torch.testing.assert_close(image_score(clipped), torch.tensor([0.0, 0.3, 0.0]))
    signed = deviation_map(differences, reference, "signed")
    torch.testing.assert_close(image_score(signed), torch.tensor([0.0, 0.3, -0.2]))
    assert torch.equal(deviation_map(differences, reference, "none"), differences[:, 0])


def test_maps_are_raw():
    """Trap 7: a map that is scaled by its own range cannot rank images."""
    reference = Reference.of(torch.zeros(2, 1, 8, 8), spread=False)
    weak, strong = (torch.zeros(1, 1, 8, 8).index_fill(2, torch.tensor([3]), value) for value in (0.1, 0.4))
    scores = [image_score(deviation_map(maps, reference, "squared")).item() for maps in (weak, strong)]
    assert scores[1] == pytest.approx(16 * scores[0])


def test_spread_makes_restless_places_count_less():
    good = torch.zeros(50, 1, 1, 2)
    good[:, 0, 0, 0] = 0.01 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    good[:, 0, 0, 1] = 0.20 * torch.randn(50, generator=torch.Generator().manual_seed(1))
    away = deviation_map(torch.full((1, 1, 1, 2), 0.3), Reference.of(good, spread=True), "signed")
    assert away[0, 0, 0] > 1.5 * away[0, 0, 1]
    assert away.isfinite().all()


def test_spread_of_equal_maps_is_not_zero():
    away = deviation_map(rand(1, 1, 4, 4), Reference.of(torch.full((5, 1, 4, 4), 0.5), spread=True), "squared")
    assert away.isfinite().all()


def test_difference_lies_where_the_image_changed():
    image = rand(1, 3, 64, 64)
    changed = image.clone()
    changed[..., 8:24, 8:24] = 0.5
    difference = difference_map(image, changed, scales=(1, 2), blur_size=5)
    assert difference[0, 12:20, 12:20].mean() > 10 * difference[0, 40:].mean()
    assert difference_map(image, image, scales=(1, 2), blur_size=5).abs().max() < 1e-6


def test_a_held_out_image_is_scored_against_the_others():
    """An odd image among the held-out ones must not be excused by its own part in the mean."""
    maps = 0.1 * rand(6, 1, 8, 8)
    maps[2] += 1
    scoring = ScoringConfig(reference="validation")
    reference, scores = calibrate(maps, None, kinds=("difference",), scoring=scoring)
    others = Reference.of(torch.cat([maps[:2], maps[3:]]), spread=False)
    assert scores[2] == pytest.approx(image_score(deviation_map(maps[2:3], others, "squared")).item())
    torch.testing.assert_close(reference.mean, maps.mean(0))


def test_the_papers_reference_is_the_training_images():
    trained_on, held_out = 0.1 * rand(9, 1, 8, 8), 0.2 * rand(4, 1, 8, 8, seed=1)
    reference, scores = calibrate(held_out, trained_on, kinds=("difference",), scoring=ScoringConfig())
    torch.testing.assert_close(reference.mean, trained_on.mean(0))
    torch.testing.assert_close(torch.tensor(scores), image_score((held_out - trained_on.mean(0))[:, 0] ** 2))


def test_too_few_held_out_images_are_refused():
    with pytest.raises(InTraError, match="at least 3"):
        calibrate(rand(2, 1, 4, 4), None, kinds=("difference",),
                  scoring=dataclasses.replace(ScoringConfig(), reference="validation"))


ALL_KINDS = ("difference", "segmenter", "distribution")
SUMMED = dataclasses.replace(ScoringConfig(), distribution_weight=1.0)


def test_the_map_is_of_the_evidence_that_has_weight():
    assert evidence_kinds(ScoringConfig(), has_segmenter=False) == ("difference",)  # the paper
    assert evidence_kinds(SUMMED, has_segmenter=True) == ALL_KINDS
    silent = dataclasses.replace(SUMMED, difference_weight=0.0, segmenter_weight=0.0)
    assert evidence_kinds(silent, has_segmenter=True) == ("distribution",)


def test_evidence_is_summed_as_the_logarithm_of_how_rare_it_is():
    """Of values with an exponential tail, one as rare as p among good pixels gives -log p, whatever the unit."""
    good = -torch.log(rand(40, 1, 50, 50)).expand(-1, 2, -1, -1) * torch.tensor([1.0, 7.0])[:, None, None]
    kinds = ("segmenter", "distribution")
    reference = Reference(torch.zeros(2, 50, 50), None)
    reference = dataclasses.replace(reference, tails=tails_of(good, reference, kinds=kinds, scoring=SUMMED))
    rare = torch.tensor([5.0, 0.0, 5.0]), torch.tensor([0.0, 35.0, 35.0])  # one in e⁵ pixels lies so high
    found = anomaly_map(torch.stack(rare, dim=1)[..., None, None].expand(3, 2, 50, 50), reference, kinds=kinds,
                        scoring=SUMMED)
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([5.0, 5.0, 10.0]), rtol=0.02, atol=0)
    weighted = anomaly_map(torch.stack(rare, dim=1)[..., None, None].expand(3, 2, 50, 50), reference, kinds=kinds,
                           scoring=dataclasses.replace(SUMMED, segmenter_weight=2.0))
    torch.testing.assert_close(weighted[:, 0, 0], torch.tensor([10.0, 5.0, 15.0]), rtol=0.02, atol=0)


def test_evidence_that_is_the_same_everywhere_gives_finite_maps():
    flat = torch.ones(4, 3, 8, 8)
    reference, scores = calibrate(flat, flat[:, :2], kinds=ALL_KINDS, scoring=SUMMED)
    assert np.isfinite(scores).all()
    found = anomaly_map(rand(2, 3, 8, 8), reference, kinds=ALL_KINDS, scoring=SUMMED)
    assert found.isfinite().all()


@pytest.mark.parametrize("source", ["training", "validation"])
def test_log_odds_count_from_good_images_mean_and_the_distribution_as_it_is(source):
    held_out, trained_on = rand(6, 3, 8, 8), rand(9, 2, 8, 8, seed=1)
    scoring = dataclasses.replace(SUMMED, reference=source)
    reference, scores = calibrate(held_out, trained_on, kinds=ALL_KINDS, scoring=scoring)
    means = trained_on if source == "training" else held_out[:, :2]
    torch.testing.assert_close(reference.mean, torch.cat([means.mean(0), torch.zeros(1, 8, 8)]))
    assert reference.tails.shape == (3, 2)
    assert len(scores) == 6


def test_threshold_by_hand():
    scores = [float(n) for n in range(1, 100)]  # 99 images: 1 % means that the largest may just not be passed
    assert choose_threshold(scores, 0.01).value == 99
    assert choose_threshold(scores, 0.05).value == 95
    assert choose_threshold(scores, 0.05).false_reject_rate == pytest.approx(0.05)
    few = choose_threshold(scores[:19], 0.01)
    assert few.value == 19
    assert few.false_reject_rate == pytest.approx(0.05)
    assert "99 images" in few.promise


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.floats(0.001, 0.999))
def test_threshold_rejects_no_more_of_its_own_images_than_promised(scores, rate):
    threshold = choose_threshold(scores, rate)
    rejected = sum(score > threshold.value for score in scores)
    assert rejected <= threshold.false_reject_rate * (len(scores) + 1) - 1 + 1e-6
    assert threshold.false_reject_rate <= max(rate, 1 / (len(scores) + 1)) + 1e-9


@pytest.mark.parametrize(("count", "rate"), [(20, 0.01), (60, 0.05), (200, 0.02)])
def test_the_promise_is_kept_on_new_images(count, rate):
    """Over many draws of good images the mean share of new good ones that are rejected is what was promised."""
    rng = np.random.default_rng(0)
    realised = []
    for _ in range(2000):
        threshold = choose_threshold(rng.gamma(2, size=count).tolist(), rate)
        realised.append((rng.gamma(2, size=50) > threshold.value).mean())
    promised = choose_threshold([float(n) for n in range(count)], rate).false_reject_rate
    assert np.mean(realised) == pytest.approx(promised, rel=0.1)


def test_a_threshold_of_ones_own():
    assert given_threshold([1.0, 2.0, 3.0], 2.5).false_reject_rate == pytest.approx(0.5)
    with pytest.raises(InTraError, match="finite"):
        given_threshold([1.0], float("nan"))


@pytest.mark.parametrize("rate", [0, 1, -0.1, 2])
def test_wrong_rates_are_refused(rate):
    with pytest.raises(InTraError, match="between 0 and 1"):
        choose_threshold([1.0], float(rate))
    with pytest.raises(InTraError, match="good images"):
        choose_threshold([], 0.01)


def test_the_interval_is_that_of_order_statistics():
    """Of 2,000 sets of scores 9 of 10 have a realised rate in the interval, known exactly as scores are uniform."""
    rng = np.random.default_rng(0)
    for count, rate in ((20, 0.01), (60, 0.05), (300, 0.02)):
        thresholds = [choose_threshold(rng.random(count).tolist(), rate) for _ in range(2000)]
        realised = np.array([1 - threshold.value for threshold in thresholds])
        inside = (realised >= thresholds[0].lowest_rate) & (realised <= thresholds[0].highest_rate)
        assert inside.mean() == pytest.approx(0.9, abs=0.025)
        assert (realised > thresholds[0].highest_rate).mean() == pytest.approx(0.05, abs=0.02)


def test_the_interval_of_a_threshold_of_ones_own_is_clopper_pearsons():
    scores = [float(n) for n in range(20)]
    chosen = given_threshold(scores, 17.5)  # 2 of 20; 0.018 to 0.283 in tables of 90 % intervals
    assert (chosen.lowest_rate, chosen.highest_rate) == pytest.approx((0.0181, 0.2826), abs=1e-4)
    assert given_threshold(scores, 99.0).lowest_rate == 0
    assert given_threshold(scores, -1.0).highest_rate == 1


def test_sixty_images_cannot_promise_a_thousandth():
    said = choose_threshold([float(n) for n in range(60)], 0.001).promise
    assert "0.10% was asked for, which takes at least 999 images" in said
    assert "9 of 10 such sets of images between 0.09% and 4.87%" in said


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 9), st.floats(0.01, 0.9))
def test_p_values_and_thresholds_agree(scores, score, rate):
    """What lies above the threshold for a rate has a p-value of at most what it promises."""
    threshold = choose_threshold([float(each) for each in scores], rate)
    p = p_value(float(score), [float(each) for each in scores])
    assert 1 / (len(scores) + 1) <= p <= 1
    assert (score > threshold.value) <= (p <= threshold.false_reject_rate + 1e-9)


def test_held_out_images_have_no_say_in_their_own_scores():
    held_out, trained_on = rand(11, 3, 8, 8), rand(9, 2, 8, 8, seed=1)
    asked: list[list[int]] = []

    def refit(places: list[int]) -> torch.Tensor:
        asked.append(places)
        return held_out + len(asked)

    _, scores = calibrate(held_out, trained_on, kinds=ALL_KINDS, scoring=SUMMED, refit=refit)
    assert len(asked) == 5
    assert all(sum(place not in places for places in asked) == 1 for place in range(11))
    reference = Reference(torch.cat([trained_on.mean(0), torch.zeros(1, 8, 8)]), None)
    others = (held_out + 1)[asked[0]]  # as the first fold sees them
    tails = tails_of(others, reference, kinds=ALL_KINDS, scoring=SUMMED)
    expected = image_score(anomaly_map(held_out[:1] + 1, dataclasses.replace(reference, tails=tails), kinds=ALL_KINDS,
                                       scoring=SUMMED))
    assert scores[0] == pytest.approx(expected.item(), rel=1e-4)
