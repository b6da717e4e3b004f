"""Verdicts on test images and ground truth → results.json, report.html and maps/."""

import io
import itertools
import json
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from scipy import ndimage

import intra
from intra.data.files import remove_leftovers, sha256_of, write_atomically
from intra.data.folder import Category, LabelledImage, find_category
from intra.data.images import read_image, read_mask
from intra.errors import InTraError
from intra.evaluation import metrics
from intra.evaluation.notes import notes_on_tests, notes_on_the_region, notes_on_the_setup
from intra.evaluation.report import Curves, Gallery, write_report
from intra.inspection.detector import Detector, Prediction
from intra.provenance import processor

__all__ = ["evaluate", "evaluate_category", "peak_memory_mib"]

IMAGES_PER_BATCH = 8  # decoded at a time; bounds the memory

Progress = Callable[[int, int], None]  # images done, images in all


def evaluate(
    run: str | Path | Detector,
    data: str | Path,
    *,
    out: str | Path,
    normal: str | Path | None = None,
    anomalous: str | Path | None = None,
    masks: str | Path | None = None,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """The figures of a model on the test images of one category, as they stand in `out`/results.json.

    Also writes `out`/report.html, and `out`/maps/DEFECT/NAME.tiff: the raw anomaly maps at the images' own size, 32-bit
    float, where MVTec's official evaluation script looks for them.

    Args:
        run: a run's folder, a model file, or a detector.
        data: a category in MVTec's layout; or a plain folder, with `normal`, `anomalous` and `masks` as folders in it.
        on_progress: called with the number of images that are done and of all, after each batch.

    Raises InTraError if there is nothing to test, a file cannot be read, or a mask does not fit its image.
    """
    category = find_category(data, normal=normal, anomalous=anomalous, masks=masks)
    detector = run if isinstance(run, Detector) else Detector.load(run, device=device)
    return evaluate_category(detector, category, out=out, on_progress=on_progress)


def evaluate_category(
    detector: Detector, category: Category, *, out: str | Path, save_maps: bool = True,
    on_progress: Progress | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Like `evaluate`, for a category that is already found; without `save_maps` it writes no maps/.

    `seconds_per_image` is wall time from the decoded image to its verdict, without the first batch if there are
    several. Pixel metrics count every test image, good ones without any defect; defective ones without a mask are left
    out, and so is all that lies outside the model's region of interest. Good test images whose very file was trained
    on, or carries the threshold, test nothing: they are left out of everything and counted in `num_left_out`. `reasons`
    says why a metric is null, `notes` what else to know.
    """
    out = Path(out)
    tests, left_out = _not_trained_on(category, detector)
    if not tests:
        which = "test images that the model was not trained on" if left_out else "test images"
        raise InTraError(f"{category.root} has no {which}; expected test/good and test/DEFECT, or for a plain folder "
                         "--anomalous FOLDER, with unseen good images in its sub-folder good")
    maps = out / "maps" if save_maps else None
    for folder in (out, *(out / "maps").glob("*")):
        remove_leftovers(folder)
    inspected = _inspect(detector, tests, root=category.root, maps=maps, on_progress=on_progress)
    figures, reasons, curves = _figures(inspected, detector.threshold)
    results = {
        "category": category.name,
        **figures,
        "threshold": detector.threshold,
        "seconds_per_image": inspected.seconds_per_image,
        "num_train": _num_train(detector),
        "num_test": len(tests),
        "num_left_out": len(left_out),
        "reasons": reasons,
        "notes": [*notes_on_tests(tests, left_out), *notes_on_the_region(inspected.region_px),
                  *notes_on_the_setup(inspected.rows)],
        "model": _model_record(detector),
        "provenance": _provenance(detector),
        "peak_memory_mib": peak_memory_mib(),
        "images": inspected.rows,
    }
    text = json.dumps(results, indent=2, allow_nan=False)
    write_atomically(out / "results.json", text + "\n")
    write_report(out / "report.html", results, inspected.gallery, curves)
    return dict(json.loads(text))  # a tuple is a list there


@dataclass
class _Inspected:
    """What the inspection of all test images has left for the figures and the report."""

    gallery: Gallery
    rows: list[dict[str, Any]] = field(default_factory=list)  # as in results.json
    maps: list[np.ndarray] = field(default_factory=list)  # of the images that count in pixel metrics, or parts of them
    masks: list[np.ndarray] = field(default_factory=list)
    map_defects: list[str | None] = field(default_factory=list)  # None: a good image
    region_px: Counter[str] = field(default_factory=Counter)  # of photos and defects, and inside; empty: no region
    batch_seconds: list[tuple[float, int]] = field(default_factory=list)  # wall time, images

    @property
    def seconds_per_image(self) -> float:
        """Without the first batch, which warms up, if there are several."""
        counted = self.batch_seconds[1:] or self.batch_seconds
        return sum(seconds for seconds, _ in counted) / sum(images for _, images in counted)

    @property
    def where(self) -> str:
        """Which pixels count in pixel metrics, for a reason."""
        return " inside the region" if self.region_px else ""

    def add_pixels(
        self, anomaly_map: np.ndarray, truth: np.ndarray, inside: np.ndarray | None, defect: str | None
    ) -> None:
        """For the pixel metrics: the image, or of a region its good pixels in a row, and each defect's in another."""
        parts = [(anomaly_map, truth)]
        if inside is not None:
            self.region_px.update({"defect": int(truth.sum()), "defect inside": int(truth[inside].sum())})
            defects, count = ndimage.label(truth & inside, structure=metrics.TOUCHING)
            rows = [anomaly_map[inside & (defects == number)][None] for number in range(count + 1)]
            parts = [(row, np.full(row.shape, number > 0)) for number, row in enumerate(rows)]
        for values, mask in parts:
            self.maps.append(values)
            self.masks.append(mask)
            self.map_defects.append(defect)


def _inspect(
    detector: Detector, tests: Sequence[LabelledImage], *, root: Path, maps: Path | None, on_progress: Progress | None
) -> _Inspected:
    """Decodes each image once, batch by batch; keeps maps in memory only if there are masks to hold them against."""
    inspected, saved = _Inspected(gallery=Gallery(predict=detector.predict)), set[Path]()
    keep_maps = any(test.mask for test in tests)
    for batch in _batches(tests):
        images = [read_image(test.path) for test in batch]
        start = time.perf_counter()
        predictions = detector.predict_batch(images, repair_twice=False)
        inspected.batch_seconds.append((time.perf_counter() - start, len(batch)))
        for test, image, prediction in zip(batch, images, predictions, strict=True):
            truth = _truth(test, image)
            path = test.path.relative_to(root) if test.path.is_relative_to(root) else test.path
            inspected.rows.append({"path": path.as_posix(), "defect": test.defect, "label": int(test.label),
                                   "score": prediction.score, "p_value": prediction.p_value,
                                   "is_anomalous": prediction.is_anomalous, "setup_alarm": prediction.setup_alarm,
                                   "setup_reason": prediction.setup_reason})
            inspected.gallery.add(image, prediction, path=path.as_posix(), defect=test.defect, label=test.label,
                                  truth=truth)
            if maps is not None:
                _save_map(prediction, test, maps, saved)
            inside = detector.inside((image.shape[0], image.shape[1]))
            if inside is not None:
                inspected.region_px.update({"photo": inside.size, "inside": int(inside.sum())})
            if keep_maps and truth is not None:
                inspected.add_pixels(prediction.anomaly_map, truth, inside, test.defect if test.label else None)
        if on_progress is not None:
            on_progress(len(inspected.rows), len(tests))
    return inspected


def _batches(tests: Sequence[LabelledImage]) -> Iterator[Sequence[LabelledImage]]:
    for start in range(0, len(tests), IMAGES_PER_BATCH):
        yield tests[start : start + IMAGES_PER_BATCH]


def _truth(test: LabelledImage, image: np.ndarray) -> np.ndarray | None:
    """Where the image is defective: nowhere if it is good, None if nobody has marked it."""
    size = image.shape[:2]
    if not test.label:
        return np.zeros(size, dtype=bool)
    if test.mask is None:
        return None
    mask = read_mask(test.mask)
    if mask.shape != size:
        raise InTraError(f"{test.mask} is {mask.shape[0]}x{mask.shape[1]} px, but its image {test.path} is "
                         f"{size[0]}x{size[1]} px; a mask must have the size of its image")
    return mask


def _save_map(prediction: Prediction, test: LabelledImage, folder: Path, saved: set[Path]) -> None:
    """Writes the raw map as folder/DEFECT/STEM.tiff, or NAME.tiff where two images share a stem."""
    path = folder / test.defect / f"{test.path.stem}.tiff"
    if path in saved:
        path = path.with_name(f"{test.path.name}.tiff")
    for number in itertools.count(2):
        if path not in saved:
            break
        path = path.with_name(f"{test.path.name}-{number}.tiff")
    saved.add(path)
    buffer = io.BytesIO()
    PIL.Image.fromarray(prediction.anomaly_map).save(buffer, format="TIFF")  # mode F: 32-bit float, not compressed
    write_atomically(path, buffer.getvalue())


def _figures(inspected: _Inspected, threshold: float) -> tuple[dict[str, Any], dict[str, str | None], Curves]:
    """All metrics by their keys in results.json, why some are None, and the curves."""
    scores = np.array([row["score"] for row in inspected.rows], dtype=np.float64)
    labels = np.array([bool(row["label"]) for row in inspected.rows])
    defects = np.array([row["defect"] for row in inspected.rows])
    figures: dict[str, Any] = {
        "image_auroc": metrics.auroc(scores, labels),
        "image_ap": metrics.average_precision(scores, labels),
        "image_f1_max": metrics.f1_max(scores, labels),
    }
    curve = metrics.pixel_curve(inspected.maps, inspected.masks)
    figures |= _pixel_figures(curve)
    figures["false_reject_rate"] = metrics.false_reject_rate(scores, labels, threshold)
    figures["recall"] = metrics.recall(scores, labels, threshold)
    reasons = {key: _no_pixel_metric(inspected, labels) if key.startswith("pixel") else metrics.missing_class(labels)
               for key, value in figures.items() if value is None}

    figures["per_defect"] = {}
    for name in sorted(set(defects[labels].tolist())):
        row = _defect_figures(name, inspected, scores, labels, defects == name, threshold)
        figures["per_defect"][name] = row
        unmarked = f"none of its images has a marked pixel{inspected.where}"
        reasons |= {f"per_defect.{name}.{key}": unmarked if key.startswith("pixel") else metrics.missing_class(labels)
                    for key, value in row.items() if value is None}
    return figures, reasons, Curves(
        image_roc=metrics.roc_curve(scores, labels),
        pixel_roc=None if curve is None else curve.roc_points(),
        pro=None if curve is None else curve.pro_points(),
    )


def _defect_figures(
    name: str, inspected: _Inspected, scores: metrics.Scores, labels: metrics.Labels, named: metrics.Labels,
    threshold: float,
) -> dict[str, Any]:  # fmt: skip
    """The metrics of one kind of defect against all good images."""
    of_this = labels & named
    subset = of_this | ~labels
    own = [i for i, defect in enumerate(inspected.map_defects) if defect in (None, name)]
    curve = metrics.pixel_curve([inspected.maps[i] for i in own], [inspected.masks[i] for i in own])
    return {
        "num": int(of_this.sum()),
        "recall": metrics.recall(scores[subset], labels[subset], threshold),
        "image_auroc": metrics.auroc(scores[subset], labels[subset]),
        **_pixel_figures(curve),
    }


def _pixel_figures(curve: metrics.PixelCurve | None) -> dict[str, float | None]:
    if curve is None:
        return {"pixel_auroc": None, "pixel_ap": None, "pixel_aupro": None}
    return {"pixel_auroc": curve.auroc(), "pixel_ap": curve.average_precision(), "pixel_aupro": curve.aupro()}


def _no_pixel_metric(inspected: _Inspected, labels: metrics.Labels) -> str:
    if not labels.any():
        return "no anomalous test images"
    if not any(defect is not None for defect in inspected.map_defects):
        return f"none of the {int(labels.sum())} anomalous test images has a mask"
    marked = any(mask.any() for mask in inspected.masks)
    return f"{'every' if marked else 'no'} pixel{inspected.where} is marked as defective"


def _not_trained_on(category: Category, detector: Detector) -> tuple[list[LabelledImage], list[LabelledImage]]:
    """The test images, and the good ones among them whose very file the model has seen: those test nothing."""
    provenance = detector.info["provenance"]
    known = {*provenance.get("training_images", {}).values(),
             *provenance.get("calibrated", {}).get("images", {}).values()}
    tests: list[LabelledImage] = []
    left_out: list[LabelledImage] = []
    for test in category.test:
        seen = not test.label and sha256_of(test.path) in known
        (left_out if seen else tests).append(test)
    return tests, left_out


def _num_train(detector: Detector) -> int:
    provenance = detector.info["provenance"]
    return int(provenance.get("num_train", len(provenance.get("training_images", {}))))


def _model_record(detector: Detector) -> dict[str, Any]:
    """What the model says of itself, without its list of training files."""
    info = dict(detector.info)
    lists = ("training_images", "images")
    info["provenance"] = {
        key: {name: part for name, part in value.items() if name not in lists} if isinstance(value, dict) else value
        for key, value in info["provenance"].items() if key not in lists}
    return info


def _provenance(detector: Detector) -> dict[str, Any]:
    device = detector.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"intra": intra.__version__, "python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__},
        "hardware": {"device": device.type, "device_name": name, "threads": torch.get_num_threads(),
                     "system": f"{platform.system()} {platform.machine()}"},
    }  # fmt: skip


def peak_memory_mib() -> float | None:
    """The most memory that this process has held so far; None where the system does not count it (Windows)."""
    status = Path("/proc/self/status")  # Linux; getrusage there also counts what the process held that started this one
    if status.is_file():
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    try:
        import resource
    except ImportError:
        return None
    unit = 1024**2 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
