"""A threshold from new good photos: nothing else moves, what was trained on is refused, and the file says all."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from test_cli import intra as command

import intra
from intra.data.demo import make_demo
from intra.errors import InTraError
from intra.inspection.calibration import choose_threshold


@pytest.fixture(scope="module")
def new_good(tmp_path_factory) -> Path:
    """Good photos of the gear that the run has not seen, from another seed."""
    folder = tmp_path_factory.mktemp("new")
    make_demo(folder, size_px=64, num_train=12, num_test_good=1, num_per_defect=1, seed=7)
    return folder / "gear" / "train" / "good"


def test_the_threshold_is_that_of_the_new_scores(run, photos, new_good, tmp_path):
    found = intra.calibrate(run.path, [new_good], out=tmp_path, false_reject_rate=0.2)
    before, after = intra.Detector.load(run.path), intra.Detector.load(tmp_path)
    expected = [each.score for each in before.predict_batch(sorted(new_good.iterdir()))]
    assert sorted(after.held_out_scores) == pytest.approx(sorted(expected))
    assert after.calibration == found.threshold == choose_threshold(after.held_out_scores, 0.2)
    record = after.provenance["calibrated"]
    assert (record["num_images"], record["false_reject_rate"], len(record["images"])) == (12, 0.2, 12)
    one = photos / "gear/test/good/000.png"
    assert after.predict(one).score == before.predict(one).score
    assert len(after.setup.scores) == 12  # the alarm follows the new photos
    assert len(before.setup.scores) == 16
    again = intra.calibrate(tmp_path, [new_good], out=tmp_path / "other.safetensors")
    assert again.threshold.asked_rate == 0.2  # as it was asked for


def test_what_the_model_knows_and_what_is_unreadable_is_refused_by_name(run, photos, new_good, tmp_path):
    trained = photos / "gear/train/good/003.png"
    with pytest.raises(InTraError, match=r"1 of 13 images were there when the model was trained.*003\.png"):
        intra.calibrate(run.path, [new_good, trained], out=tmp_path)
    (tmp_path / "half.png").write_bytes(trained.read_bytes()[:300])
    with pytest.raises(InTraError, match=r"half\.png"):
        intra.calibrate(run.path, [new_good, tmp_path / "half.png"], out=tmp_path)
    for target in (run.path, run.model_path):
        with pytest.raises(InTraError, match="choose another --out"):
            intra.calibrate(run.path, [new_good], out=target)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_same_picture_counts_once(run, new_good, tmp_path):
    copy = tmp_path / "copies"
    shutil.copytree(new_good, copy)
    with PIL.Image.open(copy / "000.png") as picture:
        picture.save(copy / "again.bmp")  # in another format
    found = intra.calibrate(run.path, [copy], out=tmp_path)
    assert found.duplicates == ((copy / "again.bmp", copy / "000.png"),)
    assert found.threshold.num_images == 12


def test_few_new_photos_keep_the_alarm_as_it_was(run, new_good, tmp_path):
    found = intra.calibrate(run.path, sorted(new_good.iterdir())[:4], out=tmp_path / "few.safetensors")
    assert not found.setup_refitted
    assert len(intra.Detector.load(tmp_path / "few.safetensors").setup.scores) == 16


def test_images_that_carry_the_threshold_test_nothing(run, photos, tmp_path):
    intra.calibrate(run.path, [photos / "gear/test/good"], out=tmp_path / "run")
    results = intra.evaluate(tmp_path / "run", photos / "gear", out=tmp_path / "out")
    assert results["num_left_out"] == 6
    assert "images" not in results["model"]["provenance"]["calibrated"]


def test_calibrate_and_audit_on_the_command_line(run, photos, new_good, tmp_path):
    said = command("calibrate", run.path, new_good, "--out", tmp_path / "new.safetensors", "--false-reject-rate", 0.001)
    assert "takes at least 999 images" in said
    assert "of 10 such sets" in said
    dark = tmp_path / "dark"
    dark.mkdir()
    for path in sorted(new_good.iterdir())[:3]:
        PIL.Image.fromarray(np.asarray(PIL.Image.open(path)) // 3).save(dark / path.name)
    said = command("predict", tmp_path / "new.safetensors", dark, "--out", tmp_path / "verdicts")
    assert "(darker)" in said
    assert "3 with another light, focus or pose than the good photos: no verdict on the part" in said
    rows = [json.loads(line) for line in (tmp_path / "verdicts/predictions.jsonl").read_text().splitlines()]
    assert all(row["setup_alarm"] and row["setup_reason"] == "darker" for row in rows)
    assert all(1 / 13 <= row["p_value"] <= 1 for row in rows)
    assert "003.png" in command("calibrate", run.path, photos / "gear/train/good/003.png", "--out", tmp_path, code=2)
    said = command("audit", photos, "--out", tmp_path / "audits", "--top", 3)
    assert "fabric: of 16 good photos" in said
    assert (tmp_path / "audits/gear/audit.html").exists()
