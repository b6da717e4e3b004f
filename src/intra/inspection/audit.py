"""Which good photos look least like the others: a defective one among them is found before it is learnt.

No network and no training: the Gaussian of patches at each place (distribution.py) of the photos alone, each photo
scored by one that was fitted without it and its fold. Then once more without the oddest tenth, so that defective photos
do not teach what is usual.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from intra.config import ScoringConfig
from intra.data.images import to_unit
from intra.inspection.distribution import PatchDistribution, PatchMoments

__all__ = ["Audit", "audit_photos"]

NUM_FOLDS = 5
KEPT_SHARE = 0.9  # of the photos, that teach what is usual; the others are only scored
PHOTOS_PER_BATCH = 8


@dataclass(frozen=True)
class Audit:
    """How unlike the others each photo is."""

    scores: tuple[float, ...]  # the highest evidence of any cell of each; the higher, the odder
    distributions: tuple[PatchDistribution, ...]  # each was fitted without one fold

    def evidence(self, photo: Shaped[Tensor, "c h w"], index: int) -> Float[Tensor, "h w"]:
        """Where the photo at that place of the set is unlike the others."""
        return self.distributions[index % len(self.distributions)].evidence(to_unit(photo[None]), None)[0]


def audit_photos(
    photos: Shaped[Tensor, "n c h w"], *, scoring: ScoringConfig, seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Audit:  # fmt: skip
    """The audit of at least two photos, uint8 or float in [0, 1]. Of `scoring` the distribution's settings count.

    `on_progress` is called with the number of photos that have been described, and of all.
    """
    num_folds = min(NUM_FOLDS, len(photos))
    base = PatchMoments(photos, scales=scoring.distribution_scales, num_filters=scoring.num_filters,
                        cell_size=scoring.cell_size, seed=seed)
    chunks = []
    for chunk in photos.split(PHOTOS_PER_BATCH):
        chunks.append(base.features(to_unit(chunk), None))
        if on_progress:
            on_progress(min(len(chunks) * PHOTOS_PER_BATCH, len(photos)), len(photos))
    features = [torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True)]  # of each scale (cells, D, N)
    kept = torch.ones(len(photos), dtype=torch.bool)
    for _ in range(2):
        distributions = _cross_fitted(base, features, kept, num_folds)
        scores = torch.empty(len(photos))
        for fold, distribution in enumerate(distributions):
            own = [each[..., fold::num_folds] for each in features]
            scores[fold::num_folds] = distribution.evidence_of(own, base.grid).amax((1, 2))
        kept = scores <= scores.quantile(KEPT_SHARE)
    return Audit(tuple(scores.tolist()), distributions)


def _cross_fitted(
    base: PatchMoments, features: Sequence[Float[Tensor, "cells d n"]], kept: Bool[Tensor, " n"], num_folds: int
) -> tuple[PatchDistribution, ...]:
    """A distribution for each fold, from the kept photos of all others, held against those of the fold itself."""
    folds = []
    for fold in range(num_folds):
        index = torch.arange(fold, len(kept), num_folds)
        # in a small set a fold may be of odd ones alone
        folds.append([each[..., index[kept[index]] if kept[index].any() else index] for each in features])
    gathered = [base.empty() for _ in folds]
    for moments, own in zip(gathered, folds, strict=True):
        moments.add_features(own)
    distributions = []
    for fold, own in enumerate(folds):
        others = base.empty()
        for other, moments in enumerate(gathered):
            if other != fold:
                others.merge(moments)
        distributions.append(others.fitted_to(own))
    return tuple(distributions)
