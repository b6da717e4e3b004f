"""How far repaired images are from the real ones (section 3.3, equation 6 of the paper), for each network.

InTra is compared patch by patch, the baselines image by image. The weights are settings: docs/method.md has each
paper's.
"""

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from intra.config import ModelConfig, TrainConfig
from intra.geometry import patchify, unflatten_patches, unpatchify
from intra.models import InTra
from intra.models.riad import draw_cell_sets, inpaint_cells
from intra.similarity import gms_map, reduced, ssim_map
from intra.training.defects import plant_defects
from intra.training.sampler import Batch

__all__ = ["patch_loss", "reconstruction_loss", "segmentation_loss", "step_loss", "validation_loss"]

FOCUS = 2  # the exponent of the focal loss, as in Lin et al.
FOCAL_WEIGHT, DICE_WEIGHT = 4.0, 0.3  # bring both to about the same size at the start


def step_loss(
    network: nn.Module, batch: Batch, *, config: TrainConfig, model_config: ModelConfig
) -> Float[Tensor, ""]:  # fmt: skip
    """The loss of the network on one batch, in training.

    InTra inpaints the hidden patches, and its segmenter, if it has one, looks for synthetic defects in the same images;
    the autoencoder passes whole images through, and RIAD inpaints them in cells of
    one size, drawn for the step, the sets drawn for each image.
    """
    if model_config.network == "intra":
        target = batch.patches.flatten(0, 1)[batch.places]
        if not model_config.segmenter_width:
            inpainted = network(batch.patches, batch.positions, batch.hidden, batch.places)
            return patch_loss(inpainted, target, channels=model_config.channels, config=config)
        images = unpatchify(batch.patches, model_config.grid, model_config.channels)
        photos, masks = plant_defects(images, generator=torch.Generator().manual_seed(batch.seed))
        context = patchify(photos, model_config.patch_size) if config.defective_context else batch.patches
        inpainted = network(context, batch.positions, batch.hidden, batch.places)
        return patch_loss(inpainted, target, channels=model_config.channels, config=config) + (
            config.segmentation_weight * segmentation_loss(cast(InTra, network).segment(photos), masks))
    images = unpatchify(batch.patches, model_config.grid, model_config.channels)
    if model_config.network == "autoencoder":
        return reconstruction_loss(network(images), images, config=config)
    if model_config.network == "riad":
        generator = torch.Generator().manual_seed(batch.seed)
        size = model_config.cell_sizes[int(torch.randint(len(model_config.cell_sizes), (), generator=generator))]
        hidden = draw_cell_sets(len(images), image_size=model_config.image_size, cell_size=size,
                                num_sets=model_config.num_cell_sets, generator=generator)
        repaired = inpaint_cells(network, images, hidden.to(images.device, non_blocking=True))
        return reconstruction_loss(repaired, images, config=config)
    raise ValueError(f"network is {model_config.network!r}; expected intra, autoencoder or riad")


def validation_loss(
    repaired: Float[Tensor, "b c h w"], images: Float[Tensor, "b c h w"], *, config: TrainConfig,
    model_config: ModelConfig,
) -> Float[Tensor, ""]:  # fmt: skip
    """The same measure on whole repaired images: patch by patch for InTra, else image by image."""
    if model_config.network == "intra":
        patches, target = (patchify(each, model_config.patch_size).flatten(0, 1) for each in (repaired, images))
        return patch_loss(patches, target, channels=model_config.channels, config=config)
    if model_config.network in ("autoencoder", "riad"):
        return reconstruction_loss(repaired, images, config=config)
    raise ValueError(f"network is {model_config.network!r}; expected intra, autoencoder or riad")


def patch_loss(
    inpainted: Float[Tensor, "n p"], target: Float[Tensor, "n p"], *, channels: int, config: TrainConfig
) -> Float[Tensor, ""]:  # fmt: skip
    """`reconstruction_loss` of patches, each a picture."""
    pictures = [unflatten_patches(patches, channels) for patches in (inpainted, target)]
    return reconstruction_loss(pictures[0], pictures[1], config=config)


def segmentation_loss(
    log_odds: Float[Tensor, "b h2 w2"], masks: Float[Tensor, "b h w"]
) -> Float[Tensor, ""]:  # fmt: skip
    """Focal loss (Lin et al. 2017) + soft Dice loss (Milletari et al. 2016) of a segmenter, in fp32.

    The masks, 1 where a defect can be seen, are averaged over the cells of the log-odds.
    """
    log_odds, target = log_odds.float(), F.adaptive_avg_pool2d(masks, (log_odds.shape[1], log_odds.shape[2]))
    found = log_odds.sigmoid()
    right = found * target + (1 - found) * (1 - target)
    focal = (F.binary_cross_entropy_with_logits(log_odds, target, reduction="none") * (1 - right) ** FOCUS).mean()
    overlap = (2 * (found * target).sum((1, 2)) + 1) / (found.sum((1, 2)) + target.sum((1, 2)) + 1)
    return FOCAL_WEIGHT * focal + DICE_WEIGHT * (1 - overlap).mean()


def reconstruction_loss(
    repaired: Float[Tensor, "b c h w"], target: Float[Tensor, "b c h w"], *, config: TrainConfig
) -> Float[Tensor, ""]:  # fmt: skip
    """l2_weight·L2 + gms_weight·(1 − GMS) + ssim_weight·(1 − SSIM), averaged over pictures in [0, 1], in fp32.

    GMS is the mean over the pictures reduced by each of `gms_scales`.
    """
    repaired, target = repaired.float(), target.float()
    loss = repaired.new_zeros(())
    if config.l2_weight:
        loss = loss + config.l2_weight * (repaired - target).square().mean()
    if config.gms_weight:
        scales = [gms_map(reduced(repaired, scale), reduced(target, scale)).mean() for scale in config.gms_scales]
        loss = loss + config.gms_weight * (1 - torch.stack(scales).mean())
    if config.ssim_weight:
        loss = loss + config.ssim_weight * (1 - ssim_map(repaired, target).mean())
    return loss
