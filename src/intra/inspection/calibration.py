"""What good images look like to the model, and the threshold, from good images that were not trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from scipy.special import betaincinv
from torch import Tensor

from intra.config import ScoringConfig
from intra.errors import InTraError
from intra.inspection.anomaly import Evidence, Reference, anomaly_map, image_score, tails_of

__all__ = ["INTERVAL_SHARE", "LEAST_HELD_OUT", "Threshold", "calibrate", "choose_threshold", "given_threshold",
           "p_value"]

LEAST_HELD_OUT = 3  # images, to score each against the others' mean and spread
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
    if not 0 < false_reject_rate < 1:
        raise InTraError(f"the false-reject rate is {false_reject_rate}; it must lie between 0 and 1, e.g. 0.01")
    if not scores:
        raise InTraError("a threshold needs the scores of good images that were not trained on; there are none")
    ordered = sorted(float(score) for score in scores)
    n = len(ordered)
    k = math.ceil((n + 1) * (1 - false_reject_rate) - 1e-9)  # rounding must not ask for one image more
    k = min(k, n)
    return Threshold(ordered[k - 1], (n + 1 - k) / (n + 1), false_reject_rate, n,
                     _beta_quantile(n + 1 - k, k, (1 - INTERVAL_SHARE) / 2),
                     _beta_quantile(n + 1 - k, k, (1 + INTERVAL_SHARE) / 2))


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
    return float(betaincinv(a, b, probability))


def calibrate(
    held_out: Float[Tensor, "n k h w"], trained_on: Float[Tensor, "m l h w"] | None, *, kinds: Sequence[Evidence],
    scoring: ScoringConfig,
) -> tuple[Reference, list[float]]:  # fmt: skip
    """The reference for anomaly maps, and the scores of the held-out good images, from their evidence.

    With the reference "training" (the paper) its means are taken from `trained_on`, which has all kinds of evidence but
    the distribution. With "validation" they are taken from the held-out images, and each held-out image is scored
    against the others alone, as a new image would be; that needs at least three. How rare evidence is, the held-out
    images say in any case: what was trained on is too good for that.
    """
    if scoring.reference == "training":
        if trained_on is None:
            raise ValueError("the reference 'training' needs the maps of the training images")
        reference = _reference(trained_on, held_out, kinds, scoring)
        return reference, image_score(anomaly_map(held_out, reference, kinds=kinds, scoring=scoring)).tolist()
    if len(held_out) < LEAST_HELD_OUT:
        raise InTraError(
            f"scoring.reference=validation needs at least {LEAST_HELD_OUT} held-out good images, there are "
            f"{len(held_out)}; give more good images, a larger data.validation_fraction, or scoring.reference=training"
        )
    num_means = len(kinds) - ("distribution" in kinds)
    scores: list[float] = []
    for index in range(len(held_out)):
        others = torch.cat([held_out[:index], held_out[index + 1 :]])
        reference = _reference(others[:, :num_means], others, kinds, scoring)
        one = anomaly_map(held_out[index : index + 1], reference, kinds=kinds, scoring=scoring)
        scores.append(float(image_score(one)))
    return _reference(held_out[:, :num_means], held_out, kinds, scoring), scores


def _reference(
    for_means: Float[Tensor, "m l h w"], held_out: Float[Tensor, "n k h w"], kinds: Sequence[Evidence],
    scoring: ScoringConfig,
) -> Reference:  # fmt: skip
    reference = Reference.of(for_means, spread=scoring.spread and "difference" in kinds)
    if "distribution" in kinds:  # the last: it has taken off each place's mean itself
        zero = held_out.new_zeros(1, *held_out.shape[-2:])
        reference = replace(reference, mean=torch.cat([reference.mean, zero]))
    if len(kinds) == 1:
        return reference
    return replace(reference, tails=tails_of(held_out, reference, kinds=kinds, scoring=scoring))
