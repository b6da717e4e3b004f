"""Connections that are slow, stalled or too many, with real sockets and an application that only answers."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from serving import exchange, served

from intra.deploy.serve.limits import Limits

SIZE = 16 * 2**20  # bytes of an answer: more than the system's own buffers take
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def answer(scope, receive, send):
    if scope["type"] == "lifespan":
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})
        return
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % SIZE)]})
    await send({"type": "http.response.body", "body": bytes(SIZE)})


@contextmanager
def reader(address: tuple[str, int]) -> Iterator[socket.socket]:
    """A client with a small buffer of its own."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        client.settimeout(10)
        client.connect(address)
        yield client


def taken(client: socket.socket, most: int) -> int:
    """How many bytes come, until the end or the server's."""
    count = 0
    try:
        while count < most and (part := client.recv(min(65536, most - count))):
            count += len(part)
    except ConnectionResetError:
        pass
    return count


def test_who_takes_the_answer_slowly_gets_all_of_it():
    with served(answer, limits := Limits(stalled_s=1.0)) as address, reader(address) as client:
        client.sendall(GET)
        start, count = time.monotonic(), 0
        while time.monotonic() - start < 4 * limits.stalled_s:
            count += taken(client, 50_000)
            time.sleep(0.1)
        assert count < SIZE / 4
        assert count + taken(client, SIZE - count) == SIZE


@pytest.mark.parametrize("later", [b"", GET])
def test_who_does_not_take_the_answer_is_dropped(later):
    with served(answer, limits := Limits(stalled_s=0.5)) as address, reader(address) as client:
        client.sendall(GET)
        time.sleep(0.5 * limits.stalled_s)
        client.sendall(later)  # to ask for more is not to take
        time.sleep(5 * limits.stalled_s)
        assert taken(client, SIZE) < SIZE


def test_more_connections_than_are_allowed_are_dropped():
    with served(answer, Limits(connections=2)) as address, reader(address) as first:
        with reader(address) as second:
            for client in (first, second):
                client.sendall(GET)
                assert taken(client, 1000) == 1000
            assert exchange(address, GET) == b""
        time.sleep(0.3)
        assert len(exchange(address, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))) > SIZE
