"""How images are described for the distribution of good patches: by the photos' own principal components.

The responses of an image to them, pooled in cells of several sizes: how much a cell holds of each, how much of it the
repaired image changes. docs/decisions/0009-distribution.md, 0013-modes.md, 0014-energies.md, 0016-large-regions.md
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from intra.config import ScoringConfig
from intra.data.images import to_unit
from intra.inspection.fine import pixels_apart
from intra.inspection.region import Cells, Region, cells_of
from intra.similarity import reduced

__all__ = ["FEATURES_OF_A_FILTER", "PatchFeatures", "cell_grids"]

PIECE_SIDE = 8  # px of the reduced photo: side of the pieces whose principal components are the filters
STEP = 2  # px of the photo from one response to the next: the first components are smooth, so that none is missed
NUM_PIECES = 20_000  # from which they are computed
LARGEST_SAMPLE = 2**22  # values of all pieces together: of photos with many channels fewer pieces are taken
MOST_COLOURS = 8  # of photos with many channels
LEAST_STD = 1e-3  # of a filter's response, pixels in [0, 1]: below the noise of any camera
# Energies are in units of the response's standard deviation. Their logarithm makes too little stand out as much as too
# much: where a piece is missing or wiped, there is too little of everything. And light that is twice as strong moves
# all of them by the same, and is one mode.
ENERGY_FLOOR = 0.01
# Responses, which have a sign, count linearly below that, in the same unit, and by their logarithm above.
KNEE = 0.3
FEATURES_OF_A_FILTER = (2, 3)  # in the two descriptions of a cell
FEWEST_CELLS = 4  # of a grid


@dataclass(frozen=True)
class PatchFeatures:
    """Describes images at several scales, each over the same grids of cells, each cell twice.

    First by two features for each of m filters: the logarithms of the energy of the photo, and of what the repaired
    image changes. Then by these and the photo's mean response. Energy: the mean size of a filter's responses in the
    cell. Without a repaired image its feature is left out.

    With one, pixels are described as well, where they are asked for: fine.py.
    """

    scales: tuple[int, ...]  # factors by which the images are reduced
    grids: tuple[tuple[int, int], ...]  # rows and cols of cells, the finest first
    filters: tuple[Float[Tensor, "m c k k"], ...]  # at each scale, of unit standard deviation over good photos
    cells: tuple[Cells, ...] | None = None  # of each grid, those that are described; None: all
    pixels: bool = True

    @classmethod
    def of(
        cls, photos: Shaped[Tensor, "n c h w"], *, scoring: ScoringConfig, seed: int, region: Region | None = None
    ) -> "PatchFeatures":
        """From good images, uint8 or float in [0, 1], whose principal components become the filters: of pieces inside
        a region, if there is one. Of a region the cells that touch it are described.
        """
        grids = cell_grids((photos.shape[-2], photos.shape[-1]), scoring.cell_sizes)
        filters = tuple(_principal_filters(photos, scale, scoring.num_filters, seed, region)
                        for scale in scoring.distribution_scales)
        return cls(scoring.distribution_scales, grids, filters, cells_of(region, grids), scoring.pixel_evidence)

    def __call__(
        self, photos: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"] | None
    ) -> list[Float[Tensor, "_ _ b"]]:
        """Of images and their repaired images in [0, 1], at each scale over each grid, both descriptions (cells, D, B),
        then the pixels (rows, cols, B), if asked for; with None the photos' cells alone are described.
        """
        found = [each for scale, filters in zip(self.scales, self.filters, strict=True)
                 for each in _features(photos, repaired, filters, scale, self.grids)]
        if self.cells is not None:
            of_each = [cells for cells in self.cells for _ in FEATURES_OF_A_FILTER] * len(self.scales)
            found = [each.index_select(0, cells.kept) for each, cells in zip(found, of_each, strict=True)]
        if self.pixels and repaired is not None:
            found.append(pixels_apart(photos, repaired))
        return found

    def to(self, device: torch.device) -> "PatchFeatures":
        """The same on a device."""
        cells = None if self.cells is None else tuple(each.to(device) for each in self.cells)
        return replace(self, filters=tuple(each.to(device) for each in self.filters), cells=cells)


def cell_grids(image_size: tuple[int, int], cell_sizes: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Rows and cols of cells of about each size in px, the smallest first, that cover an image.

    Grids of fewer than FEWEST_CELLS are left out, but for the smallest cells: they could not learn from each other how
    features vary together.

    >>> cell_grids((256, 240), (8, 32))
    ((32, 30), (8, 8))
    >>> cell_grids((64, 64), (8, 64))
    ((8, 8),)
    """
    height, width = image_size
    smallest, *larger = ((max(1, round(height / size)), max(1, round(width / size))) for size in sorted(cell_sizes))
    return smallest, *(grid for grid in larger if grid[0] * grid[1] >= FEWEST_CELLS)


def _features(
    photos: Float[Tensor, "b c h w"], repaired: Float[Tensor, "b c h w"] | None, filters: Float[Tensor, "m c k k"],
    scale: int, grids: Sequence[tuple[int, int]],
) -> list[Float[Tensor, "_ _ b"]]:  # fmt: skip
    """Both descriptions of the cells of each grid. A large cell is the mean of the smallest cells in it, of logarithms:
    a small defect that is strong stands out in its own cell, and hardly moves the large one.
    """
    responses = _responses(photos, filters, scale)
    sizes = [responses.abs()]
    if repaired is not None:
        sizes.append(_responses(photos - repaired, filters, scale).abs())  # their difference, but for rounding
    energies = torch.cat([(F.adaptive_avg_pool2d(each, grids[0]) + ENERGY_FLOOR).log() for each in sizes], dim=1)
    signed = (F.adaptive_avg_pool2d(responses, grids[0]) / KNEE).asinh()
    found = []
    for grid in grids:
        pooled = F.adaptive_avg_pool2d(torch.cat([signed, energies], dim=1), grid)
        both = pooled.flatten(2).permute(2, 1, 0).contiguous()
        found += [both[:, signed.shape[1] :], both]
    return found


def _responses(
    images: Float[Tensor, "b c h w"], filters: Float[Tensor, "m c k k"], scale: int
) -> Float[Tensor, "b m h2 w2"]:
    before, after = (PIECE_SIDE - 1) // 2, PIECE_SIDE // 2
    with torch.autocast(images.device.type, enabled=False):  # whitening divides small differences by small spreads
        padded = F.pad(reduced(images, scale), (before, after, before, after), mode="replicate")
        return F.conv2d(padded, filters, stride=max(1, STEP // scale))


def _principal_filters(
    photos: Shaped[Tensor, "n c h w"], scale: int, num_filters: int, seed: int, region: Region | None
) -> Float[Tensor, "m c k k"]:
    """The first principal components of pieces of the photos, and of their mean colours all but the first, which is
    the brightness. Each is divided by the standard deviation along it.

    A colour that no good photo has is not among the components of the pieces, however visible it is.
    """
    generator = torch.Generator().manual_seed(seed)
    length = photos.shape[1] * PIECE_SIDE**2
    each = max(1, min(NUM_PIECES, LARGEST_SAMPLE // length) // len(photos) + 1)
    starts = None if region is None else _starts(region, scale)
    pieces = torch.cat([_random_pieces(reduced(to_unit(photo[None]), scale), each, generator, starts)
                        for photo in photos])
    colours = pieces.mean((2, 3), keepdim=True)
    tints = _components(colours)[1:MOST_COLOURS] / PIECE_SIDE**2  # of the mean over a piece
    return torch.cat([_components(pieces)[:num_filters], tints.expand(-1, -1, PIECE_SIDE, PIECE_SIDE)])


def _components(samples: Float[Tensor, "n c h w"]) -> Float[Tensor, "m c h w"]:
    """Principal components, the largest first, each divided by the standard deviation along it."""
    flat = samples.flatten(1)
    _, deviations, components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    std = deviations / len(flat) ** 0.5 + LEAST_STD
    return (components / std[:, None]).unflatten(1, samples.shape[1:])


def _random_pieces(
    photo: Float[Tensor, "1 c h w"], count: int, generator: torch.Generator, starts: Int[Tensor, "n 2"] | None
) -> Float[Tensor, "count c k k"]:
    """Pieces with their upper left corner at one of `starts`; None: anywhere."""
    photo = _piece_or_more(photo)
    if starts is None:
        rows, cols = (torch.randint(side - PIECE_SIDE + 1, (count,), generator=generator) for side in photo.shape[-2:])
    else:
        rows, cols = starts[torch.randint(len(starts), (count,), generator=generator)].unbind(1)
    return torch.stack([photo[0, :, row : row + PIECE_SIDE, col : col + PIECE_SIDE]
                        for row, col in zip(rows.tolist(), cols.tolist(), strict=True)])


def _starts(region: Region, scale: int) -> Int[Tensor, "n 2"]:
    """The upper left corners, in a reduced photo, of the pieces whose centre touches a region; without any such, a
    narrow region along the border, of those that touch it themselves.
    """
    inside = _piece_or_more(reduced(region.inside[None, None].float(), scale)) > 0
    rows, cols = (side - PIECE_SIDE + 1 for side in inside.shape[-2:])
    middle = PIECE_SIDE // 2
    chosen = inside[0, 0, middle : middle + rows, middle : middle + cols]
    if not chosen.any():
        chosen = F.max_pool2d(inside.float(), PIECE_SIDE, stride=1)[0, 0] > 0
    return chosen.nonzero().cpu()


def _piece_or_more(photo: Float[Tensor, "1 c h w"]) -> Float[Tensor, "1 c h2 w2"]:
    """A reduced photo may be smaller than a piece: its border is repeated."""
    room = [max(0, PIECE_SIDE - side) for side in photo.shape[-2:]]
    return F.pad(photo, (0, room[1], 0, room[0]), mode="replicate")
