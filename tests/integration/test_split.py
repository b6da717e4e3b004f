"""Which photos are held out: none that trains, each picture once, and enough of them to decide for each other."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TINY

import intra
from intra.config import preset
from intra.data import images as data_images
from intra.data.folder import find_category, fingerprints_of
from intra.data.images import prepare, read_image
from intra.errors import InTraError
from intra.inspection.calibration import calibrate
from intra.inspection.detector import Detector
from intra.training.run import _read_split, _resolve, recalibrate, train


def split(folder: Path, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    category = find_category(folder)
    config = _resolve(preset("fast"), category, None)
    return _read_split(category, config, seed, fingerprints_of(category))


@pytest.mark.parametrize("seed", range(4))
def test_copies_are_never_on_both_sides_and_count_once(photos, tmp_path, seed):
    shutil.copytree(photos / "gear/train/good", tmp_path / "gear")
    before = split(tmp_path / "gear", seed)
    for path in sorted((tmp_path / "gear").iterdir()):
        shutil.copy(path, path.with_name(f"{path.stem} copy.png"))
    for images, others in zip(split(tmp_path / "gear", seed), before, strict=True):
        assert torch.equal(images, others)


def test_without_copies_the_split_is_as_ever(photos):
    """A run that was begun before goes on with the same photos."""
    training, held_out = split(photos / "gear", 0)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    both = torch.empty(16, *training.shape[1:], dtype=torch.uint8)
    both[order[3:].sort().values], both[order[:3].sort().values] = training, held_out
    for image, path in zip(both, find_category(photos / "gear").train, strict=True):
        assert torch.equal(image, prepare(read_image(path), size=(256, 256), channels=3))


def large_jpegs(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).resize((1536, 1536)).save(folder / f"{number:02}.jpg")


def test_of_large_jpegs_only_new_held_out_ones_are_decoded_again(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    large_jpegs(tmp_path / "photos")
    monkeypatch.setenv("INTRA_CACHE", str(tmp_path / "cache"))
    decoded: list[str] = []
    monkeypatch.setattr(data_images, "read_image",
                        lambda image, **kw: decoded.append(str(image)) or read_image(image, **kw))
    for seed, expected in ((0, 15), (0, 0), (1, 3), (0, 0)):  # those held out twice
        decoded.clear()
        split(tmp_path / "photos", seed)
        assert len(decoded) == expected


def test_held_out_photos_are_read_as_those_to_inspect(tmp_path):
    """Large JPEGs to train on are decoded at a half: what decides the threshold is not."""
    large_jpegs(tmp_path)
    training, held_out = split(tmp_path, 0)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    whole = torch.stack([prepare(read_image(tmp_path / f"{number:02}.jpg"), size=(256, 256), channels=3)
                         for number in range(12)])
    assert torch.equal(held_out, whole[order[:3].sort().values])
    away = (training.int() - whole[order[3:].sort().values].int()).abs()
    assert 0 < away.max() <= 4


def test_held_out_photos_of_8_bits_are_as_those_of_16_that_train(tmp_path):
    for number in range(12):
        value = np.uint16(13107) if number == 5 else np.uint8(51)
        PIL.Image.fromarray(np.full((64 + number, 64), value)).save(tmp_path / f"{number:02}.png")
    sides = [split(tmp_path, seed) for seed in range(8)]
    assert {5 in torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:3] for seed in range(8)} == {
        False, True}  # the deep one is on either side
    for training, held_out in sides:
        torch.testing.assert_close(training, torch.full_like(training, 0.2))
        torch.testing.assert_close(held_out, torch.full_like(held_out, 0.2))


def test_copies_alone_are_too_few(photos, tmp_path):
    (tmp_path / "gear").mkdir()
    for number in range(12):
        shutil.copy(photos / f"gear/train/good/00{number % 3}.png", tmp_path / f"gear/{number}.png")
    with pytest.raises(InTraError, match="at least 10 good images that differ, found 3 in 12 files"):
        train(tmp_path / "gear", tmp_path / "run", steps=1, image_size=64, settings=TINY)


@pytest.mark.parametrize("most", ["1", "2"])
def test_too_few_held_out_photos_decide_nothing_for_themselves(photos, tmp_path, most):
    few = TINY | {"data.max_validation_images": most}
    with pytest.raises(InTraError, match=rf"at least 3 held-out .*distribution\), found {most}; .*max_validation"):
        train(photos / "gear", tmp_path, steps=1, image_size=64, settings=few)
    assert not (tmp_path / "last.ckpt").exists()


def test_where_they_decide_the_threshold_alone_one_is_enough():
    held_out, trained_on = torch.rand(1, 1, 4, 4), torch.rand(5, 1, 4, 4)
    _, scores = calibrate(held_out, trained_on, kinds=("difference",), scoring=preset("paper").scoring)
    assert len(scores) == 1
    with pytest.raises(InTraError, match="evidence: difference, segmenter"):
        calibrate(held_out.expand(2, 2, -1, -1), trained_on.expand(-1, 2, -1, -1), kinds=("difference", "segmenter"),
                  scoring=preset("paper").scoring)


def test_a_threshold_of_the_held_out_photos_is_no_longer_that_of_new_ones(run, photos, tmp_path):
    intra.calibrate(run.path, [photos / "gear/test/good"], out=tmp_path / "june")
    assert "calibrated" in Detector.load(tmp_path / "june").provenance
    again = Detector.load(recalibrate(tmp_path / "june", photos / "gear", out=tmp_path / "again", settings={}).path)
    assert "calibrated" not in again.provenance
    assert np.allclose(again.held_out_scores, Detector.load(run.path).held_out_scores, rtol=1e-5)
    results = intra.evaluate(again, photos / "gear", out=tmp_path / "out")
    assert results["num_left_out"] == 0
