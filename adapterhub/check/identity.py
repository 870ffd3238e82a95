"""Check that a base is the one an adapter was trained on, by what the `adapter.json` of the adapter pins.

Shapes cannot tell Llama 3 from 3.1, or an instruction-tuned model from its base: digests can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapterhub.manifest import describe
from adapterhub_converters.bases import BaseSpec

from .contents import Contents
from .report import Problem

FILE = "adapter.json"
# Shapes settle these, and a GGUF base may lack them.
_SHAPES = {
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "tie_word_embeddings",
    "max_position_embeddings",
}


def identity_problems(contents: Contents, base: BaseSpec) -> Iterator[Problem]:
    """Differences between a base and the one that the adapter's manifest pins."""
    document = describe.read_facts(folder_of(contents))
    pinned = (document or {}).get("base")
    yield from _name(contents, base, pinned if isinstance(pinned, Mapping) else {})
    if not isinstance(pinned, Mapping) or not pinned.get("fingerprint"):
        what = "adapter.json pins no base; identity was not compared"
        yield Problem("unpinned", FILE, "base", what, "Publish it with its base")
        return
    if base.fingerprint and pinned["fingerprint"] != base.fingerprint:
        what = f"trained on {_short(pinned['fingerprint'])}, this base is {_short(base.fingerprint)}"
        hint = "Use the base it was trained on, or train again"
        yield Problem("base-differs", FILE, "base.fingerprint", what, hint, pinned["fingerprint"], base.fingerprint)
    for code, key, digest in (
        ("tokenizer-differs", "tokenizer_digest", base.tokenizer_digest),
        ("template-differs", "chat_template_digest", base.chat_template_digest),
    ):
        if pinned.get(key) and digest and pinned[key] != digest:
            what = f"trained with {_short(pinned[key])}, here {_short(digest)}"
            yield Problem(code, FILE, f"base.{key}", what, "", str(pinned[key]), str(digest))
    yield from _numbers(pinned.get("config") or {}, base.config)


def folder_of(contents: Contents) -> Path:
    """The folder of an adapter."""
    return contents.path if contents.path.is_dir() else contents.path.parent


def changed_files(contents: Contents) -> Iterator[Problem]:
    """Files whose bytes are not those that adapter.json names."""
    folder = folder_of(contents)
    document = describe.read_facts(folder)
    for entry in (document or {}).get("files", []):
        path = folder / entry["path"]
        if entry["path"] == describe.DECLARED:
            continue
        if not path.is_file():
            yield Problem("files-changed", entry["path"], "", "adapter.json names it, but it is missing")
        elif path.stat().st_size != entry["size"] or contents.digest(path) != entry["digest"]:
            what = f"adapter.json names {_short(entry['digest'])} with {entry['size']} bytes; this is another file"
            yield Problem(
                "files-changed", entry["path"], "", what, "Fetch it again; after an edit of your own, delete adapter.json"
            )


def _numbers(pinned: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[Problem]:
    for key in sorted(set(pinned) & set(here) - _SHAPES):
        if not _same(pinned[key], here[key]):
            what = f"trained with {pinned[key]}, here {here[key]}"
            yield Problem("numerics-differ", FILE, f"base.config.{key}", what, "", str(pinned[key]), str(here[key]))


def _same(one: Any, other: Any) -> bool:
    # A GGUF stores its numbers in 32 bits: 1e-05 comes back as 9.99999974e-06.
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))
    return bool(one == other)


def _name(contents: Contents, base: BaseSpec, pinned: Mapping[str, Any]) -> Iterator[Problem]:
    trained = pinned.get("repo") or contents.config.get("base_model_name_or_path")
    if isinstance(trained, str) and trained and base.repo and Path(trained).name != Path(base.repo).name:
        what = f"trained on {trained}, but this base is named {base.repo}"
        yield Problem("base-name-differs", "", base.where, what, "", trained, base.repo)


def _short(digest: object) -> str:
    return str(digest)[:19]
