"""The verbs of trust: audit, calibrate, verify. cli.py takes them in."""

import json
from pathlib import Path
from typing import Annotated

import typer

from intra.errors import InTraError
from intra.terminal import (
    DataArgument,
    DeviceOption,
    NormalOption,
    OutOption,
    OwnRunArgument,
    RateOption,
    bar,
    make_console,
    say,
)

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command(epilog="Example: `intra audit photos/bottle --out audits/bottle`")(audit)
    app.command(epilog="Example: `intra calibrate runs/bottle good_photos --out runs/bottle_june`")(calibrate)
    app.command(epilog="Example: `intra verify runs/bottle photos/bottle`")(verify)


def audit(
    data: DataArgument, out: OutOption, normal: NormalOption = None,
    top: Annotated[int, typer.Option(help="How many photos to list and to show.")] = 20,
) -> None:
    """Rank good photos by how little they look like the others, before any training: DIR/audit.html, audit.json."""
    from intra.data.folder import find_categories
    from intra.evaluation.audit import audit_category

    categories, console = find_categories(data, normal=normal), make_console()
    for category in categories:
        folder = out / category.name if len(categories) > 1 else out
        with bar(f"auditing {category.name}", unit="photos/s") as step:
            found = audit_category(category, out=folder, top=top, on_progress=step)
        say(console, f"{category.name}: of {found['num_photos']} good photos these look least like the others; 9 of "
                     f"10 score below {found['usual_score']:.4g}")
        for row in found["photos"][:top]:
            say(console, f"{row['rank']:4}  {row['score']:.4g}  {category.root / row['path']}")
        say(console, f"wrote {folder / 'audit.html'}")


def calibrate(
    run: OwnRunArgument,
    images: Annotated[list[Path], typer.Argument(
        metavar="IMAGE_OR_FOLDER...", help="New photos of good parts, none that the model was trained on.")],
    out: Annotated[Path, typer.Option("--out", metavar="FILE_OR_RUN", help="The model file, or the folder, to write.")],
    device: DeviceOption = "auto",
    false_reject_rate: RateOption = None,
) -> None:  # fmt: skip
    """Set a model's threshold by new good photos, without training. The stored model stays as it is."""
    from intra.inspection.recalibration import calibrate as recalibrated

    with bar("inspecting", unit="images/s") as step:
        found = recalibrated(run, images, out=out, false_reject_rate=false_reject_rate, device=device, on_progress=step)
    console = make_console()
    for path, first in found.duplicates:
        say(console, f"left out: {path}: the same picture as {first}", style="yellow")
    if found.setup_alarms:
        listed = ", ".join(f"{reason} ({count})" for reason, count in found.setup_alarms.most_common())
        say(console, f"{found.setup_alarms.total()} of {found.threshold.num_images} raise the model's setup alarm: "
                     f"{listed}; if that is how photos are now, consider training anew", style="yellow")
    say(console, f"threshold {found.threshold.value:.4g}, {found.threshold.promise}")
    say(console, f"wrote {found.model_path}")


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
