"""A request's photo: read within limits of size, time and memory, from a plain or a multipart body."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from fastapi import HTTPException, Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from intra.deploy.serve.limits import MIB, Limits

__all__ = ["Intake", "Upload", "plain_name"]

LONGEST_NAME = 200  # characters
MOST_FIELDS = 20  # of a form, beside its file
_RETRY = {"Retry-After": "2"}


class Upload(NamedTuple):
    """A file as it was sent."""

    data: bytes
    name: str  # for people: never a path


class Intake:
    """Reads bodies; all that are held at a time have a bound in common, so slow clients cannot fill the memory."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held_bytes = 0

    @contextmanager
    def held(self) -> "Iterator[Held]":
        """What one request holds, until the end of the block."""
        held = Held(self)
        try:
            yield held
        finally:
            self.held_bytes -= held.num_bytes

    async def read(self, request: Request, held: "Held") -> Upload:
        """The photo of a request. Raises HTTPException: 400, 408, 413, 415 or 503."""
        try:
            async with asyncio.timeout(self.limits.upload_s):
                body = await self._body(request, held)
        except TimeoutError as error:
            raise HTTPException(408, f"the upload took more than {self.limits.upload_s:g} s") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the upload was broken off") from error
        kind, options = parse_options_header(request.headers.get("content-type", ""))
        if kind == b"multipart/form-data":
            return await run_in_threadpool(_first_file, body, options.get(b"boundary", b""))
        if kind == b"application/x-www-form-urlencoded" and not body:
            raise HTTPException(415, "send the photo as the body, or as the file of a multipart form")
        return Upload(body, plain_name(request.query_params.get("name", "")))

    async def _body(self, request: Request, held: "Held") -> bytes:
        stated = request.headers.get("content-length", "0")
        if stated.isdecimal() and int(stated) > self.limits.body_bytes:
            raise self._too_large()
        body = bytearray()
        async for chunk in request.stream():
            if len(body) + len(chunk) > self.limits.body_bytes:
                raise self._too_large()
            held.add(len(chunk))
            body += chunk
        return bytes(body)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the upload is larger than {self.limits.body_bytes / MIB:.4g} MiB")


class Held:
    """The bytes that one request holds."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Raises HTTPException 503 if all requests together would hold too many."""
        if self.intake.held_bytes + num_bytes > self.intake.limits.received_bytes:
            raise HTTPException(503, "too many uploads at a time; try again", _RETRY)
        self.intake.held_bytes += num_bytes
        self.num_bytes += num_bytes


def plain_name(name: str) -> str:
    r"""A name without folders and control characters, at most 200 characters; "photo" if nothing is left.

    It is shown and returned, never opened: no file is read or written under it.

    >>> plain_name("../../etc/passwd"), plain_name("C:\\photos\\a.png"), plain_name("..")
    ('passwd', 'a.png', 'photo')
    """
    last = re.split(r"[/\\]", name)[-1]
    clean = "".join(char for char in last if char.isprintable()).strip()[:LONGEST_NAME]
    return clean if clean.strip(".") else "photo"


def _first_file(body: bytes, boundary: bytes) -> Upload:
    """The only file of a multipart body. Raises HTTPException 400 if there is none, at the second one, and at too many
    fields."""
    files: list[Upload] = []
    num_fields = 0

    def count(field: Field) -> None:
        nonlocal num_fields
        num_fields += 1
        if num_fields > MOST_FIELDS:
            raise HTTPException(400, f"the form has more than {MOST_FIELDS} fields; send the photo alone")

    def keep(file: File) -> None:
        if files:
            raise HTTPException(400, "expected one file in the form, found more; send one photo a request")
        file.file_object.seek(0)
        files.append(Upload(file.file_object.read(), plain_name((file.file_name or b"").decode("utf-8", "replace"))))
        file.close()

    try:
        parser = FormParser("multipart/form-data", count, keep, boundary=boundary,
                            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1})  # never a temporary file
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise HTTPException(400, "the multipart form is damaged") from error
    if not files:
        raise HTTPException(400, "expected one file in the form, found none")
    return files[0]
