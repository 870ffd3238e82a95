"""Text to tokens and back as a Hugging Face folder defines it: chat template, tokenizer, and the tokens that end an answer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from adapterhub.prompts import chat_template
from adapterhub.training.model.base_model import Base
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.trained_prompt import TrainedPrompt

_DTYPES = ("bfloat16", "float16", "float32")
_GENERATION_CONFIG = "generation_config.json"
_UNFINISHED = "\ufffd"  # the decoding of an incomplete character
_MAX_PROMPTS, _MAX_REMEMBERED = 64, 1 << 17  # prompts whose end marks are remembered, and characters of each
_MAX_CHARACTER_TOKENS = 8  # after so many tokens, incomplete bytes will not become a character


def stored_dtype(config: Mapping[str, Any]) -> Any:
    """Return the float dtype that a base's config.json names, or `bfloat16` if it names none."""
    stored = config.get("dtype") or config.get("torch_dtype")
    return stored if stored in _DTYPES else "bfloat16"


class Text:
    """The texts of one base.

    Attributes:
        location: The base, in messages.
        max_context: The maximum number of tokens in the context; None if unknown.
        longest_token: The number of characters of the longest token.
        ends: The tokens that end an answer according to the generation config, the config and the tokenizer.
    """

    def __init__(self, base: Base, path: Path) -> None:
        self.location, self._tokenizer = str(path), base.tokenizer
        config = base.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None)
        self.max_context = longest if isinstance(longest, int) else None
        self.longest_token = max(map(len, self._tokenizer.get_vocab()))
        self.ends = _stop_tokens(path / _GENERATION_CONFIG, config, self._tokenizer)
        self._chat_ends_of = lru_cache(_MAX_PROMPTS)(self._read_chat_ends)

    def with_prompt(self, prompt: TrainedPrompt) -> Text:
        """Return the same texts with the conversations of an adapter."""
        if not prompt:
            return self
        texts = copy.copy(self)
        # A shallow copy: only its template and the template's variables differ.
        texts._tokenizer = copy.copy(self._tokenizer)
        chat_template.apply(texts._tokenizer, prompt)
        return texts

    @property
    def has_template(self) -> bool:
        """Whether there is a chat template."""
        return bool(self._tokenizer.chat_template)

    @property
    def tool_template(self) -> str:
        """The chat template for conversations with tools; empty if there is none."""
        return str(self._tokenizer.get_chat_template(tools=[{}])) if self.has_template else ""

    @property
    def chat_ends(self) -> frozenset[int]:
        """The tokens that end an answer in a conversation: also the mark that the chat template writes after one."""
        if not self.has_template:
            return self.ends
        # One process serves requests with many prompts, each of which costs a rendering.
        variables = getattr(self._tokenizer, "template_variables", {})
        prompt = json.dumps([self._tokenizer.chat_template, variables], default=str)
        return (self._chat_ends_of if len(prompt) <= _MAX_REMEMBERED else self._read_chat_ends)(prompt)

    def _read_chat_ends(self, prompt: str) -> frozenset[int]:
        """Return `chat_ends` for a template and its variables, as JSON."""
        tokenizer = copy.copy(self._tokenizer)
        tokenizer.chat_template, tokenizer.template_variables = json_file.parse(prompt, self.location)
        try:
            text = chat_template.render(tokenizer, chat_template.ANSWERED, location=self.location)
        except FormatError:  # a template for conversations of another form
            return self.ends
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        mark = chat_template.end_mark(text, special, map(self.token_text, self.ends))
        return self.ends if mark is None else self.ends | {special[mark]}

    @cached_property
    def tokenizer_json(self) -> str:
        """The tokenizer as in tokenizer.json; empty if it is not one of the library tokenizers."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return str(backend.to_str()) if backend is not None else ""

    def conversation(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None) -> str:
        """Render the chat template, up to the beginning of the answer, in its own limited process."""
        return chat_template.render(self._tokenizer, messages, location=self.location, tools=tools, prompt=True)

    def tokens(self, text: str, *, special: bool) -> list[int]:
        """Return the ids; with `special`, also those that the model expects at a start. A chat template writes them itself."""
        return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])

    def token_text(self, token: int) -> str:
        """Return the text of a single token, or the name of a special one."""
        return str(self._tokenizer.decode([token]))

    def pieces(self) -> Callable[[int], str]:
        """Return a function that gets one token after another and returns the text that each completes.

        Each token is decoded after the previous ones, because its meaning may depend on them.
        """
        ids: list[int] = []
        start = decoded = 0

        def piece(token: int) -> str:
            nonlocal start, decoded
            ids.append(token)
            # The last tokens are decoded with and without the new one; the difference is its text.
            previous_text = self._tokenizer.decode(ids[start:decoded], skip_special_tokens=True)
            text = self._tokenizer.decode(ids[start:], skip_special_tokens=True)
            if text.endswith(_UNFINISHED) and len(ids) - decoded < _MAX_CHARACTER_TOKENS:
                return ""
            start, decoded = decoded, len(ids)
            return str(text[len(previous_text) :])

        return piece


def _stop_tokens(path: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    # Bases name their stop tokens in three places, which often differ.
    generation_stops = json_file.read_object(path).get("eos_token_id") if path.is_file() else None
    stop_tokens: set[int] = set()
    for value in (generation_stops, getattr(config, "eos_token_id", None), tokenizer.eos_token_id):
        stop_tokens.update(item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, int))
    return frozenset(stop_tokens)
