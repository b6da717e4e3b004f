"""A trained model → one file for ONNX Runtime or OpenVINO, written only if it gives the same maps on real photos.

What it may differ by is stated in TOLERANCES; what it does differ by is measured before the file is there, and travels
in its header. docs/decisions/0012-export.md
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import intra
from intra.config import Config, ModelConfig
from intra.data.demo import DEFECTS, demo_photo
from intra.data.files import write_atomically
from intra.data.folder import Category, LabelledImage, find_category
from intra.data.images import prepare, read_image, to_unit
from intra.deploy.export_formats import Format, Precision, in_int8, to_onnx, with_fp16_weights, write_graph
from intra.deploy.exported import header_text, load_exported, seal
from intra.errors import InTraError
from intra.evaluation import metrics
from intra.inspection.anomaly import image_score
from intra.inspection.detector import Detector

if TYPE_CHECKING:
    import onnx

__all__ = ["SUFFIXES", "TOLERANCES", "Exported", "Parity", "ParityError", "Tolerance", "export", "parity"]

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "openvino": ".xml"}
BATCHES = (1, 3, 8)  # in which the photos are compared in turn: a graph that fits one number of photos would fail
NUM_COMPARED = 24  # photos, good and defective; labelled ones beyond that only for the AUROC
NUM_CALIBRATED = 32  # good photos from which int8 takes its ranges
LEAST_RANGE = 1e-6  # of the maps, where all of them are flat


@dataclass(frozen=True)
class Tolerance:
    """What an exported model may differ by; map differences are shares of the range of the maps of all photos."""

    largest: float  # difference at any pixel
    mean: float  # difference over all pixels
    auroc_loss: float  # of the image AUROC, where labelled photos are given


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(largest=1e-3, mean=1e-4, auroc_loss=0.001),
    "fp16": Tolerance(largest=1e-2, mean=1e-3, auroc_loss=0.005),
    "int8": Tolerance(largest=0.3, mean=3e-2, auroc_loss=0.01),
}


@dataclass(frozen=True)
class Parity:
    """How an exported model differs from the model that it was made of."""

    num_photos: int
    photos: str  # where they are from
    largest_difference: float  # of the maps, as a share of their range
    mean_difference: float
    largest_repaired_difference: float  # of the repaired images in [0, 1]
    largest_score_difference: float  # as a share of the range of the maps
    num_labelled: int  # photos for the image AUROC
    image_auroc: float | None  # of the exported model; None: no labelled photos of both kinds
    image_auroc_before: float | None  # of the model that it was made of

    def problems(self, tolerance: Tolerance) -> list[str]:
        """What is beyond the tolerance, a number that is none included."""
        found = []
        for name, value, limit in (("largest", self.largest_difference, tolerance.largest),
                                   ("mean", self.mean_difference, tolerance.mean)):
            if not value <= limit:
                found.append(f"the {name} difference of the maps is {value:.2g} of their range, the limit {limit:.2g}")
        if self.image_auroc is not None and self.image_auroc_before is not None and not (
                self.image_auroc_before - self.image_auroc <= tolerance.auroc_loss):
            found.append(f"the image AUROC falls from {self.image_auroc_before:.4f} to {self.image_auroc:.4f}, the "
                         f"limit is {tolerance.auroc_loss:g}")
        return found


class ParityError(RuntimeError):
    """The exported model differs by more than its tolerance; no file was written."""


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how it was checked."""

    path: Path
    size_mib: float  # of all its files
    parity: Parity


def export(
    run: str | Path | Detector, out: str | Path, *, format: Format, precision: Precision = "fp32",
    data: str | Path | None = None, normal: str | Path | None = None,
) -> Exported:  # fmt: skip
    """Writes a model as `out`, .onnx or .xml (beside which lies its .bin): whole, and only if it passes the check.

    Args:
        run: a run's folder, a model file, or a detector.
        precision: "fp32"; "fp16": the networks' weights in half the bits; "int8": the networks' products in 8 bits.
        data: photos as for `train`, on which maps are compared; good ones also calibrate int8, and labelled ones (a
            category with tests) give the AUROC before and after. Without, the built-in photos are compared.

    Raises ParityError if the maps differ by more than TOLERANCES say, InTraError on anything that the user can mend.
    """
    target = Path(out)
    if format not in get_args(Format) or precision not in get_args(Precision):
        raise InTraError(f"format is {format!r} and precision {precision!r}; expected one of "
                         f"{', '.join(get_args(Format))} and one of {', '.join(get_args(Precision))}")
    if target.suffix != SUFFIXES[format]:
        raise InTraError(f"{target} is no name for a model in {format}; it must end in {SUFFIXES[format]}")
    if precision == "int8" and data is None:
        raise InTraError("int8 takes its ranges from good photos; pass --data PHOTOS")
    category = None if data is None else find_category(data, normal=normal)
    detector = run if isinstance(run, Detector) else Detector.load(run, device="cpu")
    if detector.device.type != "cpu" or "export" in detector.info:
        raise InTraError("only a run's own model can be exported, on the CPU; pass the run's folder")
    photos, labelled = _photos(detector.config, category)
    proto = _in_precision(to_onnx(detector), precision, category, detector.config)
    record = {"format": format, "precision": precision, "tolerance": asdict(TOLERANCES[precision]),
              "versions": _versions(format)}
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / target.name
        _write(proto, trial, detector, record)
        found = parity(_in_fp32(detector), load_exported(trial, device="cpu"), photos, labelled,
                       named=category.root.name if category else "built-in")
        if problems := found.problems(TOLERANCES[precision]):
            raise ParityError(f"{target} was not written: in {precision} {'; '.join(problems)}")
        _write(proto, trial, detector, record | {"parity": asdict(found)})
        return Exported(target, _move(trial, target) / 2**20, found)


def parity(
    detector: Detector, exported: Detector, photos: Sequence[Tensor], labelled: Sequence[tuple[Tensor, int]] = (), *,
    named: str = "",
) -> Parity:  # fmt: skip
    """How two detectors differ on photos (C, H, W) of their size, and on labelled ones (1: defective) by AUROC."""
    assert photos, "nothing to compare"
    (repaired, maps), (other_repaired, other_maps) = (_inspected(each, photos) for each in (detector, exported))
    extent = max(float(maps.max() - maps.min()), LEAST_RANGE)
    away = (maps - other_maps).abs()
    labels = np.array([label == 1 for _, label in labelled], dtype=bool)
    scores, other_scores = (
        np.array([score for image, _ in labelled for score in image_score(each.inspect(to_unit(image)[None])[1])])
        for each in (detector, exported))
    return Parity(
        num_photos=len(photos), photos=named, largest_difference=float(away.max()) / extent,
        mean_difference=float(away.mean()) / extent,
        largest_repaired_difference=float((repaired - other_repaired).abs().max()),
        largest_score_difference=float((image_score(maps) - image_score(other_maps)).abs().max()) / extent,
        num_labelled=len(labelled), image_auroc=metrics.auroc(other_scores, labels) if labelled else None,
        image_auroc_before=metrics.auroc(scores, labels) if labelled else None,
    )  # fmt: skip


def _in_fp32(detector: Detector) -> Detector:
    """The detector as every graph computes. On a processor with bf16 its own products may be rounded, by more than what
    an export may differ.
    """
    return Detector(detector.model, detector.config.with_settings({"scoring.precision": "fp32"}),
                    reference=detector.reference, held_out_scores=detector.held_out_scores,
                    provenance=detector.provenance, distribution=detector.distribution, setup=detector.setup,
                    region=detector.region, threshold=detector.calibration, device="cpu")


def _in_precision(
    proto: "onnx.ModelProto", precision: Precision, category: Category | None, config: Config
) -> "onnx.ModelProto":
    if precision == "fp16":
        return with_fp16_weights(proto)
    if precision == "int8":
        assert category is not None
        good = [category.train[index] for index in _spread(len(category.train), NUM_CALIBRATED)]
        pixels = [(to_unit(image) * 255).round().to(torch.uint8) for image in _prepared(good, config)]
        return in_int8(proto, [photo.permute(1, 2, 0).contiguous().numpy() for photo in pixels])
    return proto


def _write(proto: "onnx.ModelProto", file: Path, detector: Detector, record: dict[str, Any]) -> None:
    text = header_text(detector.info | {"export": record}, detector.setup, detector.region)
    write_graph(proto, file, header=text, threshold=detector.threshold)
    seal(file)


def _inspected(detector: Detector, photos: Sequence[Tensor]) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n h w"]]:
    """Repaired images and maps of all photos, in batches of different sizes."""
    repaired, maps, start, turn = [], [], 0, 0
    while start < len(photos):
        stop = start + BATCHES[turn % len(BATCHES)]
        parts = detector.inspect(torch.stack([to_unit(photo) for photo in photos[start:stop]]))
        repaired.append(parts[0])
        maps.append(parts[1])
        start, turn = stop, turn + 1
    return torch.cat(repaired), torch.cat(maps)


def _photos(config: Config, category: Category | None) -> tuple[list[Tensor], list[tuple[Tensor, int]]]:
    """Photos to compare maps on, and labelled ones for the AUROC."""
    if category is None:
        return _built_in(config.model), []
    tests: Sequence[LabelledImage] = category.test
    paths = list(dict.fromkeys([*category.train, *(test.path for test in tests)]))
    compared = _prepared([paths[index] for index in _spread(len(paths), NUM_COMPARED)], config)
    if len({test.label for test in tests}) < 2:
        return compared, []
    return compared, list(zip(_prepared([test.path for test in tests], config), (test.label for test in tests),
                              strict=True))


def _built_in(config: ModelConfig) -> list[Tensor]:
    """Good and defective photos, made by code."""
    if config.channels not in (1, 3):
        raise InTraError(f"the model takes {config.channels} channels, the built-in photos have 3; pass --data PHOTOS")
    kinds = [(name, f"test/{defect}") for name, defects in DEFECTS.items() for defect in ("good", *defects)]
    pictures = [demo_photo(name, kind, 0, size_px=max(48, *config.image_size))[0] for name, kind in kinds]
    return [prepare(np.asarray(picture), size=config.image_size, channels=config.channels) for picture in pictures]


def _prepared(paths: Sequence[Path], config: Config) -> list[Tensor]:
    return [prepare(read_image(path), size=config.model.image_size, channels=config.model.channels, box=config.data.box)
            for path in paths]


def _spread(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, evenly spaced."""
    return sorted({round(index) for index in np.linspace(0, count - 1, min(count, most))})


def _versions(format: Format) -> dict[str, str]:
    names = ("torch", "onnx", "onnxscript", "onnxruntime" if format == "onnx" else "openvino")
    return {"intra": intra.__version__} | {name: version(name) for name in names}


def _move(trial: Path, target: Path) -> int:
    """Puts the checked files in their place, the one that is named last; their size in bytes."""
    total = 0
    for suffix in (".bin", target.suffix):
        source = trial.with_suffix(suffix)
        if source.exists():
            content = source.read_bytes()
            write_atomically(target.with_suffix(suffix), content)
            total += len(content)
    return total
