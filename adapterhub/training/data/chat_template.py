"""Render a model's chat template, a program of a stranger's, with limits on its time, its memory and its text.

jinja's sandbox keeps a template from files and from Python's insides, but not from nested loops, from `'a' * 10**10` or from a
filter that pads to a billion. No count of steps inside the interpreter stops the last two, which are one step each; the limits
of a process stop all of them. So a template is rendered by a process of its own (`chat_process`), started once for each.

transformers prepares what the template sees: it renders, in its place, a template of ours that writes all of it as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import json
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from adapterhub_converters.errors import FormatError

_PROCESS = Path(__file__).with_name("chat_process.py")
_VARIABLES = (
    "{{ dict(messages=messages, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt)|tojson }}"
)
SECONDS = 10  # of processor time for one conversation, whose rendering takes milliseconds
MEMORY = 1 << 30  # bytes of the whole process


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, where: str, tools: list[Any] | None = None, prompt: bool = False
) -> str:
    """Return the conversation as text.

    Args:
        where: The conversation, in messages.
        tools: JSON schemas of the tools that it may call.
        prompt: Whether the beginning of an answer is added.

    Raises:
        FormatError: The template refuses the conversation, or exceeds a limit.
    """
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt, **({"tools": tools} if tools else {})}
    try:
        template = str(tokenizer.get_chat_template(tools=tools))
        variables = json.loads(tokenizer.apply_chat_template(list(messages), chat_template=_VARIABLES, **options))
    except Exception as error:
        raise _refusal(error, where) from error
    return rendered(template, {**tokenizer.special_tokens_map, **variables}, where=where)


def rendered(template: str, variables: Mapping[str, Any], *, where: str) -> str:
    """Return a template's text for the variables that it sees; errors as those of `render`."""
    try:
        return _started(template, SECONDS).render(variables)
    except BrokenPipeError as error:
        _started.cache_clear()
        raise FormatError(where, f"the model's chat template exceeds {SECONDS} s or {MEMORY >> 30} GiB of memory") from error
    except ValueError as error:
        raise _refusal(error, where) from error


def _refusal(error: Exception, where: str) -> FormatError:
    return FormatError(where, f"the model's chat template refuses it ({' '.join(str(error).split())[:200]})")


class _Renderer:
    """A process that renders one template: one line of JSON in and one out for each conversation."""

    def __init__(self, template: str, seconds: int) -> None:
        # -P: nothing in the folder of the script is imported in place of a library.
        command = [sys.executable, "-P", str(_PROCESS), str(seconds), str(MEMORY)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        weakref.finalize(self, _end, process)
        self._requests, self._answers = cast("IO[bytes]", process.stdin), cast("IO[bytes]", process.stdout)
        self._template = template

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the text; ValueError when the template fails, BrokenPipeError when the process had to end."""
        request, self._template = [self._template, variables], ""  # the template goes with the first
        self._requests.write(json.dumps(request, default=str).encode() + b"\n")
        self._requests.flush()
        answer = self._answers.readline()
        if not answer.endswith(b"\n"):
            raise BrokenPipeError
        text, failure = json.loads(answer)
        if failure:
            raise ValueError(failure)
        return str(text)


@functools.lru_cache(maxsize=2)  # a template for conversations with tools, and one for the others
def _started(template: str, seconds: int) -> _Renderer:
    return _Renderer(template, seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            cast("IO[bytes]", pipe).close()
