"""The detector: one by one as in a batch, at the input's own size, the same after a trip through its file."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import ndimage

from intra.data.folder import find_category
from intra.data.images import prepare, read_image, to_unit
from intra.errors import InTraError
from intra.inspection.detector import Detector
from intra.inspection.model_file import FORMAT_VERSION, content_digest
from intra.training.calibrated import calibrated
from intra.training.run import recalibrate


@pytest.fixture(scope="module")
def detector(run) -> Detector:
    return Detector.load(run.path)


@pytest.fixture(scope="module")
def tests(photos) -> list[Path]:
    return sorted((photos / "gear" / "test").rglob("*.png"))


def test_a_first_good_verdict_waits_for_no_compiler_and_no_scipy(run, detector, tests):
    """They take longer than all the rest; torch loads its compiler to draw the numbers of a network without any."""
    photo = next(str(path) for path in tests if detector.predict(path).verdict == "good")
    code = (f"import sys, intra; found = intra.Detector.load({str(run.path)!r}).predict({photo!r});"
            "print(found.verdict, [name for name in ('scipy', 'sympy', 'torch._dynamo') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["good", "[]"]


def equal(one, other) -> bool:
    return (
        one.score == pytest.approx(other.score, rel=1e-4)
        and one.is_anomalous == other.is_anomalous
        and np.allclose(one.anomaly_map, other.anomaly_map, rtol=1e-3, atol=1e-3)  # in nats; 0 where nothing is rare
        and np.abs(one.repaired.astype(int) - other.repaired.astype(int)).max() <= 1
    )


def test_batched_is_one_by_one(detector, tests):
    together = detector.predict_batch(tests)
    assert len(together) == len(tests) > 8  # more than one batch
    for path, prediction in zip(tests, together, strict=True):
        assert equal(detector.predict(path), prediction)


def test_a_good_part_that_lies_elsewhere_is_no_defect(run, photos):
    detector = Detector.load(run.path)
    detector.setup = replace(detector.setup, scores=(50.0,) * 16)  # the measurements alone raise no alarm
    good, bad = (np.asarray(PIL.Image.open(photos / "gear/test" / name)) for name in (
        "good/000.png", "missing_tooth/000.png"))
    given = [good, *(ndimage.shift(photo, (2, 0, 0), order=1, mode="nearest") for photo in (good, bad))]
    as_it_is, elsewhere, broken = (detector.predict(photo).score for photo in given)
    assert as_it_is < elsewhere / 2  # a shift looks like a defect
    detector.calibration = replace(detector.calibration, value=elsewhere / 2)
    found = detector.predict_batch(given)
    assert [each.verdict for each in found] == ["good", "setup", "defect"]
    assert [each.setup_reason for each in found] == ["", "shifted", ""]
    assert [each.score for each in found] == pytest.approx([as_it_is, elsewhere, broken], rel=1e-4)
    assert [each.is_anomalous for each in found] == [False, True, True]


def test_path_pil_and_array_are_the_same(detector, tests):
    expected = detector.predict(tests[0])
    picture = PIL.Image.open(tests[0])
    for image in (str(tests[0]), picture, np.asarray(picture)):
        assert equal(detector.predict(image), expected)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(height=st.integers(1, 150), width=st.integers(1, 150), kind=st.sampled_from(["grey", "rgb", "uint16", "float"]))
def test_everything_comes_back_at_the_inputs_own_size(detector, height, width, kind):
    rng = np.random.default_rng(0)
    shape = (height, width) if kind == "grey" else (height, width, 3)
    image = {"uint16": rng.integers(0, 65535, shape).astype(np.uint16), "float": rng.random(shape, np.float32)}.get(
        kind, rng.integers(0, 255, shape).astype(np.uint8))
    prediction = detector.predict(image)
    assert prediction.anomaly_map.shape == prediction.mask.shape == (height, width)
    assert prediction.anomaly_map.dtype == np.float32
    assert prediction.mask.dtype == bool
    assert prediction.repaired.shape == (height, width, 3)  # the channels of the model
    assert prediction.repaired.dtype == image.dtype
    assert np.isfinite(prediction.anomaly_map).all()
    assert prediction.is_anomalous == (prediction.score > prediction.threshold)
    assert prediction.is_anomalous == bool(prediction.mask.any()) == bool(prediction.defects)


def test_defects_are_the_regions_of_the_mask(detector, tests):
    prediction = next(p for p in detector.predict_batch(tests) if p.is_anomalous)
    assert sum(defect.area_px for defect in prediction.defects) == prediction.mask.sum()
    for defect in prediction.defects:
        box = (slice(defect.top, defect.top + defect.height), slice(defect.left, defect.left + defect.width))
        assert prediction.mask[box].any(0).all() or prediction.mask[box].any(1).all()
        assert prediction.anomaly_map[box].max() >= defect.score
    assert [d.score for d in prediction.defects] == sorted((d.score for d in prediction.defects), reverse=True)


def test_it_tells_defective_from_good(detector, tests):
    scores = {path: p.score for path, p in zip(tests, detector.predict_batch(tests), strict=True)}
    good = [score for path, score in scores.items() if path.parent.name == "good"]
    missing = [score for path, score in scores.items() if path.parent.name == "contamination"]
    assert np.median(missing) > np.median(good)


def test_the_same_after_a_trip_through_its_file(detector, tests, tmp_path):
    detector.save(tmp_path / "copy.safetensors")
    copy = Detector.load(tmp_path / "copy.safetensors")
    assert copy.info == detector.info
    assert copy.predict(tests[0]).score == detector.predict(tests[0]).score
    detector.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "copy.safetensors").read_bytes()


def test_the_threshold_can_be_moved(run, detector):
    scores = sorted(detector.held_out_scores)
    assert Detector.load(run.path, threshold=0.5).threshold == 0.5
    strict = Detector.load(run.path, false_reject_rate=0.5)
    assert strict.threshold <= scores[-1]
    assert strict.calibration.false_reject_rate <= 0.5
    with pytest.raises(InTraError, match="not both"):
        Detector.load(run.path, threshold=1.0, false_reject_rate=0.1)


def damage(path: Path, target: Path, kind: str) -> None:
    """A copy of a model file with something wrong with it."""
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "flipped":
        content[-1000] ^= 0xFF
    elif kind == "noise":
        content = bytearray(b"not a model at all" * 50)
    elif kind == "empty":
        content = bytearray()
    target.write_bytes(content)


@pytest.mark.parametrize("kind", ["truncated", "flipped", "noise", "empty"])
def test_a_damaged_file_is_refused_by_name(run, tmp_path, kind):
    damage(run.model_path, tmp_path / "model.safetensors", kind)
    with pytest.raises(InTraError, match=r"model\.safetensors is damaged"):
        Detector.load(tmp_path)


def rewritten(path: Path, target: Path, **changes: object) -> None:
    with safe_open(path, framework="pt") as opened:
        envelope = json.loads(opened.metadata()["intra"])
    save_file(load_file(path), target, metadata={"intra": json.dumps(envelope | changes)})


def test_foreign_newer_and_missing_files_are_refused_by_name(run, tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(InTraError, match="no model at"):
        Detector.load(tmp_path)
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(InTraError, match="no model of intra"):
        Detector.load(file)
    rewritten(run.model_path, file, format_version=FORMAT_VERSION + 1)
    with pytest.raises(InTraError, match=f"format version {FORMAT_VERSION + 1}"):
        Detector.load(file)
    rewritten(run.model_path, file, header="{}")
    with pytest.raises(InTraError, match="damaged"):
        Detector.load(file)


def forged(detector: Detector, path: Path, change) -> None:
    """A model file with something absurd in it, and the right checksum: damage on purpose."""
    info, tensors = json.loads(json.dumps(detector.info)), load_file(path)
    change(info, tensors)
    header = json.dumps(info)
    envelope = {"header": header, "sha256": content_digest(header, tensors), "format_version": FORMAT_VERSION}
    save_file(tensors, path, metadata={"intra": json.dumps(envelope)})


def nothing_in_common(info, tensors):
    info["config"] = None


@pytest.mark.parametrize("change", [
    nothing_in_common,
    lambda info, tensors: info["config"]["model"].update(depth=1000),
    lambda info, tensors: info["config"]["model"].update(depth=3_000_000),
    lambda info, tensors: info["config"]["model"].update(embed_dim=9600),
    lambda info, tensors: info["config"]["model"].update(network="riad"),
    lambda info, tensors: info["config"]["model"].update(mlp_ratio=float("nan")),
    lambda info, tensors: info["config"]["model"].update(grid=[8, 8, 8]),
    lambda info, tensors: info["config"]["scoring"].update(deviation="foo"),
    lambda info, tensors: info["config"]["scoring"].update(scales=[10**12]),
    lambda info, tensors: info["calibration"].update(held_out_scores=None),
    lambda info, tensors: info["calibration"].update(held_out_scores=["high"]),
    lambda info, tensors: info["calibration"]["threshold"].update(value=float("nan")),
    lambda info, tensors: info["calibration"]["threshold"].update(value="0"),
    lambda info, tensors: info.update(provenance=[]),
    lambda info, tensors: tensors.update({"reference.mean": torch.zeros(3, 3)}),
    lambda info, tensors: tensors.update({"reference.mean": torch.zeros(64)}),
    lambda info, tensors: tensors.update({"model.pos_embed": tensors["model.pos_embed"].half()}),
    lambda info, tensors: tensors.update({"model.pos_embed": tensors["model.pos_embed"] * float("nan")}),
    lambda info, tensors: tensors.pop("model.head.bias"),
    lambda info, tensors: tensors.pop("distribution.fine.mean"),
    lambda info, tensors: tensors.update({"distribution.fine.mean": tensors["distribution.fine.mean"][1:]}),
    lambda info, tensors: tensors["distribution.fine.spread"].zero_(),
])  # fmt: skip
def test_a_forged_file_is_refused(run, detector, tmp_path, change):
    file = tmp_path / "model.safetensors"
    file.write_bytes(run.model_path.read_bytes())
    forged(detector, file, change)
    with pytest.raises(InTraError, match=str(tmp_path)):
        Detector.load(file)


def test_an_untouched_copy_made_the_same_way_is_loaded(run, detector, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(run.model_path.read_bytes())
    forged(detector, file, lambda info, tensors: None)
    assert Detector.load(file).threshold == detector.threshold


def test_without_evidence_of_pixels_there_is_none(run, photos, detector, tests, tmp_path):
    """Learnt and stored: by the same network, cells say what they said."""
    own = detector.config.with_settings({"scoring.places": "own"})
    config = own.with_settings({"scoring.pixel_evidence": "off"})
    category = find_category(photos / "gear")
    training, held_out = (torch.stack([to_unit(prepare(read_image(path), size=config.model.image_size,
                                                       channels=config.model.channels)) for path in paths])
                          for paths in (category.train[8:], category.train[:8]))
    cells, both = (calibrated(detector.model, each, training, held_out, detector.provenance, detector.device, None)
                   for each in (config, own))
    assert cells.distribution.fine is None and both.distribution.fine is not None
    for one, other in zip(cells.distribution.parts, both.distribution.parts, strict=True):
        assert torch.equal(one.whitening, other.whitening)
    cells.save(tmp_path / "model.safetensors")
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "fine" in name]
    loaded = Detector.load(tmp_path / "model.safetensors")
    broken = next(path for path in tests if path.parent.name == "missing_tooth")
    of_cells = loaded.predict(broken).anomaly_map
    assert np.allclose(of_cells, cells.predict(broken).anomaly_map, atol=1e-3)
    assert 0.5 < (both.predict(broken).anomaly_map - of_cells).max() < 2.1


@pytest.fixture(scope="module")
def shared_run(run, photos, tmp_path_factory):
    """The same network, with one distribution of all places."""
    return recalibrate(run.path, photos / "gear", out=tmp_path_factory.mktemp("shared"),
                       settings={"scoring.places": "shared"})


def test_a_distribution_of_all_places_is_stored(shared_run, detector, tests, tmp_path):
    shared = Detector.load(shared_run.path)
    assert all(part.kinds is not None for part in shared.distribution.parts)
    again = [each.anomaly_map for each in Detector.load(shared_run.path).predict_batch(tests)]
    for path, one, other in zip(tests, shared.predict_batch(tests), again, strict=True):
        assert np.array_equal(one.anomaly_map, other), path
    assert shared.info["calibration"]["places"] == "shared"
    file = tmp_path / "model.safetensors"
    file.write_bytes(shared_run.model_path.read_bytes())
    forged(shared, file, lambda info, tensors: info["config"]["scoring"].update(places="auto"))  # as if chosen
    assert Detector.load(file).distribution.places == "shared"
    broken = next(path for path in tests if path.parent.name == "missing_tooth")
    assert not np.allclose(shared.predict(broken).anomaly_map, detector.predict(broken).anomaly_map, atol=0.1)


@pytest.mark.parametrize("change", [
    lambda info, tensors: tensors.pop("distribution.0.kinds.offset"),
    lambda info, tensors: tensors.update({"distribution.1.kinds.offset": tensors["distribution.1.kinds.offset"][1:]}),
    lambda info, tensors: tensors.update({"distribution.1.kinds.log_weight": torch.zeros(0)}),
    lambda info, tensors: tensors["distribution.2.kinds.whitening"].fill_(float("inf")),
    lambda info, tensors: info["config"]["scoring"].update(places="own"),
    lambda info, tensors: info["calibration"].update(places="own"),
    lambda info, tensors: info["calibration"].update(places="any"),
    lambda info, tensors: info["calibration"].pop("places"),
])  # fmt: skip
def test_a_forged_distribution_of_all_places_is_refused(shared_run, tmp_path, change):
    file = tmp_path / "model.safetensors"
    file.write_bytes(shared_run.model_path.read_bytes())
    forged(Detector.load(file), file, change)
    with pytest.raises(InTraError, match=str(tmp_path)):
        Detector.load(file)


def test_wrong_images_are_refused(detector, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for wrong, match in (
        (tmp_path / "none.png", r"none\.png"),
        (tmp_path / "text.png", r"text\.png"),
        (np.zeros((4, 4, 7), np.uint8), "channels"),
        (np.full((4, 4), np.nan, np.float32), "expected|finite|nan"),
        (np.zeros((2, 2, 2, 2), np.uint8), "shape"),
    ):
        with pytest.raises(InTraError, match=match):
            detector.predict(wrong)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_hidden_defect_does_not_change_its_own_repair(detector, seed):
    """What the patch shows has no influence on what is inpainted in its place."""
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    changed = image.clone()
    changed[..., 24:32, 24:32] = 1
    before, after = (detector.inspect(x)[0][..., 24:32, 24:32] for x in (image, changed))
    assert torch.equal(before, after)


def test_an_anomalous_photo_is_repaired_from_a_context_without_its_defect(detector, photos):
    paths = sorted((photos / "gear" / "test" / "good").iterdir())
    calm = next(path for path in paths if not detector.predict(path).is_anomalous)
    good = np.asarray(PIL.Image.open(calm).convert("RGB"))
    defective = good.copy()
    defective[20:44, 20:44] = (255, 0, 255)
    pixels = to_unit(torch.from_numpy(np.stack([good, defective])).permute(0, 3, 1, 2))
    once, maps = detector.inspect(pixels)
    cleaned = torch.where(maps[1] > detector.threshold, once[1].clamp(0, 1), pixels[1])
    twice = detector.inspect(cleaned[None])[0][0]
    assert torch.equal(detector.repaired(cleaned[None])[0], twice)
    found = detector.predict_batch([defective, good, defective])
    assert [each.is_anomalous for each in found] == [True, False, True]
    for prediction, known in zip(found, (twice, once[0], twice), strict=True):
        assert np.abs(prediction.repaired - 255 * known.clamp(0, 1).permute(1, 2, 0).numpy()).max() <= 1
    away_once, away_twice = ((each - pixels[0]).abs()[:, 20:44, 20:44].mean() for each in (once[1], twice))
    assert away_twice < 0.95 * away_once
    quick = detector.predict(defective, repair_twice=False)
    assert np.abs(quick.repaired - 255 * once[1].clamp(0, 1).permute(1, 2, 0).numpy()).max() <= 1
    assert quick.verdict == found[0].verdict and quick.score == pytest.approx(found[0].score, rel=1e-4)


def test_grey_and_many_channels_can_be_learnt(tmp_path):
    from conftest import TINY

    from intra.training.run import train

    rng = np.random.default_rng(0)
    for name, pages in (("grey", 1), ("five", 5)):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(12):
            frames = [PIL.Image.fromarray((rng.random((40, 48)) * 65535).astype(np.uint16)) for _ in range(pages)]
            frames[0].save(folder / f"{number}.tiff", save_all=True, append_images=frames[1:])
        run = train(folder, tmp_path / f"{name}_run", steps=2, image_size="40x48", settings=TINY)
        prediction = Detector.load(run.path).predict(folder / "0.tiff")
        assert prediction.repaired.shape == ((40, 48) if pages == 1 else (40, 48, 5))
        assert prediction.repaired.dtype == np.uint16
