"""Differences between two adapters that were looked up: their files, the facts of adapter.json, and what they compute."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from adapterhub_converters.adapter_files import ADAPTER_JSON, determines_function, is_weights
from adapterhub_converters.errors import IntegrityError
from adapterhub_converters.lazy_dataclass import dataclass

from . import base_sources, source_names, sources
from .workspace import Progress, StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.analysis.diff_result import Difference
    from adapterhub.digest import Digest
    from adapterhub.manifest.document import AdapterManifest, FileEntry
    from adapterhub.manifest.fact_changes import FileChange
    from adapterhub.manifest.folder_contents import Inspection
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub_converters.bases import BaseSpec


@dataclass(frozen=True)
class _ComparedVersion:
    """An adapter as it is stored or would be stored, before its weights are read.

    Attributes:
        name: The name to open it by.
        location: The name to show.
        digest: The digest of its OCI manifest.
        manifest: Its adapter.json.
        files: The files of the OCI manifest, without adapter.json.
        inspected: The adapter as it was read for its manifest, which may have taken reading all of it.
    """

    name: StrPath
    location: str
    digest: Digest
    manifest: AdapterManifest
    files: tuple[FileEntry, ...]
    inspected: Inspection | None = None

    @property
    def deciding_files(self) -> dict[str, Digest]:
        """The files that decide what the adapter computes; empty if none of them is known to have weights."""
        digests = {entry.path: entry.digest for entry in self.files if determines_function(entry.path)}
        return digests if any(map(is_weights, digests)) else {}


def diff(
    a: StrPath,
    b: StrPath,
    *,
    base: base_sources.Base | None = None,
    progress: Progress | None = None,
    workspace: Workspace | None = None,
) -> Difference:
    """Compare two adapters, or two versions of one: their files, the facts of adapter.json, and what they compute.

    Equal digests are an answer: weights are read only where the files that decide what an adapter computes differ.

    Args:
        a: A folder, a file, a ref or an address.
        b: Likewise.
        base: The model of both, where a format needs one.
        progress: Called with bytes or modules done and in all.
        workspace: Where names are looked up.

    Raises:
        NotFoundError: There is no such adapter.
        FormatError: A file is malformed.

    Example:
        >>> difference = ah.diff("./sql", "./french")
        >>> difference.same, difference.modules[0].status, [file.path for file in difference.files]
        (False, 'changed', ['adapter_model.safetensors'])
    """
    workspace = (workspace or Workspace()).with_progress(progress)
    spec = base_sources.base_spec(base, workspace)
    from adapterhub.analysis import diff as functions
    from adapterhub.analysis.diff_result import Difference
    from adapterhub.manifest import fact_changes

    before, after = (_read_version(source, workspace, spec) for source in (a, b))
    if before.deciding_files and before.deciding_files == after.deciding_files:
        difference = Difference()
    else:
        with (
            sources.open_source(before.name, workspace, for_report=True) as first,
            sources.open_source(after.name, workspace, for_report=True) as second,
            workspace.steps("comparing") as advance,
        ):
            inspected = before.inspected, after.inspected
            difference = functions.diff(first.path, second.path, base=spec, inspected=inspected, progress=advance)
    return dataclasses.replace(
        difference,
        names=(before.location, after.location),
        digests=(before.digest, after.digest),
        files=_with_lines(fact_changes.files(before.files, after.files), before, after, workspace),
        facts=fact_changes.facts(before.manifest, after.manifest),
    )


_TEXTS = (".md", ".txt", ".toml", ".yaml", ".yml", ".jinja")
_MAX_TEXT = 256 << 10  # bytes


def _with_lines(
    changes: Sequence[FileChange], before: _ComparedVersion, after: _ComparedVersion, workspace: Workspace
) -> tuple[FileChange, ...]:
    """Return the changes of files, those of short texts that both versions have with the lines that differ."""
    from adapterhub.analysis.text_lines import changed_lines

    pairs = {change.path: (change.old, change.new) for change in changes if change.old and change.new}
    texts = {
        path: (old, new)
        for path, (old, new) in pairs.items()
        if path.lower().endswith(_TEXTS) and max(old.size, new.size) <= _MAX_TEXT
    }
    old_texts = _texts(before, [old for old, _ in texts.values()], workspace)
    new_texts = _texts(after, [new for _, new in texts.values()], workspace)
    lines = {path: changed_lines(old_texts[path], new_texts[path]) for path in texts}
    return tuple(dataclasses.replace(change, lines=lines.get(change.path, ())) for change in changes)


def _texts(version: _ComparedVersion, entries: Sequence[FileEntry], workspace: Workspace) -> dict[str, str]:
    """Return the texts of some files of a version, by their paths."""
    if not entries:
        return {}
    with ExitStack() as stack:
        read: Callable[[FileEntry], bytes]
        if source_names.is_address(version.name):
            from adapterhub.manifest.oci_manifest import Descriptor
            from adapterhub.remotes.download import read_blob
            from adapterhub.remotes.remote_address import parse

            remote = stack.enter_context(workspace.connect(parse(str(version.name))))

            def read(entry: FileEntry) -> bytes:
                return read_blob(remote, Descriptor("", entry.digest, entry.size, entry.path), version.location)
        elif source_names.ref_of(version.name, workspace) is not None:
            registry = stack.enter_context(workspace.open_registry())

            def read(entry: FileEntry) -> bytes:
                return registry.store.read_document(entry.digest)
        else:
            from adapterhub_converters.containers.open_file import read_bytes

            adapter_source = stack.enter_context(sources.open_source(version.name, workspace, for_report=True))
            folder = stack.enter_context(sources.as_folder(adapter_source))

            def read(entry: FileEntry) -> bytes:
                return read_bytes(folder / entry.path)

        return {entry.path: read(entry).decode("utf-8", "replace") for entry in entries}


def _read_version(source: StrPath, workspace: Workspace, base: BaseSpec | None) -> _ComparedVersion:
    from adapterhub.manifest.document import FileEntry

    stored = (
        _remote_version(str(source), workspace) if source_names.is_address(source) else _registry_version(source, workspace)
    )
    if stored is None:
        return _unpushed_version(source, workspace, base)
    name, oci_document, manifest = stored
    files = tuple(
        FileEntry(layer.path, layer.digest, layer.size) for layer in oci_document.layers if layer.path != ADAPTER_JSON
    )
    return _ComparedVersion(name, name, oci_document.digest, manifest, files)


_StoredVersion = tuple[str, "Manifest", "AdapterManifest"]
"""The name of a version, its OCI manifest, and its adapter.json."""


def _registry_version(source: StrPath, workspace: Workspace) -> _StoredVersion | None:
    """Return a version of the registry; None for a path, and for a version without adapter.json."""
    ref = source_names.ref_of(source, workspace)
    if ref is None:
        return None
    with workspace.open_registry() as registry:
        with source_names.no_path_either(os.fspath(source)):
            version = registry.resolve(ref)
        manifest = registry.adapter_manifest(version.digest)
        return (str(version.ref), registry.oci_manifest(version), manifest) if manifest else None


def _remote_version(source: str, workspace: Workspace) -> _StoredVersion | None:
    """Return a version at an address; None for one without adapter.json, which is then derived from its files."""
    from adapterhub.remotes.remote_address import parse
    from adapterhub.remotes.version_copy import read_adapter_manifest

    address = parse(source)
    with workspace.connect(address) as remote:
        oci_document = remote.manifest(address.reference)
        return (
            (source, oci_document, read_adapter_manifest(remote, oci_document, source)) if oci_document.adapter_json else None
        )


def _unpushed_version(source: StrPath, workspace: Workspace, base: BaseSpec | None) -> _ComparedVersion:
    """Return the version that a push of the files would store."""
    from adapterhub.manifest import derive, folder_contents, oci_manifest, package_files
    from adapterhub.store.store import counter
    from adapterhub_converters.formats import convert
    from adapterhub_converters.formats.candidate import Candidate

    with sources.open_source(source, workspace, for_report=True) as adapter_source, sources.as_folder(adapter_source) as folder:
        inspected = None
        if base is not None:
            candidate = Candidate(adapter_source.path)
            kind = convert.sniff(candidate)
            if kind not in ("peft", "tinker"):  # a push reads these without their base, so a diff must, too
                inspected = folder_contents.Inspection(kind, convert.read(candidate, base=base), is_complete=True)
        with workspace.bar("reading") as progress:
            size = sum((folder / path).stat().st_size for path in package_files.survey(folder)[0])
            contents = folder_contents.read_folder(folder, on_bytes=counter(progress, size))
        draft, files = derive.draft_contents(contents, inspected=inspected), contents.files
        try:
            manifest, raw = draft.finalize(files)
        # A diff is about the files themselves, so a manifest of other weights must not prevent it.
        except IntegrityError as error:
            workspace.tell(
                f"note: {adapter_source.location}: its adapter.json is not about these files and is ignored: {error.what}"
            )
            manifest = derive.describe(folder, files=files, inspected=draft.inspected, card=draft.card)
            raw = manifest.dump()
        digest = oci_manifest.complete(files, manifest, raw).digest
        read_with_base = draft.inspected if base is None else inspected
        return _ComparedVersion(source, adapter_source.location, digest, manifest, manifest.files, read_with_base)
