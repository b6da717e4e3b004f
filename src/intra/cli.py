"""The command line: parses, calls one function, prints."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from intra import cli_export, cli_trust, cli_watch
from intra.errors import InTraError
from intra.terminal import (
    AnomalousOption,
    DataArgument,
    DeviceOption,
    MasksOption,
    NormalOption,
    OutOption,
    RateOption,
    RunArgument,
    ThresholdOption,
    bar,
    cells_bar,
    loss_text,
    make_console,
    say,
    say_error,
    say_verdict,
    training_bar,
)

if TYPE_CHECKING:
    from intra.data.folder import Category, Summary

__all__ = ["app", "main"]

app = typer.Typer(
    name="intra", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]},
    help="Learns what good parts look like from photos of good parts alone; finds, outlines and repairs what is wrong "
         "in new photos.",
    epilog="Start with `intra demo`, or with `intra check-data PHOTOS` and `intra train PHOTOS --out RUN`.",
)  # fmt: skip


def main() -> None:
    """The entry point: exit 0 done, 2 a mistake of the user, 1 anything else."""
    try:
        app(standalone_mode=True)
    except InTraError as error:
        say_error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        say_error("stopped")
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

    with bar("checking", unit="files/s") as step:
        report = check(data, normal=normal, anomalous=anomalous, masks=masks, on_progress=step)
    console = make_console()
    for category in report.categories:
        _print_category(category, report.summaries[category.name])
    for problem in report.problems:
        say(console, f"{problem.severity}: {problem.path}: {problem.message}",
            style="red" if problem.severity == "error" else "yellow")
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
    seed: Annotated[int, typer.Option(help="Same seed, same machine, same steps: same weights.")] = 0,
    device: DeviceOption = "auto",
    resume: Annotated[bool, typer.Option(
        "--resume", help="Go on with the run in --out; a budget counts from its beginning.")] = False,
    settings: Annotated[list[str] | None, typer.Option(
        "--set", metavar="KEY=VALUE", help="Replace one setting, e.g. train.batch_size=16; may be repeated.")] = None,
    normal: NormalOption = None,
    roi: Annotated[Path | None, typer.Option(
        "--roi", metavar="MASK", help="Region of interest: an image as the photos lie, black where nothing is to be "
                                      "inspected. Stored with the model.")] = None,
) -> None:  # fmt: skip
    """Learn what good parts look like. Ctrl-C ends it early with a usable model; --resume goes on."""
    from intra.data.folder import find_categories, require_enough

    categories = find_categories(data, normal=normal)
    for category in categories:  # before hours are spent on the first
        require_enough(category)
    if roi is not None:
        _check_region(roi, categories)
    asked = {"preset": preset, "image_size": image_size, "minutes": minutes, "epochs": epochs, "steps": steps,
             "seed": seed, "settings": _pairs(settings), "roi": roi}
    folders = [out / category.name if len(categories) > 1 else out for category in categories]
    if resume:
        _check_the_others(folders, asked)
    interrupted = False
    for category, folder in zip(categories, folders, strict=True):
        interrupted = _train_one(category, folder, device=device, resume=resume, **asked)
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
    console = make_console()
    counts: Counter[str] = Counter()
    with bar("inspecting", unit="images/s") as step:

        def show(verdict: FileVerdict, done: int, total: int) -> None:
            step(done, total)
            say_verdict(console, verdict.path, verdict.prediction, verdict.error)
            if verdict.prediction:
                counts[verdict.prediction.verdict] += 1

        unreadable = predict_files(detector, images, out, save_images=save_images, on_verdict=show)
    say(console, f"{counts['defect']} with defects, {counts['good']} good (threshold {detector.threshold:.4g}: "
                 f"{detector.calibration.promise})")
    if counts["setup"]:
        say(console, f"{counts['setup']} with another light, focus or pose than the good photos: no verdict on the "
                     "part", style="magenta")
    say(console, f"wrote {out / 'predictions.jsonl'}")
    if unreadable:
        raise InTraError(f"{len(unreadable)} of the files could not be inspected, e.g. {unreadable[0]}; all are named "
                         f"in {out / 'predictions.jsonl'}")


@app.command(epilog="Example: `intra demo --out demo`")
def demo(
    out: OutOption = Path("demo"),
    steps: Annotated[int, typer.Option(help="Training steps of each category.")] = 60,
    image_size: Annotated[str | None, typer.Option(
        metavar="auto|N|HxW", help="Height and width in px; 128 is quicker and finds less.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Make the built-in photos, train on them, evaluate, and write the report. A few minutes on two cores."""
    from intra.data.demo import make_demo
    from intra.data.folder import find_categories
    from intra.inspection.detector import Detector

    console = make_console()
    console.print(f"making photos in {out / 'data'}", highlight=False, markup=False)
    make_demo(out / "data")
    found = []
    for category in find_categories(out / "data"):
        run = out / "runs" / category.name
        if _train_one(category, run, preset="fast", steps=steps, image_size=image_size, device=device,
                      resume=True):
            raise typer.Exit(1)
        folder = out / "results" / category.name
        found.append((category.name, _evaluate_one(Detector.load(run, device=device), category, folder), folder))
    _print_figures(found)


@app.command(epilog="Example: `intra benchmark mvtec/bottle mvtec/screw --out results --seeds 0,1,2 --steps 2000 "
                    "--method fast --method 'mfsa: fast model.attention=mfsa'`")
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
        with cells_bar() as show:
            found = measure(data, out=out, methods=methods or ["fast"], seeds=[int(seed) for seed in seeds.split(",")],
                            steps=steps, minutes=minutes, epochs=epochs, jobs=jobs, device=device, on_cell=show)
    except KeyboardInterrupt:
        say_error("stopped; the same command goes on")
        raise typer.Exit(1) from None
    console = make_console()
    console.print(markdown(found.table), highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(found.done)} measured, {len(found.kept)} kept, {len(found.failed)} failed; wrote "
                  f"{out / 'table.md'}", highlight=False, markup=False, soft_wrap=True)
    if found.failed:
        raise typer.Exit(1)


cli_trust.add_to(app)
cli_watch.add_to(app)
cli_export.add_to(app)


def _print_category(category: "Category", summary: "Summary") -> None:
    """What will be used for what."""
    console = make_console()
    say(console, f"{category.name}  {category.root}", style="bold")
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


def _check_region(roi: Path, categories: "list[Category]") -> None:
    """Tells what a region of interest is of each category's photos. Raises InTraError if it does not fit one."""
    from intra.data.images import read_info
    from intra.data.roi import check_roi, read_roi, roi_text

    mask = read_roi(roi)
    for category in categories:
        sizes = [read_info(path).size for path in category.train]
        check_roi(mask, sizes)
        say(make_console(), f"{category.name}: {roi_text(mask, sizes)}")


def _check_the_others(folders: list[Path], asked: dict[str, Any]) -> None:
    """Of a call that was stopped, those categories that it had not come to are begun with what it asked for."""
    from intra.training.checkpoint import CHECKPOINT_FILE
    from intra.training.run import refuse_to_begin_otherwise

    begun = [folder for folder in folders if (folder / CHECKPOINT_FILE).exists()]
    if 0 < len(begun) < len(folders):
        refuse_to_begin_otherwise(begun, **asked)


def _train_one(category: "Category", folder: Path, **options: Any) -> bool:
    """Trains with a progress bar; returns whether it was interrupted."""
    from intra.training.run import train as train_category

    console = make_console()
    with training_bar(category.name) as (show_reading, show, show_calibration):
        run = train_category(category, folder, on_reading=show_reading, on_report=show,
                             on_calibration=show_calibration, **options)
    state = "interrupted" if run.interrupted else "trained"
    console.print(f"{category.name}: {state} after {run.num_steps} steps, {run.elapsed_s / 60:.1f} min, best "
                  f"validation loss {loss_text(run.best_validation_loss)}" + ("; --resume goes on" * run.interrupted),
                  highlight=False, markup=False)
    console.print(f"wrote {run.model_path}", highlight=False, markup=False, soft_wrap=True)
    return run.interrupted


def _evaluate_one(detector: Any, category: "Category", folder: Path) -> dict[str, Any]:
    from intra.evaluation.evaluate import evaluate_category

    with bar(f"evaluating {category.name}", unit="images/s") as step:
        return evaluate_category(detector, category, out=folder, on_progress=step)


def _print_figures(found: "list[tuple[str, dict[str, Any], Path]]") -> None:
    from rich.table import Table

    names = ("image_auroc", "image_ap", "pixel_auroc", "pixel_aupro", "recall", "false_reject_rate",
             "seconds_per_image")
    table = Table("category", *(name.replace("_", " ") for name in names))
    for category, results, _ in found:
        table.add_row(category, *("–" if results[name] is None else f"{results[name]:.3f}" for name in names))
    console = make_console()
    console.print(table)
    for _, results, folder in found:
        for name, reason in results.get("reasons", {}).items():
            console.print(f"{name}: {reason}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"report: {folder / 'report.html'}", highlight=False, markup=False, soft_wrap=True)


def _pairs(settings: list[str] | None) -> dict[str, str]:
    pairs = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise InTraError(f"--set {setting!r} has no '='; write --set KEY=VALUE, e.g. --set train.batch_size=16")
        pairs[key.strip()] = value
    return pairs


if __name__ == "__main__":
    main()
