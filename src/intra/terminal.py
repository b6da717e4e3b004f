"""What the verbs of the command line share: arguments and options, what is printed, progress bars."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from intra.evaluation.benchmark import Event
    from intra.inspection.detector import Prediction
    from intra.training.engine import Report

__all__ = ["AnomalousOption", "DataArgument", "DeviceOption", "MasksOption", "NormalOption", "OutOption",
           "OwnRunArgument", "RateOption", "RunArgument", "ThresholdOption", "bar", "cells_bar", "loss_text",
           "make_console", "say", "say_error", "say_verdict", "training_bar"]

DataArgument = Annotated[Path, typer.Argument(
    metavar="DATA", help="A category in MVTec's layout (train/good, test/*, ground_truth/*), a folder of several, or a "
                         "plain folder of photos of good parts.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write to.")]
RunArgument = Annotated[Path, typer.Argument(
    metavar="RUN", help="The folder that `intra train` wrote, a model file, or an exported model.")]
OwnRunArgument = Annotated[Path, typer.Argument(
    metavar="RUN", help="The folder that `intra train` wrote, or a model file; no exported model.")]
NormalOption = Annotated[Path | None, typer.Option(
    metavar="DIR", help="Photos of good parts, where DATA is no category; below DATA or anywhere.")]
AnomalousOption = Annotated[Path | None, typer.Option(
    metavar="DIR", help="Photos of defective parts, where DATA is no category.")]
MasksOption = Annotated[Path | None, typer.Option(
    metavar="DIR", help="Masks NAME_mask.png of the defective parts, where DATA is no category.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
ThresholdOption = Annotated[float | None, typer.Option(help="Replaces the model's threshold; no training is needed.")]
RateOption = Annotated[float | None, typer.Option(
    "--false-reject-rate", metavar="SHARE",
    help="The share of good parts that may be rejected, e.g. 0.01; moves the threshold, no training is needed.")]


def make_console() -> Any:
    """Where the verbs print: the terminal, or a file or a pipe."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)  # a file or a pipe has no width to break lines at


def say(console: Any, text: str, style: str | None = None) -> None:
    """Prints one line as it is; what is no text in a file's name, or commands a terminal, is escaped."""
    from intra.data.files import printable

    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)


def say_verdict(console: "Console", path: Path | str, prediction: "Prediction | None", error: str | None) -> None:
    """Prints what was found on one photo, in one line."""
    if prediction is None:
        say(console, f"not inspected  {error}", style="yellow")
        return
    word, style = {"good": ("good  ", None), "defect": ("DEFECT", "red"), "setup": ("SETUP ", "magenta")}[
        prediction.verdict]
    reason = f"  ({prediction.setup_reason})" if prediction.setup_alarm else ""
    say(console, f"{word}  {prediction.score:.4g}  {path}{reason}", style=style)


def say_error(message: str) -> None:
    """Prints a mistake of the user, in one line on the error stream."""
    from rich.console import Console

    say(Console(stderr=True), f"error: {message}", style="bold red")


@contextmanager
def bar(label: str, *, unit: str) -> Iterator[Callable[..., None]]:
    """A progress bar; yields a function that takes how many are done, and if known how many there are."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                  TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), transient=True) as progress:  # fmt: skip
        task = progress.add_task(label, total=None, rate="")

        def step(done: int, total: int | None = None) -> None:
            progress.update(task, completed=done, total=total)
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:.1f} {unit}" if speed else "")

        yield step


@contextmanager
def cells_bar() -> "Iterator[Callable[[Event], None]]":
    """A progress bar for each cell of a benchmark that runs; yields what shows an event. Ended ones get a line."""
    from rich.progress import BarColumn, Progress, TextColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}", markup=False),
                  transient=True) as progress:  # fmt: skip
        tasks: dict[str, Any] = {}

        def show(event: "Event") -> None:
            if event.state == "running":
                if event.cell not in tasks:
                    tasks[event.cell] = progress.add_task(event.cell, total=1.0, text="")
                progress.update(tasks[event.cell], completed=event.share, text=event.text)
                return
            if event.cell in tasks:
                progress.remove_task(tasks.pop(event.cell))
            progress.console.print(f"{event.num_ended}/{event.num_cells} {event.cell}: {event.state}  {event.text}",
                                   style="red" if event.state == "failed" else None, highlight=False, markup=False,
                                   soft_wrap=True)

        yield show


@contextmanager
def training_bar(
    label: str
) -> "Iterator[tuple[Callable[[int, int], None], Callable[[Report], None], Callable[[int, int], None]]]":
    """A progress bar of training: loss, rate and time left; yields what shows reading, training and calibration."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                  TextColumn("{task.fields[text]}"), transient=True) as progress:  # fmt: skip
        task = progress.add_task(f"training {label}", total=1.0, text="reading photos")

        def show_reading(done: int, total: int) -> None:
            progress.update(task, text=f"reading photos {done}/{total}")

        def show(report: "Report") -> None:
            minutes, seconds = divmod(int(report.seconds_left), 60)
            progress.update(task, completed=report.spent, text=(
                f"step {report.step}  loss {report.train_loss:.4f}  best validation "
                f"{loss_text(report.validation_loss)}  {report.windows_per_s:.1f} {report.unit}  "
                f"{minutes}:{seconds:02d} left"))

        def show_calibration(done: int, total: int) -> None:
            progress.update(task, completed=1.0, text=f"calibrating on good photos {done}/{total}")

        yield show_reading, show, show_calibration


def loss_text(value: float) -> str:
    """A loss for people; infinite means that nothing has been validated yet."""
    return f"{value:.5f}" if math.isfinite(value) else "–"
