"""The files of a merged folder other than its weights: those copied from the base, and its model card.

Configuration, tokenizer and documents are copied. A second copy of the weights would still be the unmerged model, an adapter in
the folder would be loaded on top by transformers, and a pickle can run code when it is loaded: all of these are left out.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapterhub.manifest import card
from adapterhub_converters.adapter_files import ADAPTER_CONFIG, ADAPTER_JSON, ADAPTER_TOML, is_pickle_name
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers.open_file import MAX_PATH, walk
from adapterhub_converters.display import front_matter, markdown

_WEIGHTS = (".safetensors", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz", ".tflite", ".mlmodel", ".ot")
_ADAPTER = (ADAPTER_CONFIG, ADAPTER_JSON, ADAPTER_TOML)
CARD = "README.md"


def side_files(base: Path, shards: set[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the files to copy, relative to `base`, and those to leave out with the reason; hidden files are in neither."""
    copied, skipped = [], {}
    for path, status in walk(base, _is_shown):
        is_folder = stat.S_ISDIR(status.st_mode)
        if not _is_shown(path) or path in shards or (is_folder and len(path) <= MAX_PATH):
            continue
        if len(path) > MAX_PATH:
            skipped[path] = f"a path of more than {MAX_PATH} characters"
        elif reason := _reason(base / path, base):
            skipped[path] = reason
        else:
            copied.append(path)
    return tuple(copied), skipped


def _is_shown(path: str) -> bool:
    name = path.rpartition("/")[2]
    return not name.startswith(".") and name != "__pycache__"


def _reason(path: Path, base: Path) -> str | None:
    """Return why a file is left out; None for one to copy."""
    name = path.name.lower()
    if is_pickle_name(name):
        return "a pickle can run code when it is loaded"
    if name.endswith((*_WEIGHTS, ".safetensors.index.json")) and name != "model.safetensors.index.json":
        return "other weights, which would still be the unmerged model"
    if name in _ADAPTER or path == base / CARD:
        return "belongs to an adapter" if name in _ADAPTER else "the merged model has a card of its own"
    if not path.is_file():
        return "not a regular file"
    if path.is_symlink() and not _stays_inside(path.resolve(), base):
        return "a link that leads out of the model"
    return None


def _stays_inside(target: Path, base: Path) -> bool:
    # huggingface_hub's cache: snapshots/<revision>/config.json -> ../../blobs/<digest>.
    """Return whether a link stays inside the model, or leads to a blob of its cache."""
    real = base.resolve()
    return target.is_relative_to(real) or target.parent == real.parent.parent / "blobs"


def copy_side_files(base: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Copy the contents of files but not their modes: a blob in a cache may be read-only."""
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, target)


def model_card(base: Path, spec: BaseSpec, lineage: Mapping[str, Any], notes: tuple[str, ...]) -> str:
    """Return the README.md of a merged model, for people and for the Hugging Face Hub.

    A pure function of base, adapters and decisions, so that the same merge gives the same bytes.
    """
    origin = {"repo": spec.repo, "revision": spec.revision, "name": base.resolve().name, **lineage.get("base", {})}
    name = origin["repo"] or origin["name"]
    front = {"base_model": name, "base_model_relation": "merge", "tags": ["lora", "merge"]}
    if spdx := card.license_in(base):
        front["license"] = spdx
    lines = [*front_matter(front), ""]
    lines += [f"# {markdown(name)}, merged", "", "A model with adapters merged into its weights by adapterhub.", ""]
    lines += ["| | |", "| --- | --- |", f"| base | {markdown(name)} |"]
    if origin["revision"]:
        lines.append(f"| revision | {markdown(origin['revision'])} |")
    if spec.fingerprint:
        lines.append(f"| fingerprint of its names and shapes | `{spec.fingerprint}` |")
    for adapter in lineage.get("adapters", ()):
        ref_text = f"{markdown(adapter['ref'])} " if adapter.get("ref") else ""
        lines.append(f"| adapter, times {adapter['weight']:g} | {ref_text}`{adapter['digest']}` |")
    if "method" in lineage:
        parameters = ", ".join(f"{name} {value}" for name, value in lineage["parameters"].items())
        lines.append(f"| method | {markdown(' '.join(filter(None, (lineage['method'], parameters))))} |")
    if notes:
        lines += ["", *(f"- {markdown(note)}" for note in notes)]
    return "\n".join(lines) + "\n"
