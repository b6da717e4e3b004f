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
from intra.inspection.distribution import GoodPatches, PatchDistribution
from intra.inspection.features import PatchFeatures

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
    """The audit of at least two photos, uint8 or float in [0, 1]. Of `scoring` the distribution's settings count, but
    for `places`, which have Gaussians of their own, and `pixel_evidence`, as there are no repaired images.

    `on_progress` is called with the number of photos that have been described, and of all.
    """
    num_folds = min(NUM_FOLDS, len(photos))
    describe = PatchFeatures.of(photos, scoring=scoring, seed=seed)
    chunks = []
    for chunk in photos.split(PHOTOS_PER_BATCH):
        chunks.append(describe(to_unit(chunk), None))
        if on_progress:
            on_progress(min(len(chunks) * PHOTOS_PER_BATCH, len(photos)), len(photos))
    features = [torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True)]  # of each scale (cells, D, N)
    kept = torch.ones(len(photos), dtype=torch.bool)
    for _ in range(2):
        distributions = _cross_fitted(describe, features, kept, num_folds, scoring.num_modes)
        scores = torch.empty(len(photos))
        for fold, distribution in enumerate(distributions):
            own = [each[..., fold::num_folds] for each in features]
            scores[fold::num_folds] = distribution.evidence_of(own, describe.grids[0]).amax((1, 2))
        kept = scores <= scores.quantile(KEPT_SHARE)
    return Audit(tuple(scores.tolist()), distributions)


def _cross_fitted(
    describe: PatchFeatures, features: Sequence[Float[Tensor, "_ _ n"]], kept: Bool[Tensor, " n"], num_folds: int,
    num_modes: int,
) -> tuple[PatchDistribution, ...]:  # fmt: skip
    """A distribution for each fold, from the kept photos of all others, held against those of the fold itself."""
    numbers = torch.arange(len(kept))
    distributions = []
    for fold in range(num_folds):
        own, others = ((numbers % num_folds == fold) == is_own for is_own in (True, False))
        # in a small set a fold, or all others, may be odd ones alone
        chosen = [part & kept if (part & kept).any() else part for part in (own, others)]
        ours, theirs = ([each[..., part] for each in features] for part in chosen)
        distributions.append(GoodPatches(describe, theirs, num_modes=num_modes, places="own").fitted(ours))
    return tuple(distributions)
