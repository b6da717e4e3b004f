"""The settings of each part: frozen dataclasses, and what is wrong with a value or two of them together.

Every default is the paper's, but of what the paper does not have, which is off by default; docs/method.md says how sure
each is.
"""

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["DataConfig", "ModelConfig", "Places", "ScoringConfig", "TrainConfig"]

Places = Literal["auto", "own", "shared"]

# px of which an image's sides must be multiples: a network halves them that often
SIDE_MULTIPLES = {"intra": 1, "autoencoder": 32, "riad": 16}


@dataclass(frozen=True)
class ModelConfig:
    """The network: the inpainting transformer, or a baseline. The defaults are the paper's."""

    network: Literal["intra", "autoencoder", "riad"] = "intra"
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
    conditional_positions: bool = False  # a 3 x 3 convolution over the grid of tokens before each block
    mean_start: bool = False  # inpaint what differs from the training images' mean, which training starts from
    latent_dim: int = 100  # autoencoder: values to which an image is reduced
    base_width: int = 64  # RIAD: channels of the U-Net's first block
    cell_sizes: tuple[int, ...] = (2, 4, 8, 16)  # RIAD: px, side of the cells that are hidden
    num_cell_sets: int = 3  # RIAD: sets into which the cells are parted; each is hidden in turn
    segmenter_width: int = 0  # InTra: channels of the first block of the segmenter beside it; 0: none, as in the paper

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
        found += _outside(self, 1, 2**14, "embed_dim", "latent_dim")
        found += _outside(self, 1, 1024, "base_width")
        found += _outside(self, 2, 1024, "num_cell_sets")
        found += _outside(self, 0, 1024, "segmenter_width")
        if self.segmenter_width and (self.network != "intra" or self.window_size is not None):
            found.append("model.segmenter_width needs model.network=intra and model.window_size=none: the segmenter "
                         "learns from whole images; or set model.segmenter_width=0")
        if not self.cell_sizes or not 1 <= min(self.cell_sizes) <= max(self.cell_sizes) <= 1024:
            found.append(f"model.cell_sizes is {self.cell_sizes}; it needs at least one side, each 1 to 1024 px")
        if not 0 < self.mlp_ratio <= 64:
            found.append(f"model.mlp_ratio is {self.mlp_ratio}; it must lie between 0 and 64")
        # MFSA's query and key heads are embed_dim / 16 wide for 8 heads: half of a value head (method.md)
        unit = 2 * self.num_heads if self.attention == "mfsa" else self.num_heads
        if self.num_heads >= 1 and self.embed_dim % unit:
            found.append(f"model.embed_dim is {self.embed_dim}; with {self.num_heads} heads of {self.attention} it "
                         f"must be a multiple of {unit}")
        if self.window_size is not None and self.window_size < 1:
            found.append(f"model.window_size is {self.window_size}; it must be at least 1 patch, or none")
        if self.network != "intra" and self.window_size is not None:
            found.append(f"model.network {self.network} takes whole images; set model.window_size=none")
        return found

    def misfits(self) -> list[str]:
        """Everything about the image that the network cannot take, one sentence each, once its size is known."""
        (rows, cols), (height, width) = self.grid, self.image_size
        if not 1 <= min(rows, cols) <= max(rows, cols) <= 1024:
            return [f"the grid is {rows}x{cols} patches; expected 1 to 1024 on each side; choose another --image-size "
                    "or model.patch_size"]
        found = []
        if self.window_size is not None and self.window_size > min(rows, cols):
            found.append(f"model.window_size is {self.window_size} patches, but the grid has {rows}x{cols}; choose a "
                         f"window of 1 to {min(rows, cols)}, or a larger --image-size")
        multiple = SIDE_MULTIPLES[self.network]
        if height % multiple or width % multiple:
            found.append(f"the image is {height}x{width} px; for model.network {self.network} both sides must be "
                         f"multiples of {multiple} px; choose another --image-size")
        for size in self.cell_sizes if self.network == "riad" else ():
            if height % size or width % size:
                found.append(f"model.cell_sizes has {size}, but the image is {height}x{width} px; both sides must be "
                             "multiples of each cell size")
            elif (height // size) * (width // size) < self.num_cell_sets:
                found.append(f"model.cell_sizes has {size}, so an image of {height}x{width} px has fewer cells than "
                             f"model.num_cell_sets, {self.num_cell_sets}; choose a larger --image-size")
        return found


@dataclass(frozen=True)
class DataConfig:
    """How files become tensors."""

    image_size: Literal["auto"] | tuple[int, int] = "auto"  # px: height, width
    channels: Literal["auto"] | int = "auto"
    validation_fraction: float = 0.1
    max_validation_images: int = 20  # one summary of the paper says 200
    # what is cut out of every photo: top, left, bottom, right in shares of its height and width; None: all of it
    box: tuple[float, float, float, float] | None = None

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        found = _outside(self, 1, 10**6, "max_validation_images")
        if not 0 < self.validation_fraction < 1:
            found.append(f"data.validation_fraction is {self.validation_fraction}; it must lie between 0 and 1")
        if self.channels != "auto":
            found += _outside(self, 1, 1024, "channels")
        if self.image_size != "auto" and min(self.image_size) < 1:
            found.append(f"data.image_size is {self.image_size}; both sides must be at least 1 px")
        top, left, bottom, right = self.box or (0, 0, 1, 1)
        if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
            found.append(f"data.box is {self.box}; it must be top, left, bottom and right, each 0 to 1, top above "
                         "bottom and left before right")
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
    schedule: Literal["constant", "cosine", "trapezoid"] = "constant"
    warmup_fraction: float = 0.0  # of the budget
    l2_weight: float = 1.0
    gms_weight: float = 0.01
    gms_scales: tuple[int, ...] = (1,)  # pictures are reduced by these factors before the loss compares their gradients
    ssim_weight: float = 0.01
    segmentation_weight: float = 0.1  # of the segmenter's loss, where there is one
    defective_context: bool = False  # inpaint from the photos in which synthetic defects were planted
    flips: Literal["auto", "on", "off"] = "on"
    turns: Literal["auto", "on", "off"] = "on"  # quarter turns
    max_epochs: int | None = 200  # the budget if none is given
    max_steps: int | None = None
    max_minutes: float | None = None  # of max_epochs, max_steps and max_minutes whichever ends first
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
        if self.max_minutes is not None and not 0 < self.max_minutes <= 10**6:
            found.append(f"train.max_minutes is {self.max_minutes}; it must be above 0, or none")
        if not 0 < self.learning_rate < 1:
            found.append(f"train.learning_rate is {self.learning_rate}; it must lie between 0 and 1")
        if not 0 <= self.warmup_fraction < 1:
            found.append(f"train.warmup_fraction is {self.warmup_fraction}; it must lie between 0 and 1")
        for name in ("weight_decay", "l2_weight", "gms_weight", "ssim_weight", "segmentation_weight"):
            if getattr(self, name) < 0:
                found.append(f"train.{name} is {getattr(self, name)}; it must not be negative")
        if not any((self.l2_weight, self.gms_weight, self.ssim_weight)):
            found.append("train.l2_weight, train.gms_weight and train.ssim_weight are all 0; nothing would be learnt")
        found += _unfit_scales("train.gms_scales", self.gms_scales)
        if self.gradient_clip is not None and self.gradient_clip <= 0:
            found.append(f"train.gradient_clip is {self.gradient_clip}; it must be above 0, or none")
        return found


@dataclass(frozen=True)
class ScoringConfig:
    """How an image and its repaired image become an anomaly map. The defaults are the paper's; the distribution, which
    is not, has no weight.
    """

    difference: Literal["gms", "ssim", "squared"] = "gms"  # what is compared: 1 - GMS, 1 - SSIM, (x - y)²
    lattice: int = 3  # d: every d-th patch of every d-th row is hidden at once (where the window is the whole grid)
    scales: tuple[int, ...] = (2, 4)  # the images are reduced by these factors before they are compared
    blur_size: int = 21  # px of the box filter over the map, odd; 1: none
    deviation: Literal["squared", "clipped", "signed", "none"] = "squared"  # of the map from good images' mean map
    reference: Literal["training", "validation"] = "training"  # the good images whose maps are averaged
    max_reference_images: int | None = None  # training images for the reference, evenly spaced; None: all of them
    spread: bool = False  # divide by the good images' standard deviation at each place
    # Of each evidence in the anomaly map; 0: without. One alone is the map; several are summed, each in units of its
    # tail over good images.
    difference_weight: float = 1.0  # the deviation of the difference from good images' mean
    distribution_weight: float = 0.0  # how unlikely photo and repaired image are together, at each place
    segmenter_weight: float = 1.0  # the segmenter's log-odds, where there is one
    distribution_scales: tuple[int, ...] = (1, 4)  # the images are reduced by these factors for the distribution
    num_filters: int = 14  # principal components of the photos that describe a cell; those of colour are added
    # px: sides of the cells at which the distribution is known; of a larger one an image holds at least four, or none
    cell_sizes: tuple[int, ...] = (8, 32)
    num_modes: int = 32  # at most: joint changes of all cells, such as light and pose, that a place is judged without
    # whether each place has a distribution of its own, or all share one, as where parts lie anyhow; auto: whichever
    # makes held-out good images likelier
    places: Places = "auto"
    pixel_evidence: bool = True  # of single pixels as well, where the distribution has a weight
    false_reject_rate: float = 0.01  # the threshold's share of good images that may be rejected
    precision: Literal["auto", "fp32", "bf16"] = "fp32"

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        found = _outside(self, 1, 1024, "lattice")
        found += _outside(self, 1, 1023, "blur_size")
        found += _outside(self, 2, 10**9, "max_reference_images")
        if self.blur_size % 2 == 0:
            found.append(f"scoring.blur_size is {self.blur_size}; a box filter needs an odd side")
        found += _unfit_scales("scoring.scales", self.scales)
        if not 0 < self.false_reject_rate < 1:
            found.append(f"scoring.false_reject_rate is {self.false_reject_rate}; it must lie between 0 and 1")
        found += _outside(self, 1, 64, "num_filters")
        found += _unfit_scales("scoring.cell_sizes", self.cell_sizes)
        found += _outside(self, 0, 256, "num_modes")
        found += _unfit_scales("scoring.distribution_scales", self.distribution_scales)
        for name in ("difference_weight", "distribution_weight", "segmenter_weight"):
            if getattr(self, name) < 0:
                found.append(f"scoring.{name} is {getattr(self, name)}; it must not be negative")
        if not self.difference_weight and not self.distribution_weight:
            found.append("scoring.difference_weight and scoring.distribution_weight are both 0; nothing would compare "
                         "photo and repaired image")
        if self.spread and self.deviation == "none":
            found.append("scoring.spread needs scoring.deviation squared, clipped or signed")
        return found


def _unfit_scales(name: str, scales: tuple[int, ...]) -> list[str]:
    """A sentence if there is no scale, or one below 1."""
    if scales and min(scales) >= 1:
        return []
    return [f"{name} is {scales}; it needs at least one factor, each at least 1"]


def _outside(settings: Any, least: int, most: int, *names: str) -> list[str]:
    """A sentence for each named setting that is not in this range; None is not checked."""
    part = type(settings).__name__.removesuffix("Config").lower()
    return [f"{part}.{name} is {getattr(settings, name)}; it must be {least} to {most}" for name in names
            if getattr(settings, name) is not None and not least <= getattr(settings, name) <= most]
