"""The shapes of records in data sets, recognized by their keys, and their conversion to the four forms that are encoded.

These forms are `messages`, with `tools`; `prompt` and `completion`, both text or both messages (trl, "Dataset formats");
`instruction` with `input`, `system` and `output` (tatsu-lab/stanford_alpaca); and `text`. Every other shape is converted to one
of them: ShareGPT's conversations, questions with answers, and the chosen side of a preference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

Record = Mapping[str, Any]

# Speakers in ShareGPT's and similar conversations, mapped to the roles of chat templates.
_ROLES = {
    "assistant": "assistant", "bard": "assistant", "bing": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant", "function_response": "tool", "gpt": "assistant", "human": "user", "model": "assistant",
    "observation": "tool", "prompter": "user", "system": "system", "tool": "tool", "tool_call": "assistant",
    "tool_response": "tool", "user": "user",
}  # fmt: skip
_CALLERS = ("function_call", "tool_call")  # whose words are calls of tools, in JSON
_MAX_LISTED_KEYS = 12  # in the error about an unknown shape


class ColumnsError(FormatError):
    """A record whose keys have unexpected names, as then probably all records of its file do."""

    default_code = "unknown-columns"


class UnpairedError(ColumnsError):
    """A record of an answer with a verdict: unpaired preferences, of which a training would learn the bad answers too."""

    default_code = "unpaired-preferences"


@dataclass(frozen=True)
class Shape:
    """A shape: its name for people, the keys that identify it, and the conversion of a record to a form that is encoded."""

    name: str
    keys: tuple[str, ...]
    make: Callable[[Record, str], Record]


def canonical(record: Record, location: str, columns: Mapping[str, str] | None = None) -> tuple[str, Record]:
    """Return the name of a record's shape, and the record in a form that is encoded.

    Args:
        location: The location of the record, in messages.
        columns: The record's own name for each known key that it has; its other keys are ignored then.

    Raises:
        ColumnsError: Its keys do not identify a shape, or it lacks one of `columns`.
        UnpairedError: It has a verdict on its answer.
        FormatError: A value has the wrong type.
    """
    if columns:
        record = _rename_columns(record, location, columns)
    for shape in SHAPES:
        if all(record.get(key) is not None for key in shape.keys):
            if shape.make not in (_preference_record, _text_record):
                _check_unpaired(record, location)
            return shape.name, shape.make(record, location)
    hint = 'Say what they are, like [data] columns = {prompt = "…", completion = "…"}; the known names are ' + ", ".join(_KEYS)
    raise ColumnsError(location, f"its keys have no known meaning: {_key_list(record)}" if record else "it has no keys", hint)


def pair(record: Record, location: str, columns: Mapping[str, str] | None = None) -> Record:
    """Return both sides of a preference in encodable forms, as `chosen` and `rejected`; errors are those of `canonical`.

    Without a separate prompt, the common beginning of the sides is their prompt.
    """
    if columns:
        record = _rename_columns(record, location, columns)
    if any(record.get(side) is None for side in SIDES):
        _check_unpaired(record, location)
        raise ColumnsError(location, 'has no "chosen" and "rejected"', f"[preference] needs pairs; it has {_key_list(record)}")
    # Each side is converted as if it were the chosen one.
    sides = [_preference_record({**record, "chosen": record[side]}, location) for side in SIDES]
    for key in ("messages", "text"):
        if all(key in side for side in sides):
            sides = _split_common_prompt([side[key] for side in sides], _present_fields(record, "tools"))
    return dict(zip(SIDES, sides, strict=True))


def _check_unpaired(record: Record, location: str) -> None:
    """Raise UnpairedError if a label says whether an answer is good (trl, "Dataset formats"); a table has it as text."""
    label = record.get("label")
    if isinstance(label, bool) or (isinstance(label, str) and label.lower() in ("true", "false")):
        problem = '"label" tells good answers from bad ones: unpaired preferences (KTO), which are not learned from'
        hint = (
            'Keep the examples whose "label" is true and remove the key, or make pairs with "chosen" and "rejected" of two '
            "answers to a prompt; [data] columns that name the other keys ignore it"
        )
        raise UnpairedError(location, problem, hint)


def _split_common_prompt(sides: list[Any], other_fields: Record) -> list[Record]:
    """Return two texts or conversations as completions of their common beginning."""
    chosen, rejected = sides
    prefix_length = common_prefix_length(chosen, rejected)
    if isinstance(chosen, str) and chosen[prefix_length - 1 : prefix_length] == " ":
        prefix_length -= 1  # tokens begin with the space before a word, so it belongs to the completion
    return [{"prompt": side[:prefix_length], "completion": side[prefix_length:], **other_fields} for side in (chosen, rejected)]


def common_prefix_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return the length of the common beginning of two texts, or two lists."""
    places = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in places if a != b), min(len(first), len(second)))


def check_columns(columns: Mapping[str, str], location: str) -> None:
    """Raise UsageError for a column that has no known meaning."""
    for key in columns:
        if key not in _KEYS:
            raise UsageError(location, f"{key[:80]!r} has no known meaning", f"The known names are {', '.join(_KEYS)}")


def _key_list(record: Record) -> str:
    ellipsis = ", …" if len(record) > _MAX_LISTED_KEYS else ""
    return ", ".join(f'"{str(key)[:40]}"' for key in [*record][:_MAX_LISTED_KEYS]) + ellipsis


def is_known(record: Record) -> bool:
    """Return whether the keys of a record identify its shape."""
    return any(all(record.get(key) is not None for key in shape.keys) for shape in SHAPES)


def _rename_columns(record: Record, location: str, columns: Mapping[str, str]) -> Record:
    missing = [name for key, name in columns.items() if key not in _OPTIONAL and name not in record]
    if missing:
        raise ColumnsError(location, f'has no "{missing[0][:80]}", which [data] columns names', f"It has {_key_list(record)}")
    return {key: record[name] for key, name in columns.items() if name in record}


# ---- values


def _text_field(record: Record, key: str, location: str) -> str:
    value = record.get(key, "")
    if not isinstance(value, str):
        raise FormatError(location, f'"{key}" is not text')
    return value


def _list_field(record: Record, key: str, location: str) -> list[Any]:
    """Return a list, which a table may store as JSON text."""
    value = record[key]
    if isinstance(value, str):
        try:
            value = json_file.parse(value, location, memory=None)
        except FormatError as error:
            raise FormatError(location, f'"{key}" is text, and not JSON') from error
    if not isinstance(value, list):
        raise FormatError(location, f'"{key}" is not a list of messages')
    return value


def _with_roles(turns: Iterable[Any], location: str) -> list[Any]:
    """Return messages with `role` and `content`, converting those with `from` or `role` and `value`."""
    return [_with_role(turn, location) for turn in turns]


def _with_role(turn: Any, location: str) -> Any:
    # Anything else is in the usual form, or `messages` reports what is wrong with it.
    speaker = (turn.get("from") or turn.get("role")) if isinstance(turn, dict) else None
    if speaker is None or turn.get("content") is not None or turn.get("value") is None:
        return turn
    speaker = str(speaker).lower()
    role = _ROLES.get(speaker)
    if role is None:
        raise FormatError(location, f"{speaker[:40]!r} is not a known speaker", f"Those are {', '.join(_ROLES)}")
    options = _present_fields(turn, "weight", "train")
    if speaker in _CALLERS:
        return {"role": role, "content": "", "tool_calls": _tool_calls(turn["value"], location), **options}
    return {"role": role, "content": _text_field(turn, "value", location), **options}


def _tool_calls(value: Any, location: str) -> list[Any]:
    """Return the calls in the words of a caller, as JSON of one call or of a list of them (LLaMA-Factory's data sets)."""
    with suppress(FormatError):
        value = json_file.parse(value, location) if isinstance(value, str) else value
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise FormatError(location, 'a call is not JSON with a "name" and "arguments"')
    return [{"type": "function", "function": call} for call in calls]


def _present_fields(record: Record, *keys: str) -> dict[str, Any]:
    return {key: record[key] for key in keys if record.get(key) is not None}


# ---- the shapes


def _text_record(record: Record, location: str) -> Record:
    _text_field(record, "text", location)
    return record


def _conversation_record(record: Record, location: str) -> Record:
    return {**record, "messages": _with_roles(_list_field(record, "messages", location), location)}


def _prompt_record(record: Record, location: str) -> Record:
    types = {type(record["prompt"]), type(record["completion"])}
    if types not in ({str}, {list}):
        raise FormatError(location, '"prompt" and "completion" are neither both text nor both lists of messages')
    return record


def _sharegpt_record(record: Record, location: str) -> Record:
    key = "conversations" if record.get("conversations") is not None else "conversation"
    turns = _with_roles(_list_field(record, key, location), location)
    system = _text_field(record, "system", location) if record.get("system") else ""
    return {
        "messages": [*([{"role": "system", "content": system}] if system else []), *turns],
        **_present_fields(record, "tools"),
    }


def _instruction_maker(question: str, answer: str, input_key: str = "input") -> Callable[[Record, str], Record]:
    def make(record: Record, location: str) -> Record:
        required = {"instruction": _text_field(record, question, location), "output": _text_field(record, answer, location)}
        system = record.get("system") or record.get("system_prompt")
        optional = {"input": record.get(input_key) if input_key != question else None, "system": system}
        return {**required, **{key: _text_field(optional, key, location) for key, value in optional.items() if value}}

    return make


def _preference_record(record: Record, location: str) -> Record:
    """Return the chosen side of a preference, whose prompt is separate or part of both sides (trl, "Dataset formats")."""
    chosen = record["chosen"]
    key = next((key for key in ("prompt", "question", "instruction", "conversations") if record.get(key) is not None), "")
    if isinstance(chosen, str):
        if not key:
            return {"text": chosen}
        if key in ("question", "instruction"):
            return _instruction_maker(key, "chosen")(record, location)
        return _prompt_record({"prompt": record[key], "completion": chosen}, location)
    turns = _with_roles([chosen] if isinstance(chosen, dict) else _list_field(record, "chosen", location), location)
    prompt_turns = record.get(key) if key else None
    # Some data sets repeat the prompt as the first turn of each side.
    if isinstance(prompt_turns, str):
        has_user_turn = any(isinstance(turn, dict) and turn.get("role") == "user" for turn in turns)
        prompt_turns = [] if has_user_turn else [{"role": "user", "content": prompt_turns}]
    if prompt_turns:
        return {"prompt": _with_roles(prompt_turns, location), "completion": turns, **_present_fields(record, "tools")}
    return {"messages": turns, **_present_fields(record, "tools")}


CHOSEN_SIDES = "preference pairs without their rejected sides"
# In order of precedence: shapes that separate answers from questions come before plain text.
SHAPES = (
    Shape("conversations", ("messages",), _conversation_record),
    Shape("prompts with completions", ("prompt", "completion"), _prompt_record),
    Shape(CHOSEN_SIDES, ("chosen", "rejected"), _preference_record),
    Shape("Alpaca", ("instruction", "output"), _instruction_maker("instruction", "output")),
    Shape("Dolly", ("instruction", "response"), _instruction_maker("instruction", "response", "context")),
    Shape("ShareGPT", ("conversations",), _sharegpt_record),
    Shape("ShareGPT", ("conversation",), _sharegpt_record),
    *(
        Shape("questions with answers", keys, _instruction_maker(*keys))
        for keys in (
            ("question", "answer"), ("question", "response"), ("query", "response"), ("query", "answer"),
            ("prompt", "response"), ("input", "output"),
        )
    ),
    Shape("text", ("text",), _text_record),
)  # fmt: skip
SIDES = ("chosen", "rejected")
PAIRS = "preference pairs"
UNCONVERTED = {"conversations", "prompts with completions", "text", PAIRS}
"""The shapes whose records are encoded without conversion."""
_OPTIONAL = ("input", "context", "system", "system_prompt", "tools")
_KEYS = tuple(dict.fromkeys([*(key for shape in SHAPES for key in shape.keys), *_OPTIONAL]))
