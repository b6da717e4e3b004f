"""The threshold of a trained model from new good images, without training."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import intra
from intra.data.files import listed, sha256_of
from intra.data.images import UnreadableError, pixels_digest, prepare, read_image, to_unit
from intra.data.layout import image_files
from intra.errors import InTraError
from intra.inspection.calibration import Threshold, choose_threshold
from intra.inspection.detector import IMAGES_PER_BATCH, Detector, refuse_exported
from intra.inspection.model_file import MODEL_FILE
from intra.inspection.setup import LEAST_GOOD, Setup

__all__ = ["Recalibrated", "calibrate"]



@dataclass(frozen=True)
class Recalibrated:
    """What came of new good images."""

    model_path: Path
    threshold: Threshold
    duplicates: tuple[tuple[Path, Path], ...]  # the same picture as an earlier one: counted once
    setup_alarms: Counter[str]  # reasons for which the new images raised the setup alarm as it was before
    setup_refitted: bool  # there were enough images for an alarm of their own


def calibrate(
    run: str | Path, images: Sequence[str | Path], *, out: str | Path, false_reject_rate: float | None = None,
    device: str = "auto", on_progress: Callable[[int, int], None] | None = None,
) -> Recalibrated:  # fmt: skip
    """Scores new good images with a stored model and writes the model with their threshold to another file.

    Weights, distribution, means and tails stay as they are: none of them has seen the new images, so these are as any
    image to come, and the promise of the new threshold is exact. The setup alarm is fitted to the new images if there
    are at least LEAST_GOOD.

    Args:
        run: the folder of the run, or its model file.
        images: files, and folders of them; all of good parts, none trained on.
        out: a file NAME.safetensors, or a folder that gets a model.safetensors.
        false_reject_rate: None: the one that the stored threshold was asked for.
        on_progress: called with the number of images that are done, and of all.

    Raises InTraError if an image was trained on or cannot be read, `out` is the stored model itself, or `run` an
    exported one.
    """
    refuse_exported(run)
    target = Path(out) if Path(out).suffix == ".safetensors" else Path(out) / MODEL_FILE
    if target.resolve() in (Path(run).resolve(), (Path(run) / MODEL_FILE).resolve()):
        raise InTraError(f"{target} holds the model to start from; choose another --out")
    detector = Detector.load(run, device=device)
    files = image_files(images)
    hashes = {path: sha256_of(path) for path in files}
    _refuse_trained_on(detector, hashes)
    pictures, duplicates = _distinct(files)
    scores: list[float] = []
    prepared: list[torch.Tensor] = []
    alarms: Counter[str] = Counter()
    size, channels = detector.config.model.image_size, detector.config.model.channels
    box = detector.config.data.box
    for start in range(0, len(pictures), IMAGES_PER_BATCH):
        arrays = [read_image(path) for path in pictures[start : start + IMAGES_PER_BATCH]]
        for found in detector.predictions(arrays, repair_twice=False):
            scores.append(found.score)
            alarms.update([found.setup_reason] if found.setup_alarm else [])
        prepared += [prepare(array, size=size, channels=channels, box=box) for array in arrays]
        if on_progress:
            on_progress(len(scores), len(pictures))
    rate = detector.calibration.asked_rate if false_reject_rate is None else false_reject_rate
    threshold = choose_threshold(scores, rate)
    is_enough = len(prepared) >= LEAST_GOOD
    record = {"created": datetime.now(UTC).isoformat(timespec="seconds"), "intra": intra.__version__,
              "false_reject_rate": rate, "num_images": len(scores), "setup_refitted": is_enough,
              "images": {str(path): hashes[path] for path in pictures}}
    Detector(
        detector.model, detector.config, reference=detector.reference, held_out_scores=scores,
        provenance=detector.provenance | {"calibrated": record}, distribution=detector.distribution,
        setup=Setup.of(_stacked(prepared)) if is_enough else detector.setup, region=detector.region,
        threshold=threshold, device=device,
    ).save(target)  # fmt: skip
    return Recalibrated(target, threshold, duplicates, alarms, is_enough)


def _refuse_trained_on(detector: Detector, hashes: dict[Path, str]) -> None:
    known = set(detector.provenance.get("training_images", {}).values())
    seen = [str(path) for path, digest in hashes.items() if digest in known]
    if seen:
        raise InTraError(f"{len(seen)} of {len(hashes)} images were there when the model was trained, so it knows them "
                         f"too well for a threshold: {listed(seen)}; give good images that it has not seen")


def _distinct(files: Sequence[Path]) -> tuple[list[Path], tuple[tuple[Path, Path], ...]]:
    """Each picture once, and which files are the same picture as an earlier one: counted twice, it would promise more
    than there is. Raises InTraError that names the unreadable ones.
    """
    first: dict[bytes, Path] = {}
    duplicates, unreadable = [], []
    for path in files:
        try:
            digest = pixels_digest(read_image(path))
        except UnreadableError as error:
            unreadable.append(f"{path} ({error.reason})")
            continue
        if first.setdefault(digest, path) != path:
            duplicates.append((path, first[digest]))
    if unreadable:
        raise InTraError(f"{len(unreadable)} of {len(files)} images cannot be read: {listed(unreadable)}; replace or "
                         "remove them")
    return list(first.values()), tuple(duplicates)


def _stacked(prepared: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images in one tensor; uint8 beside float becomes float."""
    if all(image.dtype == torch.uint8 for image in prepared):
        return torch.stack(list(prepared))
    return torch.stack([to_unit(image) for image in prepared])
