"""The distribution of good patches: what it finds, what it costs, and where it must not break."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from intra.config import ScoringConfig
from intra.data.images import to_unit
from intra.inspection.distribution import SHRINKAGES, GoodPatches, _in_parts, _moments, _whitening, _without
from intra.inspection.features import PatchFeatures, _random_pieces, cell_grids
from intra.inspection.region import Region


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


def described(photos: torch.Tensor, **settings: object) -> PatchFeatures:
    return PatchFeatures.of(photos, scoring=replace(ScoringConfig(), **settings), seed=0)


def fitted(photos: torch.Tensor, held_out: torch.Tensor, *, num_modes: int = 16, **settings: object):
    describe = described(photos, num_filters=8, **settings)
    good = GoodPatches(describe, describe(photos, blurred(photos)), num_modes=num_modes, places="own")
    return good.fitted(describe(held_out, blurred(held_out)))


@pytest.fixture(scope="module")
def distribution():
    return fitted(striped(60), striped(12, seed=50), cell_sizes=(8, 16, 32))


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
def test_what_never_happens_stands_out_where_it_is(defect, rows, cols):
    distribution = fitted(striped(60), striped(12, seed=50), cell_sizes=(8,))
    good = striped(10, seed=90)
    bad = defect(good)
    clean, found = distribution.evidence(good, blurred(good)), distribution.evidence(bad, blurred(bad))
    assert found[:, rows, cols].mean() > clean.amax((1, 2)).mean()
    assert found[:, 57:].mean() < found[:, rows, cols].mean() / 1.5  # and less beyond the reach of the coarse pieces


def test_a_tint_stands_out_and_a_usual_shade_does_not(distribution):
    """Grey photos of many shades: another shade is usual, the same change in colour has never been seen."""
    good = striped(40, seed=90)
    change = 0.08 * torch.ones(3, 1, 1)
    away, odd = good + change, good + change * torch.tensor([1.0, -1.0, 0.0])[:, None, None]  # the same size in colour
    clean, shifted, tinted = (distribution.evidence(each, blurred(each)).mean() for each in (good, away, odd))
    assert shifted - clean < 0.2 * (tinted - clean)


def test_good_images_lie_at_about_one(distribution):
    good = striped(10, seed=90)
    shapes = [(64, 20), (64, 30), (16, 20), (16, 30), (4, 20), (4, 30)]  # 8 components, two colours; at both scales
    assert [part.mean.shape for part in distribution.parts] == 2 * shapes
    evidence = distribution.evidence(good, blurred(good))
    assert evidence.shape == (10, 64, 64)
    assert evidence.mean() == pytest.approx(12 * np.log(2), rel=0.4)  # of two scales, three grids, two descriptions


def test_a_faint_change_of_a_large_region_is_seen_by_the_large_cells():
    """Each small cell is within what it does in good photos; that all do so together is not."""
    photos, held_out = noise(60, 1, 64, 64), noise(12, 1, 64, 64, seed=5)

    def contrast(*cell_sizes: int) -> float:
        describe = described(photos, distribution_scales=(1,), num_filters=4, cell_sizes=cell_sizes)
        good = GoodPatches(describe, describe(photos, photos), num_modes=0, places="own")
        distribution = good.fitted(describe(held_out, held_out))
        good = noise(30, 1, 64, 64, seed=9)
        bad = good.clone()
        bad[..., :32] = 0.5 + 0.9 * (bad[..., :32] - 0.5)  # a little fainter
        clean, found = (distribution.evidence(each, each)[..., :32].mean((1, 2)) for each in (good, bad))
        return float((found.mean() - clean.mean()) / clean.std())

    assert contrast(8, 32) > 2 * abs(contrast(8))


def test_the_evidence_of_a_large_cell_lies_where_its_small_cells_have_theirs():
    small = torch.full((1, 1, 8, 8), 3.0)
    large = torch.tensor([[5.0, 5.0], [5.0, 5.0]])[None, None]
    assert torch.allclose(_in_parts(large, small, usual=3.0), torch.full_like(small, 5.0))  # nothing to choose by
    small[0, 0, 2, 1] = 60.0
    parts = _in_parts(large, small, usual=3.0)
    assert parts[0, 0, 2, 1] > 20
    others = parts[0, 0, :4, :4].flatten()[torch.arange(16) != 9]
    assert others.max() < 5
    assert parts[0, 0, 4:, 4:].mean() == pytest.approx(5, rel=0.15)  # the other large cells keep theirs


def test_small_cells_that_are_not_described_have_no_part_in_the_division():
    """Outside a region stand copies of the nearest cell inside: they are no further evidence."""
    small = torch.full((1, 1, 8, 8), 3.0)
    small[..., 2, 1] = 60.0  # at the region's border, with a copy beside it
    inside = small.clone()
    small[..., 2, 0] = 60.0
    described = torch.ones(1, 1, 8, 8)
    described[..., 0] = 0
    large = torch.full((1, 1, 2, 2), 5.0)
    copied, found = _in_parts(large, small, usual=3.0), _in_parts(large, small, 3.0, described)
    alone = _in_parts(large, inside, usual=3.0)
    assert copied[..., 2, 1] < 0.8 * alone[..., 2, 1]
    assert found[..., 2, 1] == pytest.approx(float(alone[..., 2, 1]), rel=0.2)
    nowhere = _in_parts(large, small, 3.0, described * (torch.arange(8) > 3))  # none in the large cells on the left
    assert nowhere.isfinite().all()
    assert torch.allclose(nowhere[..., :2], copied[..., :2])


def test_the_division_inside_a_region_counts_described_cells_alone():
    """`evidence` hands the mask of the smallest cells on: with all counted, a rim cell would get another share."""
    photos, held_out = striped(40), striped(12, seed=50)
    inside = torch.ones(64, 64, dtype=torch.bool)
    inside[:, :20] = False
    region = Region(inside, (to_unit(photos).mean(0) * 255).to(torch.uint8))
    describe = PatchFeatures.of(photos, scoring=replace(ScoringConfig(), num_filters=4), seed=0, region=region)
    good = GoodPatches(describe, describe(photos, None), num_modes=0, places="own")
    distribution = good.fitted(describe(held_out, None))
    photo = striped(1, seed=90)
    photo[..., 20:32, 24:30] = 1.0
    features = describe(photo, None)
    found = distribution.evidence_of(features, (8, 8))
    small, large = (torch.zeros(1, 1, *grid) for grid in describe.grids)
    assert describe.cells is not None
    for index, (part, each) in enumerate(zip(distribution.parts, features, strict=True)):
        grid = (index // 2) % 2
        evidence = part.distances(each).log1p().T[:, describe.cells[grid].nearest].unflatten(1, describe.grids[grid])
        (small, large)[grid][0] += evidence
    mask = describe.cells[0].mask(describe.grids[0])
    usual = float(np.log(2)) * 4
    assert torch.allclose(found, (small + _in_parts(large, small, usual, mask))[:, 0], atol=1e-4)
    assert not torch.allclose(found, (small + _in_parts(large, small, usual))[:, 0], atol=1e-2)


def test_what_is_smaller_than_a_cell_shows_where_it_is(distribution):
    """A faint speck of 2 px, in a corner of its cell of 8 px, as the cells alone see it and with the pixels."""
    good = striped(8, seed=70)
    photos = good.clone()
    photos[..., 16:18, 16:18] += 0.1
    of_cells, of_all = (
        (each.evidence(photos, blurred(good)) - each.evidence(good, blurred(good))).mean(0)
        for each in (replace(distribution, fine=None), distribution))
    assert of_all[17, 17] / of_all[22, 22] > 1.2 * of_cells[17, 17] / of_cells[22, 22]
    assert torch.allclose(of_all[32:], of_cells[32:], atol=1e-4)


@pytest.mark.parametrize("left", [24, 25])
def test_a_speck_at_the_border_of_a_region_has_the_evidence_of_one_inside(left):
    """By pixels, whose own evidence is neither averaged with what lies outside nor enlarged into it."""
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[:, left:] = True
    region = Region(inside, torch.full((3, 64, 64), 128, dtype=torch.uint8))
    scoring = replace(ScoringConfig(), num_filters=4)
    good, held_out, photos = (region.shown(striped(count, seed=seed)) for count, seed in ((40, 0), (12, 50), (8, 70)))
    describe = PatchFeatures.of(good, scoring=scoring, seed=0, region=region)

    def features(images: torch.Tensor) -> list[torch.Tensor]:
        return describe(images, region.shown(blurred(images)))

    distribution = GoodPatches(describe, features(good), num_modes=4, places="own").fitted(features(held_out))

    def by_pixels(column: int) -> float:
        found = photos.clone()
        found[..., 30:34, column : column + 4] += 0.12
        repaired = region.shown(blurred(photos))
        of_all, of_cells = (each.evidence(found, repaired)
                            for each in (distribution, replace(distribution, fine=None)))
        return float((of_all - of_cells)[:, 31:33, column].mean())  # of its left side

    assert by_pixels(44) > 1
    assert by_pixels(left) > 0.9 * by_pixels(44)


def test_pixels_are_left_out_where_they_are_not_asked_for(distribution):
    cells = fitted(striped(60), striped(12, seed=50), cell_sizes=(8, 16, 32), pixel_evidence=False)
    photos = striped(4, seed=70)
    assert cells.fine is None
    assert torch.equal(cells.evidence(photos, blurred(photos)),
                       replace(distribution, fine=None).evidence(photos, blurred(photos)))


def test_photos_alone_have_no_pixels_of_their_own():
    photos = striped(12)
    describe = described(photos, num_filters=4)
    alone = GoodPatches(describe, describe(photos, None), num_modes=4, places="own").fitted(describe(photos, None))
    assert alone.fine is None
    assert alone.evidence(photos, None).shape == (12, 64, 64)


def test_a_large_defect_does_not_pass_for_a_change_of_the_whole_image():
    """Photos of many exposures, and some of which three eighths are dark: that is no exposure, and the rest of the
    photo, which would be odd at a darker one, gets less of the blame than by least squares.
    """
    def exposed(count: int, seed: int) -> torch.Tensor:
        return striped(count, seed=seed) * (0.3 + 0.7 * noise(count, 1, 1, 1, seed=seed + 7))

    distribution = fitted(exposed(80, 0), exposed(16, 50), num_modes=4)
    bad = striped(20, seed=30)
    bad[..., 40:] *= 0.4
    features = distribution.describe(bad, blurred(bad))[0]
    part = distribution.parts[0]
    plain = part.squares(_without(part.modes, (features - part.mean[..., None]) / part.std[:, None]))
    outside = (torch.arange(64) % 8 < 5)[:, None]  # of 8 x 8 cells those beside the dark columns

    def blame(distances: torch.Tensor) -> float:
        return float((distances * outside).sum() / distances.sum())

    assert blame(part.distances(features)) < 0.95 * blame(plain)


def test_a_strong_defect_of_a_small_place_hardly_moves_a_large_cell():
    """Four times as strong a dot moves the large cell's mean logarithm by no more than its own small cell's share."""
    photos = striped(1)
    describe = described(striped(20), distribution_scales=(1,), cell_sizes=(8, 32))
    clean = describe(photos, None)
    dotted = photos.clone()
    dotted[..., 34:38, 34:38] += 0.4
    small, _, large, _ = [(found - before).abs().amax((0, 2)).max() for found, before in
                          zip(describe(dotted, None), clean, strict=True)]
    assert large < small * 9 / 16  # a piece of 8 px reaches into at most nine of the 16 small cells


def test_what_is_repaired_almost_as_it_was_is_told_to_rounding():
    """White paper, of which a network changes a thousandth: as the difference of two large responses it would drown in
    their rounding, another on each backend.
    """
    photos = (1 - 1e-3 * noise(4, 3, 64, 64)).float()
    repaired = photos - 1e-3 * noise(4, 3, 64, 64, seed=1)
    describe = described(striped(30), num_filters=8)
    exact = replace(describe, filters=tuple(each.double() for each in describe.filters))
    both = zip(describe(photos, repaired)[:-1:2], exact(photos.double(), repaired.double())[:-1:2], strict=True)
    for found, expected in both:  # the first description of each: the photo's energies, then those of the change
        of_change = slice(found.shape[1] // 2, None)
        assert float((found - expected)[:, of_change].abs().max()) < 3e-6


def test_light_that_changes_everywhere_is_no_defect():
    """Photos of many exposures: a dark one is usual, and a faint scratch stands out in it, for a place that is bright
    in a dark photo is unusual. Without modes each place is judged alone, and may be as bright as in any photo.
    """
    def exposed(count: int, seed: int) -> torch.Tensor:
        return striped(count, seed=seed) * (0.3 + 0.7 * noise(count, 1, 1, 1, seed=seed + 7))

    def contrast(num_modes: int) -> float:
        distribution = fitted(exposed(80, 0), exposed(16, 50), num_modes=num_modes)
        good, dark = exposed(30, 90), 0.3 * striped(10, seed=30)
        bad = dark.clone()
        bad[..., 24:26, 8:40] += 0.04  # fainter than what the exposures differ by
        clean, found = (distribution.evidence(each, blurred(each)).amax((1, 2)) for each in (good, bad))
        return float((found.mean() - clean.mean()) / clean.std())

    assert contrast(16) > 1.2 * contrast(0)


def test_moments_are_numpys():
    features = noise(3, 5, 40).square()
    mean, std, modes, found = _moments(features, 2)
    numbers = features.double().numpy()
    away = numbers - numbers.mean(2, keepdims=True)
    np.testing.assert_allclose(mean, numbers.mean(2), rtol=1e-5)
    np.testing.assert_allclose(std, np.sqrt(away.var(2, ddof=1).mean(0) + 1e-4), rtol=1e-5)
    flat = (away / std.numpy()[:, None]).reshape(15, 40)
    left = np.linalg.svd(flat)[0][:, :2]
    np.testing.assert_allclose(np.abs(modes.flatten(0, 1).double().numpy().T @ left), np.eye(2)[::-1], atol=1e-4)
    rest = (flat - left @ left.T @ flat).reshape(3, 5, 40)
    np.testing.assert_allclose(found, rest, rtol=1e-3, atol=1e-4)


def test_few_images_have_no_modes():
    photos = noise(7, 1, 16, 16)
    assert fitted(photos, photos[:3]).parts[0].modes.shape[2] == 0


def test_the_likeliest_shrinkage_whitens():
    """Against inverting every shrunk covariance and taking the density of a Gaussian from scipy."""
    away = noise(4, 6, 30, seed=1) @ noise(30, 30, seed=2)
    away = away - away.mean(2, keepdim=True)
    covariance = away @ away.transpose(1, 2) / 29
    unseen = away[..., :9] + noise(4, 6, 9, seed=3)
    shared = covariance.mean(0)
    floor = (0.01 * shared.diagonal() + 1e-4).diag()
    shrunk = [((1 - share) * covariance + share * shared + floor).double() for share in SHRINKAGES]
    likelihoods = [sum(multivariate_normal(cov=each[cell].numpy()).logpdf(unseen[cell].T.numpy()).sum()
                       for cell in range(4)) for each in shrunk]
    found, log_volume = _whitening(covariance, unseen)
    found = found.double()
    assert log_volume == pytest.approx(float(torch.linalg.slogdet(found)[1].mean()), abs=1e-4)
    torch.testing.assert_close((found.transpose(1, 2) @ found).inverse(), shrunk[int(np.argmax(likelihoods))],
                               rtol=1e-3, atol=1e-4)


def test_few_images_share_their_covariance_and_many_need_not():
    """Photos that are alike at all places: with few of them the places' own covariances are mere noise."""
    def difference(count: int) -> float:
        photos, held_out = noise(count, 1, 64, 64), noise(20, 1, 64, 64, seed=9)
        describe = described(photos, distribution_scales=(1,), cell_sizes=(8,), num_filters=4)
        good = GoodPatches(describe, describe(photos, photos), num_modes=0, places="own")
        found = good.fitted(describe(held_out, held_out)).parts[0].whitening
        inverse = found.transpose(1, 2) @ found
        return float(inverse.std(0).mean() / inverse.abs().mean())  # how much places differ

    assert difference(6) < difference(400)


@pytest.mark.parametrize("photos", [
    torch.zeros(4, 3, 32, 32), torch.ones(4, 1, 32, 32), torch.full((2, 1, 16, 48), 0.5), noise(3, 5, 8, 8),
    (255 * noise(4, 3, 33, 17)).byte(), noise(4, 1, 72, 56),  # the last: 9 x 7 and 2 x 2 cells
])  # fmt: skip
@pytest.mark.parametrize("places", ["auto", "own", "shared"])
def test_flat_tiny_and_odd_photos_give_finite_evidence(photos, places):
    unit = to_unit(photos)
    describe = described(photos, num_filters=16)
    good = GoodPatches(describe, describe(unit, unit), num_modes=16, places=places)
    found = good.fitted(describe(unit[:1], unit[:1]))
    evidence = found.evidence(1 - unit, unit)
    assert evidence.shape == (len(unit), *unit.shape[-2:])
    assert evidence.isfinite().all()


def test_without_a_region_pieces_are_drawn_from_everywhere():
    """The same draws as ever, so that a training is the same."""
    photo = noise(1, 3, 20, 30)
    found = _random_pieces(photo, 5, torch.Generator().manual_seed(3), None)
    generator = torch.Generator().manual_seed(3)
    rows, cols = (torch.randint(side - 7, (5,), generator=generator) for side in (20, 30))
    for piece, row, col in zip(found, rows, cols, strict=True):
        assert torch.equal(piece, photo[0, :, row : row + 8, col : col + 8])


def test_a_grid_has_a_cell_at_least():
    assert cell_grids((3, 5), (8, 1)) == ((3, 5),)
    assert cell_grids((3, 5), (8,)) == ((1, 1),)
    assert cell_grids((64, 512), (8, 64)) == ((8, 64), (1, 8))
    assert cell_grids((30, 50), (16, 8)) == ((4, 6), (2, 3))  # the smallest cells first
