"""Synthetic defects, cut from the training images themselves, for the segmenter to find.

After CutPaste (Li et al., CVPR 2021) and NSA (Schlüter et al., ECCV 2022): a region of a good image is replaced by
something that does not belong there. Nothing comes from outside the training images but noise and plain colours.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from intra.similarity import box_blur

__all__ = ["plant_defects"]

CLEAN_SHARE = 0.15  # of the images that stay good
SECOND_SHARE = 0.3  # of the others that get a second defect
SMALLEST, LARGEST = 0.03, 0.45  # of the shorter side: extent of a defect, drawn log-uniformly
LEAST_CHANGE = 0.012  # of pixels in [0, 1], averaged over 5 x 5 px: a fainter change is no defect to be found
TILE = 24  # side of the random tile from which smooth noise is interpolated


class _Draw:
    """Plain numbers from a generator on the CPU, so that the same seed plants the same defects on any device."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def between(self, low: int | float, high: int | float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def log_between(self, low: int | float, high: int | float) -> float:
        return math.exp(self.between(math.log(low), math.log(high)))

    def below(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self.generator))

    def chance(self, share: float) -> bool:
        return self.between(0, 1) < share

    def vector(self, length: int, low: int | float, high: int | float) -> Float[Tensor, "length 1 1"]:
        return low + (high - low) * torch.rand(length, 1, 1, generator=self.generator)


def plant_defects(
    images: Float[Tensor, "b c h w"], *, generator: torch.Generator
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b h w"]]:
    """Copies of good images in [0, 1], most of them with a defect or two, and masks: 1 where a defect can be seen.

    What is pasted comes from the other images of the batch. The same generator state plants the same defects.
    """
    draw = _Draw(generator)
    photos, masks = images.clone(), images.new_zeros(images.shape[0], *images.shape[-2:])
    for index in range(len(images)):
        if draw.chance(CLEAN_SHARE):
            continue
        for _ in range(2 if draw.chance(SECOND_SHARE) else 1):
            donor = images[(index + 1 + draw.below(max(1, len(images) - 1))) % len(images)]
            photos[index], planted = _plant(photos[index], donor, draw)
            masks[index] = torch.maximum(masks[index], planted)
    return photos, masks


def _plant(
    image: Float[Tensor, "c h w"], donor: Float[Tensor, "c h w"], draw: _Draw
) -> tuple[Float[Tensor, "c h w"], Float[Tensor, "h w"]]:
    """One more defect: what fills it, how opaque it is and how soft its border is are drawn."""
    region, extent = _region(_size(image), draw, image.device)
    fill, least_opacity = _fill(image, donor, draw)
    soft = region.float()
    border = (1, 3, 5, 9)[draw.below(4)]
    if border > 1 and extent > border:
        soft = box_blur(box_blur(soft[None], border), border)[0]
    opacity = soft * draw.between(least_opacity, 1)
    photo = (image + opacity * (fill - image)).clamp(0, 1)
    change = (photo - image).abs().amax(0)
    return photo, (region & (box_blur(change[None], 5)[0] > LEAST_CHANGE)).float()


def _region(size: tuple[int, int], draw: _Draw, device: torch.device) -> tuple[Bool[Tensor, "h w"], float]:
    """Where a defect lies, and its extent in px: an ellipse, a rectangle, a ragged blot or a curved scratch."""
    height, width = size
    extent = min(size) * draw.log_between(SMALLEST, LARGEST)
    angle, stretch = draw.between(0, math.pi), draw.log_between(0.6, 1.65)
    row = torch.arange(height, device=device)[:, None] - draw.between(0, height)
    col = torch.arange(width, device=device)[None, :] - draw.between(0, width)
    along = row * math.cos(angle) + col * math.sin(angle)  # px from the centre
    across = col * math.cos(angle) - row * math.sin(angle)
    u, v = along / (extent / 2 * stretch), across / (extent / 2 / stretch)
    kind = draw.below(4)
    if kind == 0:
        return u**2 + v**2 < 1, extent
    if kind == 1:
        return (u.abs() < 1) & (v.abs() < 1), extent
    if kind == 2:
        ragged = _smooth_noise(1, size, max(4.0, extent / draw.between(2, 5)), draw, device)[0] > 0
        return (u**2 + v**2 < 1.6) & ragged, extent
    bend, half_width = draw.between(-0.6, 0.6), draw.between(0.8, 3.5) + 0.02 * extent
    length = 1.5 * extent
    return (along.abs() < length / 2) & ((across - bend * along**2 / length).abs() < half_width), extent


def _fill(
    image: Float[Tensor, "c h w"], donor: Float[Tensor, "c h w"], draw: _Draw
) -> tuple[Float[Tensor, "c #h #w"], float]:
    """A whole image of what a defect may show, and the least opacity at which it is seen."""
    fills: tuple[tuple[float, Callable[[], Tensor], float], ...] = (  # share, fill, least opacity
        (0.30, lambda: _pasted(donor, draw), 0.35),
        (0.15, lambda: _displaced(image, draw), 1.0),
        (0.12, lambda: _own_colour(image, draw), 0.35),
        (0.13, lambda: _any_texture(image, draw), 0.35),
        (0.10, lambda: box_blur(image, 5 + 2 * draw.below(13)), 1.0),
        (0.15, lambda: _shaded(image, draw), 0.35),
        (0.05, lambda: image + draw.between(0.05, 0.2) * _smooth_noise(
            len(image), _size(image), draw.between(1, 4), draw, image.device), 1.0),
    )
    shares = torch.tensor([share for share, _, _ in fills])
    _, fill, least_opacity = fills[int(shares.multinomial(1, generator=draw.generator))]
    return fill(), least_opacity


def _pasted(donor: Float[Tensor, "c h w"], draw: _Draw) -> Float[Tensor, "c h w"]:
    """Another place of another image, laid anyhow; half of the time in other colours."""
    height, width = donor.shape[-2:]
    turned = torch.roll(donor, (draw.below(height), draw.below(width)), (1, 2))
    flipped = [axis for axis in (1, 2) if draw.chance(0.5)]
    turned = turned.flip(flipped) if flipped else turned
    if height == width and draw.chance(0.5):
        turned = turned.transpose(1, 2)
    return _shaded(turned, draw) if draw.chance(0.5) else turned


def _displaced(image: Float[Tensor, "c h w"], draw: _Draw) -> Float[Tensor, "c h w"]:
    """The image itself, moved by 1.5 to 23 % of its shorter side."""
    angle, distance = draw.between(0, 2 * math.pi), draw.between(0.015, 0.23) * min(image.shape[-2:])
    return torch.roll(image, (round(distance * math.sin(angle)), round(distance * math.cos(angle))), (1, 2))


def _own_colour(image: Float[Tensor, "c h w"], draw: _Draw) -> Float[Tensor, "c 1 1"]:
    """The colour of one of its pixels."""
    row, col = draw.below(image.shape[-2]), draw.below(image.shape[-1])
    return image[:, row : row + 1, col : col + 1]


def _any_texture(image: Float[Tensor, "c h w"], draw: _Draw) -> Float[Tensor, "c h w"]:
    """Smooth noise of any colour and any fineness."""
    colour = draw.vector(len(image), 0, 1).to(image.device, non_blocking=True)
    noise = _smooth_noise(1, _size(image), draw.between(2, 16), draw, image.device)
    return (colour + draw.between(0.02, 0.25) * noise).clamp(0, 1)


def _shaded(image: Float[Tensor, "c h w"], draw: _Draw) -> Float[Tensor, "c h w"]:
    """The image brighter or darker, half of the time in another tint."""
    shaded = image * (1 + draw.between(0.08, 0.5) * (1 if draw.chance(0.5) else -1))
    if draw.chance(0.5):
        return shaded + draw.vector(len(image), -0.15, 0.15).to(image.device, non_blocking=True)
    return shaded


def _size(image: Float[Tensor, "c h w"]) -> tuple[int, int]:
    return image.shape[1], image.shape[2]


def _smooth_noise(
    channels: int, size: tuple[int, int], period_px: float, draw: _Draw, device: torch.device
) -> Float[Tensor, "c h w"]:
    """Noise of about unit variance that varies over `period_px`; a small random tile, mirrored beyond its border."""
    tile = torch.randn(1, channels, TILE, TILE, generator=draw.generator).to(device, non_blocking=True)
    offset = draw.between(0, TILE), draw.between(0, TILE)
    row, col = (((torch.arange(side, device=device) + 0.5) / period_px + start) * 2 / TILE - 1
                for side, start in zip(size, offset, strict=True))
    place = torch.stack([col[None, :].expand(size), row[:, None].expand(size)], dim=-1)[None]  # (1, H, W, 2)
    return F.grid_sample(tile, place, mode="bilinear", padding_mode="reflection", align_corners=False)[0]
