"""Programs and expressions of strangers, run by a process of their own with limits on its time and its memory.

A chat template may loop forever or write `'a' * 10**10`, and an expression of a tokenizer may try a text in a billion ways. No
count of steps inside an interpreter or a library stops all of that; the limits of a process do. It is started once for each
template or tokenizer (`limited_process`).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import IO, Any, Literal, cast

_PROCESS = Path(__file__).with_name("limited_process.py")
MEMORY = 1 << 30  # bytes of the whole process


class ExceededError(Exception):
    """A request took more time or memory than it may."""


class Process:
    """A process for one template or tokenizer, for any thread: a line of JSON in and one out for each request.

    Args:
        kind: What `source` is.
        source: The template, or a tokenizer.json.
    """

    def __init__(self, kind: Literal["template", "tokenizer"], source: str) -> None:
        # -P: nothing in the folder of the script is imported in place of a library.
        command, pipe = [sys.executable, "-P", str(_PROCESS), str(MEMORY)], subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        weakref.finalize(self, _end, process)
        self._requests, self._answers = cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)
        self._first = kind, source
        self._lock = threading.Lock()

    def ask(self, given: Any, seconds: int) -> str:
        """Return the rendered text of variables, or nothing for a text that was split within `seconds` of processor time.

        Raises:
            ValueError: It fails.
            ExceededError: It took more, and the process has ended.
        """
        with self._lock:
            kind, source = self._first
            self._first = kind, ""  # the source goes with the first request
            try:
                self._requests.write(json.dumps([seconds, kind, source, given], default=str).encode() + b"\n")
                self._requests.flush()
                answer = self._answers.readline()
            except BrokenPipeError as error:
                raise ExceededError from error
        if not answer.endswith(b"\n"):
            raise ExceededError
        text, failure = json.loads(answer)
        if failure:
            raise ValueError(failure)
        return str(text)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            cast("IO[bytes]", pipe).close()
