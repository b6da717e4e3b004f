"""Every patch in its place, for any grid and any window."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from intra.geometry import (
    central_windows,
    covering_windows,
    flatten_patches,
    lattice_hidden,
    patchify,
    random_windows,
    touched_patches,
    unflatten_patches,
    unpatchify,
    window_origins,
)

grids = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(grid=grids, channels=st.integers(1, 5), patch_size=st.integers(1, 6))
def test_unpatchify_undoes_patchify(grid, channels, patch_size):
    images = torch.rand(2, channels, grid[0] * patch_size, grid[1] * patch_size)
    patches = patchify(images, patch_size)
    assert patches.shape == (2, grid[0] * grid[1], channels * patch_size**2)
    assert torch.equal(unpatchify(patches, grid, channels), images)


def test_a_patch_is_the_pixels_at_its_place():
    images = torch.rand(1, 3, 12, 20)
    patches = unflatten_patches(patchify(images, 4), channels=3)  # grid of 3 x 5
    row, col = 2, 3
    assert torch.equal(patches[0, row * 5 + col], images[0, :, row * 4 : row * 4 + 4, col * 4 : col * 4 + 4])


def test_unflatten_undoes_flatten():
    patches = torch.rand(5, 3, 4, 4)
    assert torch.equal(unflatten_patches(flatten_patches(patches), channels=3), patches)


@given(grid=grids, data=st.data())
def test_each_patch_is_hidden_once_in_its_most_central_window(grid, data):
    shape = data.draw(st.integers(1, grid[0])), data.draw(st.integers(1, grid[1]))
    positions, hidden = central_windows(grid, shape)
    assert torch.equal(positions[hidden], torch.arange(grid[0] * grid[1]))
    assert (hidden.sum(1) == 1).all()
    for patch, (first_row, first_col) in enumerate(window_origins(grid, shape).tolist()):
        row, col = divmod(patch, grid[1])
        for place, first, size, total in ((row, first_row, shape[0], grid[0]), (col, first_col, shape[1], grid[1])):
            assert 0 <= first <= total - size
            off_centre = abs(place - (first + size // 2))
            assert off_centre == min(abs(place - (f + size // 2)) for f in range(total - size + 1))


def test_window_origins_are_the_papers_formula():
    """Section 3.3 of the paper in its own indices, which start at 1; here for a square grid of N and a window of L."""
    n, window = 16, 7

    def paper(t: int) -> int:
        return max(1, min(t - window // 2, n - window + 1))

    expected = [[paper(t) - 1, paper(u) - 1] for t in range(1, n + 1) for u in range(1, n + 1)]
    assert window_origins((n, n), (window, window)).tolist() == expected


@given(grid=grids, spacing=st.integers(1, 14))
def test_a_lattice_hides_each_patch_once(grid, spacing):
    hidden = lattice_hidden(grid, spacing)
    assert (hidden.sum(0) == 1).all()
    assert hidden.any(1).all()
    assert len(hidden) == min(spacing, grid[0]) * min(spacing, grid[1])


@given(grid=grids)
def test_a_lattice_of_three_keeps_all_eight_neighbours(grid):
    for plane in lattice_hidden(grid, 3).unflatten(1, grid).float():
        around = torch.nn.functional.conv2d(plane[None, None], torch.ones(1, 1, 3, 3), padding=1)[0, 0]
        assert around[plane.bool()].eq(1).all()


@given(grid=grids, window=st.integers(1, 12), spacing=st.integers(1, 5))
def test_covering_windows_hide_each_patch_once(grid, window, spacing):
    for size in (None, min(window, *grid)):
        positions, hidden = covering_windows(grid, size, spacing)
        assert positions[hidden].sort().values.tolist() == list(range(grid[0] * grid[1]))


@given(grid=grids, window=st.integers(1, 12), spacing=st.integers(1, 5), seed=st.integers(0, 1000))
def test_only_wanted_patches_are_hidden_and_no_window_is_in_vain(grid, window, spacing, seed):
    wanted = torch.rand(grid[0] * grid[1], generator=torch.Generator().manual_seed(seed)) < 0.2
    for size in (None, min(window, *grid)):
        positions, hidden = covering_windows(grid, size, spacing, wanted)
        assert positions[hidden].sort().values.tolist() == wanted.nonzero()[:, 0].tolist()
        assert hidden.any(1).all()


@given(grid=grids, patch_size=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_patch_is_touched_by_any_of_its_pixels(grid, patch_size, seed):
    shape = grid[0] * patch_size, grid[1] * patch_size
    inside = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.1
    expected = patchify(inside[None, None].float(), patch_size)[0].any(1)
    assert touched_patches(inside, patch_size).tolist() == expected.tolist()


@given(grid=grids, count=st.integers(1, 20), seed=st.integers(0, 1000), data=st.data())
def test_random_windows_lie_in_the_grid(grid, count, seed, data):
    shape = data.draw(st.integers(1, grid[0])), data.draw(st.integers(1, grid[1]))
    least = data.draw(st.integers(1, shape[0] * shape[1]))
    most = data.draw(st.integers(least, shape[0] * shape[1]))
    origins, hidden = random_windows(count, grid=grid, window_shape=shape, num_hidden=(least, most),
                                     generator=torch.Generator().manual_seed(seed))
    assert ((hidden.sum(1) >= least) & (hidden.sum(1) <= most)).all()
    assert (origins >= 0).all()
    assert (origins + torch.tensor(shape) <= torch.tensor(grid)).all()


def test_random_windows_reach_every_place_alike():
    origins, hidden = random_windows(20_000, grid=(9, 8), window_shape=(7, 7), num_hidden=(1, 1),
                                     generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(origins[:, 0] * 2 + origins[:, 1], minlength=6)
    assert counts.float().div(20_000 / 6).sub(1).abs().max() < 0.06
    assert hidden.float().mean(0).mul(49).sub(1).abs().max() < 0.25


def test_wrong_shapes_are_refused():
    with pytest.raises(Exception, match=r"violates|type"):
        patchify(torch.rand(3, 8, 8), 4)
