"""Image files and arrays → pixels of one size and one number of channels. decode.py says what each format becomes."""

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Shaped, UInt
from torch import Tensor

from intra.data.decode import (
    IMAGE_SUFFIXES,
    UnreadableError,
    checked_unit,
    opened,
    opened_bytes,
    part_that_suffices,
    pixels_of,
    reasons,
    shape_of,
    shrink,
)
from intra.data.files import listed
from intra.errors import InTraError

__all__ = ["IMAGE_SUFFIXES", "LEAST_SIDES", "Box", "ImageInfo", "UnreadableError", "auto_channels", "auto_image_size",
           "box_slices", "convert_channels", "encode_png", "in_threads", "is_read_quickly", "pixels_digest", "prepare",
           "read_bytes", "read_image", "read_info", "read_mask", "read_set", "to_unit"]

AREA = 256 * 256  # px of the image that `auto_image_size` aims at: the paper's smallest
LEAST_SIDES = 3  # times the wanted ones, of a JPEG to train on: docs/decisions/0020-smaller-jpegs.md
_LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601

Box = tuple[float, float, float, float]  # top, left, bottom, right in shares of a photo's height and width

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ImageInfo:
    """What a file's header says about its pixels, as `read_image` would return them."""

    path: Path
    size: tuple[int, int]  # px: height, width, after EXIF orientation
    channels: int
    bit_depth: int  # 8, 16 or 32 (float)


def read_image(
    image: str | Path | PIL.Image.Image | np.ndarray, *, least: tuple[int, int] | None = None
) -> Shaped[np.ndarray, "h w c"]:
    """Pixels of a file, a PIL image or an array (H, W[, C]): uint8, uint16, or float32 in [0, 1].

    EXIF orientation is honoured. A JPEG file may be decoded at a half, a quarter or an eighth of its sides if at
    `least` that height and width are left; None: never. Raises UnreadableError with path and reason for a file that is
    missing, damaged, too large or no image, and InTraError for an unfit array or anything else.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, PIL.Image.Image):
        with reasons("the PIL image"):
            return pixels_of(image)
    if not isinstance(image, str | os.PathLike):
        raise InTraError(f"an image is a path, a PIL image or an array, not {type(image).__name__}; predict_batch "
                         "takes a list of them")
    with opened(image) as file:
        if least is not None:
            shrink(file, part_that_suffices(file, least))
        return pixels_of(file)


def read_bytes(data: bytes, *, name: str, max_pixels: int) -> Shaped[np.ndarray, "h w c"]:
    """Pixels of the content of a file that a stranger sent; as `read_image`. `name` only stands in the message.

    Raises UnreadableError also for a format that is not among those of cameras and scanners, and, before any pixel is
    decoded, for an image of more than `max_pixels` pixels over all of its pages.
    """
    with opened_bytes(data, name) as file:
        height, width, channels, _ = shape_of(file)
        num_pages = channels if PIL.Image.getmodebase(file.mode) == "L" else 1  # only grey pages are channels
        if num_pages * height * width > max_pixels:
            pages = f"{num_pages} pages of " if num_pages > 1 else ""
            raise InTraError(f"it has {pages}{height}x{width} px; at most {max_pixels / 1e6:.3g} megapixels are taken")
        return pixels_of(file)


def read_mask(path: str | Path) -> Bool[np.ndarray, "h w"]:
    """A ground-truth mask: True (defect) where any channel is not zero. Raises UnreadableError as `read_image` does."""
    return (read_image(path) != 0).any(axis=2)


def read_info(path: str | Path) -> ImageInfo:
    """Size, channels and bit depth from the header alone; no pixel is decoded.

    An orientation that a PNG states only behind its pixels is not seen. Raises UnreadableError as `read_image` does.
    """
    with opened(path) as file:
        height, width, channels, bit_depth = shape_of(file)
    return ImageInfo(Path(path), (height, width), channels, bit_depth)


def convert_channels(image: Shaped[np.ndarray, "h w c"], channels: int) -> Shaped[np.ndarray, "h w d"]:
    """The image with this many channels, in its own dtype: grey is repeated, RGB becomes luminance (ITU-R BT.601).

    Raises InTraError for any other change: there is no rule for it.
    """
    found = image.shape[2]
    if found == channels:
        return image
    if (found, channels) == (1, 3):
        return np.repeat(image, 3, axis=2)
    if (found, channels) == (3, 1):
        grey = image.astype(np.float32) @ _LUMINANCE
        whole = np.issubdtype(image.dtype, np.integer)
        return (np.rint(grey) if whole else grey.clip(0, 1)).astype(image.dtype)[:, :, None]
    raise InTraError(f"expected an image of {channels} channels (height, width, channels), found {found}; only 1 and 3 "
                     "channels are turned into each other")


def box_slices(size: tuple[int, int], box: Box) -> tuple[slice, slice]:
    """The rows and cols of a photo of this height and width that a box covers, in whole px; at least one of each.

    >>> box_slices((100, 50), (0.25, 0.0, 0.75, 0.5))
    (slice(25, 75, None), slice(0, 25, None))
    """
    rows, cols = ((min(round(least * side), side - 1), round(most * side)) for side, least, most in (
        (size[0], box[0], box[2]), (size[1], box[1], box[3])))
    return slice(rows[0], max(rows[1], rows[0] + 1)), slice(cols[0], max(cols[1], cols[0] + 1))


def prepare(
    image: Shaped[np.ndarray, "h w c"], *, size: tuple[int, int], channels: int, box: Box | None = None
) -> Shaped[Tensor, "d i j"]:
    """The image, or what a box cuts out of it, at `size` (height, width) px with `channels` channels: what training and
    inspection alike work on.

    8 bits stay uint8; anything else becomes float32 in [0, 1]. Reduced with antialiasing (bilinear); uint8 is rounded
    after each direction, so it lies within 1 of the exact value.
    """
    part = image if box is None else image[box_slices((image.shape[0], image.shape[1]), box)]
    converted = convert_channels(part, channels)
    if converted.dtype == np.uint16:
        converted = converted.astype(np.float32) / 65535
    pixels = torch.from_numpy(np.require(converted, requirements=["C", "W"])).permute(2, 0, 1)  # (C, H, W)
    if pixels.shape[1:] == size:
        return pixels.clone(memory_format=torch.contiguous_format)
    # uint8 goes in as it is: torch's own 8-bit kernel is 3 to 20 times as fast, and runs on one thread
    resized = F.interpolate(pixels[None], size, mode="bilinear", antialias=True, align_corners=False)[0].contiguous()
    return resized if resized.dtype == torch.uint8 else resized.clamp(0, 1)


def pixels_digest(image: Shaped[np.ndarray, "h w c"]) -> bytes:
    """The same for the same picture, whatever the format of its file."""
    content = hashlib.blake2b(f"{image.shape}{image.dtype}".encode(), digest_size=16)
    content.update(image.tobytes())
    return content.digest()


def encode_png(picture: UInt[np.ndarray, "h w *c"], *, compress_level: int = 6) -> bytes:
    """The bytes of a PNG file: grey of 8 or 16 bits for (H, W), 8-bit RGB for (H, W, 3); 1 is quick, 9 is small."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture).save(buffer, format="PNG", compress_level=compress_level)
    return buffer.getvalue()


def to_unit(images: Shaped[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Pixels as float32 in [0, 1]: uint8 is divided by 255, float passes."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def read_set(
    paths: Sequence[Path], *, size: tuple[int, int], channels: int, box: Box | None = None, quickly: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Shaped[Tensor, "n c h w"]:  # fmt: skip
    """All images, each decoded once and prepared: uint8 if every file has 8 bits, else float32 in [0, 1].

    With `quickly` a large JPEG is decoded at a part of its sides, at least LEAST_SIDES times the wanted ones: a few
    levels of its pixels differ. Not with a box, which is cut out in whole px.
    `on_progress` gets how many files are done, and how many there are. Only the reduced images are kept in
    memory. Raises one InTraError that names the unreadable files.
    """
    if not paths:
        raise InTraError("expected at least one image, found none; run `intra check-data` on the folder")

    least = _least(size, box) if quickly else None

    def work(path: Path) -> Tensor | UnreadableError:
        try:
            return prepare(read_image(path, least=least), size=size, channels=channels, box=box)
        except UnreadableError as error:
            return error
        except InTraError as error:
            return UnreadableError(path, str(error))

    images = torch.empty(len(paths), channels, *size, dtype=torch.uint8)
    failed = []
    for index, result in enumerate(in_threads(work, paths, on_progress)):
        if isinstance(result, UnreadableError):
            failed.append(f"{paths[index]} ({result.reason})")
            continue
        if result.dtype != torch.uint8:
            images = to_unit(images)  # once: floats pass
        # by NumPy: a thread of torch's would wait for more, and slow the decoding
        images[index].numpy()[...] = (result if images.dtype == torch.uint8 else to_unit(result)).numpy()
    if failed:
        raise InTraError(f"{len(failed)} of {len(paths)} images cannot be used: {listed(failed)}; replace or remove "
                         "them; `intra check-data` lists everything that is wrong")
    return images


def is_read_quickly(path: Path, *, size: tuple[int, int], box: Box | None = None) -> bool:
    """Whether `read_set` decodes a part of the file's pixels alone, if it may. Raises UnreadableError."""
    least = _least(size, box)
    if least is None:
        return False
    with opened(path) as file:
        return part_that_suffices(file, least) > 1


def _least(size: tuple[int, int], box: Box | None) -> tuple[int, int] | None:
    """Height and width that suffice of a JPEG; None: all of it, as a box is cut out in whole px."""
    return (LEAST_SIDES * size[0], LEAST_SIDES * size[1]) if box is None else None


def auto_image_size(
    sizes: Sequence[tuple[int, int]], *, patch_size: int, window_size: int | None
) -> tuple[int, int]:
    """Height and width for images of these sizes: their median aspect ratio, an area of about 256², both sides
    multiples of `patch_size` and at least `window_size` patches (at least 3 if there is no window).

    >>> auto_image_size([(1024, 1024)], patch_size=16, window_size=7)
    (256, 256)
    """
    if not sizes:
        raise InTraError("expected the size of at least one image, found none")
    ratio = median(height / width for height, width in sizes)
    fewest = 3 if window_size is None else max(window_size, 1)
    rows, cols = (max(round((AREA * r) ** 0.5 / patch_size), fewest) for r in (ratio, 1 / ratio))
    return rows * patch_size, cols * patch_size


def auto_channels(infos: Sequence[ImageInfo]) -> int:
    """The number of channels for these files: 1 if all are grey, 3 if all are RGB or grey, N if all have N.

    Raises InTraError that names the odd files in any other case.
    """
    counts = Counter(info.channels for info in infos)
    if not counts:
        raise InTraError("expected at least one image, found none")
    if set(counts) == {1, 3}:
        return 3
    usual = counts.most_common(1)[0][0]
    odd = [f"{info.path} has {info.channels}" for info in infos if info.channels != usual]
    if odd:
        raise InTraError(f"expected images of one number of channels, most have {usual}, but {listed(odd)}; "
                         "remove or convert them")
    return usual


def in_threads(
    work: Callable[[_Item], _Result], items: Sequence[_Item], on_progress: Callable[[int, int], None] | None = None
) -> Iterator[_Result]:
    """The result of `work` for each item, in the order of the items, computed on all cores.

    `on_progress` gets how many items are done, and how many there are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        for done, result in enumerate(pool.map(work, items), start=1):
            yield result
            if on_progress is not None:
                on_progress(done, len(items))


def _from_array(array: np.ndarray) -> np.ndarray:
    """A given array as (H, W, C) of one of the three dtypes."""
    if array.ndim not in (2, 3) or array.size == 0:
        raise InTraError("expected an array (height, width) or (height, width, channels) with at least one pixel, "
                         f"found shape {array.shape}; pass one image at a time")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype in (np.uint8, np.uint16):
        return array
    if np.issubdtype(array.dtype, np.floating):
        return checked_unit(array)
    raise InTraError(f"expected an array of uint8, uint16, bool or float in [0, 1], found {array.dtype}; convert it")
