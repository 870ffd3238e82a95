"""The mended copy on the disk: what was not mended keeps its bytes, and adapter.json its truth."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from adapterhub.manifest import describe
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.package_files import is_packaged
from adapterhub_converters.adapter_files import ADAPTER_JSON
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft

from .draft import State


def write(state: State, folder: Path) -> tuple[str, ...]:
    """Fill the empty `folder`; the names of files that are no part of an adapter come back."""
    own = {peft.CONFIG, ADAPTER_JSON}
    if state.retensored:
        own |= {peft.INDEX, *(Path(file.where).name for file in state.files.values())}
        tensors = {name: state.files[key].mapped(key) for name, key in state.names.items()}
        safetensors_file.write(folder / peft.WEIGHTS, tensors, state.metadata or {"format": "pt"})
    # In their order: peft takes the first pattern that matches.
    json_file.write_text(folder / peft.CONFIG, json.dumps(state.config, indent=2, ensure_ascii=False) + "\n")
    left_out = _copy(state.folder, folder, own) if state.folder else ()
    if state.folder and (state.folder / ADAPTER_JSON).is_file():
        _manifest(state, state.folder, folder)
    return left_out


def _copy(source: Path, folder: Path, own: set[str]) -> tuple[str, ...]:
    left_out = []
    for item in sorted(source.iterdir()):
        if item.name in own or item.name.startswith("."):
            continue
        if item.is_file() and not item.is_symlink() and is_packaged(item.name):
            shutil.copyfile(item, folder / item.name)
        else:
            left_out.append(item.name)
    return tuple(left_out)


def _manifest(state: State, source: Path, folder: Path) -> None:
    """Write the source's manifest with what the repaired files change in it; nothing if it was not that of the source."""
    try:
        known = AdapterManifest.read(source)
        there = {path: digest for path, (digest, _) in describe.digests(source).items()}
        if known is None or any(there.get(entry.path) != entry.digest for entry in known.files):
            state.proposed(
                "files-changed", f"{ADAPTER_JSON} is not that of these files and was left out", "`push` derives it anew"
            )
            return
        described = describe.describe(folder)
    except AdapterhubError as error:
        state.proposed("files-changed", f"{ADAPTER_JSON} was left out: {error.what}", "`push` derives it anew")
        return
    dataclasses.replace(known, **{key: getattr(described, key) for key in (*describe.DERIVED, "files")}).write(folder)
