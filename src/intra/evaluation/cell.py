"""One cell of a benchmark: one method on one category with one seed, in a process of its own → one JSON file."""

import hashlib
import json
import math
import shlex
import signal
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from intra.config import Config, flat
from intra.data.files import name_below, sha256_of, write_atomically
from intra.data.folder import Category
from intra.errors import InTraError
from intra.evaluation.evaluate import evaluate_category
from intra.evaluation.methods import Method
from intra.inspection.detector import Detector
from intra.inspection.model_file import MODEL_FILE
from intra.provenance import code_sha256, commit_of_the_code
from intra.training.checkpoint import CHECKPOINT_FILE
from intra.training.engine import Report
from intra.training.run import Run, recalibrate, train

__all__ = ["CELLS_FOLDER", "Cell", "Stopped", "fingerprint_of", "run_cell", "work"]

CELLS_FOLDER = "cells"  # below `out`
ASKED_FILE = "asked.json"  # in the run's folder: what was asked for when it was begun
# settings that count only without a budget
SAID_BY_THE_BUDGET = ("train.max_steps", "train.max_epochs", "train.max_minutes")
ELSEWHERE = ("images", "model", "provenance", "peak_memory_mib")  # of results.json: left out, or named otherwise

Tell = Callable[[float, str], None]  # share done, and what a person reads; raises Stopped


class Stopped(Exception):  # noqa: N818, nothing went wrong
    """The benchmark is to end; the cell goes on the next time."""


@dataclass(frozen=True)
class Cell:
    """What is to be measured, and where it goes."""

    method: Method
    category: Category
    seed: int
    budget: Mapping[str, Any]  # steps, minutes or epochs: how many
    fingerprint: str  # of the category's photos
    out: Path
    device: str
    threads: int  # torch's, of this cell's process
    jobs: int  # cells at a time
    weights_from: str | None = None  # the name of the cell whose weights are scored, instead of training

    @property
    def name(self) -> str:
        """Also that of its file and its folder."""
        return f"{self.method.name}__{self.category.name}__{self.seed}"

    @property
    def file(self) -> Path:
        """Is there once the cell is finished."""
        return self.out / CELLS_FOLDER / f"{self.name}.json"

    @property
    def run(self) -> Path:
        """The folder of its training and its report."""
        return self.out / "runs" / self.name

    @property
    def has_weights(self) -> bool:
        """Whether it is finished and its model is still there."""
        return self.file.exists() and (self.run / MODEL_FILE).exists()

    @property
    def is_begun(self) -> bool:
        """Whether there is a training of its own to go on with."""
        return (self.run / CHECKPOINT_FILE).exists()

    @property
    def asked(self) -> dict[str, Any]:
        """What makes this the same cell the next time, fit for JSON."""
        config = self.method.config.to_dict()
        return json.loads(json.dumps({"config": config, "seed": self.seed, "budget": dict(self.budget),
                                      "photos": self.fingerprint}))  # fmt: skip

    @property
    def command(self) -> str:
        """The command line that measures this cell alone; DATA and the folder by name."""
        words = ["intra", "benchmark", self.category.name, "--out", "out", "--method", self.method.text, "--seeds",
                 str(self.seed)]
        words += [word for key, value in self.budget.items() for word in (f"--{key}", f"{value:.10g}")]
        return shlex.join([*words, *([] if self.device == "auto" else ["--device", self.device])])

    def check(self) -> None:
        """Raises InTraError if the finished cell, or the training that was begun, is of something else."""
        if self.file.exists():
            path, key = self.file, "asked"
        elif self.is_begun:  # one that failed before may be asked for otherwise
            path, key = self.run / ASKED_FILE, None
        else:
            return
        different = _differences(_stored(path, key), self.asked)
        if different:
            raise InTraError(f"{path} is of {'; '.join(different)}; choose another --out, or ask for the same")


def fingerprint_of(category: Category) -> str:
    """The SHA-256 over names and contents of all photos and masks of a category."""
    masks = [test.mask for test in category.test if test.mask]
    paths = [*category.train, *(test.path for test in category.test), *masks]
    lines = {f"{name_below(path, category.root)} {sha256_of(path)}" for path in paths}
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()


def work(cell: Cell, connection: Connection) -> None:
    """The whole life of a cell's process: tells of progress, and last ("done", "") or ("failed", why).

    Ends early if the other side sends anything or is gone; a training then keeps its checkpoint.
    """
    torch.set_num_threads(cell.threads)

    def tell(share: float, text: str) -> None:
        try:
            if connection.poll():  # a message, or the end of the process that would read ours
                raise Stopped
            connection.send(("running", share, text))
        except OSError as error:
            raise Stopped from error

    try:
        run_cell(cell, tell)
        last = "done", 1.0, ""
    except Stopped:
        return
    except InTraError as error:
        last = "failed", 1.0, str(error)
    except Exception as error:
        path = cell.run / "traceback.txt"
        write_atomically(path, traceback.format_exc())
        last = "failed", 1.0, f"{type(error).__name__}: {error} ({path})"
    connection.send(last)


def run_cell(cell: Cell, tell: Tell) -> dict[str, Any]:
    """Trains or recalibrates, evaluates, and writes the cell's file, whose content it returns."""
    commit, code = commit_of_the_code(), code_sha256()  # of the code that runs, before anybody changes it
    run = _weights(cell, tell)
    detector = Detector.load(run.path, device=cell.device)
    results = evaluate_category(detector, cell.category, out=cell.run / "results", save_maps=False,
                                on_progress=lambda done, total: tell(done / total, f"evaluating {done}/{total}"))
    record = {
        "method": cell.method.name,
        "preset": cell.method.preset,
        "settings": dict(cell.method.settings),
        "category": cell.category.name,
        "seed": cell.seed,
        "budget": dict(cell.budget),
        "command": cell.command,
        "data": {"fingerprint": cell.fingerprint, "num_train": results["num_train"],
                 "num_validation": detector.provenance["num_validation"], "num_test": results["num_test"],
                 "image_size": list(detector.config.model.image_size)},
        "hardware": results["provenance"]["hardware"] | {"jobs": cell.jobs},
        "commit": commit,
        "code_sha256": code,  # also where there is no checkout
        "versions": results["provenance"]["versions"],
        "date": results["provenance"]["date"],
        "weights_from": cell.weights_from,
        "training": _training(run, detector),
        "num_parameters": sum(parameter.numel() for parameter in detector.model.parameters()),
        "peak_memory_mib": results["peak_memory_mib"],  # of this process alone, which may have resumed a training
        "peak_gpu_memory_mib": _peak_gpu_memory_mib(detector.device),
        "results": {key: value for key, value in results.items() if key not in ELSEWHERE},
        "asked": cell.asked,
    }  # fmt: skip
    write_atomically(cell.file, json.dumps(record, indent=2, allow_nan=False) + "\n")
    return record


def _weights(cell: Cell, tell: Tell) -> Run:
    """The trained run, or another cell's weights calibrated for this method."""
    write_atomically(cell.run / ASKED_FILE, json.dumps(cell.asked, indent=2) + "\n")

    def show_calibration(done: int, total: int) -> None:
        tell(done / total, f"calibrating {done}/{total}")

    if cell.weights_from is not None:
        source = cell.out / "runs" / cell.weights_from
        return recalibrate(source, cell.category, out=cell.run, settings=cell.method.scoring, device=cell.device,
                           on_calibration=show_calibration)

    def show(report: Report) -> None:
        try:
            tell(report.spent, f"step {report.step}  loss {report.train_loss:.4f}  {report.windows_per_s:.1f} "
                               f"{report.unit}  {report.seconds_left / 60:.1f} min left")
        except Stopped:
            if callable(signal.getsignal(signal.SIGTERM)):  # else it has been asked to already
                signal.raise_signal(signal.SIGTERM)  # training ends after this step, with a checkpoint

    if not cell.is_begun:  # weights that were calibrated for this cell, and never scored, are no training to go on with
        (cell.run / MODEL_FILE).unlink(missing_ok=True)
    run = train(cell.category, cell.run, preset=cell.method.preset, settings=cell.method.settings, seed=cell.seed,
                device=cell.device, resume=True, on_report=show, on_calibration=show_calibration, **cell.budget)
    if run.interrupted:
        raise Stopped
    return run


def _training(run: Run, detector: Detector) -> dict[str, Any]:
    windows = run.num_steps * detector.config.train.batch_size
    loss = run.best_validation_loss
    return {"elapsed_s": round(run.elapsed_s, 1), "num_steps": run.num_steps,
            "windows_per_s": round(windows / run.elapsed_s, 2) if run.elapsed_s else None,
            "best_validation_loss": loss if math.isfinite(loss) else None}


def _peak_gpu_memory_mib(device: torch.device) -> float | None:
    return round(torch.cuda.max_memory_allocated(device) / 1024**2, 1) if device.type == "cuda" else None


def _stored(path: Path, key: str | None) -> Mapping[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        found = stored[key] if key else stored
        found["config"]["model"], found["seed"], found["budget"], found["photos"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InTraError(f"{path} is damaged ({error!r}); delete it, and run the benchmark again") from error
    return found


def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What was asked for otherwise. A setting that the stored cell's intra did not know had its default."""
    old, new = (flat(each["config"]) for each in (stored, asked))
    old = flat(json.loads(json.dumps(Config().to_dict()))) | old
    found = [f"{key}={old[key]}, asked is {value}" for key, value in new.items()
             if old[key] != value and key not in SAID_BY_THE_BUDGET]
    if stored["budget"] != asked["budget"]:
        before, now = (", ".join(f"{key}={value:.10g}" for key, value in each["budget"].items())
                       for each in (stored, asked))
        found.append(f"the budget {before}, asked is {now}")
    if stored["seed"] != asked["seed"]:
        found.append(f"the seed {stored['seed']}, asked is {asked['seed']}")
    if stored["photos"] != asked["photos"]:
        found.append("other photos or masks")
    return found
