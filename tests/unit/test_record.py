"""The record: append-only, one row a photo, whole or refused; its messages and its CSV."""

import csv
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from intra.deploy import record as module
from intra.deploy.record import Counts, Entry, Record, export_csv, held
from intra.errors import InTraError
from intra.inspection.detector import Defect

DEFECT = Defect(1, 2, 3, 4, 12, 5.5)


NO_VERDICT = dict.fromkeys(("score", "threshold", "is_anomalous", "p_value", "setup_alarm", "setup_reason")) | {
    "defects": []}  # fmt: skip


def entry(path: bytes, **changes: object) -> Entry:
    values = {"size_bytes": 10, "mtime_ns": 1_700_000_000_000_000_000, "score": 5.5, "threshold": 1.0,
              "is_anomalous": True, "p_value": 0.02, "setup_alarm": True, "setup_reason": "darker",
              "defects": [DEFECT], "error": None, "pictures": None, "model": "m"}
    return Entry(path, **(values | changes))


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    opened = Record(tmp_path / "record.sqlite", folder=tmp_path)
    yield opened
    opened.close()


def test_a_photo_is_known_by_path_size_and_time(record):
    record.add(entry(b"a.png"), notify=False)
    known = b"a.png", 10, 1_700_000_000_000_000_000
    assert record.knows(*known)
    assert not record.knows(b"b.png", *known[1:])
    assert not record.knows(known[0], 11, known[2])
    assert not record.knows(*known[:2], known[2] + 1)


def test_row_and_message_are_written_both_or_neither(record, monkeypatch):
    record.add(entry(b"a.png"), notify=True)
    with pytest.raises(sqlite3.IntegrityError):  # the same photo again
        record.add(entry(b"a.png"), notify=True)
    record._base.execute("DROP TABLE outbox")
    with pytest.raises(InTraError, match="no such table"):
        record.add(entry(b"b.png"), notify=True)
    assert not record.knows(b"b.png", 10, 1_700_000_000_000_000_000)


def test_nothing_is_changed_or_deleted(record):
    record.add(entry(b"a.png"), notify=False)
    for statement in ("UPDATE photos SET score = 0", "DELETE FROM photos"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            record._base.execute(statement)


def test_csv_holds_every_row_and_no_formula(record, tmp_path):
    name = os.fsencode("=cmd|'/c calc'!A1.png")
    record.add(entry(name), notify=False)
    record.add(entry(b"b\xff.png", **NO_VERDICT, error="cannot read it, \"really\""), notify=False)
    record.add(entry(b"c.png", is_anomalous=False, setup_alarm=False, setup_reason="", defects=[], mtime_ns=-(2**63)),
               notify=False)
    assert export_csv(record, tmp_path / "out.csv") == 3
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["result"] for row in rows] == ["setup", "unreadable", "good"]
    assert rows[0]["path"] == "./=cmd|'/c calc'!A1.png"
    assert rows[0]["num_defects"] == "1"
    assert '"area_px": 12' in rows[0]["defects"]
    assert [(row["p_value"], row["setup_alarm"], row["setup_reason"]) for row in rows] == [
        ("0.02", "True", "darker"), ("", "", ""), ("0.02", "False", "")]
    assert rows[1]["error"] == 'cannot read it, "really"'
    assert rows[1]["path"] == r"./b\udcff.png"
    assert rows[2]["modified_at"] == "1677-09-21T00:12:43.145+00:00"
    assert all(cell[:1] not in ("=", "+", "-", "@") for row in rows for cell in row.values())


def test_counts(record):
    record.add(entry(b"a"), notify=True)
    record.add(entry(b"b", is_anomalous=False, setup_alarm=False), notify=True)
    record.add(entry(b"c", **NO_VERDICT, error="why"), notify=True)
    assert record.counts() == Counts(num_photos=3, num_defective=0, num_unreadable=1, num_setup=1,
                                     num_undelivered=3, delivery_error=None)
    record.mark_failed(1, error="HTTP 422", next_try_s=1.0, is_refused=True)
    assert record.counts().delivery_error == "HTTP 422"
    record.mark_failed(2, error="nobody there", next_try_s=1.0, is_refused=False)
    assert record.counts().delivery_error == "nobody there"  # all wait for this one
    for photo in (1, 2):
        record.mark_delivered(photo)
    assert (record.counts().num_undelivered, record.counts().delivery_error) == (1, None)


def test_messages_come_in_order_and_wait_behind_a_failure(record):
    for path in (b"a", b"b", b"c"):
        record.add(entry(path), notify=True)

    def due(now_s: float) -> int | None:
        message = record.next_message(now_s, longest_wait_s=300.0)
        return message and message.photo

    assert due(1000.0) == 1
    record.mark_failed(1, error="nobody there", next_try_s=1010.0, is_refused=False)
    assert due(1005.0) is None  # the others wait too
    assert due(1010.0) == 1
    assert due(100.0) == 1  # the clock was set back by more than any wait
    record.mark_failed(1, error="HTTP 422", next_try_s=1200.0, is_refused=True)  # this one alone
    assert due(1011.0) == 2
    record.mark_delivered(2)
    assert due(1011.0) == 3
    record.mark_delivered(3)
    assert due(1011.0) is None
    assert due(1200.0) == 1


def test_the_id_of_a_message_stays_and_differs_between_records(record, tmp_path):
    other = Record(tmp_path / "other.sqlite", folder=tmp_path)
    for each in (record, other):
        each.add(entry(b"a"), notify=True)
    ids = [each.next_message(0.0, longest_wait_s=300.0).body["id"] for each in (record, record, other)]
    other.close()
    assert ids[0] == ids[1] != ids[2]


def test_what_is_no_record_is_refused(tmp_path):
    with pytest.raises(InTraError, match="no record at"):
        Record(tmp_path / "nothing.sqlite")
    (tmp_path / "text.sqlite").write_text("this is no database at all" * 100)
    with pytest.raises(InTraError, match="not a database"):
        Record(tmp_path / "text.sqlite", folder=tmp_path)
    foreign = sqlite3.connect(tmp_path / "foreign.sqlite")
    foreign.execute("CREATE TABLE t (x)")
    foreign.close()
    with pytest.raises(InTraError, match="no record of intra"):
        Record(tmp_path / "foreign.sqlite", folder=tmp_path)
    Record(tmp_path / "record.sqlite", folder=tmp_path).close()
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InTraError, match="is the record of"):
        Record(tmp_path / "record.sqlite", folder=tmp_path / "elsewhere")


@pytest.fixture
def old_record(record: Record) -> Path:
    """A record of version 1, with a row and its message."""
    record.add(entry(b"a.png"), notify=True)
    for column in ("p_value", "setup_alarm", "setup_reason"):
        record._base.execute(f"ALTER TABLE photos DROP COLUMN {column}")
    record._base.execute("PRAGMA user_version = 1")
    return record.path


def test_a_record_of_version_1_gets_the_new_columns_and_keeps_its_rows(old_record):
    opened = Record(old_record)
    opened.add(entry(b"b.png"), notify=True)
    first, second = opened.rows()
    assert (first["path"], first["score"], first["result"]) == ("a.png", 5.5, "defect")
    assert (first["p_value"], first["setup_alarm"], first["setup_reason"]) == (None, None, None)
    assert (second["p_value"], second["setup_alarm"], second["setup_reason"]) == (0.02, True, "darker")
    assert opened.next_message(0.0, longest_wait_s=300.0).body["setup_alarm"] is None
    assert opened.counts().num_setup == 1
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        opened._base.execute("UPDATE photos SET setup_alarm = 1")
    opened.close()
    Record(old_record).close()  # now of version 2


def test_a_record_gets_all_of_the_new_columns_or_none(old_record, monkeypatch):
    monkeypatch.setattr(module, "FROM_VERSION_1", f"{module.FROM_VERSION_1}ALTER TABLE absent ADD COLUMN x;\n")
    with pytest.raises(InTraError, match="no such table"):
        Record(old_record)
    monkeypatch.undo()
    Record(old_record).close()


def test_a_record_of_a_later_version_is_refused(record):
    record._base.execute("PRAGMA user_version = 3")
    with pytest.raises(InTraError, match="another version"):
        Record(record.path)


def test_a_full_disk_is_an_error_and_what_is_there_stays(record, tmp_path):
    record.add(entry(b"a"), notify=True)
    (pages,) = record._base.execute("PRAGMA page_count").fetchone()
    record._base.execute(f"PRAGMA max_page_count = {pages}")  # SQLite's own way to say: no more room
    with pytest.raises(InTraError, match="full; free some space"):
        record.add(entry(b"b", error="x" * 100_000), notify=True)
    assert not record._base.in_transaction
    record._base.execute("PRAGMA max_page_count = 100000")
    record.add(entry(b"b"), notify=True)
    assert record.counts().num_photos == 2


def test_one_watcher_at_a_time(tmp_path):
    with held(tmp_path / "out"), pytest.raises(InTraError, match="another `intra watch`"), held(tmp_path / "out"):
        pass
    with held(tmp_path / "out"):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(InTraError, match="cannot write to"), held(tmp_path / "file" / "out"):
        pass


def test_the_tables_are_made_in_one_transaction(tmp_path, monkeypatch):
    """Killed while it is made, the file is made by the next call."""
    def die() -> None:
        raise SystemExit

    monkeypatch.setattr(module.uuid, "uuid4", die)
    with pytest.raises(SystemExit):
        Record(tmp_path / "record.sqlite", folder=tmp_path)
    monkeypatch.undo()
    with pytest.raises(InTraError, match="nothing there yet"):
        Record(tmp_path / "record.sqlite")
    Record(tmp_path / "record.sqlite", folder=tmp_path).close()
