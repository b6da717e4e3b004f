"""Pillow, tamed: any bytes → pixels or one kind of error. Nothing else in data/ opens an image file.

What a file's mode becomes (alpha is dropped, palettes and other colour spaces become RGB):

| file                                               | pixels                             |
|----------------------------------------------------|------------------------------------|
| black-and-white, 8-bit grey, with or without alpha | 1 channel, uint8                   |
| 16-bit grey; integer grey in 0..65535              | 1 channel, uint16                  |
| float grey in [0, 1] (TIFF, PFM)                   | 1 channel, float32                 |
| RGB, RGBA, palette, CMYK, YCbCr, LAB, HSV          | 3 channels, uint8                  |
| TIFF of N pages, all grey and of one size          | N channels, in order of the pages  |
| GIF, APNG and any other film                       | its first picture                  |

Pillow itself reduces 16-bit *colour*, and a PNG's 16-bit grey with alpha (then 3 channels), to 8 bits. To keep 16 bits
of several channels, write each as a 16-bit grey page of one TIFF, or pass an array.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TextIO

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Float, Float32, Shaped

from intra.errors import InTraError

__all__ = ["IMAGE_SUFFIXES", "UnreadableError", "checked_unit", "opened", "opened_bytes", "part_that_suffices",
           "pixels_of", "reasons", "shape_of", "shrink"]

# Documents, vector graphics, films and data containers: no photos, and some of them start other programs when opened.
_NO_PHOTOS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_SUFFIXES = PIL.Image.registered_extensions()  # also fills PIL.Image.OPEN
_FORMATS = tuple(sorted(set(PIL.Image.OPEN) - _NO_PHOTOS))
IMAGE_SUFFIXES = frozenset(suffix for suffix, name in _SUFFIXES.items() if name in (*_FORMATS, "MPO"))  # MPO is a JPEG
"""Suffixes, in small letters and with their dot, of the files that are taken for images."""

# What a stranger may send: formats of cameras and scanners whose decoders hold to the size that the header states.
_SENT_FORMATS = tuple({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"} & set(_FORMATS))
_MOST_SENT_PAGES = 64  # of a TIFF that is sent
_MOST_PAGES = 1000  # of any TIFF: Pillow's time grows with the square of the pages, and empty ones take few bytes

_ORIENTATION = 0x0112  # EXIF tag
_STRIP_BYTES = 2**18  # of Pillow's pixels, which fit into a core's cache
_EMPTY = "the file is empty (0 bytes)"
_TURNED = (5, 6, 7, 8)  # orientations that exchange height and width
_MOVED = (2, 3, 4, *_TURNED)  # all but the usual one
_log = logging.getLogger(__name__)


class UnreadableError(InTraError):
    """A file that is missing or damaged, or that holds no image we can use; `reason` says which, without the path."""

    def __init__(self, source: str | Path, reason: str) -> None:
        super().__init__(f"cannot read {source}: {reason}; replace or remove it")
        self.reason = reason


@contextmanager
def opened(path: str | Path) -> Iterator[PIL.Image.Image]:
    """The opened file; whatever goes wrong until it is closed becomes an UnreadableError."""
    with reasons(path):
        if not Path(path).is_file():  # opening anything but a regular file could wait for ever
            raise InTraError("it is a folder or a device" if Path(path).exists() else "there is no such file")
        if Path(path).stat().st_size == 0:
            raise InTraError(_EMPTY)
        # By its handle, not its path: Pillow maps an uncompressed file that it knows by its path, and then scrambles a
        # grey TIFF with a turning orientation (Pillow 13.0: it takes the turned size for the stored one).
        with Path(path).open("rb") as file, PIL.Image.open(file, formats=_FORMATS) as image:
            yield image


@contextmanager
def opened_bytes(data: bytes, name: str) -> Iterator[PIL.Image.Image]:
    """The opened content of a file that a stranger sent; as `opened`. `name` only stands in the message."""
    with reasons(name):
        if not data:
            raise InTraError(_EMPTY)
        with PIL.Image.open(io.BytesIO(data), formats=_SENT_FORMATS) as image:
            if image.format == "TIFF":
                _refuse_many_pages(image, _MOST_SENT_PAGES)
            yield image


@contextmanager
def reasons(source: str | Path) -> Iterator[None]:
    """Turns any exception into an UnreadableError; on damaged bytes Pillow raises nearly every type there is.

    Its `__cause__` is a MemoryError where the memory ran out.
    """
    try:
        with _pillow_warnings:
            yield
    except Exception as error:
        # Pillow's codecs tell of too little memory by an OSError
        cause = MemoryError(str(error)) if str(error).startswith("out of memory") else error
        raise UnreadableError(source, _reason(cause)) from cause


def shape_of(image: PIL.Image.Image) -> tuple[int, int, int, int]:
    """Height and width after EXIF orientation, channels, and bit depth (8, 16 or 32 for float); decodes no pixel.

    An orientation that a PNG states only behind its pixels is not seen.
    """
    width, height = image.size
    # The base class's getexif: PNG's own would decode the pixels. Pillow's size of a TIFF is already the turned one.
    if image.format != "TIFF" and PIL.Image.Image.getexif(image).get(_ORIENTATION) in _TURNED:
        width, height = height, width
    depth = 16 if image.mode.startswith("I") else 32 if image.mode == "F" else 8
    return height, width, _num_pages(image) if _is_grey(image) else 3, depth


def part_that_suffices(image: PIL.Image.Image, least: tuple[int, int]) -> int:
    """8, 4, 2 or 1: the sides of an opened JPEG can be divided by it, and its part still has, upright, at least that
    height and width. 1 for all other files.
    """
    is_scalable = image.format in ("JPEG", "MPO") and getattr(image, "quantization", None)  # a lossless one has none
    if not is_scalable:
        return 1
    height, width, _, _ = shape_of(image)
    fitting = (part for part in (8, 4, 2) if not (height % part or width % part)
               and height >= part * least[0] and width >= part * least[1])
    return next(fitting, 1)


def shrink(image: PIL.Image.Image, part: int) -> None:
    """Lets an opened JPEG be decoded at a part of its sides: libjpeg leaves out the finest frequencies. Use inside
    `reasons`, before `pixels_of`.
    """
    if part > 1:
        image.draft(None, (image.width // part, image.height // part))


def pixels_of(image: PIL.Image.Image) -> Shaped[np.ndarray, "h w c"]:
    """All channels of an opened image, upright: uint8, uint16, or float32 in [0, 1]. Use inside `reasons`."""
    num_pages = _num_pages(image)
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit and num_pages * image.width * image.height > 2 * limit:  # Pillow's own limit, over all pages
        raise PIL.Image.DecompressionBombError(f"{num_pages} pages of {image.height}x{image.width} px")
    if 0 in image.size:
        raise InTraError("it has no pixel")
    planes = []
    for page in range(num_pages):
        if num_pages > 1:
            image.seek(page)
        planes.append(_plane(_upright(image)))
    return planes[0] if num_pages == 1 else np.concatenate(planes, axis=2)


def checked_unit(values: Float[np.ndarray, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """Float pixels as float32. Raises InTraError if one is not a number in [0, 1]."""
    low, high = values.min(), values.max()  # NaN if any is NaN
    if not (low >= 0 and high <= 1):
        raise InTraError(f"its float pixels go from {low:g} to {high:g}, expected [0, 1]; divide them by the largest "
                         "possible value")
    return values.astype(np.float32, copy=False)


def _refuse_many_pages(image: PIL.Image.Image, most: int) -> None:
    """Raises InTraError for a TIFF of more pages, without counting them all."""
    try:
        for page in range(1, most + 1):  # one by one: a seek beyond the end spoils Pillow's count (13.0)
            image.seek(page)
    except EOFError:
        image.seek(0)
        return
    raise InTraError(f"it has more than {most} pages")


def _reason(error: Exception) -> str:
    """What is wrong, in the user's words."""
    if isinstance(error, InTraError):
        reason = str(error)
    elif isinstance(error, PIL.UnidentifiedImageError):
        reason = "it is no image, or is damaged at its beginning"
    elif isinstance(error, PIL.Image.DecompressionBombError):
        reason = f"it has too many pixels ({error})"
    elif isinstance(error, MemoryError):
        reason = "it does not fit into memory"
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = f"it is damaged or truncated ({str(error) or type(error).__name__})"
    return reason


def _is_grey(image: PIL.Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")


def _num_pages(image: PIL.Image.Image) -> int:
    """Pages that are the channels of one image: those of a TIFF that are all grey and alike, else 1."""
    if image.format != "TIFF" or not _is_grey(image):
        return 1
    _refuse_many_pages(image, _MOST_PAGES)
    num_pages = getattr(image, "n_frames", 1)
    if num_pages == 1:
        return 1
    kinds = set()
    for page in range(num_pages):
        image.seek(page)
        kinds.add((image.size, image.mode))
    image.seek(0)
    return num_pages if len(kinds) == 1 else 1


def _plane(image: PIL.Image.Image) -> np.ndarray:
    """One picture as (H, W, 1 or 3), by the table at the head of this module."""
    if not _is_grey(image):
        return _array(_in_mode(image, "RGB"))
    if image.mode.startswith("I"):
        values = _array(image)
        if values.min() < 0 or values.max() > 65535:
            raise InTraError(f"its integer pixels go from {values.min()} to {values.max()}, expected 0 to 65535")
        return values.astype(np.uint16)[:, :, None]
    if image.mode == "F":
        return checked_unit(_array(image))[:, :, None]
    if image.mode == "La":  # alpha multiplied in; Pillow goes to L only by way of LA
        image = image.convert("LA")
    return _array(_in_mode(image, "L"))[:, :, None]


def _upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """As its EXIF orientation says; the image itself where that is the usual one, of which Pillow makes a copy."""
    image.load()  # a PNG may state it behind its pixels
    return PIL.ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION) in _MOVED else image


def _array(image: PIL.Image.Image) -> np.ndarray:
    """`np.array(image)`, strip by strip: Pillow would make two whole copies on the way, whose fresh memory costs more
    than the decoding where several threads ask for it.
    """
    width, height = image.size
    rows = max(1, _STRIP_BYTES // (4 * width))

    def strip(top: int) -> np.ndarray:
        return np.asarray(image.crop((0, top, width, min(top + rows, height))))

    first = strip(0)
    found = np.empty((height, *first.shape[1:]), first.dtype)
    found[:rows] = first
    for top in range(rows, height, rows):
        found[top : top + rows] = strip(top)
    return found


def _in_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """Converted; the image itself where it has that mode, of which Pillow makes a copy."""
    return image if image.mode == mode else image.convert(mode)


class _PillowWarnings:
    """While any thread is inside, Pillow's warnings go to the log; warnings.catch_warnings alone is not thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._caught = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.showwarning = _log_or_show(warnings.showwarning)
                warnings.filterwarnings("always", module=r"PIL\.")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._caught.__exit__(None, None, None)


def _log_or_show(show):  # type: ignore[no-untyped-def]  # the signature of warnings.showwarning
    """A `warnings.showwarning` that logs what comes from Pillow and leaves the rest to `show`."""

    def log_or_show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:
        if Path(filename).parent.name == "PIL":
            _log.info("%s", message)
        else:
            show(message, category, filename, lineno, file, line)

    return log_or_show


_pillow_warnings = _PillowWarnings()
