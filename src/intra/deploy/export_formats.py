"""A detector as a graph, in ONNX's and OpenVINO's formats and in fewer bits.

The graph calls what the Detector calls, `repair`, `anomaly_map` and `image_score`, so that neither knows the scoring
twice. Only what is hidden is decided beforehand, for no shape in a graph may depend on a value.
"""

import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from intra.data.images import to_unit
from intra.deploy.exported import METADATA_KEY, OUTPUTS, extra_installed, openvino_core
from intra.errors import InTraError
from intra.geometry import touched_patches
from intra.inspection.anomaly import anomaly_map, evidence_kinds, image_score
from intra.inspection.detector import Detector, repair
from intra.inspection.inpaint import Hiding

if TYPE_CHECKING:
    import onnx

__all__ = ["Format", "InspectionGraph", "Precision", "in_int8", "to_onnx", "with_fp16_weights", "write_graph"]

Format = Literal["onnx", "openvino"]
Precision = Literal["fp32", "fp16", "int8"]

OPSET = 20  # the exporter's own: the first with GELU as one node
LEAST_SHARED = 256  # values of a weight that is stored in fewer bits: smaller ones, and biases, save nothing
LARGEST_FP16 = 65504.0
LARGEST_FILE = 2**31 - 1  # bytes: protobuf's limit
SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes of which module a node comes
PRODUCTS = {"Conv", "Gemm", "MatMul"}  # that can be computed in int8
HALVED = PRODUCTS | {"ConvTranspose"}  # whose weights can be stored in fp16
# What int8 spoils of the transformer: where pixels come in and go out (RIAD's last layer has the same name),
# convolutions of one channel each, and what follows GELU, few of whose values are large.
NOT_IN_INT8 = ("'model.patch_embed'", "'model.head'", "'model.pos_convs.", ".mlp.2'")


class InspectionGraph(nn.Module):
    """Photos and a threshold in, everything that a verdict needs out; of a detector on the CPU."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.model = detector.model
        self.model_config = detector.config.model
        self.scoring = replace(detector.config.scoring, precision="fp32")
        self.kinds = evidence_kinds(self.scoring, has_segmenter=self.model_config.segmenter_width > 0)
        self.distribution, self.reference = detector.distribution, detector.reference
        self.region = detector.region
        wanted = touched_patches(self.region.inside, self.model_config.patch_size) if self.region else None
        self.hiding = Hiding.of(self.model_config, self.scoring.lattice, wanted)

    def forward(
        self, photos: UInt8[Tensor, "b h w c"], threshold: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, "b h w c"], Float[Tensor, "b h w"], Float[Tensor, " b"], Bool[Tensor, " b"]]:
        """Repaired images (about [0, 1], not clamped), anomaly maps, scores, and which are above the threshold."""
        images = to_unit(photos.permute(0, 3, 1, 2))  # (B, C, H, W)
        repaired, evidence = repair(self.model, images, model_config=self.model_config, scoring=self.scoring,
                                    kinds=self.kinds, distribution=self.distribution, hiding=self.hiding,
                                    region=self.region)
        maps = anomaly_map(evidence, self.reference, kinds=self.kinds, scoring=self.scoring,
                           inside=self.region.inside if self.region else None)
        scores = image_score(maps)
        return repaired.permute(0, 2, 3, 1), maps, scores, scores > threshold


def to_onnx(detector: Detector) -> "onnx.ModelProto":
    """The graph in fp32 for any number of photos; both inputs must be given. Raises InTraError without the extra."""
    with extra_installed():
        import onnx  # noqa: F401  the exporter's own message about it is long
        import onnxscript  # noqa: F401
    graph = InspectionGraph(detector).eval()
    config = detector.config.model
    photos = torch.zeros(2, *config.image_size, config.channels, dtype=torch.uint8)  # one would be taken for always one
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            graph, (photos, torch.tensor(0.0)), dynamo=True, input_names=["photos", "threshold"],
            output_names=list(OUTPUTS), dynamic_shapes=({0: torch.export.Dim("batch")}, None), opset_version=OPSET,
            external_data=False, verbose=False,
        )  # fmt: skip
    assert program is not None, "dynamo returns a program"
    return program.model_proto


def with_fp16_weights(proto: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph with the larger weights of the networks' products stored in half the bits; the arithmetic stays fp32.

    The others keep all bits: rounded, the mean image, from which a network starts, would show in every repaired image,
    and with fp16 whitening the maps differ by 3 % of their range.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.ModelProto()
    graph.CopyFrom(proto)
    of_products = {name for node in proto.graph.node if _of_a_network(node) and node.op_type in HALVED
                   for name in node.input}
    casts = []
    for weight in graph.graph.initializer:
        if weight.data_type != onnx.TensorProto.FLOAT or weight.name not in of_products:
            continue
        values = numpy_helper.to_array(weight)
        if values.ndim < 2 or values.size < LEAST_SHARED or np.abs(values).max() > LARGEST_FP16:
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}_fp16"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}_fp16"], [name], to=onnx.TensorProto.FLOAT))
    if not casts:
        raise InTraError("this model has no weight of a network to store in fp16; export it with --precision fp32")
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    return graph


def in_int8(proto: "onnx.ModelProto", photos: list[np.ndarray]) -> "onnx.ModelProto":
    """The graph with the networks' products of 8 bits, their ranges from good photos, each (H, W, C) of uint8.

    Distribution, differences and maps stay fp32: they divide small differences by small spreads. So do those products
    of the transformer that gain little in 8 bits and lose much: docs/decisions/0012-export.md
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(photos)

        def get_next(self) -> dict[str, np.ndarray] | None:
            photo = next(self.left, None)
            return None if photo is None else {"photos": photo[None], "threshold": np.array(0, np.float32)}

    weights = {weight.name for weight in proto.graph.initializer}
    chosen = [node.name for node in proto.graph.node
              if node.op_type in PRODUCTS and weights & set(node.input) and _of_a_network(node)
              and not any(part in _scopes(node) for part in NOT_IN_INT8)]
    if not chosen:
        raise InTraError("this model has no product of a network to compute in int8; export it with --precision fp32")
    graph = onnx.ModelProto()
    graph.CopyFrom(proto)  # it moves the weights out of the one it gets
    with tempfile.TemporaryDirectory() as folder, _quiet():
        target = Path(folder) / "int8.onnx"
        # weights of 7 bits: two products of 8 bits overflow the sums of CPUs without VNNI
        quantize_static(graph, target, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_quantize=chosen)
        return onnx.load(target)


def write_graph(proto: "onnx.ModelProto", file: Path, *, header: str, threshold: float) -> None:
    """Writes FILE.onnx, or FILE.xml and FILE.bin, with what they say of themselves.

    ONNX stores the threshold as the default of its input; OpenVINO knows no default, there it must be given.
    """
    if file.suffix == ".onnx":
        import onnx
        from onnx import numpy_helper

        graph = onnx.ModelProto()
        graph.CopyFrom(proto)
        graph.graph.initializer.append(numpy_helper.from_array(np.array(threshold, np.float32), "threshold"))
        graph.metadata_props.add(key=METADATA_KEY, value=header)
        if graph.ByteSize() > LARGEST_FILE:
            raise InTraError("the model is larger than 2 GiB, more than one ONNX file may hold; export it to OpenVINO")
        file.write_bytes(graph.SerializeToString())
        return
    model = openvino_core().read_model(io.BytesIO(proto.SerializeToString()))  # unlike convert_model it reports nothing
    model.set_rt_info(header, METADATA_KEY)
    import openvino

    openvino.save_model(model, file, compress_to_fp16=False)  # of itself it would


def _of_a_network(node: "onnx.NodeProto") -> bool:
    """Whether a node comes from the model's modules."""
    return "'model." in _scopes(node) or "'model'" in _scopes(node)


def _scopes(node: "onnx.NodeProto") -> str:
    return next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print progress and warn of what does not concern the user."""
    loggers = logging.getLogger("torch.onnx"), logging.getLogger()  # the quantization warns through the root
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
