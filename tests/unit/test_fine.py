"""The evidence of single pixels: what is usual has none, anything has little, and only what is looked at counts."""

import pytest
import torch

from intra.inspection.fine import MOST, FineDistribution, fine_size, pixels_apart


def differences(count: int, seed: int, *, size: tuple[int, int] = (24, 20), factor: float = 1) -> torch.Tensor:
    """(rows, cols, count), larger on the right."""
    noise = torch.rand(*size, count, generator=torch.Generator().manual_seed(seed))
    return factor * (0.01 + 0.05 * noise * torch.linspace(0.5, 1, size[1])[:, None])


@pytest.fixture(scope="module")
def fine() -> FineDistribution:
    return FineDistribution.of(differences(60, 0)).held_against(differences(20, 1))


def test_what_is_usual_has_no_evidence(fine):
    found = fine.evidence(differences(30, 2))
    assert found.shape == (30, 1, 24, 20)
    assert float(found.mean()) < 0.01 * MOST
    assert float(found.min()) == 0


def test_evidence_rises_and_is_bounded(fine):
    found = [float(fine.evidence(differences(30, 2) + more).mean()) for more in (0.03, 0.06, 0.2, 100)]
    assert found == sorted(found)
    assert 0.1 * MOST < found[0] < 0.8 * MOST
    assert 0.95 * MOST < found[-1] <= MOST


def test_pixels_are_held_against_new_images():
    """Repaired better where they were trained on, they differ more on new images: these are the usual ones."""
    new = differences(20, 1, factor=3)
    fine = FineDistribution.of(differences(60, 0))
    assert float(fine.evidence(new).mean()) > 0.5 * MOST
    assert float(fine.held_against(new).evidence(differences(30, 2, factor=3)).mean()) < 0.01 * MOST


def test_what_lies_outside_a_region_does_not_count():
    """There nothing is repaired, but for rounding."""
    trained, new = (differences(count, seed, size=(24, 24)) for count, seed in ((60, 0), (20, 1)))
    outside = torch.ones(24, 24, 1, dtype=torch.bool)
    outside[6:18, 6:18] = False
    whole = FineDistribution.of(trained).held_against(new)
    part = FineDistribution.of(torch.where(outside, 6e-8, trained)).held_against(torch.where(outside, 0.0, new))
    torch.testing.assert_close(part.spread[6:18, 6:18], whole.spread[6:18, 6:18], rtol=0.1, atol=0)
    assert float(part.evidence(torch.where(outside, 0.0, new)).max()) < MOST


def test_pixels_that_never_differ_have_a_spread():
    same = FineDistribution.of(torch.zeros(8, 8, 5)).held_against(torch.zeros(8, 8, 2))
    assert float(same.spread.min()) > 0
    assert float(same.evidence(torch.zeros(8, 8, 3)).max()) == 0
    assert float(same.evidence(torch.ones(8, 8, 3)).min()) > 0.9 * MOST


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (1, 3, 8, 33), (3, 8, 7, 6)])
def test_of_images_of_any_size_and_channels(shape):
    photos, repaired = torch.rand(shape, generator=torch.Generator().manual_seed(0)), torch.zeros(shape)
    apart = pixels_apart(photos, repaired)
    assert apart.shape == (*fine_size(shape[-2:]), shape[0])
    assert float(apart.mean()) == pytest.approx(float(photos.mean()), rel=0.2)
    found = FineDistribution.of(apart).held_against(apart).evidence(apart)
    assert bool(found.isfinite().all())
