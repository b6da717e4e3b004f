"""What good images look like to the model, and the threshold, from good images that were not trained on."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from intra.config import ScoringConfig
from intra.errors import InTraError
from intra.inspection.anomaly import Evidence, Reference, anomaly_map, image_score, tails_of

__all__ = ["INTERVAL_SHARE", "Threshold", "calibrate", "check_held_out", "choose_threshold", "conformal_quantile",
           "given_threshold", "moved_threshold", "p_value"]

LEAST_HELD_OUT = 3  # images, to score each by what the others decide
NUM_FOLDS = 5  # of held-out images, where each anew costs a distribution
INTERVAL_SHARE = 0.9  # of sets of good images: in so many the realised rate lies in the stated interval


@dataclass(frozen=True)
class Threshold:
    """A threshold and what it promises."""

    value: float  # an image is anomalous if its score is above
    false_reject_rate: float  # the promised mean share of good images that are rejected
    asked_rate: float  # the rate that was asked for
    num_images: int  # good images, not trained on, from which it was taken
    # Of new good images, with this very threshold: the share that is rejected lies between these for INTERVAL_SHARE of
    # all sets of so many images. The defaults promise nothing.
    lowest_rate: float = 0.0
    highest_rate: float = 1.0

    @property
    def promise(self) -> str:
        """One sentence for people."""
        said = (f"from {self.num_images} good images that were not trained on: at most {self.false_reject_rate:.2%} of "
                f"good parts are rejected on average, and for {10 * INTERVAL_SHARE:.0f} of 10 such sets of images "
                f"between {self.lowest_rate:.2%} and {self.highest_rate:.2%}")
        if self.false_reject_rate > self.asked_rate:
            needed = math.ceil(1 / self.asked_rate) - 1
            said += f"; {self.asked_rate:.2%} was asked for, which takes at least {needed} images"
        return said


def choose_threshold(scores: Sequence[float], false_reject_rate: float) -> Threshold:
    """The lowest threshold that rejects at most this share of good images, from the scores of n good ones.

    Split-conformal: the k-th smallest score, k = ceil((n + 1)·(1 − rate)). A new good image is exchangeable with the n,
    so it lies above with a probability of at most `rate`. If k > n, too few images for that rate, the largest score is
    taken, which promises 1 / (n + 1). Raises InTraError without scores or with a rate outside (0, 1).

    That is a mean over sets of n images. With one set in hand, the share of new good images above the k-th of n scores
    follows Beta(n + 1 - k, k), whatever the scores' distribution (Vovk 2012): its quantiles are the interval.
    """
    value = conformal_quantile(scores, false_reject_rate)
    n = len(scores)
    k = _rank(n, false_reject_rate)
    return Threshold(value, (n + 1 - k) / (n + 1), false_reject_rate, n,
                     _beta_quantile(n + 1 - k, k, (1 - INTERVAL_SHARE) / 2),
                     _beta_quantile(n + 1 - k, k, (1 + INTERVAL_SHARE) / 2))


def conformal_quantile(scores: Sequence[float], false_reject_rate: float) -> float:
    """The value of `choose_threshold`, without its interval."""
    if not 0 < false_reject_rate < 1:
        raise InTraError(f"the false-reject rate is {false_reject_rate}; it must lie between 0 and 1, e.g. 0.01")
    if not scores:
        raise InTraError("a threshold needs the scores of good images that were not trained on; there are none")
    return sorted(float(score) for score in scores)[_rank(len(scores), false_reject_rate) - 1]


def _rank(n: int, false_reject_rate: float) -> int:
    return min(n, math.ceil((n + 1) * (1 - false_reject_rate) - 1e-9))  # rounding must not ask for one image more


def given_threshold(scores: Sequence[float], value: float) -> Threshold:
    """A threshold that a person chose, with the share of good images that it promises to reject at most.

    It does not come from the scores, so those above it are counted; the interval is Clopper and Pearson's (1934).
    """
    if not math.isfinite(value):
        raise InTraError(f"the threshold is {value}; it must be a finite number")
    n, above = len(scores), sum(score > value for score in scores)
    rate = (above + 1) / (n + 1)
    return Threshold(float(value), rate, rate, n,
                     _beta_quantile(above, n - above + 1, (1 - INTERVAL_SHARE) / 2) if above else 0.0,
                     _beta_quantile(above + 1, n - above, (1 + INTERVAL_SHARE) / 2) if above < n else 1.0)


def p_value(score: float, held_out_scores: Sequence[float]) -> float:
    """How unusual a score is among good images that were not trained on, (1 + those as high) / (n + 1).

    Conformal: for a new good image it is at most p with a probability of at most p.
    """
    return (1 + sum(other >= score for other in held_out_scores)) / (1 + len(held_out_scores))


def _beta_quantile(a: int, b: int, probability: float) -> float:
    from scipy.special import betaincinv  # slow to import; a stored threshold needs none

    return float(betaincinv(a, b, probability))


def moved_threshold(
    stored: Threshold, scores: Sequence[float], *, threshold: float | None, false_reject_rate: float | None
) -> Threshold:
    """The stored threshold, or what replaces it: a value, or the rate that it is to promise.

    Raises InTraError if both are given, or one is out of its range.
    """
    if threshold is not None and false_reject_rate is not None:
        raise InTraError("give threshold or false_reject_rate, not both")
    if threshold is not None:
        return given_threshold(scores, threshold)
    return stored if false_reject_rate is None else choose_threshold(scores, false_reject_rate)


def calibrate(
    held_out: Float[Tensor, "n k h w"], trained_on: Float[Tensor, "m l h w"] | None, *, kinds: Sequence[Evidence],
    scoring: ScoringConfig, refit: Callable[[list[int]], Tensor] | None = None,
    inside: Bool[Tensor, "h w"] | None = None,
) -> tuple[Reference, list[float]]:  # fmt: skip
    """The reference for anomaly maps, and the scores of the held-out good images, from their evidence; with a region of
    interest from what lies `inside` of it.

    With the reference "training" (the paper) its means are taken from `trained_on`, which has all kinds of evidence but
    the distribution. With "validation" they are taken from the held-out images. How rare evidence is, the held-out
    images say in any case: what was trained on is too good for that.

    Whatever held-out images decide – means, tails, and with `refit` the distribution's spread and shrinkage – is
    decided anew for each fold of them by the others alone, so that each is scored as a new image would be; but for
    whether places share a distribution, which all decide by its likelihood, once: scores must be of one kind. `refit`
    gives the evidence of all held-out images if only those at the given places had a say in it. Raises InTraError as
    `check_held_out`.
    """
    if scoring.reference == "training" and trained_on is None:
        raise ValueError("the reference 'training' needs the maps of the training images")
    check_held_out(len(held_out), kinds=kinds, scoring=scoring)
    num_means = len(kinds) - ("distribution" in kinds)

    def reference_from(evidence: Float[Tensor, "o k h w"]) -> Reference:
        means = trained_on if scoring.reference == "training" else evidence[:, :num_means]
        assert means is not None
        return _reference(means, evidence, kinds, scoring, inside)

    scores = torch.empty(len(held_out))
    for fold, others in _folds(len(held_out), kinds, scoring, is_costly=refit is not None):
        evidence = refit(others) if refit else held_out
        maps = anomaly_map(evidence[fold], reference_from(evidence[others]), kinds=kinds, scoring=scoring,
                           inside=inside)
        scores[fold] = image_score(maps).to(scores)
    return reference_from(held_out), scores.tolist()


def check_held_out(count: int, *, kinds: Sequence[Evidence], scoring: ScoringConfig) -> None:
    """Raises InTraError where held-out images decide more than the threshold, and are too few to do so in folds."""
    if _decide(kinds, scoring) and count < LEAST_HELD_OUT:
        raise InTraError(
            f"expected at least {LEAST_HELD_OUT} held-out good images, as they decide more than the threshold "
            f"(scoring.reference={scoring.reference}, evidence: {', '.join(kinds)}), found {count}; give more good "
            "images, or set a larger data.validation_fraction or data.max_validation_images")


def _decide(kinds: Sequence[Evidence], scoring: ScoringConfig) -> bool:
    """Whether held-out images decide means, tails, or the distribution's spread and shrinkage."""
    return scoring.reference == "validation" or len(kinds) > 1 or "distribution" in kinds


def _folds(
    count: int, kinds: Sequence[Evidence], scoring: ScoringConfig, *, is_costly: bool
) -> list[tuple[list[int], list[int]]]:
    """Which held-out images are scored together, and which decide for them."""
    everyone = list(range(count))
    if not _decide(kinds, scoring):
        return [(everyone, everyone)]
    num_folds = count if scoring.reference == "validation" and not is_costly else min(NUM_FOLDS, count)
    return [(everyone[start::num_folds], [i for i in everyone if i % num_folds != start])
            for start in range(num_folds)]


def _reference(
    for_means: Float[Tensor, "m l h w"], held_out: Float[Tensor, "n k h w"], kinds: Sequence[Evidence],
    scoring: ScoringConfig, inside: Bool[Tensor, "h w"] | None,
) -> Reference:  # fmt: skip
    reference = Reference.of(for_means, spread=scoring.spread and "difference" in kinds, inside=inside)
    if "distribution" in kinds:  # the last: it has taken off each place's mean itself
        zero = held_out.new_zeros(1, *held_out.shape[-2:])
        reference = replace(reference, mean=torch.cat([reference.mean, zero]))
    if len(kinds) == 1:
        return reference
    return replace(reference, tails=tails_of(held_out, reference, kinds=kinds, scoring=scoring, inside=inside))
