"""A server of a small model inside the test's own process, for tests that need real sockets."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp

from intra.deploy.serve.limits import Limits
from intra.deploy.serve.server import bound_socket, make_server


@contextmanager
def served(app: ASGIApp, limits: Limits | None = None) -> Iterator[tuple[str, int]]:
    """Serves in a thread; yields host and port; ends as at Ctrl-C."""
    ready = threading.Event()
    with bound_socket("127.0.0.1", 0, may_be_reached=False) as listener:
        address: tuple[str, int] = listener.getsockname()
        server = make_server(app, limits or Limits(), on_ready=ready.set)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert ready.wait(30)
            yield address
        finally:
            server.should_exit = True
            thread.join(30)


def exchange(address: tuple[str, int], sent: bytes, timeout_s: float = 10) -> bytes:
    """All that comes back, until the server closes or is silent for too long."""
    with socket.create_connection(address, timeout=timeout_s) as client:
        client.sendall(sent)
        answer = b""
        try:
            while part := client.recv(65536):
                answer += part
        except ConnectionResetError:
            pass
        return answer
