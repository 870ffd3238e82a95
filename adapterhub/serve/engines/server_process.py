"""The process of a server engine, which is restarted whenever it ends or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import cast

from adapterhub_converters.display import printable
from adapterhub_converters.errors import LocalIOError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from . import EngineDownError
from .line_cutter import LineCutter

log = logging.getLogger("adapterhub.serve.engine")
_PAUSES = (0.5, 1, 2, 5, 10, 30)  # seconds before an engine that has ended is restarted, longer each time
_STABLE = 60.0  # seconds after which a start counts as successful
_POLL = 0.1  # seconds between two checks while an engine starts
_LOOK_SECONDS = 30.0  # seconds between two checks whether an engine still answers
_EXCEPTIONS = ("Error: ", "Exception: ")
_ABOVE_MARK = "root cause above"  # how vLLM's own exception ends, after that of the process that failed
_PROCESSOR_HINT = "It was built for another processor than this one; install another build"
_STOP_SECONDS = 10.0  # seconds that a process gets to end by itself


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
