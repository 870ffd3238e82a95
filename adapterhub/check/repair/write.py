"""The mended copy on the disk: what was not mended keeps its bytes, and adapter.json its truth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from adapterhub.manifest import describe
from adapterhub.manifest.package_files import CONFIGS, DOCS, LEGAL, WEIGHTS
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft

from .draft import Draft

# Of adapter.json, what other files of the folder say.
_DERIVED = ("method", "r", "alpha", "rslora", "modules", "targets", "replaced", "dtype", "parameters", "format", "files")


def write_draft(state: Draft, folder: Path) -> tuple[str, ...]:
    """Fill the empty `folder`; the names of files that are no part of an adapter come back."""
    own = {peft.CONFIG, describe.NAME}
    if state.retensored:
        own |= {peft.INDEX, *(Path(file.where).name for file in state.files.values())}
        tensors = {name: state.files[key].mapped(key) for name, key in state.names.items()}
        safetensors_file.write(folder / peft.WEIGHTS, tensors, state.metadata or {"format": "pt"})
    # In their order: peft takes the first pattern that matches.
    json_file.write_text(folder / peft.CONFIG, json.dumps(state.config, indent=2, ensure_ascii=False) + "\n")
    left_out = _copy(state.folder, folder, own) if state.folder else ()
    if state.folder and (state.folder / describe.NAME).is_file():
        _facts(state, state.folder, folder)
    return left_out


def _copy(source: Path, folder: Path, own: set[str]) -> tuple[str, ...]:
    left_out = []
    for item in sorted(source.iterdir()):
        if item.name in own or item.name.startswith("."):
            continue
        packaged = item.suffix.lower() in WEIGHTS | CONFIGS | DOCS or item.name.upper().startswith(LEGAL)
        if item.is_file() and not item.is_symlink() and packaged:
            shutil.copyfile(item, folder / item.name)
        else:
            left_out.append(item.name)
    return tuple(left_out)


def _facts(state: Draft, source: Path, folder: Path) -> None:
    """The facts that were recorded, with what the mended files say; none where they weren't those of the source."""
    try:
        known = describe.read_facts(source)
        there = {path: digest for path, (digest, _) in describe.digests(source).items()}
        if known is None or any(there.get(entry["path"]) != entry["digest"] for entry in known["files"]):
            state.proposed(
                "files-changed", f"{describe.NAME} is not that of these files and was left out", "`push` derives it anew"
            )
            return
        described = describe.describe(folder)
    except AdapterhubError as error:
        state.proposed("files-changed", f"{describe.NAME} was left out: {error.what}", "`push` derives it anew")
        return
    describe.write_facts(folder, {**known, **{key: described[key] for key in _DERIVED}})
