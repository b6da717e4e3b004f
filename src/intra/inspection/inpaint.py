"""The repaired image: every patch, or every cell, inpainted once, from what surrounds it."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from intra.config import ModelConfig
from intra.geometry import covering_windows, hidden_places, patchify, unpatchify
from intra.inspection.device import in_chunks
from intra.models import InTra
from intra.models.riad import draw_cell_sets, inpaint_cells

__all__ = ["Hiding", "inpaint", "log_odds", "repaired_views"]

TOKENS_PER_BATCH = {"cpu": 3072, "cuda": 131072}  # 12 or 512 whole grids of 16 x 16: where each stops getting faster
CELL_SEED = 0  # the same cells for every inspection, so that an image always gets the same score


@dataclass(frozen=True)
class Hiding:
    """What is hidden in each pass, decided beforehand."""

    positions: Int[Tensor, "n t"] | None = None  # the transformer's windows
    hidden: Bool[Tensor, "n t"] | None = None
    places: Int[Tensor, " h"] | None = None  # of the hidden patches, where all tokens of all windows lie in a row
    cells: tuple[Bool[Tensor, "1 sets h w"], ...] = ()  # RIAD's, of each size

    @classmethod
    def of(cls, model_config: ModelConfig, lattice: int, wanted: Bool[Tensor, " patches"] | None = None) -> "Hiding":
        """What these settings hide, always the same, so that an image always gets the same score; of the transformer's
        patches the wanted ones.
        """
        if model_config.network == "intra":
            positions, hidden = covering_windows(model_config.grid, model_config.window_size, lattice, wanted)
            return cls(positions, hidden, hidden_places(hidden))
        if model_config.network == "autoencoder":
            return cls()
        if model_config.network == "riad":
            generator = torch.Generator().manual_seed(CELL_SEED)
            return cls(cells=tuple(
                draw_cell_sets(1, image_size=model_config.image_size, cell_size=cell_size,
                               num_sets=model_config.num_cell_sets, generator=generator)
                for cell_size in model_config.cell_sizes))
        raise ValueError(f"network is {model_config.network!r}; expected intra, autoencoder or riad")


@torch.no_grad()
def repaired_views(
    model: nn.Module, images: Float[Tensor, "b c h w"], *, model_config: ModelConfig, lattice: int,
    hiding: Hiding | None = None, wanted: Bool[Tensor, " patches"] | None = None,
) -> list[Float[Tensor, "b c h w"]]:  # fmt: skip
    """The repaired images, pixels about [0, 1] (not clamped): one view of them, from RIAD one for each cell size.

    The transformer inpaints the wanted patches alone, None: all of them; the others stay the photo's own.
    With `hiding` (that of these settings) no shape depends on a value or on the number of images: for tracing.
    """
    if model_config.network == "intra":
        return [inpaint(model, images, patch_size=model_config.patch_size, window_size=model_config.window_size,
                        lattice=lattice, hiding=hiding, wanted=wanted)]
    if model_config.network == "autoencoder":
        return [model(images).to(images.dtype)]
    if model_config.network == "riad":
        chosen = hiding or Hiding.of(model_config, lattice)
        return [inpaint_cells(model, images, hidden.to(images.device)) for hidden in chosen.cells]
    raise ValueError(f"network is {model_config.network!r}; expected intra, autoencoder or riad")


@torch.no_grad()
def log_odds(model: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """The segmenter's log-odds of a defect at each pixel."""
    coarse = cast(InTra, model).segment(images).to(images.dtype)
    return F.interpolate(coarse[:, None], size=images.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


@torch.no_grad()
def inpaint(
    model: nn.Module, images: Float[Tensor, "b c h w"], *, patch_size: int, window_size: int | None, lattice: int,
    hiding: Hiding | None = None, wanted: Bool[Tensor, " patches"] | None = None,
) -> Float[Tensor, "b c h w"]:  # fmt: skip
    """The repaired images, pixels about [0, 1] (not clamped); patches that are not wanted stay the photo's own.

    With a window size, each patch is inpainted from its most central window (section 3.3 of the paper); with None, from
    the whole grid, `lattice`² passes an image. Windows of several images run as one batch: as many as are quick, or
    with `hiding` all of them.
    """
    network = cast(InTra, model)
    grid = images.shape[-2] // patch_size, images.shape[-1] // patch_size
    patches = patchify(images, patch_size)  # (B, N, P)
    embedded = network.patch_embed(patches)
    repaired = patches.clone()  # of a single column of patches, `patches` may be the images themselves
    if hiding is not None:
        assert hiding.positions is not None and hiding.hidden is not None and hiding.places is not None
        pairs = torch.arange(images.shape[0] * len(hiding.positions), device=images.device)  # of an image and a window
        first = torch.arange(images.shape[0], device=images.device) * hiding.positions.numel()
        places = (first[:, None] + hiding.places).flatten()
        _inpaint_pairs(network, embedded, repaired, pairs, hiding.positions, hiding.hidden, places)
        return unpatchify(repaired, grid, images.shape[1])
    positions, hidden = (part.to(images.device) for part in covering_windows(grid, window_size, lattice, wanted))
    batch = max(1, TOKENS_PER_BATCH.get(images.device.type, TOKENS_PER_BATCH["cuda"]) // positions.shape[1])

    def work(start: int, stop: int) -> None:
        pairs = torch.arange(start, stop, device=images.device)
        places = hidden_places(hidden[pairs % len(positions)])
        _inpaint_pairs(network, embedded, repaired, pairs, positions, hidden, places)

    for _ in in_chunks(work, len(images) * len(positions), batch):
        pass
    return unpatchify(repaired, grid, images.shape[1])


def _inpaint_pairs(
    model: InTra, embedded: Float[Tensor, "b n d"], repaired: Float[Tensor, "b n p"], pairs: Int[Tensor, " k"],
    positions: Int[Tensor, "w t"], hidden: Bool[Tensor, "w t"], places: Int[Tensor, " h"],
) -> None:  # fmt: skip
    """Writes the patches that are hidden in these pairs of an image and a window into `repaired`."""
    image, window = pairs // len(positions), pairs % len(positions)
    where = positions[window]  # (k, T)
    inpainted = model.inpaint(embedded[image[:, None], where], where, hidden[window], places)
    target = (image[:, None] * repaired.shape[1] + where).flatten()[places]
    repaired.view(-1, repaired.shape[-1])[target] = inpainted.to(repaired.dtype)
