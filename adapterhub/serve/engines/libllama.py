"""llama.cpp's library as a host: a GGUF base, and a context for every request with that request's adapters.

It is for machines without llama-server. What one version has computed never reaches another, because no keys and values outlive
a request; the price is that common beginnings of prompts are read each time. Requests take turns, each with a chunk of a prompt
or a token.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any

from adapterhub.generation import llama_cpp
from adapterhub.generation.llama_cpp import LlamaCppEngine
from adapterhub.serve.torch_engine.answer import GeneratedAnswer
from adapterhub.serve.torch_engine.streams import Stream, ThreadedHost
from adapterhub.serve.torch_engine.values import Request
from adapterhub_converters.errors import AdapterhubError, NotFoundError, StoppedError
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.trained_prompt import PROMPT_OF_BASE, TrainedPrompt

_log = logging.getLogger(__name__)
_MAX_ROWS = 4  # requests that take turns
_CHUNK = 256  # tokens of a prompt per turn
_CONTEXT = 4096  # tokens of prompt and answer; a context allocates room for all of them at its start


class _Text:
    """The `Texts` of a GGUF base; it has no grammars, and so no tools."""

    tool_template = tokenizer_json = ""

    def __init__(self, engine: LlamaCppEngine) -> None:
        self._engine, self.location = engine, engine.location
        self.ends = frozenset(token for token in range(engine.size) if engine.is_end(token))
        self.chat_ends = self.ends  # llama.cpp knows the marks of common templates by their names
        self.longest_token = max(len(engine.bytes_of(token, special=True)) for token in range(engine.size))
        self.token_text, self.pieces = engine.token_text, engine.pieces
        self._prompt = PROMPT_OF_BASE

    def with_prompt(self, prompt: TrainedPrompt) -> _Text:
        """Return the same texts with the conversations of an adapter."""
        texts = copy.copy(self)
        texts._prompt, end = prompt, self._engine.end_of(prompt)
        texts.chat_ends = self.ends if end is None else self.ends | {end}
        return texts

    @property
    def has_template(self) -> bool:
        """Whether the file, or the adapter, has a chat template."""
        return self._engine.template_of(self._prompt) is not None

    def conversation(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> str:
        """Render the messages up to the beginning of the answer."""
        return self._engine.conversation(messages, tools, prompt=self._prompt)

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """Return the ids; with `special`, include those that the model expects at the start."""
        return self._engine.encode(text, special=special)


@dataclass
class _LoadedAdapter:
    """An adapter in memory, and the number of rows that use it."""

    adapter: Any
    rows: int = 0
    dropped: bool = False


@dataclass
class _Row:
    """A request; `unread` are the tokens that its context must read next."""

    request: Request
    parts: Sequence[tuple[_LoadedAdapter, float]]
    stream: Stream
    answer: GeneratedAnswer
    unread: list[int]
    logits_after: Callable[[list[int]], Any] | None = None
    context: ExitStack = field(default_factory=ExitStack)


class LibllamaHost(ThreadedHost):
    """The `AnsweringHost` on llama.cpp's library."""

    scores_prompts = False

    def __init__(self, engine: LlamaCppEngine, *, waiting: int, context: int = 0, precision: str = "") -> None:
        super().__init__("adapterhub-libllama")
        self.text, self.precision = _Text(engine), precision
        self.longest = context or min(engine.max_context or _CONTEXT, _CONTEXT)
        self._engine, self._most = engine, waiting
        self._loaded: dict[str, _LoadedAdapter] = {}
        self._rows: list[_Row] = []
        self._waiting: deque[_Row] = deque()
        self._library = threading.Lock()  # for every call of llama.cpp that changes something; acquired before `_wake`

    def load(self, key: str, path: Path) -> None:
        """Load a version from a GGUF file, unless it is in memory; RefusedError if llama.cpp cannot load it on the base."""
        with self._library:
            if key not in self._loaded:
                adapter = self._engine.load_adapter(path, key)
                with self._wake:
                    self._loaded[key] = _LoadedAdapter(adapter)

    def pin(self, keys: frozenset[str]) -> None:
        """Do nothing: all loaded versions stay in memory."""

    def drop(self, key: str) -> None:
        """Forget a version: new requests cannot use it, and running ones keep it until they end."""
        with self._library:
            with self._wake:
                loaded = self._loaded.pop(key, None)
            if loaded is not None:
                loaded.dropped = True
                self._free([loaded])

    def _free(self, parts: Sequence[_LoadedAdapter]) -> None:
        """Free the dropped adapters that no row uses any more."""
        for loaded in parts:
            if loaded.dropped and not loaded.rows and loaded.adapter is not None:
                self._engine.free(loaded.adapter)
                loaded.adapter = None

    def submit(self, request: Request, *, beside: Stream | None = None) -> Stream:
        """Submit a request to be answered; raises the errors of `Host.submit`."""
        request.check(longest=self.longest, vocabulary=self._engine.size)
        with self._wake:
            # Canceled requests leave the queue only when it is their turn.
            waiting = sum(not row.stream.is_canceled for row in self._waiting)
            self._check_room(waiting, self._most)
            parts = [(self._version(key), weight) for key, weight in request.blend]
            for loaded, _ in parts:
                loaded.rows += 1
            row = _Row(request, parts, Stream(beside), GeneratedAnswer(request, self.text), request.ids)
            self._waiting.append(row)
            self._wake.notify()
        return row.stream

    def _version(self, key: str) -> _LoadedAdapter:
        """Return the adapter of a version; NotFoundError if it is not loaded."""
        if key not in self._loaded:
            raise NotFoundError(key, "is not loaded")
        return self._loaded[key]

    # ---- The thread

    def _work(self) -> None:
        """Answer requests until the host is closed."""
        while True:
            with self._wake:
                while not (self._closed or self._rows or self._waiting):
                    self._wake.wait()
                closed, room = self._closed, len(self._waiting) if self._closed else _MAX_ROWS - len(self._rows)
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
        """Read a chunk of a prompt, or the last token; if nothing is left to read, add a token to the answer."""
        try:
            if row.logits_after is None:
                adapters = [(loaded.adapter, weight) for loaded, weight in row.parts]
                room = len(row.request.ids) + row.request.max_tokens
                row.logits_after = row.context.enter_context(self._engine.context(adapters, room=room, batch_size=_CHUNK))
            chunk, row.unread = row.unread[:_CHUNK], row.unread[_CHUNK:]
            logits = row.logits_after(chunk)
            if row.unread:
                return
            piece = row.answer.add(logits)
        except Exception as error:  # noqa: BLE001 - any error is for the client
            _log.warning("a request failed: %s", error, exc_info=not isinstance(error, AdapterhubError))
            self._end(row, error)
            return
        row.unread = [piece.token]
        if piece.finish:
            self._end(row)
        row.stream.put(piece)

    def _end(self, row: _Row, error: Exception | None = None) -> None:
        """Free what a row holds, before its client learns that it ended."""
        row.context.close()
        with self._wake:
            self._rows.remove(row)
            for loaded, _ in row.parts:
                loaded.rows -= 1
        self._free([loaded for loaded, _ in row.parts])
        if error is not None:
            row.stream.put(error)


@contextmanager
def open_libllama(base: Path, *, waiting: int, context: int = 0, precision: str = "") -> Iterator[LibllamaHost]:
    """Load a GGUF base, and answer requests in a separate thread within the block.

    Args:
        base: The file.
        waiting: The requests that may wait.
        context: The tokens of prompt and answer; 0 for 4,096, or fewer if the base was trained with fewer.
        precision: The type of its weights.

    Raises:
        MissingExtraError: The library is not installed.
        FormatError: The library cannot load the base.
    """
    llama_cpp.check_extra()
    with (
        llama_cpp.open_engine(None, base, location=str(base)) as engine,
        LibllamaHost(engine, waiting=waiting, context=context, precision=precision).running() as host,
    ):
        yield host
