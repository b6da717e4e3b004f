"""From a photo and its repaired image to the anomaly map and the image score (section 3.4 of the paper)."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from intra.similarity import Difference, box_blur, multiscale_difference

__all__ = ["Reference", "anomaly_map", "difference_map", "image_score"]

SPREAD_FLOOR = 0.5  # share of the median spread that is added: a few images estimate a small spread badly
LEAST_SPREAD = 1e-4  # of difference maps in [0, 1]; where good images do not differ at all

Deviation = Literal["squared", "clipped", "signed", "none"]


@dataclass(frozen=True)
class Reference:
    """What the difference maps of good images are like at each place."""

    mean: Float[Tensor, "h w"]
    spread: Float[Tensor, "h w"] | None  # standard deviation; None: not divided by

    @classmethod
    def of(cls, differences: Float[Tensor, "n h w"], *, spread: bool) -> "Reference":
        """The mean, and if wanted the standard deviation, of at least one map (two for the spread)."""
        if not spread:
            return cls(differences.mean(0), None)
        deviation = differences.std(0)
        return cls(differences.mean(0), deviation + SPREAD_FLOOR * deviation.median() + LEAST_SPREAD)


def difference_map(
    images: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"], *, scales: tuple[int, ...], blur_size: int,
    kind: Difference = "gms",
) -> Float[Tensor, "b h w"]:  # fmt: skip
    """diff(x), in the paper 1 − GMS in [0, 1], of photo and repaired image: averaged over the scales and blurred."""
    return box_blur(multiscale_difference(images, repaired, scales=scales, kind=kind), blur_size)


def anomaly_map(
    differences: Float[Tensor, "b h w"], reference: Reference, *, deviation: Deviation
) -> Float[Tensor, "b h w"]:
    """How far each difference lies from that of good images; squared in the paper. Raw, never normalised per image."""
    if deviation == "none":
        return differences
    away = differences - reference.mean
    if reference.spread is not None:
        away = away / reference.spread
    if deviation == "squared":
        return away**2
    if deviation == "clipped":
        return away.clamp(min=0)
    if deviation == "signed":
        return away
    raise ValueError(f"deviation is {deviation!r}; expected squared, clipped, signed or none")


def image_score(anomaly_maps: Float[Tensor, "b h w"]) -> Float[Tensor, " b"]:
    """The highest value of each map."""
    return torch.amax(anomaly_maps, dim=(-2, -1))
