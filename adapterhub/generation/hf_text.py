"""Text to tokens and back as a Hugging Face folder defines it: chat template, tokenizer, and which tokens end an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapterhub.training.data import chat_template
from adapterhub.training.model.base import Base
from adapterhub_converters.containers import json_file

_DTYPES = ("bfloat16", "float16", "float32")
_GENERATION = "generation_config.json"
_UNFINISHED = "\ufffd"  # what an incomplete character decodes to
_LONGEST = 8  # tokens of one character; what is incomplete after so many are bytes that are no character


def stored_dtype(config: Mapping[str, Any]) -> Any:
    """Return the type of floats that a base's config.json names, `bfloat16` if it names none."""
    stored = config.get("dtype") or config.get("torch_dtype")
    return stored if stored in _DTYPES else "bfloat16"


class Text:
    """The texts of one base.

    Attributes:
        where: The base, in messages.
        longest: The number of tokens that the model can see; None if unknown.
        longest_token: The number of characters of the longest token.
        ends: The tokens that end an answer, by the generation config, the config and the tokenizer.
    """

    def __init__(self, base: Base, path: Path) -> None:
        self.where, self._tokenizer = str(path), base.tokenizer
        config = base.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        self.longest = longest if isinstance(longest, int) else None
        self.longest_token = max(map(len, self._tokenizer.get_vocab()))
        self.ends = _ends(path / _GENERATION, config, self._tokenizer)

    @property
    def has_template(self) -> bool:
        """Whether the base has a chat template."""
        return bool(self._tokenizer.chat_template)

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Render the chat template, up to the beginning of the answer, in its own bounded process."""
        return chat_template.render(self._tokenizer, messages, where=self.where, prompt=True)

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """Return the ids; `special`: with those that the model expects at a start. A chat template writes them itself."""
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def of(self, token: int) -> str:
        """Return the text of one token by itself, a special one by its name."""
        return str(self._tokenizer.decode([token]))

    def pieces(self) -> Callable[[int], str]:
        """A function from one token after another to the text that is complete with it.

        Each is decoded behind the last ones, because what it means may depend on them.
        """
        ids: list[int] = []
        start = done = 0

        def piece(token: int) -> str:
            nonlocal start, done
            ids.append(token)
            before = self._tokenizer.decode(ids[start:done], skip_special_tokens=True)
            now = self._tokenizer.decode(ids[start:], skip_special_tokens=True)
            if now.endswith(_UNFINISHED) and len(ids) - done < _LONGEST:
                return ""
            start, done = done, len(ids)
            return str(now[len(before) :])

        return piece


def _ends(path: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    own = json_file.read_object(path).get("eos_token_id") if path.is_file() else None
    found: set[int] = set()
    for value in (own, getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        found.update(item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, int))
    return frozenset(found)
