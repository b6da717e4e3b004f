"""Evidence of cells that are odd in the same way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from intra.config import ScoringConfig
from intra.inspection.agreement import MOST, MUCH, Agreement, agreeing, blurred
from intra.inspection.distribution import GoodPatches, PatchDistribution
from intra.inspection.features import PatchFeatures
from intra.inspection.region import Region

SCORING = replace(ScoringConfig(), num_filters=8, pixel_evidence=False)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rough(count: int, seed: int) -> torch.Tensor:
    """Photos (N, 1, 128, 128) of a surface without structure."""
    return (0.5 + 0.1 * noise(count, 1, 128, 128, seed=seed)).clamp(0, 1)


def fitted(photos: torch.Tensor, held_out: torch.Tensor, region: Region | None = None) -> PatchDistribution:
    describe = PatchFeatures.of(photos, scoring=SCORING, seed=0, region=region)
    good = GoodPatches(describe, describe(photos, None), num_modes=4, places="own", agreement=True)
    return good.fitted(describe(held_out, None))


def test_agreement_is_the_likelihood_ratio_with_the_mean_of_the_other_cells():
    residuals = noise(7, 3, 4)
    expected = np.empty((7, 3))
    for cell in range(7):
        for image in range(3):
            others = residuals[[i for i in range(7) if i != cell], image].mean(0)
            with_it, without = (multivariate_normal(mean).logpdf(residuals[cell, image].double())
                                for mean in (others.double(), np.zeros(4)))
            expected[cell, image] = with_it - without
    np.testing.assert_allclose(agreeing(residuals).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(agreeing(residuals[:1]), torch.zeros(1, 3))  # a cell alone has nobody to agree with


def test_evidence_begins_at_what_is_usual_and_is_bounded():
    agreement = Agreement.of(noise(20, 500) * 0.1)
    usual = float(agreement.usual)
    assert usual == pytest.approx(0.1 * (1 + 0.1 / MUCH), rel=0.02)
    found = agreement.evidence(torch.tensor([-5.0, 0.0, usual, 3 * usual, 1e9]))
    assert found[:3].tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert float(found[3]) == pytest.approx(MOST / 2) and float(found[4]) == pytest.approx(MOST)


def test_the_more_good_images_agree_the_less_is_said():
    """Parts that lie anyhow agree by how they lie; a hundred times as much must not look a hundred times as odd."""
    little, much = (Agreement.of(factor * noise(20, 500)) for factor in (0.1, 10.0))
    found = [float(each.evidence(torch.tensor(5.0 * factor))) for each, factor in ((little, 0.1), (much, 10.0))]
    assert found[0] > 0.5 * MOST and found[1] == 0
    assert torch.isfinite(Agreement.of(torch.zeros(3, 10)).evidence(torch.zeros(2, 2))).all()


def test_a_faint_region_is_outlined_where_no_cell_alone_is_odd():
    distribution = fitted(rough(60, 0), rough(12, 1))
    photos = rough(10, 2)
    faint = photos.clone()
    faint[..., :64, :] = (faint[..., :64, :] - 0.5) * 1.25 + 0.5  # the upper half has a little more contrast
    found, without = (each.evidence(faint, None) for each in (distribution, replace(distribution, agreement=None)))
    extra = found - without
    assert float(extra[:, 12:52].mean()) > 0.4 * MOST
    assert float(extra[:, 76:].mean()) < 0.1 * MOST
    good = distribution.evidence(photos, None) - replace(distribution, agreement=None).evidence(photos, None)
    assert float(good.mean()) < 0.1 * MOST


def test_the_whitening_lays_all_places_in_one_basis():
    """Else cells that differ in the same way would look as if they differed in many."""
    distribution = fitted(rough(60, 0), rough(12, 1))
    part = distribution.parts[0]
    shift = noise(part.mean.shape[1], seed=5)
    moved = part.whitened(shift.expand(len(part.mean), -1)[..., None].contiguous())[:, 0]
    cosines = torch.nn.functional.cosine_similarity(moved[:, None], moved[None], dim=2)
    assert float(cosines.min()) > 0.8


def test_in_a_region_its_cells_alone_are_compared():
    inside = np.zeros((128, 128), dtype=bool)
    inside[:, 64:] = True
    photos, held_out = rough(60, 0), rough(12, 1)
    region = Region.of(inside, photos.mean(0))
    distribution = fitted(region.shown(photos), region.shown(held_out), region)
    faint = rough(4, 2)
    faint[..., :64, 64:] = (faint[..., :64, 64:] - 0.5) * 1.4 + 0.5
    shown = region.shown(faint)
    extra = distribution.evidence(shown, None) - replace(distribution, agreement=None).evidence(shown, None)
    assert float(extra[:, 12:52, 70:].mean()) > 0.4 * MOST > 4 * float(extra[:, 76:, 70:].mean())


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 3), (5, 9)])
def test_small_grids_are_blurred_too(shape):
    values = noise(2, *shape)
    found = blurred(values)
    assert found.shape == values.shape and torch.isfinite(found).all()
    if max(shape) <= 3:
        torch.testing.assert_close(found, values.mean((1, 2), keepdim=True).expand_as(values))
