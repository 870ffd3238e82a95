"""What engines that are servers share: a client that passes answers through, and a process that is started again."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import httpx2

from adapterhub.serve.served import Served
from adapterhub_converters.containers import json_file
from adapterhub_converters.display import printable
from adapterhub_converters.errors import FormatError, LocalIOError, RefusedError

from . import Answer, EngineDownError, words_of

log = logging.getLogger("adapterhub.serve.engine")
_CONNECT = 5.0  # seconds
_IDLE = 2.0  # seconds after which a connection is not used again: servers close them after five
_MANAGING = 120.0  # seconds for a request that loads or lists something
_DOCUMENT = 4 << 20  # bytes of an answer to one of our own requests
_PAUSES = (0.5, 1, 2, 5, 10, 30)  # seconds before an engine that has ended is started again
_STABLE = 60.0  # seconds after which a start counts as good
_POLL = 0.1
_LOOK = 30.0  # seconds between two looks whether an engine still answers
_EXCEPTIONS = ("Error: ", "Exception: ")
_ABOVE = "root cause above"  # how vLLM's own exception ends, after that of the process that failed
_INSTRUCTIONS = "It was built for another processor than this one; install another build"
_STOP = 10.0  # seconds that a process gets to end by itself


class Client:
    """Requests to one server, with its key if it has one."""

    def __init__(self, url: str, key: str = "") -> None:
        self.url, self._headers = url, {"authorization": f"Bearer {key}"} if key else {}
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=_IDLE)
        # Not httpx2's client, whose cookies, redirects and logins each request would wait for, and no proxy of the environment:
        # this is our own server.
        self._transport = httpx2.AsyncHTTPTransport(limits=limits, trust_env=False)

    async def close(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    async def ask(self, path: str, body: Mapping[str, Any], model: str = "") -> Answer:
        """Send a document, and return the answer as soon as it begins.

        Args:
            model: The name by which the server is asked, and which it repeats; empty for one that does not.
        """
        response = await self._sent("POST", path, {**body, "model": model} if model else body)
        kind = response.headers.get("content-type", "application/json")
        return Answer(response.status_code, kind, _pieces(response), response.aclose, model)

    async def call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """A request of our own: the status, and the document of the answer, or its text if it is none.

        Raises:
            EngineDownError: No answer.
        """
        response = await self._sent(method, path, body, _MANAGING)
        raw = b""
        async with contextlib.aclosing(_pieces(response)) as pieces:
            async for piece in pieces:
                raw += piece
                if len(raw) > _DOCUMENT:
                    raise EngineDownError(f"{path}: an answer of more than {_DOCUMENT} bytes")
        try:
            return response.status_code, json_file.parse(raw, path)
        except FormatError:
            return response.status_code, raw.decode(errors="replace")

    async def _sent(
        self, method: str, path: str, body: Mapping[str, Any] | None, seconds: float | None = None
    ) -> httpx2.Response:
        """What is answered to a request, as soon as it begins; by default an answer takes as long as it takes."""
        content = None if body is None else json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
        headers = self._headers if body is None else {**self._headers, "content-type": "application/json"}
        timeout = httpx2.Timeout(seconds, connect=_CONNECT).as_dict()
        request = httpx2.Request(method, self.url + path, headers=headers, content=content, extensions={"timeout": timeout})
        try:
            try:
                return await self._transport.handle_async_request(request)
            except (httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError):
                # The server has closed a connection that nobody used for a while, just when it was used again.
                return await self._transport.handle_async_request(request)
        except httpx2.HTTPError as error:
            raise EngineDownError(_reason(error)) from error

    async def answers(self, path: str) -> bool:
        """Return whether a path answers with success now."""
        with contextlib.suppress(EngineDownError):
            return (await self.call("GET", path))[0] == 200
        return False


async def base_name(client: Client, kind: str) -> str:
    """The name that a server has for its base; RefusedError, with `kind` in the hint, for one that lists no base."""
    status, document = await client.call("GET", "/v1/models")
    models = document.get("data", []) if status == 200 and isinstance(document, dict) else []
    names = [str(model["id"]) for model in models if not model.get("parent")]
    if not names:
        raise RefusedError(client.url, f"does not list its models ({words_of(document)})", f"Name {kind}")
    return names[0]


async def _pieces(response: httpx2.Response) -> AsyncGenerator[bytes]:
    try:
        async for piece in response.aiter_raw():
            yield piece
    except httpx2.HTTPError as error:
        raise EngineDownError(_reason(error)) from error
    finally:
        await response.aclose()


def _reason(error: Exception) -> str:
    return printable(str(error) or type(error).__name__)[:200]


# ---- processes


@dataclass
class Process:
    """A server that is started again whenever it ends or hangs, with all that it has started itself.

    Attributes:
        words: Its command line.
        environ: Its environment.
        ready: Asked until it returns True, after each start.
        begun: Called before each start: what the last process knew is gone.
        patience: Seconds until it must be ready.
        silence: Seconds without `ready` after which it hangs.
    """

    words: Sequence[str]
    environ: Mapping[str, str]
    ready: Callable[[], Awaitable[bool]]
    begun: Callable[[], object] = lambda: None
    patience: float = 600.0
    silence: float = 300.0
    up: bool = False
    _process: asyncio.subprocess.Process | None = field(default=None, repr=False)
    _watch: asyncio.Task[None] | None = field(default=None, repr=False)
    _last: deque[str] = field(default_factory=lambda: deque(maxlen=400), repr=False)

    async def start(self) -> None:
        """Start it and wait until it is ready; LocalIOError or RefusedError, with its last words, if it cannot be."""
        try:
            await self._begin()
        except BaseException:
            await self.close()
            raise
        self._watch = asyncio.create_task(self._keep(cast(asyncio.subprocess.Process, self._process)))

    def check(self) -> None:
        """EngineDownError while it is not ready."""
        if not self.up:
            raise EngineDownError("the engine has ended, and is being started again", 5)

    async def close(self) -> None:
        """End it."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        self.up = False
        if self._process is not None:
            await _end(self._process)

    async def _begin(self) -> None:
        self.begun()
        self._last.clear()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(self.environ),
                start_new_session=True,  # it has processes of its own, which end with it
                preexec_fn=_ends_with_us,
            )
        except OSError as error:
            raise LocalIOError(self.words[0], error.strerror or str(error)) from error
        reading = asyncio.create_task(self._read(cast(asyncio.StreamReader, self._process.stdout)))
        deadline = asyncio.get_running_loop().time() + self.patience
        while not await self.ready():
            if self._process.returncode is not None:
                await asyncio.wait([reading], timeout=1)
                what = f"{_how(self._process.returncode)} before it was ready: {self._words()}"
                raise RefusedError(self.words[0], what, _INSTRUCTIONS if self._process.returncode == -signal.SIGILL else "")
            if asyncio.get_running_loop().time() > deadline:
                raise RefusedError(self.words[0], f"is not ready after {self.patience:.0f} seconds: {self._words()}")
            await asyncio.sleep(_POLL)
        self.up = True

    def _words(self) -> str:
        """The last exception, with the line below that belongs to it, or else the last words that look like a reason."""
        lines = [line for line in self._last if line and _ABOVE not in line]
        marks = ("error", "fail", "unable", "cannot", "invalid")
        found = [number for number, line in enumerate(lines) if any(mark in line for mark in _EXCEPTIONS)]
        found = found or [number for number, line in enumerate(lines) if any(mark in line.lower() for mark in marks)]
        if not found:
            return lines[-1] if lines else "it said nothing"
        first, *below = lines[found[-1] : found[-1] + 2]
        return " ".join([first, *(line.strip() for line in below if line.startswith("  ") or first.rstrip().endswith(":"))])

    async def _read(self, log_of: asyncio.StreamReader) -> None:
        """Take its log; a line without an end is cut."""
        rest = b""
        while piece := await log_of.read(1 << 16):
            *lines, rest = (rest + piece).split(b"\n")
            rest = rest[-4096:]
            for line in lines:
                text = printable(line[:1000].decode(errors="replace"))
                self._last.append(text[:300])
                log.debug("%s", text)

    async def _keep(self, process: asyncio.subprocess.Process) -> None:
        """Start it again when it ends, forever, less and less often."""
        tries = 0
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            code = await self._end_of(process)
            self.up = False
            tries = 0 if clock() - began > _STABLE else tries
            log.error("the engine %s (%s); starting it again", _how(code), self._words())
            await _end(process)
            while not self.up:
                await asyncio.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
                tries += 1
                try:
                    await self._begin()
                    log.info("the engine answers again")
                except (LocalIOError, RefusedError) as error:
                    log.error("%s", error)
                    if self._process is not None:
                        await _end(self._process)
            process = cast(asyncio.subprocess.Process, self._process)

    async def _end_of(self, process: asyncio.subprocess.Process) -> int:
        """Wait until a process ends, and end one that hangs; return its exit code."""
        ended, clock = asyncio.ensure_future(process.wait()), asyncio.get_running_loop().time
        heard = clock()
        try:
            while not (await asyncio.wait([ended], timeout=min(_LOOK, self.silence / 2)))[0]:
                if await self.ready():
                    heard = clock()
                elif clock() - heard > self.silence:
                    log.error("the engine has not answered for %.0f seconds; ending it", clock() - heard)
                    await _end(process)
            return ended.result()
        finally:
            ended.cancel()


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a process and all in its group."""
    _signal(process, signal.SIGTERM)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), _STOP)
    _signal(process, signal.SIGKILL)
    await process.wait()


def _how(code: int) -> str:
    """How a process ended: its exit code, or the name of the signal."""
    names = {one.value: one.name for one in signal.Signals}
    return f"ended with {code}" if code >= 0 else f"was ended by {names.get(-code, f'signal {-code}')}"


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _ends_with_us() -> None:
    """Have the kernel end an engine whose gateway was killed (prctl(2)); it would hold the memory of a model for nobody."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


# ---- engines


class Server:
    """What engines that are one server share. `process` is None for somebody's own, which is neither started nor ended here."""

    keeps = False

    def __init__(self, client: Client, process: Process | None = None) -> None:
        self.client, self.process = client, process

    async def start(self) -> None:
        """Start it."""
        if self.process is not None:
            await self.process.start()

    async def close(self) -> None:
        """End it, unless it is somebody's own."""
        if self.process is not None:
            await self.process.close()
        await self.client.close()

    async def healthy(self) -> bool:
        """Return whether it answers."""
        return (self.process is None or self.process.up) and await self.client.answers("/health")

    def check(self) -> None:
        """EngineDownError while it is being started again."""
        if self.process is not None:
            self.process.check()

    async def forget(self, served: Served) -> None:
        """Nothing, where a server forgets by itself, or never."""
