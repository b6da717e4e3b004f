"""The command line as a person uses it: every verb, wrong words, exit codes."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import TINY

SETTINGS = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
VERBS = ["check-data", "train", "evaluate", "predict", "demo", "benchmark", "watch", "record", "verify", "serve",
         "audit", "calibrate", "export"]


def intra(*words: object, code: int = 0) -> str:
    """What the command prints on both streams, on one line; its exit code is checked."""
    done = subprocess.run([sys.executable, "-m", "intra.cli", *map(str, words)], capture_output=True, text=True,
                          check=False, env=None)
    said = done.stdout + done.stderr
    assert done.returncode == code, said
    assert "Traceback" not in said
    return re.sub(r"\s+", " ", said)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example(verb):
    said = intra(verb, "--help")
    assert f"Example: intra {verb}" in said


def test_help_names_every_verb():
    said = intra("--help")
    assert all(verb in said for verb in VERBS)


def test_version():
    assert re.search(r"intra \d+\.\d+\.\d+", intra("--version"))


def test_near_words_are_suggested(photos, tmp_path):
    assert "evaluate" in intra("evalute", code=2)
    assert "--steps" in intra("train", photos, "--out", tmp_path, "--step", "3", code=2)
    assert "did you mean 'paper'" in intra("train", photos / "gear", "--out", tmp_path, "--preset", "papr", code=2)
    assert "did you mean 'train.batch_size'" in intra("train", photos / "gear", "--out", tmp_path, "--set",
                                                       "train.batchsize=3", code=2)


def test_mistakes_are_one_line(photos, tmp_path):
    assert "error:" in intra("check-data", tmp_path / "nowhere", code=2)
    (tmp_path / "empty").mkdir()
    assert "empty" in intra("train", tmp_path / "empty", "--out", tmp_path / "run", code=2)
    assert "no model" in intra("predict", tmp_path / "empty", photos, "--out", tmp_path / "out", code=2)
    said = intra("train", photos / "gear", "--out", tmp_path / "run", "--set", "train.batch_size", code=2)
    assert "has no '='" in said


def test_check_data(photos, tmp_path):
    assert "16 good images to train on" in intra("check-data", photos)
    broken = tmp_path / "set"
    broken.mkdir()
    for path in (photos / "gear" / "train" / "good").iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "003.png").write_bytes(b"")
    said = intra("check-data", broken, code=2)
    assert "003.png" in said


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory) -> Path:
    """Both categories, trained by one command."""
    out = tmp_path_factory.mktemp("cli")
    said = intra("train", photos, "--out", out / "runs", "--steps", 4, "--image-size", 64, *SETTINGS)
    assert "gear: trained after 4 steps" in said
    return out / "runs"


def test_a_root_of_categories(trained, photos, tmp_path):
    assert (trained / "gear" / "model.safetensors").exists()
    said = intra("evaluate", trained, photos, "--out", tmp_path)
    assert "fabric" in said
    for category in ("gear", "fabric"):
        results = json.loads((tmp_path / category / "results.json").read_text())
        assert results["num_test"] > 10
        assert (tmp_path / category / "report.html").stat().st_size > 10_000
        assert list((tmp_path / category / "maps").rglob("*.tiff"))


def test_resume_on_the_command_line(trained, photos):
    assert "already holds a run" in intra("train", photos / "gear", "--out", trained / "gear", code=2)
    assert "after 6 steps" in intra("train", photos / "gear", "--out", trained / "gear", "--steps", 6, "--resume")


def test_categories_that_a_stopped_call_had_not_come_to_are_begun_as_it_asked(trained, photos, tmp_path):
    shutil.copytree(trained / "fabric", tmp_path / "fabric")  # and gear is still to come
    resumed = "train", photos, "--out", tmp_path, "--resume"
    said = intra(*resumed, "--seed", 3, "--steps", 4, "--image-size", 64, *SETTINGS, code=2)
    assert "seed=0, asked is 3" in said
    assert "model.embed_dim=48, asked is 192" in intra(*resumed, code=2)  # a preset that it was not begun with
    assert "steps=4, asked is 5" in intra(*resumed, "--steps", 5, "--image-size", 64, *SETTINGS, code=2)
    roi = tmp_path / "roi.png"
    PIL.Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)).save(roi)
    said = intra(*resumed, "--steps", 4, "--image-size", 64, *SETTINGS, "--roi", roi, code=2)
    assert "another region of interest, or none" in said
    assert not (tmp_path / "gear").exists()
    assert "gear: trained after 4 steps" in intra(*resumed, "--steps", 4, "--image-size", 64, *SETTINGS)


def test_predict_files_and_folders(trained, photos, tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    for number, path in enumerate(sorted((photos / "gear" / "test" / "dent").iterdir())):
        (folder / f"part {number}.png").write_bytes(path.read_bytes())
    (folder / "notes.txt").write_text("no image")
    intra("predict", trained / "gear", folder, photos / "gear/test/good/000.png", "--out", tmp_path / "out",
          "--save-images")
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert {"path", "verdict", "score", "p_value", "is_anomalous", "threshold", "setup_alarm", "setup_reason",
            "defects"} <= rows[0].keys()
    for kind in ("overlay", "outline", "repaired", "mask"):
        with PIL.Image.open(tmp_path / "out" / "images" / f"part 0_{kind}.png") as picture:
            assert picture.size == (64, 64)


def test_predict_does_not_inspect_its_own_pictures(trained, photos, tmp_path, monkeypatch):
    folder = shutil.copytree(photos / "gear" / "test" / "dent", tmp_path / "new")
    count = len(list(folder.iterdir()))
    monkeypatch.chdir(folder)
    for given in (folder, ".", folder):
        intra("predict", trained / "gear", given, "--out", "verdicts", "--save-images")
        assert len((folder / "verdicts" / "predictions.jsonl").read_text().splitlines()) == count
    said = intra("predict", trained / "gear", "verdicts/images", "--out", "verdicts", code=2)
    assert "pictures of earlier verdicts" in said
    (folder / "verdicts" / "images" / "new.png").write_bytes((photos / "gear/test/good/000.png").read_bytes())
    intra("predict", trained / "gear", "verdicts/images", "--out", "verdicts")  # photos may lie in such a folder
    assert len((folder / "verdicts" / "predictions.jsonl").read_text().splitlines()) == 1


def test_an_unreadable_file_is_told_and_the_others_are_inspected(trained, photos, tmp_path):
    good = photos / "gear/test/good/000.png"
    (tmp_path / "half.png").write_bytes(good.read_bytes()[:500])
    said = intra("predict", trained / "gear", tmp_path / "half.png", good, "--out", tmp_path / "out", code=2)
    assert "half.png" in said
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert ["error" in row for row in rows] == [True, False]


def test_the_threshold_moves(trained, photos, tmp_path):
    folder = photos / "gear" / "test"
    for threshold, expected in ((1e9, False), (-1e9, True)):
        intra("predict", trained / "gear", folder, "--out", tmp_path, f"--threshold={threshold}")
        rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
        assert all(row["is_anomalous"] is expected for row in rows)


def test_a_plain_folder(photos, tmp_path):
    """Good photos directly in a folder; defective ones with masks beside it."""
    gear = photos / "gear"
    data = tmp_path / "plain"
    for source, target in (("train/good", "ok"), ("test", "bad"), ("ground_truth", "marks")):
        for path in (gear / source).rglob("*.png"):
            place = data / target / path.relative_to(gear / source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    intra("train", data, "--normal", "ok", "--out", tmp_path / "run", "--steps", 2, "--image-size", 64, *SETTINGS)
    intra("evaluate", tmp_path / "run", data, "--normal", "ok", "--anomalous", "bad", "--masks", "marks", "--out",
          tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["image_auroc"] is not None
    assert results["pixel_auroc"] is not None


def test_sixteen_bit_and_exif_photos_are_inspected(trained, tmp_path):
    deep = np.linspace(0, 65535, 50 * 70).reshape(50, 70).astype(np.uint16)
    PIL.Image.fromarray(deep).save(tmp_path / "deep.png")
    turned = PIL.Image.fromarray(np.zeros((50, 70, 3), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    intra("predict", trained / "gear", tmp_path / "deep.png", tmp_path / "turned.jpg", "--out", tmp_path / "out",
          "--save-images")
    with PIL.Image.open(tmp_path / "out" / "images" / "turned_mask.png") as mask:
        assert mask.size == (50, 70)
