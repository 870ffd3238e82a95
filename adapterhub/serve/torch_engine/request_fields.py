"""The plain fields of a request of OpenAI's API: numbers, flags and texts, each with its type and its bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub_converters.containers.json_file import is_integer, is_number
from adapterhub_converters.errors import ParameterError

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_STOPS, MAX_STOP = 16, 256
"""The largest number of stop texts, and of characters in one."""
MAX_LOGPROBS = 20
MAX_BIASES = 1024
_DEFAULT_TOKENS = 16  # of a completion, as in OpenAI's API
_DIGITS = 10  # the largest number of digits of a token's number


class Fields:
    """The fields of a document by name, checked for type and bounds; null means the default."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body

    def number(self, name: str, default: float, *, least: float = 0.0, most: float) -> float:
        """Return a number from `least` to `most`."""
        value = self._body.get(name)
        if value is None:
            return default
        if not is_number(value) or not least <= value <= most:
            raise ParameterError(name, f"is not a number from {least:g} to {most:g}")
        return float(value)

    def integer(self, name: str, default: Any, *, least: int, most: int) -> Any:
        """Return an integer from `least` to `most`."""
        value = self._body.get(name)
        if value is None:
            return default
        if not is_integer(value) or not least <= value <= most:
            raise ParameterError(name, f"is not a whole number from {least:,} to {most:,}")
        return value

    def flag(self, name: str) -> bool:
        """Return a boolean, by default False."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, bool):
            raise ParameterError(name, "is neither true nor false")
        return bool(value)

    def options(self, name: str) -> Mapping[str, Any]:
        """Return an object, by default an empty one."""
        value = self._body.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise ParameterError(name, "is not an object")
        return value or {}

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
        if not all(is_number(bias) and -100 <= bias <= 100 for bias in biases.values()):
            raise ParameterError("logit_bias", "a value is not a number from -100 to 100")
        return tuple((int(token), float(bias)) for token, bias in biases.items())

    def max_tokens(self, path: str, room: int) -> int:
        """Return the largest number of tokens of an answer; for a chat, by default all that there is `room` for."""
        names = ["max_tokens"] if path == COMPLETIONS else ["max_completion_tokens", "max_tokens"]
        for name in names:
            if self._body.get(name) is not None:
                return int(self.integer(name, None, least=0 if self.flag("echo") else 1, most=2**31))
        return max(1, room if path == CHAT else min(_DEFAULT_TOKENS, room))
