"""Windows for training: the right pixels, every image equally often, drawn by (seed, step) alone."""

import pytest
import torch

from intra.geometry import patchify
from intra.training.sampler import IDENTITY, Symmetry, WindowSampler, allowed_symmetries, cut_windows, gather_windows

ALL = [Symmetry(bool(n & 4), bool(n & 2), bool(n & 1)) for n in range(8)]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def sampler(images: torch.Tensor, **changes) -> WindowSampler:
    settings = {"patch_size": 4, "window_shape": (3, 3), "num_hidden": (1, 1), "windows_per_image": 6, "batch_size": 8,
                "symmetries": (IDENTITY,), "seed": 0}
    return WindowSampler(images, **(settings | changes))


@pytest.mark.parametrize("cut", [cut_windows, gather_windows])
@pytest.mark.parametrize("symmetry", ALL, ids=str)
def test_a_window_is_cut_from_the_image_as_it_is_laid(symmetry, cut):
    images = rand(3, 2, 24, 24)
    which, origins = torch.tensor([2, 0, 1]), torch.tensor([[0, 3], [2, 1], [3, 3]])
    laid = torch.tensor([[symmetry.transpose, symmetry.flip_rows, symmetry.flip_cols]]).expand(3, -1)
    windows = cut(images, which, origins, laid, 4, (3, 3))
    for window, image, (row, col) in zip(windows, which, origins.tolist(), strict=True):
        expected = symmetry.apply(images[image])[:, row * 4 : row * 4 + 12, col * 4 : col * 4 + 12]
        assert torch.equal(window, expected)


@pytest.mark.parametrize("size", [(24, 24), (24, 20)])
def test_slices_and_gathered_pixels_are_the_same(size):
    """Of several symmetries in one batch, in 8 bits."""
    images = (rand(5, 3, *size) * 255).to(torch.uint8)
    allowed = [s for s in ALL if size[0] == size[1] or not s.transpose]
    laid = torch.tensor([[s.transpose, s.flip_rows, s.flip_cols] for s in allowed])
    which = torch.arange(len(laid)) % 5
    origins = torch.stack([torch.arange(len(laid)) % 4, torch.arange(len(laid)) % 3], 1)
    sliced, gathered = (cut(images, which, origins, laid, 4, (3, 2)) for cut in (cut_windows, gather_windows))
    assert sliced.shape == (len(laid), 3, 12, 8)
    assert torch.equal(sliced, gathered)


def test_symmetries_are_drawn_for_each_window():
    images = rand(1, 1, 24, 24)
    batch = sampler(images, symmetries=tuple(ALL), window_shape=(6, 6), batch_size=64).batch(0)
    laid = {tuple(patchify(s.apply(images), 4).flatten().tolist()) for s in ALL}
    seen = {tuple(window.flatten().tolist()) for window in batch.patches}
    assert seen == laid


def test_a_batch_holds_patches_of_the_images_at_their_positions():
    images = rand(5, 3, 24, 20)
    batch = sampler(images).batch(3)
    every = patchify(images, 4)
    for window, positions in zip(batch.patches, batch.positions, strict=True):
        assert any(torch.equal(window, every[image, positions]) for image in range(5))
    assert (batch.hidden.sum(1) == 1).all()


def test_uint8_images_come_out_in_zero_to_one():
    images = (rand(4, 1, 24, 24) * 255).byte()
    patches = sampler(images).batch(0).patches
    assert patches.dtype == torch.float32
    assert 0 <= patches.min() < 0.05
    assert 0.95 < patches.max() <= 1


def test_an_epoch_shows_each_image_equally_often():
    source = sampler(rand(8, 1, 24, 24), windows_per_image=6, batch_size=8)
    assert source.steps_per_epoch == 6
    for epoch in (0, 1):
        steps = range(epoch * 6, epoch * 6 + 6)
        counts = torch.bincount(torch.cat([source._which_images(step) for step in steps]), minlength=8)
        assert (counts == 6).all()


def test_a_draw_depends_on_seed_and_step_alone():
    images = rand(5, 3, 24, 24)
    one, other = sampler(images, symmetries=tuple(ALL)), sampler(images, symmetries=tuple(ALL))
    for step in (0, 1, 7, 100):
        one.batch(step)
    for field in ("patches", "positions", "hidden"):
        assert torch.equal(getattr(one.batch(42), field), getattr(other.batch(42), field))
    assert not torch.equal(one.batch(42).patches, one.batch(43).patches)
    again = sampler(images, symmetries=tuple(ALL), seed=1)
    for field in ("patches", "hidden"):
        assert not torch.equal(getattr(one.batch(42), field), getattr(again.batch(42), field))


def test_the_seed_for_the_network_differs_for_each_run_and_step():
    images = rand(5, 3, 24, 24)
    seeds = [sampler(images, seed=seed).batch(step).seed for seed in range(3) for step in range(20)]
    assert seeds[:20] == [sampler(images, seed=0).batch(step).seed for step in range(20)]
    draws = {float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in seeds}
    assert len(draws) == 60


def aligned(count: int = 40) -> torch.Tensor:
    """A part that lies the same way in each photo: bright at the top left."""
    part = torch.zeros(1, 1, 32, 32)
    part[..., 2:14, 4:12] = 0.8
    return (part + 0.05 * rand(count, 1, 32, 32)).clamp(0, 1)


def test_auto_lays_an_aligned_part_one_way_only():
    assert allowed_symmetries(aligned(), flips="auto", turns="auto") == (IDENTITY,)


def test_auto_finds_the_mirror_of_a_part():
    mirrored = aligned() + aligned().flip(-1)
    assert set(allowed_symmetries(mirrored, flips="auto", turns="auto")) == {IDENTITY, Symmetry(False, False, True)}


@pytest.mark.parametrize("count", [10, 60])
def test_auto_lays_a_texture_any_way(count):
    texture = rand(count, 1, 32, 32)
    assert set(allowed_symmetries(texture, flips="auto", turns="auto")) == set(ALL)
    assert len(allowed_symmetries(texture[..., :24], flips="auto", turns="auto")) == 4  # quarter turns need a square


def test_switches_overrule():
    assert len(allowed_symmetries(aligned(), flips="on", turns="on")) == 8
    assert len(allowed_symmetries(aligned(), flips="on", turns="off")) == 4
    assert set(allowed_symmetries(aligned(), flips="off", turns="on")) == {s for s in ALL if s.is_turn}
    assert allowed_symmetries(rand(60, 1, 32, 32), flips="off", turns="off") == (IDENTITY,)
