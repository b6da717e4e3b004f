"""From a folder of good images to a model file: decode, fit, calibrate, save."""

import logging
import math
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Shaped
from lightning_fabric import Fabric
from torch import Tensor, nn

import intra
from intra.config import Config, preset
from intra.data.cache import cached_set
from intra.data.files import remove_leftovers
from intra.data.folder import Category, find_category, fingerprints_of, require_enough
from intra.data.images import auto_channels, auto_image_size, read_info, to_unit
from intra.errors import InTraError
from intra.geometry import patchify
from intra.inspection.anomaly import Evidence, evidence_kinds
from intra.inspection.calibration import LEAST_HELD_OUT, calibrate
from intra.inspection.detector import Detector, refuse_exported, repair
from intra.inspection.device import in_chunks, pick_device, uses_bf16
from intra.inspection.distribution import GoodPatches, PatchDistribution, PatchFeatures
from intra.inspection.model_file import MODEL_FILE
from intra.inspection.setup import LEAST_GOOD, Setup
from intra.models import InTra, build
from intra.provenance import code_sha256
from intra.training.checkpoint import CHECKPOINT_FILE, read_header
from intra.training.engine import IMAGES_PER_CHUNK, Budget, Report, fit
from intra.training.sampler import WindowSampler, allowed_symmetries, mean_image

__all__ = ["Run", "recalibrate", "train"]

LARGEST_SIDE = 8192  # px


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
    on_report: Callable[[Report], None] | None = None,
    on_calibration: Callable[[int, int], None] | None = None,
) -> Run:
    """Trains on the good images of one category and writes `out`/model.safetensors.

    Args:
        data: a category in MVTec's layout, or a folder of good images.
        preset: "fast" (the default), "quality", "paper", or a baseline: "autoencoder_l2", "autoencoder_ssim", "riad".
        image_size: px; "auto", a side, or (height, width), both multiples of the patch.
        minutes, epochs, steps: the budget, one of them; without any, the resumed run's or the preset's. The schedule
            fits it.
        seed: the same seed on the same machine gives the same weights (with a budget in steps or epochs).
        resume: go on from `out`/last.ckpt where there is one; preset, seed and settings are then those of the run.
        settings: replaces single settings by text, `{"train.batch_size": "16"}`.
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
    remove_leftovers(out)
    fingerprints = fingerprints_of(category)
    if stored is None:
        config = _resolve(wanted, category)
    else:
        config, seed = _resumed(stored, wanted if preset or settings or image_size else None, seed, fingerprints, out)
    training, validation = (images.to(chosen) for images in _read_split(category, config, seed, fingerprints))
    sampler = _sampler(training, config, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(config.model)
    if config.model.mean_start and stored is None:
        mean = patchify(mean_image(training)[None], config.model.patch_size)[0]
        cast(InTra, model).start_from(mean.cpu())
    budget = _budget(config, minutes, epochs, steps, sampler.steps_per_epoch, stored)
    identity = {"config": config.to_dict(), "seed": seed, "training_images": fingerprints, "budget": asdict(budget)}
    fitted = fit(
        model, sampler, validation, config=config.train, model_config=config.model, lattice=config.scoring.lattice,
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
    detector = _calibrated(model, config, training, validation, provenance, chosen, on_calibration)
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
    known = loaded.provenance
    if known.get("training_images") != fingerprints_of(category):
        raise InTraError(f"the images of {category.root} are no longer those that {run} was trained on; put them back, "
                         "or train anew")
    config = loaded.config.with_settings(settings)
    config.check_grid()
    training, validation = (images.to(loaded.device) for images in _read_split(
        category, config, known["seed"], known["training_images"]))
    provenance = known | {"recalibrated": {"created": datetime.now(UTC).isoformat(timespec="seconds"),
                                           "intra": intra.__version__, "settings": dict(settings)}}
    _calibrated(loaded.model, config, training, validation, provenance, loaded.device, on_calibration).save(target)
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


def _resolve(config: Config, category: Category) -> Config:
    """The config with every "auto" about the data decided, from the files' headers alone."""
    infos = [read_info(path) for path in category.train]
    patch_size = config.model.patch_size
    size = config.data.image_size
    if size == "auto":
        size = auto_image_size([info.size for info in infos], patch_size=patch_size,
                               window_size=config.model.window_size)
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


def _resumed(
    stored: Mapping[str, Any], wanted: Config | None, seed: int, fingerprints: Mapping[str, str], out: Path
) -> tuple[Config, int]:
    """The stored config and seed. Raises InTraError where the call asks for something else."""
    config = Config.from_dict(stored["config"])
    if stored["training_images"] != dict(fingerprints):
        raise InTraError(f"the images are no longer those with which {out} was begun; put them back, or train anew "
                         "into another --out")
    if wanted is not None:
        asked = replace(wanted, model=replace(wanted.model, grid=config.model.grid, channels=config.model.channels))
        if asked != config:
            raise InTraError(f"{out} was begun with other settings; resume without --preset, --image-size and --set, "
                             "or train anew into another --out")
    if seed not in (0, stored["seed"]):
        raise InTraError(f"{out} was begun with seed {stored['seed']}, not {seed}; resume without --seed")
    return config, int(stored["seed"])


def _read_split(
    category: Category, config: Config, seed: int, fingerprints: Mapping[str, str]
) -> tuple[Shaped[Tensor, "n c h w"], Shaped[Tensor, "m c h w"]]:
    """The good images that train, and those held out. Raises InTraError if there are too few for the settings."""
    images = cached_set(category.train, fingerprints.values(), size=config.model.image_size,
                        channels=config.model.channels)
    train_index, validation_index = _split(len(images), config, seed)
    if config.scoring.reference == "validation" and len(validation_index) < LEAST_HELD_OUT:
        raise InTraError(f"scoring.reference=validation needs at least {LEAST_HELD_OUT} held-out images, there are "
                         f"{len(validation_index)}; give more photos, or set a larger data.validation_fraction")
    return images[train_index], images[validation_index]


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
    if given and not min(value for value in (minutes, epochs, steps) if value is not None) > 0:
        raise InTraError(f"{given[0]} must be above 0")
    if minutes is not None:
        return Budget(seconds=minutes * 60)
    if steps is not None:
        return Budget(steps=steps)
    if epochs is None and stored is not None:
        return Budget(**stored["budget"])
    if epochs is None and (config.train.max_steps or config.train.max_minutes):
        return Budget(config.train.max_steps, config.train.max_minutes and config.train.max_minutes * 60)
    epochs = epochs if epochs is not None else config.train.max_epochs
    if epochs is None:
        raise InTraError("no budget: give --minutes, --epochs or --steps, or set train.max_steps, train.max_minutes or "
                         "train.max_epochs")
    return Budget(steps=epochs * steps_per_epoch)


def _fabric(device: torch.device, config: Config) -> Fabric:
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces each precision
    bf16 = uses_bf16(device, config.train.precision)
    return Fabric(accelerator=device.type, devices=[device.index or 0] if device.type == "cuda" else 1,
                  precision="bf16-mixed" if bf16 else "32-true")


def _calibrated(
    model: nn.Module, config: Config, training: Shaped[Tensor, "n c h w"], validation: Shaped[Tensor, "m c h w"],
    provenance: dict[str, Any], device: torch.device, on_calibration: Callable[[int, int], None] | None,
) -> Detector:  # fmt: skip
    """The detector with what good images are like, and its threshold, from training and held-out images."""
    model = model.to(device).eval()
    scoring = config.scoring
    kinds = evidence_kinds(scoring, has_segmenter=config.model.segmenter_width > 0)
    describe = (PatchFeatures.of(training, scoring=scoring, seed=provenance["seed"]) if "distribution" in kinds
                else None)
    (trained_on, seen), (held_out, unseen) = _examined(model, config, training, validation, kinds, describe,
                                                       on_calibration)
    good = GoodPatches(describe, seen, num_modes=scoring.num_modes) if describe else None

    def fitted(places: list[int]) -> PatchDistribution | None:
        """The distribution, held against the held-out images at these places."""
        return good.fitted([each[..., places] for each in unseen]) if good else None

    def evidence(distribution: PatchDistribution | None) -> Tensor:
        """Of the held-out images; the distribution's as the last."""
        if distribution is None:
            return held_out
        found = distribution.evidence_of(unseen, config.model.image_size).cpu()
        return torch.cat([held_out, found[:, None]], dim=1)

    distribution = fitted(list(range(len(held_out))))
    reference, scores = calibrate(evidence(distribution), trained_on if scoring.reference == "training" else None,
                                  kinds=kinds, scoring=scoring,
                                  refit=(lambda places: evidence(fitted(places))) if good else None)
    everything = torch.cat([training, validation])  # the network has no part in it: all good images count
    setup = Setup.of(everything) if len(everything) >= LEAST_GOOD else None
    return Detector(model, config, reference=reference, held_out_scores=scores, provenance=provenance,
                    distribution=distribution, setup=setup, device=str(device))


def _examined(
    model: nn.Module, config: Config, training: Shaped[Tensor, "n c h w"], validation: Shaped[Tensor, "m c h w"],
    kinds: Sequence[Evidence], describe: PatchFeatures | None, on_calibration: Callable[[int, int], None] | None,
) -> tuple[tuple[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]:  # fmt: skip
    """Of training and of held-out images the evidence without the distribution's, and the distribution's features."""
    scoring = config.scoring
    learns = describe is not None or scoring.reference == "training"
    count = min(len(training), scoring.max_reference_images or len(training)) if learns else 0
    chosen = torch.linspace(0, len(training) - 1, count).round().long()
    total = count + len(validation)

    def examined(images: Tensor, num_before: int) -> tuple[Tensor, list[Tensor]]:
        found = [torch.zeros(0, len(kinds) - (describe is not None), *images.shape[-2:])]
        features: list[list[Tensor]] = []
        for photos, repaired, evidence in _inspected(model, config, kinds, on_calibration, images, num_before, total):
            found.append(evidence.cpu())
            if describe:
                features.append(describe(photos, repaired))
        return torch.cat(found), [torch.cat(parts, dim=2) for parts in zip(*features, strict=True)]

    return examined(training[chosen.to(training.device)], 0), examined(validation, count)


def _inspected(
    model: nn.Module, config: Config, kinds: Sequence[Evidence], on_calibration: Callable[[int, int], None] | None,
    images: Shaped[Tensor, "n c h w"], num_before: int, total: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """Chunk by chunk the photos, their repaired images, and all evidence but the distribution's. Tells of progress."""

    def work(start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        photos = to_unit(images[start:stop])
        return photos, *repair(model, photos, model_config=config.model, scoring=config.scoring, kinds=kinds)

    for chunk in in_chunks(work, len(images), IMAGES_PER_CHUNK):
        num_before += len(chunk[0])
        yield chunk
        if on_calibration:
            on_calibration(num_before, total)


def _software(device: torch.device) -> dict[str, str]:
    return {"intra": intra.__version__, "code_sha256": code_sha256(), "torch": torch.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "machine": platform.machine(), "created": datetime.now(UTC).isoformat(timespec="seconds")}

