"""Write the repaired copy: files that need no repair keep their bytes, and adapter.json is updated."""

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

# Keys of adapter.json that are derived from other files of the folder.
_DERIVED = ("method", "r", "alpha", "rslora", "modules", "targets", "replaced", "dtype", "parameters", "format", "files")


def write_draft(draft: Draft, folder: Path) -> tuple[str, ...]:
    """Fill the empty `folder`; returns the names of files that do not belong to an adapter."""
    own = {peft.CONFIG, describe.NAME}
    if draft.retensored:
        own |= {peft.INDEX, *(Path(file.where).name for file in draft.files.values())}
        tensors = {name: draft.files[key].mapped(key) for name, key in draft.names.items()}
        safetensors_file.write(folder / peft.WEIGHTS, tensors, draft.metadata or {"format": "pt"})
    # In their order: peft takes the first pattern that matches.
    json_file.write_text(folder / peft.CONFIG, json.dumps(draft.config, indent=2, ensure_ascii=False) + "\n")
    left_out = _copy(draft.folder, folder, own) if draft.folder else ()
    if draft.folder and (draft.folder / describe.NAME).is_file():
        _facts(draft, draft.folder, folder)
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


def _facts(draft: Draft, source: Path, folder: Path) -> None:
    """Copy adapter.json with the keys derived from the repaired files; leave it out if it did not match the source."""
    try:
        known = describe.read_facts(source)
        there = {path: digest for path, (digest, _) in describe.digests(source).items()}
        if known is None or any(there.get(entry["path"]) != entry["digest"] for entry in known["files"]):
            what = f"{describe.NAME} does not match the files and was left out"
            draft.propose("files-changed", what, "Publishing derives a new one")
            return
        described = describe.describe(folder)
    except AdapterhubError as error:
        draft.propose("files-changed", f"{describe.NAME} was left out: {error.what}", "Publishing derives a new one")
        return
    describe.write_facts(folder, {**known, **{key: described[key] for key in _DERIVED}})
