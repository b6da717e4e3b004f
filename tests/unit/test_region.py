"""Which pixels and cells belong to a region, and what stands for the others."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from intra.config import ScoringConfig
from intra.data.images import box_slices
from intra.data.roi import roi_box, save_roi
from intra.errors import InTraError
from intra.inspection.anomaly import Reference, anomaly_map, tails_of
from intra.inspection.calibration import calibrate
from intra.inspection.features import PatchFeatures
from intra.inspection.region import Region

SCORING = ScoringConfig(deviation="none", reference="validation", distribution_weight=1.0)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def region() -> Region:
    """Of 32 x 32 px, without the upper left quarter."""
    mask = np.ones((64, 64), dtype=bool)
    mask[:32, :32] = False
    return Region.of(mask, torch.full((3, 32, 32), 0.2))


def test_a_pixel_is_inside_by_more_than_half():
    mask = np.array([[True, True, False, False], [True, True, True, False], [False] * 4, [False, False, True, True]])
    assert Region.of(mask, torch.zeros(1, 2, 2)).inside.tolist() == [[True, False], [False, False]]
    with pytest.raises(InTraError, match="no pixel of the image of 1x1 px"):
        Region.of(mask, torch.zeros(1, 1, 1))


def test_the_fill_stands_outside_in_every_dtype(region):
    images = rand(2, 3, 32, 32)
    found = region.shown(images)
    assert torch.equal(found[..., 16:], images[..., 16:])
    assert torch.equal(found[..., :16, :16], torch.full((2, 3, 16, 16), 51) / 255)
    whole = region.shown((images * 255).to(torch.uint8))
    assert whole.dtype == torch.uint8
    assert (whole[..., :16, :16] == 51).all()


def test_cells_outside_are_left_out_and_are_as_the_nearest(region):
    cells = region.cells((4, 4))
    assert cells.kept.tolist() == [2, 3, 6, 7, *range(8, 16)]
    assert cells.kept[cells.nearest].tolist()[2:4] == [2, 3]
    assert cells.kept[cells.nearest].tolist()[8:] == list(range(8, 16))
    assert cells.kept[cells.nearest].tolist()[5] in (6, 9)
    assert region.cells((1, 1)).nearest.tolist() == [0]


def test_features_are_those_of_the_kept_cells(region):
    scoring = ScoringConfig(distribution_scales=(1, 2), cell_sizes=(8, 16), num_filters=3)
    photos, repaired = rand(4, 3, 32, 32), rand(4, 3, 32, 32).flip(0)
    some = PatchFeatures.of(photos, scoring=scoring, seed=0, region=region)
    every = replace(some, cells=None)
    grids = 2 * [(4, 4), (4, 4), (2, 2), (2, 2)]  # each described twice
    (*of_some, some_pixels), (*of_every, every_pixel) = some(photos, repaired), every(photos, repaired)
    for one, other, grid in zip(of_some, of_every, grids, strict=True):
        assert torch.equal(one, other[region.cells(grid).kept])
    assert torch.equal(some_pixels, every_pixel)  # described everywhere


@pytest.mark.parametrize("scale", [1, 2])
def test_the_filters_are_learnt_inside(region, scale):
    """From pieces of 8 px whose centre is inside: they do not reach further out than 4 reduced px."""
    photos = rand(4, 3, 32, 32)
    scoring = ScoringConfig(distribution_scales=(scale,), num_filters=5)
    wild = photos.clone()
    wild[..., : 16 - 4 * scale, : 16 - 4 * scale] = rand(1, 3, 1, 1)
    one, other = (PatchFeatures.of(each, scoring=scoring, seed=0, region=region).filters[0] for each in (photos, wild))
    assert torch.equal(one, other)
    everywhere = PatchFeatures.of(photos, scoring=scoring, seed=0).filters[0]
    assert not torch.equal(one, everywhere)


@pytest.mark.parametrize("place", [
    (slice(0, 2), slice(None)), (slice(None), slice(31, 32)), (slice(5, 6), slice(9, 10)),
])  # fmt: skip
def test_a_region_too_narrow_for_a_piece_has_filters_of_what_touches_it(place):
    photos = torch.full((4, 1, 32, 32), 0.5)
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[place] = True
    photos[..., inside] = rand(4, 1, int(inside.sum()))
    region = Region(inside, torch.zeros(1, 32, 32, dtype=torch.uint8))
    filters = PatchFeatures.of(photos, scoring=ScoringConfig(), seed=0, region=region).filters
    assert all(each.isfinite().all() for each in filters)
    assert filters[0].abs().max() > 1  # it saw more than the grey


def test_the_map_and_all_that_is_learnt_for_it_are_of_the_inside(region):
    evidence = rand(6, 2, 32, 32)
    wild = evidence.clone()
    wild[..., ~region.inside] = 1e3
    kinds = ("difference", "segmenter")
    (reference, scores), (other, others) = (calibrate(each, None, kinds=kinds, scoring=SCORING, inside=region.inside)
                                            for each in (evidence, wild))
    assert scores == others
    assert torch.equal(reference.tails, other.tails)
    found = anomaly_map(wild, other, kinds=kinds, scoring=SCORING, inside=region.inside)
    assert not found[:, ~region.inside].any()
    assert torch.equal(found[:, region.inside],
                       anomaly_map(evidence, reference, kinds=kinds, scoring=SCORING)[:, region.inside])
    spread, spread_of_wild = (Reference.of(each * rand(6, 1, 1, 1), spread=True, inside=region.inside).spread
                              for each in (evidence, wild))
    assert torch.equal(spread[region.inside], spread_of_wild[region.inside])
    assert not torch.equal(tails_of(wild, reference, kinds=kinds, scoring=SCORING), reference.tails)


@pytest.mark.parametrize("size", [(64, 48), (1000, 751), (7, 5)])
def test_a_box_cuts_the_same_out_of_a_mask_and_whole_px_out_of_any_photo(size):
    mask = np.zeros((64, 48), dtype=bool)
    mask[13:37, 5] = mask[20, 5:31] = True
    box = roi_box(mask)
    assert box_slices(mask.shape, box) == (slice(13, 37), slice(5, 31))
    rows, cols = box_slices(size, box)
    assert 0 <= rows.start < rows.stop <= size[0]
    assert 0 <= cols.start < cols.stop <= size[1]
    assert abs(rows.start - box[0] * size[0]) <= 0.5
    assert abs(cols.stop - box[3] * size[1]) <= 0.5


def test_the_thinnest_box_is_one_px():
    assert box_slices((10, 10), (0.999, 0.0, 1.0, 0.001)) == (slice(9, 10), slice(0, 1))


def test_a_full_disk_leaves_no_half_mask(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InTraError, match="cannot write"):
        save_roi(np.ones((3, 3), dtype=bool), tmp_path / "file" / "roi.png")
