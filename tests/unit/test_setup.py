"""The setup: what moves the whole picture raises the alarm, and says so; what sits in one place does not."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from intra.inspection.setup import LEAST_GOOD, Setup, _laid_back, _places, _warped, measurements

SIDE = 96


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def part() -> torch.Tensor:
    """A photo in [0, 1]: a coloured board with parts of all sizes on it."""
    picture = 0.15 + 0.5 * F.interpolate(noise(1, 3, 9, 9, seed=1), (SIDE, SIDE), mode="bicubic")[0].clamp(0, 1)
    picture[:, 20:60, 30:44] = torch.tensor([0.8, 0.5, 0.2])[:, None, None]
    picture[:, 64:80, 12:80:6] = 0.05
    return picture.clamp(0, 1)


def moved(photo: torch.Tensor, *, down: float = 0, angle: float = 0, zoom: float = 1) -> torch.Tensor:
    """The photo as a camera sees it that was moved: px, rad, factor."""
    turn = torch.tensor([[1, angle, 0.0], [-angle, 1, -2 * down / SIDE]]) / zoom
    where = F.affine_grid(turn[None], [1, 3, SIDE, SIDE], align_corners=False)
    return F.grid_sample(photo[None], where, padding_mode="border", align_corners=False)[0]


def good(count: int, *, seed: int) -> torch.Tensor:
    """Photos of the part, each a little brighter or darker, moved, and noisy."""
    draws = 2 * noise(count, 2, seed=seed) - 1
    noisy = 0.02 * (noise(count, 3, SIDE, SIDE, seed=seed + 1) - 0.5)
    photos = [moved(part(), down=float(0.3 * draws[i, 0])) * (1 + 0.02 * draws[i, 1]) for i in range(count)]
    return (torch.stack(photos) + noisy).clamp(0, 1)


@pytest.fixture(scope="module")
def setup() -> Setup:
    return Setup.of(good(40, seed=0))


def blurred(photo: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(photo[None], 3, stride=1, padding=1, count_include_pad=False)[0]


@pytest.mark.parametrize(("change", "reason"), [
    (lambda photo: photo**0.6, "brighter"), (lambda photo: photo**1.6, "darker"),
    (lambda photo: photo * torch.tensor([1.2, 1, 0.8])[:, None, None], "another colour"), (blurred, "blurred"),
    (lambda photo: moved(photo, down=4), "shifted"), (lambda photo: moved(photo, angle=0.1), "turned"),
    (lambda photo: moved(photo, zoom=1.08), "nearer"), (lambda photo: moved(photo, zoom=0.93), "farther"),
])  # fmt: skip
def test_a_change_of_the_whole_picture_raises_the_alarm_by_name(
    setup: Setup, change: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    checks = setup.check(torch.stack([change(photo).clamp(0, 1) for photo in good(6, seed=9)]))
    assert all(check.alarm for check in checks)
    assert [check.reason for check in checks].count(reason) >= 5


def test_new_good_photos_do_not(setup: Setup) -> None:
    checks = setup.check(good(30, seed=90))
    assert sum(check.alarm for check in checks) <= 2
    assert all(check.reason == "" for check in checks if not check.alarm)
    assert min(check.p_value for check in checks) >= 1 / 41


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_defect_in_one_place_does_not(setup: Setup, value: float) -> None:
    """A tenth of the picture black, or white."""
    bad = good(10, seed=90)
    bad[..., 5:35, 50:80] = value
    assert sum(check.alarm for check in setup.check(bad)) <= 1


def test_parts_of_two_kinds_hide_no_small_shift() -> None:
    one, other = good(30, seed=0), (1.15 * good(12, seed=3)).clamp(0, 1)
    setup = Setup.of(torch.cat([one, other]))
    assert setup.threshold == 3
    checks = setup.check(torch.cat([good(6, seed=9), 1.15 * good(6, seed=11)]).clamp(0, 1))
    assert [check.reason for check in checks] == [""] * 12
    checks = setup.check(torch.stack([moved(photo, down=1.5) for photo in good(6, seed=9)]))
    assert [check.reason for check in checks] == ["shifted"] * 6


def test_the_pose_by_hand() -> None:
    mean = F.adaptive_avg_pool2d(part(), 64)
    photos = torch.stack([moved(part(), down=5), moved(part(), angle=0.08), moved(part(), zoom=1.05), part() ** 0.7])
    found = measurements(photos, mean)[:, -4:]  # down and right in sides, log of scale, rad
    expected = torch.tensor([[5 / SIDE, 0, 0, 0], [0, 0, 0, 0.08], [0, 0, 0.049, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(found.abs(), expected.abs(), atol=0.012, rtol=0)


def test_a_moved_photo_is_laid_as_good_ones_lie(setup: Setup) -> None:
    usual = part()
    moves = torch.stack([moved(usual, down=3), moved(usual, angle=0.04), moved(usual, zoom=1.04), usual,
                         moved(usual, down=12)])
    laid, reasons = setup.laid(moves)
    assert reasons == ["shifted", "turned", "nearer", "", ""]
    inner = (slice(None), slice(8, -8), slice(8, -8))
    for one, given in zip(laid[:3], moves[:3], strict=True):
        assert (one - usual)[inner].abs().mean() < 0.4 * (given - usual)[inner].abs().mean()


@pytest.mark.parametrize("shape", [(3, 96, 192), (1, 192, 80)])
def test_laying_back_undoes_a_pose(shape: tuple[int, int, int]) -> None:
    coarse = noise(1, shape[0], 5, 5, seed=2)
    smooth = F.interpolate(coarse, shape[1:], mode="bicubic", align_corners=True)[0].clamp(0, 1)
    pose = torch.tensor([[0.03, -0.02, 0.04, -0.05], [-0.02, 0.03, -0.03, 0.04]])
    back = _laid_back(_warped(smooth, _places(smooth), pose), pose)
    assert (_warped(smooth, _places(smooth), pose) - smooth)[:, :, 16:-16, 16:-16].abs().max() > 0.05
    assert (back - smooth)[:, :, 16:-16, 16:-16].abs().max() < 0.01


def test_a_photo_is_scored_by_the_others() -> None:
    """One odd photo among the good ones stands out: it has no say in what it is held against."""
    photos = good(24, seed=0)
    photos[7] = photos[7] ** 0.5
    scores = torch.tensor(Setup.of(photos).scores)
    assert scores.argmax() == 7
    assert scores[7] > 3 * scores.sort().values[-2]


def test_two_sets_are_one() -> None:
    """As training holds them: the photos that it was trained on, and those held out."""
    photos = good(27, seed=0)
    one, other = Setup.of(photos), Setup.of(photos[:13], photos[13:])
    for part in ("mean", "centre", "spread"):
        torch.testing.assert_close(getattr(one, part), getattr(other, part))
    assert one.scores == pytest.approx(other.scores, rel=1e-3)


def test_of_many_photos_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly spaced over all sets, of which one may have none."""
    photos = good(43, seed=0)
    monkeypatch.setattr("intra.inspection.setup.MOST_GOOD", 15)
    found = Setup.of(photos[:13], photos[13:14], photos[14:])
    expected = Setup.of(photos[::3])
    assert len(found.scores) == 15
    for part in ("mean", "centre", "spread"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part))


def test_uint8_is_float(setup: Setup) -> None:
    photos = good(LEAST_GOOD, seed=3)
    one, other = Setup.of((255 * photos).round().byte()), Setup.of((255 * photos).round() / 255)
    torch.testing.assert_close(one.centre, other.centre)
    with pytest.raises(ValueError, match="at least"):
        Setup.of(photos[:9])
    assert setup.fits((SIDE, SIDE), 3)
    assert not setup.fits((SIDE, 2 * SIDE), 3)
    assert not setup.fits((SIDE, SIDE), 1)
    assert not dataclasses.replace(setup, centre=setup.centre[1:], spread=setup.spread[1:]).fits((SIDE, SIDE), 3)


@pytest.mark.parametrize("photos", [
    torch.zeros(12, 1, 32, 48), torch.ones(12, 3, 16, 16), noise(12, 5, 9, 70), noise(12, 1, 1, 1),
    (255 * noise(12, 3, 33, 17)).byte(),
])  # fmt: skip
def test_flat_tiny_and_odd_photos_give_finite_scores(photos: torch.Tensor) -> None:
    setup = Setup.of(photos)
    assert all(torch.isfinite(torch.tensor(setup.scores)))
    checks = setup.check(1 - noise(*photos.shape, seed=8))
    assert len(checks) == 12
    assert all(torch.isfinite(torch.tensor([check.score for check in checks])))
