"""The verbs of a model at work: watch, record, serve. cli.py takes them in."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intra.errors import InTraError
from intra.terminal import (
    DeviceOption,
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
    app.command(epilog="Example: `intra serve runs/bottle --port 8000`, then open http://127.0.0.1:8000")(serve)


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


def serve(
    run: RunArgument,
    host: Annotated[str, typer.Option(help="The address to listen on; any but a loopback one needs a token.")] = (
        "127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token_file: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Holds the token that every request must carry. Or set INTRA_TOKEN.")] = None,
    queue: Annotated[int, typer.Option(min=1, help="Photos that may wait; more clients are told to come back.")] = 64,
    max_upload: Annotated[int, typer.Option(metavar="MIB", min=1, help="The largest upload.")] = 32,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="The largest photo.")] = 32,
    device: DeviceOption = "auto",
    threshold: ThresholdOption = None,
    false_reject_rate: RateOption = None,
) -> None:  # fmt: skip
    """Inspect photos in a browser or over HTTP, until Ctrl-C."""
    from intra.deploy.serve import serve as serve_run
    from intra.deploy.serve.limits import MIB, Limits

    limits = Limits(waiting=queue, body_bytes=max_upload * MIB, received_bytes=max(256, 4 * max_upload) * MIB,
                    pixels=(pixels := round(max_megapixels * 1e6)), store_bytes=max(256 * MIB, 16 * pixels))

    serve_run(run, host=host, port=port, token=_token(token_file), limits=limits, device=device, threshold=threshold,
              false_reject_rate=false_reject_rate,
              on_ready=lambda address: say(make_console(), f"{address} inspects with {run}; Ctrl-C ends it"))


def _say_counts(folder: Path, counts: "Counts") -> None:
    setup = f", {counts.num_setup} with another light, focus or pose" if counts.num_setup else ""
    waiting = f", {counts.num_undelivered} messages not yet delivered" if counts.num_undelivered else ""
    reason = f" (last error: {counts.delivery_error})" if counts.delivery_error else ""
    say(make_console(), f"{folder}: {counts.num_photos} photos, {counts.num_defective} with defects, "
                        f"{counts.num_unreadable} not inspected{setup}{waiting}{reason}")


def _token(file: Path | None) -> str | None:
    """The token of `intra serve`; never an option's value, which everybody on the machine could read."""
    if file is None:
        return os.environ.get("INTRA_TOKEN") or None
    try:
        return file.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise InTraError(f"cannot read the token in {file}: {getattr(error, 'strerror', None) or 'no ASCII'}"
                         ) from error
