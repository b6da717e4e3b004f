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
CELLS_PER_KIND = 200  # at least, on average
MOST_CELLS = 50_000  # from which the kinds are learnt
MEANS_STEPS = 15  # of k-means, from which the Gaussians start
STEPS = 10
COUNTED_SHARED = 1.0  # times D cells: so much the covariance of all kinds together counts in each kind's own
FLOOR = 1e-3  # of each variance, where all cells' is 1
LEAST_VARIANCE = 1e-4
ROWS_AT_ONCE = 512  # whose products stay in a CPU's cache


@dataclass(frozen=True)
class CellKinds:
    """A mixture of K Gaussians of D features."""

    whitening: Float[Tensor, "k d d"]  # W; WᵀW is the inverse of a kind's covariance
    offset: Float[Tensor, "k d"]  # W times its mean
    log_weight: Float[Tensor, " k"]  # the logarithm of its share, and of |det W|

    @classmethod
    def of(cls, features: Float[Tensor, "cells d n"], seed: int) -> "CellKinds":
        """From the cells of n good images, each cell belonging to the kind that makes it likeliest (classification EM,
        Celeux & Govaert 1992).
        """
        generator = torch.Generator().manual_seed(seed)
        cells, _, count = features.shape
        chosen = torch.randperm(cells * count, generator=generator)[:MOST_CELLS].to(features.device)
        rows = features[chosen // count, :, chosen % count]
        num_kinds = max(1, min(MOST_KINDS, len(rows) // CELLS_PER_KIND))
        belongs = _clustered(rows, num_kinds, generator)
        kinds = cls._of_rows(rows, belongs, num_kinds)
        for _ in range(STEPS):
            belongs = kinds._likeliest(kinds._squares(rows))
            kinds = cls._of_rows(rows, belongs, num_kinds)
        return kinds

    @classmethod
    def _of_rows(cls, rows: Float[Tensor, "n d"], belongs: Int[Tensor, " n"], num_kinds: int) -> "CellKinds":
        width = rows.shape[1]
        own = [rows[belongs == kind] for kind in range(num_kinds)]
        sizes = rows.new_tensor([len(each) for each in own])
        everywhere = rows.mean(0)
        means = torch.stack([each.mean(0) if len(each) else everywhere for each in own])
        scatter = torch.stack([(each - mean).T @ (each - mean) for each, mean in zip(own, means, strict=True)])
        shared = scatter.sum(0) / len(rows)
        counted = COUNTED_SHARED * width
        covariance = (scatter + counted * shared) / (sizes + counted)[:, None, None]
        floor = FLOOR * rows.var(0, correction=0) + LEAST_VARIANCE
        whitening = torch.linalg.inv(torch.linalg.cholesky(covariance + floor.diag()))
        share = (sizes + 1) / (sizes + 1).sum()
        log_weight = share.log() + whitening.diagonal(dim1=1, dim2=2).log().sum(1)
        return cls(whitening, (whitening @ means[..., None])[..., 0], log_weight)

    def held_against(self, features: Float[Tensor, "cells d b"]) -> "CellKinds":
        """As wide that other good images' cells, which it has not seen, lie at 1 in the mean."""
        wider = math.sqrt(max(float(self.distances(features).mean()), LEAST_VARIANCE))
        width = self.offset.shape[1]
        return CellKinds(self.whitening / wider, self.offset / wider, self.log_weight - width * math.log(wider))

    def distances(self, features: Float[Tensor, "cells d b"]) -> Float[Tensor, "cells b"]:
        """The squared Mahalanobis distance of each cell from the kind that makes it likeliest, divided by D."""
        squares = self._squares(features.transpose(1, 2).flatten(0, 1))
        nearest = squares.gather(1, self._likeliest(squares)[:, None])[:, 0] / features.shape[1]
        return nearest.unflatten(0, (features.shape[0], features.shape[2]))

    def log_density(self, features: Float[Tensor, "cells d b"]) -> float:
        """The mean over all cells of the logarithm of their density, but for a constant that is the same for any
        Gaussian of as many features.
        """
        squares = self._squares(features.transpose(1, 2).flatten(0, 1))
        return float((self.log_weight - squares / 2).logsumexp(1).mean())

    def to(self, device: torch.device) -> "CellKinds":
        """The same on a device."""
        return CellKinds(*(getattr(self, each.name).to(device) for each in fields(self)))

    def _squares(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        along, offset = self.whitening.flatten(0, 1).T, self.offset
        # an exported graph takes any number of rows, and its runtime divides the work itself
        parts = [rows] if torch.compiler.is_compiling() else rows.split(ROWS_AT_ONCE)
        return torch.cat([(part @ along - offset.flatten()).square().unflatten(1, offset.shape).sum(2)
                          for part in parts])

    def _likeliest(self, squares: Float[Tensor, "n k"]) -> Int[Tensor, " n"]:
        return (self.log_weight - squares / 2).argmax(1)


def _clustered(rows: Float[Tensor, "n d"], num_kinds: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """k-means, each feature in units of its standard deviation."""
    scaled = rows / (rows.std(0, correction=0) + LEAST_VARIANCE)
    centres = scaled[torch.randperm(len(rows), generator=generator)[:num_kinds].to(rows.device)]
    for _ in range(MEANS_STEPS):
        belongs = torch.cdist(scaled, centres).argmin(1)
        centres = torch.stack([scaled[belongs == kind].mean(0) if (belongs == kind).any() else centre
                               for kind, centre in enumerate(centres)])
    return torch.cdist(scaled, centres).argmin(1)
