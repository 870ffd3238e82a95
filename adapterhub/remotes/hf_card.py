"""The model card that a hub shows, completed so that its own bytes can be had back exactly.

A hub takes base, library, tags and licence from the front matter of README.md (Hugging Face's docs, "Model Cards"). What a
README lacks of that is added as one block between two comments at the top of its front matter, or as a front matter; nothing
else in it changes. Taking the block out again gives the README that the adapter has, which its digest proves. A README that
the adapter hasn't is written whole and is no part of the version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

NAME = "README.md"
MAX_CARD = 4 << 20  # bytes; a longer README is left as it is
_BEGIN, _WHOLE, _END = (
    b"# adapterhub: added",
    b"# adapterhub: added with the front matter",
    b"# adapterhub: end of what was added",
)
_OURS = b"---\n# adapterhub: written of adapter.json\n"
_FENCE = re.compile(rb"---[ \t]*(\r\n|\n)")
_LAST = re.compile(rb"^---[ \t]*(\r\n|\n|$)", re.MULTILINE)
_ADDED = re.compile(rb"^# adapterhub: added\r?\n.*?^# adapterhub: end of what was added\r?\n", re.DOTALL | re.MULTILINE)
_FRONT = re.compile(
    rb"---\n# adapterhub: added with the front matter\n.*?^# adapterhub: end of what was added\n---\n", re.DOTALL | re.MULTILINE
)
_KEY = re.compile(r"""(?:"([^"]+)"|'([^']+)'|([A-Za-z_][\w.-]*))[ \t]*:(?:\s|$)""")
_PLAIN = re.compile(r"[A-Za-z][\w.-]*/[A-Za-z][\w.-]*|[a-z]+-[a-z0-9.-]+")
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def completed(readme: bytes, facts: Mapping[str, Any]) -> bytes:
    """A README with what a hub needs; itself where it says all of it, or where it isn't understood."""
    keys = _keys(readme)
    if keys is None or len(readme) > MAX_CARD:
        return readme
    lines = [line for key, text in _fields(facts) if key not in keys for line in text]
    if not lines:
        return readme
    fence = _FENCE.match(readme)
    if fence:
        end = fence[1]
        block = end.join([_BEGIN, *(line.encode() for line in lines), _END, b""])
        result = readme[: fence.end()] + block + readme[fence.end() :]
    else:
        result = b"\n".join([b"---", _WHOLE, *(line.encode() for line in lines), _END, b"---", readme])
    return result if original(result) == readme else readme


def original(card: bytes) -> bytes:
    """A README without what `completed` added."""
    if front := _FRONT.match(card):
        return card[front.end() :]
    fence = _FENCE.match(card)
    if fence and (added := _ADDED.match(card, fence.end())):
        return card[: fence.end()] + card[added.end() :]
    return card


def written(title: str, facts: Mapping[str, Any]) -> bytes:
    """A card for an adapter that has none."""
    base, name = facts["base"]["repo"], _line(facts["name"] or title)
    kind = {"lora": "LoRA adapter", "dora": "DoRA adapter"}.get(facts["method"], "adapter")
    rank = f" of rank {facts['r']}" if facts["r"] else ""
    about = f" for {_line(base)}" if base else ""
    described = [str(facts["description"]), ""] if facts["description"] else []
    fields = [line for _, text in _fields(facts) for line in text]
    body = [f"# {name}", "", *described, f"A {kind}{rank}{about}. Its facts are in `adapter.json`.", ""]
    return _OURS + "\n".join([*fields, "---", "", *body]).encode()


def is_written(card: bytes) -> bool:
    """Whether a card is one of `written`."""
    return card.startswith(_OURS)


def _fields(facts: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """What a hub wants to know: each key with its lines of YAML."""
    base, licence = facts["base"]["repo"], facts["licence"]
    if base:
        yield "base_model", [f"base_model: {_yaml(base)}"]
        yield "base_model_relation", ["base_model_relation: adapter"]
    yield "library_name", [f"library_name: {_yaml(facts['format'])}"]
    if facts["task"] in _TASKS:
        yield "pipeline_tag", [f"pipeline_tag: {_TASKS[facts['task']]}"]
    tags = {"lora": ["lora"], "dora": ["lora", "dora"]}.get(facts["method"], [])
    if tags:
        yield "tags", ["tags:", *(f"- {tag}" for tag in tags)]
    if licence and _LICENCE.fullmatch(licence):
        yield "license", [f"license: {_yaml(licence.lower())}"]
    elif licence:
        yield "license", ["license: other", f"license_name: {_yaml(licence)}"]


def _keys(readme: bytes) -> set[str] | None:
    """The keys of its front matter, none without one; None for what is no plain mapping, or no text."""
    try:
        text = readme.decode()
    except UnicodeDecodeError:
        return None
    fence = _FENCE.match(readme)
    if not fence:
        # A byte order mark or a blank line before the fence: hubs see a front matter there, this doesn't touch it.
        return None if text.lstrip("\ufeff \t\r\n").startswith("---") else set()
    last = _LAST.search(readme, fence.end())
    if not last:
        return None
    keys = set()
    for line in readme[fence.end() : last.start()].decode().splitlines():
        if not line.strip() or line[0] in " \t#" or line.startswith("- ") or line == "-":
            continue
        found = _KEY.match(line)
        if not found:
            return None
        keys.add(found[1] or found[2] or found[3])
    return keys


def _yaml(value: object) -> str:
    """A string as YAML has it; JSON's are YAML's (YAML 1.2, section 1.3)."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) or text in ("peft", "gguf", "mlx", "mit") else json.dumps(text)


def _line(text: object) -> str:
    return " ".join(str(text).split())
