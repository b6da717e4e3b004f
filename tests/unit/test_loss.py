"""The training loss: the paper's weights, unflattened the right way round, finite everywhere."""

import pytest
import torch

from intra.geometry import flatten_patches, patchify
from intra.similarity import gms_map, ssim_map
from intra.training.loss import reconstruction_loss


def patches(count: int = 6, seed: int = 0) -> torch.Tensor:
    smooth = torch.rand(1, 3, 16, 16 * count, generator=torch.Generator().manual_seed(seed)).cumsum(-1) / (16 * count)
    return patchify(smooth, 16)[0]


def loss(a: torch.Tensor, b: torch.Tensor, gms: float = 0.01, ssim: float = 0.01) -> torch.Tensor:
    return reconstruction_loss(a, b, channels=3, gms_weight=gms, ssim_weight=ssim)


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
