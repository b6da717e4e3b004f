"""The evidence of single pixels: what is usual has none, anything has little, and only what is looked at counts."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from intra.inspection.fine import MOST, FineDistribution, fine_size, pixels_apart


def differences(count: int, seed: int, *, size: tuple[int, int] = (24, 20), factor: float = 1) -> torch.Tensor:
    """(rows, cols, count), larger on the right."""
    noise = torch.rand(*size, count, generator=torch.Generator().manual_seed(seed))
    return factor * (0.01 + 0.05 * noise * torch.linspace(0.5, 1, size[1])[:, None])


@pytest.fixture(scope="module")
def fine() -> FineDistribution:
    return FineDistribution.of(differences(60, 0)).held_against(differences(20, 1))


def test_the_formula(fine):
    """Of 0021, by other code."""
    trained, new, photos = (differences(count, seed).double().numpy() for count, seed in ((60, 0), (20, 1), (9, 2)))
    photos[:, :, 4] += np.linspace(0, 0.2, 20)
    mean, std = trained.mean(2, keepdims=True), trained.std(2, keepdims=True)
    spread = std + 0.5 * np.median(std) + 1e-5
    spread *= np.sqrt(np.median((((new - mean) / spread) ** 2).mean((0, 1))))
    z = np.stack([ndimage.generic_filter(each, np.nanmean, 3, mode="constant", cval=np.nan)
                  for each in np.moveaxis(((photos - mean) / spread) ** 2, 2, 0)])
    expected = 2 * np.maximum(0, z - 4) / (z + 4)
    assert 0.5 < expected[4].mean() < 1.9
    found = fine.evidence(torch.from_numpy(photos).float())[:, 0]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-4)
    np.testing.assert_allclose(fine.spread.numpy(), spread[..., 0], rtol=1e-4)


def test_what_is_usual_has_no_evidence(fine):
    found = fine.evidence(differences(30, 2))
    assert found.shape == (30, 1, 24, 20)
    assert float(found.mean()) < 0.01 * MOST
    assert float(found.min()) == 0


def test_evidence_rises_and_is_bounded(fine):
    found = [float(fine.evidence(differences(30, 2) + more).mean()) for more in (0.03, 0.06, 0.2, 100, 1e25)]
    assert found == sorted(found)
    assert 0.1 * MOST < found[0] < 0.8 * MOST
    assert 0.95 * MOST < found[-2] <= found[-1] == MOST


def test_pixels_are_held_against_new_images():
    """Repaired better where they were trained on, they differ more on new images: these are the usual ones."""
    new = differences(20, 1, factor=3)
    fine = FineDistribution.of(differences(60, 0))
    assert float(fine.evidence(new).mean()) > 0.5 * MOST
    assert float(fine.held_against(new).evidence(differences(30, 2, factor=3)).mean()) < 0.01 * MOST


def test_one_odd_image_held_out_changes_little(fine):
    new = differences(20, 1)
    new[:12, :, 7] += 0.4
    found = FineDistribution.of(differences(60, 0)).held_against(new)
    torch.testing.assert_close(found.spread, fine.spread, rtol=0.05, atol=0)


@pytest.mark.parametrize("factor", [1.0, 1e-2])
def test_of_photos_of_any_contrast(factor, fine):
    """12 bits in a file of 16 have a sixteenth of the contrast."""
    faint = FineDistribution.of(differences(60, 0, factor=factor)).held_against(differences(20, 1, factor=factor))
    for more in (0, 0.06):
        photos = differences(30, 2) + more
        torch.testing.assert_close(faint.evidence(factor * photos), fine.evidence(photos), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("rows", [slice(6, 18), slice(11, 12)])
def test_what_lies_outside_a_region_does_not_count(rows):
    """There nothing is repaired, but for rounding. Inside, all is as in a region that is the whole photo, up to the
    border, and in a region of a single row as well.
    """
    size = (24, 24)
    trained, new, photos = (differences(count, seed, size=size) for count, seed in ((60, 0), (20, 1), (30, 2)))
    photos = photos + 0.05
    outside = torch.ones(24, 24, 1, dtype=torch.bool)
    outside[rows, 6:18] = False
    inside = [each[rows, 6:18] for each in (trained, new, photos)]
    whole = FineDistribution.of(inside[0]).held_against(inside[1])
    part = FineDistribution.of(torch.where(outside, 6e-8, trained)).held_against(torch.where(outside, 0.0, new))
    torch.testing.assert_close(part.spread[rows, 6:18], whole.spread)
    found, expected = part.evidence(torch.where(outside, 0.0, photos)), whole.evidence(inside[2])
    torch.testing.assert_close(found[:, :, rows, 6:18], expected, rtol=0, atol=0.02)
    assert float(expected.mean()) > 0.2 * MOST
    assert float(found[:, :, :, :4].max()) == 0


def test_pixels_that_never_differ_have_a_spread():
    same = FineDistribution.of(torch.zeros(8, 8, 5)).held_against(torch.zeros(8, 8, 2))
    assert float(same.spread.min()) > 0
    assert float(same.evidence(torch.zeros(8, 8, 3)).max()) == 0
    assert float(same.evidence(torch.ones(8, 8, 3)).min()) > 0.9 * MOST


def test_a_part_of_the_photo_that_never_differs_is_looked_at(fine):
    def black(apart: torch.Tensor) -> torch.Tensor:
        return apart * (torch.arange(20) > 8)[:, None]

    found = FineDistribution.of(black(differences(60, 0))).held_against(black(differences(20, 1)))
    photos = black(differences(1, 2))
    photos[10:14, 2:6] = 0.1
    assert float(found.evidence(photos)[0, 0, 11:13, 3:5].min()) > 0.9 * MOST


def test_colours_that_change_against_each_other_add_up():
    photos = torch.full((1, 2, 4, 6), 0.5)
    photos[:, 0] += 0.2
    photos[:, 1] -= 0.2
    torch.testing.assert_close(pixels_apart(photos, torch.full_like(photos, 0.5)), torch.full((2, 3, 1), 0.2))


def test_noise_of_single_pixels_is_averaged_before():
    checkerboard = torch.tensor([[0.6, 0.4], [0.4, 0.6]]).tile(1, 3, 2, 3)
    assert float(pixels_apart(checkerboard, torch.full_like(checkerboard, 0.5)).abs().max()) < 1e-6


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 3, 8, 33), (3, 8, 7, 6)])
def test_of_images_of_any_size_and_channels(shape):
    photos, repaired = torch.rand(shape, generator=torch.Generator().manual_seed(0)), torch.zeros(shape)
    apart = pixels_apart(photos, repaired)
    assert apart.shape == (*fine_size(shape[-2:]), shape[0])
    assert float(apart.mean()) == pytest.approx(float(photos.mean()), rel=0.2)
    found = FineDistribution.of(apart).held_against(apart).evidence(apart)
    assert bool(found.isfinite().all())
