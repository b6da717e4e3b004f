"""From a photo and its repaired image to the anomaly map and the image score (section 3.4 of the paper)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from intra.config import ScoringConfig
from intra.similarity import Difference, box_blur, multiscale_difference

__all__ = ["SPREAD_FLOOR", "Evidence", "Reference", "anomaly_map", "difference_map", "evidence_kinds", "image_score",
           "tails_of"]

SPREAD_FLOOR = 0.5  # share of the median spread that is added: a few images estimate a small spread badly
LEAST_SPREAD = 1e-4  # of difference maps in [0, 1]; where good images do not differ at all
TAIL_SHARE = 0.1  # of the pixels of good images, the highest: their mean excess says how quickly values get rare
LEAST_TAIL = 1e-6  # where good images have no excess at all
TAIL_PIXELS = 10**6  # from which it is estimated

Evidence = Literal["difference", "segmenter", "distribution"]


@dataclass(frozen=True)
class Reference:
    """What the evidence of good images is like."""

    mean: Float[Tensor, "k h w"]  # at each place; zero for the distribution, which knows the places itself
    spread: Float[Tensor, "h w"] | None  # standard deviation of the differences; None: not divided by
    tails: Float[Tensor, "k 2"] | None = None  # of several kinds of evidence: level and mean excess above it

    @classmethod
    def of(
        cls, evidence: Float[Tensor, "n k h w"], *, spread: bool, inside: Bool[Tensor, "h w"] | None = None
    ) -> "Reference":
        """The mean, and if wanted the standard deviation of the first kind, of at least one image (two for it). Its
        median is taken of all pixels, or of those `inside` a region.
        """
        if not spread:
            return cls(evidence.mean(0), None)
        deviation = evidence[:, 0].std(0)
        return cls(evidence.mean(0), deviation + SPREAD_FLOOR * _within(deviation, inside).median() + LEAST_SPREAD)

    def to(self, device: torch.device) -> "Reference":
        """The same on a device."""
        spread, tails = (None if part is None else part.to(device) for part in (self.spread, self.tails))
        return Reference(self.mean.to(device), spread, tails)


def evidence_kinds(scoring: ScoringConfig, *, has_segmenter: bool) -> tuple[Evidence, ...]:
    """The kinds of evidence that the anomaly map is made of, in the order in which they are stacked."""
    wanted: tuple[tuple[Evidence, float], ...] = (
        ("difference", scoring.difference_weight),
        ("segmenter", scoring.segmenter_weight if has_segmenter else 0),
        ("distribution", scoring.distribution_weight),
    )
    return tuple(kind for kind, weight in wanted if weight)


def difference_map(
    images: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"], *, scales: tuple[int, ...], blur_size: int,
    kind: Difference = "gms",
) -> Float[Tensor, "b h w"]:  # fmt: skip
    """diff(x), in the paper 1 − GMS in [0, 1], of photo and repaired image: averaged over the scales and blurred."""
    return box_blur(multiscale_difference(images, repaired, scales=scales, kind=kind), blur_size)


def anomaly_map(
    evidence: Float[Tensor, "b k h w"], reference: Reference, *, kinds: Sequence[Evidence], scoring: ScoringConfig,
    inside: Bool[Tensor, "h w"] | None = None,
) -> Float[Tensor, "b h w"]:  # fmt: skip
    """How far the evidence lies from that of good images; 0 where it is not `inside` the region of interest. Raw, never
    normalised per image.

    The difference alone gives its deviation, squared in the paper. Several kinds are each turned into −log p, p the
    share of good pixels that lie as high, and summed: as for independent tests (Fisher), and no kind needs a scale of
    its own. p comes from an exponential tail over good images, so the sum grows without a bound.
    """
    away = _away(evidence, reference, kinds, scoring)
    found = away[:, 0] if len(kinds) == 1 else _summed(away, reference, kinds, scoring)
    return found if inside is None else found.masked_fill(~inside, 0)


def tails_of(
    evidence: Float[Tensor, "n k h w"], reference: Reference, *, kinds: Sequence[Evidence], scoring: ScoringConfig,
    inside: Bool[Tensor, "h w"] | None = None,
) -> Float[Tensor, "k 2"]:  # fmt: skip
    """For each kind the level above which a tenth of good pixels, all or those `inside` a region, lie, and their mean
    excess above it.
    """
    values = _within(_away(evidence, reference, kinds, scoring).transpose(0, 1), inside).flatten(1)  # (K, pixels)
    values = values[:, :: max(1, values.shape[1] // TAIL_PIXELS)].sort(dim=1).values
    highest = values[:, -max(1, round(TAIL_SHARE * values.shape[1])) :]
    level = highest[:, :1]
    return torch.cat([level, (highest - level).mean(1, keepdim=True) + LEAST_TAIL], dim=1)


def image_score(anomaly_maps: Float[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """The highest value of each map."""
    return torch.amax(anomaly_maps, dim=(-2, -1))


def _away(
    evidence: Float[Tensor, "b k h w"], reference: Reference, kinds: Sequence[Evidence], scoring: ScoringConfig
) -> Float[Tensor, "b k h w"]:
    """Each kind against good images' mean; beside others, the deviation of the difference as its logarithm."""
    parts = []
    for index, kind in enumerate(kinds):
        if kind == "difference":
            away = _deviation(evidence[:, index], reference.mean[index], reference.spread, scoring)
            parts.append(away if len(kinds) == 1 else torch.log1p(away.clamp(min=0)))
        else:
            parts.append(evidence[:, index] - reference.mean[index])
    return torch.stack(parts, dim=1)


def _summed(
    away: Float[Tensor, "b k h w"], reference: Reference, kinds: Sequence[Evidence], scoring: ScoringConfig
) -> Float[Tensor, "b h w"]:
    """The −log p of several kinds, weighted and summed."""
    assert reference.tails is not None, "several kinds of evidence need their tails"
    level, excess = reference.tails[:, :, None, None].unbind(1)  # (K, 1, 1) each
    rare = ((away - level) / excess - math.log(TAIL_SHARE)).clamp(min=0)  # −log p; 0 where p would be above 1
    weights = torch.tensor([getattr(scoring, f"{kind}_weight") for kind in kinds], device=rare.device)
    return torch.einsum("bkhw,k->bhw", rare, weights.to(rare.dtype))


def _within(values: Float[Tensor, "*k h w"], inside: Bool[Tensor, "h w"] | None) -> Float[Tensor, "*some"]:
    """The values inside a region, in a row; None: all, as they are."""
    return values if inside is None else values[..., inside]


def _deviation(
    differences: Float[Tensor, "b h w"], mean: Float[Tensor, "h w"], spread: Float[Tensor, "h w"] | None,
    scoring: ScoringConfig,
) -> Float[Tensor, "b h w"]:  # fmt: skip
    if scoring.deviation == "none":
        return differences
    away = differences - mean
    if spread is not None:
        away = away / spread
    if scoring.deviation == "squared":
        return away**2
    if scoring.deviation == "clipped":
        return away.clamp(min=0)
    if scoring.deviation == "signed":
        return away
    raise ValueError(f"deviation is {scoring.deviation!r}; expected squared, clipped, signed or none")
