"""The repaired image: every patch inpainted once, from what surrounds it."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from intra.geometry import covering_windows, patchify, unpatchify

__all__ = ["inpaint"]

TOKENS_PER_BATCH = {"cpu": 4608, "cuda": 131072}  # 18 or 512 whole grids of 16 x 16: where each stops getting faster


@torch.no_grad()
def inpaint(
    model: nn.Module, images: Float[Tensor, "b c h w"], *, patch_size: int, window_size: int | None, lattice: int
) -> Float[Tensor, "b c h w"]:
    """The repaired images, pixels about [0, 1] (not clamped).

    With a window size, each patch is inpainted from its most central window (section 3.3 of the paper); with None, from
    the whole grid, `lattice`² passes an image. Windows of several images run as one batch.
    """
    grid = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    patches = patchify(images, patch_size)  # (B, N, P)
    positions, hidden = (part.to(images.device) for part in covering_windows(grid, window_size, lattice))
    repaired = torch.empty_like(patches)
    batch = max(1, TOKENS_PER_BATCH.get(images.device.type, TOKENS_PER_BATCH["cuda"]) // positions.shape[1])
    for chunk in torch.arange(len(images) * len(positions), device=images.device).split(batch):
        image, window = chunk // len(positions), chunk % len(positions)
        where = positions[window]  # (chunk, T)
        inpainted = model(patches[image[:, None], where], where, hidden[window])
        place = hidden[window].nonzero(as_tuple=True)
        repaired[image[place[0]], where[place]] = inpainted.to(repaired.dtype)
    return unpatchify(repaired, grid, images.shape[1])
