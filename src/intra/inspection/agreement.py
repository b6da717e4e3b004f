"""How far the cells of an image are odd in the same way: evidence of what is large and faint.

Where a region has another finish, each of its cells differs a little from good ones, by no more than chance would, but
all in the same direction; chance has none. So each cell is held against what all others of its image show in the mean:
a local indicator of spatial association (Anselin 1995), of vectors, with the whole image as neighbourhood. Unlike the
mean over a large cell, that has the region's own outline. docs/decisions/0025-agreement.md
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from intra.similarity import box_blur

__all__ = ["Agreement", "agreeing", "blurred"]

BLUR = 5  # cells: one cell alone says little
LEAST_USUAL = 1e-6  # where good images do not vary at all
MUCH = 0.3  # of the agreement of good images
MOST = 2.0  # evidence, as single pixels have


@dataclass(frozen=True)
class Agreement:
    """How far the cells of good images agree, by `agreeing`, as logarithms of a likelihood ratio."""

    usual: Float[Tensor, ""]  # above 0

    @classmethod
    def of(cls, agreement: Float[Tensor, "n cells"]) -> "Agreement":
        """From good images that were not trained on. The root of the mean square of all is usual, and more where it is
        much: parts that do not lie as others do agree by it, and so do lights.
        """
        scale = agreement.square().mean().sqrt()
        return cls((scale * (1 + scale / MUCH)).clamp(min=LEAST_USUAL))

    def evidence(self, agreement: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """0 up to what is usual, then up to MOST."""
        agreement = agreement.clamp(min=0)
        return (MOST * (1 - 2 * self.usual / (agreement + self.usual))).clamp(min=0)

    def to(self, device: torch.device) -> "Agreement":
        """The same on a device."""
        return Agreement(self.usual.to(device))


def agreeing(residuals: Float[Tensor, "cells b d"]) -> Float[Tensor, "cells b"]:
    """How much likelier each cell is, by its logarithm, if what the mean of the other cells shows is in it, too.
    Residuals: how cells lie from good ones, in units of their spread, and in one basis for all.

    Of unit Gaussians with the mean m and with none: z·m − |m|²/2.
    """
    others = (residuals.sum(0) - residuals) / max(1, len(residuals) - 1)
    return (others * (residuals - others / 2)).sum(2)


def blurred(agreement: Float[Tensor, "b rows cols"]) -> Float[Tensor, "b rows cols"]:
    """The mean over BLUR x BLUR cells."""
    return box_blur(agreement, BLUR)
