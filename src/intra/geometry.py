"""Where every patch, window and lattice lies. Training, inspection and export all ask here, so they cannot disagree.

The paper's symbols (Pirnay & Chai 2021, section 3), and our names for them:

| paper   | here            | what                                                    |
|---------|-----------------|---------------------------------------------------------|
| K       | patch_size      | side of a patch, px                                     |
| N, M    | rows, cols      | patches of the grid, vertically and horizontally        |
| L       | window_shape    | rows and cols of a window, in patches                   |
| (r, s)  | origin          | the window's upper left patch: row, col                 |
| (t, u)  | row, col        | the patch to be inpainted                               |
| f(i, j) | position        | row · cols + col, the patch's place in the whole grid   |

All indices start at 0 (the paper's start at 1). Height before width, rows before cols.
"""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

__all__ = ["central_windows", "covering_windows", "flatten_patches", "hidden_places", "lattice_hidden", "patchify",
           "random_windows", "touched_patches", "unflatten_patches", "unpatchify", "window_origins", "window_positions"]


def flatten_patches(patches: Shaped[Tensor, "*b c k k"]) -> Shaped[Tensor, "*b p"]:
    """Patches as vectors of length c·k·k, in the order channel, row, col; `unflatten_patches` undoes it."""
    return patches.flatten(-3)


def unflatten_patches(patches: Float[Tensor, "*b p"], channels: int) -> Float[Tensor, "*b c k k"]:
    """Vectors as pictures of `channels` channels; undoes `flatten_patches`."""
    side = round((patches.shape[-1] / channels) ** 0.5)
    return patches.unflatten(-1, (channels, side, side))


def patchify(images: Shaped[Tensor, "b c h w"], patch_size: int) -> Shaped[Tensor, "b n p"]:
    """Every patch of the images as a vector, in the order of their positions; h and w are multiples of patch_size."""
    b, c, h, w = images.shape
    rows, cols = h // patch_size, w // patch_size
    split = images.reshape(b, c, rows, patch_size, cols, patch_size)
    return flatten_patches(split.permute(0, 2, 4, 1, 3, 5)).reshape(b, rows * cols, c * patch_size**2)


def unpatchify(patches: Float[Tensor, "b n p"], grid: tuple[int, int], channels: int) -> Float[Tensor, "b c h w"]:
    """The images that consist of these patches; undoes `patchify`."""
    rows, cols = grid
    split = unflatten_patches(patches, channels).unflatten(1, (rows, cols))  # (B, rows, cols, C, K, K)
    b, _, _, c, k, _ = split.shape
    return split.permute(0, 3, 1, 4, 2, 5).reshape(b, c, rows * k, cols * k)


def window_origins(grid: tuple[int, int], window_shape: tuple[int, int]) -> Int[Tensor, "n 2"]:
    """For every patch, the upper left (row, col) of the window in which it lies as near to the centre as the border
    allows: the paper's formula (section 3.3) for indices from 0.
    """
    (rows, cols), (window_rows, window_cols) = grid, window_shape
    first_row = (torch.arange(rows) - window_rows // 2).clamp(0, rows - window_rows)
    first_col = (torch.arange(cols) - window_cols // 2).clamp(0, cols - window_cols)
    return torch.cartesian_prod(first_row, first_col).reshape(-1, 2)


def window_positions(
    origins: Int[Tensor, "n 2"], grid: tuple[int, int], window_shape: tuple[int, int]
) -> Int[Tensor, "n t"]:
    """The positions of a window's patches, row by row, for windows with these origins."""
    offsets = _window_offsets(grid, window_shape).to(origins.device, non_blocking=True)
    return (origins[:, :1] * grid[1] + origins[:, 1:]) + offsets


def central_windows(
    grid: tuple[int, int], window_shape: tuple[int, int]
) -> tuple[Int[Tensor, "n t"], Bool[Tensor, "n t"]]:
    """For every patch of the grid its most central window: positions, and hidden (True for this one patch)."""
    positions = window_positions(window_origins(grid, window_shape), grid, window_shape)
    return positions, positions == torch.arange(grid[0] * grid[1])[:, None]


def lattice_hidden(grid: tuple[int, int], spacing: int) -> Bool[Tensor, "passes n"]:
    """Hidden patches of each pass over the whole grid: every `spacing`-th patch of every `spacing`-th row, so that
    each patch is hidden in exactly one pass and, from a spacing of 3, keeps all its neighbours.

    >>> lattice_hidden((2, 3), 2).int().tolist()
    [[1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 1], [0, 0, 0, 0, 1, 0]]
    """
    row = torch.arange(grid[0]) % spacing
    col = torch.arange(grid[1]) % spacing
    number = (row[:, None] * spacing + col[None, :]).flatten()  # the pass in which each patch is hidden
    return number.unique()[:, None] == number


def covering_windows(
    grid: tuple[int, int], window_size: int | None, spacing: int, wanted: Bool[Tensor, " patches"] | None = None
) -> tuple[Int[Tensor, "n t"], Bool[Tensor, "n t"]]:
    """Windows in which every patch of the grid, or every wanted one, is hidden exactly once: positions and hidden.

    With a window size each patch's most central window (the paper); with None the passes of a lattice. Windows in which
    nothing is hidden are left out.
    """
    if window_size is not None:
        positions, hidden = central_windows(grid, (window_size, window_size))
    else:
        hidden = lattice_hidden(grid, spacing)
        positions = torch.arange(grid[0] * grid[1]).expand(len(hidden), -1)
    if wanted is None:
        return positions, hidden
    hidden = hidden & wanted.cpu()[positions]
    needed = hidden.any(1)
    return positions[needed], hidden[needed]


def hidden_places(hidden: Bool[Tensor, "b t"]) -> Int[Tensor, " h"]:
    """Where the hidden patches stand when the patches of all windows lie in a row.

    >>> hidden_places(torch.tensor([[False, True], [True, False]])).tolist()
    [1, 2]
    """
    return hidden.flatten().nonzero()[:, 0]


def touched_patches(inside: Bool[Tensor, "h w"], patch_size: int) -> Bool[Tensor, " patches"]:
    """Which patches have a pixel of a region, in the order of their positions.

    >>> touched_patches(torch.tensor([[False, False, False, True], [False, False, False, False]]), 2).tolist()
    [False, True]
    """
    rows, cols = inside.shape[0] // patch_size, inside.shape[1] // patch_size
    return inside.reshape(rows, patch_size, cols, patch_size).any(3).any(1).flatten()


def random_windows(
    count: int, *, grid: tuple[int, int], window_shape: tuple[int, int], num_hidden: tuple[int, int],
    generator: torch.Generator,
) -> tuple[Int[Tensor, "count 2"], Bool[Tensor, "count t"]]:  # fmt: skip
    """Windows at uniform places, each with a random number of its patches hidden at random, `num_hidden` the least and
    the largest: origins and hidden.
    """
    room = torch.tensor([grid[0] - window_shape[0] + 1, grid[1] - window_shape[1] + 1])
    origins = (torch.rand(count, 2, generator=generator) * room).long()
    order = torch.rand(count, window_shape[0] * window_shape[1], generator=generator).argsort(1)
    least, most = num_hidden
    return origins, order < torch.randint(least, most + 1, (count, 1), generator=generator)


def _window_offsets(grid: tuple[int, int], window_shape: tuple[int, int]) -> Int[Tensor, " t"]:
    row, col = torch.arange(window_shape[0]), torch.arange(window_shape[1])
    return (row[:, None] * grid[1] + col[None, :]).flatten()
