"""A record as token ids, and which of them are learned.

`text` is learned whole; of `prompt` and `completion` the completion; of `messages` what the assistant says, turn by turn, with
the mark that ends a turn. Where a turn stands is found by rendering the model's own chat template, which needs no
`{% generation %}` in it: with the conversation up to the turn, or, where a template writes earlier turns differently once
later ones follow (Qwen3 drops what was thought), with the turn's words replaced by a mark.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterhub_converters.errors import FormatError, RefusedError

# Words that no conversation holds, and that share no first or last letter with each other or any.
_MARKS = ("\ue000adapterhub\ue001", "\ue002adapterhub\ue003")
# What templates put before an answer that was not thought about: it is nobody's words.
_NO_THOUGHT = re.compile(r"\s*<think>\s*</think>\s*")
_OPENING, _CLOSING = re.compile(r"<think>\s*\Z"), re.compile(r"\s*</think>\s*")


@dataclass(frozen=True, eq=False)
class Example:
    """One document: token ids, and which of them are learned, both `(tokens,)`."""

    ids: np.ndarray
    learned: np.ndarray
    joint: bool
    """Whether it has to stay in one row; running text may go on in the next."""


def encode(record: Mapping[str, Any], tokenizer: Any, *, loss: str, where: str) -> Example:
    """One record as an example; `loss` is `all` or `completion`.

    Documents longer than the model takes are cut into rows later, so the tokenizer's warning of one (`verbose`) is none here.
    """
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(record.get("text"), str):
        ids = [*tokenizer(record["text"], verbose=False)["input_ids"], *_stop(tokenizer)]
        return Example(np.array(ids, np.int64), np.ones(len(ids), bool), joint=False)
    if isinstance(prompt, str) and isinstance(completion, str):
        asked = tokenizer(prompt, verbose=False)["input_ids"]
        answer = [*tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"], *_stop(tokenizer)]
        learned = [loss == "all"] * len(asked) + [True] * len(answer)
        return Example(np.array([*asked, *answer], np.int64), np.array(learned, bool), joint=True)
    if isinstance(prompt, list) and isinstance(completion, list):
        chat = _Chat([*prompt, *completion], record.get("tools"), tokenizer, where)
        return chat.example(loss, first=len(prompt))
    if isinstance(record.get("messages"), list):
        return _Chat(record["messages"], record.get("tools"), tokenizer, where).example(loss)
    raise FormatError(where, 'has neither "text", nor "prompt" and "completion", nor "messages"')


def _stop(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


class _Chat:
    """A conversation and the tools it may call, with the template that writes it."""

    def __init__(self, messages: list[Any], tools: Any, tokenizer: Any, where: str) -> None:
        self._tokenizer, self._where = tokenizer, where
        self._messages = [_checked(message, where) for message in messages]
        self._tools = _tools(tools, where)

    def example(self, loss: str, first: int = 0) -> Example:
        """Its tokens; of `completion` the assistant's turns from message `first` on are learned."""
        text = self._render(self._messages)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoded["input_ids"], np.int64)
        if loss == "all":
            return Example(ids, np.ones(len(ids), bool), joint=True)
        starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
        learned = np.zeros(len(ids), bool)
        for start, end in self._answers(text, first):
            learned |= (starts >= start) & (starts < end)
        return Example(ids, learned, joint=True)

    def _answers(self, text: str, first: int) -> Iterator[tuple[int, int]]:
        """Where in the rendered conversation each assistant's turn stands, its end mark included."""
        for number, message in enumerate(self._messages):
            if number >= first and message["role"] == "assistant":
                start, end = self._by_prefix(text, number) or self._by_mark(text, number)
                # A prompt may open the thought already.
                nothing = _NO_THOUGHT.match(text, start, end) or (
                    _CLOSING.match(text, start, end) if _OPENING.search(text, 0, start) else None
                )
                yield (nothing.end() if nothing else start), end

    def _by_prefix(self, text: str, number: int) -> tuple[int, int] | None:
        before = self._render(self._messages[:number], prompt=True)
        after = self._render(self._messages[: number + 1])
        return (len(before), len(after)) if text.startswith(after) and after.startswith(before) else None

    def _by_mark(self, text: str, number: int) -> tuple[int, int]:
        """From the end of the words that ask for an answer to the end of those that follow one."""
        head, end = self._content(text, number)
        asked = self._render(self._messages[:number], prompt=True)
        words = asked[_shared(asked, self._render(self._messages[:number])) :]
        # Not before what was said before: these are words that asked for another answer.
        earliest = self._content(text, number - 1)[1] if number else 0
        for asking in (words, words.partition("<think>")[0]):
            at = text.rfind(asking, earliest, head)
            if asking.strip() and at >= 0:
                return at + len(asking), end + self._closed(text[end:], number)
        raise self._lost()

    def _content(self, text: str, number: int) -> tuple[int, int]:
        """Where the words of a message stand: what changes when they are others."""
        head, tail = len(text), len(text)
        for mark in _MARKS:
            words = {"role": self._messages[number]["role"], "content": mark}
            other = self._render([*self._messages[:number], words, *self._messages[number + 1 :]])
            if mark not in other:
                raise self._lost()
            head, tail = min(head, _shared(text, other)), min(tail, _shared(text[::-1], other[::-1]))
        if head + tail > len(text):
            raise self._lost()
        return head, len(text) - tail

    def _closed(self, rest: str, number: int) -> int:
        """How much of `rest`, which follows an answer, ends it: what ends one that nothing follows, or a special token."""
        mark = _MARKS[0]
        closing = self._render([*self._messages[:number], {"role": "assistant", "content": mark}]).rpartition(mark)[2]
        if rest.startswith(closing):
            return len(closing)
        start = len(rest) - len(rest.lstrip())
        special = [token for token in self._special if rest.startswith(token, start)]
        if not special:
            raise self._lost()
        return start + max(map(len, special))

    @property
    def _special(self) -> set[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        return {str(token) for token in (*self._tokenizer.all_special_tokens, *added) if str(token).strip()}

    def _lost(self) -> RefusedError:
        reason = "the chat template writes earlier turns differently once later ones follow, so the answers can't be found"
        return RefusedError(self._where, reason, 'Set loss = "all", or make one example of each answer')

    def _render(self, messages: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
        if not messages:
            return ""
        options = {"tokenize": False, "add_generation_prompt": prompt} | ({"tools": self._tools} if self._tools else {})
        try:
            return str(self._tokenizer.apply_chat_template(list(messages), **options))
        except Exception as error:
            raise FormatError(self._where, f"the model's chat template refuses it ({str(error)[:200]})") from error


def _shared(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    if text == other:
        return len(text)
    return next((at for at, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


def _checked(message: Any, where: str) -> dict[str, Any]:
    """The message, with empty words where it only calls tools."""
    calls = isinstance(message, dict) and bool(message.get("tool_calls"))
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not ("content" in message or calls):
        raise FormatError(where, 'a message needs "role" and "content"')
    return {**message, "content": message.get("content") or ""} if calls else message


def _tools(tools: Any, where: str) -> list[Any] | None:
    """Tools as a list of JSON schemas; data sets with one kind of column keep them as the text of one."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise FormatError(where, '"tools" is text, and not JSON') from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise FormatError(where, '"tools" is not a list of JSON schemas')
    return tools or None
