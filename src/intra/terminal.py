"""What the verbs of the command line share: arguments and options, what is printed, a progress bar."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["AnomalousOption", "DataArgument", "DeviceOption", "MasksOption", "NormalOption", "OutOption", "RateOption",
           "RunArgument", "ThresholdOption", "bar", "make_console", "say", "say_error"]

DataArgument = Annotated[Path, typer.Argument(
    metavar="DATA", help="A category in MVTec's layout (train/good, test/*, ground_truth/*), a folder of several, or a "
                         "plain folder of photos of good parts.")]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write to.")]
RunArgument = Annotated[Path, typer.Argument(
    metavar="RUN", help="The folder that `intra train` wrote, or a model file.")]
NormalOption = Annotated[Path | None, typer.Option(
    metavar="DIR", help="Photos of good parts, where DATA is no category; below DATA or anywhere.")]
AnomalousOption = Annotated[Path | None, typer.Option(
    metavar="DIR", help="Photos of defective parts, where DATA is no category.")]
MasksOption = Annotated[Path | None, typer.Option(
    metavar="DIR", help="Masks NAME_mask.png of the defective parts, where DATA is no category.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
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
