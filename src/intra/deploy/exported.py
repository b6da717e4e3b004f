"""An exported model behind the Detector's own interface: ONNX Runtime or OpenVINO computes, all else is shared.

The graph takes photos (B, H, W, C) of uint8 at the model's own size and a threshold, and gives the repaired images
(B, H, W, C), the anomaly maps (B, H, W), the scores and which are above the threshold. What else the Detector needs to
know, config, calibration, provenance, what tells a change of the setup and the region of interest, travels in the file
as JSON, and a checksum of the whole: docs/decisions/0012-export.md
"""

import base64
import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from
from safetensors.torch import save as bytes_of
from torch import Tensor, nn

from intra.config import Config
from intra.errors import InTraError
from intra.inspection.anomaly import Reference
from intra.inspection.calibration import Threshold, moved_threshold
from intra.inspection.detector import Detector
from intra.inspection.model_file import REGION_TENSORS, SETUP_TENSORS, stored_region, stored_setup
from intra.inspection.region import Region
from intra.inspection.setup import Setup

if TYPE_CHECKING:
    import openvino

__all__ = ["EXPORT_VERSION", "METADATA_KEY", "OUTPUTS", "ExportedDetector", "extra_installed", "header_text",
           "load_exported", "openvino_core", "seal"]

EXPORT_VERSION = 1  # of inputs, outputs and header; other versions are refused
METADATA_KEY = "intra"  # of ONNX's metadata_props and OpenVINO's rt_info
OUTPUTS = ("repaired", "anomaly_map", "score", "is_anomalous")
LEVELS = 255  # of a pixel: the graph takes 8 bits
SEAL = re.compile(rb"intra-sha256-[0-9a-f]{64}")  # the checksum, where no format escapes or compresses it
OPEN_SEAL = "intra-sha256-" + 64 * "0"  # what stands there while the checksum is taken


@runtime_checkable
class Graph(Protocol):
    """A graph that a runtime has loaded."""

    metadata: str | None  # what the file says of itself under METADATA_KEY

    def run(self, photos: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
        """The outputs by name, for photos (B, H, W, C) of uint8."""


class ExportedDetector(Detector):
    """A detector whose arithmetic runs in ONNX Runtime or OpenVINO. Photos of more than 8 bits are rounded to 8."""

    def __init__(
        self, graph: Graph, config: Config, *, held_out_scores: list[float], provenance: dict[str, Any],
        export: dict[str, Any], threshold: Threshold, setup: Setup | None, region: Region | None = None,
    ) -> None:  # fmt: skip
        in_the_graph = Reference(torch.zeros(0, *config.model.image_size), None)
        super().__init__(nn.Identity(), config, reference=in_the_graph, held_out_scores=held_out_scores,
                         provenance=provenance, setup=setup, region=region, threshold=threshold, device="cpu")
        self.graph = graph
        self.export = export

    def repaired(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """The repaired images alone; the graph makes the maps in any case."""
        return self.inspect(images)[0]

    def inspect(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b h w"]]:
        """The repaired images and the anomaly maps of images in [0, 1], of the model's own size."""
        photos = (images * LEVELS).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        found = self.graph.run(photos, self.threshold)
        return (torch.from_numpy(found["repaired"]).permute(0, 3, 1, 2).contiguous(),
                torch.from_numpy(found["anomaly_map"]))

    @property
    def info(self) -> dict[str, Any]:
        """All that the file says of itself, fit for JSON; under "export" what it was exported to, and how it differs
        from the model that it was made of. It is no model file, and has no format version.
        """
        return {key: value for key, value in super().info.items() if key != "format_version"} | {"export": self.export}

    def save(self, path: str | Path) -> None:
        """An exported model holds no weights to save: raises InTraError."""
        raise InTraError(f"an exported model cannot be saved as {path}; copy its own file, or export its run again")


def load_exported(
    file: Path, *, device: str = "auto", threshold: float | None = None, false_reject_rate: float | None = None
) -> ExportedDetector:
    """The detector in a file that `intra export` wrote; `Detector.load` comes here.

    Raises InTraError if it is missing, damaged, none of intra's or of another version, if its runtime is not
    installed, or for a device other than the CPU.
    """
    if not file.is_file():
        raise InTraError(f"no exported model at {file}; make one with `intra export`")
    if device not in ("auto", "cpu"):
        raise InTraError(f"device is {device!r}; an exported model runs on the CPU here: pass --device cpu, or load "
                         "the run that it was made of")
    graph: Graph = _OnnxGraph(file) if file.suffix.lower() == ".onnx" else _OpenVinoGraph(file)
    header, packed = _header(file, graph.metadata)
    if not _is_intact(file):
        raise InTraError(f"{file} is damaged: its content does not match its checksum; export or copy it again")
    try:
        config = Config.from_dict(header["config"])
        config.check_grid()
        scores = [float(score) for score in header["calibration"]["held_out_scores"]]
        stored = Threshold(**header["calibration"]["threshold"])
        provenance, export = dict(header["provenance"]), dict(header["export"])
        tensors = {name: part for each in packed for name, part in tensors_from(base64.b64decode(each)).items()}
        region = stored_region(config, tensors)
        setup = stored_setup(config, tensors, header["calibration"]["setup_scores"])
        is_finite = all(math.isfinite(number) for number in (stored.value, *scores))
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        raise InTraError(f"{file} does not hold what its header says ({error}); export or copy it again") from error
    if not is_finite:
        raise InTraError(f"{file} has a threshold or a score that is no number; export or copy it again")
    chosen = moved_threshold(stored, scores, threshold=threshold, false_reject_rate=false_reject_rate)
    return ExportedDetector(graph, config, held_out_scores=scores, provenance=provenance, export=export,
                            threshold=chosen, setup=setup, region=region)


def header_text(info: dict[str, Any], setup: Setup | None, region: Region | None) -> str:
    """What an exported model says of itself; `seal` the file that it was put in."""
    envelope = {"export_version": EXPORT_VERSION, "seal": OPEN_SEAL, "header": info,
                "setup": _packed("setup", setup, SETUP_TENSORS) if setup else None}
    if region:
        envelope["roi"] = _packed("roi", region, REGION_TENSORS)
    return json.dumps(envelope, sort_keys=True)


def _packed(prefix: str, record: Setup | Region, names: tuple[str, ...]) -> str:
    parts = {f"{prefix}.{name}": getattr(record, name).cpu().contiguous() for name in names}
    return base64.b64encode(bytes_of(parts)).decode()


def seal(file: Path) -> None:
    """Puts the checksum of an exported model, its .bin included, into its header: a .bin of another export, or a bit
    that has changed, would give other scores and no error.
    """
    content, count = SEAL.subn(OPEN_SEAL.encode(), file.read_bytes())
    assert count == 1, "one header"
    file.write_bytes(content.replace(OPEN_SEAL.encode(), _seal_of(content, file)))


def _is_intact(file: Path) -> bool:
    content = file.read_bytes()
    stated = SEAL.search(content)
    return stated is not None and stated[0] == _seal_of(SEAL.sub(OPEN_SEAL.encode(), content), file)


def _seal_of(content: bytes, file: Path) -> bytes:
    digest = hashlib.sha256(content)
    weights = file.with_suffix(".bin")
    if file.suffix.lower() == ".xml" and weights.is_file():
        with weights.open("rb") as opened:
            hashlib.file_digest(opened, lambda: digest)
    return f"intra-sha256-{digest.hexdigest()}".encode()


def _header(file: Path, metadata: str | None) -> tuple[dict[str, Any], list[str]]:
    """Config, calibration and provenance; and the tensors of setup and region, where there are such. Raises InTraError
    where a file has none, or another version's.
    """
    if metadata is None:
        raise InTraError(f"{file} is no model of intra's; make one with `intra export`")
    try:
        envelope = json.loads(metadata)
        export_version, header = envelope["export_version"], dict(envelope["header"])
        packed = [part for part in (envelope["setup"], envelope.get("roi")) if part is not None]
    except (KeyError, TypeError, ValueError) as error:
        raise InTraError(f"{file} is damaged: its header cannot be read ({error}); export or copy it again") from error
    if export_version != EXPORT_VERSION:
        raise InTraError(f"{file} has export version {export_version}; this intra reads version {EXPORT_VERSION}; "
                         "export its run again")
    return header, packed


@contextmanager
def extra_installed() -> Iterator[None]:
    """Turns the lack of a package into one sentence that says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InTraError(f"{error.name} is not installed; exported models need: pip install 'intra-ad[export]'"
                         ) from error


class _OnnxGraph:
    def __init__(self, file: Path) -> None:
        with extra_installed():
            import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors; it warns that the threshold, an input with a default, can be moved
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its own exceptions have no common base but this
            raise _damaged(file, error) from error
        self.metadata: str | None = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)

    def run(self, photos: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
        given = {"photos": photos, "threshold": np.array(threshold, np.float32)}
        return dict(zip(OUTPUTS, self._session.run(OUTPUTS, given), strict=True))


class _OpenVinoGraph:
    def __init__(self, file: Path) -> None:
        core = openvino_core()
        # fp32 products on every machine: of themselves they would be bf16 on some, and the scores others
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY",
                    "INFERENCE_PRECISION_HINT": "f32"}
        try:
            model = core.read_model(file)
            known = model.has_rt_info(METADATA_KEY)
            self.metadata: str | None = str(model.get_rt_info(METADATA_KEY).value) if known else None
            self._compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise _damaged(file, error) from error

    def run(self, photos: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
        request = self._compiled.create_infer_request()  # its own, so that threads may share the model
        found = request.infer({"photos": photos, "threshold": np.array(threshold, np.float32)})
        return {name: np.array(found[name]) for name in OUTPUTS}


@cache
def openvino_core() -> "openvino.Core":
    """The process's only one, never freed: on processors with AMX each gives the thread a stack for signals of its own,
    and of two that are freed in the order of their making the second leaves one that is no more; the next Ctrl-C then
    ends the process with a segmentation fault (OpenVINO 2026.4).
    """
    with extra_installed():
        import openvino
    return openvino.Core()


def _damaged(file: Path, error: Exception) -> InTraError:
    reason = (str(error).strip().splitlines() or ["?"])[0]
    return InTraError(f"{file} is damaged or no model that its runtime reads ({reason}); export or copy it again")
