"""An adapter under repair: open it, hold its config and the new names of its tensors, and write the repaired copy."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.digest import sha256_bytes
from adapterhub.manifest import derive, weight_facts
from adapterhub.manifest.document import AdapterManifest
from adapterhub.manifest.package_files import is_packaged
from adapterhub_converters.adapter_files import ADAPTER_JSON, folder_for
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError
from adapterhub_converters.formats import FORMATS, peft, pickle_conversion, raw
from adapterhub_converters.formats.candidate import Candidate
from adapterhub_converters.lazy_dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Repair:
    """A repair; `code` is that of the problem if a check has one."""

    code: str
    what: str


@dataclass(frozen=True, slots=True)
class Proposal:
    """A defect that the files cannot prove; `do` tells how to fix it."""

    code: str
    what: str
    do: str


@dataclass
class Draft:
    """An adapter that is repaired step by step.

    Attributes:
        folder: The folder that the other files are copied from; None for a lone file.
        names: From the new name of a tensor to its name in the file; tensors that it lacks are dropped.
        files: From the name of a tensor in its file to the open file.
        lone: Whether the source is a state dict without a config.
        tensors: All tensors to write, if they differ from those of the files.
    """

    folder: Path | None
    config: dict[str, Any]
    names: dict[str, str]
    files: dict[str, SafetensorsFile]
    metadata: dict[str, str]
    lone: bool = False
    tensors: dict[str, np.ndarray] | None = None
    repairs: list[Repair] = field(default_factory=list)
    proposals: list[Proposal] = field(default_factory=list)

    @property
    def source_name(self) -> str:
        """The source, for errors."""
        return str(self.folder or "the file")

    def record(self, code: str, message: str) -> None:
        """Record a repair."""
        self.repairs.append(Repair(code, message))

    def propose(self, code: str, message: str, remedy: str) -> None:
        """Record a proposal."""
        self.proposals.append(Proposal(code, message, remedy))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, by its new name."""
        key = self.names[name]
        return self.files[key].tensors[key].shape

    def pairs(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return the shapes of each module's parts, for tensors whose names make them part of a delta."""
        pairs: dict[str, dict[str, tuple[int, ...]]] = {}
        for name in self.names:
            kind, target, part = peft.classify(name)
            if kind == "pair":
                pairs.setdefault(target, {})[part] = self.shape(name)
        return pairs

    def tensor_views(self) -> dict[str, np.ndarray]:
        """Return the tensors of the files by their new names, as views."""
        return {name: self.files[key].map_tensor(key) for name, key in self.names.items()}

    @property
    def must_rewrite_weights(self) -> bool:
        """Whether the weights must be rewritten."""
        return (
            self.lone
            or self.tensors is not None
            or any(name != key for name, key in self.names.items())
            or len(self.names) != len(self.files)
        )


@contextlib.contextmanager
def open_draft(path: Path, *, alpha: float | None, rslora: bool) -> Iterator[Draft]:
    """Open a PEFT folder, or a lone state dict that becomes one; the arguments are those of `fix`."""
    path = folder_for(path)
    candidate = Candidate(path)
    _check_kind(candidate)
    folder = path if path.is_dir() else None
    paths = peft.weight_files(path) if folder else [path]
    with contextlib.ExitStack() as stack:
        files: dict[str, SafetensorsFile] = {}
        metadata: dict[str, str] = {}
        for item in paths:
            file = stack.enter_context(SafetensorsFile(item))
            files.update(dict.fromkeys(file.tensors, file))
            metadata = dict(file.header.metadata)
        config = _read_config(candidate, metadata, alpha, rslora=rslora)
        lone = not (folder and (folder / peft.CONFIG).is_file())
        draft = Draft(folder, config, {key: key for key in files}, files, metadata, lone)
        if lone:
            draft.record("lone-state-dict", f"{paths[0].name} becomes a folder with {peft.CONFIG}")
        yield draft


def _check_kind(candidate: Candidate) -> None:
    """Refuse any adapter that is not PEFT's."""
    path = candidate.path
    hint = "Convert it to PEFT"
    if path.is_file() and path.suffix != ".safetensors":
        pickle_conversion.refuse(candidate)
        raise RefusedError(str(path), "only PEFT adapters can be repaired", hint, code="convert-to-peft")
    if path.is_dir() and FORMATS["mlx"].sniff(candidate):
        raise RefusedError(str(path), "an MLX adapter; only PEFT adapters can be repaired", hint, code="convert-to-peft")
    if FORMATS["tinker"].sniff(candidate):
        raise RefusedError(str(path), "an archive of Tinker; only PEFT adapters can be repaired", hint, code="convert-to-peft")
    if path.is_dir() and not any((path / name).is_file() for name in (peft.CONFIG, peft.WEIGHTS, peft.INDEX)):
        raise NotFoundError(
            str(path),
            f"no PEFT adapter: neither {peft.CONFIG} nor {peft.WEIGHTS}",
            peft.nested_adapter_hint(path),
            code="no-adapter",
        )


def _read_config(candidate: Candidate, metadata: dict[str, str], alpha: float | None, *, rslora: bool) -> dict[str, Any]:
    """Return the config of the folder or in the header of the file, or one made of `alpha`; removes it from `metadata`."""
    path, file = candidate.path, candidate.path / peft.CONFIG
    text = candidate.config if file.is_file() else metadata.pop(raw.CONFIG_KEY, None)
    metadata.pop(raw.METADATA_KEY, None)
    if text is not None:
        if alpha is not None or rslora:
            message = "it has a config, which decides the scale"
            raise RefusedError(str(path), message, "Leave out its alpha and rsLoRA", code="alpha-recorded")
        return json_file.parse_object(text, str(file))
    if alpha is None:
        message = "its alpha is not recorded, and the scale depends on it"
        raise RefusedError(
            str(path), message, "Give its alpha, and if it was trained with rsLoRA", code="alpha-or-rslora-required"
        )
    number = int(alpha) if float(alpha).is_integer() else alpha
    return {"peft_type": "LORA", "lora_alpha": number, "use_rslora": rslora, "inference_mode": True}


def write_draft(draft: Draft, folder: Path) -> tuple[str, ...]:
    """Fill the empty `folder`: files that need no repair keep their bytes, and adapter.json is updated.

    Returns:
        The names of files that do not belong to an adapter and were not copied.
    """
    # Files that this function writes itself and does not copy.
    written = {peft.CONFIG, ADAPTER_JSON}
    if draft.must_rewrite_weights:
        written |= {peft.INDEX, *(Path(file.location).name for file in draft.files.values())}
        safetensors_file.write(folder / peft.WEIGHTS, draft.tensors or draft.tensor_views(), draft.metadata or {"format": "pt"})
    json_file.write_text(folder / peft.CONFIG, _config_text(draft))
    left_out = _copy_other_files(draft.folder, folder, written) if draft.folder else ()
    if draft.folder and (draft.folder / ADAPTER_JSON).is_file():
        _write_manifest(draft, draft.folder, folder)
    return left_out


def _config_text(draft: Draft) -> str:
    """Return the config as a document: the recorded one, byte for byte, if the repairs have put back what was edited in it."""
    # In their order: peft takes the first pattern that matches.
    text = json.dumps(draft.config, indent=2, ensure_ascii=False) + "\n"
    with contextlib.suppress(AdapterhubError):  # of a malformed adapter.json, which `_write_manifest` reports
        manifest = AdapterManifest.read(draft.folder) if draft.folder else None
        recorded = {entry.digest for entry in manifest.files if entry.path == peft.CONFIG} if manifest else set()
        for indent, is_sorted, is_ascii, end in itertools.product((2, 4, None), (False, True), (False, True), ("", "\n")):
            other_text = json.dumps(draft.config, indent=indent, sort_keys=is_sorted, ensure_ascii=is_ascii) + end
            if sha256_bytes(other_text.encode()) in recorded:
                return other_text
    return text


def _copy_other_files(source: Path, folder: Path, written: set[str]) -> tuple[str, ...]:
    """Copy the files that are packaged and not written anew; return the names of the others."""
    left_out = []
    for item in sorted(source.iterdir()):
        if item.name in written or item.name.startswith("."):
            continue
        if item.is_file() and not item.is_symlink() and is_packaged(item.name):
            shutil.copyfile(item, folder / item.name)
        else:
            left_out.append(item.name)
    return tuple(left_out)


def _write_manifest(draft: Draft, source: Path, folder: Path) -> None:
    """Write the source's manifest with the facts that the repairs change.

    It is left out if it matched neither the source, as before an edit, nor the result, whose edit the repairs have put back.
    """
    try:
        manifest = AdapterManifest.read(source)
        before, after = ({path: digest for path, (digest, _) in derive.digests(place).items()} for place in (source, folder))
        # A manifest that is about other files must not vouch for the result.
        if manifest is None or any(
            entry.digest not in (before.get(entry.path), after.get(entry.path)) for entry in manifest.files
        ):
            message = f"{ADAPTER_JSON} does not match the files and was left out"
            draft.propose("files-changed", message, "Publishing derives a new one")
            return
        described = derive.describe(folder)
    except AdapterhubError as error:
        draft.propose("files-changed", f"{ADAPTER_JSON} was left out: {error.what}", "Publishing derives a new one")
        return
    dataclasses.replace(manifest, **{key: getattr(described, key) for key in (*weight_facts.DERIVED, "files")}).write(folder)
