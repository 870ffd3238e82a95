"""The README.md of a merged model: what it is made of, for people and for the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterhub import card
from adapterhub_converters.base import BaseSpec

NAME = "README.md"


def written(base: Path, spec: BaseSpec, lineage: Mapping[str, Any], notes: tuple[str, ...]) -> str:
    """The text: a pure function of base, adapters and what was decided, so that a merge is the same twice."""
    said = {"repo": spec.repo, "revision": spec.revision, "name": base.resolve().name, **lineage.get("base", {})}
    name = said["repo"] or said["name"]
    front = {"base_model": name, "base_model_relation": "merge", "tags": ["lora", "merge"]}
    if licence := _licence(base):
        front["license"] = licence
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---", ""]
    lines += [f"# {name}, merged", "", "A model with adapters merged into its weights by `adapterhub merge`.", ""]
    lines += ["| | |", "| --- | --- |", f"| base | {_cell(name)} |"]
    if said["revision"]:
        lines.append(f"| revision | {_cell(said['revision'])} |")
    if spec.fingerprint:
        lines.append(f"| fingerprint of its names and shapes | `{spec.fingerprint}` |")
    for adapter in lineage.get("adapters", ()):
        where = f"{adapter['ref']} " if adapter.get("ref") else ""
        lines.append(f"| adapter, times {adapter['weight']:g} | {_cell(where)}`{adapter['digest']}` |")
    if notes:
        lines += ["", *(f"- {_cell(note)}" for note in notes)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split()) + (" " if text.endswith(" ") else "")


def _licence(base: Path) -> str | None:
    """What the base's own card says."""
    try:
        text = (base / NAME).read_text(encoding="utf-8", errors="replace")[: card.MAX_BYTES]
    except OSError:
        return None
    found = card.parse(text).values("license")
    return found[0] if len(found) == 1 else None
