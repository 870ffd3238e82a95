"""The model card that a hub shows, completed so that its own bytes can be had back exactly.

A hub takes base, library, tags and license from the front matter of README.md (Hugging Face's docs, "Model Cards"). What a
README lacks of that is added as one block between two comments at the top of its front matter, or as a front matter; nothing
else in it changes, but that a base which is a path of one machine, as PEFT writes it, becomes a comment. Taking the block out
again gives the README that the adapter has, which its digest proves. A README that the adapter hasn't is written whole and is
no part of the version.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from adapterhub.manifest.document import AdapterManifest

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
_WAS = b"# adapterhub: was "
_BASE = re.compile(rb"(?<=\n)base_model:[ \t]+(\S[^\r\n]*?)[ \t]*(?=\r?\n)")
_MODEL = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_KEY = re.compile(r"""(?:"([^"]+)"|'([^']+)'|([A-Za-z_][\w.-]*))[ \t]*:(?:\s|$)""")
_PLAIN = re.compile(r"[A-Za-z][\w.-]*/[A-Za-z][\w.-]*|[a-z]+-[a-z0-9.-]+")
# What a hub takes as `license` (Hugging Face's docs, "Licenses"); it refuses a card with another.
_LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "cdla-sharing-1.0", "creativeml-openrail-m", "ecl-2.0", "epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "gemma", "gfdl",
    "gpl", "gpl-2.0", "gpl-3.0", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa", "odbl", "odc-by", "ofl-1.1", "openrail",
    "openrail++", "osl-3.0", "other", "pddl", "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}


def completed(readme: bytes, manifest: AdapterManifest) -> bytes:
    """A README with what a hub needs; itself where it says all of it, or where it isn't understood."""
    keys, card = _keys(readme), readme
    if keys is None or len(readme) > MAX_CARD:
        return readme
    if manifest.base.repo and "base_model" in keys and (path := _path(readme)):
        keys.discard("base_model")
        card = readme[: path.start()] + _WAS + readme[path.start() :]
    lines = [line for key, text in _fields(manifest) if key not in keys for line in text]
    if not lines:
        return readme
    fence = _FENCE.match(card)
    if fence:
        end = fence[1]
        block = end.join([_BEGIN, *(line.encode() for line in lines), _END, b""])
        result = card[: fence.end()] + block + card[fence.end() :]
    else:
        result = b"\n".join([b"---", _WHOLE, *(line.encode() for line in lines), _END, b"---", card])
    return result if original(result) == readme else readme


def original(card: bytes) -> bytes:
    """A README without what `completed` added."""
    if front := _FRONT.match(card):
        return card[front.end() :]
    fence = _FENCE.match(card)
    if fence and (added := _ADDED.match(card, fence.end())):
        return card[: fence.end()] + card[added.end() :].replace(b"\n" + _WAS + b"base_model", b"\nbase_model", 1)
    return card


def _path(readme: bytes) -> re.Match[bytes] | None:
    """The line with a base that no hub can have, and that it would refuse the card for."""
    found = _BASE.search(readme, 0, _end(readme))
    value = found[1].decode().strip("\"'") if found else ""
    return found if value and not value.startswith(("[", "#", "|", ">", "&")) and not _MODEL.fullmatch(value) else None


def _end(readme: bytes) -> int:
    fence = _FENCE.match(readme)
    last = _LAST.search(readme, fence.end()) if fence else None
    return last.start() if last else 0


def written(title: str, manifest: AdapterManifest) -> bytes:
    """A card for an adapter that has none."""
    base, name = manifest.base.repo, _line(manifest.name or title)
    kind = {"lora": "LoRA adapter", "dora": "DoRA adapter"}.get(manifest.method, "adapter")
    rank = f" of rank {manifest.r}" if manifest.r else ""
    about = f" for {_line(base)}" if base else ""
    described = [manifest.description, ""] if manifest.description else []
    fields = [line for _, text in _fields(manifest) for line in text]
    body = [f"# {name}", "", *described, f"A {kind}{rank}{about}. Its manifest is `adapter.json`.", ""]
    return _OURS + "\n".join([*fields, "---", "", *body]).encode()


def is_written(card: bytes) -> bool:
    """Whether a card is one of `written`."""
    return card.startswith(_OURS)


def _fields(manifest: AdapterManifest) -> Iterator[tuple[str, list[str]]]:
    """What a hub wants to know: each key with its lines of YAML."""
    base, spdx = manifest.base.repo, manifest.license
    if base:
        yield "base_model", [f"base_model: {_yaml(base)}"]
        yield "base_model_relation", ["base_model_relation: adapter"]
    yield "library_name", [f"library_name: {_yaml(manifest.format)}"]
    if manifest.task in _TASKS:
        yield "pipeline_tag", [f"pipeline_tag: {_TASKS[manifest.task]}"]
    tags = {"lora": ["lora"], "dora": ["lora", "dora"]}.get(manifest.method, [])
    if tags:
        yield "tags", ["tags:", *(f"- {tag}" for tag in tags)]
    if spdx:
        name = re.sub(r"[^a-z0-9.+]+", "-", spdx.lower()).strip("-")
        known = re.sub(r"-(only|or-later)$", "", name)
        other = ["license: other", *([f"license_name: {_yaml(name)}"] if name else [])]
        yield "license", [f"license: {_yaml(known)}"] if known in _LICENSES else other


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
