"""Grammars over logits: of the tokens, only those that continue a text of the grammar can be chosen.

llguidance computes the mask of the next tokens. A grammar is a text of its dialect of Lark, in which `%json` is a JSON schema
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.errors import MissingExtraError, RefusedError

# A space, or a new line and its indentation. Without a limit, a small model may write spaces until the end of its tokens.
_WHITESPACE = r"( |\n {0,40}|\n\t{0,10})?"


class GrammarError(ValueError):
    """A grammar, or a JSON schema in it, is not valid or not supported; the message is one line."""


class Grammar:
    """A grammar for the tokens of a base.

    Args:
        lark: The grammar.
        tokenizer_json: The base's tokenizer, as in tokenizer.json.
        ends: The tokens that end an answer.

    Raises:
        MissingExtraError: llguidance is not installed.
        GrammarError: The grammar is not valid, or has something that llguidance does not support.
    """

    def __init__(self, lark: str, tokenizer_json: str, ends: frozenset[int]) -> None:
        if importlib.util.find_spec("llguidance") is None:
            problem = "tools and response_format need llguidance, which is not installed"
            raise MissingExtraError("", problem, "Run `pip install 'adapterhub[train]'`")
        import llguidance

        self._start = llguidance.LLMatcher(_vocabulary(tokenizer_json, ends), lark, log_level=0)
        if self._start.is_error():
            # The first line has the reason, behind the place in the grammar; the others show the grammar.
            line = self._start.get_error().partition("\n")[0]
            raise GrammarError((line.partition("JSON schema: ")[2] or line)[:200])

    def mask(self) -> TokenMask:
        """Return a mask at the beginning of the grammar."""
        return TokenMask(self._start.deep_copy())


class TokenMask:
    """The tokens that can be next after those that were added."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    @property
    def is_complete(self) -> bool:
        """Whether nothing can follow."""
        return bool(self._matcher.is_stopped())

    def apply(self, logits: NDArray[np.float32]) -> None:
        """Set the logits, `(vocab,)`, of all other tokens to minus infinity, in place; RefusedError if nothing is left."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(np.bool_)
        if self._matcher.is_error() or not allowed.any():
            raise RefusedError("", f"the grammar of the answer is too complex ({self._matcher.get_error()[:100]})")
        # The model may have more logits than the tokenizer has tokens.
        logits[len(allowed) :] = -np.inf
        logits[: len(allowed)][~allowed] = -np.inf

    def add(self, token: int) -> None:
        """Add a token that the mask allowed."""
        self._matcher.consume_token(token)


@functools.lru_cache(maxsize=2)
def _vocabulary(tokenizer_json: str, ends: frozenset[int]) -> Any:
    """Return the tokens as llguidance needs them, which takes a second for large vocabularies."""
    import llguidance

    return llguidance.LLTokenizer(tokenizer_json, eos_token=sorted(ends))


def json_rule(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """Return the rule for a JSON value that fits a schema; with `lenient`, keywords that are not supported are ignored."""
    options = {"whitespace_pattern": _WHITESPACE, "lenient": lenient}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def literal(text: str) -> str:
    """Return the rule for exactly this text; an empty text is no rule."""
    return json.dumps(text, ensure_ascii=False) if text else ""
