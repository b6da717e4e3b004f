"""Exported models: the same verdicts as the model that they were made of, or no file."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TINY
from torch import nn

from intra import cli
from intra.deploy import export as export_module
from intra.deploy import exported
from intra.deploy.export import TOLERANCES, ParityError, Tolerance, export, parity
from intra.deploy.export_formats import SCOPES, InspectionGraph, _scopes, in_int8, to_onnx, with_fp16_weights
from intra.deploy.exported import METADATA_KEY, OUTPUTS, ExportedDetector, seal
from intra.errors import InTraError
from intra.inspection.detector import Detector
from intra.training.run import train

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
EXAMPLE = Path(__file__).parents[2] / "examples" / "run_onnx.py"


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Tracing takes seconds: the same model's graph is made once. Every test gets a copy of its own."""
    graphs: dict[str, bytes] = {}

    def traced(detector):
        key = json.dumps(detector.info)
        if key not in graphs:
            graphs[key] = to_onnx(detector).SerializeToString()
        return onnx.load_from_string(graphs[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "to_onnx", traced)
        yield traced


@pytest.fixture(scope="module")
def tests(photos) -> list[Path]:
    return sorted((photos / "gear" / "test").rglob("*.png"))


@pytest.fixture(scope="module")
def files(run, photos, traced_once, tmp_path_factory) -> dict[str, Path]:
    """The gear's model in both formats, checked on its own photos."""
    folder = tmp_path_factory.mktemp("exported")
    names = {"onnx": folder / "gear.onnx", "openvino": folder / "gear.xml"}
    for name, file in names.items():
        export(run.path, file, format=name, data=photos / "gear")
    return names


def test_a_model_that_inspects_in_bf16_is_compared_in_fp32(run, photos, tmp_path):
    rounded = Detector.load(run.path)
    config = rounded.config.with_settings({"scoring.precision": "bf16"})
    rounded = Detector(rounded.model, config, reference=rounded.reference, held_out_scores=rounded.held_out_scores,
                       provenance=rounded.provenance, distribution=rounded.distribution, setup=rounded.setup)
    found = export(rounded, tmp_path / "gear.onnx", format="onnx", data=photos / "gear").parity
    assert found.largest_difference <= TOLERANCES["fp32"].largest
    exported = Detector.load(tmp_path / "gear.onnx")
    assert exported.config == config
    own = parity(rounded, exported, [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))])
    assert own.largest_difference > TOLERANCES["fp32"].largest  # what the check must not hold the graph to


def test_a_signal_after_openvino_models_have_come_and_gone(files):
    script = f"""
import os, signal
from intra.inspection.detector import Detector
file = {str(files["openvino"])!r}
first = Detector.load(file)
second = Detector.load(file)
del first
del second
reached = []
signal.signal(signal.SIGINT, lambda *_: reached.append(1))
os.kill(os.getpid(), signal.SIGINT)
assert reached
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def equal(one, other) -> bool:
    extent = max(1e-6, float(np.ptp(other.anomaly_map)))
    return (
        abs(one.score - other.score) < 1e-3 * extent
        and one.is_anomalous == other.is_anomalous
        and np.abs(one.anomaly_map - other.anomaly_map).max() < 1e-3 * extent
        and np.abs(one.repaired.astype(int) - other.repaired.astype(int)).max() <= 1
        and one.p_value == other.p_value
        and (one.setup_alarm, one.setup_reason) == (other.setup_alarm, other.setup_reason)
    )


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_exported_is_torch_in_any_batch(run, files, tests, name):
    detector, exported = Detector.load(run.path), Detector.load(files[name])
    assert isinstance(exported, ExportedDetector)
    assert exported.threshold == detector.threshold
    assert exported.held_out_scores == detector.held_out_scores
    expected = detector.predict_batch(tests)
    for size in (1, 3, 8):
        for path, found, known in zip(tests, exported.predict_batch(tests[:size]), expected, strict=False):
            assert equal(found, known), path
            assert [d.top for d in found.defects] == [d.top for d in known.defects]


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_a_change_of_the_setup_is_told(run, files, photos, name):
    """By the same good photos, which travel in the file."""
    exported = Detector.load(files[name])
    assert exported.setup.scores == Detector.load(run.path).setup.scores
    with PIL.Image.open(photos / "gear/test/good/000.png") as picture:
        dark = (np.asarray(picture) * 0.6).astype(np.uint8)
    found = exported.predict(dark)
    assert (found.setup_alarm, found.setup_reason) == (True, "darker")
    assert not exported.predict(picture.filename).setup_alarm
    assert found.p_value == pytest.approx(1 / (1 + len(exported.held_out_scores)))


def grey_with_a_window(folder: Path) -> Path:
    """The paper's kind of model, squared difference and mean read-out, from the mean image, on grey photos that are not
    square.
    """
    rng = np.random.default_rng(0)
    for number in range(12):
        picture = np.kron(rng.integers(0, 255, (5, 6)), np.ones((8, 8))).astype(np.uint8)
        PIL.Image.fromarray(picture).save(folder / f"{number}.png")
    settings = {name: value for name, value in TINY.items() if name != "model.segmenter_width"} | {
        "model.window_size": "3", "model.depth": "1", "model.mean_start": "on", "train.windows_per_image": "8",
        "train.batch_size": "32"}
    return train(folder, folder / "run", preset="paper", steps=1, image_size="40x48", settings=settings).path


def test_the_papers_kind_of_model_is_exported_too(tmp_path):
    folder = grey_with_a_window(tmp_path)
    found = export(folder, tmp_path / "model.onnx", format="onnx", data=tmp_path)
    assert found.parity.largest_difference <= TOLERANCES["fp32"].largest
    pictures = sorted(tmp_path.glob("*.png"))[:3]
    pairs = zip(Detector.load(tmp_path / "model.onnx").predict_batch(pictures),
                Detector.load(folder).predict_batch(pictures), strict=True)
    assert all(equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("places", ["own", "shared"])
def test_grids_that_do_not_divide_are_exported_too(photos, tmp_path, places):
    """10 x 12 small cells, 2 x 3 large ones."""
    settings = TINY | {"model.segmenter_width": "0", "model.depth": "1", "model.mean_start": "on",
                       "scoring.places": places}
    run = train(photos / "gear", tmp_path / "run", preset="fast", steps=1, image_size="80x96", settings=settings)
    for name, suffix in (("onnx", ".onnx"), ("openvino", ".xml")):
        found = export(run.path, (tmp_path / "gear").with_suffix(suffix), format=name, data=photos / "gear")
        assert found.parity.largest_difference <= TOLERANCES["fp32"].largest


@pytest.mark.parametrize(("preset", "settings"), [
    ("fast", TINY | {"model.segmenter_width": "0", "model.depth": "2", "model.mean_start": "on",
                     "scoring.difference_weight": "1"}),
    ("fast", TINY | {"model.segmenter_width": "0", "model.depth": "1", "scoring.places": "shared"}),
    ("riad", {"model.base_width": "4", "scoring.precision": "fp32"}),
    ("autoencoder_l2", {"model.latent_dim": "8", "scoring.precision": "fp32"}),
], ids=["no segmenter", "shared places", "riad", "autoencoder"])  # fmt: skip
def test_every_models_graph_is_its_detector(photos, tmp_path, preset, settings):
    folder = train(photos / "gear", tmp_path / "run", preset=preset, steps=1, image_size=64, settings=settings).path
    detector = Detector.load(folder)
    pixels = torch.randint(0, 256, (3, 64, 64, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    repaired, maps = detector.inspect(pixels.permute(0, 3, 1, 2) / 255)
    with torch.no_grad():
        found = InspectionGraph(detector)(pixels, torch.tensor(0.0))
    assert torch.allclose(found[0].permute(0, 3, 1, 2), repaired, atol=1e-5)
    assert torch.allclose(found[1], maps, atol=1e-4 * float(maps.max() - maps.min()))


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_the_threshold_moves(files, tests, name):
    exported = Detector.load(files[name])
    score = exported.predict(tests[0]).score
    assert not Detector.load(files[name], threshold=score + 1).predict(tests[0]).is_anomalous
    assert Detector.load(files[name], threshold=score - 1).predict(tests[0]).is_anomalous
    strict = Detector.load(files[name], false_reject_rate=0.5)
    assert strict.calibration.false_reject_rate <= 0.5
    with pytest.raises(InTraError, match="not both"):
        Detector.load(files[name], threshold=1.0, false_reject_rate=0.5)


def test_the_threshold_of_the_graph_is_an_input_with_the_stored_default(run, files):
    session = onnxruntime.InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])
    photos = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3)).astype(np.uint8)
    score, stored = session.run(["score", "is_anomalous"], {"photos": photos})
    assert np.array_equal(stored, score > np.float32(Detector.load(run.path).threshold))
    between = np.sort(score)[:2].mean(keepdims=True).astype(np.float32)
    (moved,) = session.run(["is_anomalous"], {"photos": photos, "threshold": between.reshape(())})
    assert sorted(moved) == [False, True, True]


def test_the_file_says_what_it_is(run, files):
    for file in files.values():
        info = Detector.load(file).info
        assert info["config"] == Detector.load(run.path).info["config"]
        assert info["provenance"] == Detector.load(run.path).provenance
        checked = info["export"]["parity"]
        assert checked["num_photos"] == 24
        assert checked["largest_difference"] <= info["export"]["tolerance"]["largest"] == 1e-3
        assert checked["image_auroc"] == pytest.approx(checked["image_auroc_before"], abs=1e-3)


def test_half_the_bits_of_the_networks_weights(run, files, photos, tmp_path):
    layers = [each for each in Detector.load(run.path).model.modules() if isinstance(each, (nn.Linear, nn.Conv2d))]
    halved = sum(2 * each.weight.numel() for each in layers if each.weight.numel() >= 256)  # bytes
    for name, suffix in (("onnx", ".onnx"), ("openvino", ".bin")):
        file = tmp_path / files[name].name
        found = export(run.path, file, format=name, precision="fp16", data=photos / "gear")
        assert found.parity.largest_difference <= TOLERANCES["fp16"].largest
        sizes = [path.with_suffix(suffix).stat().st_size for path in (file, files[name])]
        assert sizes[1] - sizes[0] > 0.9 * halved


def test_int8_is_measured_on_labelled_photos_or_refused(run, photos, tmp_path, monkeypatch):
    """A hardly trained model may lose too much in 8 bits; a file is only there if it is within the limits."""
    limits = TOLERANCES["int8"]
    monkeypatch.setitem(TOLERANCES, "int8", Tolerance(1.0, 1.0, 1.0))
    found = export(run.path, tmp_path / "gear.onnx", format="onnx", precision="int8", data=photos / "gear").parity
    assert found.largest_repaired_difference < 0.1
    assert found.image_auroc is not None
    assert "QuantizeLinear" in {each.op_type for each in onnx.load(tmp_path / "gear.onnx").graph.node}
    monkeypatch.setitem(TOLERANCES, "int8", limits)
    again = tmp_path / "again.onnx"
    if found.problems(limits):
        with pytest.raises(ParityError, match="int8"):
            export(run.path, again, format="onnx", precision="int8", data=photos / "gear")
    else:
        assert found.image_auroc_before - found.image_auroc <= limits.auroc_loss
        export(run.path, again, format="onnx", precision="int8", data=photos / "gear")
    assert again.exists() == (not found.problems(limits))


def test_int8_leaves_alone_where_pixels_come_in_and_go_out(run, traced_once, tests):
    """In 8 bits, these and the convolutions of one channel each cost a trained model more than what may be lost."""
    pictures = [np.asarray(PIL.Image.open(path).convert("RGB").resize((64, 64))) for path in tests[:4]]
    graph = in_int8(traced_once(Detector.load(run.path, device="cpu")), pictures)
    made_by = {each.output[0]: each for each in graph.graph.node}
    in_8_bits: dict[str, bool] = {}  # by module
    for each in graph.graph.node:
        scopes = _scopes(each)
        if each.op_type in ("Conv", "Gemm", "MatMul") and "'model." in scopes:
            weight = made_by.get(each.input[1])
            in_8_bits[scopes.split("', '")[-2]] = weight is not None and weight.op_type == "DequantizeLinear"
    assert in_8_bits["model.blocks.0.mlp.0"]
    assert in_8_bits["model.blocks.0.attn.proj"]
    assert not any(in_8_bits[f"model.{name}"] for name in ("patch_embed", "head", "pos_convs.0"))


def doctored(proto):
    """The graph with one weight of the network changed."""
    weight = max((w for w in proto.graph.initializer if w.data_type == onnx.TensorProto.FLOAT and "head" in w.name),
                 key=lambda w: w.ByteSize())
    values = onnx.numpy_helper.to_array(weight) + np.float32(0.05)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    return proto


def test_a_graph_that_differs_is_not_written(run, photos, tmp_path, monkeypatch, traced_once):
    monkeypatch.setattr(export_module, "to_onnx", lambda detector: doctored(traced_once(detector)))
    with pytest.raises(ParityError, match=r"was not written: in fp32 the largest difference of the maps"):
        export(run.path, tmp_path / "model.xml", format="openvino", data=photos / "gear")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_none_are_beyond_every_tolerance(run, tests):
    detector = Detector.load(run.path)
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8)]

    class Broken(Detector):
        def inspect(self, images):
            repaired, maps = super().inspect(images)
            return repaired, maps * float("nan")

    broken = Broken(detector.model, detector.config, reference=detector.reference, provenance={},
                    held_out_scores=detector.held_out_scores, distribution=detector.distribution)
    assert len(parity(detector, broken, images).problems(TOLERANCES["int8"])) == 2
    assert parity(detector, detector, images).problems(TOLERANCES["fp32"]) == []


def test_mistakes_are_told(run, files, photos, tmp_path):
    for wrong, match in (
        ({"format": "onnx", "out": tmp_path / "model.xml"}, r"must end in \.onnx"),
        ({"format": "onnx", "out": tmp_path / "model.onnx", "precision": "int8"}, "--data"),
        ({"format": "onnx", "out": tmp_path / "model.onnx", "data": tmp_path / "nowhere"}, "nowhere"),
    ):
        with pytest.raises(InTraError, match=match):
            export(run.path, **wrong)
    with pytest.raises(InTraError, match="run's own model"):
        export(files["onnx"], tmp_path / "again.onnx", format="onnx")
    with pytest.raises(InTraError, match="cannot be saved"):
        Detector.load(files["onnx"]).save(tmp_path / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def rewritten(source: Path, target: Path, change) -> None:
    """A copy of an exported ONNX file with another header, by somebody who can make a checksum."""
    proto = onnx.load(source)
    entry = next(entry for entry in proto.metadata_props if entry.key == METADATA_KEY)
    entry.value = change(entry.value)
    onnx.save(proto, target)
    if b"intra-sha256-" in target.read_bytes():
        seal(target)


def test_damaged_foreign_and_newer_files_are_refused_by_name(files, tmp_path):
    file = tmp_path / "model.onnx"
    with pytest.raises(InTraError, match=r"no exported model at .*model\.onnx"):
        Detector.load(file)
    file.write_bytes(files["onnx"].read_bytes()[:5000])
    with pytest.raises(InTraError, match=r"model\.onnx is damaged"):
        Detector.load(file)
    for change, match in (
        (lambda text: "{", "header cannot be read"),
        (lambda text: json.dumps(json.loads(text) | {"export_version": 99}), "export version 99"),
        (lambda text: text.replace('"held_out_scores"', '"scores"'), "does not hold what its header says"),
        (lambda text: text.replace('"value": ', '"value": 1e999, "was": '), "header says|no number"),
        (lambda text: json.dumps(json.loads(text) | {"setup": "AAAA"}), "does not hold what its header says"),
        (lambda text: json.dumps(json.loads(text) | {"setup": None}), "does not hold what its header says"),
    ):
        rewritten(files["onnx"], file, change)
        with pytest.raises(InTraError, match=match):
            Detector.load(file)
    foreign = onnx.load(files["onnx"])
    del foreign.metadata_props[:]
    onnx.save(foreign, file)
    with pytest.raises(InTraError, match="no model of intra"):
        Detector.load(file)
    (tmp_path / "model.xml").write_text("<html/>")
    with pytest.raises(InTraError, match=r"model\.xml is damaged"):
        Detector.load(tmp_path / "model.xml")
    with pytest.raises(InTraError, match="runs on the CPU"):
        Detector.load(files["onnx"], device="cuda")


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_one_bit_that_changed_is_found(files, tmp_path, name):
    """A runtime computes with it, and the scores are others."""
    for file in files[name].parent.glob(f"{files[name].stem}.*"):
        shutil.copy(file, tmp_path)
    file = tmp_path / files[name].name
    Detector.load(file)
    weights = file.with_suffix(".bin") if name == "openvino" else file
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(InTraError, match="does not match its checksum"):
        Detector.load(file)


def test_a_lacking_package_is_one_sentence(files, monkeypatch):
    monkeypatch.setattr(exported, "openvino_core", exported.openvino_core.__wrapped__)  # as in a new process
    for name, package in (("onnx", "onnxruntime"), ("openvino", "openvino")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(InTraError, match=rf"{package} is not installed; .*pip install 'intra-ad\[export\]'"):
            Detector.load(files[name])


def node(op: str, inputs: list[str], output: str, module: str | None = None) -> "onnx.NodeProto":
    """A node that the exporter notes as of one of the model's modules; None: of none."""
    found = onnx.helper.make_node(op, inputs, [output], name=output)
    if module:
        found.metadata_props.add(key=SCOPES, value=f"['', 'model', 'model.{module}', 'linear']")
    return found


def test_small_and_huge_weights_and_those_of_no_product_of_a_network_keep_their_bits():
    """The mean image, of which a network's node gathers patches, is a constant of any name in the graph."""
    values = {"small": np.ones((3, 3), np.float32), "large": np.ones((10, 100), np.float32),
              "huge": np.full((10, 100), 1e6, np.float32), "whole": np.ones((10, 100), np.int64),
              "bias": np.ones(1000, np.float32), "mean": np.ones((10, 100), np.float32),
              "other": np.ones((10, 100), np.float32), "up": np.ones((10, 10, 4, 4), np.float32)}
    nodes = [node("Gemm", ["small", "large", "huge", "whole", "bias"], "a", "head"),
             node("Gather", ["mean", "whole"], "b", "index"), node("MatMul", ["other"], "c"),
             node("ConvTranspose", ["up"], "d", "decoder.0")]
    graph = onnx.helper.make_graph(nodes, "weights", [], [], [
        onnx.numpy_helper.from_array(value, name) for name, value in values.items()])
    found = with_fp16_weights(onnx.helper.make_model(graph))
    assert [weight.name for weight in found.graph.initializer] == [
        "small", "large_fp16", "huge", "whole", "bias", "mean", "other", "up_fp16"]
    assert [each.output[0] for each in found.graph.node] == ["large", "up", "a", "b", "c", "d"]


def test_the_example_runs_without_torch(files, run, tests):
    """Also without intra itself: only what its header names is imported."""
    assert len(EXAMPLE.read_text().splitlines()) <= 30
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torch', 'intra', 'scipy', 'onnx')));"
    code = f"{blocked} import runpy; runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, files["onnx"], *tests[:3]], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    detector = Detector.load(run.path)
    for line, path in zip(done.stdout.splitlines(), tests[:3], strict=True):
        verdict, score, name, _ = line.split("\t")
        prediction = detector.predict(path)
        assert name == str(path)
        assert (verdict == "DEFECT") == prediction.is_anomalous
        assert float(score) == pytest.approx(prediction.score, rel=1e-3, abs=1e-3)


@pytest.fixture
def intra(monkeypatch, capsys):
    """The command line in this process, so that it shares the traced graph: what it says, its exit code checked."""
    def call(*words: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["intra", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = "".join(capsys.readouterr())
        assert (ended.value.code or 0) == code, said
        return " ".join(said.split())

    return call


def test_on_the_command_line(run, tests, tmp_path, intra):
    """Without --data the built-in photos are compared; the file then works wherever a run does."""
    file = tmp_path / "gear.onnx"
    said = intra("export", run.path, "--format", "onnx", "--out", file)
    assert "11 photos (built-in): maps differ by" in said
    assert f"wrote {file}" in said
    intra("predict", file, tests[0], "--out", tmp_path / "out")
    row = json.loads((tmp_path / "out" / "predictions.jsonl").read_text())
    assert row["score"] == pytest.approx(Detector.load(run.path).predict(tests[0]).score, rel=1e-3, abs=1e-3)
    assert "did you mean 'openvino'" in intra("export", run.path, "--format", "openvno", "--out", file, code=2)
    assert "did you mean 'fp16'" in intra("export", run.path, "--format", "onnx", "--out", file, "--precision", "fp61",
                                           code=2)


def test_a_refused_export_exits_with_1(run, tmp_path, monkeypatch, intra):
    strict = {name: dataclasses.replace(limit, largest=-1.0) for name, limit in TOLERANCES.items()}
    monkeypatch.setattr(export_module, "TOLERANCES", strict)
    said = intra("export", run.path, "--format", "onnx", "--out", tmp_path / "gear.onnx", code=1)
    assert "was not written" in said
    assert list(tmp_path.iterdir()) == []


def test_outputs_have_these_names(files):
    session = onnxruntime.InferenceSession(str(files["onnx"]), providers=["CPUExecutionProvider"])
    assert tuple(output.name for output in session.get_outputs()) == OUTPUTS
    assert [part.name for part in session.get_inputs()] == ["photos"]  # inputs with a default are told apart
    assert [part.name for part in session.get_overridable_initializers()] == ["threshold"]
