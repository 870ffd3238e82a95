"""What all server engines share: a process that is restarted, and adapters that are loaded by name."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Any, cast
from weakref import WeakValueDictionary

from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.display import printable
from adapterhub_converters.errors import LocalIOError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import EngineAnswer, EngineDownError
from .engine_client import Client, Connection
from .line_cutter import LineCutter

log = logging.getLogger("adapterhub.serve.engine")
_PAUSES = (0.5, 1, 2, 5, 10, 30)  # seconds before an engine that has ended is restarted, longer each time
_STABLE = 60.0  # seconds after which a start counts as successful
_POLL = 0.1  # seconds between two checks while an engine starts
_LOOK_SECONDS = 30.0  # seconds between two checks whether an engine still answers
_EXCEPTIONS = ("Error: ", "Exception: ")
_ABOVE_MARK = "root cause above"  # how vLLM's own exception ends, after that of the process that failed
_PROCESSOR_HINT = "It was built for another processor than this one; install another build"
UNAVAILABLE = (502, 503)
"""The statuses of a server that is not available, or of a proxy in front of one."""
_STOP_SECONDS = 10.0  # seconds that a process gets to end by itself


# ---- processes


@dataclass
class Process:
    """A server process that is restarted, with its child processes, whenever it ends or hangs.

    Attributes:
        words: Its command line.
        environ: Its environment.
        ready: Called after each start until it returns True.
        before_start: Called before each start, because what the last process knew is gone.
        patience: Seconds until it must be ready.
        silence: Seconds without `ready` after which it counts as hanging.
        death_signal: What the kernel sends it when the gateway is killed.
    """

    words: Sequence[str]
    environ: Mapping[str, str]
    ready: Callable[[], Awaitable[bool]]
    before_start: Callable[[], object] = lambda: None
    patience: float = 600.0
    silence: float = 300.0
    death_signal: signal.Signals = signal.SIGTERM
    up: bool = False
    _process: asyncio.subprocess.Process | None = field(default=None, repr=False)
    _watch: asyncio.Task[None] | None = field(default=None, repr=False)
    _last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=400), repr=False)

    async def start(self) -> None:
        """Start it and wait until it is ready; LocalIOError or RefusedError, with its last output, if it fails."""
        try:
            await self._spawn()
        except BaseException:
            await self.close()
            raise
        self._watch = asyncio.create_task(self._supervise(cast(asyncio.subprocess.Process, self._process)))

    def check(self) -> None:
        """Raise EngineDownError while it is not ready."""
        if not self.up:
            raise EngineDownError("the engine has ended, and is being started again", 5)

    async def close(self) -> None:
        """Stop it."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        self.up = False
        if self._process is not None:
            await _terminate(self._process)

    async def _spawn(self) -> None:
        """Start a process and wait until it is ready."""
        self.before_start()
        self._last_lines.clear()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self.words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(self.environ),
                start_new_session=True,  # its own process group, so that its child processes can be ended with it
                preexec_fn=partial(_end_with_parent, self.death_signal),
            )
        except OSError as error:
            raise LocalIOError(self.words[0], error.strerror or str(error)) from error
        reading = asyncio.create_task(self._read(cast(asyncio.StreamReader, self._process.stdout)))
        deadline = asyncio.get_running_loop().time() + self.patience
        while not await self.ready():
            if self._process.returncode is not None:
                await asyncio.wait([reading], timeout=1)
                problem = f"{_exit_text(self._process.returncode)} before it was ready: {self._failure_text()}"
                raise RefusedError(
                    self.words[0], problem, _PROCESSOR_HINT if self._process.returncode == -signal.SIGILL else ""
                )
            if asyncio.get_running_loop().time() > deadline:
                raise RefusedError(self.words[0], f"is not ready after {self.patience:.0f} seconds: {self._failure_text()}")
            await asyncio.sleep(_POLL)
        self.up = True

    def _failure_text(self) -> str:
        """Return the last exception in its output, with the next line if that belongs to it, or the last line that looks like a
        cause.
        """
        lines = [line for line in self._last_lines if line and _ABOVE_MARK not in line]
        marks = ("error", "fail", "unable", "cannot", "invalid")
        matches = [number for number, line in enumerate(lines) if any(mark in line for mark in _EXCEPTIONS)]
        matches = matches or [number for number, line in enumerate(lines) if any(mark in line.lower() for mark in marks)]
        if not matches:
            return lines[-1] if lines else "it said nothing"
        # A message that ends with a colon, or is followed by an indented line, continues there.
        first, *below = lines[matches[-1] : matches[-1] + 2]
        return " ".join([first, *(line.strip() for line in below if line.startswith("  ") or first.rstrip().endswith(":"))])

    async def _read(self, output: asyncio.StreamReader) -> None:
        """Collect its output, cutting off overlong lines."""
        cutter = LineCutter()
        while piece := await output.read(1 << 16):
            lines = cutter.cut(piece)
            # A progress bar may write megabytes without a line break.
            cutter.remainder = cutter.remainder[-4096:]
            for line in lines:
                text = printable(line[:1000].decode(errors="replace"))
                self._last_lines.append(text[:300])
                log.debug("%s", text)

    async def _supervise(self, process: asyncio.subprocess.Process) -> None:
        """Restart it whenever it ends, forever, with growing pauses."""
        tries = 0
        clock = asyncio.get_running_loop().time
        while True:
            started = clock()
            code = await self._wait_for_end(process)
            self.up = False
            tries = 0 if clock() - started > _STABLE else tries
            log.error("the engine %s (%s); starting it again", _exit_text(code), self._failure_text())
            await _terminate(process)
            while not self.up:
                await asyncio.sleep(_PAUSES[min(tries, len(_PAUSES) - 1)])
                tries += 1
                try:
                    await self._spawn()
                    log.info("the engine answers again")
                except (LocalIOError, RefusedError) as error:
                    log.error("%s", error)
                    if self._process is not None:
                        await _terminate(self._process)
            process = cast(asyncio.subprocess.Process, self._process)

    async def _wait_for_end(self, process: asyncio.subprocess.Process) -> int:
        """Wait until a process ends, terminating one that hangs; return its exit code."""
        ended, clock = asyncio.ensure_future(process.wait()), asyncio.get_running_loop().time
        last_answer = clock()
        try:
            while not (await asyncio.wait([ended], timeout=min(_LOOK_SECONDS, self.silence / 2)))[0]:
                if await self.ready():
                    last_answer = clock()
                elif clock() - last_answer > self.silence:
                    log.error("the engine has not answered for %.0f seconds; ending it", clock() - last_answer)
                    await _terminate(process)
            return ended.result()
        finally:
            ended.cancel()


async def _terminate(process: asyncio.subprocess.Process) -> None:
    """Terminate a process and all others in its group."""
    _signal_group(process, signal.SIGTERM)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.wait(), _STOP_SECONDS)
    _signal_group(process, signal.SIGKILL)
    await process.wait()


def _exit_text(code: int) -> str:
    """Describe how a process ended: its exit code, or the name of the signal."""
    names = {sig.value: sig.name for sig in signal.Signals}
    return f"ended with {code}" if code >= 0 else f"was ended by {names.get(-code, f'signal {-code}')}"


def _signal_group(process: asyncio.subprocess.Process, number: int) -> None:
    """Send a signal to the process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def _end_with_parent(number: signal.Signals) -> None:
    """Let the kernel end the engine when the gateway is killed (prctl(2)), so that it does not keep a model in memory."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, number)


# ---- engines


class Server:
    """The parts of an `Engine` that all servers share.

    `process` is None for the user's own server, which is neither started nor stopped here.
    """

    rereads_files = has_priorities = False
    context, precision = 0, ""

    def __init__(self, client: Client, process: Process | None = None) -> None:
        self.client, self.process = client, process

    @property
    def probabilities(self) -> Mapping[str, float]:
        """The logarithms of the probabilities of its base for a fixed prompt; empty if they are not known."""
        return {}

    async def start(self) -> None:
        """Start it."""
        if self.process is not None:
            await self.process.start()

    async def join(self) -> None:
        """Use the process that another process of this gateway has started, and watches."""
        self.process = None
        await self.start()

    async def close(self) -> None:
        """Stop it, unless it is the user's own, or another process's."""
        if self.process is not None:
            await self.process.close()
        await self.client.close()

    async def healthy(self) -> bool:
        """Return whether it answers."""
        return (self.process is None or self.process.up) and await self.client.answers("/health")

    def check(self) -> None:
        """Raise EngineDownError while it is being restarted."""
        if self.process is not None:
            self.process.check()

    async def forget(self, served: PreparedVersion) -> None:
        """Do nothing, for servers that forget by themselves, or never."""

    def pin(self, models: frozenset[str]) -> None:
        """Do nothing: servers have no such request."""


class LoadingServer(Server, ABC):
    """A server that loads adapters by name while it runs, and forgets all of them when it is restarted."""

    def __init__(self, client: Client, process: Process | None = None) -> None:
        super().__init__(client, process)
        self._loaded: set[str] = set()
        self._load_steps: Counter[str] = Counter()  # begun and ended loads, by name
        # One for each name, so that a slow load holds up no other version.
        self._loading: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        if process is not None:
            process.before_start = self._loaded.clear

    @abstractmethod
    async def load(self, name: str, folder: Path) -> None:
        """Load an adapter under a name; RefusedError if the server cannot."""

    async def ensure(self, served: PreparedVersion) -> None:
        """Load the version, unless the server has it."""
        self.check()
        await self._ensure_loaded(served.model, served.path)

    async def _ensure_loaded(self, name: str, folder: Path) -> None:
        if name in self._loaded:
            return
        async with self._lock_of(name):
            if name not in self._loaded:
                self._load_steps[name] += 1
                await self.load(name, folder)
                self._load_steps[name] += 1
                self._loaded.add(name)

    def _lock_of(self, name: str) -> asyncio.Lock:
        """Return the lock for loading and unloading a name."""
        return self._loading.setdefault(name, asyncio.Lock())

    async def request_loaded(self, send: Callable[[], Awaitable[EngineAnswer]], name: str, folder: Path) -> EngineAnswer:
        """Send a request for a loaded adapter; if the server has forgotten it since, load it and ask once more."""
        steps = self._load_steps[name]
        answer = await send()
        if answer.status not in (400, 404) or not steps:
            return answer
        is_listed = any(model["id"] == name for model in await models_of(self.client))
        # Another request may have noticed first: then its load has begun or ended since this one was asked.
        if is_listed and name in self._loaded and steps == self._load_steps[name]:
            return answer
        await answer.close()
        if not is_listed:
            log.warning("the engine has forgotten %s; loading it again", name)
            self._loaded.discard(name)
        await self._ensure_loaded(name, folder)
        return await send()


def check_available(status: int, what: str) -> None:
    """Raise EngineDownError for the status of a server that is not available, or of a proxy in front of it."""
    if status in UNAVAILABLE:
        raise EngineDownError(f"{what} was answered with {status}")


async def models_of(client: Client | Connection) -> list[dict[str, Any]]:
    """Return the models that a server lists: its base, and adapters of it; an empty list if it answers otherwise."""
    status, document = await client.call("GET", "/v1/models")
    models = document.get("data") if status == 200 and isinstance(document, dict) else None
    return [model for model in models if isinstance(model, dict) and "id" in model] if isinstance(models, list) else []
