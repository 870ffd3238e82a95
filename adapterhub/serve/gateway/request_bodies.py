"""Bodies of requests: read within limits, and held within a budget for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError

from .problems import BUSY, ProblemError

_BODY_SECONDS = 60.0  # until the whole body must have arrived
_MEMORY = 8  # memory of a parsed document, as a multiple of the largest body
_PARSED_IN_THREAD = 64 << 10  # bytes; larger bodies are parsed in a thread, so that other requests go on


class BodyBudget:
    """A budget for the bytes of all bodies that are being read or answered."""

    def __init__(self, most: int) -> None:
        self._most, self._used = most, 0

    def take(self, count: int) -> None:
        """Take a number of bytes; ProblemError if the budget does not allow it."""
        if self._used + count > self._most:
            raise ProblemError(429, "The gateway has too many large requests", code=BUSY, seconds=2)
        self._used += count

    def give(self, count: int) -> None:
        """Give back bytes that were taken."""
        self._used -= count


@asynccontextmanager
async def open_body(request: Request, most: int) -> AsyncIterator[Mapping[str, Any]]:
    """Read the JSON object of at most `most` bytes in a request; its bytes count until the context ends.

    Raises:
        ProblemError: It is too large, too slow or malformed, or there are too many large ones.
    """
    budget: BodyBudget = request.app.state.bodies
    raw = bytearray()
    try:
        await _read(request, raw, budget, most)
        yield await _document(raw, most)
    finally:
        budget.give(len(raw))
        raw.clear()  # now, not when the garbage collector finds an error that refers to it


async def _read(request: Request, raw: bytearray, budget: BodyBudget, most: int) -> None:
    """Read a body into `raw`; ProblemError for one that is too large or too slow."""
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length[:20]) > most:
        raise _too_large(most)
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                if len(raw) + len(piece) > most:
                    raise _too_large(most)
                # Counted as it arrives, because a client may declare another length, or none.
                budget.take(len(piece))
                raw += piece
    except TimeoutError as error:
        raise ProblemError(408, f"The body took more than {_BODY_SECONDS:.0f} seconds", code="timeout") from error


def _too_large(most: int) -> ProblemError:
    return ProblemError(413, f"A body has at most {most:,} bytes", code="too_large")


async def _document(raw: bytearray, most: int) -> Mapping[str, Any]:
    """Parse a body as a JSON object; ProblemError for a malformed one."""

    def parse() -> dict[str, Any]:
        return json_file.parse_object(bytes(raw), "body", memory=_MEMORY * most)

    try:
        return parse() if len(raw) < _PARSED_IN_THREAD else await asyncio.to_thread(parse)
    except FormatError as error:
        raise ProblemError(400, str(error), code="invalid_json") from error


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do some work, but cancel it and raise ClientDisconnect if the client closes the connection before it is done."""

    async def wait_for_disconnect() -> None:
        """Wait until the client has disconnected."""
        while (await receive())["type"] != "http.disconnect":
            pass

    working, disconnect = asyncio.create_task(work), asyncio.create_task(wait_for_disconnect())
    try:
        await asyncio.wait({working, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        disconnect.cancel()
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError, Exception):  # codespell:ignore
                await working
