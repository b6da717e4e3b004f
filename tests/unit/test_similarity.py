"""SSIM and GMS: identity, symmetry, range, gradients, parity with independent implementations."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from skimage.metrics import structural_similarity

from intra.similarity import C_GMS, box_blur, gms_map, multiscale_difference, ssim_map

MAPS = (ssim_map, gms_map)


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("similarity", MAPS)
@pytest.mark.parametrize("fill", ["random", "black", "white"])
def test_an_image_equals_itself(similarity, fill):
    x = {"random": images(2, 3, 20, 24), "black": torch.zeros(2, 3, 20, 24), "white": torch.ones(2, 3, 20, 24)}[fill]
    torch.testing.assert_close(similarity(x, x), torch.ones_like(x))


@pytest.mark.parametrize("similarity", MAPS)
def test_symmetric_and_in_range(similarity):
    x, y = images(2, 3, 16, 16), images(2, 3, 16, 16, seed=1)
    torch.testing.assert_close(similarity(x, y), similarity(y, x))
    found = similarity(x, y)
    assert found.shape == x.shape
    assert found.max() <= 1 + 1e-6
    assert found.min() >= (0 if similarity is gms_map else -1)
    assert similarity(x.double(), y.double()).dtype == torch.float64


@pytest.mark.parametrize("similarity", MAPS)
def test_gradients_are_right_and_finite_on_flat_patches(similarity):
    x, y = images(1, 1, 6, 6, dtype=torch.float64), images(1, 1, 6, 6, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda y: similarity(x, y), (y,))
    black = torch.zeros(2, 3, 16, 16, requires_grad=True)
    similarity(images(2, 3, 16, 16), black).sum().backward()
    assert black.grad is not None
    assert black.grad.isfinite().all()


def test_ssim_equals_scikit_image():
    x, y = images(1, 1, 40, 36, dtype=torch.float64), images(1, 1, 40, 36, seed=1, dtype=torch.float64)
    y = 0.7 * x + 0.3 * y
    _, expected = structural_similarity(x[0, 0].numpy(), y[0, 0].numpy(), gaussian_weights=True, sigma=1.5,
                                        use_sample_covariance=False, data_range=1.0, full=True)
    inside = slice(5, -5)  # beyond the border scikit-image mirrors
    np.testing.assert_allclose(ssim_map(x, y)[0, 0, inside, inside], expected[inside, inside], atol=1e-12)


def test_gms_equals_scipy():
    x, y = (images(1, 1, 15, 17, seed=seed, dtype=torch.float64) for seed in (0, 1))

    def magnitude(image: torch.Tensor) -> np.ndarray:
        dx, dy = (ndimage.prewitt(image[0, 0].numpy(), axis=axis, mode="nearest") / 3 for axis in (0, 1))
        return np.hypot(dx, dy)

    a, b = magnitude(x), magnitude(y)
    np.testing.assert_allclose(gms_map(x, y)[0, 0], (2 * a * b + C_GMS) / (a**2 + b**2 + C_GMS), atol=1e-9)


def test_golden_values():
    """A ramp against its half, by hand: it rises by 0.1 a pixel, so by 0.2 over Prewitt's two; the half by 0.1."""
    ramp = torch.arange(9, dtype=torch.float64).div(10).expand(1, 1, 9, 9)
    expected = (2 * 0.2 * 0.1 + 0.0026) / (0.2**2 + 0.1**2 + 0.0026)
    assert gms_map(ramp, ramp / 2)[0, 0, 4, 4].item() == pytest.approx(expected, rel=1e-9)
    flat = torch.full((1, 1, 12, 12), 0.5, dtype=torch.float64)
    assert ssim_map(flat, flat / 2)[0, 0, 6, 6].item() == pytest.approx(
        (2 * 0.5 * 0.25 + 1e-4) / (0.5**2 + 0.25**2 + 1e-4), rel=1e-9)


def test_scrambled_pixels_are_less_alike():
    x = images(1, 3, 16, 16).cumsum(-1) / 16
    scrambled = x.permute(0, 2, 3, 1).reshape(1, 3, 16, 16)  # trap 1: unflattened in another order than flattened
    assert ssim_map(x, scrambled).mean() < 0.5 * ssim_map(x, x + 0.01).mean()


@pytest.mark.parametrize("similarity", MAPS)
def test_autocast_does_not_lower_the_precision(similarity):
    x = 0.5 + 0.01 * images(2, 3, 16, 16)
    expected = similarity(x, x + 0.001 * images(2, 3, 16, 16, seed=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(similarity(x, x + 0.001 * images(2, 3, 16, 16, seed=1)), expected)


@pytest.mark.parametrize("kind", ["gms", "ssim", "squared"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 64)])
def test_multiscale_difference_at_any_size(size, kind):
    x = images(2, 3, *size)
    difference = multiscale_difference(x, x.flip(-1), scales=(1, 2, 4), kind=kind)
    assert difference.shape == (2, *size)
    assert 0 <= difference.min() <= difference.max() <= (2 if kind == "ssim" else 1)
    assert multiscale_difference(x, x, scales=(2, 4, 8), kind=kind).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["gms", "ssim", "squared"])
def test_multiscale_difference_lies_where_the_change_is(kind):
    x = images(1, 3, 64, 64)
    y = x.clone()
    y[..., 40:56, 8:24] = 0.5
    difference = multiscale_difference(x, y, scales=(1, 2, 4), kind=kind)[0]
    assert difference[40:56, 8:24].mean() > 20 * difference[:32].mean()


def test_what_is_compared_at_full_size():
    x, y = images(2, 3, 16, 20), images(2, 3, 16, 20, seed=1)
    torch.testing.assert_close(multiscale_difference(x, y, scales=(1,), kind="squared"), ((x - y) ** 2).mean(1))
    torch.testing.assert_close(multiscale_difference(x, y, scales=(1,), kind="ssim"), 1 - ssim_map(x, y).mean(1))
    torch.testing.assert_close(multiscale_difference(x, y, scales=(1,), kind="gms"), 1 - gms_map(x, y).mean(1))


@pytest.mark.parametrize("side", [1, 3, 7])
def test_box_blur_equals_a_mean_over_the_part_inside(side):
    maps = images(2, 9, 11)
    reach = side // 2
    padded, inside = (F.pad(m, (reach,) * 4) for m in (maps, torch.ones_like(maps)))
    total = padded.unfold(1, side, 1).unfold(2, side, 1).sum((-1, -2))
    torch.testing.assert_close(box_blur(maps, side), total / inside.unfold(1, side, 1).unfold(2, side, 1).sum((-1, -2)))


@pytest.mark.parametrize("side", [1, 3, 9, 31, 101])
def test_box_blur_by_sums_is_the_average_pooling_of_graphs(side, monkeypatch):
    maps = images(3, 64, 48)
    found = box_blur(maps, side)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert torch.equal(found, box_blur(maps, side))


def test_different_sizes_are_refused():
    with pytest.raises(Exception, match=r"violates|type"):
        ssim_map(images(1, 1, 8, 8), images(1, 1, 8, 9))
