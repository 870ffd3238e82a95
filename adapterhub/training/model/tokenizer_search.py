"""Trials of the expressions with which a tokenizer splits or replaces text, on each text before it could hang this process.

Oniguruma, the regular expression library of tokenizers, backtracks. It limits the steps of one match but not the number of
matches, and cannot be interrupted. The expressions of known tokenizers are known to be fast. Other expressions first get each
text in a process of their own, which is ended when it takes too long (`process_limits`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from adapterhub.prompts import process_limits
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.formats.gguf_model.byte_level import SPLITS

_KNOWN_EXPRESSIONS = {rule for split in SPLITS for rule in split.rules}
# Seconds of processor time for any text, and more for long ones; usual are 5 million characters per second.
_SECONDS, _CHARACTERS_PER_SECOND = 10, 100_000
_HINT = "Use another base"
# The components to try are put into a tokenizer without a vocabulary: splitting does not need one.
_EMPTY_TOKENIZER: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "post_processor": None, "decoder": None,
    "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"},
}  # fmt: skip


class ExpressionTrial:
    """A trial of the expressions that a tokenizer searches texts with.

    Args:
        tokenizer: A tokenizer of transformers.
        location: The base, in messages.

    Raises:
        RefusedError: It decodes with an expression that no known tokenizer has.
    """

    def __init__(self, tokenizer: Any, location: str) -> None:
        self._location = location
        backend = getattr(tokenizer, "backend_tokenizer", None)
        components = {name: _parsed_state(getattr(backend, name, None)) for name in ("normalizer", "pre_tokenizer")}
        if unknown_expression := next(_unknown_expressions(_parsed_state(getattr(backend, "decoder", None))), ""):
            raise RefusedError(location, f"its decoder searches with an unknown expression, {unknown_expression[:60]!r}", _HINT)
        self._unknown_expression = next(_unknown_expressions(components), "")
        self._process = process_limits.Process("tokenizer", json.dumps(_EMPTY_TOKENIZER | components))

    def check(self, texts: Any) -> None:
        """Try the unknown expressions, if there are any, on one text or several.

        Raises:
            FormatError: They took too long, or failed.
        """
        if not self._unknown_expression:
            return
        for text in _texts(texts):
            seconds = _SECONDS + len(text) // _CHARACTERS_PER_SECOND
            try:
                self._process.request(text, seconds)
            except process_limits.LimitExceededError as error:
                problem = (
                    f"its tokenizer takes more than {seconds} s for a text, with {self._unknown_expression[:60]!r} or the like"
                )
                raise FormatError(self._location, problem, _HINT) from error
            except ValueError as error:
                raise FormatError(self._location, f"its tokenizer gives up on a text ({str(error)[:200]})", _HINT) from error


def _parsed_state(component: Any) -> Any:
    return json_file.parse(component.__getstate__().decode(), "tokenizer.json", memory=None) if component is not None else None


def _texts(texts: Any) -> Iterator[str]:
    if isinstance(texts, str):
        yield texts
    elif isinstance(texts, list | tuple):
        for item in texts:
            yield from _texts(item)


def _unknown_expressions(component: Any) -> Iterator[str]:
    """Yield the expressions in a component of a tokenizer that no known tokenizer has."""
    if isinstance(component, list):
        for item in component:
            yield from _unknown_expressions(item)
    elif isinstance(component, dict):
        expression = component.get("Regex")
        if isinstance(expression, str) and expression not in _KNOWN_EXPRESSIONS:
            yield expression
        for item in component.values():
            yield from _unknown_expressions(item)
