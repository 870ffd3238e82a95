"""Differences between two adapters that were looked up: their files, the facts of adapter.json, and what they compute."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterhub_converters.adapter_files import ADAPTER_JSON, decides, is_weights
from adapterhub_converters.errors import IntegrityError

from . import sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.analysis.diff import Difference
    from adapterhub.digest import Digest
    from adapterhub.manifest.document import AdapterManifest, FileEntry
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub_converters.bases import BaseSpec


@dataclass(frozen=True)
class _Version:
    """An adapter as it is stored or would be, before its weights are read.

    Attributes:
        name: How to open it.
        where: Its name for a reader.
        digest: Of its OCI manifest.
        manifest: Its adapter.json.
        files: Those of the OCI manifest, without adapter.json.
    """

    name: StrPath
    where: str
    digest: Digest
    manifest: AdapterManifest
    files: tuple[FileEntry, ...]

    @property
    def deciding(self) -> dict[str, Digest]:
        """The files that decide what it computes; empty if none of them is known to have weights."""
        found = {entry.path: entry.digest for entry in self.files if decides(entry.path)}
        return found if any(map(is_weights, found)) else {}


def diff(a: StrPath, b: StrPath, workspace: Workspace, *, base: BaseSpec | None = None) -> Difference:
    """What changed from `a` to `b`. Where the same files decide what they compute, no weights are read.

    Args:
        a: A folder, a file, a ref or an address.
        b: Likewise.
        workspace: The registry, credentials; its `bar` and `steps` show the work.
        base: The model of both, for formats that cannot be read without it.

    Raises:
        NotFoundError: There is no such adapter.
        FormatError: A file is malformed.
    """
    from adapterhub.analysis import diff as functions
    from adapterhub.manifest import changes

    one, two = (_version(source, workspace, base) for source in (a, b))
    if one.deciding and one.deciding == two.deciding:
        found = functions.Difference()
    else:
        with (
            sources.opened(one.name, workspace) as first,
            sources.opened(two.name, workspace) as second,
            workspace.steps("comparing") as progress,
        ):
            found = functions.diff(first.path, second.path, base=base, progress=progress)
    return dataclasses.replace(
        found,
        names=(one.where, two.where),
        digests=(one.digest, two.digest),
        files=changes.files(one.files, two.files),
        facts=changes.facts(one.manifest, two.manifest),
    )


def _version(source: StrPath, workspace: Workspace, base: BaseSpec | None) -> _Version:
    from adapterhub.manifest.document import FileEntry

    known = _of_remote(str(source), workspace) if sources.is_address(source) else _of_registry(source, workspace)
    if known is None:
        return _of_files(source, workspace, base)
    name, made, manifest = known
    files = tuple(FileEntry(layer.path, layer.digest, layer.size) for layer in made.layers if layer.path != ADAPTER_JSON)
    return _Version(name, name, made.digest, manifest, files)


_Known = tuple[str, "Manifest", "AdapterManifest"]
"""The name of a version, its OCI manifest, and its adapter.json."""


def _of_registry(source: StrPath, workspace: Workspace) -> _Known | None:
    """A version of the registry; None for a path, and for a version without adapter.json."""
    ref = sources.ref_of(source, workspace)
    if ref is None:
        return None
    with workspace.opened() as registry:
        version = registry.resolve(ref)
        manifest = registry.adapter_manifest(version.digest)
        return (str(version.ref), registry.oci_manifest(version), manifest) if manifest else None


def _of_remote(source: str, workspace: Workspace) -> _Known | None:
    """A version at an address; None for one without adapter.json, which is derived from its files."""
    from adapterhub.remotes.copy import read_manifest
    from adapterhub.remotes.location import parse

    place = parse(source)
    with workspace.connect(place) as remote:
        made = remote.manifest(place.reference)
        return (source, made, read_manifest(remote, made, source)) if made.adapter_json else None


def _of_files(source: StrPath, workspace: Workspace, base: BaseSpec | None) -> _Version:
    """What a push of the files would store."""
    from adapterhub.digest import sha256_bytes
    from adapterhub.manifest import describe, oci_manifest
    from adapterhub.store.store import counter
    from adapterhub_converters.formats import convert

    with sources.opened(source, workspace) as found, sources.as_folder(found) as folder:
        kind = convert.sniff(found.path)
        alone = base is None or kind in ("peft", "tinker")  # a push reads these without their base
        seen = None if alone else (kind, convert.read(found.path, base=base))
        draft = describe.draft(folder, seen=seen)
        with workspace.bar("reading") as show:
            files = describe.digests(folder, counter(show, sum(describe.sizes(folder).values())))
        try:
            manifest, raw = draft.settle(files)
        except IntegrityError as error:
            workspace.tell(f"note: {found.where}: its adapter.json is not about these files and is ignored: {error.what}")
            manifest = describe.describe(folder, files=files, seen=draft.seen, card=draft.card)
            raw = manifest.dump()
        made = oci_manifest.assemble({**files, ADAPTER_JSON: (sha256_bytes(raw), len(raw))}, manifest)
        return _Version(source, found.where, made.digest, manifest, manifest.files)
