"""The paper's own run on one category, in as many short sittings as it takes.

    python benchmarks/paper.py mvtec/bottle --out runs/paper_bottle --minutes 25

trains the preset `paper` for 25 minutes more, from where the folder's last.ckpt stands; appends a line to
progress.jsonl; evaluates, which completes the line; and prints all sittings beside the paper's figures. Reading,
calibration and evaluation come on top of the minutes. A sitting that is killed while it trains leaves a checkpoint,
and one that is killed while it evaluates a line without AUROC: the next goes on from there. The full budget is 200
epochs of 600 windows an image, or 50 epochs without a better validation loss. FLOPs are counted on one training step,
forward and backward, by torch.utils.flop_counter; validation counts in the time, but not in the FLOPs.
"""

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from intra.config import Config, preset
from intra.data.files import write_atomically
from intra.data.folder import Category, find_category
from intra.errors import InTraError
from intra.evaluation.evaluate import evaluate_category
from intra.evaluation.tables import PAPER
from intra.inspection.detector import Detector
from intra.provenance import code_sha256, commit_of_the_code
from intra.training.checkpoint import CHECKPOINT_FILE, read_header
from intra.training.loss import patch_loss
from intra.training.run import Run, train
from intra.training.sampler import IDENTITY, WindowSampler

EPOCHS = 200  # the paper's
PROGRESS_FILE = "progress.jsonl"
COLUMNS = ("elapsed_s", "steps", "windows", "share", "windows_per_s", "tflops_per_s", "train_loss", "validation_loss",
           "image_auroc", "pixel_auroc", "paper_image_auroc", "paper_pixel_auroc")  # fmt: skip


def sit(
    category: Category, out: Path, *, minutes: float, name: str, settings: dict[str, str], device: str
) -> list[dict[str, Any]]:
    """Trains for some minutes more and evaluates; returns the line of each sitting so far, this one last. A training
    that had ended, but was not evaluated, is evaluated.

    Raises InTraError if the learning rate depends on the budget, or the training had ended and been evaluated before,
    and KeyboardInterrupt if it was interrupted; it then has a checkpoint, but no line.
    """
    config = preset(name).with_settings(settings)
    if not 0 < minutes < math.inf:
        raise InTraError(f"--minutes is {minutes}; it must be above 0")
    if config.train.schedule != "constant" or config.train.warmup_fraction:
        raise InTraError("the budget grows with each sitting, and the learning rate must not follow it; set "
                         "train.schedule=constant and train.warmup_fraction=0")
    lines = sittings(out)
    is_waiting = bool(lines) and lines[-1]["image_auroc"] is None  # killed before it was evaluated
    is_full = bool(lines) and lines[-1]["share"] >= 1
    if is_full and not is_waiting:
        raise InTraError(f"the full budget of {EPOCHS} epochs is reached; {out}/results has the figures")
    if not is_full:
        before = read_header(out / CHECKPOINT_FILE)["progress"] if (out / CHECKPOINT_FILE).exists() else {}
        code = {"commit": commit_of_the_code(), "code_sha256": code_sha256()}  # before anybody changes it
        run = train(category, out, preset=name, settings=settings, device=device, resume=True,
                    minutes=before.get("elapsed_s", 0.0) / 60 + minutes)
        if run.interrupted:
            raise KeyboardInterrupt
        if not lines or run.num_steps != lines[-1]["steps"]:
            lines.append(_line(run, before, category, device) | code)
            _write(out, lines)
        elif not is_waiting:
            raise InTraError(f"training had ended before, after {run.num_steps} steps: no better validation loss for "
                             f"{config.train.patience} epochs")
    results = evaluate_category(Detector.load(out, device=device), category, out=out / "results", save_maps=False)
    lines[-1] |= {name: results[name] for name in ("image_auroc", "pixel_auroc")}
    lines[-1] |= {name: results["provenance"][name] for name in ("hardware", "versions", "date")}
    _write(out, lines)
    return lines


def _line(run: Run, before: dict[str, Any], category: Category, device: str) -> dict[str, Any]:
    """What a sitting has to say, but for AUROC; `before` is the progress that it went on from."""
    detector = Detector.load(run.path, device=device)
    flops = flops_of_a_step(detector)
    seconds = run.elapsed_s - before.get("elapsed_s", 0.0)
    new_steps, batch_size = run.num_steps - before.get("step", 0), detector.config.train.batch_size
    with (run.path / "log.csv").open(newline="", encoding="utf-8") as file:
        last = list(csv.DictReader(file))[-1]  # written at the end of a budget, too
    published = PAPER.get(category.name, (None, None))
    return {
        "elapsed_s": round(run.elapsed_s, 1), "steps": run.num_steps, "windows": run.num_steps * batch_size,
        "share": run.num_steps / full_steps(detector.config, detector.provenance["num_train"]),
        # None: killed when training had ended, so that nothing is known of its sitting
        "windows_per_s": round(new_steps * batch_size / seconds, 1) if new_steps else None,
        "flops": flops * run.num_steps,
        "tflops_per_s": round(new_steps * flops / seconds / 1e12, 3) if new_steps else None,
        "train_loss": float(last["train_loss"]), "validation_loss": float(last["validation_loss"]),
        "image_auroc": None, "pixel_auroc": None,
        "paper_image_auroc": None if published[0] is None else published[0] / 100,
        "paper_pixel_auroc": None if published[1] is None else published[1] / 100,
    }  # fmt: skip


def _write(out: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_atomically(out / PROGRESS_FILE, text)


def sittings(out: Path) -> list[dict[str, Any]]:
    """The line of each sitting so far."""
    path = out / PROGRESS_FILE
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def full_steps(config: Config, num_train: int) -> int:
    """The steps of the paper's budget."""
    return EPOCHS * max(1, num_train * config.train.windows_per_image // config.train.batch_size)


def flops_of_a_step(detector: Detector) -> int:
    """The floating-point operations of one training step, forward and backward; what is in the images is all one."""
    model, config = detector.config.model, detector.config.train
    hidden = config.hidden_fraction
    num_patches = model.window_shape[0] * model.window_shape[1]
    num_hidden = (1, 1) if hidden is None else (max(1, round(num_patches * sum(hidden) / 2)),) * 2
    images = torch.zeros(2, model.channels, *model.image_size, dtype=torch.uint8, device=detector.device)
    batch = WindowSampler(
        images, patch_size=model.patch_size, window_shape=model.window_shape, num_hidden=num_hidden,
        windows_per_image=config.windows_per_image, batch_size=config.batch_size, seed=0, symmetries=(IDENTITY,),
    ).batch(0)  # fmt: skip
    detector.model.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        inpainted = detector.model(batch.patches, batch.positions, batch.hidden)
        patch_loss(inpainted, batch.patches[batch.hidden], channels=model.channels, config=config).backward()
    detector.model.zero_grad()
    return int(counter.get_total_flops())


def table(lines: list[dict[str, Any]]) -> str:
    """The sittings in Markdown; a figure that is not there is a dash."""
    rows = [[f"{line[name]:.4g}" if isinstance(line[name], float) else "—" if line[name] is None else f"{line[name]:,}"
             for name in COLUMNS] for line in lines]
    head = [name.replace("_", " ") for name in COLUMNS]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def main() -> int:
    """One sitting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a category in MVTec's layout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of training, in this sitting")
    parser.add_argument("--preset", default="paper")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    try:
        settings = {key: value for key, _, value in (setting.partition("=") for setting in arguments.settings)}
        lines = sit(find_category(arguments.data), arguments.out, minutes=arguments.minutes, name=arguments.preset,
                    settings=settings, device=arguments.device)
    except InTraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 1
    print(table(lines))
    done = lines[-1]
    print(f"{done['share']:.2%} of the full budget ({EPOCHS} epochs); {done['windows']:,} windows, "
          f"{done['flops']:.3g} FLOPs so far")
    return 0


if __name__ == "__main__":
    sys.exit(main())
