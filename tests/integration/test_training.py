"""Training: it learns, the same seed gives the same weights, and nothing but time is lost when it is stopped."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import TINY
from lightning_fabric import Fabric
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from intra.config import preset
from intra.data.folder import find_categories, find_category
from intra.errors import InTraError
from intra.inspection.detector import Detector
from intra.inspection.device import OutOfMemoryError
from intra.training import engine
from intra.training.checkpoint import read_header
from intra.training.run import Run, _on_the_device, recalibrate, train

GOLDEN = Path(__file__).parents[1] / "golden" / "loss_curve.json"


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.model_path)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_it_learns(run):
    losses = [float(row["validation_loss"]) for row in log_of(run.path)]
    assert losses[-1] < 0.5 * losses[0]
    assert run.best_validation_loss == pytest.approx(min(losses), abs=1e-6)
    assert run.num_steps == 60
    assert not run.interrupted


def test_a_run_holds_what_was_promised(run):
    assert {path.name for path in run.path.iterdir()} >= {"model.safetensors", "log.csv", "last.ckpt"}
    info = Detector.load(run.path).info
    provenance = info["provenance"]
    assert provenance["num_train"] + provenance["num_validation"] == 16
    assert len(provenance["training_images"]) == 16
    assert provenance["seed"] == 0
    assert provenance["pretrained_weights"] is None
    assert info["preprocessing"]["height"] == info["preprocessing"]["width"] == 64


def test_same_seed_same_weights(photos, tmp_path):
    runs = [train(photos / "gear", tmp_path / str(n), steps=12, image_size=64, settings=TINY, seed=seed)
            for n, seed in enumerate((3, 3, 4))]
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))


@pytest.mark.parametrize("settings", [
    {},
    {"train.precision": "bf16"},
    {"model.window_size": "3", "model.segmenter_width": "0", "model.readout": "mean", "train.hidden_fraction": "none",
     "train.batch_size": "32", "train.optimizer": "adam", "train.flips": "on", "train.turns": "on"},
    {"model.network": "riad", "model.segmenter_width": "0", "model.base_width": "4", "model.cell_sizes": "2,8",
     "model.num_cell_sets": "2"},
], ids=["lattice", "bf16", "paper", "riad"])  # fmt: skip
def test_resumed_equals_uninterrupted(photos, tmp_path, settings):
    """Bit for bit, also when stopped in the middle of an epoch."""
    settings = TINY | settings
    whole = train(photos / "gear", tmp_path / "whole", steps=28, image_size=64, settings=settings)
    seen = []

    def stop_at_17(report):
        seen.append(report.step)
        if report.step >= 17 and len(seen) < 1000:
            os.kill(os.getpid(), signal.SIGINT)
            seen.extend([0] * 1000)

    interval = "intra.training.engine.REPORT_EVERY_S"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interval, 0.0)
        stopped = train(photos / "gear", tmp_path / "part", steps=28, image_size=64, settings=settings,
                        on_report=stop_at_17)
    assert stopped.interrupted
    assert stopped.num_steps < 28
    assert Detector.load(stopped.path).threshold is not None  # usable as it is
    resumed = train(photos / "gear", tmp_path / "part", resume=True)  # with the budget of the run
    assert not resumed.interrupted
    assert resumed.num_steps == 28
    assert same(weights(resumed), weights(whole))
    columns = ("step", "epoch", "learning_rate", "validation_loss")
    assert [[row[c] for c in columns] for row in log_of(resumed.path)] == [
        [row[c] for c in columns] for row in log_of(whole.path)]


def test_a_resumed_state_is_loaded_where_the_weights_are(photos, tmp_path, monkeypatch):
    """Fabric moves the weights to the device, but nothing of the optimiser: that has to be loaded afterwards."""
    train(photos / "gear", tmp_path, steps=2, image_size=64, settings=TINY)
    order = []

    def noted(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **settings: (order.append(name), real(*args, **settings))[1])

    noted(Fabric, "setup")
    noted(engine, "load_checkpoint")
    train(photos / "gear", tmp_path, steps=4, resume=True)
    assert order == ["setup", "load_checkpoint"]


def test_kill_9_leaves_a_run_that_resumes(photos, tmp_path):
    out = tmp_path / "run"
    script = (
        "import intra.training.engine as engine, sys\n"
        "engine.CHECKPOINT_EVERY_S = 0.0\n"
        "from intra.training.run import train\n"
        f"train({str(photos / 'gear')!r}, {str(out)!r}, steps=100000, image_size=64, settings={TINY!r})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "last.ckpt").exists() or read_header(out / "last.ckpt")["progress"]["step"] < 2:
        assert child.poll() is None, "training ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    child.kill()
    child.wait()
    assert not (out / "model.safetensors").exists()
    resumed = train(photos / "gear", out, steps=1, resume=True)  # the budget is spent: what is there becomes the model
    assert resumed.num_steps >= 2
    Detector.load(out)


def test_resume_refuses_what_does_not_fit(photos, run, tmp_path):
    with pytest.raises(InTraError, match="already holds a run"):
        train(photos / "gear", run.path, steps=1)
    with pytest.raises(InTraError, match=r"other settings \(model\.depth=3, asked is 2\); resume"):
        train(photos / "gear", run.path, steps=1, resume=True, image_size=64, settings=TINY | {"model.depth": "2"})
    with pytest.raises(InTraError, match=r"asked is paper; model\.patch_size=8, asked is 16; .*; …\); resume"):
        train(photos / "gear", run.path, steps=1, resume=True, preset="paper")
    with pytest.raises(InTraError, match="seed"):
        train(photos / "gear", run.path, steps=1, resume=True, seed=5)
    with pytest.raises(InTraError, match="no longer those"):
        train(photos / "fabric", run.path, steps=1, resume=True)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "last.ckpt").write_bytes((run.path / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(InTraError, match="damaged"):
        train(photos / "gear", damaged, steps=1, resume=True)


def test_stopped_before_the_first_validation_the_last_weights_count(photos, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("intra.training.engine.REPORT_EVERY_S", 0.0)
        stopped = train(photos / "gear", tmp_path, steps=40, image_size=64, settings=TINY,
                        on_report=lambda report: os.kill(os.getpid(), signal.SIGINT) if report.step == 3 else None)
    assert stopped.interrupted
    state = load_file(tmp_path / "last.ckpt")
    trained = {name: value for name, value in state.items() if name.startswith("model.")}
    assert all(torch.equal(weights(stopped)[name], value) for name, value in trained.items())


def test_a_torn_log_and_an_incomplete_checkpoint(photos, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    with (folder / "log.csv").open("ab") as file:
        file.write(b"19,1\n2\n\0\0\0")
    assert train(photos / "gear", folder, steps=62, resume=True).num_steps == 62
    assert all(row["validation_loss"] for row in log_of(folder))
    tensors = load_file(folder / "last.ckpt")
    with safe_open(folder / "last.ckpt", framework="pt") as opened:
        header = opened.metadata()
    tensors.pop("model.head.bias")
    save_file(tensors, folder / "last.ckpt", metadata=header)
    with pytest.raises(InTraError, match="incomplete"):
        train(photos / "gear", folder, steps=64, resume=True)


def test_resume_never_overwrites_a_model_without_a_checkpoint(photos, run, tmp_path):
    shutil.copy(run.model_path, tmp_path)
    with pytest.raises(InTraError, match=r"no last\.ckpt"):
        train(photos / "gear", tmp_path, steps=1, resume=True)


def test_odd_folders_and_shares(photos, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(photos / "gear" / "train" / "good", folder)
    (folder / "zz.png").symlink_to("/nowhere.png")
    with pytest.raises(InTraError, match=r"zz\.png"):
        train(folder, tmp_path / "a", steps=1, image_size=64, settings=TINY)
    most = TINY | {"data.validation_fraction": "0.97"}
    assert Detector.load(train(photos / "gear", tmp_path / "b", steps=1, image_size=64, settings=most).path
                         ).provenance["num_train"] == 8
    few = TINY | {"scoring.reference": "validation", "data.max_validation_images": "2"}
    with pytest.raises(InTraError, match="at least 3 held-out"):
        train(photos / "gear", tmp_path / "c", steps=1, image_size=64, settings=few)
    with pytest.raises(InTraError, match="seed"):
        train(photos / "gear", tmp_path / "d", steps=1, image_size=64, settings=TINY, seed=2**32)


def test_rates_of_the_schedules():
    """Warmed up, then held, and at the end of the budget down to zero; the paper's rate stays."""
    fast, paper = preset("fast").train, preset("paper").train
    rates = [engine._learning_rate(fast, spent) / 1e-3 for spent in (0.0, 0.015, 0.03, 0.5, 0.8, 0.9, 1.0)]
    assert rates == pytest.approx([0.032, 0.52, 1, 1, 1, 0.5, 0], abs=0.01)
    cosine = replace(fast, schedule="cosine")
    assert engine._learning_rate(cosine, 0.515) == pytest.approx(0.5 * fast.learning_rate)
    assert engine._learning_rate(paper, 1.0) == paper.learning_rate
    long = [engine._learning_rate(replace(fast, warmup_fraction=0.9), spent / 20) for spent in range(21)]
    assert max(abs(a - b) for a, b in pairwise(long)) < 0.3 * fast.learning_rate  # no jump where the ramps meet


def test_resume_without_a_checkpoint_begins(photos, tmp_path):
    assert train(photos / "gear", tmp_path, steps=2, image_size=64, settings=TINY, resume=True).num_steps == 2


def test_what_was_asked_for_is_on_the_disk_before_the_first_step(photos, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "_step", killed)
        train(photos / "gear", tmp_path, steps=3, image_size=64, settings=TINY, seed=7)
    run = train(photos / "gear", tmp_path, resume=True)
    assert run.num_steps == 3
    provenance = Detector.load(run.path).info
    assert provenance["provenance"]["seed"] == 7
    assert provenance["config"]["model"]["embed_dim"] == 48


def test_photos_that_no_memory_holds_are_one_line():
    class Large(torch.Tensor):
        def to(self, *args, **kwargs):
            raise RuntimeError("CUDA out of memory. Tried to allocate 80 GiB")

    large = torch.zeros(2, 3, 4, 4).as_subclass(Large)
    with pytest.raises(OutOfMemoryError, match="does not suffice for 4 photos on cpu; pass --device cpu"):
        _on_the_device((large, large), torch.device("cpu"))


def test_reading_is_told_of(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("INTRA_CACHE", "")
    told = []
    train(photos / "gear", tmp_path, steps=1, image_size=64, settings=TINY,
          on_reading=lambda done, total: told.append((done, total)))
    assert told == [(number, 16) for number in range(1, 17)]


def test_budgets(photos, tmp_path):
    timed = train(photos / "gear", tmp_path / "m", minutes=0.02, image_size=64, settings=TINY)
    assert 1.2 <= timed.elapsed_s < 20
    rates = [float(row["learning_rate"]) for row in log_of(timed.path)]
    assert rates[-1] < 0.2 * preset("fast").train.learning_rate  # the schedule has come to its end
    epochs = train(photos / "gear", tmp_path / "e", epochs=2, image_size=64, settings=TINY)
    assert [row["epoch"] for row in log_of(epochs.path)] == ["1", "2"]
    settings = TINY | {"train.max_epochs": "1"}  # the preset's steps and minutes are more
    assert train(photos / "gear", tmp_path / "own", image_size=64, settings=settings).num_steps == (
        int(log_of(epochs.path)[0]["step"]))
    for none in (math.inf, math.nan):
        with pytest.raises(InTraError, match="--minutes must be above 0, and a number"):
            train(photos / "gear", tmp_path / "b", minutes=none, image_size=64, settings=TINY)
    with pytest.raises(InTraError, match="one budget"):
        train(photos / "gear", tmp_path / "b", steps=1, epochs=1, image_size=64, settings=TINY)
    with pytest.raises(InTraError, match="above 0"):
        train(photos / "gear", tmp_path / "b", steps=0, image_size=64, settings=TINY)


def test_patience_ends_training(photos, tmp_path):
    settings = TINY | {"train.learning_rate": "1e-30", "train.weight_decay": "0", "train.patience": "2",
                       "train.schedule": "constant", "train.warmup_fraction": "0"}
    stopped = train(photos / "gear", tmp_path, steps=500, image_size=64, settings=settings)
    assert stopped.num_steps < 200


def test_checkpoints_that_take_long_are_written_more_seldom(photos, tmp_path, monkeypatch):
    assert [engine.checkpoint_wait(saving_s) for saving_s in (0.0, 1.5, 3.0, 100.0)] == [30, 30, 60, 300]
    written = []
    original = engine.save_checkpoint
    monkeypatch.setattr(engine, "save_checkpoint", lambda *args, **kw: written.append(1) or original(*args, **kw))
    for name, wait_s in (("often", 0.0), ("seldom", 1000.0)):
        monkeypatch.setattr(engine, "checkpoint_wait", lambda _, wait_s=wait_s: wait_s)
        train(photos / "gear", tmp_path / name, steps=6, image_size=64, settings=TINY)
    assert len(written) == (1 + 5 + 1) + (1 + 1)  # before the first step, after each, and at the end


def test_a_run_that_fails_in_its_first_step_leaves_the_folder_free(photos, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("CUDA out of memory. Tried to allocate 80 GiB")

    with monkeypatch.context() as patch, pytest.raises(OutOfMemoryError, match=r"smaller --set train\.batch_size"):
        patch.setattr(engine, "step_loss", full)
        train(photos / "gear", tmp_path, steps=3, image_size=64, settings=TINY)
    smaller = TINY | {"train.batch_size": "4"}
    assert train(photos / "gear", tmp_path, steps=3, image_size=64, settings=smaller).num_steps == 3


def test_a_resumed_run_keeps_its_new_budget(photos, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    train(photos / "gear", tmp_path, steps=2, image_size=64, settings=TINY)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "_step", killed)
        train(photos / "gear", tmp_path, steps=4, resume=True)
    assert train(photos / "gear", tmp_path, resume=True).num_steps == 4


def test_a_loss_that_is_no_number_stops_training_and_keeps_the_last_good_state(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("intra.training.engine.CHECKPOINT_EVERY_S", 0.0)
    original, calls = engine.step_loss, []

    def fails_at_12(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs) * (float("nan") if len(calls) == 12 else 1.0)

    with monkeypatch.context() as patch, pytest.raises(InTraError, match="no longer a number at step 12"):
        patch.setattr(engine, "step_loss", fails_at_12)
        train(photos / "gear", tmp_path, steps=60, image_size=64, settings=TINY)
    assert not (tmp_path / "model.safetensors").exists()
    assert train(photos / "gear", tmp_path, steps=15, resume=True).best_validation_loss < 1


def test_mistakes_are_named(photos, tmp_path):
    with pytest.raises(InTraError, match=r"multiples of the patch.*64x64"):
        train(photos / "gear", tmp_path, steps=1, image_size=63, settings=TINY)
    with pytest.raises(InTraError, match="did you mean 'fast'"):
        train(photos / "gear", tmp_path, steps=1, preset="fats")
    with pytest.raises(InTraError, match="2 categories"):
        train(photos, tmp_path, steps=1)
    with pytest.raises(InTraError, match="device"):
        train(photos / "gear", tmp_path, steps=1, device="cuda:77")
    with pytest.raises(InTraError, match="window"):
        train(photos / "gear", tmp_path, steps=1, preset="paper", image_size=64)


def test_no_image_is_decoded_twice(photos, tmp_path, monkeypatch):
    from intra.data import images

    monkeypatch.setenv("INTRA_CACHE", str(tmp_path / "cache"))
    decoded: list[str] = []
    original = images.read_image
    monkeypatch.setattr(images, "read_image", lambda image, **kw: decoded.append(str(image)) or original(image, **kw))
    for folder in ("first", "second"):  # the second takes them from the cache
        train(photos / "gear", tmp_path / folder, steps=15, image_size=64, settings=TINY)
        assert sorted(decoded) == sorted(str(path) for path in find_categories(photos / "gear")[0].train)


def test_the_paper_preset_trains_and_inspects(photos, tmp_path):
    """The paper's network and protocol, on images of 112 px and with a small batch so that it takes seconds."""
    run = train(photos / "gear", tmp_path, preset="paper", steps=2, image_size=112,
                settings={"train.batch_size": "4", "data.max_validation_images": "1", "train.windows_per_image": "1",
                          "scoring.max_reference_images": "2"})
    detector = Detector.load(run.path)
    assert sum(p.numel() for p in detector.model.parameters()) > 54e6
    prediction = detector.predict(find_categories(photos / "gear")[0].test[0].path)
    assert prediction.anomaly_map.shape == (64, 64)


def test_golden_losses(photos, tmp_path):
    """The first 20 losses, as they were when the file was written: a refactoring must not move them.

    To renew it on purpose: delete the file and run this test once.
    """
    losses: list[float] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("intra.training.engine.REPORT_EVERY_S", 0.0)
        train(photos / "gear", tmp_path, steps=20, image_size=64, settings=TINY,
              on_report=lambda report: losses.append(report.train_loss))
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps([round(loss, 7) for loss in losses], indent=1) + "\n")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=2e-3)


def test_the_segmenter_trains_in_the_precision_of_the_run(photos, tmp_path, monkeypatch):
    """Fabric casts in `forward` alone; a segmenter in fp32 would take twice the time unseen."""
    from intra.models import Segmenter

    seen = set()
    forward = Segmenter.forward

    def watched(self, given):
        found = forward(self, given)
        seen.add((self.training, found.dtype))
        return found

    monkeypatch.setattr(Segmenter, "forward", watched)
    train(photos / "gear", tmp_path, steps=2, image_size=64, settings=TINY | {"train.precision": "bf16"})
    assert (True, torch.bfloat16) in seen
    assert (True, torch.float32) not in seen


@pytest.mark.parametrize(("first", "then"), [("0", "1"), ("1", "0")])
def test_the_segmenters_part_can_be_switched_on_and_off_afterwards(photos, tmp_path, first, then):
    """As if it had been trained so; the file says what it holds."""
    settings = TINY | {"scoring.segmenter_weight": first}
    run = train(photos / "gear", tmp_path / "run", steps=6, image_size=64, settings=settings)
    other = recalibrate(run.path, find_category(photos / "gear"), out=tmp_path / "other",
                        settings={"scoring.segmenter_weight": then})
    anew = train(photos / "gear", tmp_path / "anew", steps=6, image_size=64,
                 settings=TINY | {"scoring.segmenter_weight": then})
    photo = next((photos / "gear" / "test" / "good").iterdir())
    changed, expected, before = (Detector.load(each.path).predict(photo) for each in (other, anew, run))
    assert changed.score == pytest.approx(expected.score, rel=1e-5)
    assert changed.threshold == pytest.approx(expected.threshold, rel=1e-5)
    assert changed.score != before.score
