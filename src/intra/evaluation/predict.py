"""Verdicts on files: predictions.jsonl and, if wanted, pictures."""

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from intra.data.files import write_atomically
from intra.data.images import encode_png, read_image
from intra.data.layout import image_files
from intra.errors import InTraError
from intra.evaluation.pictures import heatmap_overlay, outline, to_rgb8
from intra.inspection.detector import Detector, Prediction

__all__ = ["PICTURES_FOLDER", "FileVerdict", "predict_files", "save_pictures"]

PREDICTIONS_FILE = "predictions.jsonl"
PICTURES_FOLDER = "images"
KINDS = "overlay", "outline", "repaired", "mask"  # of pictures there


@dataclass(frozen=True)
class FileVerdict:
    """What became of one file."""

    path: Path
    prediction: Prediction | None
    error: str | None  # why it could not be inspected


def predict_files(
    detector: Detector,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    save_images: bool = False,
    on_verdict: Callable[[FileVerdict, int, int], None] | None = None,
) -> list[Path]:
    """Inspects files and folders; returns the paths of the files that could not be read.

    Writes a line of `out`/predictions.jsonl for each, as soon as it is known: path, verdict, score, p_value,
    is_anomalous, threshold, setup_alarm, setup_reason, defects; or path and error. With `save_images` also
    `out`/images/NAME_overlay.png, _outline.png, _repaired.png and _mask.png. `on_verdict` is called with each verdict,
    how many are done, and how many there are. Raises InTraError if there is no image.
    """
    out = Path(out)
    own = (out / PICTURES_FOLDER).resolve()
    files = [path for path in image_files(images)
             if path.resolve().parent != own or not path.stem.endswith(tuple(f"_{kind}" for kind in KINDS))]
    if not files:
        raise InTraError(f"{own} holds nothing but pictures of earlier verdicts; pass photos")
    names = _unique_names(files)
    unreadable = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        with (out / PREDICTIONS_FILE).open("w", encoding="utf-8") as record:
            for done, (path, name) in enumerate(zip(files, names, strict=True), start=1):
                verdict = _inspect(detector, path, out / PICTURES_FOLDER / name if save_images else None)
                if verdict.error is not None:
                    unreadable.append(path)
                record.write(json.dumps(_line(verdict)) + "\n")
                record.flush()
                if on_verdict:
                    on_verdict(verdict, done, len(files))
            os.fsync(record.fileno())
    except OSError as error:
        raise InTraError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from error
    return unreadable


def save_pictures(image: Shaped[np.ndarray, "h w c"], prediction: Prediction, place: Path) -> None:
    """Writes `place`_overlay.png, _outline.png, _repaired.png and _mask.png, each whole or not at all."""
    for kind, picture in zip(KINDS, (
        heatmap_overlay(image, prediction.anomaly_map, prediction.threshold), outline(image, prediction.mask),
        to_rgb8(prediction.repaired), prediction.mask.astype(np.uint8) * 255), strict=True):
        write_atomically(place.with_name(f"{place.name}_{kind}.png"), encode_png(picture))


def _inspect(detector: Detector, path: Path, pictures: Path | None) -> FileVerdict:
    try:
        image = read_image(path)
        prediction = detector.predict(image, repair_twice=pictures is not None)
    except InTraError as error:
        return FileVerdict(path, None, str(error))
    if pictures is not None:
        save_pictures(image, prediction, pictures)
    return FileVerdict(path, prediction, None)


def _line(verdict: FileVerdict) -> dict[str, object]:
    if verdict.prediction is None:
        return {"path": str(verdict.path), "error": verdict.error}
    found = verdict.prediction
    return {"path": str(verdict.path), "verdict": found.verdict, "score": found.score, "p_value": found.p_value,
            "is_anomalous": found.is_anomalous, "threshold": found.threshold, "setup_alarm": found.setup_alarm,
            "setup_reason": found.setup_reason, "defects": [asdict(defect) for defect in found.defects]}


def _unique_names(files: Sequence[Path]) -> list[str]:
    """A name for each file's pictures: its stem, with its folder or a number where that is not unique."""
    names: list[str] = []
    taken: set[str] = set()
    counters: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(2))  # goes on where it was
    for path in files:
        numbered = (f"{path.stem}_{number}" for number in counters[path.stem])
        choices = itertools.chain((path.stem, f"{path.parent.name}_{path.stem}"), numbered)
        name = next(choice for choice in choices if choice not in taken)
        taken.add(name)
        names.append(name)
    return names
