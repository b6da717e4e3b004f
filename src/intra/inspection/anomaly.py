"""From a photo and its repaired image to the anomaly map and the image score (section 3.4 of the paper)."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from intra.similarity import Difference, box_blur, multiscale_difference

__all__ = ["Reference", "anomaly_map", "difference_map", "image_score"]

SPREAD_FLOOR = 0.5  # share of the median spread that is added: a few images estimate a small spread badly
LEAST_SPREAD = 1e-4  # of difference maps in [0, 1]; where good images do not differ at all

Deviation = Literal["squared", "clipped", "signed", "none"]


@dataclass(frozen=True)
class Reference:
    """What the evidence of good images is like at each place."""

    mean: Float[Tensor, "k h w"]
    spread: Float[Tensor, "h w"] | None  # standard deviation of the differences; None: not divided by

    @classmethod
    def of(cls, evidence: Float[Tensor, "n k h w"], *, spread: bool) -> "Reference":
        """The mean, and if wanted the standard deviation, of at least one image (two for the spread)."""
        if not spread:
            return cls(evidence.mean(0), None)
        deviation = evidence[:, 0].std(0)
        return cls(evidence.mean(0), deviation + SPREAD_FLOOR * deviation.median() + LEAST_SPREAD)


def difference_map(
    images: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"], *, scales: tuple[int, ...], blur_size: int,
    kind: Difference = "gms",
) -> Float[Tensor, "b h w"]:  # fmt: skip
    """diff(x), in the paper 1 − GMS in [0, 1], of photo and repaired image: averaged over the scales and blurred."""
    return box_blur(multiscale_difference(images, repaired, scales=scales, kind=kind), blur_size)


def anomaly_map(
    evidence: Float[Tensor, "b k h w"], reference: Reference, *, deviation: Deviation, segmenter_weight: float = 1.0
) -> Float[Tensor, "b h w"]:
    """How far the evidence lies from that of good images. Raw, never normalised per image.

    The evidence is the difference map and, from a model with a segmenter, its log-odds. The difference alone gives the
    deviation, squared in the paper. With log-odds l it is log(1 + deviation) + weight · log(1 + exp(l − mean l)): both
    grow like the log-odds of a defect, so neither needs a scale of its own (docs/decisions/0007-segmenter.md). A signed
    deviation below zero counts as none then.
    """
    away = _deviation(evidence[:, 0], reference, deviation)
    if evidence.shape[1] == 1 or not segmenter_weight:
        return away
    return torch.log1p(away.clamp(min=0)) + segmenter_weight * F.softplus(evidence[:, 1] - reference.mean[1])


def image_score(anomaly_maps: Float[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """The highest value of each map."""
    return torch.amax(anomaly_maps, dim=(-2, -1))


def _deviation(
    differences: Float[Tensor, "b h w"], reference: Reference, deviation: Deviation
) -> Float[Tensor, "b h w"]:
    if deviation == "none":
        return differences
    away = differences - reference.mean[0]
    if reference.spread is not None:
        away = away / reference.spread
    if deviation == "squared":
        return away**2
    if deviation == "clipped":
        return away.clamp(min=0)
    if deviation == "signed":
        return away
    raise ValueError(f"deviation is {deviation!r}; expected squared, clipped, signed or none")
