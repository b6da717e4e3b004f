"""Whether the threshold's promise holds on real good photos: realised false-reject rates over many random splits.

    python benchmarks/promise.py DATA... [--size 128] [--fits 20] [--splits 20] [--held-out 31] [--rate 0.01]

No network: the score of a photo is the highest evidence of the distribution of good patches (photos alone), so that
hundreds of splits take minutes. All good photos, of training and of test, are split at random into those that fit the
distribution (half), n held-out ones that carry the threshold, and new ones, of which the share above it is counted:

- `stored`: the distribution is held against photos of its own, so the held-out ones have no say in anything but the
  threshold, as for `intra calibrate`; --fits distributions, --splits thresholds for each.
- `in sample`: held-out photos also decide the distribution's spread and shrinkage, as for `intra train`, and are scored
  by what they decided. One for each of --fits.
- `cross-fitted`: the same, but each fold of them is scored by what the others decided; as `intra train` does.

Beside each rate: what was promised, and for how many splits the realised rate lay in the stated interval. The new
photos are few, so their share scatters about the true rate: `expected` says for how many splits exchangeable photos
would lie in it (a beta-binomial share), the promise exactly kept.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import betabinom
from torch import Tensor

from intra.config import preset
from intra.data.folder import find_categories
from intra.data.images import auto_channels, read_info, read_set, to_unit
from intra.inspection.calibration import Threshold, calibrate, choose_threshold
from intra.inspection.distribution import GoodPatches
from intra.inspection.features import PatchFeatures

SCORING = preset("fast").scoring
KINDS = ("distribution",)


def realised(threshold: Threshold, scores: Sequence[float]) -> float:
    """The share of new good photos that are rejected."""
    return float(np.mean(np.array(scores) > threshold.value))


def expected(threshold: Threshold, num_new: int) -> float:
    """How often the share of so many new photos lies in the interval, if all are exchangeable."""
    above = round(threshold.false_reject_rate * (threshold.num_images + 1))  # n + 1 - k
    counts = np.arange(num_new + 1)
    inside = (counts / num_new >= threshold.lowest_rate) & (counts / num_new <= threshold.highest_rate)
    return float(betabinom.pmf(counts, num_new, above, threshold.num_images + 1 - above)[inside].sum())


class Split:
    """What half of the photos have in common, and the features of the others."""

    def __init__(self, photos: Tensor, rng: np.random.Generator, size: int) -> None:
        order = torch.from_numpy(rng.permutation(len(photos)))
        half, self.size = len(photos) // 2, (size, size)
        describe = PatchFeatures.of(photos[order[:half]], scoring=SCORING, seed=0)

        def features(part: Tensor) -> list[Tensor]:
            chunks = [describe(to_unit(chunk), None) for chunk in part.split(8)]
            return [torch.cat(parts, dim=2) for parts in zip(*chunks, strict=True)]

        self.others = features(photos[order[half:]])
        self.good = GoodPatches(describe, features(photos[order[:half]]), num_modes=SCORING.num_modes,
                                places=SCORING.places)
        self.num_others = len(photos) - half

    def evidence(self, places: Sequence[int], decided_by: Sequence[int], held_out: Sequence[int] | None = None
                 ) -> Tensor:  # fmt: skip
        """Of some of the other photos, with a distribution that is held against some of them, which are all that are
        held out, or a fold less.
        """
        good = self.good.settled(self._of(held_out or decided_by))
        return good.fitted(self._of(decided_by)).evidence_of(self._of(places), self.size)

    def _of(self, index: Sequence[int]) -> list[Tensor]:
        return [each[..., list(index)] for each in self.others]


def measure(photos: Tensor, *, size: int, fits: int, splits: int, held_out: int, rate: float) -> None:
    """Prints a row for each way."""
    rows: dict[str, list[tuple[Threshold, float, int]]] = {"stored": [], "in sample": [], "cross-fitted": []}
    rng = np.random.default_rng(0)
    for _ in range(fits):
        split = Split(photos, rng, size)
        own = min(20, split.num_others // 3)
        scores = split.evidence(range(split.num_others), range(own)).amax((1, 2)).numpy()[own:]
        for _ in range(splits):
            mixed = rng.permutation(scores).tolist()
            threshold = choose_threshold(mixed[:held_out], rate)
            rows["stored"].append((threshold, realised(threshold, mixed[held_out:]), len(mixed) - held_out))
        everyone, places = list(range(split.num_others)), list(range(held_out))
        found = split.evidence(everyone, places)
        new = found[held_out:].amax((1, 2)).tolist()

        def refit(index: list[int], split: Split = split, places: list[int] = places) -> Tensor:
            return split.evidence(places, index, places)[:, None]

        _, crossed = calibrate(found[:held_out, None], found[:1, None][:, :0], kinds=KINDS, scoring=SCORING,
                               refit=refit)
        for way, own_scores in (("in sample", found[:held_out].amax((1, 2)).tolist()), ("cross-fitted", crossed)):
            threshold = choose_threshold(own_scores, rate)
            rows[way].append((threshold, realised(threshold, new), len(new)))
    for way, found_rows in rows.items():
        rates = np.array([share for _, share, _ in found_rows])
        threshold, _, num_new = found_rows[0]
        inside = np.mean((rates >= threshold.lowest_rate) & (rates <= threshold.highest_rate))
        print(f"| {way} | {len(rates)} | {num_new} | {threshold.false_reject_rate:.2%} | {rates.mean():.2%} | "
              f"{threshold.lowest_rate:.2%}–{threshold.highest_rate:.2%} | {inside:.0%} | "
              f"{expected(threshold, num_new):.0%} |", flush=True)


def main() -> None:
    """Prints a table for each category."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--size", type=int, default=128, help="px: height and width")
    parser.add_argument("--fits", type=int, default=20)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--held-out", type=int, default=31)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--most", type=int, default=400, help="photos of a category")
    args = parser.parse_args()
    for category in (found for data in args.data for found in find_categories(data)):
        paths = [*category.train, *(image.path for image in category.test if not image.label)]
        paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[: args.most]]
        photos = read_set(paths, size=(args.size, args.size), channels=auto_channels([read_info(p) for p in paths]))
        print(f"\n{category.name}: {len(paths)} good photos, {args.held_out} held out, {args.rate:.1%} asked for\n\n"
              "| way | splits | new photos | promised | realised, mean | interval | inside | expected |\n"
              "|---|---|---|---|---|---|---|---|", flush=True)
        measure(photos, size=args.size, fits=args.fits, splits=args.splits, held_out=args.held_out, rate=args.rate)


if __name__ == "__main__":
    main()
