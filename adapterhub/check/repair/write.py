"""Write the repaired copy: files that need no repair keep their bytes, and adapter.json is updated."""

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

from .draft import Draft


def write_draft(draft: Draft, folder: Path) -> tuple[str, ...]:
    """Fill the empty `folder`; returns the names of files that do not belong to an adapter."""
    own = {peft.CONFIG, ADAPTER_JSON}
    if draft.retensored:
        own |= {peft.INDEX, *(Path(file.where).name for file in draft.files.values())}
        tensors = {name: draft.files[key].mapped(key) for name, key in draft.names.items()}
        safetensors_file.write(folder / peft.WEIGHTS, tensors, draft.metadata or {"format": "pt"})
    # In their order: peft takes the first pattern that matches.
    json_file.write_text(folder / peft.CONFIG, json.dumps(draft.config, indent=2, ensure_ascii=False) + "\n")
    left_out = _copy(draft.folder, folder, own) if draft.folder else ()
    if draft.folder and (draft.folder / ADAPTER_JSON).is_file():
        _manifest(draft, draft.folder, folder)
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


def _manifest(draft: Draft, source: Path, folder: Path) -> None:
    """Write the source's manifest with what the repairs change in it; leave it out if it did not match the source."""
    try:
        known = AdapterManifest.read(source)
        there = {path: digest for path, (digest, _) in describe.digests(source).items()}
        if known is None or any(there.get(entry.path) != entry.digest for entry in known.files):
            what = f"{ADAPTER_JSON} does not match the files and was left out"
            draft.propose("files-changed", what, "Publishing derives a new one")
            return
        described = describe.describe(folder)
    except AdapterhubError as error:
        draft.propose("files-changed", f"{ADAPTER_JSON} was left out: {error.what}", "Publishing derives a new one")
        return
    dataclasses.replace(known, **{key: getattr(described, key) for key in (*describe.DERIVED, "files")}).write(folder)
