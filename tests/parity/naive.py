"""The method once more, slowly: one window at a time, plain loops, nothing shared with the package but the network.

Written from the paper's text (section 3.3 and 3.4), so that it can disagree with the fast path.
"""

import torch
from torch import Tensor


def inpaint(model: torch.nn.Module, image: Tensor, *, patch_size: int, window_size: int) -> Tensor:
    """The repaired image (C, H, W): for every patch one forward pass of its most central window."""
    channels, height, width = image.shape
    rows, cols = height // patch_size, width // patch_size
    repaired = torch.zeros_like(image)
    for row in range(rows):
        for col in range(cols):
            first_row = min(max(row - window_size // 2, 0), rows - window_size)
            first_col = min(max(col - window_size // 2, 0), cols - window_size)
            tokens, positions, hidden = [], [], []
            for r in range(first_row, first_row + window_size):
                for c in range(first_col, first_col + window_size):
                    pixels = image[:, r * patch_size : (r + 1) * patch_size, c * patch_size : (c + 1) * patch_size]
                    is_hidden = (r, c) == (row, col)
                    tokens.append(torch.full_like(pixels, 0.5).reshape(-1) if is_hidden else pixels.reshape(-1))
                    positions.append(r * cols + c)
                    hidden.append(is_hidden)
            with torch.no_grad():
                patch = model(torch.stack(tokens)[None], torch.tensor([positions]), torch.tensor([hidden]))
            place = (slice(None), slice(row * patch_size, (row + 1) * patch_size),
                     slice(col * patch_size, (col + 1) * patch_size))
            repaired[place] = patch.reshape(channels, patch_size, patch_size)
    return repaired


def inpaint_lattice(model: torch.nn.Module, image: Tensor, *, patch_size: int, spacing: int) -> Tensor:
    """The repaired image by `spacing`² passes over the whole grid, one after the other."""
    channels, height, width = image.shape
    rows, cols = height // patch_size, width // patch_size
    repaired = torch.zeros_like(image)
    for first_row in range(min(spacing, rows)):
        for first_col in range(min(spacing, cols)):
            tokens, hidden = [], []
            for r in range(rows):
                for c in range(cols):
                    pixels = image[:, r * patch_size : (r + 1) * patch_size, c * patch_size : (c + 1) * patch_size]
                    hidden.append(r % spacing == first_row and c % spacing == first_col)
                    tokens.append(torch.rand_like(pixels).reshape(-1) if hidden[-1] else pixels.reshape(-1))
            with torch.no_grad():
                patches = model(torch.stack(tokens)[None], torch.arange(rows * cols)[None], torch.tensor([hidden]))
            for number, place in enumerate(place for place, is_hidden in enumerate(hidden) if is_hidden):
                r, c = divmod(place, cols)
                repaired[:, r * patch_size : (r + 1) * patch_size, c * patch_size : (c + 1) * patch_size] = patches[
                    number].reshape(channels, patch_size, patch_size)
    return repaired
