"""Keys of configs that make a program import code, load other files, or build objects by name."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_KNOWN_LIBRARIES = ("transformers", "diffusers", "sentence_transformers")


class Fault(NamedTuple):
    """A defect of a config or template: the code of the problem, the path of the key, and the message."""

    code: str
    key: str
    message: str


def _auto_map(value: Any) -> str:
    names = value.values() if isinstance(value, dict) else [value]
    name = _short(next(iter(names), ""))
    return f"imports {name} from its repository (transformers, with trust_remote_code)" if value else ""


def _trusts(value: Any) -> str:
    return "asks for code of its repository to be run" if _short(value).lower() in ("true", "1") else ""


def _pipeline(value: Any) -> str:
    return f"runs a pipeline of its repository, {_short(value)}" if value else ""


def _library(value: Any) -> str:
    name = value.get("parent_library") if isinstance(value, dict) else None
    is_known = name is None or _short(name).split(".")[0] in _KNOWN_LIBRARIES
    return "" if is_known else f"has peft import {_short(name)} (peft, auto.py)"


def _megatron(value: Any) -> str:
    return "" if value in (None, "megatron.core") else f"has peft import {_short(value)} (peft, lora/tp_layer.py)"


def _implementation(value: Any) -> str:
    return f"loads a kernel from {_short(value)}" if isinstance(value, str) and "/" in value else ""


def _class(value: Any) -> str:
    return f"runs a pipeline of its repository, {_short(value)}" if isinstance(value, list) else ""


def _lambda(value: Any) -> str:
    return "is Keras's layer of any Python code" if value == "Lambda" else ""


def _object(value: Any) -> str:
    return f"builds {_short(value)} by its name"


_KEYS: dict[str, Callable[[Any], str]] = {
    "auto_map": _auto_map,
    "trust_remote_code": _trusts,
    "custom_pipelines": _pipeline,
    "custom_pipeline": _pipeline,
    "auto_mapping": _library,
    "megatron_core": _megatron,
    "_class_name": _class,
    "class_name": _lambda,
    "_target_": _object,
    "__reduce__": _object,
}
_SHORT = 80


def faults(document: Any) -> Iterator[Fault]:
    """Yield the faults of a parsed document; iterative, since its reader bounds nothing but the depth."""
    waiting: list[tuple[str, Any]] = [("", document)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                place = (f"{path}.{key}" if path else key)[:_SHORT]  # a long key is not repeated for all that is in it
                yield from _faults(key, inner, place)
                if isinstance(inner, dict | list):
                    waiting.append((place, inner))
        elif isinstance(value, list):
            waiting += [(path, inner) for inner in value if isinstance(inner, dict | list)]


def _faults(key: str, value: Any, place: str) -> Iterator[Fault]:
    rule = _KEYS.get(key) or (_implementation if key.endswith("_implementation") else None)
    rule = _object if key.startswith("py/") else rule
    if rule is not None and (message := rule(value)):
        yield Fault("remote-code", place, message)
    if key == "weight_map" and isinstance(value, dict):
        outside_path = next((text for text in value.values() if isinstance(text, str) and _leads_out(text)), None)
        if outside_path is not None:
            yield Fault("outside-path", place, f"names {_short(outside_path)}, which is not in the folder")


def _leads_out(text: str) -> bool:
    """Return whether a path leads out of its folder."""
    parts = text.replace("\\", "/").split("/")
    return ".." in parts or text.startswith(("/", "\\", "~")) or parts[0].endswith(":")


def _short(value: Any) -> str:
    """Return the beginning of a value; of a list or an object as much as fits, since a key in it may be shown again."""
    return (value if isinstance(value, str) else reprlib.repr(value))[:_SHORT]
