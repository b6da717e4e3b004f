"""The training loop: plain, seeded, resumable. `fit` turns windows of good images into weights."""

import csv
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from lightning_fabric import Fabric
from torch import Tensor, nn

from intra.config import ModelConfig, TrainConfig
from intra.data.files import write_atomically
from intra.data.images import to_unit
from intra.errors import InTraError
from intra.inspection.device import in_chunks, memory_for
from intra.inspection.inpaint import repaired_views
from intra.training.checkpoint import CHECKPOINT_FILE, Progress, load_checkpoint, save_checkpoint
from intra.training.interrupt import stop_on_signal
from intra.training.loss import step_loss, validation_loss
from intra.training.sampler import Batch, WindowSampler

__all__ = ["Budget", "Fitted", "Report", "fit"]

CHECKPOINT_EVERY_S = 30.0
CHECKPOINT_S = 1.5  # one that takes longer is written more seldom
DECAY_SHARE = 0.2  # of the budget
IMAGES_PER_CHUNK = 8  # validated at a time
REPORT_EVERY_S = 0.5
LOG_FIELDS = ("step", "epoch", "elapsed_s", "learning_rate", "train_loss", "validation_loss", "windows_per_s")


@dataclass(frozen=True)
class Budget:
    """When training ends: whichever of the two is reached first; at least one is given."""

    steps: int | None = None
    seconds: float | None = None

    def spent(self, step: int, elapsed_s: float) -> float:
        """The share of the budget that is used up, in [0, 1]; the learning rate follows it."""
        shares = [step / self.steps] if self.steps else []
        shares += [elapsed_s / self.seconds] if self.seconds else []
        return min(1.0, max(shares))


@dataclass(frozen=True)
class Report:
    """What a progress bar shows."""

    step: int
    spent: float  # share of the budget, in [0, 1]
    train_loss: float
    validation_loss: float  # the best so far; infinite before the first
    windows_per_s: float
    unit: str  # of windows_per_s: "images/s" where a window is a whole image
    seconds_left: float


@dataclass(frozen=True)
class Fitted:
    """The outcome of `fit`; the network holds the best weights."""

    progress: Progress
    interrupted: bool
    diverged: str | None = None  # why it ended early, if the loss was no longer a number


def fit(  # noqa: PLR0913  all but three by keyword
    model: nn.Module, sampler: WindowSampler, validation_images: Shaped[Tensor, "n c h w"], *, config: TrainConfig,
    model_config: ModelConfig, lattice: int, budget: Budget, fabric: Fabric, out: Path, identity: dict[str, Any],
    resume: bool = False, on_report: Callable[[Report], None] | None = None,
) -> Fitted:  # fmt: skip
    """Trains the network and leaves the weights of the best validation loss in it.

    Validates at the end of every epoch and of the budget, on every patch of the validation images. Writes log.csv, and
    last.ckpt at first and about every half minute, more seldom where that takes more than a twentieth of the time.
    SIGINT and SIGTERM end it after the step in progress, with a checkpoint. A loss that is no longer a number ends it
    too; `diverged` then says where. Raises InTraError if that comes before the first validation, the memory does not
    suffice or the disk is full.
    """
    optimizer = _optimizer(model, config)
    checkpoint = out / CHECKPOINT_FILE
    network, optimizer = fabric.setup(model, optimizer)
    progress, best = Progress(), {name: value.clone() for name, value in model.state_dict().items()}
    if resume:  # after the set-up, which moves the weights to the device, but nothing of the optimiser
        progress, best = load_checkpoint(checkpoint, model=model, optimizer=optimizer)
        progress.finished = _is_finished(progress, config, budget)  # the budget may be another one now
    log = _Log(out, keep_until=progress.step)
    meter = _Meter(progress, unit="images/s" if sampler.window_shape == sampler.grid else "windows/s")
    saved_at, saving_s = time.monotonic(), 0.0

    def checkpoint_now() -> None:
        nonlocal saved_at, saving_s
        _refuse_nan(meter.last_loss, meter, checkpoint)
        begun = time.monotonic()
        save_checkpoint(checkpoint, model=model, best=best, optimizer=optimizer, progress=progress, identity=identity)
        saved_at = time.monotonic()
        saving_s = saved_at - begun

    checkpoint_now()  # what is asked for is on the disk before the first step, and so is the room for it
    with stop_on_signal() as stop, _divergence(progress) as diverged:
        while not progress.finished and not stop.is_set():
            rate = _learning_rate(config, budget.spent(progress.step, progress.elapsed_s))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = _step(network, optimizer, sampler.batch(progress.step), fabric=fabric, config=config,
                         model_config=model_config)
            progress.step += 1
            meter.add(loss, sampler.batch_size)
            spent = budget.spent(progress.step, progress.elapsed_s)
            if on_report and meter.is_due():
                on_report(meter.report(spent, progress.best_validation_loss))
            if progress.step % sampler.steps_per_epoch == 0 or spent >= 1:
                with fabric.autocast():
                    held_out_loss = validate(model, validation_images, config=config, model_config=model_config,
                                             lattice=lattice)
                meter.tick()
                log.write(progress, sampler.steps_per_epoch, rate, meter, held_out_loss)
                _judge(meter, held_out_loss, model, best, checkpoint)
                progress.finished = _is_finished(progress, config, budget)
            if time.monotonic() - saved_at > checkpoint_wait(saving_s) and not progress.finished:
                checkpoint_now()
        checkpoint_now()
    log.close()
    if progress.best_step:  # else it was stopped before the first validation: the last weights are the best known
        model.load_state_dict(best)
    return Fitted(progress, stop.is_set() and not progress.finished, diverged[0] if diverged else None)


def checkpoint_wait(saving_s: float) -> float:
    """Seconds from a checkpoint that took so long to the next: writing them takes a twentieth of the time at most, but
    if it is very slow no more than five minutes of training can be lost.
    """
    return CHECKPOINT_EVERY_S * min(10.0, max(1.0, saving_s / CHECKPOINT_S))


def _step(
    network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, *, fabric: Fabric, config: TrainConfig,
    model_config: ModelConfig,
) -> Float[Tensor, ""]:  # fmt: skip
    """One step of the optimiser; returns the loss before it, still on the device."""
    network.train()
    advice = ("train anew with a smaller --set train.batch_size=… or --image-size, or --resume this run with more "
              "memory")  # fewer windows a step would be another training: the user decides
    with memory_for(f"a step of train.batch_size={config.batch_size}", advice):
        with fabric.autocast():  # Fabric casts in `forward` by itself, but not in `segment`
            loss = step_loss(network, batch, config=config, model_config=model_config)
        fabric.backward(loss)
        if config.gradient_clip is not None:
            fabric.clip_gradients(network, optimizer, max_norm=config.gradient_clip, error_if_nonfinite=False)
        optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


@torch.no_grad()
def validate(
    model: nn.Module, images: Shaped[Tensor, "n c h w"], *, config: TrainConfig, model_config: ModelConfig,
    lattice: int,
) -> float:  # fmt: skip
    """The loss over every patch of the images, each hidden once; one random window an image would be luck.

    The mean over the views where a network repairs an image several times.
    """
    model.eval()

    def work(start: int, stop: int) -> float:
        pixels = to_unit(images[start:stop])
        views = repaired_views(model, pixels, model_config=model_config, lattice=lattice)
        losses = [validation_loss(view, pixels, config=config, model_config=model_config) for view in views]
        return float(torch.stack(losses).mean()) * len(pixels)

    return sum(in_chunks(work, len(images), IMAGES_PER_CHUNK)) / len(images)


def _is_finished(progress: Progress, config: TrainConfig, budget: Budget) -> bool:
    if config.patience is not None and progress.epochs_without_better >= config.patience:
        return True
    return budget.spent(progress.step, progress.elapsed_s) >= 1


def _judge(
    meter: "_Meter", validation_loss: float, model: nn.Module, best: dict[str, Tensor], checkpoint: Path
) -> None:
    """Keeps the weights if they are the best so far. Raises DivergedError if the loss is not a number.

    A segmenter's are kept in any case: the loss says nothing of them, and they have not seen the defects to be found.
    """
    for loss in (meter.mean_loss, validation_loss):  # the first also speaks of the segmenter
        _refuse_nan(loss, meter, checkpoint)
    progress = meter.progress
    is_better = validation_loss < progress.best_validation_loss
    for name, value in model.state_dict().items():
        if is_better or name.startswith("segmenter."):
            best[name].copy_(value)
    if is_better:
        progress.best_validation_loss, progress.best_step = validation_loss, progress.step
        progress.epochs_without_better = 0
    else:
        progress.epochs_without_better += 1


def _refuse_nan(loss: float, meter: "_Meter", checkpoint: Path) -> None:
    if not math.isfinite(loss):
        raise DivergedError(f"the loss is no longer a number at step {meter.first_bad_step}; {checkpoint} holds the "
                            "last good state, if any; train with --set train.precision=fp32 or a lower "
                            "train.learning_rate")


class DivergedError(InTraError):
    """The loss is no longer a number."""


@contextmanager
def _divergence(progress: Progress) -> Iterator[list[str]]:
    """Ends the training where the loss is no longer a number, and lets it raise only if no best weights are known."""
    reasons: list[str] = []
    try:
        yield reasons
    except DivergedError as error:
        if not progress.best_step:
            raise
        reasons.append(str(error))


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam, or AdamW that shrinks matrices only, not biases, norms and what belongs to a position."""
    matrices = [p for name, p in model.named_parameters()
                if p.ndim >= 2 and not name.startswith(("pos_embed", "mean_patches"))]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(groups, lr=config.learning_rate, fused=True)


def _learning_rate(config: TrainConfig, spent: float) -> float:
    """Linear warm-up, then constant, down half a cosine to zero at the end of the budget, or constant until the last
    DECAY_SHARE of it and down a line to zero ("trapezoid", Hägele et al. 2024).
    """
    decay = min(1.0, (1 - spent) / DECAY_SHARE) if config.schedule == "trapezoid" else 1.0
    if spent < config.warmup_fraction:
        return config.learning_rate * min(decay, (spent + 1e-3) / (config.warmup_fraction + 1e-3))
    if config.schedule != "cosine":
        return config.learning_rate * decay
    along = (spent - config.warmup_fraction) / (1 - config.warmup_fraction)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * along))


class _Meter:
    """Loss, rate and time; reads the loss from the device only when somebody asks."""

    def __init__(self, progress: Progress, *, unit: str) -> None:
        self.progress = progress
        self.unit = unit
        self.before_s = progress.elapsed_s
        self.started = self.last_report = time.monotonic()
        self.losses: list[Tensor] = []  # since the last validation
        self.losses_before: list[Tensor] = []  # from the validation before to the last
        self.mean_loss = 0.0  # of losses_before
        self.last = torch.zeros(())
        self.windows = 0

    def tick(self) -> None:
        self.progress.elapsed_s = self.before_s + time.monotonic() - self.started

    def add(self, loss: Tensor, windows: int) -> None:
        self.losses.append(loss)
        self.last = loss
        self.windows += windows
        self.tick()

    def is_due(self) -> bool:
        due = time.monotonic() - self.last_report >= REPORT_EVERY_S
        if due:
            self.last_report = time.monotonic()
        return due

    @property
    def windows_per_s(self) -> float:
        return self.windows / max(time.monotonic() - self.started, 1e-9)

    @property
    def last_loss(self) -> float:
        return float(self.last)

    def report(self, spent: float, best: float) -> Report:
        seconds = self.progress.elapsed_s
        return Report(self.progress.step, spent, self.last_loss, best, self.windows_per_s, self.unit,
                      seconds / max(spent, 1e-9) * (1 - spent))

    def take_mean_loss(self) -> float:
        """The mean loss since the last call."""
        self.mean_loss = float(torch.stack(self.losses).mean()) if self.losses else float("nan")
        self.losses_before, self.losses = self.losses, []
        return self.mean_loss

    @property
    def first_bad_step(self) -> int:
        """The first step whose loss is no number: nobody looked at it then, as that would hold up a GPU."""
        losses = torch.stack([*self.losses_before, *self.losses, self.last])[:-1]
        bad = (~losses.isfinite()).nonzero()
        return self.progress.step - len(losses) + int(bad[0]) + 1 if len(bad) else self.progress.step


class _Log:
    """log.csv, and TensorBoard's event files where it is installed."""

    def __init__(self, out: Path, *, keep_until: int) -> None:
        self.path = out / "log.csv"
        kept: list[list[str]] = []
        if self.path.exists() and keep_until:  # a resumed run does again what came after its checkpoint
            with self.path.open(newline="") as file:
                rows = list(csv.reader(line.replace("\0", "") for line in file))
            kept = [row for row in rows  # a power cut may have torn a line
                    if len(row) == len(LOG_FIELDS) and row[0].isdigit() and int(row[0]) <= keep_until]
        write_atomically(self.path, "\n".join([",".join(LOG_FIELDS), *map(",".join, kept)]) + "\n")
        self.board: Any = None
        with suppress(ImportError, OSError):  # it is not needed to go on
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=keep_until + 1)

    def write(
        self, progress: Progress, steps_per_epoch: int, rate: float, meter: _Meter, validation_loss: float
    ) -> None:
        train_loss = meter.take_mean_loss()
        row = (progress.step, progress.step // steps_per_epoch, f"{progress.elapsed_s:.2f}", f"{rate:.3e}",
               f"{train_loss:.6f}", f"{validation_loss:.6f}", f"{meter.windows_per_s:.1f}")
        try:
            with self.path.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(row)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InTraError(f"cannot write {self.path}: {error.strerror or error}; free some space, then --resume "
                             "goes on") from error
        if self.board is not None:
            try:
                for name, value in (("loss/train", train_loss), ("loss/validation", validation_loss),
                                    ("learning_rate", rate)):
                    self.board.add_scalar(name, value, progress.step)
            except OSError:  # its thread has failed to write; log.csv has all of it
                self.board = None

    def close(self) -> None:
        if self.board is not None:
            with suppress(OSError):
                self.board.close()
