"""Files that are whole or not there."""

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from intra.errors import InTraError

__all__ = ["name_below", "sha256_of", "write_atomically"]


def name_below(path: Path, root: Path) -> str:
    """The path from a folder on, with slashes; the bare name of a file that lies elsewhere."""
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


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
    """Writes a file so that a reader, also after a crash, sees all of it or what was there before.

    Raises InTraError if the folder cannot be written or the disk is full.
    """
    # a file's name may hold bytes that are no text
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)  # mkstemp's own is for the owner alone
            Path(temporary).replace(path)
        except BaseException:
            with suppress(OSError):
                Path(temporary).unlink()
            raise
    except OSError as error:
        raise InTraError(f"cannot write {path}: {error.strerror or error}; free some space or choose another --out"
                         ) from error
