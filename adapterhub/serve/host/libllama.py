"""llama.cpp's library as a host: a GGUF base, and a context of its own for every request, with the adapters of that request.

For machines without llama-server. What one version has computed is never another's, because no keys and values outlive a
request; beginnings of prompts are read again each time for it. Requests take turns, a chunk of a prompt or a token each.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapterhub.generation import llama_cpp
from adapterhub.generation.llama_cpp import LlamaCppEngine
from adapterhub_converters.errors import AdapterhubError, NotFoundError, StoppedError

from .answer import Answer
from .streams import Stream, Threaded
from .values import Request

_log = logging.getLogger(__name__)
_ROWS = 4  # requests that take turns
_CHUNK = 256  # tokens of a prompt in a turn
_CONTEXT = 4096  # tokens of prompt and answer, since a context has room for all of them from its start


class _Text:
    """See `Texts`."""

    def __init__(self, engine: LlamaCppEngine) -> None:
        self._engine, self.where = engine, engine.where
        self.ends = frozenset(token for token in range(engine.size) if engine.is_end(token))
        self.longest_token = max(len(engine.bytes_of(token, special=True)) for token in range(engine.size))
        self.of, self.pieces, self.conversation = engine.of, engine.pieces, engine.conversation

    @property
    def has_template(self) -> bool:
        """Whether the file has a chat template."""
        return self._engine.has_template

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """Return the ids; `special`: with those that the model expects at a start."""
        return self._engine.tokens(text, raw=special)


@dataclass
class _Loaded:
    """An adapter in memory; `rows` use it."""

    adapter: Any
    rows: int = 0
    dropped: bool = False


@dataclass
class _Row:
    """A request; `unread` are the tokens that its context has to read next."""

    request: Request
    parts: Sequence[tuple[_Loaded, float]]
    stream: Stream
    answer: Answer
    unread: list[int]
    logits_after: Callable[[list[int]], Any] | None = None
    context: ExitStack = field(default_factory=ExitStack)


class LibllamaHost(Threaded):
    """See `Answering`."""

    def __init__(self, engine: LlamaCppEngine, *, waiting: int) -> None:
        super().__init__("adapterhub-libllama")
        self.text, self.longest = _Text(engine), min(engine.longest or _CONTEXT, _CONTEXT)
        self._engine, self._most = engine, waiting
        self._loaded: dict[str, _Loaded] = {}
        self._rows: list[_Row] = []
        self._waiting: deque[_Row] = deque()
        self._library = threading.Lock()  # for every call of llama.cpp that changes something; taken before `_wake`

    def load(self, key: str, path: Path) -> None:
        """Load a version from a GGUF file, unless it is in memory; RefusedError if llama.cpp cannot load it on the base."""
        with self._library:
            if key not in self._loaded:
                adapter = self._engine.loaded(path, key)
                with self._wake:
                    self._loaded[key] = _Loaded(adapter)

    def drop(self, key: str) -> None:
        """Forget a version: no further request can use it, and those that do keep it until they end."""
        with self._library:
            with self._wake:
                found = self._loaded.pop(key, None)
            if found is not None:
                found.dropped = True
                self._free([found])

    def _free(self, parts: Sequence[_Loaded]) -> None:
        for one in parts:
            if one.dropped and not one.rows and one.adapter is not None:
                self._engine.free(one.adapter)
                one.adapter = None

    def submit(self, request: Request, *, beside: Stream | None = None) -> Stream:
        """Have a request answered; errors are those of `Host.submit`."""
        request.check(longest=self.longest, vocabulary=self._engine.size)
        with self._wake:
            waiting = sum(not row.stream.is_canceled for row in self._waiting)
            self._check_room(waiting, self._most)
            parts = [(self._version(key), weight) for key, weight in request.blend]
            for one, _ in parts:
                one.rows += 1
            row = _Row(request, parts, Stream(beside), Answer(request, self.text), request.ids)
            self._waiting.append(row)
            self._wake.notify()
        return row.stream

    def _version(self, key: str) -> _Loaded:
        if key not in self._loaded:
            raise NotFoundError(key, "is not loaded")
        return self._loaded[key]

    # ---- The thread

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._closed or self._rows or self._waiting):
                    self._wake.wait()
                closed, room = self._closed, len(self._waiting) if self._closed else _ROWS - len(self._rows)
                self._rows += [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            for row in [*self._rows]:
                with self._library:
                    if closed or row.stream.is_canceled:
                        self._end(row, StoppedError("", "the host was closed" if closed else "canceled"))
                    else:
                        self._turn(row)
            if closed:
                return

    def _turn(self, row: _Row) -> None:
        """Read a chunk of a prompt, or the last token; then add one to the answer, if nothing is left to read."""
        try:
            if row.logits_after is None:
                adapters = [(one.adapter, weight) for one, weight in row.parts]
                room = len(row.request.ids) + row.request.max_tokens
                row.logits_after = row.context.enter_context(self._engine.context(adapters, room=room, at_once=_CHUNK))
            chunk, row.unread = row.unread[:_CHUNK], row.unread[_CHUNK:]
            logits = row.logits_after(chunk)
            if row.unread:
                return
            piece = row.answer.add(logits)
        except Exception as error:  # noqa: BLE001 - whatever it raises, for those who asked
            _log.warning("a request failed: %s", error, exc_info=not isinstance(error, AdapterhubError))
            self._end(row, error)
            return
        row.unread = [piece.token]
        if piece.finish:
            self._end(row)
        row.stream.put(piece)

    def _end(self, row: _Row, error: Exception | None = None) -> None:
        """Free what a row holds, before its reader learns of its end."""
        row.context.close()
        with self._wake:
            self._rows.remove(row)
            for one, _ in row.parts:
                one.rows -= 1
        self._free([one for one, _ in row.parts])
        if error is not None:
            row.stream.put(error)


@contextmanager
def opened(base: Path, *, waiting: int) -> Iterator[LibllamaHost]:
    """Load a GGUF base, and answer requests from a thread of its own within the block.

    Raises:
        MissingExtraError: The library is not installed.
        FormatError: It cannot load the base.
    """
    llama_cpp.check_extra()
    with llama_cpp.opened(None, base, where=str(base)) as engine, LibllamaHost(engine, waiting=waiting).started() as host:
        yield host
