"""The region of interest: what lies outside decides nothing and is never flagged.

`data.box` says what is cut out of a photo before it is reduced; here is which pixels of that are inside. The others
show the mean of the training photos in place of the photo's own: neither the network's context, nor a filter or a cell
that reaches over the region's border, nor what all places do together then depends on them. docs/decisions/0015-roi.md
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from torch import Tensor

from intra.data.images import to_unit
from intra.errors import InTraError

__all__ = ["Cells", "Region", "cells_of"]


@dataclass(frozen=True)
class Cells:
    """The cells of a grid that touch a region, in the order of their numbers, row by row."""

    kept: Int[Tensor, " kept"]  # their numbers
    nearest: Int[Tensor, " cells"]  # for every cell of the grid, which of the kept ones lies nearest: the n-th of them

    def to(self, device: torch.device) -> "Cells":
        """The same on a device."""
        return Cells(self.kept.to(device), self.nearest.to(device))

    def mask(self, grid: tuple[int, int]) -> Float[Tensor, "1 1 rows cols"]:
        """1 for those that touch the region, 0 for the others."""
        touching = torch.zeros(len(self.nearest), device=self.nearest.device)
        return touching.index_fill(0, self.kept, 1.0).unflatten(0, grid)[None, None]


@dataclass(frozen=True)
class Region:
    """Which pixels of a model's images are inside, and what stands for those that are not."""

    inside: Bool[Tensor, "h w"]
    fill: UInt8[Tensor, "c h w"]  # the mean of the training photos: 8 bits, so that an exported graph sees the same

    @classmethod
    def of(cls, mask: Bool[np.ndarray, "i j"], mean: Float[Tensor, "c h w"]) -> "Region":
        """From a mask of any size over what the box cuts out, and the mean training photo in [0, 1].

        A pixel is inside if more than half of it is. Raises InTraError if none is.
        """
        share = F.interpolate(torch.from_numpy(mask.astype(np.float32))[None, None], mean.shape[-2:], mode="area")[0, 0]
        inside = share > 0.5
        if not inside.any():
            raise InTraError(f"no pixel of the image of {mean.shape[-2]}x{mean.shape[-1]} px lies inside the region by "
                             "more than half; paint a thicker region, or choose a larger --image-size")
        return cls(inside.to(mean.device), (mean * 255).round().to(torch.uint8))

    def shown(self, images: Shaped[Tensor, "n c h w"]) -> Shaped[Tensor, "n c h w"]:
        """Images of uint8 or in [0, 1], with the fill outside."""
        return torch.where(self.inside, images, self.fill if images.dtype == torch.uint8 else to_unit(self.fill))

    def cells(self, grid: tuple[int, int]) -> Cells:
        """The cells of a grid of so many rows and cols over the image that touch the region."""
        from scipy import ndimage  # slow to import; only a region needs it

        touched = (F.adaptive_max_pool2d(self.inside[None].float(), grid)[0] > 0).cpu()
        number = (touched.flatten().cumsum(0) - 1).view(grid)
        rows, cols = ndimage.distance_transform_edt(~touched.numpy(), return_distances=False, return_indices=True)
        nearest = number[torch.from_numpy(rows).long(), torch.from_numpy(cols).long()].flatten()
        return Cells(touched.flatten().nonzero()[:, 0], nearest).to(self.inside.device)

    def at(self, size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
        """Which pixels are inside where the image has that height and width."""
        whole = F.interpolate(self.inside[None, None].float(), size, mode="nearest-exact")[0, 0]
        return (whole > 0.5).cpu().numpy()

    def to(self, device: torch.device) -> "Region":
        """The same on a device."""
        return Region(self.inside.to(device), self.fill.to(device))


def cells_of(region: Region | None, grids: Sequence[tuple[int, int]]) -> tuple[Cells, ...] | None:
    """Of each grid the cells that touch a region; None without one: all."""
    return None if region is None else tuple(region.cells(grid) for grid in grids)
