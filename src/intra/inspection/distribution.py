"""What good patches look like at each place: a Gaussian, and how far a photo lies from it.

The paper describes photo and repaired image at a place by one number, their difference, and takes off its mean over
good images. Here two short vectors say what the photo holds and how much of it the repaired image changes, and their
means *and covariances* over good images are kept for every place: which changes go together, and which never happen, is
known from good images alone. A Gaussian of features at each place is PaDiM's (Defard et al. 2021), there of a
pretrained network's features; ours are principal components of the photos themselves. What all places do together from
one good image to the next – light, exposure, contrast, pose – is taken off before: a place is judged given its image.
Where the photos show that a place has no look of its own, all places share one mixture (kinds.py).
Beside the cells stands how much each pixel is repaired (fine.py): what is smaller than a cell shows there.
docs/decisions/0009-distribution.md, 0013-modes.md, 0014-energies.md, 0016-large-regions.md, 0019-divided.md,
0021-fine.md, 0024-shared.md
"""

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from intra.inspection.features import FEATURES_OF_A_FILTER, PatchFeatures
from intra.inspection.fine import FineDistribution
from intra.inspection.kinds import CellKinds
from intra.settings import Places

__all__ = ["CellDistribution", "GoodPatches", "PatchDistribution"]

IMAGES_PER_MODE = 8  # at least
MOST_CELLS = 50_000  # from which the kinds of cells are learnt
ROBUST_STEPS = 2
TINY_SHARE = 1e-6  # below that of one cell in a grid
USUAL_EVIDENCE = math.log(2)  # log(1 + distance) of a good cell, whose distance is about 1
SHRINKAGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.7, 1.0)  # of a place's covariance towards the mean of all places'
DIAGONAL_SHARE = 0.01  # of the diagonal of that mean, added to every place's covariance
LEAST_VARIANCE = 1e-4  # of a feature, all about 1: for places where good images do not differ at all


@dataclass(frozen=True)
class CellDistribution:
    """The Gaussian of one description, of D features, at one scale over one grid."""

    mean: Float[Tensor, "cells d"]
    std: Float[Tensor, " d"]  # the unit of each feature
    modes: Float[Tensor, "cells d modes"]  # of unit length: how all cells change together from good image to image
    whitening: Float[Tensor, "cells d d"]  # W; WᵀW is the inverse of the covariance of what the modes leave
    kinds: CellKinds | None = None  # what a cell, without the modes, is held against instead; None: that Gaussian

    def distances(self, features: Float[Tensor, "cells d b"]) -> Float[Tensor, "cells b"]:
        """The squared Mahalanobis distances, divided by D: about 1 for good images. From the Gaussian of the cell's
        place, or from the nearest that all places share.

        How far the image goes along the modes is found by robust regression, for a large defect would pass for one of
        them: a cell of distance d counts 1/d (Huber's weight), by steepest descent, as the modes are orthonormal.
        """
        left = _without(self.modes, (features - self.mean[..., None]) / self.std[:, None])
        weight = 1 / self.squares(left).clamp(min=1)[:, None]
        for _ in range(ROBUST_STEPS):
            left = _without(self.modes, left, weight)
        return self.squares(left) if self.kinds is None else self.kinds.distances(self.anywhere(left))

    def anywhere(self, left: Float[Tensor, "cells d b"]) -> Float[Tensor, "cells d b"]:
        """What the modes leave of features, given as it lies from each place's mean, as it lies from all places'."""
        return left + _apart(self.mean, self.std)[..., None]

    def to(self, device: torch.device) -> "CellDistribution":
        """The same on a device."""
        return CellDistribution(self.mean.to(device), self.std.to(device), self.modes.to(device),
                                self.whitening.to(device), self.kinds and self.kinds.to(device))

    def squares(self, left: Float[Tensor, "cells d b"]) -> Float[Tensor, "cells b"]:
        """The squared distances, divided by D, of what the modes leave, from each place's own Gaussian."""
        # images as rows, as below: a CPU takes this product twice as fast as its transpose
        return (left.transpose(1, 2) @ self.whitening.transpose(1, 2)).square().mean(2)


@dataclass(frozen=True)
class PatchDistribution:
    """What describes images, and the Gaussian of each of the features that it gives."""

    describe: PatchFeatures
    parts: tuple[CellDistribution, ...]
    fine: FineDistribution | None = None  # None: cells alone are described

    @property
    def places(self) -> Literal["own", "shared"]:
        """Whether each place has a distribution of its own, or all share one."""
        return "own" if self.parts[0].kinds is None else "shared"

    def evidence(
        self, photos: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"] | None
    ) -> Float[Tensor, "b h w"]:
        """log(1 + distance) at each pixel, summed over scales, descriptions and grids; that of a large cell lies where
        the small cells in it have theirs. To it the pixels' own is added. Images in [0, 1]; repaired ones as those
        that it was fitted to.
        """
        return self.evidence_of(self.describe(photos, repaired), (photos.shape[-2], photos.shape[-1]))

    def evidence_of(self, features: Sequence[Float[Tensor, "_ _ b"]], size: tuple[int, int]
                    ) -> Float[Tensor, "b h w"]:  # fmt: skip
        """The same from what `describe` made of images of that height and width."""
        of_cells, of_pixels = features[: len(self.parts)], features[len(self.parts) :]
        found = [part.distances(each).log1p() for part, each in zip(self.parts, of_cells, strict=True)]
        num_grids = len(self.describe.grids)
        over = [first + second for first, second in zip(found[::2], found[1::2], strict=True)]  # both descriptions
        sums = [torch.stack(over[index::num_grids]).sum(0).T for index in range(num_grids)]  # (B, cells) each
        if self.describe.cells is not None:  # a cell outside is as its neighbour: at the border nothing is diluted
            sums = [each.index_select(1, cells.nearest) for each, cells in zip(sums, self.describe.cells, strict=True)]
        smallest, *large = (each.unflatten(1, grid)[:, None]
                            for each, grid in zip(sums, self.describe.grids, strict=True))
        usual = USUAL_EVIDENCE * len(over[::num_grids]) * len(FEATURES_OF_A_FILTER)
        described = None if self.describe.cells is None else self.describe.cells[0].mask(self.describe.grids[0])
        total = torch.stack([smallest, *(_in_parts(each, smallest, usual, described) for each in large)]).sum(0)
        enlarged = F.interpolate(total, size=size, mode="bilinear", align_corners=False)[:, 0]
        if self.fine is None:
            return enlarged
        assert of_pixels, "pixels that have a distribution are described"
        found_by_pixels = self.fine.evidence(of_pixels[0])
        return enlarged + F.interpolate(found_by_pixels, size=size, mode="bilinear", align_corners=False)[:, 0]

    def to(self, device: torch.device) -> "PatchDistribution":
        """The same on a device."""
        return PatchDistribution(self.describe.to(device), tuple(part.to(device) for part in self.parts),
                                 self.fine and self.fine.to(device))


@dataclass(frozen=True)
class _Learnt:
    """Of the good images that were trained on, of one description at one scale over one grid."""

    mean: Float[Tensor, "cells d"]
    std: Float[Tensor, " d"]
    modes: Float[Tensor, "cells d modes"]
    covariance: Float[Tensor, "cells d d"]  # of what the modes leave
    kinds: CellKinds | None


class GoodPatches:
    """What the features of the good images that were trained on have in common: mean, modes and covariance, and the
    kinds of cells.

    Args:
        describe: what made the features.
        features: of n good images, each that `describe` gives.
        num_modes: at most; few images have fewer, one for each IMAGES_PER_MODE.
        places: whether each place has a Gaussian of its own, or all share a mixture; auto: `settled` decides.
        seed: of the cells that the kinds are learnt from.
    """

    def __init__(
        self, describe: PatchFeatures, features: Sequence[Float[Tensor, "_ _ n"]], *, num_modes: int, places: Places,
        seed: int = 0,
    ) -> None:  # fmt: skip
        self.describe, self.places = describe, places
        count = len(describe.scales) * len(describe.grids) * len(FEATURES_OF_A_FILTER)
        self._parts = [_learnt(each, num_modes, None if places == "own" else seed) for each in features[:count]]
        self._fine = [FineDistribution.of(each) for each in features[count:]]  # one, or none of cells alone

    def settled(self, held_out: Sequence[Float[Tensor, "_ _ n"]]) -> "GoodPatches":
        """With places "auto" the same with that of "own" and "shared" that makes the cells of good images that were not
        trained on likelier: all descriptions, scales and grids together, of the median image, lest one odd one decide.
        """
        if self.places != "auto":
            return self
        for_shared = torch.stack([self._for_shared(part, unseen) for part, unseen in zip(
            self._parts, held_out[: len(self._parts)], strict=True)]).sum(0)
        settled = copy(self)
        settled.places = "shared" if float(for_shared.quantile(0.5)) > 0 else "own"
        return settled

    def fitted(self, held_out: Sequence[Float[Tensor, "_ _ n"]]) -> PatchDistribution:
        """The distribution, held against the features of good images that were not trained on: they say how much more
        a feature spreads on new images, and by their likelihood how far each place's covariance shrinks towards that
        of all, and with places "auto" what `settled` says.
        """
        settled = self.settled(held_out)
        of_cells, of_pixels = held_out[: len(self._parts)], held_out[len(self._parts) :]
        parts = []
        for part, unseen in zip(self._parts, of_cells, strict=True):
            own, left, _ = _of_places(part, unseen)
            kinds = None if settled.places == "own" or part.kinds is None else (
                part.kinds.held_against(own.anywhere(left))[0])
            parts.append(replace(own, kinds=kinds))
        fine = [each.held_against(unseen) for each, unseen in zip(self._fine, of_pixels, strict=True)]
        return PatchDistribution(self.describe, tuple(parts), *fine)

    @staticmethod
    def _for_shared(part: _Learnt, unseen: Float[Tensor, "cells d n"]) -> Float[Tensor, " n"]:
        """How much likelier, by its logarithm, each image's cells are in the mean if places share a distribution."""
        own, left, log_volume = _of_places(part, unseen)
        assert part.kinds is not None, "learnt with places auto"
        _, density = part.kinds.held_against(own.anywhere(left))
        return density - (log_volume - own.mean.shape[1] / 2 * own.squares(left).mean(0))


def _learnt(features: Float[Tensor, "cells d n"], num_modes: int, seed: int | None) -> _Learnt:
    """With the kinds of cells, drawn with this seed; None: without."""
    mean, std, modes, left = _moments(features, num_modes)
    covariance = left @ left.transpose(1, 2) / max(1, left.shape[2] - 1)
    if seed is None:
        return _Learnt(mean, std, modes, covariance, None)
    chosen = torch.randperm(left.shape[0] * left.shape[2], generator=torch.Generator().manual_seed(seed))[:MOST_CELLS]
    cell, image = (each.to(left.device) for each in (chosen // left.shape[2], chosen % left.shape[2]))
    kinds = CellKinds.of(left[cell, :, image] + _apart(mean, std)[cell], seed)
    return _Learnt(mean, std, modes, covariance, kinds)


def _of_places(
    part: _Learnt, unseen: Float[Tensor, "cells d n"]
) -> tuple[CellDistribution, Float[Tensor, "cells d n"], float]:
    """Each place's own Gaussian, held against images that were not trained on; what its modes leave of these, and the
    mean of log |det W| over all places.
    """
    left = _without(part.modes, (unseen - part.mean[..., None]) / part.std[:, None])
    covariance = part.covariance
    spread = left.square().mean((0, 2)) / (covariance.diagonal(dim1=1, dim2=2).mean(0) + LEAST_VARIANCE)
    wider = spread.clamp(min=1).sqrt()  # what was trained on is repaired better than what is new
    whitening, log_volume = _whitening(covariance * wider[:, None] * wider, left)
    return CellDistribution(part.mean, part.std, part.modes, whitening), left, log_volume


def _apart(mean: Float[Tensor, "cells d"], std: Float[Tensor, " d"]) -> Float[Tensor, "cells d"]:
    """Each place's mean, as it lies from the mean of all, in units of each feature."""
    return (mean - mean.mean(0)) / std


def _in_parts(
    large: Float[Tensor, "b 1 r2 c2"], small: Float[Tensor, "b 1 r c"], usual: float,
    described: Float[Tensor, "1 1 r c"] | None = None,
) -> Float[Tensor, "b 1 r c"]:  # fmt: skip
    """The evidence of large cells, divided among the small cells in each by their own. What is usual is added to
    theirs: where all of them are nearly good, chance shall not decide. Of the small cells those that are described
    count, 1 and not 0; None: all.
    """
    grid = large.shape[-2], large.shape[-1]
    mean = F.adaptive_avg_pool2d(small if described is None else small * described, grid)
    if described is not None:
        share = F.adaptive_avg_pool2d(described, grid)
        mean = torch.where(share > 0, mean / share.clamp(min=TINY_SHARE), F.adaptive_avg_pool2d(small, grid))
    size = small.shape[-2], small.shape[-1]
    large, mean = (F.interpolate(each, size=size, mode="bilinear", align_corners=False) for each in (large, mean))
    return large * (small + usual) / (mean + usual)


def _moments(
    features: Float[Tensor, "cells d n"], num_modes: int
) -> tuple[Float[Tensor, "cells d"], Float[Tensor, " d"], Float[Tensor, "cells d modes"], Float[Tensor, "cells d n"]]:
    """Mean; standard deviation of each feature at a place; modes, and what they leave of each image, in its units.

    The modes are the first principal components of all cells' features together, from the n x n matrix of their inner
    products.
    """
    mean = features.mean(2)
    away = features - mean[..., None]
    count = features.shape[2]
    variance = away.square().sum(2).mean(0) / max(1, count - 1)
    std = (variance + LEAST_VARIANCE).sqrt()
    away /= std[:, None]  # in place: GB
    flat = away.flatten(0, 1)
    lengths, directions = torch.linalg.eigh(flat.T @ flat)  # ascending
    first = slice(count - min(num_modes, count // IMAGES_PER_MODE), count)
    modes = flat @ (directions[:, first] / lengths[first].clamp(min=LEAST_VARIANCE).sqrt())
    modes = modes.unflatten(0, away.shape[:2])
    return mean, std, modes, _without(modes, away)


def _without(
    modes: Float[Tensor, "cells d modes"], away: Float[Tensor, "cells d b"],
    weight: Float[Tensor, "cells 1 b"] | None = None,
) -> Float[Tensor, "cells d b"]:  # fmt: skip
    """What lies across the modes; with weights one step towards it."""
    counted = away if weight is None else weight * away
    rows, along = counted.flatten(0, 1).T, modes.flatten(0, 1)
    # images as rows: a CPU takes this product of few rows and many columns three times as fast as its transpose
    return away - (rows @ along @ along.T).T.unflatten(0, away.shape[:2])


def _whitening(
    covariance: Float[Tensor, "cells d d"], unseen: Float[Tensor, "cells d b"]
) -> tuple[Float[Tensor, "cells d d"], float]:
    """The W of a CellDistribution with the shrinkage that makes unseen features likeliest, given as they lie from the
    mean; and the mean of log |det W|.

    All shrinkages together: with covariance A and the mean of all places' B = LLᵀ, and L⁻¹AL⁻ᵀ = QΛQᵀ, the inverse
    root of (1 - s)A + sB is ((1 - s)Λ + s)^-½ QᵀL⁻¹.
    """
    shared = covariance.mean(0)
    floor = (DIAGONAL_SHARE * shared.diagonal() + LEAST_VARIANCE).diag()
    root = torch.linalg.inv(torch.linalg.cholesky(shared + floor))
    # on the CPU: of thousands of small matrices a GPU may decompose one after the other
    spectrum, directions = (found.to(root.device) for found in torch.linalg.eigh(
        (root @ (covariance + floor) @ root.T).cpu()))
    aligned = directions.transpose(1, 2) @ root
    squares = (aligned @ unseen).square().mean(2)  # (cells, D)

    def shrunk(share: float) -> Float[Tensor, "cells d"]:
        return (1 - share) * spectrum.clamp(min=0) + share

    def surprise(share: float) -> float:
        """The mean negative log-density, but for its constant."""
        return float((squares / shrunk(share) + shrunk(share).log()).sum(1).mean() / 2)

    variances = shrunk(min(SHRINKAGES, key=surprise))
    log_volume = float(root.diagonal().log().sum() - variances.log().sum(1).mean() / 2)
    return aligned / variances.sqrt()[..., None], log_volume
