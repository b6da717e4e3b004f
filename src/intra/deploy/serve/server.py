"""The server's process: socket, signals, and connections that may not be slow."""

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from intra.deploy.serve.app import create_app
from intra.deploy.serve.guard import check_token, is_loopback
from intra.deploy.serve.limits import Limits
from intra.errors import InTraError
from intra.inspection.detector import Detector
from intra.inspection.model_file import MODEL_FILE

__all__ = ["bound_socket", "make_server", "run_server"]

STOP_S = 30  # for answers that are under way when the server is told to stop
UNSENT_BYTES = 128 * 1024  # that the system takes ahead; by default megabytes, in lumps between which nothing moves


def run_server(
    run: str | Path, *, host: str, port: int, token: str | None, limits: Limits | None, device: str,
    threshold: float | None, false_reject_rate: float | None, on_ready: Callable[[str], None] | None,
) -> None:  # fmt: skip
    """As `intra.deploy.serve.serve`, which says what for."""
    limits = limits or Limits()
    token = None if token is None else check_token(token)
    with bound_socket(host, port, may_be_reached=token is not None) as listener:  # first: it fails at once
        detector = Detector.load(run, device=device, threshold=threshold, false_reject_rate=false_reject_rate)
        path = Path(run).resolve()
        name = path.name if path.is_dir() else path.parent.name if path.name == MODEL_FILE else path.stem
        app = create_app(detector, name=name, token=token, limits=limits)
        server = make_server(app, limits, on_ready=partial(on_ready, _address(listener)) if on_ready else None)
        with _stopped_by_signals():
            server.run([listener])


def make_server(app: ASGIApp, limits: Limits, *, on_ready: Callable[[], None] | None = None) -> uvicorn.Server:
    """The server of an application, to be `run` with sockets that listen."""
    return _Server(uvicorn.Config(
        app, loop="asyncio", http=HastyProtocol.within(limits), ws="none", lifespan="on", log_config=None,
        log_level="warning", access_log=False, server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=STOP_S,
    ), on_ready)  # fmt: skip


@contextmanager
def bound_socket(host: str, port: int, *, may_be_reached: bool) -> Iterator[socket.socket]:
    """A socket that listens. Raises InTraError if others can reach the host though they may not, or it is in use."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError, UnicodeError) as error:
        raise InTraError(f"{host} is no host of this machine; pass --host 127.0.0.1, or 0.0.0.0 for every address"
                         ) from error
    family, kind, protocol, _, address = found[0]
    if not may_be_reached and not is_loopback(str(address[0])):
        raise InTraError(f"others can reach {host}, so a token is needed: set INTRA_TOKEN, or pass --token-file FILE; "
                         "or serve this machine alone with --host 127.0.0.1")
    with socket.socket(family, kind, protocol) as listener:
        if hasattr(signal, "SIGHUP"):  # on Windows this option lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(128)
        except (OSError, OverflowError) as error:
            in_use = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            reason = "is in use" if in_use else f"cannot be bound ({getattr(error, 'strerror', None) or error})"
            raise InTraError(f"port {port} of {host} {reason}; pass another --port") from error
        yield listener


class _Server(uvicorn.Server):
    """Says when it answers."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None] | None) -> None:
        super().__init__(config)
        self.on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.on_ready is not None and self.started:
            self.on_ready()


class HastyProtocol(H11Protocol):
    """Drops connections that are too many, that send no whole head in time, that go on sending what was refused, or
    that take nothing of their answer.

    uvicorn itself waits for ever for a head that has begun, and for a client that stopped reading.
    """

    limits = Limits()
    deadline: asyncio.TimerHandle | None = None  # of the client's sending
    next_look: asyncio.TimerHandle | None = None  # at what it has not taken yet

    @classmethod
    def within(cls, limits: Limits) -> "type[HastyProtocol]":
        """The protocol with these limits: uvicorn itself makes one for each connection, and takes a class."""
        return type(cls.__name__, (cls,), {"limits": limits})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)  # so that writing is paused, and nothing added, until all is taken
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        if len(self.connections) > self.limits.connections:
            transport.abort()
        else:
            self._set_deadline(self.limits.header_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        answered = self.cycle is not None and self.cycle.response_complete
        if self.conn.their_state is not h11.IDLE and not (answered and self.conn.their_state is h11.SEND_BODY):
            self._set_deadline(None)
        elif self.deadline is None:  # a head, or what is left of a body that was refused and is thrown away
            self._set_deadline(self.limits.header_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._look_no_more()

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_deadline(None)
        self._look_no_more()
        super().connection_lost(exc)

    def _look_later(self) -> None:
        left = self.transport.get_write_buffer_size()
        self.next_look = self.loop.call_later(self.limits.stalled_s, self._look, left)

    def _look(self, left_before: int) -> None:
        if self.transport.get_write_buffer_size() >= left_before:
            self.transport.abort()
        else:
            self._look_later()

    def _look_no_more(self) -> None:
        if self.next_look is not None:
            self.next_look.cancel()

    def _set_deadline(self, seconds: float | None) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """uvicorn stops at SIGINT and SIGTERM and then raises them again: to end so is no error."""
    try:
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: no signals there
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
