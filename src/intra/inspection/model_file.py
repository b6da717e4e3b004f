"""The model file: what is in it, and that it is what it says. Nothing is ever unpickled."""

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from intra.config import Config
from intra.data.files import write_atomically
from intra.errors import InTraError
from intra.inspection.anomaly import Reference, evidence_kinds
from intra.inspection.distribution import CellDistribution, PatchDistribution
from intra.inspection.features import FEATURES_OF_A_FILTER, PatchFeatures, cell_grids
from intra.inspection.fine import FineDistribution, fine_size
from intra.inspection.kinds import CellKinds
from intra.inspection.region import Region, cells_of
from intra.inspection.setup import Setup

__all__ = ["DISTRIBUTION_TENSORS", "FINE_TENSORS", "FORMAT_VERSION", "KINDS_TENSORS", "MODEL_FILE", "REGION_TENSORS",
           "SETUP_TENSORS", "check_content", "content_digest", "model_file", "read_model", "stored_distribution",
           "stored_region", "stored_setup", "write_model"]

FORMAT_VERSION = 9  # other versions are refused
MODEL_FILE = "model.safetensors"
# of each scale, grid and description
DISTRIBUTION_TENSORS = tuple(each.name for each in fields(CellDistribution) if each.name != "kinds")
KINDS_TENSORS = tuple(each.name for each in fields(CellKinds))  # likewise, where all places share a distribution
FINE_TENSORS = tuple(each.name for each in fields(FineDistribution))
SETUP_TENSORS = ("mean", "centre", "spread")
REGION_TENSORS = ("inside", "fill")


def model_file(path: Path) -> Path:
    """The model file of a run's folder, or the file itself. Raises InTraError if it is not there."""
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        raise InTraError(f"no model at {file}; expected a run's folder or a {MODEL_FILE}; train one with `intra train`")
    return file


def read_model(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a model file. Nothing is unpickled. Raises InTraError that names what is wrong."""
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = (opened.metadata() or {}).get("intra")
            if metadata is None:
                raise InTraError(f"{file} is a safetensors file, but no model of intra")
            envelope = json.loads(metadata)
            version = envelope["format_version"]
            if version != FORMAT_VERSION:
                raise InTraError(f"{file} has format version {version}; this intra reads version {FORMAT_VERSION}; "
                                 "use the intra that wrote it, or train again")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no mapping
            header = json.loads(envelope["header"])
            is_whole = content_digest(envelope["header"], tensors) == envelope.get("sha256")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, InTraError):
            raise
        raise InTraError(f"{file} is damaged or no model of intra ({error}); train or copy it again") from error
    if not is_whole:
        raise InTraError(f"{file} is damaged: its content does not match its checksum; train or copy it again")
    return header, tensors


def write_model(file: Path, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes what `read_model` reads, whole or not at all."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    header = json.dumps(info, sort_keys=True)
    envelope = {"header": header, "sha256": content_digest(header, tensors), "format_version": FORMAT_VERSION}
    write_atomically(file, save(tensors, metadata={"intra": json.dumps(envelope)}))


def stored_region(config: Config, tensors: dict[str, Tensor]) -> Region | None:
    """Takes the region of interest out of a model file's tensors: there is one if the config has a box. Raises
    ValueError where it does not fit the config.
    """
    if config.data.box is None:
        return None
    inside, fill = (tensors.pop(f"roi.{name}") for name in REGION_TENSORS)
    size = config.model.image_size
    if inside.shape != size or fill.shape != (config.model.channels, *size) or (
            inside.dtype != torch.bool or fill.dtype != torch.uint8 or not inside.any()):
        raise ValueError("a region of interest that is empty, or of another size than the image")
    return Region(inside, fill)


def stored_distribution(
    config: Config, tensors: dict[str, Tensor], region: Region | None, places: object
) -> PatchDistribution | None:
    """Takes the distribution out of a model file's tensors. Raises ValueError where it does not fit the config, or the
    `places` that it is said to be of.
    """
    scoring, model = config.scoring, config.model
    if not scoring.distribution_weight:
        return None
    grids = cell_grids(model.image_size, scoring.cell_sizes)
    cells = cells_of(region, grids)
    counts = [rows * cols for rows, cols in grids] if cells is None else [len(each.kept) for each in cells]
    if places not in ("own", "shared") or scoring.places not in (places, "auto"):
        raise ValueError(f"a distribution of {places!r} places, {scoring.places!r} in its config")
    filters = [tensors.pop(f"distribution.filters.{index}") for index, _ in enumerate(scoring.distribution_scales)]
    parts: list[CellDistribution] = []
    for each, num_cells, num_features in itertools.product(filters, counts, FEATURES_OF_A_FILTER):
        width = num_features * len(each)
        mean, std, modes, whitening = (
            tensors.pop(f"distribution.{len(parts)}.{name}") for name in DISTRIBUTION_TENSORS)
        part = CellDistribution(mean, std, modes, whitening,
                                _stored_kinds(len(parts), width, tensors) if places == "shared" else None)
        if part.mean.shape != (num_cells, width) or part.whitening.shape != (num_cells, width, width) or (
                part.std.shape != (width,) or part.modes.ndim != 3 or part.modes.shape[:2] != (num_cells, width) or
                each.ndim != 4 or each.shape[1] != model.channels):
            raise ValueError("a distribution of another size than the image's")
        if not _are_sound([each, part.mean, part.std, part.modes, part.whitening]) or not (part.std > 0).all():
            raise ValueError("a distribution with numbers that are not finite, or not fp32")
        parts.append(part)
    describe = PatchFeatures(scoring.distribution_scales, grids, tuple(filters), cells, scoring.pixel_evidence)
    return PatchDistribution(describe, tuple(parts), _stored_fine(config, tensors) if scoring.pixel_evidence else None)


def _stored_kinds(index: int, width: int, tensors: dict[str, Tensor]) -> CellKinds:
    kinds = CellKinds(*(tensors.pop(f"distribution.{index}.kinds.{name}") for name in KINDS_TENSORS))
    count = len(kinds.log_weight)
    if not count or kinds.whitening.shape != (count, width, width) or kinds.offset.shape != (count, width) or (
            kinds.log_weight.ndim != 1):
        raise ValueError("kinds of cells of another size than the distribution's")
    if not _are_sound([kinds.whitening, kinds.offset, kinds.log_weight]):
        raise ValueError("kinds of cells with numbers that are not finite, or not fp32")
    return kinds


def _stored_fine(config: Config, tensors: dict[str, Tensor]) -> FineDistribution:
    fine = FineDistribution(*(tensors.pop(f"distribution.fine.{name}") for name in FINE_TENSORS))
    if fine.mean.shape != fine_size(config.model.image_size) or fine.spread.shape != fine.mean.shape:
        raise ValueError("a fine distribution of another size than the image's")
    if not _are_sound([fine.mean, fine.spread]) or not (fine.spread > 0).all():
        raise ValueError("a fine distribution with numbers that are not finite, not fp32, or not above 0")
    return fine


def stored_setup(config: Config, tensors: dict[str, Tensor], scores: Sequence[float] | None) -> Setup | None:
    """Takes the setup's reference out of a model file's tensors. Raises ValueError where it does not fit the config."""
    if scores is None:
        return None
    mean, centre, spread = (tensors.pop(f"setup.{name}") for name in SETUP_TENSORS)
    if not _are_sound([mean, centre, spread]) or not all(
            isinstance(score, float) and math.isfinite(score) for score in scores):
        raise ValueError("a setup with numbers that are not finite, or not fp32")
    setup = Setup(mean, centre, spread, tuple(scores))
    if not scores or not setup.fits(config.model.image_size, config.model.channels) or not (spread > 0).all():
        raise ValueError("a setup of another size than the image's")
    return setup


def check_content(
    config: Config, tensors: dict[str, Tensor], reference: Reference, numbers: Sequence[object], provenance: object
) -> None:
    """Raises ValueError where a file, whole as it is, cannot be the model that its header describes."""
    depth = sum(name.startswith("model.blocks.") and name.endswith(".norm1.weight") for name in tensors)
    if config.model.network == "intra" and depth != config.model.depth:  # before a network of that depth is built
        raise ValueError(f"depth {config.model.depth}, but {depth} blocks")
    kinds = evidence_kinds(config.scoring, has_segmenter=config.model.segmenter_width > 0)
    expected = {"mean": (len(kinds), *config.model.image_size), "spread": config.model.image_size,
                "tails": (len(kinds), 2)}
    parts = {name: part for name in expected if (part := getattr(reference, name)) is not None}
    if any(part.shape != expected[name] for name, part in parts.items()):
        raise ValueError("reference maps of another number or size than the image's")
    if ("tails" in parts) != (len(kinds) > 1):
        raise ValueError(f"{len(kinds)} kinds of evidence, {'with' if 'tails' in parts else 'without'} their tails")
    counters = [tensors[name] for name in tensors if name.endswith(".num_batches_tracked")]
    numbers_of_net = [tensors[name] for name in tensors if not name.endswith(".num_batches_tracked")]
    if any(counter.dtype != torch.int64 for counter in counters) or not _are_sound([*parts.values(), *numbers_of_net]):
        raise ValueError("numbers that are not finite, or not fp32")
    if not all(isinstance(number, float) and math.isfinite(number) for number in numbers):
        raise ValueError("a threshold or a score that is no number")
    if not isinstance(provenance, dict):
        raise TypeError("no provenance")


def _are_sound(tensors: Sequence[Tensor]) -> bool:
    """Whether all are fp32 and finite."""
    return all(each.dtype == torch.float32 and bool(each.isfinite().all()) for each in tensors)


def content_digest(header: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the header and all tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
