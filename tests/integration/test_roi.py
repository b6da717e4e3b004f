"""A region of interest: inside it everything is as ever, outside nothing decides and nothing is flagged."""

import shutil
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from sklearn.metrics import average_precision_score, roc_auc_score

import intra
from intra import cli
from intra.config import Config, preset
from intra.data.demo import make_demo
from intra.data.folder import find_category
from intra.data.roi import EARLIER_ROI_FILE, ROI_FILE, read_roi, save_roi
from intra.deploy import export as export_module
from intra.deploy.export_formats import to_onnx
from intra.errors import InTraError
from intra.inspection.detector import Detector
from intra.training.checkpoint import CHECKPOINT_FILE
from intra.training.run import _resolve, recalibrate, train

BOX = (0.125, 0.0625, 0.875, 0.8125)  # of conftest's mask


@pytest.fixture(scope="module")
def detector(roi_run) -> Detector:
    return Detector.load(roi_run.path)


@pytest.fixture(scope="module")
def photo(photos) -> np.ndarray:
    """A good photo, enlarged to the mask's 128 x 128 px: what the box cuts out is reduced to half the size."""
    with PIL.Image.open(photos / "gear/test/good/000.png") as picture:
        return np.asarray(picture).repeat(2, axis=0).repeat(2, axis=1)


def mask_file(folder: Path, mask: np.ndarray) -> Path:
    PIL.Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "mask.png")
    return folder / "mask.png"


def test_a_defect_inside_is_flagged_where_it_is(detector, photo, roi_mask):
    defective = photo.copy()
    defective[82:94, 26:38] = (255, 0, 255)
    found = detector.predict(defective)
    assert found.is_anomalous
    row, col = np.unravel_index(found.anomaly_map.argmax(), found.anomaly_map.shape)
    assert 76 <= row < 100
    assert 20 <= col < 44
    assert found.mask[82:94, 26:38].any()
    assert not found.mask[~roi_mask].any()
    assert all(found.mask[d.top : d.top + d.height, d.left : d.left + d.width].any() for d in found.defects)


@pytest.mark.parametrize("place", ["outside the box", "left out of the box", "everywhere outside"])
def test_what_lies_outside_changes_nothing(detector, photo, roi_mask, place):
    """Not even the last bit, though cells, filters and attention reach over the border; three px from it, over which
    a photo is reduced to the model's size.
    """
    defective = photo.copy()
    if place == "outside the box":
        defective[20:60, 108:126] = (255, 0, 255)
    elif place == "left out of the box":
        defective[20:58, 64:100] = (255, 0, 255)
    else:
        near = np.lib.stride_tricks.sliding_window_view(np.pad(roi_mask, 3), (7, 7)).any((2, 3))
        noise = np.random.default_rng(0).integers(0, 255, photo.shape).astype(np.uint8)
        defective[~near] = noise[~near]
    one, other = detector.predict(photo), detector.predict(defective)
    assert one.score == other.score
    assert np.array_equal(one.anomaly_map, other.anomaly_map)
    assert np.array_equal(one.mask, other.mask)
    assert np.array_equal(one.repaired[roi_mask], other.repaired[roi_mask])
    assert np.array_equal(other.repaired[~roi_mask], defective[~roi_mask])


def test_outside_the_map_is_0_and_the_repaired_image_the_photo(detector, photo, roi_mask):
    found = detector.predict(photo)
    assert found.anomaly_map.shape == found.mask.shape == photo.shape[:2]
    assert not found.anomaly_map[~roi_mask].any()
    assert found.anomaly_map[roi_mask].any()
    assert np.array_equal(found.repaired[~roi_mask], photo[~roi_mask])
    assert not np.array_equal(found.repaired[roi_mask], photo[roi_mask])


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float", "grey"])
def test_positions_are_the_photos_own(detector, roi_mask, monkeypatch, kind):
    """A photo of which the box cuts out the model's own size, so that nothing is resized."""
    mask = roi_mask[::2, ::2]
    rng = np.random.default_rng(1)
    photo = {"uint8": rng.integers(1, 255, (64, 64, 3)).astype(np.uint8),
             "uint16": rng.integers(1, 65535, (64, 64, 3)).astype(np.uint16),
             "float": rng.random((64, 64, 3)).astype(np.float32),
             "grey": rng.integers(1, 255, (64, 64)).astype(np.uint8)}[kind]
    seen = []

    def inspect(images):
        seen.append(images)
        maps = torch.zeros(1, 48, 48)
        maps[0, 30, 5] = 1e6
        return torch.zeros_like(images), maps

    monkeypatch.setattr(detector, "inspect", inspect)
    monkeypatch.setattr(detector, "repaired", torch.zeros_like)
    found = detector.predict(photo)
    colour = photo if photo.ndim == 3 else np.repeat(photo[..., None], 3, axis=2)
    scale = np.iinfo(photo.dtype).max if photo.dtype != np.float32 else 1
    assert np.allclose(seen[0][0].permute(1, 2, 0).numpy(), colour[8:56, 4:52] / scale, atol=1e-6)
    assert np.argwhere(found.anomaly_map).tolist() == [[38, 9]]
    assert np.argwhere(found.mask).tolist() == [[38, 9]]
    assert [(d.top, d.left, d.height, d.width, d.area_px) for d in found.defects] == [(38, 9, 1, 1, 1)]
    assert found.repaired.dtype == photo.dtype
    assert np.array_equal(found.repaired, np.where(mask[..., None], 0, colour))


def test_patches_outside_are_not_inpainted(detector, monkeypatch):
    hidden, inpaint = [], detector.model.inpaint
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))

    def counted(*given):
        hidden.append(int(given[2].sum()))
        return inpaint(*given)

    monkeypatch.setattr(detector.model, "inpaint", counted)
    repaired, maps = detector.inspect(images)
    assert sum(hidden) == 2 * (36 - 9)
    assert torch.equal(repaired[..., :24, 24:], images[..., :24, 24:])
    assert not maps[..., :24, 24:].any()
    assert len(detector.distribution.parts[0].mean) == 36 - 9  # nor are there statistics of their cells


def test_the_held_out_scores_are_of_the_region(detector, photos):
    """In the units of an inspection: scored with the training's own photos they are of the same order."""
    good = detector.predict_batch(sorted((photos / "gear/test/good").iterdir()))
    assert 0.2 < np.median([each.score for each in good]) / np.median(detector.held_out_scores) < 5
    assert detector.info["config"]["data"]["box"] == BOX
    assert sum(each.setup_alarm for each in good) <= 1


def test_it_resumes_with_the_same_region(roi_run, roi_mask, photos, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(roi_run.path, run)
    assert np.array_equal(read_roi(run / ROI_FILE), roi_mask)
    resumed = train(photos / "gear", run, steps=40, resume=True, image_size=48, settings=TINY)
    one, other = load_file(resumed.model_path), load_file(roi_run.model_path)
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    with pytest.raises(InTraError, match="another region of interest; resume without --roi"):
        train(photos / "gear", run, resume=True, roi=mask_file(tmp_path, roi_mask | roi_mask[:, ::-1]))
    (run / ROI_FILE).unlink()
    with pytest.raises(InTraError, match=r"another region of interest; .* with roi\.png as it was"):
        train(photos / "gear", run, resume=True)


def test_a_run_without_a_region_gets_none_by_resuming(run, roi_mask, photos, tmp_path):
    with pytest.raises(InTraError, match="begun with no region of interest"):
        train(photos / "gear", run.path, resume=True, roi=mask_file(tmp_path, roi_mask))


def test_both_recalibrations_keep_the_region(roi_run, detector, photo, photos, tmp_path):
    same = recalibrate(roi_run.path, photos / "gear", out=tmp_path / "same", settings={})
    one, other = load_file(same.model_path), load_file(roi_run.model_path)
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    assert Detector.load(same.path).threshold == detector.threshold
    make_demo(tmp_path / "new", size_px=64, num_train=12, num_test_good=1, num_per_defect=1, seed=7)
    good = sorted((tmp_path / "new/gear/train/good").iterdir())
    intra.calibrate(roi_run.path, good, out=tmp_path / "june")
    june = Detector.load(tmp_path / "june")
    assert june.held_out_scores == pytest.approx([each.score for each in detector.predict_batch(good)])
    assert june.predict(photo).score == detector.predict(photo).score
    assert not june.predict(photos / "gear/test/good/000.png").setup_alarm  # its mean photo is cut out alike


def test_exported_is_the_detector(roi_run, detector, photo, photos, roi_mask, tmp_path, monkeypatch):
    """The export itself compares maps and repaired images; here also what is done around the graph."""
    graph = to_onnx(detector)
    monkeypatch.setattr(export_module, "to_onnx", lambda _: graph)
    defective = photo.copy()
    defective[82:94, 26:38] = (255, 0, 255)
    defective[20:58, 64:100] = (255, 0, 255)
    known = detector.predict(defective)
    for name, file in (("onnx", tmp_path / "gear.onnx"), ("openvino", tmp_path / "gear.xml")):
        parity = intra.export(roi_run.path, file, format=name, data=photos / "gear").parity
        assert parity.largest_repaired_difference < 1e-3
        found = Detector.load(file).predict(defective)
        assert found.score == pytest.approx(known.score, rel=1e-3)
        assert not found.anomaly_map[~roi_mask].any()
        assert np.abs(found.anomaly_map - known.anomaly_map).max() < 1e-3 * known.anomaly_map.max()
        assert np.abs(found.repaired.astype(int) - known.repaired.astype(int)).max() <= 1
        assert [d.top for d in found.defects] == [d.top for d in known.defects]


def test_evaluate_works_in_a_region(roi_run, photos, roi_mask, tmp_path):
    results = intra.evaluate(roi_run.path, photos / "gear", out=tmp_path)
    assert 0 <= results["pixel_auroc"] <= 1
    assert results["num_test"] == 6 + 2 * len(results["per_defect"])
    with PIL.Image.open(next((tmp_path / "maps").rglob("*.tiff"))) as stored:
        found = np.asarray(stored)
    assert found[roi_mask[::2, ::2]].any()
    assert not found[~roi_mask[::2, ::2]].any()


def marked(folder: Path, name: str, places: list[tuple[slice, slice]]) -> None:
    """One defective photo in a category, and its mask: what is marked, not what is seen, counts here."""
    mask = np.zeros((64, 64), dtype=bool)
    for place in places:
        mask[place] = True
    for parent in ("test", "ground_truth"):
        (folder / parent / name).mkdir(parents=True)
    shutil.copy(folder / "test/good/000.png", folder / "test" / name)
    PIL.Image.fromarray(mask).save(folder / "ground_truth" / name / "000_mask.png")


def test_pixel_figures_are_of_the_region_alone(detector, photos, roi_mask, tmp_path):
    """Outside, all good pixels lie at 0: with them every figure would look better than it is."""
    gear = tmp_path / "gear"
    shutil.copytree(photos / "gear/test/good", gear / "test/good")
    inside = roi_mask[::2, ::2]
    over_the_border = slice(40, 44), slice(48, 64)  # 4 of 16 columns inside
    marked(gear, "dent", [(slice(10, 14), slice(6, 12)), over_the_border])
    marked(gear, "label", [(slice(0, 5), slice(0, 64))])  # beside the region
    results = intra.evaluate(detector, gear, out=tmp_path / "out", normal="test/good", anomalous="test",
                             masks="ground_truth")
    found = {path.relative_to(tmp_path / "out/maps").as_posix(): np.asarray(PIL.Image.open(path))
             for path in (tmp_path / "out/maps").rglob("*.tiff")}
    truth = np.zeros((64, 64), dtype=bool)
    truth[10:14, 6:12] = truth[over_the_border] = True
    others = np.concatenate([each[inside] for name, each in found.items() if not name.startswith("dent")])
    values = np.concatenate([found["dent/000.tiff"][inside], others])
    labels = np.concatenate([truth[inside], np.zeros(len(others), dtype=bool)])
    assert results["pixel_auroc"] == pytest.approx(roc_auc_score(labels, values))
    assert results["pixel_ap"] == pytest.approx(average_precision_score(labels, values))
    assert 0 <= results["pixel_aupro"] <= 1
    assert results["per_defect"]["label"]["pixel_auroc"] is None
    assert results["reasons"]["per_defect.label.pixel_auroc"] == (
        "none of its images has a marked pixel inside the region")
    assert results["per_defect"]["label"]["image_auroc"] is not None  # a photo whose defect was missed
    note = next(note for note in results["notes"] if "region" in note)
    assert note == (f"The pixel figures are of the region of interest alone, {inside.mean():.1%} of the photos. "
                    "368 of 408 defect pixels lie outside it.")


def test_masks_that_may_hold_another_region_are_refused(photos, roi_mask, tmp_path):
    """The ringing around a JPEG's edges is not 0; a white layer of which the outside was erased is white everywhere."""
    white = PIL.Image.fromarray(roi_mask.astype(np.uint8) * 255)
    white.save(tmp_path / "mask.jpg")
    layer = PIL.Image.new("LA", white.size, 255)
    layer.putalpha(white)
    layer.save(tmp_path / "layer.png")
    white.save(tmp_path / "index.png", transparency=0)
    for name, match in (("mask.jpg", r"mask\.jpg may be blurred at its border, as by JPEG; .*save it as \.png"),
                        ("layer.png", r"layer\.png has an alpha channel.*save it without transparency"),
                        ("index.png", r"index\.png has an alpha channel")):
        with pytest.raises(InTraError, match=match):
            train(photos / "gear", tmp_path / "run", steps=1, settings=TINY, roi=tmp_path / name)


def test_a_region_of_a_run_before_is_not_taken_for_ones_own(photos, roi_mask, tmp_path):
    """Without --roi, into the folder of a run whose model and checkpoint were removed."""
    save_roi(roi_mask, tmp_path / ROI_FILE)
    run = train(photos / "gear", tmp_path, steps=1, image_size=64, settings=TINY)
    assert not (tmp_path / ROI_FILE).exists()
    assert np.array_equal(read_roi(tmp_path / EARLIER_ROI_FILE), roi_mask)  # it may have been painted there
    for left in (run.model_path, tmp_path / CHECKPOINT_FILE):
        left.unlink()  # as if it had been killed before the first checkpoint
    assert Detector.load(train(photos / "gear", tmp_path, steps=1, image_size=64, settings=TINY, resume=True).path
                         ).region is None


def test_no_mask_is_lost_where_another_is_written(roi_mask, tmp_path):
    painted, earlier = tmp_path / ROI_FILE, tmp_path / EARLIER_ROI_FILE
    PIL.Image.fromarray(~roi_mask).save(painted)
    save_roi(roi_mask, painted)
    save_roi(roi_mask, painted)  # a resumed run: nothing to keep
    assert np.array_equal(read_roi(painted), roi_mask) and np.array_equal(read_roi(earlier), ~roi_mask)
    painted.write_bytes(b"")
    save_roi(None, painted)  # an empty file is no region either, and would stop a run that resumes
    assert not painted.exists()


def test_bad_masks_are_told(photos, tmp_path):
    def refused(mask: np.ndarray, match: str) -> None:
        with pytest.raises(InTraError, match=match):
            train(photos / "gear", tmp_path / "run", steps=1, settings=TINY, roi=mask_file(tmp_path, mask))

    refused(np.zeros((64, 64)), r"mask\.png is empty: .*paint them white")
    refused(np.ones((64, 66)), r"mask is 64x66 px, height/width 0\.970; the photos are about 64x64 px, 1\.000; .* 2%")
    refused(np.pad(np.ones((100, 100)), 150), r"covers 256 px of a photo; expected at least 32x32")
    lattice = np.zeros((640, 640))
    lattice[::2, ::2] = 1  # a quarter of every pixel
    with pytest.raises(InTraError, match="no pixel of the image of 64x64 px lies inside"):
        train(photos / "gear", tmp_path / "run", steps=1, image_size=64, settings=TINY,
              roi=mask_file(tmp_path, lattice))
    (tmp_path / "text.png").write_text("no picture")
    for name in ("text.png", "nowhere.png"):
        with pytest.raises(InTraError, match=name):
            train(photos / "gear", tmp_path / "run", steps=1, roi=tmp_path / name)
    assert not (tmp_path / "run" / ROI_FILE).exists()


def test_the_size_is_chosen_for_what_is_cut_out(photos):
    """--image-size auto takes the box's aspect ratio, not the photos'."""
    mask = np.zeros((64, 64), dtype=bool)
    mask[:, 8:40] = True
    assert _resolve(preset("fast"), find_category(photos / "gear"), mask).model.image_size == (368, 176)
    assert _resolve(preset("fast"), find_category(photos / "gear"), None).model.image_size == (256, 256)


def test_on_the_command_line(photos, tmp_path, monkeypatch, capsys):
    mask = mask_file(tmp_path, np.zeros((9, 9)))
    words = ("intra", "train", photos / "gear", "--out", tmp_path / "run", "--roi", mask)
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "mask.png is empty" in " ".join(capsys.readouterr().err.split())


def test_all_categories_are_checked_before_the_first_trains(photos, tmp_path, monkeypatch, capsys):
    shutil.copytree(photos / "fabric", tmp_path / "data/fabric")
    (tmp_path / "data/gear/train/good").mkdir(parents=True)
    for path in (photos / "gear/train/good").iterdir():
        with PIL.Image.open(path) as picture:
            picture.crop((0, 0, 64, 48)).save(tmp_path / "data/gear/train/good" / path.name)
    mask = np.zeros((64, 64))
    mask[:48, 16:] = 1
    words = ("intra", "train", tmp_path / "data", "--out", tmp_path / "runs", "--roi", mask_file(tmp_path, mask),
             "--steps", "1")
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert "fabric: region: 56.2 % of the photo, box 48x48 px" in said.out
    assert "the photos are about 48x64 px" in " ".join(said.err.split())
    assert not (tmp_path / "runs").exists()


def test_a_damaged_region_is_refused(roi_run, detector, tmp_path):
    detector.region.inside.logical_not_()  # as if others had written it: checksum and all
    try:
        detector.save(tmp_path / "model.safetensors")
    finally:
        detector.region.inside.logical_not_()
    with pytest.raises(InTraError, match="does not hold what its header says"):
        Detector.load(tmp_path / "model.safetensors")


def test_settings_from_before_there_were_regions():
    values = Config().to_dict()
    del values["data"]["box"]
    assert Config.from_dict(values) == Config()
    with pytest.raises(InTraError, match=r"data\.box is \(0\.5, 0\.0, 0\.5, 1\.0\); it must be"):
        Config.from_dict({"data": {"box": [0.5, 0.0, 0.5, 1.0]}})
    with pytest.raises(InTraError, match=r"unknown setting 'data\.box'"):
        Config().with_settings({"data.box": "0,0,1,1"})
