"""Checks of records beyond their shape: messages that cannot be encoded, and what a user should know about the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adapterhub_converters.containers.json_file import is_number

from . import messages
from .record_shapes import Record

EMPTY_ANSWER = "have an empty answer, which is learned as its end mark alone"
# Names of columns that rate an answer, in data sets of which usually only the good answers should be learned.
_RATINGS = (
    "accepted", "correct", "feedback", "grade", "is_correct", "is_good", "label", "quality", "rating", "reward", "score",
    "thumbs_up",
)  # fmt: skip


def check_messages(record: Record, location: str) -> None:
    """Raise FormatError for a message of an encodable record that lacks its role or content, or for malformed tools."""
    for key in ("messages", "prompt", "completion"):
        if isinstance(record.get(key), list):
            messages.normalize(record[key], location)
            messages.tools(record.get("tools"), location)


def has_empty_answer(record: Record) -> bool:
    """Return whether an answer of an encodable record is empty."""
    if "output" in record or isinstance(record.get("completion"), str):
        return not str(record["output"] if "output" in record else record["completion"]).strip()
    turns = record.get("completion") or record.get("messages") or []
    return any(_is_empty(turn) for turn in turns) if isinstance(turns, list) else False


def _is_empty(turn: Any) -> bool:
    if turn.get("role") != "assistant" or turn.get("tool_calls"):
        return False
    [message] = messages.normalize([turn], "")
    return not (message["content"].strip() or messages.thought_of(message).strip()) and bool(message["weight"])


def remarks(source: Record, canonical: Record) -> Iterator[str]:
    """Yield what notes say about a record: `source` as it is in the data, with the columns that count, and as it is encoded."""
    rating = next((key for key in _RATINGS if isinstance(source.get(key), bool) or is_number(source.get(key))), None)
    if rating:
        yield f'have "{rating}", which is not used: if it rates the answers, the bad ones are learned like the good ones'
    if has_empty_answer(canonical):
        yield EMPTY_ANSWER
