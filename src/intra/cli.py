"""The command line: parses, calls one function, prints."""

import math
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intra.errors import InTraError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from intra.data.folder import Category, Summary
    from intra.evaluation.benchmark import Event
    from intra.training.engine import Report

__all__ = ["app", "main"]

app = typer.Typer(
    name="intra", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]},
    help="Learns what good parts look like from photos of good parts alone; finds, outlines and repairs what is wrong "
         "in new photos.",
    epilog="Start with `intra demo`, or with `intra check-data PHOTOS` and `intra train PHOTOS --out RUN`.",
)  # fmt: skip

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


def main() -> None:
    """The entry point: exit 0 done, 2 a mistake of the user, 1 anything else."""
    try:
        app(standalone_mode=True)
    except InTraError as error:
        _say_error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        _say_error("stopped")
        sys.exit(1)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from intra import __version__

        typer.echo(f"intra {__version__}")
        raise typer.Exit


@app.command("check-data", epilog="Example: `intra check-data photos/bottle`")
def check_data(
    data: DataArgument, normal: NormalOption = None, anomalous: AnomalousOption = None, masks: MasksOption = None
) -> None:
    """Tell what will be used for what, and list every unreadable, duplicate or odd file. Exit 2 if there are errors."""
    from intra.data.folder import check_data as check

    with _bar("checking", unit="files/s") as step:
        report = check(data, normal=normal, anomalous=anomalous, masks=masks, on_progress=step)
    console = _console()
    for category in report.categories:
        _print_category(category, report.summaries[category.name])
    for problem in report.problems:
        console.print(f"{problem.severity}: {problem.path}: {problem.message}", highlight=False, markup=False,
                      style="red" if problem.severity == "error" else "yellow", soft_wrap=True)
    num_errors = sum(problem.severity == "error" for problem in report.problems)
    console.print(f"{num_errors} error(s), {len(report.problems) - num_errors} warning(s)", highlight=False)
    if not report.ok:
        raise typer.Exit(2)


@app.command(epilog="Example: `intra train photos/bottle --out runs/bottle --minutes 15`")
def train(  # noqa: PLR0913, PLR0917  the options of the command
    data: DataArgument,
    out: OutOption,
    preset: Annotated[str | None, typer.Option(
        help="fast (default; minutes on a CPU), quality (larger and longer), paper (hours on a GPU), or a baseline: "
             "autoencoder_l2, autoencoder_ssim, riad.")] = None,
    image_size: Annotated[str | None, typer.Option(metavar="auto|N|HxW", help="Height and width in px.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Budget: minutes of training.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Budget: epochs.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget: optimiser steps.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same machine: same weights.")] = 0,
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    settings: Annotated[list[str] | None, typer.Option(
        "--set", metavar="KEY=VALUE", help="Replace one setting, e.g. train.batch_size=16; may be repeated.")] = None,
    normal: NormalOption = None,
) -> None:  # fmt: skip
    """Learn what good parts look like. Ctrl-C ends it early with a usable model; --resume goes on."""
    from intra.data.folder import find_categories, require_enough

    categories = find_categories(data, normal=normal)
    for category in categories:  # before hours are spent on the first
        require_enough(category)
    interrupted = False
    for category in categories:
        folder = out / category.name if len(categories) > 1 else out
        interrupted = _train_one(category, folder, preset=preset, image_size=image_size, minutes=minutes, epochs=epochs,
                                 steps=steps, seed=seed, device=device, resume=resume, settings=_pairs(settings))
        if interrupted:
            break
    if interrupted:
        raise typer.Exit(1)


@app.command(epilog="Example: `intra evaluate runs/bottle photos/bottle --out results/bottle`")
def evaluate(
    run: RunArgument, data: DataArgument, out: OutOption, normal: NormalOption = None,
    anomalous: AnomalousOption = None, masks: MasksOption = None, device: DeviceOption = "auto",
    threshold: ThresholdOption = None,
    false_reject_rate: RateOption = None,
) -> None:  # fmt: skip
    """Measure a model on labelled photos: DIR/results.json, DIR/report.html and DIR/maps/."""
    from intra.data.folder import find_categories
    from intra.inspection.detector import Detector

    categories = find_categories(data, normal=normal, anomalous=anomalous, masks=masks)
    several = len(categories) > 1
    found = []
    for category in categories:
        folder, model = (out / category.name, run / category.name) if several else (out, run)
        detector = Detector.load(model, device=device, threshold=threshold, false_reject_rate=false_reject_rate)
        found.append((category.name, _evaluate_one(detector, category, folder), folder))
    _print_figures(found)


@app.command(epilog="Example: `intra predict runs/bottle new_photos --out verdicts --save-images`")
def predict(
    run: RunArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE_OR_FOLDER...", help="Photos to inspect.")],
    out: OutOption,
    save_images: Annotated[bool, typer.Option(
        "--save-images", help="Also write heatmap, outline, repaired image and mask of each.")] = False,
    device: DeviceOption = "auto",
    threshold: ThresholdOption = None,
    false_reject_rate: RateOption = None,
) -> None:  # fmt: skip
    """Inspect new photos: DIR/predictions.jsonl. Exit 2 if some could not be read."""
    from intra.evaluation.predict import FileVerdict, predict_files
    from intra.inspection.detector import Detector

    detector = Detector.load(run, device=device, threshold=threshold, false_reject_rate=false_reject_rate)
    console = _console()
    num_anomalous = 0
    with _bar("inspecting", unit="images/s") as step:

        def show(verdict: FileVerdict, done: int, total: int) -> None:
            nonlocal num_anomalous
            step(done, total)
            setup = f"  SETUP: {verdict.prediction.setup_reason}" if verdict.prediction and (
                verdict.prediction.setup_alarm) else ""
            if verdict.prediction is None:
                console.print(f"not inspected  {verdict.error}", style="yellow", markup=False, soft_wrap=True)
            elif verdict.prediction.is_anomalous:
                num_anomalous += 1
                console.print(f"DEFECT  {verdict.prediction.score:.4g}  {verdict.path}{setup}", style="red",
                              markup=False, soft_wrap=True)
            else:
                console.print(f"good    {verdict.prediction.score:.4g}  {verdict.path}{setup}", markup=False,
                              highlight=False, soft_wrap=True)

        unreadable = predict_files(detector, images, out, save_images=save_images, on_verdict=show)
    console.print(f"{num_anomalous} anomalous (score above {detector.threshold:.4g}: {detector.calibration.promise})",
                  highlight=False, markup=False)
    console.print(f"wrote {out / 'predictions.jsonl'}", highlight=False, markup=False, soft_wrap=True)
    if unreadable:
        raise InTraError(f"{len(unreadable)} of the files could not be inspected, e.g. {unreadable[0]}; all are named "
                         f"in {out / 'predictions.jsonl'}")


@app.command(epilog="Example: `intra demo --out demo`")
def demo(
    out: OutOption = Path("demo"),
    steps: Annotated[int, typer.Option(help="Training steps of each category.")] = 250,
    device: DeviceOption = "auto",
) -> None:
    """Make the built-in photos, train on them, evaluate, and write the report. A few minutes on two cores."""
    from intra.data.demo import make_demo
    from intra.data.folder import find_categories
    from intra.inspection.detector import Detector

    console = _console()
    console.print(f"making photos in {out / 'data'}", highlight=False, markup=False)
    make_demo(out / "data")
    found = []
    for category in find_categories(out / "data"):
        run = out / "runs" / category.name
        if _train_one(category, run, preset="fast", steps=steps, device=device, resume=True):
            raise typer.Exit(1)
        folder = out / "results" / category.name
        found.append((category.name, _evaluate_one(Detector.load(run, device=device), category, folder), folder))
    _print_figures(found)


@app.command(epilog="Example: `intra benchmark mvtec/bottle mvtec/screw --out results --seeds 0,1,2 --steps 2000 "
                    "--method fast --method 'msa: fast model.attention=msa'`")
def benchmark(
    data: Annotated[list[Path], typer.Argument(
        metavar="DATA...", help="Categories in MVTec's layout, or folders of several.")],
    out: OutOption,
    methods: Annotated[list[str] | None, typer.Option(
        "--method", metavar="METHOD", help="PRESET, or 'NAME: PRESET key=value key=value'; may be repeated. Default: "
                                           "fast.")] = None,
    seeds: Annotated[str, typer.Option(help="Of the trainings, e.g. 0,1,2.")] = "0",
    minutes: Annotated[float | None, typer.Option(help="Budget of each training: minutes.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Budget of each training: epochs.")] = None,
    steps: Annotated[int | None, typer.Option(help="Budget of each training: optimiser steps.")] = None,
    jobs: Annotated[int, typer.Option(help="Trainings at a time; they share the threads.")] = 1,
    device: DeviceOption = "auto",
) -> None:  # fmt: skip
    """Methods x categories x seeds: DIR/table.md and DIR/table.json, beside the paper's figures.

    The same command goes on where it was stopped. Exit 1 if some could not be measured; they are tried again then.
    """
    from intra.evaluation.benchmark import benchmark as measure
    from intra.evaluation.tables import markdown

    if not all(seed.strip().isdecimal() for seed in seeds.split(",")):
        raise InTraError(f"--seeds is {seeds!r}; expected whole numbers such as 0,1,2")
    try:
        with _cells_bar() as show:
            found = measure(data, out=out, methods=methods or ["fast"], seeds=[int(seed) for seed in seeds.split(",")],
                            steps=steps, minutes=minutes, epochs=epochs, jobs=jobs, device=device, on_cell=show)
    except KeyboardInterrupt:
        _say_error("stopped; the same command goes on")
        raise typer.Exit(1) from None
    console = _console()
    console.print(markdown(found.table), highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(found.done)} measured, {len(found.kept)} kept, {len(found.failed)} failed; wrote "
                  f"{out / 'table.md'}", highlight=False, markup=False, soft_wrap=True)
    if found.failed:
        raise typer.Exit(1)


def _print_category(category: "Category", summary: "Summary") -> None:
    """What will be used for what."""
    console = _console()
    console.print(f"{category.name}  {category.root}", style="bold", highlight=False, markup=False, soft_wrap=True)
    tests = Counter(image.defect for image in category.test)
    masks = sum(image.mask is not None for image in category.test)
    lines = [f"{len(category.train)} good images to train on"]
    lines += [f"{tests['good']} good images to test on"] if tests["good"] else []
    lines += [f"{count} images to test on: {defect}" for defect, count in tests.items() if defect != "good"]
    lines += [f"{masks} masks"] if masks else []
    sizes = ", ".join(f"{height}x{width} px ({count})" for (height, width), count in summary.sizes.most_common(3))
    more = len(summary.sizes) - 3
    lines.append(f"height x width: {sizes}" + (f" and {more} other sizes" if more > 0 else ""))
    if summary.image_size is not None:
        lines.append("resized for training to {}x{} px".format(*summary.image_size))
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)


def _train_one(category: "Category", folder: Path, **options: Any) -> bool:
    """Trains with a progress bar; returns whether it was interrupted."""
    from intra.training.run import train as train_category

    console = _console()
    with _training_bar(category.name) as (show, show_calibration):
        run = train_category(category, folder, on_report=show, on_calibration=show_calibration, **options)
    state = "interrupted" if run.interrupted else "trained"
    console.print(f"{category.name}: {state} after {run.num_steps} steps, {run.elapsed_s / 60:.1f} min, best "
                  f"validation loss {_loss(run.best_validation_loss)}" + ("; --resume goes on" * run.interrupted),
                  highlight=False, markup=False)
    console.print(f"wrote {run.model_path}", highlight=False, markup=False, soft_wrap=True)
    return run.interrupted


def _evaluate_one(detector: Any, category: "Category", folder: Path) -> dict[str, Any]:
    from intra.evaluation.evaluate import evaluate_category

    with _bar(f"evaluating {category.name}", unit="images/s") as step:
        return evaluate_category(detector, category, out=folder, on_progress=step)


def _print_figures(found: "list[tuple[str, dict[str, Any], Path]]") -> None:
    from rich.table import Table

    names = ("image_auroc", "image_ap", "pixel_auroc", "pixel_aupro", "recall", "false_reject_rate",
             "seconds_per_image")
    table = Table("category", *(name.replace("_", " ") for name in names))
    for category, results, _ in found:
        table.add_row(category, *("–" if results[name] is None else f"{results[name]:.3f}" for name in names))
    console = _console()
    console.print(table)
    for _, results, folder in found:
        for name, reason in results.get("reasons", {}).items():
            console.print(f"{name}: {reason}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _loss(value: float) -> str:
    """A loss for people; infinite means that nothing has been validated yet."""
    return f"{value:.5f}" if math.isfinite(value) else "–"


def _pairs(settings: list[str] | None) -> dict[str, str]:
    pairs = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InTraError(f"--set {setting!r} has no '='; write --set KEY=VALUE, e.g. --set train.batch_size=16")
        pairs[key.strip()] = value
    return pairs


def _console() -> Any:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)  # a file or a pipe has no width to break lines at


def _say_error(message: str) -> None:
    from rich.console import Console

    Console(stderr=True).print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _bar(label: str, *, unit: str) -> "Iterator[Callable[..., None]]":
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
def _cells_bar() -> "Iterator[Callable[[Event], None]]":
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
def _training_bar(label: str) -> "Iterator[tuple[Callable[[Report], None], Callable[[int, int], None]]]":
    """A progress bar of training: loss, rate and time left; yields what shows training and what shows calibration."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    with Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                  TextColumn("{task.fields[text]}"), transient=True) as progress:  # fmt: skip
        task = progress.add_task(f"training {label}", total=1.0, text="reading photos")

        def show(report: "Report") -> None:
            minutes, seconds = divmod(int(report.seconds_left), 60)
            progress.update(task, completed=report.spent, text=(
                f"step {report.step}  loss {report.train_loss:.4f}  best validation {_loss(report.validation_loss)}  "
                f"{report.windows_per_s:.1f} {report.unit}  {minutes}:{seconds:02d} left"))

        def show_calibration(done: int, total: int) -> None:
            progress.update(task, completed=1.0, text=f"calibrating on good photos {done}/{total}")

        yield show, show_calibration


@app.command(epilog="Example: `intra audit photos/bottle --out audits/bottle`")
def audit(
    data: DataArgument, out: OutOption, normal: NormalOption = None,
    top: Annotated[int, typer.Option(help="How many photos to list and to show.")] = 20,
) -> None:
    """Rank good photos by how little they look like the others, before any training: DIR/audit.html, audit.json."""
    from intra.data.folder import find_categories
    from intra.evaluation.audit import audit_category

    categories, console = find_categories(data, normal=normal), _console()
    for category in categories:
        folder = out / category.name if len(categories) > 1 else out
        with _bar(f"auditing {category.name}", unit="photos/s") as step:
            found = audit_category(category, out=folder, top=top, on_progress=step)
        console.print(f"{category.name}: of {found['num_photos']} good photos these look least like the others; 9 of "
                      f"10 score below {found['usual_score']:.4g}", highlight=False, markup=False, soft_wrap=True)
        for row in found["photos"][:top]:
            console.print(f"{row['rank']:4}  {row['score']:.4g}  {category.root / row['path']}", highlight=False,
                          markup=False, soft_wrap=True)
        console.print(f"wrote {folder / 'audit.html'}", highlight=False, markup=False, soft_wrap=True)


@app.command(epilog="Example: `intra calibrate runs/bottle good_photos --out runs/bottle_june`")
def calibrate(
    run: RunArgument,
    images: Annotated[list[Path], typer.Argument(
        metavar="IMAGE_OR_FOLDER...", help="New photos of good parts, none that the model was trained on.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE_OR_RUN", help="The model file, or the folder, to write.")],
    device: DeviceOption = "auto",
    false_reject_rate: RateOption = None,
) -> None:  # fmt: skip
    """Set a model's threshold by new good photos, without training. The stored model stays as it is."""
    from intra.inspection.recalibration import calibrate as recalibrated

    with _bar("inspecting", unit="images/s") as step:
        found = recalibrated(run, images, out=out, false_reject_rate=false_reject_rate, device=device, on_progress=step)
    console = _console()
    for path, first in found.duplicates:
        console.print(f"left out: {path}: the same picture as {first}", style="yellow", highlight=False, markup=False,
                      soft_wrap=True)
    if found.setup_alarms:
        listed = ", ".join(f"{reason} ({count})" for reason, count in found.setup_alarms.most_common())
        console.print(f"{found.setup_alarms.total()} of {found.threshold.num_images} raise the model's setup alarm: "
                      f"{listed}; if that is how photos are now, consider training anew", style="yellow",
                      highlight=False, markup=False, soft_wrap=True)
    console.print(f"threshold {found.threshold.value:.4g}, {found.threshold.promise}", highlight=False, markup=False,
                  soft_wrap=True)
    console.print(f"wrote {found.model_path}", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
