"""The training loss: the paper's weights, unflattened the right way round, finite everywhere."""

import pytest
import torch
import torch.nn.functional as F

from intra.config import TrainConfig
from intra.geometry import flatten_patches, patchify
from intra.similarity import gms_map, ssim_map
from intra.training.loss import patch_loss, reconstruction_loss


def patches(count: int = 6, seed: int = 0) -> torch.Tensor:
    smooth = torch.rand(1, 3, 16, 16 * count, generator=torch.Generator().manual_seed(seed)).cumsum(-1) / (16 * count)
    return patchify(smooth, 16)[0]


def loss(a: torch.Tensor, b: torch.Tensor, gms: float = 0.01, ssim: float = 0.01) -> torch.Tensor:
    return patch_loss(a, b, channels=3, config=TrainConfig(gms_weight=gms, ssim_weight=ssim))


def test_zero_for_equal_patches_and_above_otherwise():
    x = patches()
    assert loss(x, x).item() == pytest.approx(0, abs=1e-6)
    assert loss(x, x + 0.1).item() > 0.009


def test_is_the_sum_of_its_parts():
    x, y = patches(), patches(seed=1)
    pictures = [z.reshape(-1, 3, 16, 16) for z in (x, y)]
    expected = ((x - y) ** 2).mean() + 0.01 * (1 - gms_map(*pictures).mean()) + 0.02 * (1 - ssim_map(*pictures).mean())
    torch.testing.assert_close(loss(x, y, ssim=0.02), expected)
    torch.testing.assert_close(loss(x, y, 0.0, 0.0), ((x - y) ** 2).mean())


def test_sees_the_structure_of_pixels_not_their_order_in_memory():
    """Trap 1: patches flattened as (row, col, channel) would be scrambled by a channel-first unflatten."""
    picture = patches().reshape(-1, 3, 16, 16)
    shifted = picture.roll(1, -1)
    right = loss(flatten_patches(picture), flatten_patches(shifted), 1.0, 1.0) - loss(
        flatten_patches(picture), flatten_patches(shifted), 0.0, 0.0)
    wrong = [x.permute(0, 2, 3, 1).flatten(1) for x in (picture, shifted)]
    assert abs(right - (loss(*wrong, 1.0, 1.0) - loss(*wrong, 0.0, 0.0))) > 0.01


@pytest.mark.parametrize("fill", [0.0, 1.0, 0.5])
def test_gradients_are_finite_on_flat_patches(fill):
    inpainted = torch.full((4, 768), fill, requires_grad=True)
    loss(inpainted, torch.full((4, 768), fill)).backward()
    assert inpainted.grad is not None
    assert inpainted.grad.isfinite().all()


def test_bf16_patches_are_compared_in_fp32():
    x = patches()
    assert loss(x.bfloat16(), x).dtype == torch.float32


def test_weights_and_scales_of_whole_images():
    x, y = (torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    ssim = reconstruction_loss(x, y, config=TrainConfig(l2_weight=0.0, gms_weight=0.0, ssim_weight=3.0))
    torch.testing.assert_close(ssim, 3 * (1 - ssim_map(x, y).mean()))
    weights = TrainConfig(l2_weight=0.0, gms_weight=1.0, ssim_weight=0.0, gms_scales=(1, 4))
    gms = reconstruction_loss(x, y, config=weights)
    small = [F.avg_pool2d(each, 4) for each in (x, y)]
    torch.testing.assert_close(gms, 1 - (gms_map(x, y).mean() + gms_map(*small).mean()) / 2)
    half = reconstruction_loss(x, y, config=TrainConfig(l2_weight=0.5, gms_weight=0.0, ssim_weight=0.0))
    torch.testing.assert_close(half, ((x - y) ** 2).mean() / 2)
