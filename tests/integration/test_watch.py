"""Watching a folder with a real model: each photo once and only once, whatever happens."""

import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import PIL.Image
import pytest
from conftest import no_larger_file_than, read_only_folder

from intra.data.decode import UnreadableError
from intra.deploy import watch as module
from intra.deploy.record import Counts, Entry, Record, held
from intra.deploy.watch import Verdict, Watcher, watch
from intra.errors import InTraError
from intra.inspection.detector import Detector
from intra.inspection.device import OutOfMemoryError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """Six photos, as a camera would leave them."""
    folder = tmp_path / "camera"
    (folder / "line 2").mkdir(parents=True)
    sources = sorted((photos / "gear" / "test").rglob("*.png"))[:6]
    for number, source in enumerate(sources):
        (folder / ("line 2" if number % 2 else ".") / f"{number}.png").write_bytes(source.read_bytes())
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def rows_of(out: Path) -> list[dict[str, object]]:
    record = Record(out / "record.sqlite")
    try:
        return list(record.rows())
    finally:
        record.close()


def once(run, folder: Path, out: Path, **options: object) -> Counts:
    callbacks = {name: options.pop(name) for name in ("on_verdict", "on_trouble") if name in options}
    return watch(run.path, Watcher(folder, out, **({"once": True, "settle_s": 0.0} | options)), **callbacks)


def test_each_photo_has_one_row_and_a_second_call_adds_none(run, folder, out):
    seen: list[Verdict] = []
    counts = once(run, folder, out, on_verdict=seen.append, save_images=True)
    assert counts.num_photos == len(seen) == 6
    rows = rows_of(out)
    assert sorted(row["path"] for row in rows) == ["0.png", "2.png", "4.png", "line 2/1.png", "line 2/3.png",
                                                   "line 2/5.png"]
    detector = Detector.load(run.path)
    for row in rows:
        expected = detector.predict(folder / row["path"])
        assert row["score"] == pytest.approx(expected.score, rel=1e-5)
        assert row["p_value"] == expected.p_value
        assert (row["setup_alarm"], row["setup_reason"]) == (expected.setup_alarm, expected.setup_reason)
        assert row["result"] == expected.verdict
        assert len(row["defects"]) == len(expected.defects)
        for kind in ("overlay", "outline", "repaired", "mask"):
            with PIL.Image.open(out / f"{row['pictures']}_{kind}.png") as picture:
                assert picture.size == (64, 64)
    assert len({row["pictures"] for row in rows}) == 6
    assert once(run, folder, out).num_photos == 6


def test_a_rewritten_file_is_another_photo(run, folder, out):
    once(run, folder, out)
    (folder / "0.png").write_bytes((folder / "2.png").read_bytes())
    assert once(run, folder, out).num_photos == 7
    assert [row["path"] for row in rows_of(out)].count("0.png") == 2


def test_damaged_ones_are_set_aside_with_the_reason_and_the_others_go_on(run, folder, out):
    (folder / "0.png").write_bytes((folder / "0.png").read_bytes()[:300])
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(claiming((folder / "2.png").read_bytes(), 100_000, 100_000))
    counts = once(run, folder, out)
    assert (counts.num_photos, counts.num_unreadable) == (8, 3)
    reasons = {row["path"]: row["error"] for row in rows_of(out) if row["error"]}
    assert "damaged or truncated" in reasons["0.png"]
    assert "empty" in reasons["empty.png"]
    assert "too many pixels" in reasons["bomb.png"]
    assert once(run, folder, out).num_photos == 8  # not tried again


def claiming(content: bytes, width: int, height: int) -> bytes:
    """A PNG whose header says another size."""
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


@pytest.mark.parametrize("cause", [OSError(5, "Input/output error"), MemoryError()])
def test_what_the_system_withholds_is_tried_again_before_it_is_set_aside(run, folder, out, monkeypatch, cause):
    calls: list[str] = []
    read = module.read_image

    def fail(path):
        calls.append(path.name)
        if path.name == "0.png" or (path.name == "2.png" and calls.count("2.png") < 3):
            raise UnreadableError(path, "why") from cause
        return read(path)

    monkeypatch.setattr(module, "read_image", fail)
    counts = once(run, folder, out, poll_s=0.0)
    assert (counts.num_photos, counts.num_unreadable) == (6, 1)
    assert (calls.count("0.png"), calls.count("2.png"), calls.count("4.png")) == (3, 3, 1)


def test_a_file_that_vanishes_or_changes_meanwhile_has_no_verdict(run, folder, out, monkeypatch):
    read = module.read_image

    def meddle(path):
        image = read(path)
        if path.name == "0.png":
            path.unlink()
        if path.name == "2.png" and len(troubles) < 2:
            path.touch()
        return image

    troubles: list[str] = []
    monkeypatch.setattr(module, "read_image", meddle)
    assert once(run, folder, out, on_trouble=troubles.append).num_photos == 5
    assert len(troubles) == 2
    assert all("vanished or changed" in trouble for trouble in troubles)
    assert [row["path"] for row in rows_of(out)].count("2.png") == 1


def test_odd_names_stay_inside_the_folder(run, folder, out):
    photo = (folder / "0.png").read_bytes()
    names = [os.fsdecode(b"\xff\xfe.png"), "..png", "\x1b[2J.png", "x" * 250 + ".png", "a;rm -rf.png", "ünï.png",
             "=1+1.png"]  # fmt: skip
    for name in names[:1] + names[2:]:
        (folder / name).write_bytes(photo)
    (folder / "...png").write_bytes(photo)  # hidden: passed over
    assert once(run, folder, out, save_images=True).num_photos == 6 + len(names) - 1
    assert {path.parent for path in out.rglob("*.png")} == {out / "images"}
    assert all(path.name.isascii() and path.name.isprintable() for path in (out / "images").iterdir())
    assert len(list((out / "images").iterdir())) == 4 * (6 + len(names) - 1)
    assert all(str(row["path"]).isprintable() for row in rows_of(out))


def test_its_own_pictures_are_no_photos(run, folder):
    assert once(run, folder, folder / "out", save_images=True).num_photos == 6
    assert once(run, folder, folder / "out", save_images=True).num_photos == 6


def test_a_signal_ends_it_after_the_photo_in_progress_and_the_next_call_goes_on(run, folder, out):
    seen: list[Path] = []

    def stop_at_the_second(verdict: Verdict) -> None:
        seen.append(verdict.path)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    assert once(run, folder, out, on_verdict=stop_at_the_second).num_photos == 2
    assert once(run, folder, out, on_verdict=lambda verdict: seen.append(verdict.path)).num_photos == 6
    assert len(set(seen)) == len(seen) == 6


def test_it_goes_on_watching_and_waits_for_files_to_be_whole(run, folder, out):
    """Without --once, beside a camera that writes slowly; a folder that is away for a while is told of."""
    content = (folder / "0.png").read_bytes()
    paths: list[str] = []
    troubles: list[str] = []

    def camera() -> None:
        wait_for(lambda: len(paths) == 6)
        with (folder / "slow.png").open("wb") as file:
            for start in range(0, len(content), len(content) // 5):
                file.write(content[start : start + len(content) // 5])
                file.flush()
                time.sleep(0.1)
        wait_for(lambda: len(paths) == 7)
        folder.rename(folder.with_name("away"))
        wait_for(lambda: bool(troubles))
        folder.with_name("away").rename(folder)
        (folder / "late.png").write_bytes(content)
        wait_for(lambda: len(paths) == 8)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=camera)
    thread.start()
    counts = watch(run.path, Watcher(folder, out, settle_s=1.0, poll_s=0.05), on_trouble=troubles.append,
                   on_verdict=lambda verdict: paths.append(verdict.path.name))
    thread.join()
    assert (counts.num_photos, counts.num_unreadable) == (8, 0)
    assert sorted(paths[6:]) == ["late.png", "slow.png"]
    assert len(troubles) == 1
    assert "cannot look into" in troubles[0]


def wait_for(so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not so() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_once_leaves_what_is_still_written(run, folder, out, monkeypatch):
    """It does not wait for ever for a file that grows for ever."""
    look = module.Arrivals.look

    def grow_and_look(self):
        with (folder / "0.png").open("ab") as file:
            file.write(b"more")
        return look(self)

    monkeypatch.setattr(module.Arrivals, "look", grow_and_look)
    troubles: list[str] = []
    assert once(run, folder, out, settle_s=0.1, on_trouble=troubles.append).num_photos == 5
    assert "still being written" in troubles[-1]


def test_mistakes_are_named(run, folder, out, tmp_path):
    with pytest.raises(InTraError, match="no folder"):
        once(run, tmp_path / "nowhere", out)
    with pytest.raises(InTraError, match="--settle"):
        once(run, folder, out, settle_s=-1.0)
    with pytest.raises(InTraError, match="webhook"):
        once(run, folder, out, webhook="file:///etc/passwd")
    once(run, folder, out)
    (tmp_path / "other").mkdir()
    with pytest.raises(InTraError, match="is the record of"):
        once(run, tmp_path / "other", out)
    lock = sqlite3.connect(out / "watch.lock", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.raises(InTraError, match="another `intra watch`"):
        once(run, folder, out)
    lock.close()


@pytest.mark.parametrize("save_images", [True, False])
def test_on_a_full_disk_it_ends_and_goes_on_where_it_was(run, folder, out, save_images):
    reported: list[Verdict] = []
    Record(out_made(out) / "record.sqlite", folder=folder).close()
    limit = 1000 if save_images else (out / "record.sqlite").stat().st_size + 9_000  # room in the log for a few rows
    with no_larger_file_than(limit), pytest.raises(InTraError, match="free some space"):
        once(run, folder, out, save_images=save_images, on_verdict=reported.append)
    assert len(rows_of(out)) == len(reported) < 6
    assert once(run, folder, out, save_images=save_images).num_photos == 6
    assert not list(out.rglob("*.part"))


def out_made(out: Path) -> Path:
    out.mkdir()
    return out


def test_a_read_only_folder_is_an_error():
    with read_only_folder() as place:
        with pytest.raises(InTraError, match="cannot write to"), held(place / "out"):
            pass
        with pytest.raises(InTraError, match="cannot use"), held(place):
            pass
        with pytest.raises(InTraError, match="cannot use the record"):
            Record(place / "record.sqlite", folder=place)


@pytest.mark.parametrize("where", ["predict", "save_pictures"])
@pytest.mark.parametrize("error", [OutOfMemoryError("one image"), MemoryError(), RuntimeError("CUDA out of memory")])
def test_a_photo_too_large_for_the_memory_is_set_aside_and_watching_goes_on(
    run, folder, out, monkeypatch, where, error
):  # fmt: skip
    with PIL.Image.open(folder / "0.png") as image:
        image.resize((96, 96)).save(folder / "large.png")
    place, tries = {"predict": Detector, "save_pictures": module}[where], []
    work = getattr(place, where)

    def fail(*words, **options):
        if any(getattr(word, "shape", ())[:2] == (96, 96) for word in words):
            tries.append(1)
            raise error
        return work(*words, **options)

    monkeypatch.setattr(place, where, fail)
    counts = once(run, folder, out, save_images=True, poll_s=0.0)
    assert (counts.num_photos, counts.num_unreadable, len(tries)) == (7, 1, 3)
    (reason,) = (row["error"] for row in rows_of(out) if row["error"])
    assert "large.png" in reason
    assert "does not fit into memory" in reason
    assert once(run, folder, out).num_photos == 7  # a restart does not begin again with it


KILLED = """
import os, signal, sys
from pathlib import Path
from intra.deploy import record, watch as module
from intra.deploy.watch import Watcher, watch

left = [{before}, {after}]  # rows until it is killed: before the commit, after it
add = record.Record.add

def kill(which):
    left[which] -= 1
    if left[which] == 0:
        os.kill(os.getpid(), signal.SIGKILL)

class Dying(record.Record):
    def _transaction(self):
        inner = super()._transaction()
        from contextlib import contextmanager
        @contextmanager
        def transaction():
            with inner:
                yield
                if sys._getframe(2).f_code.co_name == "add":
                    kill(0)  # the row is written, and not yet committed
        return transaction()

module.Record = Dying

def show(verdict):
    print(verdict.id, flush=True)
    kill(1)

watch({run!r}, Watcher(Path({folder!r}), Path({out!r}), once=True, settle_s=0.0, save_images=True), on_verdict=show)
"""


@pytest.mark.parametrize(("before", "after", "expected"), [(3, 99, 2), (99, 3, 3)], ids=["before", "after"])
def test_kill_9_around_the_commit(run, folder, out, before, after, expected):
    code = KILLED.format(before=before, after=after, run=str(run.path), folder=str(folder), out=str(out))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    reported = [int(line) for line in done.stdout.split()]
    assert [row["id"] for row in rows_of(out)] == reported == list(range(1, expected + 1))
    assert once(run, folder, out, save_images=True).num_photos == 6
    assert len({row["path"] for row in rows_of(out)}) == 6


def intra(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "intra.cli", *map(str, words)], capture_output=True, text=True,
                          check=False)


def test_on_the_command_line(run, folder, out, tmp_path):
    (folder / "half.png").write_bytes((folder / "0.png").read_bytes()[:300])
    done = intra("watch", run.path, folder, "--out", out, "--once", "--settle", 0)
    assert done.returncode == 2
    assert "1 of the files could not be inspected" in done.stderr
    assert "7 photos" in done.stdout
    done = intra("record", out, "--csv", tmp_path / "rows.csv")
    assert done.returncode == 0, done.stderr
    assert "1 not inspected" in done.stdout
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 8


def test_a_setup_alarm_is_told_on_the_command_line_and_in_the_csv(run, folder, out, tmp_path):
    with PIL.Image.open(folder / "0.png") as image:
        image.point(lambda value: value // 2).save(folder / "dark.png")
    done = intra("watch", run.path, folder, "--out", out, "--once", "--settle", 0)
    (line,) = (line for line in done.stdout.splitlines() if "dark.png" in line)
    assert line.startswith("SETUP ")
    assert line.endswith("(darker)")
    done = intra("record", out, "--csv", tmp_path / "rows.csv")
    assert "1 with another light, focus or pose" in done.stdout
    assert ",True,darker," in (tmp_path / "rows.csv").read_text()


def test_a_webhook_that_fails_is_told_of(run, folder, out):
    done = intra("watch", run.path, folder, "--out", out, "--once", "--settle", 0, "--webhook", "http://127.0.0.1:9/")
    assert done.returncode == 0
    assert done.stderr.count("the webhook did not take a message: <urlopen error") == 1
    for text in (done.stdout, intra("record", out).stdout):
        assert "6 messages not yet delivered (last error: <urlopen error" in text


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_does_not_wait_for_a_slow_webhook(run, folder, out, monkeypatch, signals):
    """The first one gives it some time, the second none."""
    monkeypatch.setattr(module, "FINAL_S", 0.5 if signals == 1 else 30.0)
    record = Record(out_made(out) / "record.sqlite", folder=folder)
    for number in range(100):
        record.add(Entry(b"%d" % number, 1, 1, **dict.fromkeys(module.MEASURED), defects=(), error="", pictures=None,
                         model=""), notify=True)  # fmt: skip
    record.close()

    def interrupt() -> None:
        for _ in range(signals):
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGINT)
            interrupted.append(time.monotonic())

    interrupted: list[float] = []
    stopper = threading.Thread(target=interrupt)
    with receiver([], pause_s=0.4) as address:  # 40 s for all
        expected = nullcontext() if signals == 1 else pytest.raises(KeyboardInterrupt)
        with expected:
            watch(run.path, Watcher(folder, out, settle_s=0.0, webhook=address),
                  on_verdict=lambda verdict: stopper.start() if verdict.id == 106 else None)  # fmt: skip
        assert time.monotonic() - interrupted[-1] < 5.0
    stopper.join()
    assert len(rows_of(out)) == 106


def test_the_verdicts_reach_a_webhook(run, folder, out):
    got: list[dict[str, object]] = []
    with receiver(got) as address:
        counts = once(run, folder, out, webhook=address)
    assert counts.num_undelivered == 0
    assert [body["path"] for body in got] == [row["path"] for row in rows_of(out)]
    assert {body["result"] for body in got} <= {"good", "defect", "setup"}
    assert {body["setup_alarm"] for body in got} <= {True, False}


@contextmanager
def receiver(got: list[dict[str, object]], pause_s: float = 0.0) -> Iterator[str]:
    """A server that keeps what it gets; its address."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            time.sleep(pause_s)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
