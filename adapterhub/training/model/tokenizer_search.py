"""The expressions by which a tokenizer splits or replaces text, tried on each text where somebody may wait for the end of it.

Oniguruma, which tokenizers searches with, backtracks; it limits the steps of one match, not their number, and nobody can
interrupt it. The expressions of the known tokenizers are known not to wander. Others get each text in a process of their own
first, which ends when it takes too long (`limited`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from adapterhub.training import limited
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.formats.gguf_model.byte_level import SPLITS

_KNOWN = {rule for split in SPLITS for rule in split.rules}
_SECONDS, _SPEED = 10, 100_000  # of processor time for a text of any length, and characters a second; usual are 5 million
_HINT = "Use another base"
_EMPTY: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"},
}  # fmt: skip


class Search:
    """What a tokenizer searches texts for.

    Args:
        tokenizer: One of transformers.
        where: The base, in messages.

    Raises:
        RefusedError: It decodes with an expression that no known tokenizer has.
    """

    def __init__(self, tokenizer: Any, where: str) -> None:
        self._where = where
        self._process: limited.Process | None = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        parts = {name: _state(getattr(backend, name, None)) for name in ("normalizer", "pre_tokenizer")}
        if unknown := next(_unknown(_state(getattr(backend, "decoder", None))), ""):
            raise RefusedError(where, f"its decoder searches with an unknown expression, {unknown[:60]!r}", _HINT)
        self._unknown = next(_unknown(parts), "")
        self._source = json.dumps(_EMPTY | parts)

    def check(self, texts: Any) -> None:
        """Try the unknown expressions, if there are any, on a text or several.

        Raises:
            FormatError: They took too long, or failed.
        """
        if not self._unknown:
            return
        for text in _texts(texts):
            process = self._process = self._process or limited.Process("tokenizer", self._source)
            seconds = _SECONDS + len(text) // _SPEED
            try:
                process.ask(text, seconds)
            except limited.ExceededError as error:
                self._process = None
                what = f"its tokenizer takes more than {seconds} s for a text, with {self._unknown[:60]!r} or the like"
                raise FormatError(self._where, what, _HINT) from error
            except ValueError as error:
                raise FormatError(self._where, f"its tokenizer gives up on a text ({str(error)[:200]})", _HINT) from error


def _state(part: Any) -> Any:
    return json_file.parse(part.__getstate__().decode(), "tokenizer.json", memory=None) if part is not None else None


def _texts(given: Any) -> Iterator[str]:
    if isinstance(given, str):
        yield given
    elif isinstance(given, list | tuple):
        for one in given:
            yield from _texts(one)


def _unknown(part: Any) -> Iterator[str]:
    """Yield the expressions in a part of a tokenizer that no known one has."""
    if isinstance(part, list):
        for one in part:
            yield from _unknown(one)
    elif isinstance(part, dict):
        found = part.get("Regex")
        if isinstance(found, str) and found not in _KNOWN:
            yield found
        for one in part.values():
            yield from _unknown(one)
