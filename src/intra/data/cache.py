"""Reduced photos on the disk, so that the next run on the same photos does not decode them again.

A file for each set, under the SHA-256 of its photos' contents, size, channels, box and way of reading: a photo that
changed makes another set. It is mapped into memory, not read. Nothing here may stop a training: without room, or
rights, the photos are decoded as if there was no cache.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from intra.data.files import remove_leftovers, whole_file
from intra.data.images import LEAST_SIDES, Box, read_set
from intra.errors import InTraError

__all__ = ["cache_folder", "cached_set"]

FORMAT = 1  # counts up when `read_set` makes other pixels of the same file
MOST_BYTES = 8 * 2**30  # of all files; the longest unused are removed
KEYS = "[0-9a-f]" * 64  # the folder may be others' too: what is not named so is not ours
DTYPES = {"u8": torch.uint8, "f32": torch.float32}  # by the file's suffix


def cache_folder() -> Path | None:
    """$INTRA_CACHE, or intra/ where the system keeps caches; None if INTRA_CACHE is empty: no cache."""
    given = os.environ.get("INTRA_CACHE")
    if given is not None:
        return Path(given) if given else None
    with contextlib.suppress(RuntimeError):  # no home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "intra"
    return None


def cached_set(
    paths: Sequence[Path], hashes: Iterable[str], *, size: tuple[int, int], channels: int, box: Box | None = None,
    quickly: bool = False, on_progress: Callable[[int, int], None] | None = None,
) -> Shaped[Tensor, "n c h w"]:  # fmt: skip
    """As `read_set`, from the cache where the same contents were read before. `hashes` are the files' SHA-256."""
    folder = cache_folder()
    if folder is None:
        return read_set(paths, size=size, channels=channels, box=box, quickly=quickly, on_progress=on_progress)
    way = f" {box}" if box is not None else f" at least {LEAST_SIDES}" if quickly else ""
    key = hashlib.sha256(f"{FORMAT} {size} {channels} {' '.join(hashes)}{way}".encode()).hexdigest()
    shape = (len(paths), channels, *size)
    for suffix in DTYPES:
        with contextlib.suppress(OSError, RuntimeError):
            return _mapped(folder / f"{key}.{suffix}", shape)
    images = read_set(paths, size=size, channels=channels, box=box, quickly=quickly, on_progress=on_progress)
    suffix = next(name for name, dtype in DTYPES.items() if dtype == images.dtype)
    file = folder / f"{key}.{suffix}"
    with contextlib.suppress(InTraError, OSError, RuntimeError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_room(folder, images.nbytes)
        with whole_file(file, mode=0o600) as opened:  # others' photos are no one's business
            for image in images:
                opened.write(image.numpy().tobytes())
        return _mapped(file, shape)
    return images


def _mapped(file: Path, shape: tuple[int, ...]) -> Tensor:
    """The pixels of a file; changes stay in this process. Raises OSError if it is missing or of another size."""
    dtype = DTYPES[file.suffix[1:]]
    count = torch.Size(shape).numel()
    if file.stat().st_size != count * dtype.itemsize:
        raise OSError(f"{file} is of another size")
    os.utime(file)  # used now
    return torch.from_file(str(file), shared=False, size=count, dtype=dtype).view(shape)


def _make_room(folder: Path, num_bytes: int) -> None:
    """Removes what was not used for longest, so that so many bytes more fit. Raises OSError if they never do."""
    if num_bytes > MOST_BYTES:
        raise OSError("a set larger than the cache")
    remove_leftovers(folder, of=f"{KEYS}.*")
    files = [(path, path.stat()) for suffix in DTYPES for path in folder.glob(f"{KEYS}.{suffix}")]
    files.sort(key=lambda each: each[1].st_mtime)
    total = num_bytes + sum(stat.st_size for _, stat in files)
    for path, stat in files:
        if total <= MOST_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= stat.st_size
