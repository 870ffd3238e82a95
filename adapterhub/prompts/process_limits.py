"""Processes with limits on time and memory that run untrusted templates and expressions.

A chat template may loop forever or write `'a' * 10**10`, and a tokenizer's regular expression may backtrack in a billion ways.
Counting steps inside an interpreter or a library stops only some of that; the limits of a process stop all of it. One process
is started for each template or tokenizer (`limited_process`).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

_PROCESS = Path(__file__).with_name("limited_process.py")
MEMORY = 1 << 30  # bytes, for the process as a whole


class LimitExceededError(Exception):
    """A request that took more time or memory than allowed."""


class Process:
    """A process for one template or tokenizer, usable from any thread; each request and each answer is one line of JSON.

    It starts at the first request, and again at the next one if it has ended.

    Args:
        kind: The kind of `source`.
        source: The text of the template, or of a tokenizer.json.
    """

    def __init__(self, kind: Literal["template", "tokenizer"], source: str) -> None:
        self._kind, self._source = kind, source
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def request(self, value: Any, seconds: int) -> Any:
        """Return the answer for one value: a rendered text or its measures, or an empty text once the text `value` was split.

        Args:
            seconds: The limit on processor time.

        Raises:
            ValueError: The template or tokenizer fails.
            LimitExceededError: The request exceeded a limit, and the process has ended.
        """
        (answer,) = self.request_all([value], seconds, seconds)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def request_all(self, values: Sequence[Any], seconds: int, all_seconds: int) -> list[Any]:
        """Return an answer, or what `request` would raise, for each value.

        The last answer is a LimitExceededError if a value exceeded a limit, of its own or of all values together; those that
        follow it have no answer.
        """
        # Requests and answers are matched by their order, so threads take turns.
        with self._lock:
            source = "" if self._process else self._source  # the source is sent with the first request only
            answers: list[Any] = []
            try:
                process = self._process = self._process or self._start()
                requests, lines = cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)
                if self._is_closed:  # before the start, which `close` did not see
                    process.kill()
                request = json.dumps([seconds, all_seconds, self._kind, source, values], default=str)
                requests.write(request.encode() + b"\n")
                requests.flush()
                while len(answers) < len(values) and (line := lines.readline()).endswith(b"\n"):
                    answer, failure = json.loads(line)
                    answers.append(ValueError(failure) if failure else answer)
            except BrokenPipeError:
                pass  # it has ended
            finally:
                # It exceeded a limit, or Ctrl-C left answers in the pipe that the next request would take for its own.
                if len(answers) < len(values):
                    self._end()
            return answers if len(answers) == len(values) else [*answers, LimitExceededError()]

    def close(self) -> None:
        """End the process for good; who waits for its answers, or asks again, gets a LimitExceededError."""
        self._is_closed = True
        if process := self._process:
            process.kill()

    def _start(self) -> subprocess.Popen[bytes]:
        # -P keeps the script's folder off the import path: a file there would shadow a library.
        command, pipe = [sys.executable, "-P", str(_PROCESS), str(MEMORY)], subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        # The process ends together with this object: neither templates nor tokenizers are ever closed.
        self._finalizer = weakref.finalize(self, _end_process, process)
        return process

    def _end(self) -> None:
        if self._process:
            self._finalizer()
            self._process = None


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            cast("IO[bytes]", pipe).close()
