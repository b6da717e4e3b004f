"""Reduced photos on the disk: the same pixels as decoded, and never in the way."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from intra.data import cache
from intra.data.cache import cache_folder, cached_set
from intra.data.files import sha256_of
from intra.data.images import read_set

SETTINGS = {"size": (16, 24), "channels": 3}


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(5)]
    for path in paths:
        PIL.Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTRA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many photos each call decoded."""
    counts: list[int] = []

    def counting(paths: list[Path], **settings: object) -> torch.Tensor:
        counts.append(len(paths))
        return read_set(paths, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "read_set", counting)
    return counts


def read(paths: list[Path], **settings: object) -> torch.Tensor:
    return cached_set(paths, [sha256_of(path) for path in paths], **(SETTINGS | settings))  # type: ignore[arg-type]


def test_the_second_time_nothing_is_decoded(paths, folder, decoded):
    expected = read_set(paths, **SETTINGS)
    for _ in range(2):
        assert torch.equal(read(paths), expected)
    assert decoded == [5]
    (file,) = folder.iterdir()
    assert file.stat().st_size == expected.nbytes
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_is_others_too_stays_as_it_is(paths, folder, monkeypatch):
    folder.mkdir(mode=0o755)
    theirs = [folder / "raw.f32", folder / ".download.part", folder / f"{'x' * 64}.u8"]
    for path in theirs:
        path.write_bytes(bytes(1000))
        os.utime(path, (0, 0))
    monkeypatch.setattr(cache, "MOST_BYTES", 1000)
    read(paths, size=(4, 4))
    read(paths, size=(8, 8))  # for which the first has to go
    (own,) = set(folder.iterdir()) - set(theirs)
    assert own.stat().st_size == 5 * 3 * 8 * 8
    assert own.stat().st_mode & 0o777 == 0o600
    assert all(path.exists() for path in theirs)
    assert folder.stat().st_mode & 0o777 == 0o755


def test_what_is_written_into_the_pixels_stays_in_this_process(paths, folder):
    read(paths)[0] = 7
    assert torch.equal(read(paths), read_set(paths, **SETTINGS))


@pytest.mark.parametrize("change", ["content", "order", "size", "channels", "fewer", "box", "quickly"])
def test_what_differs_is_decoded_anew(paths, folder, decoded, change):
    read(paths)
    settings = {"size": {"size": (8, 8)}, "channels": {"channels": 1},
                "box": {"box": (0.1, 0.0, 0.9, 0.5)}, "quickly": {"quickly": True}}.get(change, {})
    if change == "content":  # of the same length, at the same time
        before = paths[0].stat()
        paths[0].write_bytes(paths[1].read_bytes())
        os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    chosen = {"order": paths[::-1], "fewer": paths[:4]}.get(change, paths)
    assert torch.equal(read(chosen, **settings), read_set(chosen, **(SETTINGS | settings)))
    assert len(decoded) == 2


def test_float_photos_stay_float(paths, folder, decoded):
    PIL.Image.fromarray(np.full((40, 60), 999, dtype=np.uint16)).save(paths[0])
    for _ in range(2):
        found = read(paths, channels=3)
        assert found.dtype == torch.float32
        assert torch.equal(found, read_set(paths, **SETTINGS))
    assert decoded == [5]


@pytest.mark.parametrize("broken", ["cut", "longer", "folder is a file", "no cache"])
def test_a_broken_cache_is_no_cache(paths, folder, decoded, broken, monkeypatch):
    expected = read(paths).clone()
    (file,) = folder.iterdir()
    if broken == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif broken == "longer":
        file.write_bytes(file.read_bytes() + b"0")
    elif broken == "folder is a file":
        file.unlink()
        folder.rmdir()
        folder.write_text("")
    else:
        monkeypatch.setenv("INTRA_CACHE", "")
        assert cache_folder() is None
    assert torch.equal(read(paths), expected)
    assert decoded == [5, 5]


def test_the_longest_unused_make_room(paths, folder, monkeypatch):
    num_bytes = read(paths).nbytes
    (oldest,) = folder.iterdir()
    os.utime(oldest, (0, 0))
    monkeypatch.setattr(cache, "MOST_BYTES", int(2.5 * num_bytes))
    read(paths[::-1])
    read(paths[1:] + paths[:1])
    assert not oldest.exists()
    assert len(list(folder.iterdir())) == 2
    monkeypatch.setattr(cache, "MOST_BYTES", num_bytes - 1)
    read(paths[2:] + paths[:2])
    assert len(list(folder.iterdir())) == 2  # a set larger than all is not kept, and drives nothing out


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("INTRA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "intra"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "intra"
