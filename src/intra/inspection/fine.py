"""How much single pixels are repaired: evidence of what is smaller than a cell of the distribution.

Bounded, and none for what is usual: it says where in its cell a defect is, and tells a speck from chance, but a cell,
whose evidence has no bound, decides. docs/decisions/0021-fine.md
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from intra.inspection.anomaly import SPREAD_FLOOR
from intra.similarity import box_blur, reduced

__all__ = ["FineDistribution", "fine_size", "pixels_apart"]

SCALE = 2  # by which photo and repaired image are reduced
BLUR = 3  # of those pixels
LEAST_SPREAD = 1e-3  # pixels in [0, 1]: below the noise of any camera
LEAST_MEAN = 1e-6  # of the difference: below that nothing was repaired, as outside a region of interest
USUAL = 4.0  # squared distance, 1 in the mean of good pixels, up to which there is no evidence
MOST = 2.0  # evidence


@dataclass(frozen=True)
class FineDistribution:
    """How far good photos and their repaired images lie apart at each pixel, reduced by SCALE."""

    mean: Float[Tensor, "h2 w2"]
    spread: Float[Tensor, "h2 w2"]

    @classmethod
    def of(cls, apart: Float[Tensor, "h2 w2 n"]) -> "FineDistribution":
        """Of good images, which `pixels_apart` has described."""
        std, mean = torch.std_mean(apart, dim=2, correction=0)
        repaired = std[mean > LEAST_MEAN]
        floor = SPREAD_FLOOR * repaired.median() if len(repaired) else 0
        return cls(mean, std + floor + LEAST_SPREAD)

    def held_against(self, apart: Float[Tensor, "h2 w2 n"]) -> "FineDistribution":
        """The spread scaled so that the squared distance of these other good images is 1 in the mean: those above were
        trained on, and are repaired better than what is new.
        """
        distance = ((apart - self.mean[..., None]) / self.spread[..., None]).square().mean(2)
        repaired = distance[self.mean > LEAST_MEAN]
        scale = repaired.mean().sqrt() if len(repaired) else 1
        return FineDistribution(self.mean, (scale * self.spread).clamp(min=LEAST_SPREAD))

    def evidence(self, apart: Float[Tensor, "h2 w2 b"]) -> Float[Tensor, "b 1 h2 w2"]:
        """0 for what is usual, below MOST for anything."""
        distance = box_blur(((apart.permute(2, 0, 1) - self.mean) / self.spread).square(), BLUR)
        return (MOST * (distance - USUAL).clamp(min=0) / (distance + USUAL))[:, None]

    def to(self, device: torch.device) -> "FineDistribution":
        """The same on a device."""
        return FineDistribution(self.mean.to(device), self.spread.to(device))


def pixels_apart(photos: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"]) -> Float[Tensor, "h2 w2 b"]:
    """The mean absolute difference over the channels, both images reduced by SCALE."""
    return (reduced(photos, SCALE) - reduced(repaired, SCALE)).abs().mean(1).permute(1, 2, 0)


def fine_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width at which an image's pixels are described.

    >>> fine_size((256, 241))
    (128, 121)
    """
    return -(-image_size[0] // SCALE), -(-image_size[1] // SCALE)
