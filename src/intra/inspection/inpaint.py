"""The repaired image: every patch, or every cell, inpainted once, from what surrounds it."""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from intra.config import ModelConfig
from intra.geometry import covering_windows, patchify, unpatchify
from intra.inspection.device import in_chunks
from intra.models import InTra
from intra.models.riad import draw_cell_sets, inpaint_cells

__all__ = ["inpaint", "log_odds", "repaired_views"]

TOKENS_PER_BATCH = {"cpu": 4608, "cuda": 131072}  # 18 or 512 whole grids of 16 x 16: where each stops getting faster
CELL_SEED = 0  # the same cells for every inspection, so that an image always gets the same score


@torch.no_grad()
def repaired_views(
    model: nn.Module, images: Float[Tensor, "b c h w"], *, model_config: ModelConfig, lattice: int
) -> list[Float[Tensor, "b c h w"]]:
    """The repaired images, pixels about [0, 1] (not clamped): one view of them, from RIAD one for each cell size."""
    if model_config.network == "intra":
        return [inpaint(model, images, patch_size=model_config.patch_size, window_size=model_config.window_size,
                        lattice=lattice)]
    if model_config.network == "autoencoder":
        return [model(images).to(images.dtype)]
    if model_config.network == "riad":
        generator = torch.Generator().manual_seed(CELL_SEED)
        views = []
        for cell_size in model_config.cell_sizes:
            hidden = draw_cell_sets(1, image_size=model_config.image_size, cell_size=cell_size,
                                    num_sets=model_config.num_cell_sets, generator=generator)
            views.append(inpaint_cells(model, images, hidden.to(images.device)))
        return views
    raise ValueError(f"network is {model_config.network!r}; expected intra, autoencoder or riad")


@torch.no_grad()
def log_odds(model: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """The segmenter's log-odds of a defect at each pixel."""
    coarse = cast(InTra, model).segment(images).to(images.dtype)
    return F.interpolate(coarse[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


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

    def work(start: int, stop: int) -> None:
        chunk = torch.arange(start, stop, device=images.device)
        image, window = chunk // len(positions), chunk % len(positions)
        where = positions[window]  # (chunk, T)
        inpainted = model(patches[image[:, None], where], where, hidden[window])
        place = hidden[window].nonzero(as_tuple=True)
        repaired[image[place[0]], where[place]] = inpainted.to(repaired.dtype)

    for _ in in_chunks(work, len(images) * len(positions), batch):
        pass
    return unpatchify(repaired, grid, images.shape[1])
