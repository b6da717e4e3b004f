"""How much single pixels are repaired: evidence of what is smaller than a cell of the distribution.

Bounded, and none for what is usual: it says where in its cell a defect is, and tells a speck from chance, but a cell,
whose evidence has no bound, decides. docs/decisions/0021-fine.md
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from intra.inspection.anomaly import SPREAD_FLOOR
from intra.similarity import box_blur, reduced

__all__ = ["FineDistribution", "fine_size", "pixels_apart"]

SCALE = 2  # by which photo and repaired image are reduced
BLUR = 3  # of those pixels
LEAST_SPREAD = 1e-5  # pixels in [0, 1]: below the noise of 12 bits in a file of 16
LEAST_MEAN = 1e-6  # of the difference: below that nothing was repaired, as outside a region of interest
LEAST_WEIGHT = 1e-3  # of such a pixel in the mean of BLUR x BLUR
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
        floor = SPREAD_FLOOR * std[_compared(mean)].median()
        return cls(mean, std + floor + LEAST_SPREAD)

    def held_against(self, apart: Float[Tensor, "h2 w2 n"]) -> "FineDistribution":
        """The spread scaled so that the mean squared distance of these other good images is 1 for the median one: those
        above were trained on, and are repaired better than what is new. The median, lest one odd image hide what is
        small in all that come.
        """
        distance = ((apart - self.mean[..., None]) / self.spread[..., None]).square()
        scale = distance[_compared(self.mean)].mean(0).quantile(0.5).sqrt()
        return FineDistribution(self.mean, (scale * self.spread).clamp(min=LEAST_SPREAD))

    def evidence(self, apart: Float[Tensor, "h2 w2 b"]) -> Float[Tensor, "b 1 h2 w2"]:
        """0 for most of what is usual, MOST for whatever is far from it. Around a pixel those that are repaired count;
        just outside a region of interest they are its border's, lest that be diluted when the map is enlarged.
        """
        weight = (self.mean > LEAST_MEAN).float().clamp(min=LEAST_WEIGHT)[None]
        distance = ((apart.permute(2, 0, 1) - self.mean) / self.spread).square()
        distance = box_blur(weight * distance, BLUR) / box_blur(weight, BLUR)
        return (MOST * (1 - 2 * USUAL / (distance + USUAL)).clamp(min=0))[:, None]

    def to(self, device: torch.device) -> "FineDistribution":
        """The same on a device."""
        return FineDistribution(self.mean.to(device), self.spread.to(device))


def _compared(mean: Float[Tensor, "h2 w2"]) -> Bool[Tensor, "h2 w2"]:
    """The pixels that are repaired at all; where none is, all."""
    repaired = mean > LEAST_MEAN
    return repaired | ~repaired.any()


def pixels_apart(photos: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"]) -> Float[Tensor, "h2 w2 b"]:
    """The mean absolute difference over the channels, both images reduced by SCALE."""
    return (reduced(photos, SCALE) - reduced(repaired, SCALE)).abs().mean(1).permute(1, 2, 0)


def fine_size(image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width at which an image's pixels are described.

    >>> fine_size((256, 241))
    (128, 121)
    """
    return -(-image_size[0] // SCALE), -(-image_size[1] // SCALE)
