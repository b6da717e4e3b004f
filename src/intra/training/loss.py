"""How far inpainted patches are from the real ones (section 3.3, equation 6 of the paper)."""

from jaxtyping import Float
from torch import Tensor

from intra.geometry import unflatten_patches
from intra.similarity import gms_map, ssim_map

__all__ = ["reconstruction_loss"]


def reconstruction_loss(
    inpainted: Float[Tensor, "n p"], target: Float[Tensor, "n p"], *, channels: int, gms_weight: float,
    ssim_weight: float,
) -> Float[Tensor, ""]:  # fmt: skip
    """L2 + gms_weight·(1 − GMS) + ssim_weight·(1 − SSIM), averaged over patches in [0, 1], in fp32."""
    inpainted, target = inpainted.float(), target.float()
    loss = (inpainted - target).square().mean()
    inpainted, target = (unflatten_patches(patches, channels) for patches in (inpainted, target))
    if gms_weight:
        loss = loss + gms_weight * (1 - gms_map(inpainted, target).mean())
    if ssim_weight:
        loss = loss + ssim_weight * (1 - ssim_map(inpainted, target).mean())
    return loss
