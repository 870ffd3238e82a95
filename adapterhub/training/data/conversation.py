"""Conversations: where their answers are in the text that a chat template writes, and which of their tokens are trained on.

No `{% generation %}` is needed. An answer begins where its generation prompt ends and includes its end mark. One that the
template does not write in full is context only: most templates drop tool calls that they do not know. So is an answer of weight
0. An empty thought is context where the generation prompt ends with it, and learned everywhere else: the model would be asked
without it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from adapterhub.prompts import chat_template, process_limits
from adapterhub_converters.errors import FormatError, RefusedError

from . import messages, template_measures
from .example import Example
from .record_shapes import common_prefix_length

# Marks that no conversation contains (private use); they differ in their first and last characters.
_MARKS = ("\ue000adapterhub\ue001", "\ue002adapterhub\ue003")
# Many templates put an empty thought before an answer without one; the prompt may hold all of it, its start, or nothing.
_THOUGHT_END = "</think>"


class Conversation:
    """A conversation and the tools it may call, with the template that renders it.

    Its answers are located in the measures that the template's process takes of many conversations at once. Where those are not
    certain, the conversation is rendered again for each answer: up to the answer, or, if a template writes earlier turns
    differently once later ones follow (Qwen3 drops thoughts), with the answer's content replaced by a mark.

    Args:
        first: The number of the first message that may be trained on.
    """

    def __init__(self, turns: list[Any], tools: Any, tokenizer: Any, *, location: str, first: int = 0) -> None:
        self._tokenizer, self._location = tokenizer, location
        self._messages = messages.normalize(turns, location)
        # The weight is removed, because templates may write all keys of a message.
        self._context = {number for number, message in enumerate(self._messages) if not message.pop("weight")}
        self._tools = messages.tools(tools, location)
        self._form: messages.Form = messages.plain
        self._answers = [
            number
            for number, message in enumerate(self._messages)
            if number >= first and message["role"] == "assistant" and number not in self._context
        ]
        self._plan: dict[str, Any] = {}
        self._measures: template_measures.Measures | None = None
        self.text = ""

    @property
    def size(self) -> int:
        """The number of characters in its messages."""
        return sum(len(message["content"]) for message in self._messages)

    def request(self, loss: str) -> tuple[str, Any] | None:
        """Return the template, and what its process renders to locate the answers; None where only `render` can tell."""
        try:
            template, variables = chat_template.inputs(
                self._tokenizer, self._messages, location=self._location, tools=self._tools
            )
        except FormatError:
            return None  # transformers refuses the usual form of messages
        self._plan = template_measures.plan(variables["messages"], self._answers if loss == "completion" else ())
        return template, [variables, self._plan]

    def render(self, answer: Any) -> None:
        """Take the text of the conversation from the answer to its request, which may be an error, or render it."""
        if isinstance(answer, process_limits.LimitExceededError):
            raise chat_template.limit_error(self._location) from answer
        if isinstance(answer, dict) and self._is_complete(answer["text"]):
            special = special_texts(self._tokenizer)
            self._measures = template_measures.Measures.of(self._messages, self._plan, answer, special)
            self.text = answer["text"]
        else:
            self.text = self._rendered_text()

    def example(self, loss: str, ids: np.ndarray, starts: np.ndarray) -> Example:
        """Return the conversation as an example: its tokens, and where each of them starts in its text."""
        text = self.text
        if loss == "all":
            unwritten = sum(not messages.is_written(self._messages[number], text) for number in self._answers)
            return Example(ids, np.ones(len(ids), bool), joint=True, answers=len(self._answers), unwritten=unwritten)
        trained = np.zeros(len(ids), bool)
        unwritten, thoughtless, empty_thoughts, prompted_thoughts = 0, False, 0, 0
        for number in self._answers:
            start, end = self._answer_span(text, number)
            if number == self._answers[-1]:
                thoughtless = not messages.writes_thought(self._messages[number], text[:end])
            if not messages.is_written(self._messages[number], text[start:end]):
                unwritten += 1
                continue
            # A token belongs to the answer in which it starts.
            trained |= (starts >= start) & (starts < end)
            empty_thoughts += _begins_with_empty_thought(text, start, end)
            prompted_thoughts += _ends_with_empty_thought(text, start)
            if end == len(text):
                ids, trained = self._with_next_role(ids, trained, text)
            elif (next_token := int(np.searchsorted(starts, end))) < len(ids) and self._stops_at(
                ids[next_token], ids[:next_token]
            ):
                trained[next_token] = True
        return Example(
            ids, trained, joint=True, answers=len(self._answers), unwritten=unwritten, thoughtless=thoughtless,
            empty_thoughts=empty_thoughts, prompted_thoughts=prompted_thoughts,
        )  # fmt: skip

    def _stops_at(self, token: int, previous_ids: np.ndarray) -> bool:
        """Return whether the model stops at a token, unless it stopped just before it.

        GLM's answers have no end mark: the model stops where the next role begins.
        """
        stops: frozenset[int] = getattr(self._tokenizer, "stop_tokens", frozenset())
        return int(token) in stops and not stops.intersection(previous_ids[-3:].tolist())

    def _with_next_role(self, ids: np.ndarray, trained: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids and trained flags, extended by the role that would follow the last answer if the model stops there."""
        stops: frozenset[int] = getattr(self._tokenizer, "stop_tokens", frozenset())
        if not stops or stops.intersection(ids[-3:].tolist()):
            return ids, trained
        # After a call of tools comes their result, after any other answer the user.
        role = "tool" if self._messages[-1].get("tool_calls") else "user"
        try:
            continued = self._render([*self._messages, {"role": role, "content": _MARKS[0]}])
        except FormatError:
            return ids, trained
        continuation = continued[len(text) :] if continued.startswith(text) else ""
        following = (
            self._tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"][:1] if continuation else []
        )
        if not following or not self._stops_at(following[0], ids):
            return ids, trained
        return np.append(ids, following), np.append(trained, True)

    def _rendered_text(self) -> str:
        """Render the conversation in the first form in which the template writes everything that its answers contain."""
        renderings: list[tuple[messages.Form, str]] = []
        failure: FormatError | None = None
        # The first rendering that succeeds is the fallback: no form may satisfy a template that drops something on purpose.
        for self._form in messages.FORMS:
            try:
                text = self._render(self._messages)
            except FormatError as error:
                failure = failure or error
                continue
            renderings.append((self._form, text))
            if self._is_complete(text):
                return text
        if failure and not renderings:
            raise failure
        self._form, text = renderings[0]
        return text

    def _is_complete(self, text: str) -> bool:
        """Return whether a text contains everything of all answers, as JSON and not as Python writes it."""
        return all(
            messages.is_written(message, text) and not messages.has_python_notation(message, text)
            for message in self._messages
            if message["role"] == "assistant"
        )

    def _answer_span(self, text: str, number: int) -> tuple[int, int]:
        """Return the start and end of an assistant's turn in the rendered conversation.

        It starts where its generation prompt ends, whatever the template writes there, and includes its end mark.
        """
        certain = self._measures.span(number) if self._measures else None
        return certain or self._span_by_prefix(text, number) or self._span_by_mark(text, number)

    def _span_by_prefix(self, text: str, number: int) -> tuple[int, int] | None:
        if not number:
            return None  # before the first message, a template writes text of its own: a system prompt, a date
        prefix = self._render(self._messages[:number], prompt=True)
        with_turn = self._render(self._messages[: number + 1])
        return (len(prefix), len(with_turn)) if text.startswith(with_turn) and with_turn.startswith(prefix) else None

    def _span_by_mark(self, text: str, number: int) -> tuple[int, int]:
        """Locate a turn from the end of the generation prompt to the end of the text that closes a turn."""
        head, end = self._content_span(text, number)
        earlier_turns = self._messages[:number] or [{"role": "user", "content": _MARKS[0]}]
        prompted = self._render(earlier_turns, prompt=True)
        generation_prompt = prompted[common_prefix_length(prompted, self._render(earlier_turns)) :]
        # Not before the previous message ends: an earlier match is another turn's prompt.
        earliest = self._content_span(text, number - 1)[1] if number else 0
        for opening in template_measures.possible_openings(generation_prompt):
            position = text.rfind(opening, earliest, head)
            if position >= 0:
                return position + len(opening), end + self._closing_length(text[end:], number)
        if not number and not generation_prompt.strip():
            return head, end + self._closing_length(text[end:], number)
        raise self._not_located_error()

    def _content_span(self, text: str, number: int) -> tuple[int, int]:
        """Locate the content of a message: the text that changes with it."""
        head, tail = len(text), len(text)
        # Two different marks: a text that by chance starts or ends like one of them does not do so with the other.
        for mark in _MARKS:
            marked = {"role": self._messages[number]["role"], "content": mark}
            marked_text = self._render([*self._messages[:number], marked, *self._messages[number + 1 :]])
            if mark not in marked_text:
                raise self._not_located_error()
            head, tail = (
                min(head, common_prefix_length(text, marked_text)),
                min(tail, common_prefix_length(text[::-1], marked_text[::-1])),
            )
        if head + tail > len(text):
            raise self._not_located_error()
        return head, len(text) - tail

    def _closing_length(self, following: str, number: int) -> int:
        """Return the length of the end mark at the start of `following`: that of a last turn, or a special token."""
        mark = _MARKS[0]
        closing = self._render([*self._messages[:number], {"role": "assistant", "content": mark}]).rpartition(mark)[2]
        if following.startswith(closing):
            return len(closing)
        # The last turn may end differently from earlier ones; those end with a special token.
        length = template_measures.special_token_length(following, special_texts(self._tokenizer))
        if length is None:
            raise self._not_located_error()
        return length

    def _not_located_error(self) -> RefusedError:
        reason = "the chat template writes earlier turns differently once later ones follow, so the answers cannot be located"
        return RefusedError(self._location, reason, 'Set loss = "all", or make one example of each answer')

    def _render(self, turns: Sequence[messages.Message], *, prompt: bool = False) -> str:
        if not turns:
            return ""
        formed = [self._form(turn) for turn in turns]
        return chat_template.render(self._tokenizer, formed, location=self._location, tools=self._tools, prompt=prompt)


def _begins_with_empty_thought(text: str, start: int, end: int) -> bool:
    """Return whether an answer begins with an empty thought, which its prompt may have opened."""
    mark = template_measures.THOUGHT_START
    opened = text[max(0, start - len(mark) - 8) : start].rstrip().endswith(mark)
    answer = text[start:end].lstrip()
    return (opened or answer.startswith(mark)) and answer.removeprefix(mark).lstrip().startswith(_THOUGHT_END)


def _ends_with_empty_thought(text: str, end: int) -> bool:
    start = text.rfind(template_measures.THOUGHT_START, 0, end)
    return start >= 0 and text[start + len(template_measures.THOUGHT_START) : end].strip() == _THOUGHT_END


def special_texts(tokenizer: Any) -> frozenset[str]:
    """Return the texts of a tokenizer's special and added tokens."""
    return _special_texts(tuple(map(str, (*tokenizer.all_special_tokens, *tokenizer.added_tokens_decoder.values()))))


@functools.lru_cache(maxsize=2)
def _special_texts(tokens: tuple[str, ...]) -> frozenset[str]:
    return frozenset(token for token in tokens if token.strip())
