"""Full disks, read-only folders, vanished files, losses that are no number, too little memory: named, nothing lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, no_larger_file_than, read_only_folder
from safetensors.torch import load_file

from intra.data.files import remove_leftovers, write_atomically
from intra.data.folder import find_category
from intra.errors import InTraError
from intra.evaluation.evaluate import evaluate_category
from intra.evaluation.predict import predict_files
from intra.inspection import device
from intra.inspection.detector import Detector
from intra.inspection.device import OutOfMemoryError, in_chunks, is_out_of_memory
from intra.inspection.distribution import GoodPatches
from intra.inspection.model_file import MODEL_FILE
from intra.training import engine
from intra.training.checkpoint import read_header
from intra.training.run import train

ROOT = Path(__file__).parents[2]


class TestFiles:
    def test_a_full_disk_leaves_what_was_there(self, tmp_path):
        write_atomically(tmp_path / "file", "before")
        with no_larger_file_than(1000), pytest.raises(InTraError, match="free some space"):
            write_atomically(tmp_path / "file", bytes(2000))
        assert (tmp_path / "file").read_text() == "before"
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_disk_that_is_full_only_when_it_is_flushed(self, tmp_path, monkeypatch):
        """Network drives tell so late."""
        write_atomically(tmp_path / "file", "before")

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(InTraError, match="No space left on device"):
            write_atomically(tmp_path / "file", "after")
        assert (tmp_path / "file").read_text() == "before"
        assert len(list(tmp_path.iterdir())) == 1

    def test_file_and_folder_are_on_the_disk_before_it_returns(self, tmp_path, monkeypatch):
        synced = []
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda handle: synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
                            or fsync(handle))
        write_atomically(tmp_path / "file", "text")
        assert len(synced) == 2
        assert synced[0].endswith(".part")
        assert synced[1] == str(tmp_path.resolve())

    @pytest.mark.parametrize("mask", ["077", "002"])
    def test_who_may_read_a_file_is_for_the_umask_to_say(self, tmp_path, mask):
        code = "from pathlib import Path; from intra.data.files import write_atomically as w; w(Path('file'), 'text')"
        subprocess.run(["sh", "-c", f'umask {mask}; exec "$0" -c "$1"', sys.executable, code], check=True, cwd=tmp_path)
        assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~int(mask, 8)

    def test_a_read_only_folder(self):
        with read_only_folder() as folder, pytest.raises(InTraError, match="choose another --out"):
            write_atomically(folder / "file", "text")

    def test_leftovers_of_killed_processes_go_and_young_ones_stay(self, tmp_path):
        for name in (".model.safetensors.abc.part", ".young.abc.part", "mine.part", ".hidden"):
            (tmp_path / name).touch()
            os.utime(tmp_path / name, (time.time() - 3600,) * 2)
        (tmp_path / ".young.abc.part").touch()
        remove_leftovers(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {".young.abc.part", "mine.part", ".hidden"}
        remove_leftovers(tmp_path, older_than_s=0.0)
        assert {path.name for path in tmp_path.iterdir()} == {"mine.part", ".hidden"}


class TestFullDisk:
    def test_training_ends_and_goes_on_from_the_last_checkpoint(self, photos, tmp_path, monkeypatch):
        monkeypatch.setattr(engine, "CHECKPOINT_EVERY_S", 0.0)
        train(photos / "gear", tmp_path, steps=4, image_size=64, settings=TINY)
        before = (tmp_path / "last.ckpt").read_bytes()
        with no_larger_file_than(len(before) // 2), pytest.raises(InTraError, match="free some space"):
            train(photos / "gear", tmp_path, steps=8, resume=True)
        assert (tmp_path / "last.ckpt").read_bytes() == before
        Detector.load(tmp_path)
        assert not list(tmp_path.glob(".*.part"))
        assert train(photos / "gear", tmp_path, steps=8, resume=True).num_steps == 8

    def test_a_log_that_cannot_be_written_is_one_line(self, photos, tmp_path, monkeypatch):
        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(engine.csv, "writer", full)
        with pytest.raises(InTraError, match=r"log\.csv: No space left.*--resume"):
            train(photos / "gear", tmp_path, steps=2, image_size=64, settings=TINY)

    def test_evaluation_and_prediction(self, photos, run, tmp_path):
        category, detector = find_category(photos / "gear"), Detector.load(run.path)
        with no_larger_file_than(100), pytest.raises(InTraError, match="free some space"):
            evaluate_category(detector, category, out=tmp_path / "results")
        assert not list((tmp_path / "results").rglob("*.*"))
        with no_larger_file_than(100), pytest.raises(InTraError, match="cannot write"):
            predict_files(detector, [photos / "gear" / "test"], tmp_path / "verdicts")


class TestReadOnly:
    def test_every_verb_says_so(self, run):
        detector = Detector.load(run.path)
        with read_only_folder() as folder:
            # as nobody, the photos of the session may be out of reach: what is read is read before
            for work in (lambda: detector.save(folder / "run" / "model.safetensors"),
                         lambda: engine._Log(folder / "run", keep_until=0),
                         lambda: predict_files(detector, [__file__], folder / "out")):  # fmt: skip
                with pytest.raises(InTraError, match="cannot write"):
                    work()


class TestVanishedFiles:
    def test_training_names_it(self, photos, tmp_path):
        shutil.copytree(photos / "gear", tmp_path / "gear")
        category = find_category(tmp_path / "gear")
        category.train[3].unlink()
        with pytest.raises(InTraError, match=category.train[3].name):
            train(category, tmp_path / "run", steps=1, image_size=64, settings=TINY)

    def test_evaluation_names_it(self, photos, run, tmp_path):
        shutil.copytree(photos / "gear", tmp_path / "gear")
        category = find_category(tmp_path / "gear")
        category.test[2].path.unlink()
        with pytest.raises(InTraError, match=category.test[2].path.name):
            evaluate_category(Detector.load(run.path), category, out=tmp_path / "results")
        assert not (tmp_path / "results" / "results.json").exists()

    def test_prediction_goes_on_with_the_others(self, photos, run, tmp_path, monkeypatch):
        from intra.evaluation import predict

        shutil.copytree(photos / "gear" / "test" / "good", tmp_path / "new")
        first = min((tmp_path / "new").iterdir())
        listed = predict.image_files([tmp_path / "new"])
        monkeypatch.setattr(predict, "image_files", lambda images: listed)
        first.unlink()
        assert predict_files(Detector.load(run.path), [tmp_path / "new"], tmp_path / "out") == [first]
        rows = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
        assert "no such file" in rows[0]["error"]
        assert len(rows) == len(listed)


class TestLossThatIsNoNumber:
    def test_the_best_weights_become_the_model_and_the_place_is_named(self, photos, tmp_path, monkeypatch):
        """Steps 1 to 19 are good, of which some were validated; 20 is not, and nobody looks until the next."""
        original, calls = engine.step_loss, []

        def fails_at_20(*args, **kwargs):
            calls.append(1)
            return original(*args, **kwargs) * (float("nan") if len(calls) == 20 else 1.0)

        monkeypatch.setattr(engine, "step_loss", fails_at_20)
        with pytest.raises(InTraError, match=r"no longer a number at step 20; .*best weights before it, of step"):
            train(photos / "gear", tmp_path, steps=60, image_size=64, settings=TINY)
        detector = Detector.load(tmp_path)
        best_step = detector.provenance["best_step"]
        assert 0 < best_step < 20
        monkeypatch.setattr(engine, "step_loss", original)
        straight = train(photos / "gear", tmp_path / "straight", steps=60, image_size=64, settings=TINY,
                         on_report=None)  # the same draws: its log says what the best was worth
        losses = {int(row.split(",")[0]): row.split(",")[5] for row in
                  (straight.path / "log.csv").read_text().splitlines()[1:]}
        assert detector.provenance["best_validation_loss"] == pytest.approx(float(losses[best_step]), rel=1e-3)
        assert all(torch.isfinite(value).all() for value in load_file(tmp_path / "model.safetensors").values())


class TestTooLittleMemory:
    def test_what_torch_and_numpy_really_say_is_understood(self):
        for ask in (lambda: torch.empty(2**50, dtype=torch.uint8), lambda: np.empty(2**50, dtype=np.uint8)):
            with pytest.raises((RuntimeError, MemoryError)) as caught:
                ask()
            assert is_out_of_memory(caught.value)
        assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
        assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(…)`"))
        assert not is_out_of_memory(RuntimeError("shapes do not fit"))

    def test_portions_are_halved_and_all_is_done_once(self, caplog):
        sizes, done = [], []

        def work(start: int, stop: int) -> int:
            sizes.append(stop - start)
            if stop - start > 3:
                raise MemoryError
            done.extend(range(start, stop))
            return stop

        assert list(in_chunks(work, 11, 16)) == [2, 4, 6, 8, 10, 11]
        assert done == list(range(11))
        assert sizes[:3] == [11, 5, 2]
        assert "going on with 2" in caplog.text

    def test_one_that_does_not_fit_is_an_error_that_says_what_to_do(self):
        def work(start: int, stop: int) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

        with pytest.raises(OutOfMemoryError, match="smaller --image-size"):
            list(in_chunks(work, 5, 5))

    def test_other_errors_are_not_hidden(self):
        def work(start: int, stop: int) -> None:
            raise RuntimeError("a mistake")

        with pytest.raises(RuntimeError, match="a mistake"):
            list(in_chunks(work, 5, 5))

    @pytest.mark.parametrize("most", [1, 5])
    def test_the_verdicts_are_the_same(self, photos, run, monkeypatch, most):
        """Images by images, and inside each image windows by windows."""
        images = sorted((photos / "gear" / "test").rglob("*.png"))[:6]
        detector = Detector.load(run.path)
        expected = [prediction.score for prediction in detector.predict_batch(images)]
        inpaint, sizes = detector.model.inpaint, []

        def small(patches, *others):
            sizes.append(len(patches))
            if len(patches) > most:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
            return inpaint(patches, *others)

        monkeypatch.setattr(detector.model, "inpaint", small)
        found = [prediction.score for prediction in detector.predict_batch(images)]
        assert found == pytest.approx(expected, rel=1e-4)
        assert max(sizes) > most

    def test_training_says_what_to_do_and_keeps_the_checkpoint(self, photos, tmp_path, monkeypatch):
        monkeypatch.setattr(engine, "CHECKPOINT_EVERY_S", 0.0)
        original, calls = engine.step_loss, []

        def fails_at_5(*args, **kwargs):
            calls.append(1)
            if len(calls) == 5:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return original(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(InTraError, match=r"train\.batch_size"):
            patch.setattr(engine, "step_loss", fails_at_5)
            train(photos / "gear", tmp_path, steps=8, image_size=64, settings=TINY)
        assert read_header(tmp_path / "last.ckpt")["progress"]["step"] == 4
        assert train(photos / "gear", tmp_path, steps=8, resume=True).num_steps == 8

    def test_a_calibration_says_what_to_do_and_is_made_up_for(self, photos, tmp_path, monkeypatch):
        def fails(*_, **__):
            raise MemoryError

        with monkeypatch.context() as patch, pytest.raises(InTraError, match="go on with --resume"):
            patch.setattr(GoodPatches, "fitted", fails)
            train(photos / "gear", tmp_path, steps=2, image_size=64, settings=TINY)
        assert not (tmp_path / MODEL_FILE).exists()
        train(photos / "gear", tmp_path, resume=True)
        assert Detector.load(tmp_path).threshold > 0

    def test_a_gpu_that_computes_nothing_is_left_alone(self, monkeypatch, caplog):
        assert device.pick_device("auto").type == "cpu"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # what an old driver or an old card says
        assert device.pick_device("auto").type == "cpu"
        assert "the GPU cannot be used (" in caplog.text
        for name in ("cuda", "meta", "toaster"):
            with pytest.raises(InTraError, match=f"device '{name}' cannot be used here"):
                device.pick_device(name)
        with pytest.raises(InTraError, match="'mps' cannot be used: torch has not all there"):
            device.pick_device("mps")

    def test_the_memory_of_the_device_is_asked_for_only_after_an_error(self):
        assert list(device.in_chunks(lambda start, stop: (start, stop), 5, 2)) == [(0, 2), (2, 4), (4, 5)]


def test_kills_at_random_moments(tmp_path):
    """A few of the 50 of benchmarks/kill.py."""
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "kill.py", "--kills", "6", "--out",
                           tmp_path / "found.json"], capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kills"] >= 6
    assert not found["failures"]
