"""From files to rows of tokens: what is read, what is learnt, and what is refused.

JSON Lines with `text`, with `prompt` and `completion`, or with `messages`; or plain text, one document a file. Of a
prompt or a conversation only the answers are learnt, unless the config says `loss = "all"`. Documents share rows but
do not see each other: positions begin at 0 with each document, which is how transformers tells them apart
(`masking_utils.py`, `find_packed_sequence_indices`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters.errors import FormatError, LocalIOError, NotFoundError, RefusedError

IGNORED = -100
"""The label of a position whose next token isn't learnt."""


@dataclass(frozen=True, eq=False)
class Example:
    """One document: token ids, and which of them are learnt, both `(tokens,)`."""

    ids: np.ndarray
    learnt: np.ndarray
    joint: bool
    """Whether it has to stay in one row; running text may go on in the next."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed tokens, all int64 `(rows, sequence)`.

    Attributes:
        ids: Input tokens.
        labels: The token to predict *at* each position, or IGNORED.
        positions: Position within the document.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def label_tokens(self) -> int:
        """How many tokens are predicted and learnt."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class File:
    """One file of a data set: `size` in bytes."""

    path: str
    digest: str
    size: int
    documents: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows, and the files they were made of; `notes` are what is worth saying, one line each."""

    rows: Rows
    files: tuple[File, ...]
    notes: tuple[str, ...] = ()

    @property
    def documents(self) -> int:
        """How many examples there are."""
        return sum(file.documents for file in self.files)

    @property
    def tokens(self) -> int:
        """How many tokens they have, prompts included."""
        return sum(file.tokens for file in self.files)


def load(paths: Sequence[Path], tokenizer: Any, *, sequence: int, loss: str, seed: int | None) -> Dataset:
    """The packed rows of some files; documents in the order of `seed`, or as they stand for None.

    Raises:
        FormatError: A line isn't one of the kinds above.
        RefusedError: Nothing in the data would be learnt.
    """
    files: list[File] = []
    examples: list[Example] = []
    for path in paths:
        raw = _read(path)
        found = [encode(record, tokenizer, loss=loss, where=where) for where, record in records(raw, path)]
        digest, tokens = hashlib.sha256(raw).hexdigest(), sum(len(example.ids) for example in found)
        files.append(File(path.name, f"sha256:{digest}", len(raw), len(found), tokens))
        examples += found
    if seed is not None:
        shuffled = np.random.Generator(np.random.PCG64(seed)).permutation(len(examples))
        examples = [examples[number] for number in shuffled]
    rows = pack([example for example in examples if len(example.ids)], sequence)
    if not rows.label_tokens:
        where = ", ".join(map(str, paths))
        raise RefusedError(where, "no token would be learnt: there are no documents, or all of them are prompts")
    return Dataset(rows, tuple(files), tuple(_notes(examples, sequence, tokenizer)))


def _notes(examples: list[Example], sequence: int, tokenizer: Any) -> Iterator[str]:
    cut = sum(example.joint and len(example.ids) > sequence for example in examples)
    if cut:
        yield f"{cut} of {len(examples)} examples are longer than {sequence} tokens and were cut there"
    stop = tokenizer.eos_token_id
    if stop is not None and not any(bool(((example.ids == stop) & example.learnt).any()) for example in examples):
        yield f"the stop token {tokenizer.eos_token!r} is never learnt: a model trained on this does not learn to end"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotFoundError(str(path), "no such file") from error
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


def records(raw: bytes, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where it stands, and the object, of every line of a .jsonl; of any other file one `text`."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise FormatError(str(path), "not UTF-8 text") from error
    if path.suffix != ".jsonl":
        yield str(path), {"text": text}
        return
    # Not splitlines(): a JSON string may hold U+2028, which is no end of a line here.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FormatError(where, "not valid JSON") from error
            if not isinstance(record, dict):
                raise FormatError(where, "not a JSON object")
            yield where, record


def encode(record: Mapping[str, Any], tokenizer: Any, *, loss: str, where: str) -> Example:
    """One record as token ids and what of them is learnt."""
    if isinstance(record.get("text"), str):
        ids = [*tokenizer(record["text"])["input_ids"], *_stop(tokenizer)]
        return Example(np.array(ids, np.int64), np.ones(len(ids), bool), joint=False)
    if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        prompt = tokenizer(record["prompt"])["input_ids"]
        answer = [*tokenizer(record["completion"], add_special_tokens=False)["input_ids"], *_stop(tokenizer)]
        learnt = [loss == "all"] * len(prompt) + [True] * len(answer)
        return Example(np.array([*prompt, *answer], np.int64), np.array(learnt, bool), joint=True)
    if isinstance(record.get("messages"), list):
        return _conversation(record["messages"], tokenizer, loss, where)
    raise FormatError(where, 'has neither "text", nor "prompt" and "completion", nor "messages"')


def _stop(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def _conversation(messages: list[Any], tokenizer: Any, loss: str, where: str) -> Example:
    text = _render(messages, tokenizer, where, prompt=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(encoded["input_ids"], np.int64)
    if loss == "all":
        return Example(ids, np.ones(len(ids), bool), joint=True)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
    learnt = np.zeros(len(ids), bool)
    for start, end in _answers(messages, text, tokenizer, where):
        learnt |= (starts >= start) & (starts < end)
    return Example(ids, learnt, joint=True)


def _answers(messages: list[Any], text: str, tokenizer: Any, where: str) -> Iterator[tuple[int, int]]:
    """Where in the rendered conversation each assistant's turn stands, its end mark included."""
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(messages[:number], tokenizer, where, prompt=True)
            after = _render(messages[: number + 1], tokenizer, where, prompt=False)
            if not (text.startswith(after) and after.startswith(before)):
                raise RefusedError(
                    where,
                    "the chat template writes earlier turns differently once later ones follow, so the answers can't be found",
                    'Set loss = "all", or make one example of each answer',
                )
            yield len(before), len(after)


def _render(messages: list[Any], tokenizer: Any, where: str, *, prompt: bool) -> str:
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise FormatError(where, 'a message needs "role" and "content"')
    if not messages:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))
    except Exception as error:
        raise FormatError(where, f"the model's chat template refuses it ({str(error)[:200]})") from error


Segment = tuple[np.ndarray, np.ndarray]
"""Ids and learnt of what lies together in a row."""


def pack(examples: Sequence[Example], sequence: int) -> Rows:
    """Rows of `sequence` tokens: running text end to end, other examples whole, first fit, the longest first."""
    rows = [*_running([e for e in examples if not e.joint], sequence), *_whole([e for e in examples if e.joint], sequence)]
    shape = (len(rows), sequence)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    for row, segments in enumerate(rows):
        at = 0
        for segment, learnt in segments:
            end = at + len(segment)
            ids[row, at:end] = segment
            positions[row, at:end] = np.arange(len(segment))
            labels[row, at : end - 1] = np.where(learnt[1:], segment[1:], IGNORED)
            at = end
        positions[row, at:] = np.arange(sequence - at)
    return Rows(ids, labels, positions)


def _running(examples: Sequence[Example], sequence: int) -> list[list[Segment]]:
    rows: list[list[Segment]] = []
    free = 0
    for example in examples:
        start = 0
        while start < len(example.ids):
            if not free:
                rows.append([])
                free = sequence
            end = min(start + free, len(example.ids))
            rows[-1].append((example.ids[start:end], example.learnt[start:end]))
            free -= end - start
            start = end
    return rows


def _whole(examples: Sequence[Example], sequence: int) -> list[list[Segment]]:
    rows: list[list[Segment]] = []
    free: list[int] = []
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        segment = (example.ids[:sequence], example.learnt[:sequence])
        size = len(segment[0])
        row = next((number for number, room in enumerate(free) if room >= size), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(sequence)
        rows[row].append(segment)
        free[row] -= size
    return rows


def some(rows: Rows, tokens: int) -> Rows:
    """Rows evenly from all of them, as many as hold about `tokens` tokens; all if they hold no more."""
    count = max(1, tokens // rows.ids.shape[1])
    if count >= len(rows):
        return rows
    chosen = np.arange(count) * len(rows) // count
    return Rows(rows.ids[chosen], rows.labels[chosen], rows.positions[chosen])


def order(rows: int, needed: int, seed: int) -> np.ndarray:
    """Row numbers for `needed` draws: every row once, in an order of its own, before any comes again."""
    generator = np.random.Generator(np.random.PCG64(seed))
    passes = [generator.permutation(rows) for _ in range(-(needed // -rows))]
    return np.concatenate(passes)[:needed]
