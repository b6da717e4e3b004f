"""A real detector on the demo set: results.json, report.html and maps/, and what becomes of incomplete data."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import intra
from intra.data.demo import make_demo
from intra.evaluation import metrics
from intra.evaluation.evaluate import evaluate_category

KEYS = {"category", "image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_aupro",
        "false_reject_rate", "recall", "per_defect", "threshold", "seconds_per_image", "num_train", "num_test",
        "num_left_out", "reasons", "notes", "model", "provenance", "peak_memory_mib", "images"}  # fmt: skip
TINY = {"model.depth": "2", "model.embed_dim": "48", "model.num_heads": "4", "model.patch_size": "8"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fabric category of the demo set: 4 good test images, 2 of each of 4 kinds of defects."""
    root = tmp_path_factory.mktemp("demo")
    return make_demo(root, size_px=64, num_train=12, num_test_good=4, num_per_defect=2, seed=0)[0]


@pytest.fixture(scope="module")
def detector(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> intra.Detector:
    run = intra.train(demo, out=tmp_path_factory.mktemp("runs") / "run", preset="fast", steps=20, image_size=(64, 64),
                      settings=TINY, device="cpu")
    return intra.Detector.load(run.path, device="cpu")


@pytest.fixture
def copy(demo: Path, tmp_path: Path) -> Path:
    """A category that the test may change."""
    return shutil.copytree(demo, tmp_path / "fabric")


def _read(path: Path) -> np.ndarray:
    return np.asarray(PIL.Image.open(path))


def test_results_report_and_maps(detector: intra.Detector, demo: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    out = tmp_path / "evaluation"
    results = intra.evaluate(detector, demo, out=out, on_progress=lambda done, total: steps.append((done, total)))
    assert steps == [(8, 12), (12, 12)]
    assert set(results) == KEYS
    assert json.loads((out / "results.json").read_text()) == results
    assert (results["num_test"], results["num_train"], results["num_left_out"]) == (12, 9, 0)
    assert results["reasons"] == {}
    assert results["threshold"] == detector.threshold
    assert 0 < results["seconds_per_image"] < 60
    assert results["model"]["config"]["preset"] == "fast"
    assert "training_images" not in results["model"]["provenance"]
    assert set(results["per_defect"]) == {path.name for path in (demo / "test").iterdir()} - {"good"}
    html = (out / "report.html").read_text("utf-8")
    for row in results["images"]:
        assert row["path"] in html
    assert not list(out.rglob("*.part"))


def test_figures_follow_from_the_files(detector: intra.Detector, demo: Path, tmp_path: Path) -> None:
    results = intra.evaluate(detector, demo, out=tmp_path)
    rows = results["images"]
    scores, labels = np.array([row["score"] for row in rows]), np.array([row["label"] == 1 for row in rows])
    assert {row["path"] for row in rows} == {path.relative_to(demo).as_posix() for path in demo.glob("test/*/*.png")}
    assert labels.tolist() == [not row["path"].startswith("test/good/") for row in rows]
    assert [row["is_anomalous"] for row in rows] == (scores > detector.threshold).tolist()
    pairs = [(bad > good) + 0.5 * (bad == good) for bad in scores[labels] for good in scores[~labels]]
    assert results["image_auroc"] == pytest.approx(np.mean(pairs))
    assert results["recall"] == pytest.approx(np.mean(scores[labels] > detector.threshold))
    assert results["false_reject_rate"] == pytest.approx(np.mean(scores[~labels] > detector.threshold))

    maps, masks = [], []
    for row in rows:
        path = demo / row["path"]
        maps.append(_read(tmp_path / "maps" / path.parent.name / f"{path.stem}.tiff"))
        mask = demo / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        masks.append(_read(mask) > 0 if row["label"] else np.zeros((64, 64), bool))
        assert maps[-1].dtype == np.float32
        assert maps[-1] == pytest.approx(detector.predict(path).anomaly_map, rel=0.05, abs=1e-3)  # bf16, other batch
    assert results["pixel_aupro"] == pytest.approx(metrics.aupro(maps, masks), abs=1e-12)
    holes = [i for i, row in enumerate(rows) if row["defect"] in ("good", "hole")]
    assert results["per_defect"]["hole"]["pixel_aupro"] == pytest.approx(
        metrics.aupro([maps[i] for i in holes], [masks[i] for i in holes]), abs=1e-12)


def test_a_run_evaluates_like_its_detector(detector: intra.Detector, demo: Path, tmp_path: Path) -> None:
    detector.save(tmp_path / "model.safetensors")
    first = intra.evaluate(tmp_path / "model.safetensors", demo, out=tmp_path / "a", device="cpu")
    second = intra.evaluate(detector, demo, out=tmp_path / "b")
    assert first["images"] == second["images"]
    assert first["per_defect"] == second["per_defect"]


def test_without_masks_pixel_metrics_are_null(detector: intra.Detector, copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "ground_truth")
    results = intra.evaluate(detector, copy, out=tmp_path / "out")
    for key in ("pixel_auroc", "pixel_ap", "pixel_aupro"):
        assert results[key] is None
        assert results["reasons"][key] == "none of the 8 anomalous test images has a mask"
        assert results["reasons"][f"per_defect.hole.{key}"] == "none of its images has a marked pixel"
    assert results["image_auroc"] is not None
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "Cannot be computed: none of the 8 anomalous test images has a mask." in html


def test_an_image_without_a_mask_is_left_out_of_pixel_metrics(
    detector: intra.Detector, copy: Path, tmp_path: Path
) -> None:
    (copy / "ground_truth" / "hole" / "000_mask.png").unlink()
    partly = intra.evaluate(detector, copy, out=tmp_path / "partly")
    assert "1 of 8 anomalous images have no mask; the pixel figures leave them out." in partly["notes"]
    assert partly["num_test"] == 12
    (copy / "test" / "hole" / "000.png").unlink()
    without = intra.evaluate(detector, copy, out=tmp_path / "without")
    assert without["pixel_aupro"] == pytest.approx(partly["pixel_aupro"], abs=0.02)  # bf16 in other batches


def test_only_good_or_only_defective_images(detector: intra.Detector, copy: Path, tmp_path: Path) -> None:
    shutil.move(copy / "test" / "good", tmp_path / "good")
    results = intra.evaluate(detector, copy, out=tmp_path / "bad")
    assert results["image_auroc"] is None
    assert results["false_reject_rate"] is None
    assert results["reasons"]["image_auroc"] == "no good test images"
    assert results["recall"] is not None
    assert results["pixel_aupro"] is not None
    shutil.rmtree(copy / "test")
    shutil.move(tmp_path / "good", copy / "test" / "good")
    results = intra.evaluate(detector, copy, out=tmp_path / "good-only")
    assert results["recall"] is None
    assert results["reasons"]["pixel_auroc"] == "no anomalous test images"
    assert results["per_defect"] == {}
    assert results["false_reject_rate"] is not None


def test_images_that_were_trained_on_test_nothing(detector: intra.Detector, copy: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(copy / "train" / "good", plain / "ok")
    shutil.copytree(copy / "test", plain / "bad", ignore=shutil.ignore_patterns("good"))
    results = intra.evaluate(detector, plain, out=tmp_path / "a", normal="ok", anomalous="bad")
    assert (results["num_left_out"], results["num_test"]) == (12, 8)
    assert "12 good test images are left out" in results["notes"][0]
    assert "has not seen" in results["notes"][0]
    assert results["image_auroc"] is None
    shutil.copytree(copy / "test" / "good", plain / "bad" / "good")
    shutil.copy(next((plain / "ok").iterdir()), plain / "bad" / "good" / "seen.png")
    results = intra.evaluate(detector, plain, out=tmp_path / "b", normal="ok", anomalous="bad")
    assert (results["num_left_out"], results["num_test"]) == (1, 12)
    assert results["image_auroc"] is not None


def test_two_images_of_one_stem_keep_two_maps(detector: intra.Detector, copy: Path, tmp_path: Path) -> None:
    PIL.Image.open(copy / "test" / "good" / "000.png").convert("L").save(copy / "test" / "good" / "000.bmp")
    intra.evaluate(detector, copy, out=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out" / "maps" / "good").iterdir()} == {
        "000.tiff", "000.png.tiff", "001.tiff", "002.tiff", "003.tiff"}


def test_mistakes_are_named(detector: intra.Detector, copy: Path, tmp_path: Path) -> None:
    mask = copy / "ground_truth" / "hole" / "000_mask.png"
    PIL.Image.open(mask).resize((32, 64)).save(mask)
    with pytest.raises(intra.InTraError, match=r"000_mask\.png is 64x32 px, but its image .* is 64x64 px"):
        intra.evaluate(detector, copy, out=tmp_path / "out")
    shutil.copytree(copy, copy.parent / "other")
    with pytest.raises(intra.InTraError, match=r"2 categories \(fabric, other\)"):
        intra.evaluate(detector, copy.parent, out=tmp_path / "out")
    shutil.rmtree(copy / "test")
    with pytest.raises(intra.InTraError, match="no test images; expected test/good"):
        intra.evaluate(detector, copy, out=tmp_path / "out")
    shutil.copytree(copy / "train" / "good", copy / "test" / "good")
    with pytest.raises(intra.InTraError, match="no test images that the model was not trained on"):
        intra.evaluate(detector, copy, out=tmp_path / "out")


def test_a_category_that_is_already_found(detector: intra.Detector, demo: Path, tmp_path: Path) -> None:
    from intra.data.folder import find_categories

    for category in find_categories(demo.parent):
        results = evaluate_category(detector, category, out=tmp_path / category.name)
        assert results["category"] == category.name
        assert (tmp_path / category.name / "report.html").stat().st_size > 10_000
