"""The record of a watched folder: one SQLite file, append-only, whole after kill -9 and power cuts.

A photo is known by its path below the folder, its size and its time of change: each such photo has one row, written
in one transaction with its message to the webhook. Rows are never changed or deleted; triggers in the file refuse it.
"""

import csv
import io
import json
import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from os import fsdecode
from pathlib import Path
from typing import Any

from intra.data.files import printable, whole_file
from intra.errors import InTraError
from intra.inspection.detector import Defect, verdict_of

__all__ = ["RECORD_FILE", "Counts", "Entry", "Message", "Record", "export_csv", "held"]

RECORD_FILE = "record.sqlite"
LOCK_FILE = "watch.lock"
RECORD_VERSION = 2  # of the tables below, kept in SQLite's user_version; 1 becomes 2, others are refused
BUSY_S = 30.0  # how long one connection waits for another's transaction
CSV_FIELDS = ("id", "path", "result", "score", "threshold", "p_value", "setup_alarm", "setup_reason", "num_defects",
              "defects", "error", "pictures", "inspected_at", "modified_at", "size_bytes", "model")  # fmt: skip
TABLES = """
CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE photos (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    path BLOB NOT NULL,  -- below the folder, as the file system spells it: not every name is text
    size_bytes INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    score REAL, threshold REAL, is_anomalous INTEGER,  -- null for a photo that cannot be inspected
    defects TEXT NOT NULL,  -- JSON
    error TEXT,  -- why it cannot be inspected
    pictures TEXT,  -- below the record's folder, without _overlay.png and so on
    model TEXT NOT NULL,  -- SHA-256 of the model file
    inspected_at TEXT NOT NULL,
    p_value REAL, setup_alarm INTEGER, setup_reason TEXT,  -- as score; also null in rows of version 1
    UNIQUE (path, size_bytes, mtime_ns)
);
CREATE TRIGGER photos_are_not_changed BEFORE UPDATE ON photos BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER photos_are_not_deleted BEFORE DELETE ON photos BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TABLE outbox (
    photo INTEGER PRIMARY KEY REFERENCES photos (id),
    num_tries INTEGER NOT NULL DEFAULT 0,
    next_try_s REAL NOT NULL DEFAULT 0,  -- seconds since 1970
    is_refused INTEGER NOT NULL DEFAULT 0,  -- the receiver wants this one message not; the others go on
    last_error TEXT,
    delivered_at TEXT
);
CREATE INDEX undelivered ON outbox (is_refused, photo) WHERE delivered_at IS NULL;
"""
FROM_VERSION_1 = """
ALTER TABLE photos ADD COLUMN p_value REAL;
ALTER TABLE photos ADD COLUMN setup_alarm INTEGER;
ALTER TABLE photos ADD COLUMN setup_reason TEXT;
"""


@dataclass(frozen=True)
class Entry:
    """What is recorded of a photo: a verdict, or the error for which there is none."""

    path: bytes  # below the folder
    size_bytes: int
    mtime_ns: int
    score: float | None
    threshold: float | None
    is_anomalous: bool | None
    p_value: float | None
    setup_alarm: bool | None
    setup_reason: str | None
    defects: Sequence[Defect]
    error: str | None
    pictures: str | None
    model: str


@dataclass(frozen=True)
class Counts:
    """What the record holds."""

    num_photos: int
    num_defective: int
    num_unreadable: int
    num_setup: int  # with a setup alarm, which are not counted as defective
    num_undelivered: int  # messages that the webhook has not yet taken
    delivery_error: str | None  # why the first of them that was tried was not taken


@dataclass(frozen=True)
class Message:
    """A row on its way to the webhook."""

    photo: int
    num_tries: int
    body: dict[str, Any]  # its "id" is the same in each try and in no other message, to tell duplicates by


class Record:
    """The open record of one folder. Use it in one thread, and close it; every thread opens its own."""

    def __init__(self, path: Path, *, folder: Path | None = None) -> None:
        """Opens the record; makes it for this folder if it is not there and a folder is given.

        Raises InTraError if it is missing, cannot be written, is no record, or is one of another folder or version.
        """
        self.path = path
        if folder is None and not path.is_file():
            raise InTraError(f"no record at {path}; give the folder that `intra watch` writes to")
        with self._errors():
            self._base = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
            try:
                self._open(folder)
            except BaseException:
                self._base.close()
                raise

    def _open(self, folder: Path | None) -> None:
        self._base.execute("PRAGMA journal_mode = WAL")
        self._base.execute("PRAGMA synchronous = FULL")  # what was reported is on the disk, also after a power cut
        with self._transaction():
            (version,) = self._base.execute("PRAGMA user_version").fetchone()
            (num_tables,) = self._base.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not version and not num_tables and folder is not None:
                self._make(TABLES)
                about = {"id": uuid.uuid4().hex, "folder": printable(folder.resolve())}
                self._base.executemany("INSERT INTO about VALUES (?, ?)", about.items())
            elif version == 1:
                self._make(FROM_VERSION_1)
            elif not version and not num_tables:
                raise InTraError(f"{self.path} is empty: `intra watch` has recorded nothing there yet")
            elif version != RECORD_VERSION:
                raise InTraError(f"{self.path} is no record of intra, or one of another version; choose another --out")
        self.about: dict[str, str] = dict(self._base.execute("SELECT key, value FROM about"))
        if folder is not None and self.about["folder"] != printable(folder.resolve()):
            raise InTraError(f"{self.path} is the record of {self.about['folder']}; choose another --out for "
                             f"{folder}")

    def _make(self, script: str) -> None:
        for statement in _statements(script):
            self._base.execute(statement)
        self._base.execute(f"PRAGMA user_version = {RECORD_VERSION}")

    def close(self) -> None:
        self._base.close()

    def knows(self, path: bytes, size_bytes: int, mtime_ns: int) -> bool:
        """Whether this photo has its row."""
        with self._errors():
            return self._base.execute("SELECT 1 FROM photos WHERE path = ? AND size_bytes = ? AND mtime_ns = ?",
                                      (path, size_bytes, mtime_ns)).fetchone() is not None

    def add(self, entry: Entry, *, notify: bool) -> int:
        """Writes the row and, with `notify`, its message, both or neither; returns the row's id.

        When it returns, both are on the disk. Raises InTraError if they cannot be written.
        """
        values = asdict(entry) | {"defects": json.dumps([asdict(defect) for defect in entry.defects]),
                                  "inspected_at": _now()}
        names = ", ".join(values)
        with self._errors(), self._transaction():
            added = self._base.execute(f"INSERT INTO photos ({names}) VALUES ({', '.join('?' * len(values))})",
                                       tuple(values.values()))
            if notify:
                self._base.execute("INSERT INTO outbox (photo) VALUES (?)", (added.lastrowid,))
        return int(added.lastrowid or 0)

    def counts(self) -> Counts:
        with self._errors():
            photos = self._base.execute("SELECT count(*), coalesce(sum(is_anomalous AND setup_alarm IS NOT 1), "
                                        "0), count(error), coalesce(sum(setup_alarm), 0) FROM photos")
            waiting = self._base.execute("SELECT count(*) FROM outbox WHERE delivered_at IS NULL")
            error = self._base.execute("SELECT last_error FROM outbox WHERE delivered_at IS NULL AND last_error IS NOT "
                                       "NULL ORDER BY is_refused, photo LIMIT 1")
            return Counts(*photos.fetchone(), *waiting.fetchone(), *(error.fetchone() or (None,)))

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every row, in the order of the ids, one after the other: memory does not grow with their number."""
        with self._errors():
            yield from map(_row, self._base.execute("SELECT * FROM photos ORDER BY id"))

    def next_message(self, now_s: float, *, longest_wait_s: float) -> Message | None:
        """The oldest message that is due, or a refused one whose time has come; None if none is.

        A failure delays all messages behind it, which keeps their order and spares the receiver. One that lies further
        ahead than any wait is due too: the clock was set back.
        """
        with self._errors():
            found = self._base.execute(
                "SELECT * FROM photos JOIN outbox ON photo = id WHERE delivered_at IS NULL AND (next_try_s <= :now OR "
                "next_try_s > :now + :longest) AND (is_refused OR id = (SELECT min(photo) FROM outbox WHERE "
                "delivered_at IS NULL AND NOT is_refused)) ORDER BY is_refused, id LIMIT 1",
                {"now": now_s, "longest": longest_wait_s})  # fmt: skip
            names = [column[0] for column in found.description]
            row = found.fetchone()
        if row is None:
            return None
        values = dict(zip(names, row, strict=True))
        body = {"id": f"{self.about['id']}-{values['id']}"} | {
            key: value for key, value in _row(row[: names.index("photo")]).items() if key != "id"}
        return Message(values["id"], values["num_tries"], body)

    def mark_delivered(self, photo: int) -> None:
        with self._errors(), self._transaction():
            self._base.execute("UPDATE outbox SET delivered_at = ?, num_tries = num_tries + 1 WHERE photo = ?",
                               (_now(), photo))

    def mark_failed(self, photo: int, *, error: str, next_try_s: float, is_refused: bool) -> None:
        with self._errors(), self._transaction():
            self._base.execute("UPDATE outbox SET num_tries = num_tries + 1, last_error = ?, next_try_s = ?, "
                               "is_refused = ? WHERE photo = ?", (error, next_try_s, is_refused, photo))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._base.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._base.execute("COMMIT")
        except BaseException:
            if self._base.in_transaction:  # some errors end it by themselves
                self._base.execute("ROLLBACK")
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns what the disk does wrong into an InTraError; our own mistakes stay what they are."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if type(error) not in (sqlite3.OperationalError, sqlite3.DatabaseError):
                raise
            raise InTraError(f"cannot use the record {self.path}: {error}; free some space or choose another --out; "
                             "what is in it stays") from error


def export_csv(record: Record, file: Path) -> int:
    """Writes every row as CSV, whole or not at all; returns how many there are.

    Paths start with "./", so that no name of a file can pass for a formula where the table is opened.
    """
    count = 0
    with whole_file(file) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8", newline="", write_through=True)
        table = csv.DictWriter(text, CSV_FIELDS, lineterminator="\n")
        table.writeheader()
        for row in record.rows():
            table.writerow(row | {"path": f"./{row['path']}", "num_defects": len(row["defects"]),
                                  "defects": json.dumps(row["defects"])})
            count += 1
        text.detach()
    return count


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keeps other watchers off a record's folder; the system lets go of it when the process ends, however it ends.

    Raises InTraError if another one has it, or the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = sqlite3.connect(out / LOCK_FILE, timeout=0, isolation_level=None)
        try:
            lock.execute("BEGIN EXCLUSIVE")  # SQLite's lock on a file, the same on every system
        except BaseException:
            lock.close()
            raise
    except sqlite3.OperationalError as error:
        what = "another `intra watch` writes to it" if "locked" in str(error) else str(error)
        raise InTraError(f"cannot use {out}: {what}; choose another --out") from error
    except OSError as error:
        raise InTraError(f"cannot write to {out}: {error.strerror or error}; choose another --out") from error
    try:
        yield
    finally:
        lock.close()


def _row(values: Sequence[Any]) -> dict[str, Any]:
    """A row of photos as it is told to others, fit for JSON."""
    (number, path, size_bytes, mtime_ns, score, threshold, is_anomalous, defects, error, pictures, model,
     inspected_at, p_value, setup_alarm, setup_reason) = values  # fmt: skip
    result = "unreadable" if error is not None else verdict_of(bool(is_anomalous), bool(setup_alarm))
    return {"id": number, "path": printable(fsdecode(path)), "result": result, "score": score, "threshold": threshold,
            "p_value": p_value, "setup_alarm": None if setup_alarm is None else bool(setup_alarm),
            "setup_reason": setup_reason, "defects": json.loads(defects), "error": error, "pictures": pictures,
            "inspected_at": inspected_at, "modified_at": _time_of(mtime_ns), "size_bytes": size_bytes, "model": model}


def _time_of(mtime_ns: int) -> str:
    """In the calendar, to the millisecond; 64 bits of nanoseconds reach from 1677 to 2262, so there is always one."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=mtime_ns // 10**6)).isoformat(
        timespec="milliseconds")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script; `executescript` would end the transaction that makes them one."""
    statement = ""
    for line in script.strip().splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
