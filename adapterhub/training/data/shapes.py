"""The shapes that data sets have, told by their keys, and the four forms that are encoded.

These are `messages`, with `tools`; `prompt` and `completion`, both text or both messages (trl, "Dataset formats");
`instruction` with `input`, `system` and `output` (tatsu-lab/stanford_alpaca); and `text`. Every other shape becomes one of
them: ShareGPT's conversations, questions with answers, and of a preference the chosen side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, UsageError

Record = Mapping[str, Any]

# Who speaks in ShareGPT's conversations and their like, to the roles of chat templates.
_ROLES = {
    "assistant": "assistant", "bard": "assistant", "bing": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "gpt": "assistant", "human": "user", "model": "assistant", "observation": "tool", "system": "system", "tool": "tool",
    "user": "user",
}  # fmt: skip
_SHOWN = 12  # keys of an unknown shape in its error


class ColumnsError(FormatError):
    """A record whose keys have other names than expected, as then all records of its file probably have."""

    default_code = "unknown-columns"


@dataclass(frozen=True)
class Shape:
    """A shape: its name for people, the keys that tell it, and how a record becomes a form that is encoded."""

    name: str
    keys: tuple[str, ...]
    make: Callable[[Record, str], Record]


def canonical(record: Record, where: str, columns: Mapping[str, str] | None = None) -> tuple[str, Record]:
    """Return the name of the shape of a record, and the record in a form that is encoded.

    Args:
        where: The record's place in messages.
        columns: Known keys, each with the record's own name for it; its other keys are ignored then.

    Raises:
        ColumnsError: Its keys tell no shape, or lack one of `columns`.
        FormatError: A value has the wrong type.
    """
    if columns:
        record = _renamed(record, where, columns)
    for shape in SHAPES:
        if all(record.get(key) is not None for key in shape.keys):
            return shape.name, shape.make(record, where)
    hint = 'Say what they are, like [data] columns = {prompt = "…", completion = "…"}; the known names are ' + ", ".join(_KEYS)
    raise ColumnsError(where, f"its keys have no known meaning: {_listed(record)}" if record else "it has no keys", hint)


def pair(record: Record, where: str, columns: Mapping[str, str] | None = None) -> Record:
    """Return both sides of a preference in forms that are encoded, as `chosen` and `rejected`; errors are those of `canonical`.

    What both begin with is their prompt, where none is apart.
    """
    if columns:
        record = _renamed(record, where, columns)
    if any(record.get(side) is None for side in SIDES):
        raise ColumnsError(where, 'has no "chosen" and "rejected"', f"[preference] needs pairs; it has {_listed(record)}")
    sides = [_preference({**record, "chosen": record[side]}, where) for side in SIDES]
    for key in ("messages", "text"):
        if all(key in side for side in sides):
            sides = _prompted([side[key] for side in sides], _kept(record, "tools"))
    return dict(zip(SIDES, sides, strict=True))


def _prompted(sides: list[Any], kept: Record) -> list[Record]:
    """Return two texts or conversations as completions of what both begin with."""
    chosen, rejected = sides
    shared = next(
        (at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    if isinstance(chosen, str) and chosen[shared - 1 : shared] == " ":
        shared -= 1  # tokens begin with the space before a word
    return [{"prompt": side[:shared], "completion": side[shared:], **kept} for side in (chosen, rejected)]


def check_columns(columns: Mapping[str, str], where: str) -> None:
    """Raise UsageError for a column that would mean nothing."""
    for key in columns:
        if key not in _KEYS:
            raise UsageError(where, f"{key[:80]!r} has no known meaning", f"The known names are {', '.join(_KEYS)}")


def _listed(record: Record) -> str:
    more = ", …" if len(record) > _SHOWN else ""
    return ", ".join(f'"{str(key)[:40]}"' for key in [*record][:_SHOWN]) + more


def is_known(record: Record) -> bool:
    """Return True if the keys of a record tell its shape."""
    return any(all(record.get(key) is not None for key in shape.keys) for shape in SHAPES)


def _renamed(record: Record, where: str, columns: Mapping[str, str]) -> Record:
    missing = [name for key, name in columns.items() if key not in _OPTIONAL and name not in record]
    if missing:
        raise ColumnsError(where, f'has no "{missing[0][:80]}", which [data] columns names', f"It has {_listed(record)}")
    return {key: record[name] for key, name in columns.items() if name in record}


# ---- values


def _text(record: Record, key: str, where: str) -> str:
    value = record.get(key, "")
    if not isinstance(value, str):
        raise FormatError(where, f'"{key}" is not text')
    return value


def _list(record: Record, key: str, where: str) -> list[Any]:
    """Return a list, which a table may contain as JSON."""
    value = record[key]
    if isinstance(value, str):
        try:
            value = json_file.parse(value, where, memory=None)
        except FormatError as error:
            raise FormatError(where, f'"{key}" is text, and not JSON') from error
    if not isinstance(value, list):
        raise FormatError(where, f'"{key}" is not a list of messages')
    return value


def _turns(turns: Iterable[Any], where: str) -> list[Any]:
    """Return messages with role and content, also where the keys are from and value."""
    return [_turn(turn, where) for turn in turns]


def _turn(turn: Any, where: str) -> Any:
    if not isinstance(turn, dict) or "from" not in turn or "role" in turn:
        return turn
    role = _ROLES.get(str(turn["from"]).lower())
    if role is None:
        raise FormatError(where, f"{str(turn['from'])[:40]!r} is not a known speaker", f"Those are {', '.join(_ROLES)}")
    return {"role": role, "content": _text(turn, "value", where), **_kept(turn, "weight", "train")}


def _kept(record: Record, *keys: str) -> dict[str, Any]:
    return {key: record[key] for key in keys if record.get(key) is not None}


# ---- the shapes


def _as_text(record: Record, where: str) -> Record:
    _text(record, "text", where)
    return record


def _conversation(record: Record, where: str) -> Record:
    return {**record, "messages": _turns(_list(record, "messages", where), where)}


def _prompt(record: Record, where: str) -> Record:
    kinds = {type(record["prompt"]), type(record["completion"])}
    if kinds not in ({str}, {list}):
        raise FormatError(where, '"prompt" and "completion" are neither both text nor both lists of messages')
    return record


def _sharegpt(record: Record, where: str) -> Record:
    key = "conversations" if record.get("conversations") is not None else "conversation"
    turns = _turns(_list(record, key, where), where)
    system = _text(record, "system", where) if record.get("system") else ""
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *turns], **_kept(record, "tools")}


def _instruction(question: str, answer: str, more: str = "input") -> Callable[[Record, str], Record]:
    def make(record: Record, where: str) -> Record:
        found = {"instruction": _text(record, question, where), "output": _text(record, answer, where)}
        system = record.get("system") or record.get("system_prompt")
        optional = {"input": record.get(more) if more != question else None, "system": system}
        return {**found, **{key: _text(optional, key, where) for key, value in optional.items() if value}}

    return make


def _preference(record: Record, where: str) -> Record:
    """The chosen side of a preference (trl, "Dataset formats": with the prompt apart, or within both sides)."""
    chosen = record["chosen"]
    key = next((key for key in ("prompt", "question", "instruction", "conversations") if record.get(key) is not None), "")
    if isinstance(chosen, str):
        if not key:
            return {"text": chosen}
        if key in ("question", "instruction"):
            return _instruction(key, "chosen")(record, where)
        return _prompt({"prompt": record[key], "completion": chosen}, where)
    turns = _turns([chosen] if isinstance(chosen, dict) else _list(record, "chosen", where), where)
    before = record.get(key) if key else None
    if isinstance(before, str):
        whole = any(isinstance(turn, dict) and turn.get("role") == "user" for turn in turns)
        before = [] if whole else [{"role": "user", "content": before}]
    if before:
        return {"prompt": _turns(before, where), "completion": turns, **_kept(record, "tools")}
    return {"messages": turns, **_kept(record, "tools")}


# In the order in which they are looked for: those that tell answers from questions first.
SHAPES = (
    Shape("conversations", ("messages",), _conversation),
    Shape("prompts with completions", ("prompt", "completion"), _prompt),
    Shape("preference pairs without their rejected sides", ("chosen", "rejected"), _preference),
    Shape("Alpaca", ("instruction", "output"), _instruction("instruction", "output")),
    Shape("Dolly", ("instruction", "response"), _instruction("instruction", "response", "context")),
    Shape("ShareGPT", ("conversations",), _sharegpt),
    Shape("ShareGPT", ("conversation",), _sharegpt),
    *(
        Shape("questions with answers", keys, _instruction(*keys))
        for keys in (
            ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"),
            ("prompt", "response"), ("input", "output"),
        )
    ),
    Shape("text", ("text",), _as_text),
)  # fmt: skip
SIDES = ("chosen", "rejected")
PAIRS = "preference pairs"
AS_THEY_ARE = {"conversations", "prompts with completions", "text", PAIRS}
"""The shapes whose records are encoded as they are."""
_OPTIONAL = ("input", "context", "system", "system_prompt", "tools")
_KEYS = tuple(dict.fromkeys([*(key for shape in SHAPES for key in shape.keys), *_OPTIONAL]))
