"""Files that are whole or not there, and names that can be printed."""

import hashlib
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from intra.errors import InTraError

__all__ = ["listed", "name_below", "printable", "remove_leftovers", "sha256_of", "whole_file", "write_atomically"]

MAX_LISTED = 5  # names in one message
_UMASK = os.umask(0o022)  # there is no way to read it but to set it
os.umask(_UMASK)
LEFTOVER_AGE_S = 600  # a file that still grows is younger: another process may be writing it


def name_below(path: Path, root: Path) -> str:
    """The path from a folder on, with slashes; the bare name of a file that lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def printable(name: str | Path) -> str:
    r"""A name for people, in which bytes that are no text and control characters are escaped.

    A file's name can hold what would end the program when printed (half a character) or command a terminal (escape
    sequences).

    >>> printable("a\x1b[2Jb\udcff.png")
    'a\\x1b[2Jb\\udcff.png'
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(name))


def listed(words: Sequence[str]) -> str:
    """The first few, and how many more.

    >>> listed(["a", "b", "c", "d", "e", "f", "g"])
    'a; b; c; d; e; and 2 more'
    """
    more = len(words) - MAX_LISTED
    return "; ".join(words[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file. Raises InTraError if it is no file or cannot be read."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise InTraError(f"{path} is no file; replace or remove it")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InTraError(f"cannot read {path}: {error.strerror or error}; replace or remove it") from error


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader, also after a crash or a power cut, sees all of it or what was there before.

    When it returns, the file is on the disk. Raises InTraError if the folder cannot be written or the disk is full.
    """
    with whole_file(path) as file:
        # a file's name may hold bytes that are no text
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path, *, mode: int = 0o666 & ~_UMASK) -> Iterator[BinaryIO]:
    """A file to write to that takes its place at the end, as `write_atomically` does, or not at all after an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(mode)  # mkstemp's own is for the owner alone
            Path(temporary).replace(path)
            _sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                Path(temporary).unlink()
            raise
    except OSError as error:
        raise InTraError(f"cannot write {path}: {error.strerror or error}; free some space or choose another --out"
                         ) from error


def remove_leftovers(folder: Path, *, of: str = "*", older_than_s: float = LEFTOVER_AGE_S) -> None:
    """Removes what processes that were killed while they wrote files of these names (a pattern) have left directly in a
    folder, so that kills do not fill the disk. No one reads files of that name.
    """
    for path in folder.glob(f".{of}.part"):
        with suppress(OSError):  # another process may have been quicker, or own it
            if time.time() - path.stat().st_mtime >= older_than_s:
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Puts the renaming itself on the disk; where a folder cannot be opened (Windows), the system does without."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
