"""The distribution of good patches: what it finds, what it costs, and where it must not break."""

import numpy as np
import pytest
import torch

from intra.data.images import to_unit
from intra.inspection.distribution import SHRINKAGES, PatchMoments, _features, cell_grid


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def striped(count: int, *, seed: int = 0, side: int = 64) -> torch.Tensor:
    """Good photos: stripes that brighten from left to right, a brightness of their own, and a little noise."""
    column = torch.linspace(0, 1, side)
    stripes = 0.5 + 0.2 * torch.sin(torch.arange(side) * 1.2)[:, None] * column
    shade = 0.2 * noise(count, 1, 1, 1, seed=seed) - 0.1
    return (stripes + shade + 0.05 * noise(count, 1, side, side, seed=seed + 1)).expand(-1, 3, -1, -1).contiguous()


def blurred(photos: torch.Tensor) -> torch.Tensor:
    """As a young network repairs them."""
    return torch.nn.functional.avg_pool2d(photos, 5, stride=1, padding=2, count_include_pad=False)


def fitted(photos: torch.Tensor, held_out: torch.Tensor, *, chunk: int = 8, **settings: int):
    moments = PatchMoments(photos, scales=(1, 4), num_filters=settings.get("num_filters", 8), cell_size=8, seed=0)
    for part in photos.split(chunk):
        moments.add(part, blurred(part))
    return moments.fitted([(part, blurred(part)) for part in held_out.split(3)])


@pytest.fixture(scope="module")
def distribution():
    return fitted(striped(60), striped(12, seed=50))


def wiped(photos: torch.Tensor) -> torch.Tensor:
    """Less than usual: the stripes are gone from a square on the right."""
    photos = photos.clone()
    photos[..., 16:40, 36:60] = photos[..., 16:40, 36:60].mean((-2, -1), keepdim=True)
    return photos


def scratched(photos: torch.Tensor) -> torch.Tensor:
    photos = photos.clone()
    photos[..., 24:26, 8:40] = 0.9
    return photos


def displaced(photos: torch.Tensor) -> torch.Tensor:
    """Every pixel is one of the part, in the wrong place: the strong stripes on the left."""
    photos = photos.clone()
    photos[..., 16:40, 0:24] = photos[..., 16:40, 40:64]
    return photos


@pytest.mark.parametrize(("defect", "rows", "cols"), [
    (wiped, slice(18, 38), slice(38, 58)), (scratched, slice(24, 26), slice(10, 38)),
    (displaced, slice(18, 38), slice(2, 22)),
])  # fmt: skip
def test_what_never_happens_stands_out_where_it_is(distribution, defect, rows, cols):
    good = striped(10, seed=90)
    bad = defect(good)
    clean, found = distribution.evidence(good, blurred(good)), distribution.evidence(bad, blurred(bad))
    assert found[:, rows, cols].mean() > clean.amax((1, 2)).mean()
    assert found[:, 57:].mean() < 1.2 * clean[:, 57:].mean()  # and not beyond the reach of the coarse pieces


def test_a_tint_stands_out_and_a_usual_shade_does_not(distribution):
    """Grey photos of many shades: another shade is usual, the same change in colour has never been seen."""
    good = striped(40, seed=90)
    change = 0.08 * torch.ones(3, 1, 1)
    away, odd = good + change, good + change * torch.tensor([1.0, -1.0, 0.0])[:, None, None]  # the same size in colour
    clean, shifted, tinted = (distribution.evidence(each, blurred(each)).mean() for each in (good, away, odd))
    assert shifted - clean < 0.2 * (tinted - clean)


def test_good_images_lie_at_about_one(distribution):
    good = striped(10, seed=90)
    for part, scale in zip(distribution.parts, distribution.scales, strict=True):
        assert part.mean.shape == (64, 4 * (8 + 2))  # 8 components and two colours
        assert scale in (1, 4)
    evidence = distribution.evidence(good, blurred(good))
    assert evidence.shape == (10, 64, 64)
    assert evidence.mean() == pytest.approx(2 * np.log(2), rel=0.4)  # of log(1 + 1) at each of two scales


def test_moments_do_not_depend_on_the_chunks():
    photos, held_out = striped(20), striped(5, seed=50)
    one, other = fitted(photos, held_out, chunk=20), fitted(photos, held_out, chunk=3)
    bad = scratched(held_out)
    torch.testing.assert_close(one.evidence(bad, blurred(bad)), other.evidence(bad, blurred(bad)), rtol=1e-3, atol=1e-3)


def test_moments_are_numpys():
    photos = striped(20)
    moments = PatchMoments(photos, scales=(1,), num_filters=3, cell_size=32, seed=0)
    features = []
    for part in photos.split(7):
        moments.add(part, blurred(part))
        features.append(_features(part, blurred(part), moments.filters[0], 1, moments.grid))
    mean, covariance = moments._sums[0].moments()
    together = torch.cat(features, dim=2).double().numpy()
    np.testing.assert_allclose(mean, together.mean(2), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(covariance[1], np.cov(together[1]), rtol=1e-3, atol=1e-5)


def test_few_images_share_their_covariance_and_many_need_not():
    """Photos that are alike at all places: with few of them the places' own covariances are mere noise."""
    def shrinkage(count: int) -> float:
        photos = noise(count, 1, 64, 64)
        moments = PatchMoments(photos, scales=(1,), num_filters=4, cell_size=8, seed=0)
        moments.add(photos, photos)
        held_out = noise(20, 1, 64, 64, seed=9)
        found = moments.fitted([(held_out, held_out)]).parts[0].whitening
        return float(found.std(0).mean() / found.abs().mean())  # how much places differ

    assert shrinkage(6) < shrinkage(400)
    assert min(SHRINKAGES) > 0


@pytest.mark.parametrize("photos", [
    torch.zeros(4, 3, 32, 32), torch.ones(4, 1, 32, 32), torch.full((2, 1, 16, 48), 0.5), noise(3, 5, 8, 8),
    (255 * noise(4, 3, 33, 17)).byte(),
])  # fmt: skip
def test_flat_tiny_and_odd_photos_give_finite_evidence(photos):
    unit = to_unit(photos)
    moments = PatchMoments(photos, scales=(1, 4), num_filters=16, cell_size=8, seed=0)
    moments.add(unit, unit)
    found = moments.fitted([(unit[:1], unit[:1])])
    evidence = found.evidence(1 - unit, unit)
    assert evidence.shape == (len(unit), *unit.shape[-2:])
    assert evidence.isfinite().all()


def test_a_grid_has_a_cell_at_least():
    assert cell_grid((256, 240), 8) == (32, 30)
    assert cell_grid((3, 5), 8) == (1, 1)
