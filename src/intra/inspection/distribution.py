"""What good patches look like at each place: a Gaussian, and how far a photo lies from it.

The paper describes photo and repaired image at a place by one number, their difference, and takes off its mean over
good images. Here a short vector describes both, and its mean *and covariance* over good images are kept for every
place: which changes go together, and which never happen, is known from good images alone. A Gaussian of features at
each place is PaDiM's (Defard et al. 2021), there of a pretrained network's features; ours are principal components of
the photos themselves. docs/decisions/0009-distribution.md
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from intra.data.images import to_unit
from intra.similarity import reduced

__all__ = ["PatchDistribution", "PatchMoments", "ScaleDistribution", "cell_grid"]

PIECE_SIDE = 8  # px of the reduced photo: side of the pieces whose principal components are the filters
NUM_PIECES = 20_000  # from which they are computed
LARGEST_SAMPLE = 2**22  # values of all pieces together: of photos with many channels fewer pieces are taken
MOST_COLOURS = 8  # of photos with many channels
LEAST_STD = 1e-3  # of a filter's response, pixels in [0, 1]: below the noise of any camera
# Energies are in units of the response's standard deviation. Their logarithm makes too little stand out as much as too
# much: where a piece is missing or wiped, there is too little of everything.
ENERGY_FLOOR = 0.01
SHRINKAGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.7, 1.0)  # of a place's covariance towards the mean of all places'
DIAGONAL_SHARE = 0.01  # of the diagonal of that mean, added to every place's covariance
LEAST_VARIANCE = 1e-4  # of a feature, all about 1: for places where good images do not differ at all


@dataclass(frozen=True)
class ScaleDistribution:
    """At one scale. A cell has four features for each of m filters: the photo's response and the logarithm of its
    energy, the repaired image's response, and the logarithm of the energy of what it changes; without a repaired image
    the first two.
    """

    filters: Float[Tensor, "m c k k"]  # of unit standard deviation over good photos
    mean: Float[Tensor, "cells d"]
    whitening: Float[Tensor, "cells d d"]  # W; WᵀW is the inverse of the covariance

    @property
    def num_features(self) -> int:
        """D, of a cell with its repaired image."""
        return 4 * len(self.filters)

    def distances(self, features: Float[Tensor, "cells d b"]) -> Float[Tensor, "cells b"]:
        """The squared Mahalanobis distances, divided by D: about 1 for good images."""
        return (self.whitening @ (features - self.mean[..., None])).square().mean(1)


@dataclass(frozen=True)
class PatchDistribution:
    """At several scales, over the same grid of cells."""

    grid: tuple[int, int]  # rows and cols of cells
    scales: tuple[int, ...]  # factors by which the images are reduced
    parts: tuple[ScaleDistribution, ...]  # one for each scale

    def evidence(
        self, photos: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"] | None
    ) -> Float[Tensor, "b h w"]:
        """log(1 + distance) at each pixel, summed over the scales. Images in [0, 1]; repaired ones as for `add`."""
        features = [_features(photos, repaired, part.filters, scale, self.grid)
                    for scale, part in zip(self.scales, self.parts, strict=True)]
        return self.evidence_of(features, (photos.shape[-2], photos.shape[-1]))

    def evidence_of(self, features: Sequence[Float[Tensor, "cells d b"]], size: tuple[int, int]
                    ) -> Float[Tensor, "b h w"]:  # fmt: skip
        """The same from what `PatchMoments.features` made of images of that height and width."""
        total = sum(part.distances(each).log1p() for part, each in zip(self.parts, features, strict=True))
        assert isinstance(total, Tensor)
        maps = total.T.unflatten(1, self.grid)
        return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]

    def to(self, device: torch.device) -> "PatchDistribution":
        """The same on a device."""
        parts = (ScaleDistribution(part.filters.to(device), part.mean.to(device), part.whitening.to(device))
                 for part in self.parts)
        return PatchDistribution(self.grid, self.scales, tuple(parts))


class PatchMoments:
    """Gathers the features of good images, chunk by chunk; `fitted` turns them into their distribution.

    Args:
        photos: good images, uint8 or float in [0, 1], whose principal components become the filters.
        cell_size: px of the photo; the places of the distribution are cells of about that side.
    """

    def __init__(
        self, photos: Shaped[Tensor, "n c h w"], *, scales: tuple[int, ...], num_filters: int, cell_size: int, seed: int
    ) -> None:
        self.grid = cell_grid((photos.shape[-2], photos.shape[-1]), cell_size)
        self.scales = scales
        self.filters = [_principal_filters(photos, scale, num_filters, seed) for scale in scales]
        self._sums: list[_Sums | None] = [None] * len(scales)

    def empty(self) -> "PatchMoments":
        """The same filters and cells, without any image."""
        other = copy.copy(self)
        other._sums = [None] * len(self.scales)
        return other

    def add(self, photos: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"] | None) -> None:
        """Good images, with their repaired images, in [0, 1]; with None everywhere the photos alone are described."""
        self.add_features(self.features(photos, repaired))

    def features(
        self, photos: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"] | None
    ) -> list[Float[Tensor, "cells d b"]]:
        """What images are to the distribution, at each scale: for those that are used several times."""
        return [_features(photos, repaired, filters, scale, self.grid)
                for scale, filters in zip(self.scales, self.filters, strict=True)]

    def add_features(self, features: Sequence[Float[Tensor, "cells d b"]]) -> None:
        """Good images by their features."""
        for index, each in enumerate(features):
            self._sums[index] = sums = self._sums[index] or _Sums(each.mean(2, keepdim=True))
            sums.add(each)

    def merge(self, other: "PatchMoments") -> None:
        """Also what another one, made by `empty` of the same, has gathered."""
        for index, theirs in enumerate(other._sums):
            if theirs is not None:
                self._sums[index] = sums = self._sums[index] or theirs.empty()
                sums.merge(theirs)

    def fitted(self, held_out: Sequence[tuple[Tensor, Tensor | None]]) -> PatchDistribution:
        """The distribution, held against good images that were not trained on, chunks of photos and repaired images:
        they say how much more a feature spreads on new images, and by their likelihood how far each place's covariance
        shrinks towards that of all.
        """
        chunks = [self.features(*chunk) for chunk in held_out]
        return self.fitted_to([torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True)])

    def fitted_to(self, held_out: Sequence[Float[Tensor, "cells d b"]]) -> PatchDistribution:
        """The same, held against images by their features at each scale."""
        parts = []
        for filters, sums, unseen in zip(self.filters, self._sums, held_out, strict=True):
            assert sums is not None, "no image was added"
            mean, covariance = sums.moments()
            away = unseen - mean[..., None]
            spread = away.square().mean((0, 2)) / (covariance.diagonal(dim1=1, dim2=2).mean(0) + LEAST_VARIANCE)
            wider = spread.clamp(min=1).sqrt()  # what was trained on is repaired better than what is new
            covariance = covariance * wider[:, None] * wider
            _, whitening = min((_surprise_and_whitening(_shrunk(covariance, share), away) for share in SHRINKAGES),
                               key=lambda each: each[0])
            parts.append(ScaleDistribution(filters, mean, whitening))
        return PatchDistribution(self.grid, self.scales, tuple(parts))


class _Sums:
    """First and second moments of each cell's features about a point near their mean: far numbers cancel badly."""

    def __init__(self, shift: Float[Tensor, "cells d 1"]) -> None:
        self.shift = shift
        self.count = 0
        self.first = torch.zeros_like(shift)
        self.second = shift.new_zeros(*shift.shape[:2], shift.shape[1])

    def add(self, features: Float[Tensor, "cells d b"]) -> None:
        away = features - self.shift
        self.count += features.shape[2]
        self.first += away.sum(2, keepdim=True)
        self.second += away @ away.transpose(1, 2)

    def empty(self) -> "_Sums":
        return _Sums(self.shift)

    def merge(self, other: "_Sums") -> None:
        away = other.shift - self.shift  # theirs are sums about another point
        across = other.first @ away.transpose(1, 2)
        self.count += other.count
        self.first += other.first + other.count * away
        self.second += other.second + across + across.transpose(1, 2) + other.count * away @ away.transpose(1, 2)

    def moments(self) -> tuple[Float[Tensor, "cells d"], Float[Tensor, "cells d d"]]:
        mean = self.first / self.count
        covariance = (self.second - self.count * mean @ mean.transpose(1, 2)) / max(1, self.count - 1)
        return (mean + self.shift)[..., 0], covariance


def cell_grid(image_size: tuple[int, int], cell_size: int) -> tuple[int, int]:
    """Rows and cols of cells of about `cell_size` px that cover an image."""
    return max(1, round(image_size[0] / cell_size)), max(1, round(image_size[1] / cell_size))


def _surprise_and_whitening(
    covariance: Float[Tensor, "cells d d"], away: Float[Tensor, "cells d b"]
) -> tuple[float, Float[Tensor, "cells d d"]]:
    """The mean negative log-density of features, given as they lie from the mean, without its constant; the W of a
    ScaleDistribution.
    """
    root = torch.linalg.cholesky(covariance)
    whitening = torch.linalg.solve_triangular(root, torch.eye(root.shape[-1]).to(root).expand_as(root), upper=False)
    squares = (whitening @ away).square().sum(1).mean()
    return float(squares / 2 - whitening.diagonal(dim1=1, dim2=2).log().sum(1).mean()), whitening


def _shrunk(covariance: Float[Tensor, "cells d d"], shrinkage: float) -> Float[Tensor, "cells d d"]:
    shared = covariance.mean(0)
    floor = DIAGONAL_SHARE * shared.diagonal() + LEAST_VARIANCE
    return (1 - shrinkage) * covariance + shrinkage * shared + floor.diag()


def _features(
    photos: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"] | None, filters: Float[Tensor, "m c k k"],
    scale: int, grid: tuple[int, int],
) -> Float[Tensor, "cells d b"]:  # fmt: skip
    """The four features of each filter at each cell; two without a repaired image."""
    own = _responses(photos, filters, scale)
    parts = [_pooled(own, grid), _log_energy(own, grid)]
    if repaired is not None:
        others = _responses(repaired, filters, scale)
        parts += [_pooled(others, grid), _log_energy(own - others, grid)]
    return torch.cat(parts, dim=1).flatten(2).permute(2, 1, 0)


def _log_energy(responses: Float[Tensor, "b m h w"], grid: tuple[int, int]) -> Float[Tensor, "b m rows cols"]:
    return (_pooled(responses.abs(), grid) + ENERGY_FLOOR).log()


def _responses(
    images: Float[Tensor, "b c h w"], filters: Float[Tensor, "m c k k"], scale: int
) -> Float[Tensor, "b m h2 w2"]:
    before, after = (PIECE_SIDE - 1) // 2, PIECE_SIDE // 2
    with torch.autocast(images.device.type, enabled=False):  # whitening divides small differences by small spreads
        padded = F.pad(reduced(images, scale), (before, after, before, after), mode="replicate")
        return F.conv2d(padded, filters)


def _pooled(maps: Float[Tensor, "b m h w"], grid: tuple[int, int]) -> Float[Tensor, "b m rows cols"]:
    return F.adaptive_avg_pool2d(maps, grid)


def _principal_filters(
    photos: Shaped[Tensor, "n c h w"], scale: int, num_filters: int, seed: int
) -> Float[Tensor, "m c k k"]:
    """The first principal components of pieces of the photos, and of their mean colours all but the first, which is
    the brightness. Each is divided by the standard deviation along it.

    A colour that no good photo has is not among the components of the pieces, however visible it is.
    """
    generator = torch.Generator().manual_seed(seed)
    length = photos.shape[1] * PIECE_SIDE**2
    each = max(1, min(NUM_PIECES, LARGEST_SAMPLE // length) // len(photos) + 1)
    pieces = torch.cat([_random_pieces(reduced(to_unit(photo[None]), scale), each, generator) for photo in photos])
    colours = pieces.mean((2, 3), keepdim=True)
    tints = _components(colours)[1:MOST_COLOURS] / PIECE_SIDE**2  # of the mean over a piece
    return torch.cat([_components(pieces)[:num_filters], tints.expand(-1, -1, PIECE_SIDE, PIECE_SIDE)])


def _components(samples: Float[Tensor, "n c h w"]) -> Float[Tensor, "m c h w"]:
    """Principal components, the largest first, each divided by the standard deviation along it."""
    flat = samples.flatten(1)
    _, deviations, components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    std = deviations / len(flat) ** 0.5 + LEAST_STD
    return (components / std[:, None]).unflatten(1, samples.shape[1:])


def _random_pieces(
    photo: Float[Tensor, "1 c h w"], count: int, generator: torch.Generator
) -> Float[Tensor, "count c k k"]:
    room = [max(0, PIECE_SIDE - side) for side in photo.shape[-2:]]  # a reduced photo may be smaller than a piece
    photo = F.pad(photo, (0, room[1], 0, room[0]), mode="replicate")
    rows, cols = (torch.randint(side - PIECE_SIDE + 1, (count,), generator=generator) for side in photo.shape[-2:])
    return torch.stack([photo[0, :, row : row + PIECE_SIDE, col : col + PIECE_SIDE]
                        for row, col in zip(rows.tolist(), cols.tolist(), strict=True)])
