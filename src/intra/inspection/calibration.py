"""What good images look like to the model, and the threshold, from good images that were not trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from intra.config import ScoringConfig
from intra.errors import InTraError
from intra.inspection.anomaly import Reference, anomaly_map, image_score

__all__ = ["LEAST_HELD_OUT", "Threshold", "calibrate", "choose_threshold", "given_threshold", "scored_maps"]

LEAST_HELD_OUT = 3  # images, to score each against the others' mean and spread


@dataclass(frozen=True)
class Threshold:
    """A threshold and what it promises."""

    value: float  # an image is anomalous if its score is above
    false_reject_rate: float  # the promised mean share of good images that are rejected
    asked_rate: float  # the rate that was asked for
    num_images: int  # good images, not trained on, from which it was taken

    @property
    def promise(self) -> str:
        """One sentence for people."""
        said = (f"from {self.num_images} good images that were not trained on: at most {self.false_reject_rate:.2%} of "
                "good parts are rejected on average")
        if self.false_reject_rate > self.asked_rate:
            needed = math.ceil(1 / self.asked_rate) - 1
            said += f"; {self.asked_rate:.2%} was asked for, which takes at least {needed} images"
        return said


def choose_threshold(scores: Sequence[float], false_reject_rate: float) -> Threshold:
    """The lowest threshold that rejects at most this share of good images, from the scores of n good ones.

    Split-conformal: the k-th smallest score, k = ceil((n + 1)·(1 − rate)). A new good image is exchangeable with the n,
    so it lies above with a probability of at most `rate`. If k > n, too few images for that rate, the largest score is
    taken, which promises 1 / (n + 1). Raises InTraError without scores or with a rate outside (0, 1).
    """
    if not 0 < false_reject_rate < 1:
        raise InTraError(f"the false-reject rate is {false_reject_rate}; it must lie between 0 and 1, e.g. 0.01")
    if not scores:
        raise InTraError("a threshold needs the scores of good images that were not trained on; there are none")
    ordered = sorted(float(score) for score in scores)
    n = len(ordered)
    k = math.ceil((n + 1) * (1 - false_reject_rate) - 1e-9)  # rounding must not ask for one image more
    if k > n:
        return Threshold(ordered[-1], 1 / (n + 1), false_reject_rate, n)
    return Threshold(ordered[k - 1], (n + 1 - k) / (n + 1), false_reject_rate, n)


def given_threshold(scores: Sequence[float], value: float) -> Threshold:
    """A threshold that a person chose, with the share of good images that it promises to reject at most."""
    if not math.isfinite(value):
        raise InTraError(f"the threshold is {value}; it must be a finite number")
    rate = (sum(score > value for score in scores) + 1) / (len(scores) + 1)
    return Threshold(float(value), rate, rate, len(scores))


def calibrate(
    held_out: Float[Tensor, "n k h w"], trained_on: Float[Tensor, "m k h w"] | None, *, scoring: ScoringConfig
) -> tuple[Reference, list[float]]:
    """The reference for anomaly maps, and the scores of the held-out good images, from their evidence.

    With the reference "training" (the paper) it is taken from `trained_on`. With "validation" it is taken from the
    held-out images, and each held-out image is scored against the others alone, as a new image would be; that needs at
    least three.
    """
    if scoring.reference == "training":
        if trained_on is None:
            raise ValueError("the reference 'training' needs the maps of the training images")
        reference = Reference.of(trained_on, spread=scoring.spread)
        return reference, image_score(scored_maps(held_out, reference, scoring)).tolist()
    if len(held_out) < LEAST_HELD_OUT:
        raise InTraError(
            f"scoring.reference=validation needs at least {LEAST_HELD_OUT} held-out good images, there are "
            f"{len(held_out)}; give more good images, a larger data.validation_fraction, or scoring.reference=training"
        )
    scores: list[float] = []
    for index in range(len(held_out)):
        others = Reference.of(torch.cat([held_out[:index], held_out[index + 1 :]]), spread=scoring.spread)
        one = scored_maps(held_out[index : index + 1], others, scoring)
        scores.append(float(image_score(one)))
    return Reference.of(held_out, spread=scoring.spread), scores


def scored_maps(
    evidence: Float[Tensor, "b k h w"], reference: Reference, scoring: ScoringConfig
) -> Float[Tensor, "b h w"]:
    """The anomaly maps under these settings: one way for calibration and inspection."""
    return anomaly_map(evidence, reference, deviation=scoring.deviation, segmenter_weight=scoring.segmenter_weight)
