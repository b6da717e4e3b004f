"""The verb export. cli.py takes it in."""

from pathlib import Path
from typing import Annotated, Any

import typer

from intra.errors import InTraError
from intra.terminal import NormalOption, OwnRunArgument, make_console, say, say_error

__all__ = ["add_to"]


def add_to(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    app.command(epilog="Example: `intra export runs/bottle --format onnx --out bottle.onnx --data photos/bottle`"
                )(export)  # fmt: skip


def export(
    run: OwnRunArgument,
    file_format: Annotated[str, typer.Option("--format", metavar="onnx|openvino", help="What is to run it.")],
    out: Annotated[Path, typer.Option(
        "--out", metavar="FILE", help="Ends in .onnx, or for OpenVINO in .xml, beside which a .bin is written.")],
    precision: Annotated[str, typer.Option(
        metavar="fp32|fp16|int8", help="fp16 stores the networks' weights in half the bits; int8 computes their "
                                       "products in 8 bits and needs --data.")] = "fp32",
    data: Annotated[Path | None, typer.Option(
        metavar="DATA", help="Photos on which the maps are compared, instead of built-in ones; a category with tests "
                             "also gives the AUROC before and after.")] = None,
    normal: NormalOption = None,
) -> None:  # fmt: skip
    """Write a model for ONNX Runtime or OpenVINO, if its maps stay within a stated tolerance. Exit 1 if they do not."""
    from intra.deploy.export import TOLERANCES, ParityError
    from intra.deploy.export import export as write

    try:
        found = write(run, out, format=_one_of("--format", file_format, "onnx", "openvino"),
                      precision=_one_of("--precision", precision, *TOLERANCES), data=data, normal=normal)
    except ParityError as error:
        say_error(str(error))
        raise typer.Exit(1) from None
    console, checked = make_console(), found.parity
    say(console, f"{checked.num_photos} photos ({checked.photos}): maps differ by {checked.largest_difference:.1e} of "
                 f"their range at most, {checked.mean_difference:.1e} on average")
    if checked.image_auroc is not None:
        say(console, f"image AUROC on {checked.num_labelled} labelled photos: {checked.image_auroc:.4f}, before the "
                     f"export {checked.image_auroc_before:.4f}")
    say(console, f"wrote {found.path} ({found.size_mib:.1f} MiB)")


def _one_of(option: str, value: str, *known: str) -> Any:
    """The value, if it is one of these."""
    if value in known:
        return value
    from intra.config import nearest

    raise InTraError(f"{option} is {value!r}; expected {', '.join(known)}{nearest(value, known)}")
