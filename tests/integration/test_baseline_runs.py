"""The baselines through the whole journey: train, save, load, predict."""

import numpy as np
import pytest

from intra.data.folder import find_categories
from intra.errors import InTraError
from intra.inspection.detector import Detector
from intra.training.run import train

SMALL = {"model.base_width": "8", "train.precision": "fp32", "scoring.precision": "fp32"}


@pytest.mark.parametrize("name", ["autoencoder_l2", "autoencoder_ssim", "riad"])
def test_from_photos_to_verdicts(photos, tmp_path, name):
    run = train(photos / "gear", tmp_path / "run", preset=name, steps=3, image_size="96x64", settings=SMALL)
    detector = Detector.load(run.path)
    paths = [each.path for each in find_categories(photos / "gear")[0].test][:3]
    together = detector.predict_batch(paths)
    for path, prediction in zip(paths, together, strict=True):
        alone = detector.predict(path)
        assert alone.score == pytest.approx(prediction.score, rel=1e-4)
        assert prediction.anomaly_map.shape == prediction.repaired.shape[:2] == (64, 64)
        assert np.isfinite(prediction.anomaly_map).all()
    detector.save(tmp_path / "copy.safetensors")
    assert Detector.load(tmp_path / "copy.safetensors").predict(paths[0]).score == detector.predict(paths[0]).score


@pytest.mark.parametrize(("name", "image_size", "said"), [
    ("autoencoder_ssim", 80, "multiples of the patch, 32 px"), ("riad", 72, "multiples of the patch, 16 px"),
])  # fmt: skip
def test_a_wrong_image_size_is_refused(photos, tmp_path, name, image_size, said):
    with pytest.raises(InTraError, match=said):
        train(photos / "gear", tmp_path, preset=name, steps=1, image_size=image_size)


def test_a_small_patch_does_not_hide_a_wrong_image_size(photos, tmp_path):
    with pytest.raises(InTraError, match=r"72x72 px; .*multiples of 16 px"):
        train(photos / "gear", tmp_path, preset="riad", steps=1, image_size=72, settings={"model.patch_size": "8"})


def test_riad_learns(photos, tmp_path):
    run = train(photos / "gear", tmp_path, preset="riad", steps=25, image_size=64, settings=SMALL | {
        "train.learning_rate": "3e-3", "train.windows_per_image": "4"})
    losses = [float(line.split(",")[4]) for line in (run.path / "log.csv").read_text().splitlines()[1:]]
    assert losses[-1] < 0.7 * losses[0]  # in training: so early, the held-out one still jumps with the batch statistics
