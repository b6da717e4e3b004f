"""Messages to a web address: each at least once, in order, with growing pauses while nobody answers.

What is to be sent lies in the record's outbox, so nothing is lost by a crash on either side. A crash between the
receiver's answer and the mark in the record sends a message twice; its "id" is then the same. So does an end that does
not wait for the answer.
"""

import base64
import http.client
import json
import math
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from intra.deploy.record import Message, Record
from intra.errors import InTraError

__all__ = ["FINAL_S", "Courier"]

TIMEOUT_S = 10.0  # for an answer
FINAL_S = 10.0  # for all that is still due after a signal
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0  # after a failure; doubled with each try
NOT_NOW = frozenset({408, 425, 429})  # of the 4xx, those that speak of the moment, not of the message
LOOK_EVERY_S = 1.0


class Courier(threading.Thread):
    """Sends what lies in the outbox, beside the inspection: a slow receiver holds nothing up.

    Calls `on_trouble`, in its own thread, with each new reason why a message was not taken. Raises InTraError for an
    address that is no http or https one.
    """

    def __init__(self, record: Path, address: str, on_trouble: Callable[[str], None]) -> None:
        super().__init__(name="courier", daemon=True)
        self.record = record
        self.on_trouble = on_trouble
        self.address, self.headers = _address(address)
        self.error: Exception | None = None  # that ended it early
        self._wake = threading.Event()
        self._is_ending = threading.Event()
        self._end_s = math.inf  # of time.monotonic()
        self._told: set[str] = set()

    def wake(self) -> None:
        """Tells it that there is something new."""
        self._wake.set()

    def finish(self, within_s: float, *, stop: threading.Event | None = None) -> None:
        """Lets it try all that is due, until the first failure; waits for it until `stop`, and then for `within_s`.

        A message that is on its way after that is not waited for, and is the last.
        """
        self._is_ending.set()
        self._wake.set()
        while stop and not stop.is_set() and self.is_alive():
            self.join(0.1)
        self._end_s = time.monotonic() + within_s
        if self.ident is not None:  # it was started
            self.join(within_s)

    def run(self) -> None:
        try:
            record = Record(self.record)
            try:
                while time.monotonic() < self._end_s:
                    self._wake.clear()
                    ending = self._is_ending.is_set()  # read before the last look
                    if not self._send_one(record):
                        if ending:
                            return
                        self._wake.wait(LOOK_EVERY_S)
            finally:
                record.close()
        except Exception as error:  # the watcher raises it in its own thread
            self.error = error

    def _send_one(self, record: Record) -> bool:
        """Whether there may be more to send now."""
        message = record.next_message(time.time(), longest_wait_s=LONGEST_WAIT_S)
        if message is None:
            return False
        failure, is_refused = self._post(message)
        if failure is None:
            record.mark_delivered(message.photo)
            if message.num_tries:  # what was in the way is gone: the next time it is new
                self._told.clear()
            return True
        wait_s = min(FIRST_WAIT_S * 2 ** min(message.num_tries, 20), LONGEST_WAIT_S)
        record.mark_failed(message.photo, error=failure, next_try_s=time.time() + wait_s, is_refused=is_refused)
        if failure not in self._told:
            self._told.add(failure)
            self.on_trouble(f"the webhook did not take a message: {failure}; it is tried again")
        return is_refused

    def _post(self, message: Message) -> tuple[str | None, bool]:
        """Why it was not taken, None if it was, and whether it was this very message that was refused."""
        request = urllib.request.Request(self.address, json.dumps(message.body).encode(), self.headers | {
            "Content-Type": "application/json", "Idempotency-Key": message.body["id"]}, method="POST")
        try:
            with _OPENER.open(request, timeout=TIMEOUT_S):
                return None, False
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP {error.code} {error.reason}", 400 <= error.code < 500 and error.code not in NOT_NOW
        except (OSError, http.client.HTTPException, ValueError) as error:
            return str(error) or type(error).__name__, False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST becomes a GET, which tells the receiver nothing: to us it is a failure."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.OpenerDirector()  # http and https alone: the usual opener also reads files
for _handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler(),
                 urllib.request.HTTPErrorProcessor(), urllib.request.HTTPDefaultErrorHandler(),
                 _NoRedirect()):  # fmt: skip
    _OPENER.add_handler(_handler)


def _address(address: str) -> tuple[str, dict[str, str]]:
    """The address without name and password, and the headers that carry them."""
    try:
        parts = urllib.parse.urlsplit(address)
        host, _ = parts.hostname, parts.port  # a port that is no number raises
    except ValueError as error:
        raise InTraError(f"the webhook's address cannot be read ({error}); expected e.g. https://host/path") from error
    if parts.scheme not in ("http", "https") or not host:
        raise InTraError("the webhook's address must begin with http:// or https:// and name a host, e.g. "
                         "https://host/path")
    if parts.username is None:
        return address, {}
    secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    return bare.geturl(), {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}
