"""A trained network and its good images → a detector: reference, distribution, threshold and setup alarm."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from intra.config import Config
from intra.data.images import to_unit
from intra.inspection.anomaly import Evidence, evidence_kinds
from intra.inspection.calibration import calibrate
from intra.inspection.detector import Detector, repair
from intra.inspection.device import OutOfMemoryError, in_chunks, is_out_of_memory
from intra.inspection.distribution import GoodPatches, PatchDistribution
from intra.inspection.features import PatchFeatures
from intra.inspection.region import Region
from intra.inspection.setup import LEAST_GOOD, Setup
from intra.training.engine import IMAGES_PER_CHUNK

__all__ = ["calibrated"]

_log = logging.getLogger(__name__)


def calibrated(
    model: nn.Module, config: Config, training: Shaped[Tensor, "n c h w"], validation: Shaped[Tensor, "m c h w"],
    provenance: dict[str, Any], device: torch.device, on_calibration: Callable[[int, int], None] | None,
    region: Region | None = None,
) -> Detector:  # fmt: skip
    """The detector with what good images are like, and its threshold, from training and held-out images.

    Args:
        training, validation: as they were read, also outside a region of interest: there the setup alarm looks too.
        on_calibration: called with the number of good images inspected so far, and of all.

    Where a GPU's memory does not suffice, all of it runs on the CPU. Raises OutOfMemoryError if that has too little.
    """
    try:
        return _calibrated(model, config, training, validation, provenance, device, on_calibration, region)
    except (MemoryError, RuntimeError, OutOfMemoryError) as error:
        if not is_out_of_memory(error) or (isinstance(error, OutOfMemoryError) and device.type == "cpu"):
            raise
        if device.type == "cpu":
            raise OutOfMemoryError("the memory does not suffice to look at all good images; close other programs and "
                                   "go on with --resume, or train anew with a smaller --image-size or "
                                   "scoring.max_reference_images") from error
        _log.warning("the memory of %s does not suffice to look at the good images; the CPU does it, in more time",
                     device)
    torch.cuda.empty_cache()  # only here, behind the except: the error itself holds on to tensors
    return calibrated(model, config, training.cpu(), validation.cpu(), provenance, torch.device("cpu"), on_calibration,
                      region and region.to(torch.device("cpu")))


def _calibrated(
    model: nn.Module, config: Config, training: Shaped[Tensor, "n c h w"], validation: Shaped[Tensor, "m c h w"],
    provenance: dict[str, Any], device: torch.device, on_calibration: Callable[[int, int], None] | None,
    region: Region | None,
) -> Detector:  # fmt: skip
    model = model.to(device).eval()
    scoring = config.scoring
    kinds = evidence_kinds(scoring, has_segmenter=config.model.segmenter_width > 0)
    shown, shown_held_out = (images if region is None else region.shown(images) for images in (training, validation))
    describe = (PatchFeatures.of(shown, scoring=scoring, seed=provenance["seed"], region=region)
                if "distribution" in kinds else None)
    (trained_on, seen), (held_out, unseen) = _examined(model, config, shown, shown_held_out, kinds, describe,
                                                       on_calibration, region)
    good = (GoodPatches(describe, seen, num_modes=scoring.num_modes, places=scoring.places, seed=provenance["seed"])
            .settled(unseen) if describe else None)

    def fitted(places: list[int]) -> PatchDistribution | None:
        """The distribution, held against the held-out images at these places."""
        return good.fitted([each[..., places] for each in unseen]) if good else None

    def evidence(distribution: PatchDistribution | None) -> Tensor:
        """Of the held-out images; the distribution's as the last."""
        if distribution is None:
            return held_out
        found = distribution.evidence_of(unseen, config.model.image_size).cpu()
        return torch.cat([held_out, found[:, None]], dim=1)

    distribution = fitted(list(range(len(held_out))))
    reference, scores = calibrate(evidence(distribution), trained_on if scoring.reference == "training" else None,
                                  kinds=kinds, scoring=scoring,
                                  refit=(lambda places: evidence(fitted(places))) if good else None,
                                  inside=region.inside.cpu() if region else None)
    # the network has no part in it: training images count too
    is_enough = len(training) + len(validation) >= LEAST_GOOD
    setup = Setup.of(training, validation) if is_enough else None
    return Detector(model, config, reference=reference, held_out_scores=scores, provenance=provenance,
                    distribution=distribution, setup=setup, region=region, device=str(device))


def _examined(
    model: nn.Module, config: Config, training: Shaped[Tensor, "n c h w"], validation: Shaped[Tensor, "m c h w"],
    kinds: Sequence[Evidence], describe: PatchFeatures | None, on_calibration: Callable[[int, int], None] | None,
    region: Region | None,
) -> tuple[tuple[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]:  # fmt: skip
    """Of training and of held-out images the evidence without the distribution's, and the distribution's features."""
    scoring = config.scoring
    learns = describe is not None or scoring.reference == "training"
    count = min(len(training), scoring.max_reference_images or len(training)) if learns else 0
    chosen = torch.linspace(0, len(training) - 1, count).round().long()
    total = count + len(validation)

    def examined(images: Tensor, num_before: int) -> tuple[Tensor, list[Tensor]]:
        found = [torch.zeros(0, len(kinds) - (describe is not None), *images.shape[-2:])]
        features: list[Tensor] = []
        start = 0
        for photos, repaired, evidence in _inspected(model, config, kinds, on_calibration, images, num_before, total,
                                                     region):
            found.append(evidence.cpu())
            parts = describe(photos, repaired) if describe else []
            features = features or [part.new_empty(*part.shape[:2], len(images)) for part in parts]  # GB: no copy
            for whole, part in zip(features, parts, strict=True):
                whole[..., start : start + len(photos)] = part
            start += len(photos)
        return torch.cat(found), features

    return examined(training[chosen.to(training.device)], 0), examined(validation, count)


def _inspected(
    model: nn.Module, config: Config, kinds: Sequence[Evidence], on_calibration: Callable[[int, int], None] | None,
    images: Shaped[Tensor, "n c h w"], num_before: int, total: int, region: Region | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Chunk by chunk the photos, their repaired images, and all evidence but the distribution's. Tells of progress."""

    def work(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        photos = to_unit(images[start:stop])
        return photos, *repair(model, photos, model_config=config.model, scoring=config.scoring, kinds=kinds,
                               region=region)

    for chunk in in_chunks(work, len(images), IMAGES_PER_CHUNK):
        num_before += len(chunk[0])
        yield chunk
        if on_calibration:
            on_calibration(num_before, total)
