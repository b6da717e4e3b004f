"""Files that are whole or not there."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from intra.errors import InTraError

__all__ = ["write_atomically"]


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader, also after a crash, sees all of it or what was there before.

    Raises InTraError if the folder cannot be written or the disk is full.
    """
    data = content.encode() if isinstance(content, str) else content
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
