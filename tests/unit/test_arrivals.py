"""New photos: waited for until they are whole, each handed out while it is unknown, in bounded memory."""

import os
from pathlib import Path

import pytest

from intra.deploy import arrivals as module
from intra.deploy.arrivals import Arrivals, Photo
from intra.errors import InTraError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def known() -> set[Photo]:
    return set()


@pytest.fixture
def arrivals(tmp_path: Path, clock: Clock, known: set[Photo]) -> Arrivals:
    return Arrivals(tmp_path, is_known=known.__contains__, settle_s=2.0, skipped=frozenset(), clock=clock)


def keys(photos: list[Photo]) -> list[bytes]:
    return [photo.key for photo in photos]


def test_a_file_that_grows_is_waited_for(tmp_path, arrivals, clock):
    path = tmp_path / "a.png"
    for second in range(4):
        with path.open("ab") as file:
            file.write(b"more")
        clock.now = float(second)
        assert arrivals.look() == []
    clock.now = 4.9
    assert arrivals.look() == []
    clock.now = 5.0
    assert keys(arrivals.look()) == [b"a.png"]


def test_a_file_of_one_size_that_is_still_written_is_waited_for(tmp_path, arrivals, clock):
    """Some programs make room first."""
    path = tmp_path / "a.png"
    path.write_bytes(bytes(10))
    arrivals.look()
    clock.now = 2.0
    path.write_bytes(b"0123456789")
    os.utime(path, ns=(0, 12345))
    assert arrivals.look() == []
    clock.now = 4.0
    assert keys(arrivals.look()) == [b"a.png"]


def test_an_old_time_of_change_is_no_proof(tmp_path, arrivals, clock):
    """A copy may be given the original's time before it is whole."""
    (tmp_path / "a.png").touch()
    os.utime(tmp_path / "a.png", ns=(0, 0))
    assert arrivals.look() == []


def test_known_ones_are_not_handed_out_and_rewritten_ones_are(tmp_path, arrivals, clock, known):
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    arrivals.look()
    clock.now = 2.0
    (photo,) = arrivals.look()
    known.add(photo)
    assert arrivals.look() == []
    path.write_bytes(b"another")
    arrivals.look()
    clock.now = 4.0
    (again,) = arrivals.look()
    assert again.path == photo.path
    assert again != photo


def test_sub_folders_links_hidden_and_other_files(tmp_path, arrivals, clock):
    inner = tmp_path / "cam 1" / "deep"
    inner.mkdir(parents=True)
    (inner / "a.PNG").touch()
    (inner / "ring").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / ".hidden.png").touch()
    (tmp_path / ".folder").mkdir()
    (tmp_path / ".folder" / "b.png").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "link.png").symlink_to(inner / "a.PNG")
    (tmp_path / os.fsdecode(b"not\xfftext.png")).touch()
    arrivals.look()
    clock.now = 2.0
    assert sorted(keys(arrivals.look())) == [b"cam 1/deep/a.PNG", b"link.png", b"not\xfftext.png"]


def test_skipped_folders(tmp_path, clock):
    (tmp_path / "out" / "images").mkdir(parents=True)
    (tmp_path / "out" / "images" / "a.png").touch()
    (tmp_path / "b.png").touch()
    arrivals = Arrivals(tmp_path, is_known=lambda photo: False, settle_s=0.0, clock=clock,
                        skipped=frozenset({(tmp_path / "out").resolve()}))
    assert keys(arrivals.look()) == [b"b.png"]


def test_a_vanished_file_is_forgotten(tmp_path, arrivals, clock):
    (tmp_path / "a.png").touch()
    arrivals.look()
    (tmp_path / "a.png").unlink()
    clock.now = 2.0
    assert arrivals.look() == []
    assert not arrivals.waiting


def test_the_oldest_first_and_few_at_a_time(tmp_path, arrivals, clock, known, monkeypatch):
    monkeypatch.setattr(module, "MOST_AT_A_TIME", 10)
    for number in range(35):
        (tmp_path / f"{number:02}.png").touch()
        os.utime(tmp_path / f"{number:02}.png", ns=(0, 10**9 * (100 - number)))
    handed_out: list[bytes] = []
    for _ in range(12):
        found = arrivals.look()
        assert len(arrivals.waiting) <= 10
        handed_out += keys(found)
        known.update(found)
        clock.now += 2
    assert handed_out == [f"{number:02}.png".encode() for number in reversed(range(35))]


def test_a_folder_that_is_gone_is_an_error_and_a_sub_folder_is_not(tmp_path, clock, monkeypatch, caplog):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.png").touch()
    arrivals = Arrivals(folder, is_known=lambda photo: False, settle_s=0.0, skipped=frozenset(), clock=clock)
    scandir = os.scandir

    def refuse(place):
        if str(place).endswith("inner"):
            raise PermissionError(13, "Permission denied")
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert keys(arrivals.look()) == [b"a.png"]
    assert keys(arrivals.look()) == [b"a.png"]
    assert caplog.text.count("cannot look into") == 1  # told once
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(InTraError, match="cannot look into"):
        arrivals.look()


@pytest.mark.parametrize("folder", [".", "./", "/"])
def test_the_key_is_the_path_below_any_folder(tmp_path, monkeypatch, clock, folder):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    arrivals = Arrivals(Path(folder), is_known=lambda photo: False, settle_s=0.0, skipped=frozenset(), clock=clock)
    if folder == "/":  # not looked through as a whole
        with os.scandir(tmp_path / "inner") as entries:
            (photo,) = arrivals._photo(next(entries))
        assert photo.key == os.fsencode(tmp_path / "inner" / "a.png")[1:]
    else:
        assert keys(arrivals.look()) == [b"inner/a.png"]


@pytest.mark.parametrize("year", [1700, 1970, 2026, 2400])
def test_any_time_of_change_fits_into_the_record(tmp_path, year):
    path = tmp_path / "a.png"
    path.touch()
    seconds = (year - 1970) * 31_556_952
    os.utime(path, (0, seconds))
    if abs(path.stat().st_mtime - seconds) > 1:
        pytest.skip("this file system keeps no such time")
    _, time_ns = module.fingerprint(path)
    assert -(2**63) <= time_ns < 2**63
    assert (time_ns - seconds * 10**9) % 2**64 == 0
