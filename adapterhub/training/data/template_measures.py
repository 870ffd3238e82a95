"""Where the answers of a rendered conversation are, from three renders instead of several for each answer.

The first render is the text. In the second, a mark follows the content of each answer and of each message before one; it counts
only if the text is the same without the marks. The third is the prompt of the last answer. It tells what the template writes
between the end of a message and an answer, and the end of the text tells what it writes after one. Where that is found at the
marks of earlier turns, their answers are located. All others are left to the conversation, which renders them one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from adapterhub_converters.lazy_dataclass import dataclass

from .messages import Message

THOUGHT_START = "<think>"


def plan(messages: Sequence[Message], answers: Sequence[int]) -> dict[str, Any]:
    """Return what the process of the template measures to locate `answers`, numbers of messages.

    `marks` are the places of marks by message; `prompts` the numbers of answers whose prompts are rendered, the last one after
    each kind of message; `several`, whether marks are needed even if these prompts are found; `closing` the answer whose end is
    rendered, where the conversation does not end with one.
    """
    last_after = {_kind(messages[number - 1]): number for number in answers if number}
    marked = {number - 1 for number in answers if number} | set(answers)
    marks = {number: len(messages[number]["content"].rstrip()) for number in sorted(marked) if _is_markable(messages[number])}
    last = max((number for number in answers if number in marks), default=None)
    return {
        "marks": marks,
        "prompts": sorted(last_after.values()),
        "several": bool(answers) and list(answers) != [len(messages) - 1],
        "closing": None if last == len(messages) - 1 else last,
    }


def _kind(message: Message) -> tuple[str, bool]:
    return message["role"], bool(message.get("tool_calls"))


def _is_markable(message: Message) -> bool:
    # A mark would make an empty content count as one, and calls are written behind it.
    return bool(message["content"].strip()) and not message.get("tool_calls")


@dataclass(frozen=True)
class Measures:
    """What was measured of a conversation.

    Attributes:
        text: The rendered conversation.
        prompts: The prompts of answers by number: the length of one that the text starts with, or another prompt's text.
        positions: The ends of contents in the text by the number of their message, without white space; empty if unknown.
        closing: What the template writes after the content of a last answer; None if it is at the end of the text.
        special_texts: Tokens that may end an answer.
    """

    messages: Sequence[Message]
    text: str
    prompts: dict[int, int | str | None]
    positions: dict[int, int]
    closing: str | None
    special_texts: Iterable[str]

    @classmethod
    def of(cls, messages: Sequence[Message], plan: dict[str, Any], answer: dict[str, Any], special: Iterable[str]) -> Measures:
        """Return the measures in the answer of the template's process."""
        prompts = dict(zip(plan["prompts"], answer["prompts"], strict=True))
        positions = {int(number): position for number, position in (answer["positions"] or {}).items()}
        return cls(messages, answer["text"], prompts, positions, answer["closing"], special)

    def span(self, number: int) -> tuple[int, int] | None:
        """Return the start and end of an answer, including its end mark; None if that is not certain."""
        start, end = self._start(number), self._end(number)
        content_end = self.positions.get(number, end)
        if start is None or end is None or content_end is None or not start <= content_end <= end:
            return None
        return start, end

    def _start(self, number: int) -> int | None:
        prompt = self.prompts.get(number)
        if isinstance(prompt, int):
            return prompt
        anchor = self.positions.get(number - 1)
        if anchor is None:
            return None
        tail = _tail(self.messages[number - 1])
        for opening in self._openings.get(_kind(self.messages[number - 1]), ()):
            for expected in (tail + opening, opening):
                if self.text.startswith(expected, anchor):
                    return anchor + len(expected)
        return None

    @cached_property
    def _openings(self) -> dict[tuple[str, bool], tuple[str, ...]]:
        """What the template may write between the end of a message and an answer, by the kind of the message."""
        openings = {}
        for number, prompt in self.prompts.items():
            anchor, before = self.positions.get(number - 1), self.messages[number - 1]
            prompt_text = self.text[:prompt] if isinstance(prompt, int) else prompt
            if anchor is None or prompt_text is None or prompt_text[:anchor] != self.text[:anchor]:
                continue
            openings[_kind(before)] = possible_openings(prompt_text[anchor:].removeprefix(_tail(before)))
        return openings

    def _end(self, number: int) -> int | None:
        if number == len(self.messages) - 1:
            return len(self.text)
        position, closing = self.positions.get(number), self._closing
        if position is None or closing is None:
            return None
        for expected in (_tail(self.messages[number]) + closing, closing):
            if self.text.startswith(expected, position):
                return position + len(expected)
        length = special_token_length(self.text[position:], self.special_texts)
        return None if length is None else position + length

    @cached_property
    def _closing(self) -> str | None:
        if self.closing is not None:
            return self.closing
        last = len(self.messages) - 1
        position = self.positions.get(last)
        return None if position is None else self.text[position:].removeprefix(_tail(self.messages[last]))


def _tail(message: Message) -> str:
    """Return the white space at the end of a content, which a template may write or not."""
    content: str = message["content"]
    return content[len(content.rstrip()) :]


def possible_openings(generation_prompt: str) -> tuple[str, ...]:
    """Return the texts that may stand before an answer in place of its generation prompt, the longest first.

    A template may open a thought for the next answer that it writes differently, or not at all, in earlier turns.
    """
    before_thought, thought_start, _ = generation_prompt.partition(THOUGHT_START)
    return tuple(text for text in (generation_prompt, before_thought + thought_start, before_thought) if text.strip())


def special_token_length(following: str, special_texts: Iterable[str]) -> int | None:
    """Return the length of the special token at the start of `following`, with the white space before it; None without one."""
    start = len(following) - len(following.lstrip())
    lengths = [len(token) for token in special_texts if following.startswith(token, start)]
    return start + max(lengths) if lengths else None
