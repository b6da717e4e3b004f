"""Settings: frozen dataclasses, their checks, and the presets.

Every value that the paper states, or that follows from it, stands in the preset `paper`; docs/method.md says how sure
each is. Below `models.build` nobody sees a whole config: settings go into functions as arguments.
"""

import dataclasses
import difflib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from intra.errors import InTraError
from intra.values import fits_type, parse_value, type_in_words

__all__ = ["PRESETS", "Config", "DataConfig", "ModelConfig", "ScoringConfig", "TrainConfig", "nearest", "preset"]

FROM_THE_DATA = {("model", "grid"), ("model", "channels")}  # not set by hand: --image-size and data.channels decide
LEAST_SIDE = 3  # px of a reduced image: fewer hold no gradient


@dataclass(frozen=True)
class ModelConfig:
    """The inpainting transformer. The defaults are the paper's."""

    channels: int = 3
    patch_size: int = 16  # K, px
    grid: tuple[int, int] = (16, 16)  # patches: rows, cols of the whole image
    window_size: int | None = 7  # L, patches a side; None: the window is the whole grid
    embed_dim: int = 512
    depth: int = 13
    num_heads: int = 8
    mlp_ratio: float = 4.0
    attention: Literal["mfsa", "msa"] = "mfsa"
    value_mlp: bool = False  # MFSA: an MLP for v as well; one summary of the paper names it
    long_residuals: bool = True
    readout: Literal["mean", "token"] = "mean"

    @property
    def window_shape(self) -> tuple[int, int]:
        """Rows and cols of a window, in patches."""
        return self.grid if self.window_size is None else (self.window_size, self.window_size)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image that the grid covers, in px."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        found = _outside(self, 1, 1024, "channels", "patch_size", "num_heads", "depth")
        found += _outside(self, 1, 2**14, "embed_dim")
        if not 0 < self.mlp_ratio <= 64:
            found.append(f"model.mlp_ratio is {self.mlp_ratio}; it must lie between 0 and 64")
        # MFSA's query and key heads are embed_dim / 16 wide for 8 heads: half of a value head (method.md)
        unit = 2 * self.num_heads if self.attention == "mfsa" else self.num_heads
        if self.num_heads >= 1 and self.embed_dim % unit:
            found.append(f"model.embed_dim is {self.embed_dim}; with {self.num_heads} heads of {self.attention} it "
                         f"must be a multiple of {unit}")
        if self.window_size is not None and self.window_size < 1:
            found.append(f"model.window_size is {self.window_size}; it must be at least 1 patch, or none")
        return found


@dataclass(frozen=True)
class DataConfig:
    """How files become tensors."""

    image_size: Literal["auto"] | tuple[int, int] = "auto"  # px: height, width
    channels: Literal["auto"] | int = "auto"
    validation_fraction: float = 0.1
    max_validation_images: int = 20  # one summary of the paper says 200

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        found = _outside(self, 1, 10**6, "max_validation_images")
        if not 0 < self.validation_fraction < 1:
            found.append(f"data.validation_fraction is {self.validation_fraction}; it must lie between 0 and 1")
        if self.channels != "auto":
            found += _outside(self, 1, 1024, "channels")
        if self.image_size != "auto" and min(self.image_size) < 1:
            found.append(f"data.image_size is {self.image_size}; both sides must be at least 1 px")
        return found


@dataclass(frozen=True)
class TrainConfig:
    """How good images become a model. The defaults are the paper's."""

    windows_per_image: int = 600  # windows of each training image in an epoch
    batch_size: int = 256  # windows a step
    # least and largest share of a window's patches that are hidden, drawn for each; None: exactly one patch
    hidden_fraction: tuple[float, float] | None = None
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_fraction: float = 0.0  # of the budget
    gms_weight: float = 0.01
    ssim_weight: float = 0.01
    flips: Literal["auto", "on", "off"] = "on"
    turns: Literal["auto", "on", "off"] = "on"  # quarter turns
    max_epochs: int | None = 200  # the budget if none is given
    max_steps: int | None = None
    patience: int | None = 50  # epochs without a better validation loss
    gradient_clip: float | None = None  # largest norm
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the machine computes it natively

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        found = _outside(self, 1, 10**5, "windows_per_image", "batch_size")
        found += _outside(self, 1, 10**9, "max_epochs", "max_steps", "patience")
        if self.hidden_fraction is not None and not 0 < self.hidden_fraction[0] <= self.hidden_fraction[1] < 1:
            found.append(f"train.hidden_fraction is {self.hidden_fraction}; it must be two shares between 0 and 1, the "
                         "smaller one first, such as 0.05,0.25, or none")
        if not 0 < self.learning_rate < 1:
            found.append(f"train.learning_rate is {self.learning_rate}; it must lie between 0 and 1")
        if not 0 <= self.warmup_fraction < 1:
            found.append(f"train.warmup_fraction is {self.warmup_fraction}; it must lie between 0 and 1")
        for name in ("weight_decay", "gms_weight", "ssim_weight"):
            if getattr(self, name) < 0:
                found.append(f"train.{name} is {getattr(self, name)}; it must not be negative")
        if self.gradient_clip is not None and self.gradient_clip <= 0:
            found.append(f"train.gradient_clip is {self.gradient_clip}; it must be above 0, or none")
        return found


@dataclass(frozen=True)
class ScoringConfig:
    """How an image and its repaired image become an anomaly map. The defaults are the paper's."""

    lattice: int = 3  # d: every d-th patch of every d-th row is hidden at once (where the window is the whole grid)
    scales: tuple[int, ...] = (2, 4)  # the images are reduced by these factors before their gradients are compared
    blur_size: int = 21  # px of the box filter over the map, odd; 1: none
    deviation: Literal["squared", "clipped", "signed", "none"] = "squared"  # of the map from good images' mean map
    reference: Literal["training", "validation"] = "training"  # the good images whose maps are averaged
    max_reference_images: int | None = None  # training images for the reference, evenly spaced; None: all of them
    spread: bool = False  # divide by the good images' standard deviation at each place
    false_reject_rate: float = 0.01  # the threshold's share of good images that may be rejected
    precision: Literal["auto", "fp32", "bf16"] = "fp32"

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        found = _outside(self, 1, 1024, "lattice")
        found += _outside(self, 1, 1023, "blur_size")
        found += _outside(self, 2, 10**9, "max_reference_images")
        if self.blur_size % 2 == 0:
            found.append(f"scoring.blur_size is {self.blur_size}; a box filter needs an odd side")
        if not self.scales or min(self.scales) < 1:
            found.append(f"scoring.scales is {self.scales}; it needs at least one factor, each at least 1")
        if not 0 < self.false_reject_rate < 1:
            found.append(f"scoring.false_reject_rate is {self.false_reject_rate}; it must lie between 0 and 1")
        if self.spread and self.deviation == "none":
            found.append("scoring.spread needs scoring.deviation squared, clipped or signed")
        return found


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
        if self.model.readout == "mean" and self.train.hidden_fraction is not None:
            found.append("model.readout mean inpaints one patch a window; set train.hidden_fraction=none or "
                         "model.readout=token")
        if self.model.readout == "mean" and self.model.window_size is None:
            found.append("model.readout mean needs a window; set model.window_size, or model.readout=token")
        if found:
            raise InTraError("; ".join(found))

    def check_grid(self) -> None:
        """Raises InTraError where the window or the scales do not fit the image, once its size is known."""
        rows, cols = self.model.grid
        window, scale = self.model.window_size, max(self.scoring.scales)
        found = []
        if not 1 <= min(rows, cols) <= max(rows, cols) <= 1024:
            found.append(f"the grid is {rows}x{cols} patches; expected 1 to 1024 on each side; choose another "
                         "--image-size or model.patch_size")
        if window is not None and window > min(rows, cols):
            found.append(f"model.window_size is {window} patches, but the grid has {rows}x{cols}; choose a window of "
                         f"1 to {min(rows, cols)}, or a larger --image-size")
        if min(self.model.image_size) // scale < LEAST_SIDE:
            height, width = self.model.image_size
            found.append(f"scoring.scales={scale} leaves less than {LEAST_SIDE} px of an image of {height}x{width} px; "
                         "choose smaller scales, or a larger --image-size")
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


def _outside(settings: Any, least: int, most: int, *names: str) -> list[str]:
    """A sentence for each named setting that is not in this range; None is not checked."""
    part = type(settings).__name__.removesuffix("Config").lower()
    return [f"{part}.{name} is {getattr(settings, name)}; it must be {least} to {most}" for name in names
            if getattr(settings, name) is not None and not least <= getattr(settings, name) <= most]


# The lattice variant: the whole grid is one window, a random share of its patches is hidden at once and each is
# read out from its own token; 9 passes inspect an image. docs/decisions/0001-lattice.md
_FAST = Config(
    preset="fast",
    model=ModelConfig(window_size=None, embed_dim=192, depth=6, num_heads=6, readout="token"),
    # more held-out images than the paper's: they also carry the threshold
    data=DataConfig(validation_fraction=0.15, max_validation_images=40),
    train=TrainConfig(
        windows_per_image=8, batch_size=8, hidden_fraction=(0.05, 0.25), optimizer="adamw", learning_rate=1e-3,
        weight_decay=0.05, schedule="cosine", warmup_fraction=0.03, flips="auto", turns="auto", max_epochs=None,
        max_steps=4200, patience=None, gradient_clip=1.0,
    ),
    # docs/decisions/0003-spread.md, 0006-scales.md
    scoring=ScoringConfig(scales=(2, 4, 8, 16), blur_size=31, max_reference_images=256, spread=True,
                          precision="auto"),
)

PRESETS: dict[str, Config] = {"paper": Config(), "fast": _FAST}
