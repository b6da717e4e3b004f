"""The segmenter: a small U-Net that marks defects in a photo. It learns on synthetic ones alone.

Ronneberger et al., "U-Net", 2015; that pasted defects teach to find real ones: CutPaste (Li et al. 2021), DRAEM
(Zavrtanik et al. 2021), NSA (Schlüter et al. 2022). docs/decisions/0007-segmenter.md
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Segmenter"]

SIDE_MULTIPLE = 16  # px: 2 × 2 px cells, halved three times
WIDTHS = (1, 2, 4, 4)  # of the U-Net's levels, in units of the first


class Segmenter(nn.Module):
    """A U-Net on cells of 2 × 2 px, with three halvings."""

    def __init__(self, *, channels: int, width: int) -> None:
        super().__init__()
        widths = [width * factor for factor in WIDTHS]
        self.encoder = nn.ModuleList(
            _block(inputs, outputs) for inputs, outputs in zip([4 * channels, *widths], widths, strict=False))
        self.decoder = nn.ModuleList([
            _block(widths[3] + widths[2], widths[1]),
            _block(2 * widths[1], widths[0]),
            _block(2 * widths[0], widths[0]),
        ])
        self.head = nn.Conv2d(widths[0], 1, 1)

    def forward(self, photos: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h2 w2"]:
        """The log-odds of a defect in each cell of 2 × 2 px, the last one cut off at an odd side. Pixels in [0, 1]."""
        height, width = photos.shape[-2:]
        photos = F.pad(photos, (0, -width % SIDE_MULTIPLE, 0, -height % SIDE_MULTIPLE), mode="replicate")
        x = F.pixel_unshuffle(photos, 2).contiguous(memory_format=torch.channels_last)  # (B, 4 · C, H / 2, W / 2)
        bridges: list[Tensor] = []
        for block in self.encoder:
            x = block(F.max_pool2d(x, 2) if bridges else x)
            bridges.append(x)
        x = bridges.pop()
        for block in self.decoder:
            bridge = bridges.pop()
            x = block(torch.cat([F.interpolate(x, scale_factor=2), bridge], dim=1))
        return self.head(x)[:, 0, : -(-height // 2), : -(-width // 2)]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions, normalised once over the batch: a second time costs as much as both and gives no more."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
    )  # fmt: skip
