"""Which good photos look least like the others: a defective one among them is found before it is learnt.

No network and no training: the Gaussian of patches at each place (distribution.py) of the photos alone, each photo
scored by one that was fitted without it and its fold. Then once more without the oddest tenth, so that defective photos
do not teach what is usual.
"""

from collections.abc import Callable
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
MOST_HELD_OUT = 64  # photos of a fold, against which a distribution is held: more say the same and take memory


@dataclass(frozen=True)
class Audit:
    """How unlike the others each photo is."""

    scores: tuple[float, ...]  # the highest evidence of each; the higher, the odder
    distributions: tuple[PatchDistribution, ...]  # each was fitted without one fold

    def evidence(self, photo: Shaped[Tensor, "c h w"], index: int) -> Float[Tensor, "h w"]:
        """Where the photo at that place of the set is unlike the others."""
        return self.distributions[index % len(self.distributions)].evidence(to_unit(photo[None]), None)[0]


def audit_photos(
    photos: Shaped[Tensor, "n c h w"], *, scoring: ScoringConfig, seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Audit:  # fmt: skip
    """The audit of at least two photos, uint8 or float in [0, 1]. Of `scoring` the distribution's settings count.

    `on_progress` is called with the number of photos that have been scored, each twice, and of all.
    """
    num_folds = min(NUM_FOLDS, len(photos))
    base = PatchMoments(photos, scales=scoring.distribution_scales, num_filters=scoring.num_filters,
                        cell_size=scoring.cell_size, seed=seed)
    kept = torch.ones(len(photos), dtype=torch.bool)
    for number in range(2):
        distributions = _cross_fitted(base, photos, kept, num_folds)
        scores = torch.empty(len(photos))
        for fold, distribution in enumerate(distributions):
            for chunk in torch.arange(fold, len(photos), num_folds).split(PHOTOS_PER_BATCH):
                scores[chunk] = distribution.evidence(to_unit(photos[chunk]), None).amax((1, 2))
            if on_progress:
                on_progress((number * num_folds + fold + 1) * len(photos) // num_folds, 2 * len(photos))
        kept = scores <= scores.quantile(KEPT_SHARE)
    return Audit(tuple(scores.tolist()), distributions)


def _cross_fitted(
    base: PatchMoments, photos: Shaped[Tensor, "n c h w"], kept: Bool[Tensor, " n"], num_folds: int
) -> tuple[PatchDistribution, ...]:
    """A distribution for each fold, from the kept photos of all others, held against those of the fold itself."""
    folds = []
    for fold in range(num_folds):
        index = torch.arange(fold, len(photos), num_folds)
        index = index[kept[index]] if kept[index].any() else index  # a fold of odd ones alone, in a small set
        folds.append(index.split(PHOTOS_PER_BATCH))
    gathered = [base.empty() for _ in folds]
    for moments, chunks in zip(gathered, folds, strict=True):
        for chunk in chunks:
            moments.add(to_unit(photos[chunk]), None)
    distributions = []
    for fold, chunks in enumerate(folds):
        others = base.empty()
        for other, moments in enumerate(gathered):
            if other != fold:
                others.merge(moments)
        held_out = [(to_unit(photos[chunk]), None) for chunk in chunks[: MOST_HELD_OUT // PHOTOS_PER_BATCH]]
        distributions.append(others.fitted(held_out))
    return tuple(distributions)
