"""The verbs of a model at work: watch, record, verify. cli.py takes them in."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intra.errors import InTraError
from intra.terminal import (
    DeviceOption,
    NormalOption,
    OutOption,
    RateOption,
    RunArgument,
    ThresholdOption,
    make_console,
    say,
    say_verdict,
)

if TYPE_CHECKING:
    from intra.deploy.record import Counts
    from intra.deploy.watch import Verdict

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command(epilog="Example: `intra watch runs/bottle /srv/camera --out verdicts --webhook https://host/hook`"
                )(watch)  # fmt: skip
    app.command(epilog="Example: `intra record verdicts --csv verdicts.csv`")(record)
    app.command(epilog="Example: `intra verify runs/bottle photos/bottle`")(verify)


def watch(  # noqa: PLR0913, PLR0917  the options of the command
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where photos come in; sub-folders too.")],
    out: OutOption,
    once: Annotated[bool, typer.Option("--once", help="Inspect what is there, then end.")] = False,
    save_images: Annotated[bool, typer.Option(
        "--save-images", help="Also write heatmap, outline, repaired image and mask of each.")] = False,
    webhook: Annotated[str | None, typer.Option(
        metavar="URL", envvar="INTRA_WEBHOOK", help="POST each verdict there as JSON, at least once; `id` tells "
                                                    "duplicates.")] = None,
    settle: Annotated[float, typer.Option(
        metavar="SECONDS", help="A file is complete when its size and time stayed the same for so long.")] = 2.0,
    poll: Annotated[float, typer.Option(metavar="SECONDS", help="From one look into the folder to the next.")] = 1.0,
    device: DeviceOption = "auto",
    threshold: ThresholdOption = None,
    false_reject_rate: RateOption = None,
) -> None:  # fmt: skip
    """Inspect each new photo of a folder, once and only once: DIR/record.sqlite. Ctrl-C ends it, the same command
    goes on. Exit 2 with --once if some photos could not be inspected."""
    from intra.data.files import printable
    from intra.deploy.watch import Watcher
    from intra.deploy.watch import watch as watch_folder

    console = make_console()
    num_unreadable = 0

    def show(verdict: "Verdict") -> None:
        nonlocal num_unreadable
        if verdict.prediction is None:
            num_unreadable += 1
        say_verdict(console, verdict.path, verdict.prediction, verdict.error)

    watcher = Watcher(folder, out, settle_s=settle, poll_s=poll, once=once, save_images=save_images, webhook=webhook)
    counts = watch_folder(run, watcher, device=device, threshold=threshold, false_reject_rate=false_reject_rate,
                          on_verdict=show, on_trouble=lambda what: typer.secho(printable(what), fg="yellow", err=True))
    _say_counts(out, counts)
    if once and num_unreadable:
        raise InTraError(f"{num_unreadable} of the files could not be inspected; `intra record {out} --csv FILE` names "
                         "them")


def record(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that `intra watch` writes to.")],
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every row there, as CSV.")] = None,
) -> None:
    """Tell what `intra watch` has recorded, and export it; also while it watches."""
    from intra.deploy.record import RECORD_FILE, Record, export_csv

    opened = Record(folder / RECORD_FILE)
    try:
        if csv is not None:
            count = export_csv(opened, csv)
            say(make_console(), f"wrote {csv}: {count} rows")
        _say_counts(folder, opened.counts())
    finally:
        opened.close()


def verify(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A model file, or the folder of a run.")],
    data: Annotated[Path | None, typer.Argument(
        metavar="[DATA]", help="What it was trained on: each training image is held against the manifest.")] = None,
    normal: NormalOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole manifest as JSON.")] = False,
) -> None:  # fmt: skip
    """Print a model's manifest - what it was made from, with what, and what it promises - and check it. Exit 2 if the
    file is not intact, or DATA is not what it was trained on."""
    from intra.deploy.verify import manifest_of, summary, training_images_of

    manifest = manifest_of(model)
    console = make_console()
    if as_json:
        typer.echo(json.dumps(manifest, indent=2))
    else:
        for line in summary(manifest):
            say(console, line)
    if data is not None:
        differing = training_images_of(manifest, data, normal=normal)
        if differing:
            raise InTraError(f"{data} is not what the model was trained on: {'; '.join(differing)}")
        if not as_json:
            say(console, f"{data}: each of the {manifest['num_images']} training images is the one in the manifest")


def _say_counts(folder: Path, counts: "Counts") -> None:
    setup = f", {counts.num_setup} with another light, focus or pose" if counts.num_setup else ""
    waiting = f", {counts.num_undelivered} messages not yet delivered" if counts.num_undelivered else ""
    reason = f" (last error: {counts.delivery_error})" if counts.delivery_error else ""
    say(make_console(), f"{folder}: {counts.num_photos} photos, {counts.num_defective} with defects, "
                        f"{counts.num_unreadable} not inspected{setup}{waiting}{reason}")
