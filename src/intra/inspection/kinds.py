"""The kinds of cells that good images show anywhere: a mixture of Gaussians that all places share.

For parts that lie anyhow, and for surfaces without a beginning, a place has no look of its own: whatever the part has
may lie there, and the Gaussian of a place is as wide as all of it. docs/decisions/0024-shared.md
"""

import math
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["CellKinds"]

MOST_KINDS = 32
CELLS_PER_KIND = 200  # on average; fewer cells are of one kind
MEANS_STEPS = 15  # of k-means, from which the Gaussians start
STEPS = 10
COUNTED_SHARED = 1.0  # times D cells: so much the covariance of all kinds together counts in each kind's own
FLOOR = 1e-3  # of each variance, where all cells' is 1
LEAST_VARIANCE = 1e-4  # of a feature, all about 1
LEAST_STD = 1e-2
ROWS_AT_ONCE = 512  # whose products stay in a CPU's cache
KINDS_AT_ONCE = 8  # in an exported graph, which takes any number of rows


@dataclass(frozen=True)
class CellKinds:
    """A mixture of K Gaussians of D features."""

    whitening: Float[Tensor, "k d d"]  # W; WᵀW is the inverse of a kind's covariance
    offset: Float[Tensor, "k d"]  # W times its mean
    log_weight: Float[Tensor, " k"]  # log(share · |det W|)

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"], seed: int) -> "CellKinds":
        """From the features of n cells of good images, each cell belonging to the kind that makes it likeliest
        (classification EM, Celeux & Govaert 1992).
        """
        generator = torch.Generator().manual_seed(seed)
        belongs = _clustered(rows, max(1, min(MOST_KINDS, len(rows) // CELLS_PER_KIND)), generator)
        kinds = cls._of_rows(rows, belongs)
        for _ in range(STEPS):
            belongs = (kinds.log_weight - kinds._squares(rows) / 2).argmax(1)
            kinds = cls._of_rows(rows, belongs)
        return kinds

    @classmethod
    def _of_rows(cls, rows: Float[Tensor, "n d"], belongs: Int[Tensor, " n"]) -> "CellKinds":
        own = [rows[belongs == kind] for kind in belongs.unique().tolist()]  # a kind without any cell is none
        sizes = rows.new_tensor([len(each) for each in own])
        means = torch.stack([each.mean(0) for each in own])
        scatter = torch.stack([(each - mean).T @ (each - mean) for each, mean in zip(own, means, strict=True)])
        shared = scatter.sum(0) / len(rows)
        counted = COUNTED_SHARED * rows.shape[1]
        covariance = (scatter + counted * shared) / (sizes + counted)[:, None, None]
        floor = FLOOR * rows.var(0, correction=0) + LEAST_VARIANCE
        whitening = torch.linalg.inv(torch.linalg.cholesky(covariance + floor.diag()))
        log_weight = (sizes / len(rows)).log() + whitening.diagonal(dim1=1, dim2=2).log().sum(1)
        return cls(whitening, (whitening @ means[..., None])[..., 0], log_weight)

    def held_against(self, features: Float[Tensor, "cells d b"]) -> tuple["CellKinds", Float[Tensor, " b"]]:
        """The kinds so much wider that other good images' cells, which they have not seen, lie at 1 in the mean, if
        they lay farther; and of each of these images the mean logarithm of its cells' density then, but for a
        Gaussian's constant.
        """
        squares = self._squares(_rows(features))
        width = features.shape[1]
        wider = math.sqrt(max(1.0, float(self._expected(squares).mean()) / width))
        kinds = CellKinds(self.whitening / wider, self.offset / wider, self.log_weight - width * math.log(wider))
        density = (kinds.log_weight - squares / wider**2 / 2).logsumexp(1)
        return kinds, density.unflatten(0, (features.shape[0], features.shape[2])).mean(0)

    def distances(self, features: Float[Tensor, "cells d b"]) -> Float[Tensor, "cells b"]:
        """The squared Mahalanobis distance of each cell from its kind, divided by D: the mean over the kinds, each as
        probable as it is given the cell.
        """
        found = self._expected(self._squares(_rows(features))) / features.shape[1]
        return found.unflatten(0, (features.shape[0], features.shape[2]))

    def to(self, device: torch.device) -> "CellKinds":
        """The same on a device."""
        return CellKinds(*(getattr(self, each.name).to(device) for each in fields(self)))

    def _squares(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        if torch.compiler.is_compiling():
            return torch.cat([_squares_of(rows, whitening, offset) for whitening, offset in zip(
                self.whitening.split(KINDS_AT_ONCE), self.offset.split(KINDS_AT_ONCE), strict=True)], dim=1)
        return torch.cat([_squares_of(part, self.whitening, self.offset) for part in rows.split(ROWS_AT_ONCE)])

    def _expected(self, squares: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
        # not that of the likeliest kind alone, which jumps where two are as likely: rounding would decide
        return ((self.log_weight - squares / 2).softmax(1) * squares).sum(1)


def _squares_of(
    rows: Float[Tensor, "n d"], whitening: Float[Tensor, "k d d"], offset: Float[Tensor, "k d"]
) -> Float[Tensor, "n k"]:
    whitened = rows @ whitening.flatten(0, 1).T - offset.flatten()
    return whitened.square().unflatten(1, offset.shape).sum(2)


def _rows(features: Float[Tensor, "cells d b"]) -> Float[Tensor, "n d"]:
    return features.transpose(1, 2).flatten(0, 1)


def _clustered(rows: Float[Tensor, "n d"], num_kinds: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """k-means, each feature in units of its standard deviation."""
    scaled = (rows - rows.mean(0)) / (rows.std(0, correction=0) + LEAST_STD)
    centres = scaled[torch.randperm(len(rows), generator=generator)[:num_kinds].to(rows.device)]
    for _ in range(MEANS_STEPS):
        belongs = torch.cdist(scaled, centres).argmin(1)
        centres = torch.stack([scaled[belongs == kind].mean(0) for kind in belongs.unique().tolist()])
    return torch.cdist(scaled, centres).argmin(1)
