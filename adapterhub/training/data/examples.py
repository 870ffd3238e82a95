"""Examples: records encoded as token ids, and which of the tokens are trained on.

All of `text` is trained on; of `prompt` and `completion` the completion; of an instruction its output; of `messages` the
assistant's turns, each with its end mark. A turn is located by rendering the model's own chat template, which needs no
`{% generation %}`: with the conversation up to the turn, or, if a template writes earlier turns differently once later ones
follow (Qwen3 drops thoughts), with the turn's content replaced by a mark. An answer that the template does not write in full is
context only: most templates drop tool calls that they do not know. So is an answer of weight 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from adapterhub_converters.errors import FormatError, RefusedError

from . import chat_template, messages

# Marks that no conversation contains (private use); they differ in their first and last characters.
_MARKS = ("\ue000adapterhub\ue001", "\ue002adapterhub\ue003")
# The prompts of Alpaca (tatsu-lab/stanford_alpaca, train.py, PROMPT_DICT).
_TASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_TASK_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_THOUGHT_START = "<think>"
# Many templates put an empty thought before an answer without one; the prompt may hold all of it, its start, or nothing.
_EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")


@dataclass(frozen=True, eq=False)
class Example:
    """One document as token ids, and which of them are trained on, both `(tokens,)`."""

    ids: np.ndarray
    trained: np.ndarray
    joint: bool
    """Whether it has to stay in one row; running text may continue in others."""
    answers: int = 0
    """Turns of the assistant to train on in a conversation, `unwritten` of which the chat template does not write in full."""
    unwritten: int = 0
    thoughtless: bool = False
    """Whether it does not write the thought of the last answer; those of earlier ones are usually dropped on purpose."""
    empty_thoughts: int = 0
    """Answers that are learned with an empty thought, because the generation prompt does not end with it."""
    prompted_thoughts: int = 0
    """Answers whose empty thought is context, because the generation prompt ends with it."""


def encode(record: Mapping[str, Any], tokenizer: Any, *, loss: str, location: str) -> Example:
    """Encode one record in a form of `record_shapes`; `loss` is `all` or `completion`.

    Long documents are cut into rows later, so the tokenizer's warning about them (`verbose`) is off.

    Raises:
        FormatError: A message lacks its role or content, or the chat template refuses the conversation.
        RefusedError: The answers cannot be located in the rendered conversation.
    """
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(record.get("messages"), list):
        return _Chat(record["messages"], record.get("tools"), tokenizer, location).example(loss)
    if isinstance(prompt, list) and isinstance(completion, list):
        chat = _Chat([*prompt, *completion], record.get("tools"), tokenizer, location)
        return chat.example(loss, first=len(prompt))
    if isinstance(prompt, str) and isinstance(completion, str):
        return _encode_pair(prompt, completion, tokenizer, loss)
    if isinstance(record.get("instruction"), str):
        return _encode_instruction(record, tokenizer, loss, location)
    ids = [*open_ended_ids(record["text"], tokenizer), *_stop_ids(tokenizer)]
    return Example(np.array(ids, np.int64), np.ones(len(ids), bool), joint=False)


def open_ended_ids(text: str, tokenizer: Any) -> list[int]:
    """Return the ids of a text that continues, without the end mark that some tokenizers add."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    stop = _stop_ids(tokenizer)
    # Only an end mark that the tokenizer added is removed, not one that the text ends with.
    if stop and ids[-1:] == stop and tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][-1:] != stop:
        return ids[:-1]
    return ids


def _encode_pair(prompt: str, completion: str, tokenizer: Any, loss: str) -> Example:
    question = open_ended_ids(prompt, tokenizer)
    # Tokenized separately from the prompt, so that no token spans the border between them.
    answer = [*tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"], *_stop_ids(tokenizer)]
    trained = [loss == "all"] * len(question) + [True] * len(answer)
    return Example(np.array([*question, *answer], np.int64), np.array(trained, bool), joint=True)


def _encode_instruction(record: Mapping[str, Any], tokenizer: Any, loss: str, location: str) -> Example:
    """Encode an instruction and its output as a conversation, or with Alpaca's prompt if there is no chat template."""
    instruction, input_text, output = record["instruction"], record.get("input", ""), record["output"]
    system = record.get("system", "")
    if not has_chat_template(tokenizer):
        task = system or (_TASK_WITH_INPUT if input_text else _TASK)
        sections = [
            task,
            f"### Instruction:\n{instruction}",
            *([f"### Input:\n{input_text}"] if input_text else []),
            "### Response:",
        ]
        return _encode_pair("\n\n".join(sections), output, tokenizer, loss)
    turns = [
        *([{"role": "system", "content": system}] if system else []),
        {"role": "user", "content": f"{instruction}\n\n{input_text}" if input_text else instruction},
        {"role": "assistant", "content": output},
    ]
    return _Chat(turns, None, tokenizer, location).example(loss)


def has_chat_template(tokenizer: Any) -> bool:
    """Return whether the model has a template for conversations."""
    return bool(getattr(tokenizer, "chat_template", None))


def _stop_ids(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


class _Chat:
    """A conversation and the tools it may call, with the template that renders it."""

    def __init__(self, turns: list[Any], tools: Any, tokenizer: Any, location: str) -> None:
        self._tokenizer, self._location = tokenizer, location
        self._messages = messages.normalize(turns, location)
        # The weight is removed, because templates may write all keys of a message.
        self._context = {number for number, message in enumerate(self._messages) if not message.pop("weight")}
        self._tools = messages.tools(tools, location)
        self._form: messages.Form = messages.plain

    def example(self, loss: str, first: int = 0) -> Example:
        """Return the conversation as an example; with `completion`, answers from message `first` on are trained on."""
        text = self._rendered_text()
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = np.array(encoded["input_ids"], np.int64)
        answer_numbers = [
            number
            for number, message in enumerate(self._messages)
            if number >= first and message["role"] == "assistant" and number not in self._context
        ]
        if loss == "all":
            unwritten = sum(not messages.is_written(self._messages[number], text) for number in answer_numbers)
            return Example(ids, np.ones(len(ids), bool), joint=True, answers=len(answer_numbers), unwritten=unwritten)
        # A token belongs to the answer in which it starts.
        starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
        trained = np.zeros(len(ids), bool)
        unwritten, thoughtless, empty_thoughts, prompted_thoughts = 0, False, 0, 0
        for number in answer_numbers:
            start, end = self._answer_span(text, number)
            thoughtless = not messages.writes_thought(self._messages[number], text[:end])
            if messages.is_written(self._messages[number], text[start:end]):
                trained |= (starts >= start) & (starts < end)
                empty_thoughts += _begins_with_empty_thought(text, start, end)
                prompted_thoughts += _ends_with_empty_thought(text[:start])
                if end == len(text):
                    ids, trained = self._with_next_role(ids, trained, text)
                elif (next_token := int(np.searchsorted(starts, end))) < len(ids) and self._stops_at(
                    ids[next_token], ids[:next_token]
                ):
                    trained[next_token] = True
            else:
                unwritten += 1
        return Example(
            ids, trained, joint=True, answers=len(answer_numbers), unwritten=unwritten, thoughtless=thoughtless,
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
            if all(self._is_written(message, text) for message in self._messages if message["role"] == "assistant"):
                return text
        if failure and not renderings:
            raise failure
        self._form, text = renderings[0]
        return text

    @staticmethod
    def _is_written(message: messages.Message, text: str) -> bool:
        return messages.is_written(message, text) and not messages.has_python_notation(message, text)

    def _answer_span(self, text: str, number: int) -> tuple[int, int]:
        """Return the start and end of an assistant's turn in the rendered conversation.

        It starts where its generation prompt ends, whatever the template writes there, and includes its end mark.
        """
        return self._span_by_prefix(text, number) or self._span_by_mark(text, number)

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
        generation_prompt = prompted[_common_prefix_length(prompted, self._render(earlier_turns)) :]
        # Not before the previous message ends: an earlier match is another turn's prompt.
        earliest = self._content_span(text, number - 1)[1] if number else 0
        # A template may open a thought for the next answer that it writes differently, or not at all, in earlier turns.
        before_thought, thought_start, _ = generation_prompt.partition(_THOUGHT_START)
        for opening in (generation_prompt, before_thought + thought_start, before_thought):
            position = text.rfind(opening, earliest, head)
            if opening.strip() and position >= 0:
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
                min(head, _common_prefix_length(text, marked_text)),
                min(tail, _common_prefix_length(text[::-1], marked_text[::-1])),
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
        start = len(following) - len(following.lstrip())
        # The last turn may end differently from earlier ones; those end with a special token.
        special = [token for token in self._special_texts if following.startswith(token, start)]
        if not special:
            raise self._not_located_error()
        return start + max(map(len, special))

    @property
    def _special_texts(self) -> set[str]:
        added = self._tokenizer.added_tokens_decoder.values()
        return {str(token) for token in (*self._tokenizer.all_special_tokens, *added) if str(token).strip()}

    def _not_located_error(self) -> RefusedError:
        reason = "the chat template writes earlier turns differently once later ones follow, so the answers cannot be located"
        return RefusedError(self._location, reason, 'Set loss = "all", or make one example of each answer')

    def _render(self, turns: Sequence[messages.Message], *, prompt: bool = False) -> str:
        if not turns:
            return ""
        formed = [self._form(turn) for turn in turns]
        return chat_template.render(self._tokenizer, formed, location=self._location, tools=self._tools, prompt=prompt)


def _common_prefix_length(text: str, other_text: str) -> int:
    """Return the length of the common prefix of two texts."""
    if text == other_text:
        return len(text)
    return next(
        (position for position, (a, b) in enumerate(zip(text, other_text, strict=False)) if a != b),
        min(len(text), len(other_text)),
    )


def _begins_with_empty_thought(text: str, start: int, end: int) -> bool:
    """Return whether an answer begins with an empty thought, which its prompt may have opened."""
    opened = text[:start].rstrip().endswith(_THOUGHT_START)
    return _EMPTY_THOUGHT.match((_THOUGHT_START if opened else "") + text[start:end].lstrip()) is not None


def _ends_with_empty_thought(prompt: str) -> bool:
    return _EMPTY_THOUGHT.fullmatch(prompt, max(0, prompt.rfind(_THOUGHT_START))) is not None
