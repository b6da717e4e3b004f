"""The new photos of a folder, once they are wholly written."""

import heapq
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from intra.data.files import printable
from intra.data.images import IMAGE_SUFFIXES
from intra.errors import InTraError

__all__ = ["Arrivals", "Photo", "fingerprint"]

MOST_AT_A_TIME = 5000  # photos that are waited for or handed out at a time: memory does not grow with the folder
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Photo:
    """A file at one moment. Rewritten, it is another photo."""

    path: Path
    key: bytes  # its path below the folder, with slashes, as the file system spells it
    size_bytes: int
    mtime_ns: int


def fingerprint(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of change in ns of a file, or of the one that a link leads to; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_size, _fitting(found.st_mtime_ns)) if stat.S_ISREG(found.st_mode) else None


class Arrivals:
    """Looks into a folder and its sub-folders again and again.

    A file is complete when its size and its time of change have stayed the same for `settle_s`, seen in two looks.
    Hidden files, files without an image's suffix, and the folders in `skipped` are passed over; links to files are
    followed, links to folders are not, as they can form a ring.
    """

    def __init__(
        self, folder: Path, *, is_known: Callable[[Photo], bool], settle_s: float, skipped: frozenset[Path],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.folder = folder
        self.is_known = is_known
        self.settle_s = settle_s
        self.skipped = skipped
        self.clock = clock
        self.waiting: dict[Photo, float] = {}  # since when each has been seen as it is
        self._start = len(os.path.join(folder, ""))  # noqa: PTH118  where a path below the folder begins, also below /
        self._told: set[str] = set()  # folders that cannot be looked into, each told of once

    def look(self) -> list[Photo]:
        """The new photos that are complete, the oldest change first, at most `MOST_AT_A_TIME`; the others wait.

        Raises InTraError if the folder itself cannot be looked into.
        """
        new = (photo for photo in self._photos() if not self.is_known(photo))
        oldest = heapq.nsmallest(MOST_AT_A_TIME, new, key=lambda photo: (photo.mtime_ns, photo.key))
        now = self.clock()
        self.waiting = {photo: self.waiting.get(photo, now) for photo in oldest}
        return [photo for photo, since in self.waiting.items() if now - since >= self.settle_s]

    def _photos(self) -> Iterator[Photo]:
        pending = [os.fspath(self.folder)]
        while pending:
            place = pending.pop()
            try:
                with os.scandir(place) as entries:
                    for entry in entries:
                        if entry.name.startswith("."):
                            continue
                        if entry.is_dir(follow_symlinks=False):
                            if Path(entry.path).resolve() not in self.skipped:
                                pending.append(entry.path)
                        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122  10 times quicker
                            yield from self._photo(entry)
            except OSError as error:
                self._tell(place, error)

    def _photo(self, entry: "os.DirEntry[str]") -> Iterator[Photo]:
        try:
            found = entry.stat()
        except OSError:  # gone since, or a link that leads nowhere: perhaps later
            return
        if stat.S_ISREG(found.st_mode):
            key = os.fsencode(entry.path[self._start :].replace(os.sep, "/"))
            yield Photo(Path(entry.path), key, found.st_size, _fitting(found.st_mtime_ns))

    def _tell(self, place: str, error: OSError) -> None:
        if place == os.fspath(self.folder):
            raise InTraError(f"cannot look into {place}: {error.strerror or error}; put it back, or make it readable"
                             ) from error
        if place not in self._told and len(self._told) < MOST_AT_A_TIME:
            self._told.add(place)
            _log.warning("cannot look into %s: %s", printable(place), error.strerror or error)


def _fitting(time_ns: int) -> int:
    """A time as SQLite's 64 bits hold it: a file may claim to be from after 2262, and is then taken for an old one."""
    return (time_ns + 2**63) % 2**64 - 2**63
