"""The settings of a run, their checks against each other, and the presets. settings.py has those of each part.

Every value that the paper states, or that follows from it, stands in the preset `paper`; docs/method.md says how sure
each is. Below `models.build` nobody sees a whole config: settings go into functions as arguments.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from intra.errors import InTraError
from intra.settings import DataConfig, ModelConfig, ScoringConfig, TrainConfig
from intra.values import fits_type, parse_value, type_in_words

__all__ = ["PRESETS", "Config", "DataConfig", "ModelConfig", "ScoringConfig", "TrainConfig", "flat", "nearest",
           "preset"]

# Not set by hand: --image-size, data.channels and --roi decide.
FROM_THE_DATA = {("model", "grid"), ("model", "channels"), ("data", "box")}
LEAST_SIDE = 3  # px of a reduced image: fewer hold no gradient


@dataclass(frozen=True)
class Config:
    """All settings of one run."""

    preset: str = "paper"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)

    def __post_init__(self) -> None:
        found = [*self.model.problems(), *self.data.problems(), *self.train.problems(), *self.scoring.problems()]
        mean_readout = self.model.network == "intra" and self.model.readout == "mean"
        if mean_readout and self.train.hidden_fraction is not None:
            found.append("model.readout mean inpaints one patch a window; set train.hidden_fraction=none or "
                         "model.readout=token")
        if mean_readout and self.model.window_size is None:
            found.append("model.readout mean needs a window; set model.window_size, or model.readout=token")
        if self.model.segmenter_width and not self.train.segmentation_weight and self.scoring.segmenter_weight:
            found.append("train.segmentation_weight is 0, so the segmenter would say nothing but noise; set "
                         "model.segmenter_width=0 or scoring.segmenter_weight=0")
        if found:
            raise InTraError("; ".join(found))

    def check_grid(self) -> None:
        """Raises InTraError where the network or the scales do not fit the image, once its size is known."""
        found = self.model.misfits()
        height, width = self.model.image_size
        scale, loss_scale = max(self.scoring.scales), max(self.train.gms_scales)
        if min(height, width) // scale < LEAST_SIDE:
            found.append(f"scoring.scales={scale} leaves less than {LEAST_SIDE} px of an image of {height}x{width} px; "
                         "choose smaller scales, or a larger --image-size")
        compared = self.model.patch_size if self.model.network == "intra" else min(height, width)
        if loss_scale > 1 and compared // loss_scale < LEAST_SIDE:  # at full size the loss takes patches of any side
            found.append(f"train.gms_scales={loss_scale} leaves less than {LEAST_SIDE} of the {compared} px that the "
                         "loss compares; choose smaller scales")
        if found:
            raise InTraError("; ".join(found))

    def with_settings(self, settings: Mapping[str, str]) -> "Config":
        """These settings with some replaced by text, `{"train.batch_size": "16"}`.

        Raises InTraError that names every wrong key (with its nearest match) and every wrong value at once.
        """
        known = {f"{part.name}.{f.name}": (part.name, f.name) for part in fields(self) if part.name != "preset"
                 for f in fields(getattr(self, part.name)) if (part.name, f.name) not in FROM_THE_DATA}
        changed: dict[str, dict[str, Any]] = {}
        found: list[str] = []
        for key, text in settings.items():
            if key not in known:
                found.append(f"unknown setting {key!r}{nearest(key, known)}")
                continue
            part, name = known[key]
            try:
                hint = typing.get_type_hints(type(getattr(self, part)))[name]
                changed.setdefault(part, {})[name] = parse_value(str(text), hint)
            except ValueError:
                found.append(f"{key}={text!r} is not {type_in_words(hint)}")
        if found:
            raise InTraError("; ".join(found))
        parts = {part: dataclasses.replace(getattr(self, part), **values) for part, values in changed.items()}
        return dataclasses.replace(self, **parts)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain values, fit for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "Config":
        """The inverse of `to_dict`, also after a trip through JSON.

        Raises InTraError on unknown names and wrong types.
        """
        if not isinstance(values, Mapping) or not all(isinstance(values.get(name, {}), Mapping) for name in (
                "model", "data", "train", "scoring")):
            raise InTraError("the settings are no table of tables")
        parts: dict[str, Any] = {"preset": str(values.get("preset", ""))}
        kinds: dict[str, Any] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig,
                                 "scoring": ScoringConfig}
        for name, part in kinds.items():
            given = values.get(name, {})
            unknown = set(given) - {f.name for f in fields(part)}
            if unknown:
                raise InTraError(f"unknown settings in {name}: {', '.join(sorted(unknown))}")
            plain = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
            hints = typing.get_type_hints(part)
            wrong = [f"{name}.{key}={value!r}" for key, value in plain.items() if not fits_type(value, hints[key])]
            if wrong:
                raise InTraError(f"settings of a wrong type: {', '.join(wrong)}")
            parts[name] = part(**plain)
        return cls(**parts)


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """What `Config.to_dict` gives, by the names that --set takes: `{"preset": "fast", "model.depth": 4, …}`."""
    return {"preset": config["preset"]} | {f"{part}.{name}": value for part, values in config.items()
                                           if isinstance(values, Mapping) for name, value in values.items()}


def preset(name: str) -> Config:
    """The settings of a preset by its name. Raises InTraError with the nearest match on an unknown one."""
    if name not in PRESETS:
        raise InTraError(f"unknown preset {name!r}{nearest(name, PRESETS)}; presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'fast'?"`, or nothing where no known word is near.

    >>> nearest("fsat", ["fast", "paper"])
    "; did you mean 'fast'?"
    """
    known = list(known)
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not match:  # a bare last part: `batch_size` for `train.batch_size`
        match = [k for k in known if k.split(".")[-1] == word.rsplit(".", maxsplit=1)[-1]][:1]
    return f"; did you mean {match[0]!r}?" if match else ""


# The lattice variant: the whole grid is one window, a random share of its patches is hidden at once and each is
# read out from its own token; 4 passes inspect an image. docs/decisions/0001-lattice.md, 0017-attention-of-fast.md,
# 0023-four-blocks.md
_FAST = Config(
    preset="fast",
    model=ModelConfig(window_size=None, embed_dim=192, depth=4, num_heads=6, attention="msa", readout="token",
                      conditional_positions=True, mean_start=True),
    # more held-out images than the paper's: they also carry the threshold
    data=DataConfig(validation_fraction=0.15, max_validation_images=40),
    train=TrainConfig(
        windows_per_image=8, batch_size=8, hidden_fraction=(0.05, 0.25), optimizer="adamw", learning_rate=1e-3,
        weight_decay=0.05, schedule="trapezoid", warmup_fraction=0.03, flips="auto", turns="auto", max_epochs=None,
        max_steps=6000, max_minutes=15.0, patience=None, gradient_clip=1.0,
    ),
    # docs/decisions/0009-distribution.md, 0019-divided.md; with difference_weight also 0003-spread.md, 0006-scales.md
    scoring=ScoringConfig(lattice=2, scales=(2, 4, 8, 16), blur_size=31, max_reference_images=512, spread=True,
                          difference_weight=0.0, distribution_weight=1.0, precision="auto"),
)

# `fast`, larger and longer: minutes on a GPU, an hour and a half on two cores with bf16.
_QUALITY = dataclasses.replace(
    _FAST, preset="quality",
    model=dataclasses.replace(_FAST.model, embed_dim=384, depth=8, num_heads=8),
    train=dataclasses.replace(_FAST.train, batch_size=16, learning_rate=7e-4, max_steps=8000, max_minutes=None),
)  # fmt: skip

# The baselines keep the same images out as `fast` does, so that their thresholds compare.
# Loss, optimiser and scoring are their papers'; docs/method.md. No mean map of good images is taken off theirs, so
# the held-out images suffice as reference.
_AUTOENCODER_L2 = Config(
    preset="autoencoder_l2",
    model=ModelConfig(network="autoencoder", patch_size=32, window_size=None, readout="token"),
    data=_FAST.data,
    train=TrainConfig(
        windows_per_image=8, batch_size=8, learning_rate=2e-4, weight_decay=1e-5, gms_weight=0.0, ssim_weight=0.0,
        flips="auto", turns="auto", max_epochs=None, max_steps=4200, patience=None,
    ),
    scoring=ScoringConfig(difference="squared", scales=(1,), blur_size=1, deviation="none", reference="validation",
                          precision="auto"),
)
_AUTOENCODER_SSIM = dataclasses.replace(
    _AUTOENCODER_L2, preset="autoencoder_ssim",
    train=dataclasses.replace(_AUTOENCODER_L2.train, l2_weight=0.0, ssim_weight=1.0),
    scoring=dataclasses.replace(_AUTOENCODER_L2.scoring, difference="ssim"),
)  # fmt: skip
_RIAD = dataclasses.replace(
    _AUTOENCODER_L2, preset="riad", model=ModelConfig(network="riad", window_size=None, readout="token"),
    train=dataclasses.replace(_AUTOENCODER_L2.train, learning_rate=1e-4, weight_decay=0.0, gms_weight=1.0,
                              gms_scales=(1, 2, 4, 8), ssim_weight=1.0),
    scoring=dataclasses.replace(_AUTOENCODER_L2.scoring, difference="gms", scales=(1, 2, 4, 8), blur_size=21),
)  # fmt: skip

PRESETS: dict[str, Config] = {
    each.preset: each for each in (Config(), _FAST, _QUALITY, _AUTOENCODER_L2, _AUTOENCODER_SSIM, _RIAD)
}
