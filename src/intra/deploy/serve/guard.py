"""Who may ask, and what every answer carries: an ASGI layer around the whole application.

Without a token the server is for this machine alone: it binds to a loopback address, and it answers only to loopback
names, so that no web page can reach it through a name that it points there (DNS rebinding). With a token every route
needs it. No page of another origin may post, and no answer allows one to read (no CORS headers).
"""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import json
import logging
from collections.abc import Iterable
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from intra.deploy.serve.metrics import Metrics
from intra.errors import InTraError

__all__ = ["FAILED", "LEAST_TOKEN", "Guard", "check_token", "is_loopback"]

LEAST_TOKEN = 16  # characters: nobody guesses one over a network
FAILED = "the server failed; its log says why"
UNMATCHED = "other"  # the route of what no route takes: paths that clients invent must not fill the metrics
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
                               "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
_log = logging.getLogger(__name__)


def check_token(token: str) -> str:
    """The token without white space around it. Raises InTraError for one that could be guessed or not be sent."""
    token = token.strip()
    if len(token) < LEAST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise InTraError(f"the token has {len(token)} characters; expected at least {LEAST_TOKEN} printable ASCII ones "
                         "without spaces, e.g. from: python -c 'import secrets; print(secrets.token_urlsafe())'")
    return token


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine alone."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses who may not ask, before anything of the body is read; puts the security headers on every answer; and
    turns whatever goes wrong inside into an answer that says nothing of the inside."""

    def __init__(self, app: ASGIApp, *, token: str | None, metrics: Metrics) -> None:
        self.app = app
        self.digest = None if token is None else _digest(token.encode())
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = ended = False

        async def send_guarded(message: Message) -> None:
            nonlocal started, ended
            ended = message["type"] == "http.response.body" and not message.get("more_body", False)
            if message["type"] == "http.response.start":
                started = True
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(
                    (name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in present)]
                route = getattr(scope.get("route"), "path", UNMATCHED)
                self.metrics.requests[route, message["status"]] += 1
            await send(message)

        refusal = self._refusal(scope)
        if refusal is not None:
            await _answer(send_guarded, *refusal)
            return
        try:
            await self.app(scope, receive, send_guarded)
        except Exception:
            _log.exception("%s %s failed", scope["method"], getattr(scope.get("route"), "path", UNMATCHED))
            if not started:
                await _answer(send_guarded, HTTPStatus.INTERNAL_SERVER_ERROR, FAILED)
            elif not ended:
                raise  # the connection is closed: half an answer must not look whole

    def _refusal(self, scope: Scope) -> tuple[HTTPStatus, str] | None:
        """Why this request is not answered, if so."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get(b"host", "")
        if self.digest is None:
            if not is_loopback(urlsplit(f"//{host}").hostname or "" if _is_netloc(host) else ""):
                return (HTTPStatus.MISDIRECTED_REQUEST,
                        "without a token this server answers to localhost and loopback addresses alone")
        elif not any(hmac.compare_digest(self.digest, _digest(given)) for given in _credentials(headers)):
            return HTTPStatus.UNAUTHORIZED, "a token is needed: Authorization: Bearer TOKEN, or TOKEN as the password"
        origin = headers.get(b"origin")
        if origin is not None and (origin == "null" or _netloc(origin) != host.lower()):
            return HTTPStatus.FORBIDDEN, "pages of another origin may not ask"
        return None


def _digest(token: bytes) -> bytes:
    """Of one length for every token, so that the time of the comparison tells nothing."""
    return hashlib.sha256(token).digest()


def _credentials(headers: dict[bytes, str]) -> Iterable[bytes]:
    """The token as a bearer, or as the password of any user: browsers ask for that."""
    scheme, _, value = headers.get(b"authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        yield value.strip().encode("latin-1")
    elif scheme.lower() == "basic":
        try:
            yield base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return


def _netloc(origin: str) -> str | None:
    """Host and port, or None for what is no address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _is_netloc(host: str) -> bool:
    try:
        urlsplit(f"//{host}").port  # noqa: B018  reading it checks it
    except ValueError:
        return False
    return "/" not in host and "@" not in host


async def _answer(send: Send, status: HTTPStatus, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b'Basic realm="intra", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body})
