"""Processes that render conversations, several at a time: one for each core and template.

Rendering is most of the work of encoding conversations, and the template of a stranger runs in a limited process anyway.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from adapterhub.prompts import chat_template, process_limits
from adapterhub.training import machine

Request = tuple[str, Any]
"""A template, and the variables and the plan for its process."""
Batch = Sequence[Request | None]
_Context = TypeVar("_Context")
_MAX_PROCESSES = 8  # the tokenizer, which also takes cores, is the limit for more


class _Processes:
    """The processes of one thread, by template."""

    def __init__(self) -> None:
        self._by_template: dict[str, process_limits.Process] = {}
        self._has_ended = False

    def get(self, template: str) -> process_limits.Process:
        """Return the process of a template."""
        if template not in self._by_template:
            self._by_template[template] = process_limits.Process("template", template)
            if self._has_ended:  # meanwhile, so that `end` may not have seen it
                self._by_template[template].close()
        return self._by_template[template]

    def end(self) -> None:
        """End all of them, from another thread too."""
        self._has_ended = True
        for process in list(self._by_template.values()):
            process.close()


class Renderers:
    """Answers batches of requests in their order, while the next batches are being rendered.

    Args:
        count: The number of processes for each template; None is one for each core.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = min(count or machine.usable_cores(), _MAX_PROCESSES)
        self._threads = ThreadPoolExecutor(self.count)
        # A thread takes a set of processes for each batch, so that no two threads wait for the same process.
        self._sets = [_Processes() for _ in range(self.count)]
        self._idle: queue.SimpleQueue[_Processes] = queue.SimpleQueue()
        for processes in self._sets:
            self._idle.put(processes)

    def __enter__(self) -> Renderers:
        return self

    def __exit__(self, *_: object) -> None:
        # After an error or Ctrl-C, nobody waits for the batches under way, each of which may take minutes.
        for processes in self._sets:
            processes.end()
        self._threads.shutdown(cancel_futures=True)

    def answered(self, batches: Iterable[tuple[_Context, Batch]]) -> Iterator[tuple[_Context, list[Any]]]:
        """Yield the context and the answers of each batch, while those that follow it are rendered."""
        pending: deque[tuple[_Context, Future[list[Any]]]] = deque()
        for context, batch in batches:
            pending.append((context, self._threads.submit(self._request_all, batch)))
            if len(pending) > self.count + 1:
                earlier, answers = pending.popleft()
                yield earlier, answers.result()
        yield from ((earlier, answers.result()) for earlier, answers in pending)

    def _request_all(self, batch: Batch) -> list[Any]:
        processes = self._idle.get()
        try:
            return request_all(batch, processes.get)
        finally:
            self._idle.put(processes)


def request_all(batch: Batch, process_of: Callable[[str], process_limits.Process] = chat_template.process) -> list[Any]:
    """Return the answer for each request, or the error that `process_limits.Process.request` would raise; None for None.

    Args:
        process_of: Returns the process of a template.
    """
    answers: list[Any] = [None] * len(batch)
    for template in {request[0]: None for request in batch if request}:
        numbers = [number for number, request in enumerate(batch) if request and request[0] == template]
        values = [request[1] for request in batch if request and request[0] == template]
        for number, answer in zip(numbers, _process_answers(process_of(template), values), strict=True):
            answers[number] = answer
    return answers


def _process_answers(process: process_limits.Process, values: Sequence[Any]) -> list[Any]:
    answers: list[Any] = []
    allowed = chat_template.MAX_ENDED  # also the seconds for all values, in those for one: rendering 64 takes one
    while len(answers) < len(values) and allowed:
        answers += process.request_all(values[len(answers) :], chat_template.SECONDS, allowed * chat_template.SECONDS)
        allowed -= isinstance(answers[-1], process_limits.LimitExceededError)
    return [*answers, *(process_limits.LimitExceededError() for _ in values[len(answers) :])]
