"""Kinds of cells that all places share: their likelihood, when they are chosen, and what they find then."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal

from intra.config import ScoringConfig
from intra.inspection.distribution import GoodPatches, PatchDistribution, _learnt
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


def rows(features: torch.Tensor) -> torch.Tensor:
    return features.transpose(1, 2).flatten(0, 1)


@pytest.fixture(scope="module")
def kinds() -> CellKinds:
    return CellKinds.of(rows(two_kinds(40)), seed=0)


def test_the_density_is_that_of_the_mixture(kinds):
    """Against Gaussians from scipy."""
    cells = two_kinds(12, seed=9, spread=1.5)
    wider, density = kinds.held_against(cells)
    whitening, offset = wider.whitening.double().numpy(), wider.offset.double().numpy()
    assert (kinds.whitening / wider.whitening)[:, 0, 0] == pytest.approx(1.5, rel=0.1)
    log_share = wider.log_weight.double().numpy() - np.linalg.slogdet(whitening)[1]
    assert np.exp(log_share).sum() == pytest.approx(1)
    for image in range(12):
        each = [multivariate_normal(np.linalg.solve(w, o), np.linalg.inv(w.T @ w)).logpdf(cells[..., image].double())
                for w, o in zip(whitening, offset, strict=True)]
        expected = logsumexp(np.stack(each) + log_share[:, None], axis=0).mean() + WIDTH / 2 * np.log(2 * np.pi)
        assert density[image] == pytest.approx(expected, abs=1e-3)


def test_a_single_kind_is_as_likely_as_places_that_are_all_alike():
    """The same Gaussian everywhere, known to both from many photos."""
    features, unseen = noise(16, WIDTH, 4000), noise(16, WIDTH, 50, seed=1)
    part = _learnt(features, 0, seed=0)
    one = CellKinds.of(rows(features)[: CELLS_PER_KIND], seed=0)
    assert len(one.log_weight) == 1
    many = replace(part, kinds=CellKinds._of_rows(rows(features), torch.zeros(16 * 4000, dtype=torch.long)))
    assert GoodPatches._for_shared(many, unseen).mean().abs() < 0.015


def test_what_lies_between_two_kinds_is_far_from_both(kinds):
    wider, _ = kinds.held_against(two_kinds(20, seed=30))
    good, between = wider.distances(two_kinds(20, seed=60)), wider.distances(torch.full((1, WIDTH, 1), 1.8))
    assert good.mean() == pytest.approx(1, rel=0.1)
    assert good.shape == (64, 20)
    # one Gaussian of all cells would have its mean about there
    assert between > 3 * good.mean()


def test_new_cells_that_spread_more_lie_at_about_one_too(kinds):
    unseen = two_kinds(20, seed=30, spread=2)
    assert kinds.distances(unseen).mean() > 2
    assert kinds.held_against(unseen)[0].distances(unseen).mean() == pytest.approx(1, rel=0.4)


def test_a_kind_without_cells_is_none():
    """Half of all cells are the same, as of a background that is cut out: of many centres most start there."""
    same = torch.zeros(3000, WIDTH)
    found = CellKinds.of(torch.cat([same, 3 + 0.2 * noise(3000, WIDTH)]), seed=0)
    assert len(found.log_weight) < MOST_KINDS
    middle = torch.full((1, WIDTH, 1), 1.5)  # the mean of all, where no cell is
    assert found.distances(middle) > 10


def test_a_distance_does_not_jump_between_kinds(kinds):
    line = torch.linspace(-2, 6, 4001)[:, None, None].expand(-1, WIDTH, 1).contiguous()
    found = kinds.distances(line)[:, 0]
    assert found.diff().abs().max() < 0.05 * found.max()
    assert found.diff().diff().abs().max() < 0.2


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2 * CELLS_PER_KIND - 1, 1), (MOST_KINDS * 400, MOST_KINDS)])
def test_few_cells_are_of_few_kinds(count, expected):
    found = CellKinds.of(noise(count, WIDTH), seed=0)
    assert len(found.log_weight) == expected
    held, _ = found.held_against(noise(3, WIDTH, 5))
    assert held.distances(noise(3, WIDTH, 2, seed=1)).isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_cells_that_are_all_alike_are_no_reason_to_be_strict(value):
    same = torch.full((16, WIDTH, 30), value)
    found, _ = CellKinds.of(rows(same), seed=0).held_against(same)
    assert found.distances(same).max() < 1
    assert found.distances(same * (1 + 1e-6)).max() < 2  # rounding
    assert found.distances(same + 1).min() > 100


def test_the_seed_decides(kinds):
    again, other = (CellKinds.of(rows(two_kinds(40)), seed=seed) for seed in (0, 1))
    assert torch.equal(again.whitening, kinds.whitening)
    assert again.whitening.shape != other.whitening.shape or not torch.equal(again.whitening, other.whitening)


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


def test_places_share_a_distribution_where_parts_lie_anyhow():
    assert fitted(lie_anyhow=True).places == "shared"
    assert fitted(lie_anyhow=False).places == "own"
    assert fitted(lie_anyhow=False, places="shared").places == "shared"
    assert fitted(lie_anyhow=True, places="own").places == "own"


def test_one_odd_photo_does_not_decide(monkeypatch):
    photos = stripes(40, 0, lie_anyhow=False)
    scoring = replace(ScoringConfig(), num_filters=2, cell_sizes=(8,), distribution_scales=(1,))
    describe = PatchFeatures.of(photos, scoring=scoring, seed=0)
    good, held_out = (GoodPatches(describe, describe(photos, None), num_modes=4, places="auto"),
                      describe(stripes(3, 1, lie_anyhow=False), None))
    for densities, expected in (([100.0, -1.0, -2.0], "own"), ([-100.0, 1.0, 2.0], "shared")):
        monkeypatch.setattr(GoodPatches, "_for_shared", staticmethod(lambda *_, found=densities: torch.tensor(found)))
        settled = good.settled(held_out)
        assert settled.places == settled.fitted(held_out).places == expected
    assert good.places == "auto"


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
