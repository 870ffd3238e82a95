"""Shadows: copies of requests to another version, whose answers nobody sees, to compare them with those that clients got.

A copy starts after the answer has ended, and takes nothing from others: it is dropped while more than a few requests run, while
as many copies run, or while its version would need room in the engine; and copies that run are canceled once others need their
place. No text is kept, only how far two answers agree.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from adapterhub.ref import Ref
from adapterhub.serve.engines import Engine, EngineDownError
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, FormatError
from adapterhub_converters.lazy_dataclass import dataclass

from . import api_forms, rewriting
from .engine_versions import EngineVersions
from .openai_errors import ProblemError
from .rollout_plan import ShadowPlan, bucket
from .rollouts import FindVersion

log = logging.getLogger("adapterhub.serve.shadows")
_MAX_RUNNING = 4  # requests beside which a copy may run
_MAX_BODY = 1 << 20  # bytes of a request that is copied
_MAX_ANSWER = 256 << 10  # bytes of an answer that are compared
_LOWEST_PRIORITY = 1_000_000  # in vLLM, which answers lower numbers first


@dataclass(slots=True)
class ShadowSums:
    """The copies of a route so far.

    Attributes:
        dropped: Those that were not sent, or canceled, because others needed the room.
        failed: Those that the version did not answer.
        same: Answers that are the same text.
        agreement: The sum over answers of the share of the text before the first difference.
        characters: Of the copies' answers; `client_characters` of those that clients got.
        seconds: Until the ends of the copies' answers; `client_seconds` of those that clients got.
    """

    copies: int = 0
    dropped: int = 0
    failed: int = 0
    same: int = 0
    agreement: float = 0.0
    characters: int = 0
    client_characters: int = 0
    seconds: float = 0.0
    client_seconds: float = 0.0

    def document(self) -> dict[str, object]:
        """Return the sums as JSON, and the mean agreement."""
        answered = self.copies - self.failed
        return {**asdict(self), "agreement": round(self.agreement / answered, 4) if answered else None}


class RequestCopy:
    """A request that may be sent to a shadow, with what its client got so far."""

    def __init__(self, shadows: Shadows, route: str, plan: ShadowPlan, path: str, body: Mapping[str, Any]) -> None:
        self._shadows, self.route, self.plan, self.path, self.body = shadows, route, plan, path, body
        self.answer = bytearray()
        self.started = time.monotonic()

    def add(self, piece: bytes) -> None:
        """Add a piece of the answer that the client gets, as far as it is compared."""
        self.answer += piece[: max(_MAX_ANSWER - len(self.answer), 0)]

    def send(self) -> None:
        """Send it to its shadow, now that its client has the answer."""
        self._shadows.send(self)


class Shadows:
    """The copies of a gateway's requests.

    Args:
        find: Returns the version that a ref means now.
        count_running: Returns the number of clients' requests that run.
    """

    def __init__(self, engine: Engine, versions: EngineVersions, find: FindVersion, count_running: Callable[[], int]) -> None:
        self._engine, self._versions, self._find, self._count_running = engine, versions, find, count_running
        self._tasks: dict[asyncio.Task[None], str] = {}
        self.sums: dict[str, ShadowSums] = {}

    def begin(
        self, route: str, plan: ShadowPlan, path: str, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> RequestCopy | None:
        """Return a copy of a request, for its route's shadow; None if it is not copied.

        Args:
            headers: Those of the request.
        """
        size = headers.get("content-length", "")
        is_small = size.isascii() and size.isdecimal() and len(size) < 9 and int(size) <= _MAX_BODY
        may_act = bool(body.get("tools") or body.get("functions")) and not plan.tools
        if may_act or not is_small or bucket(route, str(plan.to), "", str(time.monotonic_ns())) >= plan.share:
            return None
        if not self._has_room(route, plan):
            self._sums(route).dropped += 1
            return None
        return RequestCopy(self, route, plan, path, body)

    def send(self, copy: RequestCopy) -> None:
        """Send a copy to its shadow, in the background, now that its client has the answer."""
        if not self._has_room(copy.route, copy.plan):
            self._sums(copy.route).dropped += 1
            return
        seconds = time.monotonic() - copy.started
        # In a context of its own: the trace and the headers are those of the client's request, which has ended.
        task = asyncio.create_task(self._run(copy, seconds), context=contextvars.Context())
        self._tasks[task] = copy.route
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        """Forget a copy that has ended; one that was canceled may not even have begun."""
        route = self._tasks.pop(task)
        self._sums(route).dropped += task.cancelled()  # codespell:ignore

    def make_way(self) -> None:
        """Cancel the copies that run, because others need their place."""
        for task in self._tasks:
            task.cancel()

    def relieve(self) -> None:
        """Cancel the copies that run if there are too many requests beside them."""
        if self._tasks and self._count_running() > _MAX_RUNNING:
            self.make_way()

    async def close(self) -> None:
        """Cancel all copies."""
        self.make_way()
        if self._tasks:
            await asyncio.wait([*self._tasks])

    def documents(self) -> list[dict[str, object]]:
        """Return the sums of each route, as JSON."""
        return [{"route": route, **sums.document()} for route, sums in self.sums.items()]

    def _sums(self, route: str) -> ShadowSums:
        return self.sums.setdefault(route, ShadowSums())

    def _has_room(self, route: str, plan: ShadowPlan) -> bool:
        copies = sum(name == route for name in self._tasks.values())
        return copies < plan.running and self._count_running() <= _MAX_RUNNING

    async def _run(self, copy: RequestCopy, client_seconds: float) -> None:
        """Ask the shadow, and compare its answer with that of the client."""
        sums, started = self._sums(copy.route), time.monotonic()
        try:
            answer = await self._answer(copy.plan.to, copy.path, copy.body)
        except (AdapterhubError, EngineDownError, ProblemError, OSError) as error:
            log.info("the shadow of %s does not answer: %s", copy.route, error)
            sums.copies, sums.failed = sums.copies + 1, sums.failed + 1
            return
        if answer is None:
            sums.dropped += 1
            return
        client_text, text = text_of(bytes(copy.answer)), text_of(answer[:_MAX_ANSWER])
        sums.copies += 1
        sums.same += text == client_text
        sums.agreement += agreement(client_text, text)
        sums.characters, sums.client_characters = sums.characters + len(text), sums.client_characters + len(client_text)
        sums.seconds, sums.client_seconds = sums.seconds + time.monotonic() - started, sums.client_seconds + client_seconds

    async def _answer(self, ref: Ref, path: str, body: Mapping[str, Any]) -> bytes | None:
        """Return the shadow's answer; None if its version has no room in the engine."""
        version = await self._find(ref)
        if not self._versions.has_room_for(version):
            return None
        if self._engine.has_priorities:
            body = {**body, "priority": _LOWEST_PRIORITY}
        async with self._versions.use([(version, 1.0)]) as blend:
            answer = await self._engine.request(path, api_forms.engine_body(path, body), blend)
            try:
                content = await rewriting.read_whole(answer.body)
            finally:
                await answer.close()
        if answer.status != 200:
            raise ProblemError(502, f"its status is {answer.status}")
        return content


def text_of(answer: bytes) -> str:
    """Return the text of an answer of completions or chats, as a whole or as a stream; JSON of another form as it is."""
    texts: list[str] = []
    is_stream = answer.lstrip().startswith((b"data:", b"event:", b":"))
    lines = (line[5:] for line in answer.split(b"\n") if line.startswith(b"data:")) if is_stream else (answer,)
    for line in lines:
        with suppress(FormatError):
            texts += _choice_texts(json_file.parse_object(line.strip(), ""))
    return "".join(texts)


def _choice_texts(document: Mapping[str, Any]) -> Iterator[str]:
    choices = document.get("choices")
    for choice in choices if isinstance(choices, list) else []:
        if isinstance(choice, dict):
            inner = next((part for name in ("delta", "message") if isinstance(part := choice.get(name), dict)), {})
            calls = inner.get("tool_calls")
            yield from (text for text in (choice.get("text"), inner.get("content")) if isinstance(text, str))
            yield json.dumps(calls) if calls else ""


def agreement(left: str, right: str) -> float:
    """Return the share of the longer text before the first difference, from 0 to 1."""
    if left == right:
        return 1.0
    pairs = enumerate(zip(left, right, strict=False))
    first = next((index for index, (a, b) in pairs if a != b), min(len(left), len(right)))
    return first / max(len(left), len(right))
