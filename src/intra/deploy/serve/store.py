"""Pictures in memory, for the links in a verdict: bounded, and the oldest go first."""

import secrets
from collections import OrderedDict

__all__ = ["PictureStore"]


class PictureStore:
    """PNG files by an unguessable id and their kind. For one event loop: no locks."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[str, dict[str, bytes]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, files: dict[str, bytes]) -> str:
        """Keeps the files of one verdict; returns their id. Forgets the oldest while there are too many bytes."""
        key = secrets.token_urlsafe(16)
        self._kept[key] = files
        self.num_bytes += _size(files)
        while self.num_bytes > self.max_bytes and self._kept:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= _size(oldest)
        return key

    def get(self, key: str, kind: str) -> bytes | None:
        """The file, or None if it is forgotten or never was."""
        return self._kept.get(key, {}).get(kind)


def _size(files: dict[str, bytes]) -> int:
    return sum(map(len, files.values()))
