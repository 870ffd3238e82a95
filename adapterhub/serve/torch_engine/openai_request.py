"""Requests in the form of OpenAI's completions and chat completions: documents in, requests for a host out.

What would change an answer and is not supported is refused by name, and so is an unknown parameter: an answer that ignores part
of the request is worse than none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

from adapterhub_converters.errors import ParameterError

from .streams import AnsweringHost
from .values import TOO_LONG, Blend, Request

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_STOPS, MAX_STOP = 16, 256
"""The largest number of stop texts, and of characters in one."""
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_ANSWERS = 128
"""The largest number of answers to a request: its prompts times `n`."""
_DEFAULT_TOKENS = 16  # of a completion, as in OpenAI's API
_MAX_SEED = 2**63
_LEAST_REPETITION = 0.01  # of the repetition penalty, so that no logit overflows
_DIGITS = 10  # the largest number of digits of a token's number
_SLACK = 4  # characters of a text for each one left in its tokens: some tokenizers compose characters, or drop spaces
# Parameters that are not supported, with the values that ask for nothing; null always does.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "audio": (), "best_of": (1,), "echo": (False,), "function_call": ("none", "auto"),
    "functions": ([],), "modalities": (["text"],), "prediction": (),
    "reasoning_effort": (), "response_format": ({"type": "text"},), "suffix": ("",), "tool_choice": ("none", "auto"),
    "tools": ([],), "verbosity": (), "web_search_options": (),
}  # fmt: skip
# Parameters that do not change an answer.
_IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "store", "user",
}  # fmt: skip
_SHARED_FIELDS = {
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
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "top_k",
    "min_p",
    "ignore_eos",
}
_PATH_FIELDS = {COMPLETIONS: {"prompt"}, CHAT: {"messages", "max_completion_tokens", "top_logprobs"}}


@dataclass(frozen=True)
class ApiRequest:
    """The requests of a document, `n` for each prompt, and the form of their answers."""

    requests: list[Request]
    stream: bool
    include_usage: bool
    n: int

    @classmethod
    def read(cls, host: AnsweringHost, path: str, body: Mapping[str, Any], blend: Blend) -> ApiRequest:
        """Read a document; ParameterError names what is wrong."""
        _check_names(body, path)
        values = _Fields(body)
        n = values.integer("n", 1, least=1, most=MAX_ANSWERS)
        prompts = _prompts(host, body.get("prompt"), n) if path == COMPLETIONS else [_conversation(host, body.get("messages"))]
        common = Request(
            ids=[],
            blend=blend,
            max_tokens=0,
            temperature=values.number("temperature", 1.0, most=2.0),
            top_p=values.number("top_p", 1.0, most=1.0),
            stop=values.texts("stop"),
            logprobs=values.logprobs(path),
            bias=values.bias(),
            presence_penalty=values.number("presence_penalty", 0.0, least=-2.0, most=2.0),
            frequency_penalty=values.number("frequency_penalty", 0.0, least=-2.0, most=2.0),
            repetition_penalty=values.number("repetition_penalty", 1.0, least=_LEAST_REPETITION, most=1 / _LEAST_REPETITION),
            # vLLM and llama-server write all tokens as 0 or -1.
            top_k=max(0, values.integer("top_k", 0, least=-1, most=2**31)),
            min_p=values.number("min_p", 0.0, most=1.0),
            ignore_eos=values.flag("ignore_eos"),
        )
        seed = values.integer("seed", None, least=-_MAX_SEED, most=_MAX_SEED - 1)
        options = body.get("stream_options")
        if options is not None and not isinstance(options, Mapping):
            raise ParameterError("stream_options", "is not an object")
        requests = []
        for ids in prompts:
            prompt_request = replace(common, ids=ids, max_tokens=values.max_tokens(path, host.longest - len(ids)))
            # Different answers for one seed, but the same each time; numpy's seeds are not negative.
            requests += [
                replace(prompt_request, seed=None if seed is None else (seed + index) % _MAX_SEED) for index in range(n)
            ]
        return cls(requests, values.flag("stream"), bool(options and options.get("include_usage")), n)


def _check_names(body: Mapping[str, Any], path: str) -> None:
    """Raise ParameterError for parameters that are unknown or not supported."""
    for name, value in body.items():
        if name in _SHARED_FIELDS or name in _PATH_FIELDS[path] or name in _IGNORED or value is None:
            continue
        if name not in _NEUTRAL:
            raise ParameterError(str(name)[:80], "unknown parameter")
        if value not in _NEUTRAL[name]:
            raise ParameterError(name, "is not supported by this engine", "Leave it out")


class _Fields:
    """The fields of a document by name, checked for type and bounds; null means the default."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def number(self, name: str, default: float, *, least: float = 0.0, most: float) -> float:
        """Return a number from `least` to `most`."""
        value = self._body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise ParameterError(name, f"is not a number from {least:g} to {most:g}")
        return float(value)

    def integer(self, name: str, default: Any, *, least: int, most: int) -> Any:
        """Return an integer from `least` to `most`."""
        value = self._body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ParameterError(name, f"is not a whole number from {least:,} to {most:,}")
        return value

    def flag(self, name: str) -> bool:
        """Return a boolean, by default False."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, bool):
            raise ParameterError(name, "is neither true nor false")
        return bool(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of a few texts, which may be given as a single text."""
        value = self._body.get(name)
        texts = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) and 0 < len(text) <= MAX_STOP for text in texts):
            raise ParameterError(name, f"is not a text, or a list of texts, of at most {MAX_STOP} characters each")
        if len(texts) > MAX_STOPS:
            raise ParameterError(name, f"has {len(texts)} texts; at most {MAX_STOPS} are supported")
        return tuple(texts)

    def logprobs(self, path: str) -> int | None:
        """Return the number of likeliest tokens to return; in completions `logprobs` is this number, in chats it is a flag."""
        if path == COMPLETIONS:
            count: int | None = self.integer("logprobs", None, least=0, most=MAX_LOGPROBS)
            return count
        count = self.integer("top_logprobs", 0, least=0, most=MAX_LOGPROBS)
        if not self.flag("logprobs"):
            if count:
                raise ParameterError("top_logprobs", "needs logprobs to be true")
            return None
        return count

    def bias(self) -> tuple[tuple[int, float], ...]:
        """Return tokens, and what is added to their logits."""
        biases = self._body.get("logit_bias") or {}
        if not isinstance(biases, Mapping) or len(biases) > MAX_BIASES:
            raise ParameterError("logit_bias", f"is not an object of at most {MAX_BIASES} tokens")
        if not all(key.isascii() and key.isdigit() and len(key) < _DIGITS for key in biases):
            raise ParameterError("logit_bias", "a key is not the number of a token")
        if not all(
            isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100 for bias in biases.values()
        ):
            raise ParameterError("logit_bias", "a value is not a number from -100 to 100")
        return tuple((int(token), float(bias)) for token, bias in biases.items())

    def max_tokens(self, path: str, room: int) -> int:
        """Return the largest number of tokens of an answer; for a chat, by default all that there is `room` for."""
        names = ["max_tokens"] if path == COMPLETIONS else ["max_completion_tokens", "max_tokens"]
        for name in names:
            if self._body.get(name) is not None:
                return int(self.integer(name, None, least=1, most=2**31))
        return max(1, room if path == CHAT else min(_DEFAULT_TOKENS, room))


def _prompts(host: AnsweringHost, prompt: object, n: int) -> list[list[int]]:
    """Return the tokens of each prompt; `prompt` is a text, a list of texts, tokens, or a list of lists of tokens.

    Raises:
        ParameterError: It has another form, or asks for too many answers, `n` per prompt.
    """
    items = prompt if isinstance(prompt, list) and prompt and not _are_tokens(prompt) else [prompt]
    if len(items) * n > MAX_ANSWERS:
        problem = f"asks for {len(items) * n:,} answers, n to each prompt; at most {MAX_ANSWERS} are supported"
        raise ParameterError("prompt", problem, "Send fewer prompts at once")
    token_lists = []
    for item in items:
        if isinstance(item, str):
            token_lists.append(_tokens(host, "prompt", item, special=True))
        elif _are_tokens(item):
            token_lists.append(item)
        else:
            raise ParameterError("prompt", "is not a text or a list of tokens, or a list of these")
    return token_lists


def _are_tokens(value: object) -> TypeGuard[list[int]]:
    """Return whether a value is a list of tokens, not empty."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    )


def _tokens(host: AnsweringHost, name: str, text: str, *, special: bool) -> list[int]:
    """Return the tokens of a text; refuse one that is too long for any tokenization to fit.

    A tokenizer takes two hundred times the memory of its text.
    """
    most = _SLACK * host.longest * host.text.longest_token
    if len(text) > most:
        problem = f"has {len(text):,} characters, and the base sees {host.longest:,} tokens at most"
        raise ParameterError(name, problem, "Shorten the text", code=TOO_LONG)
    return host.text.tokens(text, special=special)


def _conversation(host: AnsweringHost, messages: object) -> list[int]:
    """Return the tokens of a conversation, up to the beginning of the answer."""
    if not host.text.has_template:
        raise ParameterError("messages", f"{host.text.location} has no chat template", "Ask for a completion of a text")
    if not isinstance(messages, list) or not messages:
        raise ParameterError("messages", "is not a list of messages")
    return _tokens(host, "messages", host.text.conversation([_message(message) for message in messages]), special=False)


def _message(message: object) -> dict[str, Any]:
    """Return a message with its content as one text."""
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
