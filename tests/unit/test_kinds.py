"""Kinds of cells that all places share: their likelihood, when they are chosen, and what they find then."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from intra.config import ScoringConfig
from intra.inspection.distribution import GoodPatches, PatchDistribution
from intra.inspection.features import PatchFeatures
from intra.inspection.kinds import CELLS_PER_KIND, MOST_KINDS, CellKinds

WIDTH = 4


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def two_kinds(count: int, *, seed: int = 0, spread: float = 1) -> torch.Tensor:
    """Features (64, WIDTH, count) of cells that are of one of two kinds, anyhow."""
    of_first = noise(64, 1, count, seed=seed) > 0
    about = spread * noise(64, WIDTH, count, seed=seed + 1)
    return torch.where(of_first, 3 + 0.2 * about, about)


def test_the_density_is_that_of_the_mixture():
    """Against Gaussians from scipy."""
    kinds, cells = CellKinds.of(two_kinds(40), seed=0), two_kinds(3, seed=9)
    rows = cells.transpose(1, 2).flatten(0, 1).double().numpy()
    whitening, offset = kinds.whitening.double().numpy(), kinds.offset.double().numpy()
    log_share = kinds.log_weight.double().numpy() - np.linalg.slogdet(whitening)[1]
    assert np.exp(log_share).sum() == pytest.approx(1)
    each = [multivariate_normal(np.linalg.solve(w, o), np.linalg.inv(w.T @ w)).logpdf(rows)
            for w, o in zip(whitening, offset, strict=True)]
    expected = logsumexp(np.stack(each) + log_share[:, None], axis=0).mean() + WIDTH / 2 * np.log(2 * np.pi)
    assert kinds.log_density(cells) == pytest.approx(expected, abs=1e-4)


def test_what_lies_between_two_kinds_is_far_from_both():
    kinds = CellKinds.of(two_kinds(40), seed=0).held_against(two_kinds(20, seed=30))
    good, between = kinds.distances(two_kinds(20, seed=60)), kinds.distances(torch.full((1, WIDTH, 1), 1.8))
    assert good.mean() == pytest.approx(1, rel=0.1)
    assert good.shape == (64, 20)
    # one Gaussian of all cells would have its mean about there
    assert between > 3 * good.mean()


def test_new_cells_that_spread_more_lie_at_about_one_too():
    kinds, unseen = CellKinds.of(two_kinds(40), seed=0), two_kinds(20, seed=30, spread=2)
    assert kinds.distances(unseen).mean() > 2
    assert kinds.held_against(unseen).distances(unseen).mean() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize(("cells", "count", "expected"), [
    (1, 1, 1), (2, 2 * CELLS_PER_KIND - 1, 3), (64, 200, MOST_KINDS),
])  # fmt: skip
def test_few_cells_are_of_few_kinds(cells, count, expected):
    kinds = CellKinds.of(noise(cells, WIDTH, count), seed=0)
    assert len(kinds.log_weight) == expected
    assert kinds.held_against(noise(cells, WIDTH, count)).distances(noise(cells, WIDTH, 2, seed=1)).isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_cells_that_are_all_alike_give_finite_distances(value):
    same = torch.full((16, WIDTH, 30), value)
    kinds = CellKinds.of(same, seed=0).held_against(same)
    assert kinds.distances(same).isfinite().all()
    assert kinds.distances(same + 1).min() > kinds.distances(same).max()


def test_any_seed_gives_the_same_again():
    for seed in (0, 1):
        one, other = (CellKinds.of(two_kinds(40), seed=seed) for _ in range(2))
        assert torch.equal(one.whitening, other.whitening)


def stripes(count: int, seed: int, *, lie_anyhow: bool) -> torch.Tensor:
    """Photos (count, 1, 64, 64) of a dark and a bright half with stripes, the border in the middle or anywhere."""
    generator = np.random.default_rng(seed)
    photos = np.zeros((count, 1, 64, 64))
    for photo in photos:
        ramp = 0.3 + 0.5 * (np.arange(64) < 32) + 0.06 * np.sin(1.2 * np.arange(64)) * (np.arange(64) < 32)
        photo[0] = np.roll(ramp, generator.integers(64) if lie_anyhow else 0)[:, None]
    return torch.from_numpy(photos + 0.02 * generator.normal(size=photos.shape)).float().clamp(0, 1)


def fitted(lie_anyhow: bool, **settings: object) -> PatchDistribution:
    photos, held_out = (stripes(count, seed, lie_anyhow=lie_anyhow) for count, seed in ((60, 0), (12, 1)))
    scoring = replace(ScoringConfig(), num_filters=6, cell_sizes=(8,), distribution_scales=(1,), **settings)
    describe = PatchFeatures.of(photos, scoring=scoring, seed=0)
    good = GoodPatches(describe, describe(photos, None), num_modes=4, places=scoring.places)
    return good.fitted(describe(held_out, None))


def are_shared(distribution: PatchDistribution) -> bool:
    shared = {part.kinds is not None for part in distribution.parts}
    assert len(shared) == 1
    return shared.pop()


def test_places_share_a_distribution_where_parts_lie_anyhow():
    assert are_shared(fitted(lie_anyhow=True))
    assert not are_shared(fitted(lie_anyhow=False))
    assert are_shared(fitted(lie_anyhow=False, places="shared"))
    assert not are_shared(fitted(lie_anyhow=True, places="own"))


def test_then_a_defect_is_told_from_what_may_lie_anywhere():
    """A patch without stripes, as bright as their crests: no place is without such a shade, but none is so even."""
    good = stripes(20, 5, lie_anyhow=True)
    bad = good.clone()
    for photo in bad:
        rows = (photo[0].mean(1) > 0.6).nonzero().flatten()
        rows = rows[(rows > 8) & (rows < 56)][:12]
        photo[0, rows, 24:30] = 0.8 + 0.02 * noise(len(rows), 6)

    def told(places: str) -> float:
        """The share of pairs of a good and a bad photo."""
        distribution = fitted(lie_anyhow=True, places=places)
        clean, found = (distribution.evidence(photos, None).amax((1, 2)) for photos in (good, bad))
        return float((found[:, None] > clean).float().mean())

    assert told("shared") > max(0.75, told("own") + 0.1)
