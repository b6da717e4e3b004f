"""From a folder of good images to a model file: decode, fit, calibrate, save."""

import logging
import math
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from lightning_fabric import Fabric
from torch import Tensor

import intra
from intra.config import Config, flat, preset
from intra.data.cache import cached_set
from intra.data.files import remove_leftovers
from intra.data.folder import MIN_GOOD_IMAGES, Category, find_category, fingerprints_of, require_enough
from intra.data.images import auto_channels, auto_image_size, box_slices, is_read_quickly, read_info, to_unit
from intra.data.roi import ROI_FILE, check_roi, read_roi, roi_box, roi_digest, save_roi
from intra.errors import InTraError
from intra.geometry import patchify
from intra.inspection.anomaly import evidence_kinds
from intra.inspection.calibration import check_held_out
from intra.inspection.detector import Detector, refuse_exported
from intra.inspection.device import memory_for, pick_device, uses_bf16
from intra.inspection.model_file import MODEL_FILE
from intra.inspection.region import Region
from intra.models import InTra, build
from intra.provenance import code_sha256
from intra.training.calibrated import calibrated
from intra.training.checkpoint import CHECKPOINT_FILE, read_header
from intra.training.engine import Budget, Report, fit
from intra.training.sampler import WindowSampler, allowed_symmetries, mean_image

__all__ = ["Run", "recalibrate", "train"]

LARGEST_SIDE = 8192  # px
SETTINGS_TOLD = 3  # of those in which a run to be resumed differs


@dataclass(frozen=True)
class Run:
    """A finished, or interrupted, training."""

    path: Path  # the folder
    model_path: Path
    best_validation_loss: float
    num_steps: int
    elapsed_s: float
    interrupted: bool  # by Ctrl-C or a signal; `resume` goes on


def train(  # noqa: PLR0913  the options of the command, all but two by keyword
    data: str | Path | Category,
    out: str | Path,
    *,
    preset: str | None = None,
    image_size: str | int | tuple[int, int] | None = None,
    minutes: float | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    settings: Mapping[str, str] | None = None,
    normal: str | Path | None = None,
    roi: str | Path | None = None,
    on_reading: Callable[[int, int], None] | None = None,
    on_report: Callable[[Report], None] | None = None,
    on_calibration: Callable[[int, int], None] | None = None,
) -> Run:
    """Trains on the good images of one category and writes `out`/model.safetensors.

    Args:
        data: a category in MVTec's layout, or a folder of good images.
        preset: "fast" (the default), "quality", "paper", or a baseline: "autoencoder_l2", "autoencoder_ssim", "riad".
        image_size: px; "auto", a side, or (height, width), both multiples of the patch.
        minutes, epochs, steps: the budget, one of them, of a resumed run from its beginning; without any, the resumed
            run's or the preset's. The schedule fits it.
        seed: the same seed on the same machine gives the same weights (with a budget in steps or epochs).
        resume: go on from `out`/last.ckpt where there is one; preset, seed and settings are then those of the run.
        settings: replaces single settings by text, `{"train.batch_size": "16"}`.
        roi: a lossless image file without alpha, not 0 where photos are to be inspected, of any size and of their
            aspect ratio: the region of interest. It is kept in `out`/roi.png; a resumed run takes it from there.
        on_reading: called with the number of photos read so far, and of all that the cache does not hold.
        on_report: called about twice a second while training.
        on_calibration: called afterwards with the number of good images inspected for reference and threshold, and
            of all.

    Raises InTraError on anything that the user can mend.
    """
    out = Path(out)
    category = data if isinstance(data, Category) else find_category(data, normal=normal)
    require_enough(category)
    checkpoint = out / CHECKPOINT_FILE
    stored = read_header(checkpoint)["identity"] if resume and checkpoint.exists() else None
    if not resume and (checkpoint.exists() or (out / MODEL_FILE).exists()):
        raise InTraError(f"{out} already holds a run; pass --resume to go on with it, or choose another --out")
    if resume and not checkpoint.exists() and (out / MODEL_FILE).exists():
        raise InTraError(f"{out} holds a model but no {CHECKPOINT_FILE} to go on from; choose another --out")
    if not 0 <= seed < 2**31:
        raise InTraError(f"the seed is {seed}; it must lie between 0 and {2**31 - 1}")
    chosen = pick_device(device)
    wanted = _wanted(preset, image_size, settings)
    if roi is None and resume and (out / ROI_FILE).is_file() and (stored is None or "roi" in stored):
        roi = out / ROI_FILE
    mask = None if roi is None else read_roi(roi)
    remove_leftovers(out)
    fingerprints = fingerprints_of(category)
    if stored is None:
        config = _resolve(wanted, category, mask)
    else:
        config, seed = _resumed(stored, wanted if preset or settings or image_size else None, seed, fingerprints, mask,
                                out)
    training, validation = _on_the_device(_read_split(category, config, seed, fingerprints, on_reading), chosen)
    region = None if mask is None else _region(mask, config, training)
    shown, held_out = (images if region is None else region.shown(images) for images in (training, validation))
    sampler = _sampler(shown, config, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config.model)
    if config.model.mean_start and stored is None:
        mean = patchify(mean_image(shown)[None], config.model.patch_size)[0]
        cast(InTra, model).start_from(mean.cpu())
    budget = _budget(config, minutes, epochs, steps, sampler.steps_per_epoch, stored)
    identity = {"config": config.to_dict(), "seed": seed, "training_images": fingerprints, "budget": asdict(budget)}
    identity |= {} if mask is None else {"roi": roi_digest(mask)}
    save_roi(mask, out / ROI_FILE)
    with _forgotten_if_it_fails_at_once(checkpoint):
        fitted = fit(
            model, sampler, held_out, config=config.train, model_config=config.model, lattice=config.scoring.lattice,
            budget=budget, fabric=_fabric(chosen, config), out=out, identity=identity,
            resume=stored is not None, on_report=on_report,
        )  # fmt: skip
    best_loss = fitted.progress.best_validation_loss  # infinite if interrupted before the first validation
    provenance = {
        **_software(chosen), "seed": seed, "steps": fitted.progress.step, "best_step": fitted.progress.best_step,
        "best_validation_loss": best_loss if math.isfinite(best_loss) else None,
        "elapsed_s": round(fitted.progress.elapsed_s, 1), "category": category.name,
        "num_train": len(training), "num_validation": len(validation), "training_images": fingerprints,
        "symmetries": sampler.symmetries.int().tolist(), "pretrained_weights": None,
    }  # fmt: skip
    detector = calibrated(model, config, training, validation, provenance, chosen, on_calibration, region)
    detector.save(out / MODEL_FILE)
    if fitted.diverged:
        raise InTraError(f"{fitted.diverged}. {out / MODEL_FILE} holds the best weights before it, of step "
                         f"{fitted.progress.best_step} (validation loss {best_loss:.5f})")
    return Run(out, out / MODEL_FILE, fitted.progress.best_validation_loss, fitted.progress.step,
               fitted.progress.elapsed_s, fitted.interrupted)


def recalibrate(
    run: str | Path,
    data: str | Path | Category,
    *,
    out: str | Path,
    settings: Mapping[str, str],
    device: str = "auto",
    normal: str | Path | None = None,
    on_calibration: Callable[[int, int], None] | None = None,
) -> Run:
    """A run's weights under other scoring settings, with a new reference and threshold, in `out`/model.safetensors.

    The same good images are held out as in the training, so the outcome is that of a training anew with these settings
    (scoring.lattice excepted: it also decides which weights a training keeps).

    Args:
        run: the folder of the run, or its model file.
        data: what it was trained on.
        settings: `scoring.*` alone, by text: `{"scoring.spread": "off"}`.
        on_calibration: called with the number of good images inspected so far, and of all.

    Raises InTraError if a setting is none of scoring, the images are no longer those, or `out` is the run itself.
    """
    refuse_exported(run)
    category = data if isinstance(data, Category) else find_category(data, normal=normal)
    others = [key for key in settings if not key.startswith("scoring.")]
    if others:
        raise InTraError(f"{', '.join(others)} cannot be changed without training anew; only scoring.* can")
    target = Path(out) / MODEL_FILE
    if target.resolve() in (Path(run).resolve(), (Path(run) / MODEL_FILE).resolve()):
        raise InTraError(f"{target} holds the weights to start from; choose another --out")
    loaded = Detector.load(run, device=device)
    known = {key: value for key, value in loaded.provenance.items() if key != "calibrated"}  # its threshold goes
    fingerprints = fingerprints_of(category)
    if known.get("training_images") != fingerprints:
        raise InTraError(f"the images of {category.root} are no longer those that {run} was trained on; put them back, "
                         "or train anew")
    config = loaded.config.with_settings(settings)
    config.check_grid()
    training, validation = _on_the_device(_read_split(category, config, known["seed"], fingerprints), loaded.device)
    provenance = known | {"recalibrated": {"created": datetime.now(UTC).isoformat(timespec="seconds"),
                                           "intra": intra.__version__, "settings": dict(settings)}}
    calibrated(loaded.model, config, training, validation, provenance, loaded.device, on_calibration,
               loaded.region).save(target)
    best_loss = known["best_validation_loss"]
    return Run(Path(out), target, math.inf if best_loss is None else best_loss, known["steps"], known["elapsed_s"],
               interrupted=False)


def _wanted(name: str | None, image_size: str | int | tuple[int, int] | None, settings: Mapping[str, str] | None
            ) -> Config:  # fmt: skip
    """The preset with the user's changes; the grid is still the preset's."""
    config = preset(name or "fast")
    changed = dict(settings or {})
    if image_size is not None:
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        text = sides.lower() if isinstance(sides, str) else f"{sides[0]}x{sides[1]}"
        if not re.fullmatch(r"auto|[0-9]+(x[0-9]+)?", text):
            raise InTraError(f"--image-size is {image_size!r}; expected auto, a side such as 256, or HxW: 256x320")
        changed["data.image_size"] = f"{text}x{text}" if text.isdigit() else text
    return config.with_settings(changed)


def _resolve(config: Config, category: Category, mask: Bool[np.ndarray, "h w"] | None) -> Config:
    """The config with every "auto" about the data decided, from the files' headers and the region of interest alone."""
    infos = [read_info(path) for path in category.train]
    sizes = [info.size for info in infos]
    if mask is not None:
        check_roi(mask, sizes)
        box = roi_box(mask)
        config = replace(config, data=replace(config.data, box=box))
        sizes = [(rows.stop - rows.start, cols.stop - cols.start)
                 for rows, cols in (box_slices(each, box) for each in sizes)]
    patch_size = config.model.patch_size
    size = config.data.image_size
    if size == "auto":
        size = auto_image_size(sizes, patch_size=patch_size, window_size=config.model.window_size)
    if size[0] % patch_size or size[1] % patch_size:
        raise InTraError(f"--image-size is {size[0]}x{size[1]} px; both sides must be multiples of the patch, "
                         f"{patch_size} px, e.g. {_nearby(size[0], patch_size)}x{_nearby(size[1], patch_size)}")
    channels = auto_channels(infos) if config.data.channels == "auto" else config.data.channels
    if max(size) > LARGEST_SIDE:
        raise InTraError(f"--image-size is {size[0]}x{size[1]} px; the largest side is {LARGEST_SIDE} px")
    grid = size[0] // patch_size, size[1] // patch_size
    resolved = replace(config, model=replace(config.model, grid=grid, channels=channels))
    resolved.check_grid()
    return resolved


def _nearby(side: int, patch_size: int) -> int:
    return max(1, round(side / patch_size)) * patch_size


def refuse_to_begin_otherwise(
    begun: Sequence[Path], *, preset: str | None, image_size: str | int | tuple[int, int] | None, seed: int,
    settings: Mapping[str, str] | None, minutes: float | None, epochs: int | None, steps: int | None,
    roi: str | Path | None,
) -> None:  # fmt: skip
    """Raises InTraError if none of the runs in these folders was begun with this preset, size, seed, budget (in epochs:
    not compared), region and these settings. For the categories that a call with several had not come to before it was
    stopped.
    """
    wanted = _wanted(preset, image_size, settings)
    region = None if roi is None else roi_digest(read_roi(roi))
    told = []
    for folder in begun:
        stored = read_header(folder / CHECKPOINT_FILE)["identity"]
        others = _other_settings(Config.from_dict(stored["config"]), wanted)
        others += [f"seed={stored['seed']}, asked is {seed}"] * (seed != stored["seed"])
        others += ["another region of interest, or none"] * (stored.get("roi") != region)
        if epochs is None and not (minutes is None and steps is None and wanted.train.max_epochs):
            budget = asdict(_budget(wanted, minutes, None, steps, 1, None))
            others += [f"{name}={stored['budget'][name]}, asked is {value}" for name, value in budget.items()
                       if value != stored["budget"][name]]
        if not others:
            return
        told.append(f"{folder} was begun with {_listed(others)}")
    raise InTraError(f"{told[0]}; add --resume to the very options of the first call, as some categories are still to "
                     "be begun")


def _other_settings(old: Config, wanted: Config) -> list[str]:
    """Where they differ in anything but what the photos decide."""
    asked = replace(wanted, model=replace(wanted.model, grid=old.model.grid, channels=old.model.channels),
                    data=replace(wanted.data, box=old.data.box))
    before, new = flat(old.to_dict()), flat(asked.to_dict())
    return [f"{key}={before[key]}, asked is {new[key]}" for key in new if before[key] != new[key]]


def _listed(others: Sequence[str]) -> str:
    return "; ".join([*others[:SETTINGS_TOLD], *["…"] * (len(others) > SETTINGS_TOLD)])


def _resumed(
    stored: Mapping[str, Any], wanted: Config | None, seed: int, fingerprints: Mapping[str, str],
    mask: Bool[np.ndarray, "h w"] | None, out: Path,
) -> tuple[Config, int]:  # fmt: skip
    """The stored config and seed. Raises InTraError where the call asks for something else."""
    config = Config.from_dict(stored["config"])
    if stored["training_images"] != dict(fingerprints):
        raise InTraError(f"the images are no longer those with which {out} was begun; put them back, or train anew "
                         "into another --out")
    if wanted is not None and (others := _other_settings(config, wanted)):
        raise InTraError(f"{out} was begun with other settings ({_listed(others)}); resume without --preset, "
                         "--image-size and --set, or train anew into another --out")
    if stored.get("roi") != (None if mask is None else roi_digest(mask)):
        begun = "another region of interest" if stored.get("roi") else "no region of interest"
        raise InTraError(f"{out} was begun with {begun}; resume without --roi and with {ROI_FILE} as it was, or train "
                         "anew into another --out")
    if seed not in (0, stored["seed"]):
        raise InTraError(f"{out} was begun with seed {stored['seed']}, not {seed}; resume without --seed")
    return config, int(stored["seed"])


def _read_split(
    category: Category, config: Config, seed: int, fingerprints: Mapping[str, str],
    on_reading: Callable[[int, int], None] | None = None,
) -> tuple[Shaped[Tensor, "n c h w"], Shaped[Tensor, "m c h w"]]:
    """The good images that train, and those held out, which are decoded whole, as photos to inspect are. Of identical
    files the first stands for all, so that none is on both sides, or counts twice for the threshold. Raises InTraError
    if there are too few for the settings.
    """
    first: dict[str, Path] = {}
    for path, fingerprint in zip(category.train, fingerprints.values(), strict=True):
        first.setdefault(fingerprint, path)
    if len(first) < MIN_GOOD_IMAGES:
        raise InTraError(f"{category.name}: expected at least {MIN_GOOD_IMAGES} good images that differ, found "
                         f"{len(first)} in {len(category.train)} files; add photos of good parts")
    train_index, validation_index = _split(len(first), config, seed)
    kinds = evidence_kinds(config.scoring, has_segmenter=config.model.segmenter_width > 0)
    check_held_out(len(validation_index), kinds=kinds, scoring=config.scoring)
    hashes, paths, size, box = list(first), list(first.values()), config.model.image_size, config.data.box
    images = cached_set(paths, hashes, size=size, channels=config.model.channels, box=box, quickly=True,
                        on_progress=on_reading)
    training, validation = images[train_index], images[validation_index]
    places = [place for place, index in enumerate(validation_index.tolist())
              if is_read_quickly(paths[index], size=size, box=box)]
    if places:
        chosen = validation_index[places].tolist()
        whole = cached_set([paths[index] for index in chosen], [hashes[index] for index in chosen], size=size,
                           channels=config.model.channels, on_progress=on_reading)
        validation[places] = whole if whole.dtype == validation.dtype else to_unit(whole)
    return training, validation


@contextmanager
def _forgotten_if_it_fails_at_once(checkpoint: Path) -> Iterator[None]:
    """Removes the checkpoint of a run that failed before one with a step in it: other settings may do there."""
    try:
        yield
    except InTraError:
        if checkpoint.exists() and not read_header(checkpoint)["progress"]["step"]:
            checkpoint.unlink()
        raise


def _on_the_device(
    photos: tuple[Shaped[Tensor, "n c h w"], Shaped[Tensor, "m c h w"]], device: torch.device
) -> tuple[Shaped[Tensor, "n c h w"], Shaped[Tensor, "m c h w"]]:
    with memory_for(f"{sum(map(len, photos))} photos on {device}", "pass --device cpu, or a smaller --image-size"):
        return photos[0].to(device), photos[1].to(device)


def _region(mask: Bool[np.ndarray, "i j"], config: Config, training: Shaped[Tensor, "n c h w"]) -> Region:
    """The region that a mask marks in the images that were cut out of the photos."""
    assert config.data.box is not None, "a mask has a box"
    part = mask[box_slices((mask.shape[0], mask.shape[1]), config.data.box)]
    return Region.of(part, mean_image(training))


def _split(count: int, config: Config, seed: int) -> tuple[Tensor, Tensor]:
    """Which images train and which validate: a share, at least 3 (or a third) to calibrate on, at most half."""
    share = round(count * config.data.validation_fraction)
    num_validation = min(max(share, min(3, count // 3), 1), config.data.max_validation_images, count // 2)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[num_validation:].sort().values, order[:num_validation].sort().values


def _sampler(training: Shaped[Tensor, "n c h w"], config: Config, seed: int) -> WindowSampler:
    num_patches = config.model.window_shape[0] * config.model.window_shape[1]
    share = config.train.hidden_fraction
    least, most = (1, 1) if share is None else (max(1, round(num_patches * part)) for part in share)
    return WindowSampler(
        training, patch_size=config.model.patch_size, window_shape=config.model.window_shape, num_hidden=(least, most),
        windows_per_image=config.train.windows_per_image, batch_size=config.train.batch_size, seed=seed,
        symmetries=allowed_symmetries(training, flips=config.train.flips, turns=config.train.turns),
    )  # fmt: skip


def _budget(
    config: Config, minutes: float | None, epochs: int | None, steps: int | None, steps_per_epoch: int,
    stored: Mapping[str, Any] | None,
) -> Budget:  # fmt: skip
    """The budget that was given, or else that of the resumed run, or else the preset's."""
    given = [name for name, value in (("--minutes", minutes), ("--epochs", epochs), ("--steps", steps))
             if value is not None]
    if len(given) > 1:
        raise InTraError(f"give one budget, not {' and '.join(given)}")
    if given and not 0 < min(value for value in (minutes, epochs, steps) if value is not None) < math.inf:
        raise InTraError(f"{given[0]} must be above 0, and a number")
    if minutes is not None:
        return Budget(seconds=minutes * 60)
    if steps is not None:
        return Budget(steps=steps)
    if epochs is None and stored is not None:
        return Budget(**stored["budget"])
    if epochs is not None:
        return Budget(steps=epochs * steps_per_epoch)
    own = config.train
    in_steps = own.max_steps, None if own.max_epochs is None else own.max_epochs * steps_per_epoch
    limits = [limit for limit in in_steps if limit is not None]
    if not limits and own.max_minutes is None:
        raise InTraError("no budget: give --minutes, --epochs or --steps, or set train.max_steps, train.max_minutes or "
                         "train.max_epochs")
    return Budget(min(limits, default=None), None if own.max_minutes is None else own.max_minutes * 60)


def _fabric(device: torch.device, config: Config) -> Fabric:
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces each precision
    bf16 = uses_bf16(device, config.train.precision)
    return Fabric(accelerator=device.type, devices=[device.index or 0] if device.type == "cuda" else 1,
                  precision="bf16-mixed" if bf16 else "32-true")


def _software(device: torch.device) -> dict[str, str]:
    return {"intra": intra.__version__, "code_sha256": code_sha256(), "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "machine": platform.machine(), "created": datetime.now(UTC).isoformat(timespec="seconds")}

