"""RIAD, reconstruction by inpainting: a U-Net that fills in the hidden cells of an image.

Zavrtanik, Kristan & Skočaj, "Reconstruction by inpainting for visual anomaly detection", Pattern Recognition 112, 2021.
The cells of an image are parted at random into a few sets. Each set is hidden in turn, and only its pixels are taken
from the output, so that the passes together give a whole image of which no pixel has seen itself.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["RIAD", "draw_cell_sets", "inpaint_cells"]

WIDTHS = (1, 2, 4, 8, 8)  # of the U-Net's levels, in units of the first; as in public code that follows the paper


class RIAD(nn.Module):
    """The U-Net: four halvings by strided convolutions, as many doublings, and a bridge at each level."""

    def __init__(self, *, channels: int = 3, base_width: int = 64) -> None:
        super().__init__()
        widths = [base_width * factor for factor in WIDTHS]
        self.encoder = nn.ModuleList([_block(channels, widths[0])])
        self.upsample, self.decoder = nn.ModuleList(), nn.ModuleList()
        for level in range(1, len(widths)):
            above, below = widths[level - 1], widths[level]
            self.encoder.append(_block(above, below, halve=True))
            self.upsample.insert(0, nn.ConvTranspose2d(below, above, 4, stride=2, padding=1))
            self.decoder.insert(0, _block(2 * above, above))
        self.head = nn.Conv2d(widths[0], channels, 3, padding=1)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Images like these without gaps; h and w are multiples of 16. No activation, so pixels may leave [0, 1]."""
        x = images.contiguous(memory_format=torch.channels_last)  # a tenth to a quarter faster on a CPU
        bridges: list[Tensor] = []
        for block in self.encoder:
            x = block(x)
            bridges.append(x)
        x = bridges.pop()  # (B, 8 · base_width, H / 16, W / 16)
        for upsample, block in zip(self.upsample, self.decoder, strict=True):
            x = block(torch.cat([upsample(x), bridges.pop()], dim=1))
        return self.head(x)


def draw_cell_sets(
    count: int, *, image_size: tuple[int, int], cell_size: int, num_sets: int, generator: torch.Generator
) -> Bool[Tensor, "count sets h w"]:
    """For each of `count` images its cells of `cell_size` px, parted at random into sets of equal size (or one more).

    True where a set's pixels lie. Both sides of the image are multiples of `cell_size`.
    """
    rows, cols = image_size[0] // cell_size, image_size[1] // cell_size
    rank = torch.rand(count, rows * cols, generator=generator).argsort(1)  # a random order of each image's cells
    number = (rank % num_sets).unflatten(1, (rows, cols))
    number = number.repeat_interleave(cell_size, 1).repeat_interleave(cell_size, 2)  # (count, H, W)
    return number[:, None] == torch.arange(num_sets)[:, None, None]


def inpaint_cells(
    network: Callable[[Tensor], Tensor], images: Float[Tensor, "b c h w"], hidden: Bool[Tensor, "#b sets h w"]
) -> Float[Tensor, "b c h w"]:
    """The images with every pixel inpainted while its set was hidden: black, as the network sees it."""
    repaired = torch.zeros_like(images)
    for one_set in hidden.split(1, dim=1):  # (B or 1, 1, H, W)
        repaired = torch.where(one_set, network(images.masked_fill(one_set, 0)), repaired)
    return repaired


def _block(inputs: int, outputs: int, *, halve: bool = False) -> nn.Sequential:
    """Two convolutions, each normalised over the batch; without biases, which the normalisation would take off."""
    first = nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=False) if halve else (
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
    second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(outputs), nn.ReLU(), second, nn.BatchNorm2d(outputs), nn.ReLU())
