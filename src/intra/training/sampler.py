"""Windows for training, cut on the device from the decoded set.

What a step sees depends on (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from intra.data.images import to_unit
from intra.geometry import hidden_places, patchify, random_windows, window_positions

__all__ = ["IDENTITY", "Batch", "Symmetry", "WindowSampler", "allowed_symmetries", "mean_image"]

# "auto": a mean image counts as its own mirror image if they correlate by at least 0.99, or if they differ by no more
# than a tenth of what good images vary among themselves (a texture's mean is nearly flat and correlates with nothing)
MIRROR_CORRELATION = 0.99
MIRROR_VARIANCE_SHARE = 0.1

Switch = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Symmetry:
    """One of the eight ways to lay a square on itself: transposed first, then flipped."""

    transpose: bool
    flip_rows: bool  # upside down
    flip_cols: bool  # left and right

    @property
    def is_turn(self) -> bool:
        """A rotation, by a quarter or a half (the identity included)."""
        return (self.transpose + self.flip_rows + self.flip_cols) % 2 == 0

    def apply(self, images: Shaped[Tensor, "*b h w"]) -> Shaped[Tensor, "*b h2 w2"]:
        """The images laid that way."""
        images = images.transpose(-1, -2) if self.transpose else images
        flipped = [axis for axis, flip in ((-2, self.flip_rows), (-1, self.flip_cols)) if flip]
        return images.flip(flipped) if flipped else images


IDENTITY = Symmetry(False, False, False)


@dataclass(frozen=True)
class Batch:
    """Windows of one step; patches, positions and hidden are InTra's arguments."""

    patches: Float[Tensor, "b t p"]  # pixels in [0, 1]
    positions: Int[Tensor, "b t"]
    hidden: Bool[Tensor, "b t"]
    places: Int[Tensor, " h"]  # of the hidden patches, where all lie in a row; found on the CPU: no GPU is waited for
    seed: int  # for what a network draws itself; from the run's seed and the step alone


def allowed_symmetries(images: Shaped[Tensor, "n c h w"], *, flips: Switch, turns: Switch) -> tuple[Symmetry, ...]:
    """The symmetries under which a training image may be laid; the identity is always one.

    "auto" allows one only where the mean good image is nearly the same laid that way. A texture without a direction, or
    parts that lie anyhow, pass; an aligned part passes only for its own symmetries. Quarter turns need a square image.
    """
    square = images.shape[-1] == images.shape[-2]
    mean = mean_image(images)
    variance = sum(float((to_unit(image) - mean).square().mean()) for image in images) / len(images)
    # the mean of n images differs from its mirror image by 2 / n of their variance even if nothing tells them apart
    tolerance = max((MIRROR_VARIANCE_SHARE + 2 / len(images)) * variance,
                    2 * (1 - MIRROR_CORRELATION) * float(mean.var(unbiased=False)))
    allowed = [IDENTITY]
    for number in range(1, 8):
        symmetry = Symmetry(bool(number & 4), bool(number & 2), bool(number & 1))
        switches = [switch for switch, needed in ((flips, not symmetry.is_turn), (turns, symmetry.transpose)) if needed]
        if not switches:  # the half turn: two flips, or two quarter turns
            switches = ["on" if "on" in (flips, turns) else "auto" if "auto" in (flips, turns) else "off"]
        if "off" in switches or (symmetry.transpose and not square):
            continue
        difference = float((symmetry.apply(mean) - mean).square().mean())
        if "auto" not in switches or difference <= tolerance:
            allowed.append(symmetry)
    return tuple(allowed)


class WindowSampler:
    """Batches of random windows; each epoch shows every image `windows_per_image` times.

    Args:
        images: the decoded set on the device, uint8 or float in [0, 1]; it is not copied.
        num_hidden: the least and the largest number of hidden patches of a window.
        symmetries: one is drawn for each window.
    """

    def __init__(
        self, images: Shaped[Tensor, "n c h w"], *, patch_size: int, window_shape: tuple[int, int],
        num_hidden: tuple[int, int], windows_per_image: int, batch_size: int, symmetries: tuple[Symmetry, ...],
        seed: int,
    ) -> None:  # fmt: skip
        self.images = images
        self.patch_size = patch_size
        self.grid = images.shape[-2] // patch_size, images.shape[-1] // patch_size
        self.window_shape = window_shape
        self.num_hidden = num_hidden
        self.windows_per_image = windows_per_image
        self.batch_size = batch_size
        self.symmetries = torch.tensor([[s.transpose, s.flip_rows, s.flip_cols] for s in symmetries])
        self.seed = seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)  # the shuffled images of the last epoch asked
        self.steps_per_epoch = max(1, len(images) * windows_per_image // batch_size)

    def batch(self, step: int) -> Batch:
        """The windows of a step, counted from 0."""
        generator = torch.Generator().manual_seed(_draw_seed(self.seed, "windows", step))
        origins, hidden = random_windows(self.batch_size, grid=self.grid, window_shape=self.window_shape,
                                         num_hidden=self.num_hidden, generator=generator)
        drawn = torch.randint(len(self.symmetries), (self.batch_size,), generator=generator)
        device = self.images.device
        which, origins, hidden, places, laid = (
            part.to(device, non_blocking=True)
            for part in (self._which_images(step), origins, hidden, hidden_places(hidden), self.symmetries[drawn])
        )
        cut = cut_windows if device.type == "cpu" else gather_windows
        windows = cut(self.images, which, origins, laid, self.patch_size, self.window_shape)
        patches = to_unit(patchify(windows, self.patch_size))  # in this order bytes are laid anew, not floats
        return Batch(patches, window_positions(origins, self.grid, self.window_shape), hidden, places,
                     _draw_seed(self.seed, "network", step))

    def _which_images(self, step: int) -> Int[Tensor, " b"]:
        """Shuffled so that within an epoch each image comes equally often; what is over at its end is dropped."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_draw_seed(self.seed, "order", epoch))
            total = max(len(self.images) * self.windows_per_image, self.batch_size)
            self._epoch, self._order = epoch, torch.randperm(total, generator=generator) % len(self.images)
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]


def cut_windows(
    images: Shaped[Tensor, "n c h w"], which: Int[Tensor, " b"], origins: Int[Tensor, "b 2"],
    laid: Bool[Tensor, "b 3"], patch_size: int, window_shape: tuple[int, int],
) -> Shaped[Tensor, "b c wh ww"]:  # fmt: skip
    """The pixels of a window of each of the images `which`, laid by its symmetry (transpose, flip_rows, flip_cols).

    The origin counts in the image as it is laid. Each window is a slice: quick on a CPU, above all where
    it is the whole image.
    """
    height, width = window_shape[0] * patch_size, window_shape[1] * patch_size
    cut = []
    for image, (row, col), switches in zip(which.tolist(), (origins * patch_size).tolist(), laid.tolist(), strict=True):
        cut.append(Symmetry(*switches).apply(images[image])[:, row : row + height, col : col + width])
    return torch.stack(cut)


def gather_windows(
    images: Shaped[Tensor, "n c h w"], which: Int[Tensor, " b"], origins: Int[Tensor, "b 2"],
    laid: Bool[Tensor, "b 3"], patch_size: int, window_shape: tuple[int, int],
) -> Shaped[Tensor, "b c wh ww"]:  # fmt: skip
    """The same, each pixel's place computed backwards, all windows at once: on a GPU slices would queue up."""
    height, width = images.shape[-2:]
    transpose, flip_rows, flip_cols = (part[:, None] for part in laid.unbind(1))  # (B, 1) each
    row = origins[:, :1] * patch_size + torch.arange(window_shape[0] * patch_size, device=images.device)  # (B, WH)
    col = origins[:, 1:] * patch_size + torch.arange(window_shape[1] * patch_size, device=images.device)  # (B, WW)
    row = torch.where(flip_rows, height - 1 - row, row)[:, :, None]
    col = torch.where(flip_cols, width - 1 - col, col)[:, None, :]
    transpose = transpose[..., None]
    source_row, source_col = torch.where(transpose, col, row), torch.where(transpose, row, col)  # (B, WH, WW)
    return images.permute(0, 2, 3, 1)[which[:, None, None], source_row, source_col].permute(0, 3, 1, 2)


def _draw_seed(seed: int, purpose: str, number: int) -> int:
    """In [0, 2³²), another for each run, purpose and number: torch's CPU generator drops the higher bits of a seed."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()[:4])


def mean_image(images: Shaped[Tensor, "n c h w"]) -> Float[Tensor, "c h w"]:
    """The mean image in [0, 1], without a float copy of the whole set."""
    total = to_unit(images[0])
    for image in images[1:]:
        total = total + to_unit(image)
    return total / len(images)
