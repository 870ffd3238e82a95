"""Answers in the form of OpenAI's completions and chat completions: documents in, documents out, without HTTP."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from adapterhub_converters.errors import AdapterhubError, NotFoundError, ParameterError, StoppedError
from adapterhub_converters.trained_prompt import PROMPT_OF_BASE, TrainedPrompt

from .openai_request import ApiRequest
from .request_fields import CHAT, COMPLETIONS
from .streams import AnsweringHost, Stream, read_together
from .values import TOO_LONG, Blend, FullError, Piece

Document = dict[str, Any]


class ApiError(Exception):
    """An error in OpenAI's form.

    Attributes:
        status: The HTTP status.
        document: The error object.
        retry_after: Seconds after which another try makes sense; None if it never does.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, 1 if status in (429, 503) else None
        kinds = {404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error", 500: "server_error"}
        kind = kinds.get(status, "invalid_request_error")
        self.document: Document = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def submit(
    host: AnsweringHost,
    path: str,
    body: Mapping[str, Any],
    blend: Blend,
    model: str,
    *,
    prompt: TrainedPrompt = PROMPT_OF_BASE,
) -> Completion:
    """Submit a request to a host.

    Args:
        path: `COMPLETIONS` or `CHAT`.
        body: The document of the request; its `model` is not read.
        blend: The versions that answer.
        model: Their name, for the answer.
        prompt: How they were trained to be asked.

    Raises:
        ApiError: It is malformed, or asks for something that is not supported.
    """
    with _as_api_errors():
        api_request = ApiRequest.read(host, path, body, blend, prompt)
        streams: list[Stream] = []
        try:
            for request in api_request.requests:
                # In one queue, so that several answers can be read in the order in which they are generated.
                streams.append(host.submit(request, beside=streams[-1] if streams else None))
        except BaseException:
            _cancel(streams)
            raise
    return _KINDS[path](host, api_request, streams, model)


def _cancel(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.cancel()


@contextmanager
def _as_api_errors() -> Iterator[None]:
    """Convert the errors of this package into errors of the API."""
    try:
        yield
    except FullError as error:
        raise ApiError(429, str(error), code="queue_full") from error
    except NotFoundError as error:
        raise ApiError(404, str(error), param="model", code=error.own_code or "model_not_found") from error
    except ParameterError as error:
        code = "context_length_exceeded" if error.code == TOO_LONG else error.own_code or None
        raise ApiError(400, str(error), param=error.parameter, code=code) from error
    except StoppedError as error:
        raise ApiError(503, str(error)) from error
    except AdapterhubError as error:
        raise ApiError(400, str(error), code=error.own_code or None) from error
    except Exception as error:
        raise ApiError(500, f"the engine failed ({type(error).__name__})") from error


class Completion:
    """An answer in progress, as a document of completions; to be read once.

    Attributes:
        stream: Whether it was requested in chunks.
    """

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, host: AnsweringHost, api_request: ApiRequest, streams: Sequence[Stream], model: str) -> None:
        self.stream, self._request, self._streams, self._token_text = (
            api_request.stream,
            api_request,
            streams,
            host.text.token_text,
        )
        self._common = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._counts = [0] * len(streams)
        self._echoes = [*api_request.echoes] or [""] * len(streams)  # what is still to be shown
        self._lengths = [len(echo) for echo in self._echoes]  # of the texts so far, in characters
        self._prompt_lengths = [0] * len(streams)  # of the pieces of the prompts so far

    def whole(self) -> Document:
        """Return the whole answer; ApiError if the host fails or the request is canceled."""
        pieces: list[list[Piece]] = [[] for _ in self._streams]
        for index, piece in self._read():
            pieces[index].append(piece)
        choices = [self._choice(index, answer_pieces) for index, answer_pieces in enumerate(pieces)]
        return {**self._common, "object": self.kind, "choices": choices, "usage": self._usage()}

    def chunks(self) -> Iterator[Document]:
        """Yield the answer in chunks, without the final `[DONE]`; raises the errors of `whole`."""
        usage = {"usage": None} if self._request.include_usage else {}
        common = {**self._common, "object": self.chunk_kind, **usage}
        for choice in self._first_choices():
            yield {**common, "choices": [choice]}
        for index, piece in self._read():
            for choice in self._parts(index, piece):
                yield {**common, "choices": [choice]}
        if self._request.include_usage:
            yield {**common, "choices": [], "usage": self._usage()}

    def cancel(self) -> None:
        """Tell the host to drop the requests; from any thread, at any time."""
        _cancel(self._streams)

    def _read(self) -> Iterator[tuple[int, Piece]]:
        """Yield the pieces of all answers; if the reader stops early, cancel the requests."""
        try:
            with _as_api_errors():
                for index, piece in read_together(self._streams):
                    self._counts[index] += not piece.is_prompt
                    yield index, piece
        finally:
            self.cancel()

    def _usage(self) -> Document:
        """Return the numbers of tokens; a prompt with several answers counts once."""
        prompts = sum(len(request.ids) for request in self._request.requests[:: self._request.n])
        answers = sum(self._counts)
        return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}

    # ---- what differs between the two kinds of documents

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Document:
        """Return an answer."""
        text = self._echoes[index] + "".join(piece.text for piece in pieces if not piece.is_prompt)
        self._echoes[index] = ""
        details = {"logprobs": self._logprobs(index, pieces), "finish_reason": pieces[-1].finish}
        return {"index": index, "text": text, **details}

    def _first_choices(self) -> Iterator[Document]:
        """Yield the chunks before the first piece."""
        yield from ()

    def _parts(self, index: int, piece: Piece) -> Iterator[Document]:
        """Yield the chunks that a piece adds to an answer."""
        if piece.text or piece.finish or piece.logprob is not None or piece.is_prompt:
            yield self._choice(index, [piece])

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> Document | None:
        """Return the logarithms of the probabilities; None if they were not requested."""
        if self._request.requests[index].logprobs is None:
            return None
        offsets = []
        for piece in pieces:
            lengths = self._prompt_lengths if piece.is_prompt else self._lengths
            offsets.append(lengths[index])
            lengths[index] += len(piece.text)
        return {
            "tokens": [self._token_text(piece.token) for piece in pieces],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": [self._top(piece) for piece in pieces],
            "text_offset": offsets,
        }

    def _top(self, piece: Piece) -> dict[str, float] | None:
        """Return the likeliest tokens by their texts; None for the first token of a prompt."""
        if piece.logprob is None:
            return None
        # Tokens that are parts of characters have the same text, which then has the likeliest one's probability.
        return {self._token_text(token): logprob for token, logprob in reversed(piece.top)}


class _ChatCompletion(Completion):
    """An answer in progress, as a document of chat completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, host: AnsweringHost, api_request: ApiRequest, streams: Sequence[Stream], model: str) -> None:
        super().__init__(host, api_request, streams, model)
        self._readers = [api_request.form.reader() for _ in streams]

    def _content(self, index: int, text: str, finish: str | None) -> tuple[str, list[Document], str | None]:
        """Return the content and the calls in a piece of text, and how the answer ends with it."""
        reader = self._readers[index]
        if reader is None:
            return text, [], finish
        content = reader.add(text)
        rest, calls = reader.finish() if finish else ("", [])
        return content + rest, calls, "tool_calls" if calls and finish == "stop" else finish

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Document:
        """Return an answer."""
        content, calls, finish = self._content(index, "".join(piece.text for piece in pieces), pieces[-1].finish)
        message: Document = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message |= {"content": content if content.strip() else None, "tool_calls": calls}
        return {"index": index, "message": message, "logprobs": self._logprobs(index, pieces), "finish_reason": finish}

    def _first_choices(self) -> Iterator[Document]:
        """Yield the chunks with the roles."""
        for index in range(len(self._counts)):
            yield {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def _parts(self, index: int, piece: Piece) -> Iterator[Document]:
        """Yield the chunks that a piece adds to an answer; whole calls come in front of the end."""
        content, calls, finish = self._content(index, piece.text, piece.finish)
        if calls:
            numbered = [{"index": number, **call} for number, call in enumerate(calls)]
            delta: Document = {"tool_calls": numbered}
            yield {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if content or finish or piece.logprob is not None:
            delta = {"content": content} if content else {}
            yield {"index": index, "delta": delta, "logprobs": self._logprobs(index, [piece]), "finish_reason": finish}

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> Document | None:
        """Return the logarithms of the probabilities; None if they were not requested."""
        if pieces[0].logprob is None:
            return None
        return {
            "content": [
                {
                    **self._token(piece.token, piece.logprob or 0.0),
                    "top_logprobs": [self._token(token, logprob) for token, logprob in piece.top],
                }
                for piece in pieces
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> Document:
        """Return a token with the logarithm of its probability."""
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


_KINDS: Mapping[str, type[Completion]] = {COMPLETIONS: Completion, CHAT: _ChatCompletion}
