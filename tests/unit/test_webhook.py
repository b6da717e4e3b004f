"""The courier, against a server on this machine: at least once, in order, with pauses, across restarts."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from test_record import entry

from intra.deploy import webhook as module
from intra.deploy.record import Record
from intra.deploy.webhook import Courier
from intra.errors import InTraError


class Receiver:
    """Answers with the codes it is given, 200 after them, and keeps what it gets."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.pause_s = 0.0
        self.got: list[tuple[dict[str, str], dict[str, object]]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                time.sleep(receiver.pause_s)
                receiver.got.append((dict(self.headers), body))
                code = receiver.codes.pop(0) if receiver.codes else 200
                if code == 0:  # takes it, and breaks the line before it answers
                    self.close_connection = True
                    return
                self.send_response(code)
                if code == 302:
                    self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                raise AssertionError("a redirect was followed")

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def paths(self) -> list[object]:
        return [body["path"] for _, body in self.got]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture
def record(tmp_path: Path) -> Iterator[Record]:
    opened = Record(tmp_path / "record.sqlite", folder=tmp_path)
    for path in (b"a", b"b", b"c"):
        opened.add(entry(path), notify=True)
    yield opened
    opened.close()


def deliver(
    record: Record, address: str, until: Callable[[], bool] = lambda: False, on_trouble: Callable[[str], None] = print,
) -> Courier:  # fmt: skip
    """Runs a courier, to the end of what is due or until something is so."""
    courier = Courier(record.path, address, on_trouble)
    courier.start()
    deadline = time.monotonic() + 20
    while not until() and courier.is_alive() and until.__name__ != "<lambda>" and time.monotonic() < deadline:
        time.sleep(0.01)
    courier.finish(20.0)
    assert courier.error is None
    return courier


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.05)
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.02)


def test_each_is_delivered_in_order_with_all_that_the_row_says(record, receiver):
    deliver(record, receiver.address)
    assert receiver.paths == ["a", "b", "c"]
    headers, body = receiver.got[0]
    assert headers["Idempotency-Key"] == body["id"]
    assert body["result"] == "setup"
    assert body["defects"][0]["area_px"] == 12
    assert (body["p_value"], body["setup_alarm"], body["setup_reason"]) == (0.02, True, "darker")
    assert record.counts().num_undelivered == 0
    deliver(record, receiver.address)
    assert len(receiver.got) == 3  # never again


@pytest.mark.parametrize("code", [500, 503, 429, 302, 0])
def test_a_failure_is_tried_again_and_keeps_the_order(record, receiver, code):
    receiver.codes = [code, code]

    def all_delivered() -> bool:
        return record.counts().num_undelivered == 0

    deliver(record, receiver.address, until=all_delivered)
    assert receiver.paths == ["a", "a", "a", "b", "c"]
    assert len({body["id"] for _, body in receiver.got}) == 3  # duplicates have the same id


def test_one_that_is_refused_does_not_hold_up_the_others(record, receiver):
    receiver.codes = [422]

    def all_delivered() -> bool:
        return record.counts().num_undelivered == 0

    deliver(record, receiver.address, until=all_delivered)
    assert receiver.paths == ["a", "b", "c", "a"]


def test_each_reason_is_told_once_and_again_after_it_had_passed(record, receiver):
    told: list[str] = []

    def all_delivered() -> bool:
        return record.counts().num_undelivered == 0

    receiver.codes = [500, 500, 503, 500]
    deliver(record, receiver.address, all_delivered, told.append)
    assert len(told) == 2
    assert "HTTP 500" in told[0]
    assert "HTTP 503" in told[1]
    record.add(entry(b"d"), notify=True)
    record.add(entry(b"e"), notify=True)
    receiver.codes = [500, 200, 500]
    deliver(record, receiver.address, all_delivered, told.append)
    assert len(told) == 4


def test_at_the_end_a_slow_receiver_is_waited_for_until_a_stop_and_then_not_for_long(record, receiver):
    receiver.pause_s = 0.5

    def finish(within_s: float, stop: threading.Event | None) -> float:
        courier = Courier(record.path, receiver.address, print)
        courier.start()
        started = time.monotonic()
        courier.finish(within_s, stop=stop)
        took_s = time.monotonic() - started
        courier.join(5.0)
        return took_s

    assert finish(0.2, None) < 1.0  # all three would take 1.5 s
    assert record.counts().num_undelivered >= 2  # the one on its way was the last
    stop = threading.Event()
    finish(0.0, stop)  # nobody stops it
    assert record.counts().num_undelivered == 0
    stop.set()
    for path in (b"d", b"e", b"f"):
        record.add(entry(path), notify=True)
    assert finish(0.2, stop) < 1.0
    assert record.counts().num_undelivered >= 2


def test_the_pauses_grow_and_survive_a_restart(record, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT_S", 100.0)
    nobody = "http://127.0.0.1:9/"  # the discard port: nothing listens
    pauses = []
    for _ in range(5):
        deliver(record, nobody)  # a new one each time
        tries, due, error = record._base.execute("SELECT num_tries, next_try_s, last_error FROM outbox").fetchone()
        pauses.append(round(due - time.time(), -1))
        assert error
        record._base.execute("UPDATE outbox SET next_try_s = next_try_s - 100000")  # later
    assert pauses == [100, 200, 300, 300, 300]
    assert tries == 5
    record.mark_failed(1, error="x", next_try_s=time.time() + 100, is_refused=False)
    deliver(record, nobody)
    assert record._base.execute("SELECT num_tries FROM outbox").fetchone() == (6,)  # not tried before its time


def test_name_and_password_go_into_a_header(record, receiver):
    deliver(record, receiver.address.replace("//", "//me:s%40crt@"))
    assert receiver.got[0][0]["Authorization"] == "Basic bWU6c0BjcnQ="
    assert len(receiver.got) == 3


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://host/x", "host/hook", "http://", "http://host:x/",
                                     "http://[::1/"])  # fmt: skip
def test_other_addresses_are_refused(tmp_path, address):
    with pytest.raises(InTraError, match="webhook's address"):
        Courier(tmp_path / "record.sqlite", address, print)


def test_what_ends_it_is_kept(tmp_path):
    courier = Courier(tmp_path / "missing.sqlite", "http://127.0.0.1:9/", print)
    courier.start()
    courier.finish(20.0)
    assert isinstance(courier.error, InTraError)
