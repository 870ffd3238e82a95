"""The tokens of a request, as an engine reports them or as an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterhub_converters.lazy_dataclass import dataclass


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The tokens of a request.

    Attributes:
        prompt: Tokens of the prompt, with those that the engine took from its cache.
        cached: Those of them that the engine took from its cache; 0 if it does not say.
        answer: Tokens of the answer.
        is_estimate: Whether the engine reported nothing, or not all.
    """

    prompt: int = 0
    cached: int = 0
    answer: int = 0
    is_estimate: bool = False

    @property
    def total(self) -> int:
        """The tokens that budgets count."""
        return self.prompt + self.answer

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(
            self.prompt + other.prompt,
            self.cached + other.cached,
            self.answer + other.answer,
            self.is_estimate or other.is_estimate,
        )

    def __str__(self) -> str:
        """As a log line has them: `12+34 tokens, 8 cached`; a tilde marks an estimate."""
        cached = f", {self.cached} cached" if self.cached else ""
        return f"{'~' if self.is_estimate else ''}{self.prompt}+{self.answer} tokens{cached}"

    def fields(self) -> dict[str, int | bool]:
        """Return them as the fields of a log line."""
        return {
            "prompt_tokens": self.prompt,
            "cached_tokens": self.cached,
            "answer_tokens": self.answer,
            "estimated": self.is_estimate,
        }

    def at_least(self, earlier: TokenCounts | None) -> TokenCounts:
        """Return the larger of each number of this report and of an earlier one of the same request."""
        if earlier is None:
            return self
        prompt, cached = max(self.prompt, earlier.prompt), max(self.cached, earlier.cached)
        return TokenCounts(prompt, cached, max(self.answer, earlier.answer))

    @classmethod
    def from_usage(cls, usage: object) -> TokenCounts | None:
        """Read the `usage` of an answer in OpenAI's or Anthropic's form; None if it states no tokens."""
        if not isinstance(usage, Mapping):
            return None
        if any(isinstance(usage.get(name), int) for name in ("input_tokens", "output_tokens")):
            # Anthropic's input tokens are those that no cache had; a response's are all, and name the cached ones.
            cached = _count(usage, "cache_read_input_tokens")
            prompt = _count(usage, "input_tokens") + cached + _count(usage, "cache_creation_input_tokens")
            cached = cached or min(_count(usage.get("input_tokens_details"), "cached_tokens"), prompt)
            return cls(prompt, cached, _count(usage, "output_tokens"))
        if not isinstance(usage.get("prompt_tokens"), int):
            return None
        prompt = _count(usage, "prompt_tokens")
        # Embeddings have no answer; some servers state only the total.
        answer = _count(usage, "completion_tokens") or max(_count(usage, "total_tokens") - prompt, 0)
        return cls(prompt, min(_count(usage.get("prompt_tokens_details"), "cached_tokens"), prompt), answer)


def _count(members: Any, name: str) -> int:
    """Return a number of tokens; 0 if there is none, or an impossible one."""
    number = members.get(name) if isinstance(members, Mapping) else None
    return number if isinstance(number, int) and 0 <= number < 1 << 40 else 0
