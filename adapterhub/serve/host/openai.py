"""OpenAI's completions and chat completions: documents in, documents out. Knows no HTTP.

What would change an answer and is not supported is refused by name, and so is a parameter that is unknown: an answer that
ignores what was asked for is worse than none.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from adapterhub_converters.errors import AdapterhubError, NotFoundError, ParameterError, StoppedError

from .streams import Answering, Stream, together
from .values import TOO_LONG, Blend, FullError, Piece, Request

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_STOPS, MAX_STOP = 16, 256
"""The number of stop texts, and the characters of one."""
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_ANSWERS = 128
"""Prompts of a request, each counted `n` times."""
_DEFAULT_TOKENS = 16  # of a completion, as OpenAI's
_MAX_SEED = 2**63
_DIGITS = 10  # of the number of a token, at most
_SLACK = 4  # characters of a text for one that is left of it: some tokenizers compose characters, or leave out spaces
# Parameters with values that ask for nothing more; None always does.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (), "best_of": (1,), "echo": (False,), "frequency_penalty": (0,), "function_call": ("none", "auto"),
    "functions": ([],), "modalities": (["text"],), "prediction": (), "presence_penalty": (0,),
    "reasoning_effort": (), "response_format": ({"type": "text"},), "suffix": ("",), "tool_choice": ("none", "auto"),
    "tools": ([],), "verbosity": (), "web_search_options": (),
}  # fmt: skip
# Parameters that do not change an answer.
_IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "store", "user",
}  # fmt: skip
_SHARED = {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "n",
    "stream",
    "stream_options",
    "stop",
    "seed",
    "logprobs",
    "logit_bias",
}
_OWN = {COMPLETIONS: {"prompt"}, CHAT: {"messages", "max_completion_tokens", "top_logprobs"}}

Document = dict[str, Any]


class ApiError(Exception):
    """An error in OpenAI's form.

    Attributes:
        status: Of HTTP.
        document: The error object.
        retry_after: Seconds after which another try makes sense; None where it never does.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, 1 if status in (429, 503) else None
        kinds = {404: "not_found_error", 429: "rate_limit_error", 503: "overloaded_error", 500: "server_error"}
        kind = kinds.get(status, "invalid_request_error")
        self.document: Document = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def ask(host: Answering, path: str, body: Mapping[str, Any], blend: Blend, model: str) -> Completion:
    """Have a request answered.

    Args:
        path: `COMPLETIONS` or `CHAT`.
        body: The document of the request; its `model` is not read.
        blend: What answers.
        model: The name of it, for the answer.

    Raises:
        ApiError: It is malformed, or asks for something that is not supported.
    """
    with _as_api_errors():
        asked = _Asked.read(host, path, body, blend)
        streams: list[Stream] = []
        try:
            for request in asked.requests:
                streams.append(host.submit(request, beside=streams[-1] if streams else None))
        except BaseException:
            _cancel(streams)
            raise
    return _KINDS[path](host, asked, streams, model)


def _cancel(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.cancel()


@contextmanager
def _as_api_errors() -> Iterator[None]:
    """Turn the errors of this program into those of the API."""
    try:
        yield
    except FullError as error:
        raise ApiError(429, str(error), code="queue_full") from error
    except NotFoundError as error:
        raise ApiError(404, str(error), param="model", code=error.code or "model_not_found") from error
    except ParameterError as error:
        code = "context_length_exceeded" if error.code == TOO_LONG else error.code or None
        raise ApiError(400, str(error), param=error.parameter, code=code) from error
    except StoppedError as error:
        raise ApiError(503, str(error)) from error
    except AdapterhubError as error:
        raise ApiError(400, str(error), code=error.code or None) from error
    except Exception as error:
        raise ApiError(500, f"the engine failed ({type(error).__name__})") from error


# ---- What is asked for


@dataclass(frozen=True)
class _Asked:
    """The requests of a document, `n` for each prompt, and how their answers are written."""

    requests: list[Request]
    stream: bool
    include_usage: bool
    n: int

    @classmethod
    def read(cls, host: Answering, path: str, body: Mapping[str, Any], blend: Blend) -> _Asked:
        """Read a document; ParameterError names what is wrong."""
        _check_names(body, path)
        values = _Values(body)
        n = values.whole("n", 1, least=1, most=MAX_ANSWERS)
        if path == COMPLETIONS:
            prompts = _prompts(host, body.get("prompt"), most=MAX_ANSWERS // n)
        else:
            prompts = [_conversation(host, body.get("messages"))]
        common = Request(
            ids=[],
            blend=blend,
            max_tokens=0,
            temperature=values.number("temperature", 1.0, most=2.0),
            top_p=values.number("top_p", 1.0, most=1.0),
            stop=values.texts("stop"),
            logprobs=values.logprobs(path),
            bias=values.bias(),
        )
        seed = values.whole("seed", None, least=-_MAX_SEED, most=_MAX_SEED - 1)
        options = body.get("stream_options")
        if options is not None and not isinstance(options, Mapping):
            raise ParameterError("stream_options", "is not an object")
        requests = []
        for ids in prompts:
            own = replace(common, ids=ids, max_tokens=values.max_tokens(path, host.longest - len(ids)))
            # Different answers for one seed, the same each time; a seed of numpy's is not negative.
            requests += [replace(own, seed=None if seed is None else (seed + at) % _MAX_SEED) for at in range(n)]
        return cls(requests, values.flag("stream"), bool(options and options.get("include_usage")), n)


def _check_names(body: Mapping[str, Any], path: str) -> None:
    for name, value in body.items():
        if name in _SHARED or name in _OWN[path] or name in _IGNORED or value is None:
            continue
        if name not in _NEUTRAL:
            raise ParameterError(str(name)[:80], "unknown parameter")
        if value not in _NEUTRAL[name]:
            raise ParameterError(name, "is not supported by this engine", "Leave it out")


class _Values:
    """Values of a document by their names, of the right kind and in their bounds; what is null has its default."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def number(self, name: str, default: float, *, most: float) -> float:
        """From 0 to `most`."""
        value = self._body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise ParameterError(name, f"is not a number from 0 to {most:g}")
        return float(value)

    def whole(self, name: str, default: Any, *, least: int, most: int) -> Any:
        """A whole number from `least` to `most`."""
        value = self._body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ParameterError(name, f"is not a whole number from {least:,} to {most:,}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, bool):
            raise ParameterError(name, "is neither true nor false")
        return bool(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A text, or a list of a few."""
        value = self._body.get(name)
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP for one in found):
            raise ParameterError(name, f"is not a text, or a list of texts, of at most {MAX_STOP} characters each")
        if len(found) > MAX_STOPS:
            raise ParameterError(name, f"has {len(found)} texts; at most {MAX_STOPS} are supported")
        return tuple(found)

    def logprobs(self, path: str) -> int | None:
        """The number of likeliest tokens to return; a completion's `logprobs` is this number, in a chat it is a flag."""
        if path == COMPLETIONS:
            count: int | None = self.whole("logprobs", None, least=0, most=MAX_LOGPROBS)
            return count
        count = self.whole("top_logprobs", 0, least=0, most=MAX_LOGPROBS)
        if not self.flag("logprobs"):
            if count:
                raise ParameterError("top_logprobs", "needs logprobs to be true")
            return None
        return count

    def bias(self) -> tuple[tuple[int, float], ...]:
        """Tokens and what is added to their logits."""
        found = self._body.get("logit_bias") or {}
        if not isinstance(found, Mapping) or len(found) > MAX_BIASES:
            raise ParameterError("logit_bias", f"is not an object of at most {MAX_BIASES} tokens")
        if not all(key.isascii() and key.isdigit() and len(key) < _DIGITS for key in found):
            raise ParameterError("logit_bias", "a key is not the number of a token")
        if not all(
            isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100 for bias in found.values()
        ):
            raise ParameterError("logit_bias", "a value is not a number from -100 to 100")
        return tuple((int(token), float(bias)) for token, bias in found.items())

    def max_tokens(self, path: str, room: int) -> int:
        """The largest number of tokens of an answer: of a chat, by default all that there is `room` for."""
        names = ["max_tokens"] if path == COMPLETIONS else ["max_completion_tokens", "max_tokens"]
        for name in names:
            if self._body.get(name) is not None:
                return int(self.whole(name, None, least=1, most=2**31))
        return max(1, room if path == CHAT else min(_DEFAULT_TOKENS, room))


def _prompts(host: Answering, prompt: object, *, most: int) -> list[list[int]]:
    """The tokens of each prompt: a text, a list of texts, tokens, or a list of lists of tokens."""
    several = prompt if isinstance(prompt, list) and prompt and not _are_tokens(prompt) else [prompt]
    if len(several) > most:
        raise ParameterError("prompt", f"has {len(several):,} prompts; at most {MAX_ANSWERS} answers are supported, n included")
    found = []
    for one in several:
        if isinstance(one, str):
            found.append(_tokens(host, "prompt", one, special=True))
        elif _are_tokens(one):
            found.append(one)
        else:
            raise ParameterError("prompt", "is not a text or a list of tokens, or a list of these")
    return found


def _are_tokens(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and bool(value) and all(isinstance(one, int) and not isinstance(one, bool) for one in value)


def _tokens(host: Answering, name: str, text: str, *, special: bool) -> list[int]:
    """The tokens of a text, which takes a tokenizer two hundred times its memory; refused if no tokens could be so few."""
    most = _SLACK * host.longest * host.text.longest_token
    if len(text) > most:
        what = f"has {len(text):,} characters, and the base sees {host.longest:,} tokens at most"
        raise ParameterError(name, what, "Ask with less", code=TOO_LONG)
    return host.text.tokens(text, special=special)


def _conversation(host: Answering, messages: object) -> list[int]:
    """The tokens of a conversation, up to the beginning of the answer."""
    if not host.text.has_template:
        raise ParameterError("messages", f"{host.text.where} has no chat template", "Ask for a completion of a text")
    if not isinstance(messages, list) or not messages:
        raise ParameterError("messages", "is not a list of messages")
    return _tokens(host, "messages", host.text.conversation([_message(one) for one in messages]), special=False)


def _message(message: object) -> Document:
    """A message whose content is one text."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ParameterError("messages", "a message is not an object with a role")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ParameterError("messages", "a part of a message is not a text, which this engine does not support")
        content = "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ParameterError("messages", "the content of a message is not a text")
    return {**message, "content": content or ""}


# ---- The answer


class Completion:
    """An answer that is on its way, as a document of completions; to be read once.

    Attributes:
        stream: Whether it was asked for in chunks.
    """

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, host: Answering, asked: _Asked, streams: Sequence[Stream], model: str) -> None:
        self.stream, self._asked, self._streams, self._token_text = asked.stream, asked, streams, host.text.of
        self._common = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._counts = [0] * len(streams)
        self._lengths = [0] * len(streams)  # of the texts so far, in characters

    def whole(self) -> Document:
        """Return the whole answer; ApiError if the host fails or the request is canceled."""
        pieces: list[list[Piece]] = [[] for _ in self._streams]
        for index, piece in self._read():
            pieces[index].append(piece)
        choices = [self._choice(index, some) for index, some in enumerate(pieces)]
        return {**self._common, "object": self.kind, "choices": choices, "usage": self._usage()}

    def chunks(self) -> Iterator[Document]:
        """Yield it in parts, without the `[DONE]` behind them; errors are those of `whole`."""
        usage = {"usage": None} if self._asked.include_usage else {}
        common = {**self._common, "object": self.chunk_kind, **usage}
        for choice in self._first_choices():
            yield {**common, "choices": [choice]}
        for index, piece in self._read():
            if piece.text or piece.finish or piece.logprob is not None:
                yield {**common, "choices": [self._part(index, piece)]}
        if self._asked.include_usage:
            yield {**common, "choices": [], "usage": self._usage()}

    def cancel(self) -> None:
        """Have the host forget it; from any thread, at any time."""
        _cancel(self._streams)

    def _read(self) -> Iterator[tuple[int, Piece]]:
        """Yield the pieces of all answers; whatever ends this early cancels the requests."""
        try:
            with _as_api_errors():
                for index, piece in together(self._streams):
                    self._counts[index] += 1
                    yield index, piece
        finally:
            self.cancel()

    def _usage(self) -> Document:
        prompts = sum(len(request.ids) for request in self._asked.requests[:: self._asked.n])
        answers = sum(self._counts)
        return {"prompt_tokens": prompts, "completion_tokens": answers, "total_tokens": prompts + answers}

    # What differs between the two kinds of documents

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Document:
        """Return an answer."""
        text = "".join(piece.text for piece in pieces)
        rest = {"logprobs": self._logprobs(index, pieces), "finish_reason": pieces[-1].finish}
        return {"index": index, "text": text, **rest}

    def _first_choices(self) -> Iterator[Document]:
        """Yield what comes before the first piece."""
        yield from ()

    def _part(self, index: int, piece: Piece) -> Document:
        """Return a part of an answer."""
        return self._choice(index, [piece])

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> Document | None:
        """Return the logarithms of the probabilities; None if they were not asked for."""
        if pieces[0].logprob is None:
            return None
        offsets = []
        for piece in pieces:
            offsets.append(self._lengths[index])
            self._lengths[index] += len(piece.text)
        return {
            "tokens": [self._token_text(piece.token) for piece in pieces],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": [{self._token_text(token): logprob for token, logprob in piece.top} for piece in pieces],
            "text_offset": offsets,
        }


class _Chat(Completion):
    """Answers as documents of chat completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Document:
        """Return an answer."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces), "refusal": None}
        rest = {"logprobs": self._logprobs(index, pieces), "finish_reason": pieces[-1].finish}
        return {"index": index, "message": message, **rest}

    def _first_choices(self) -> Iterator[Document]:
        """Yield the roles."""
        for index in range(len(self._counts)):
            yield {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def _part(self, index: int, piece: Piece) -> Document:
        """Return a part of an answer."""
        delta = {"content": piece.text} if piece.text else {}
        rest = {"logprobs": self._logprobs(index, [piece]), "finish_reason": piece.finish}
        return {"index": index, "delta": delta, **rest}

    def _logprobs(self, index: int, pieces: Sequence[Piece]) -> Document | None:
        """Return the logarithms of the probabilities; None if they were not asked for."""
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
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


_KINDS: Mapping[str, type[Completion]] = {COMPLETIONS: Completion, CHAT: _Chat}
