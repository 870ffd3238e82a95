"""The bill of materials of an adapter by path, ref or address, with its parents in the registry."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from adapterhub_converters.errors import AdapterhubError, NotFoundError

from . import sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterhub.digest import Digest
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.trust.bill import Ancestor, Bill
    from adapterhub_converters.bases import BaseSpec

_MAX_ANCESTORS = 1_000  # no honest adapter has so many ancestors, but a hostile manifest may


def bom(source: StrPath, workspace: Workspace, *, base: BaseSpec | None = None, base_license: str | None = None) -> Bill:
    """Return the bill of materials of an adapter.

    Args:
        source: A folder, a file, a ref or an address.
        workspace: The registry, in which its parents are looked up.
        base: The base model, whose model card has its license; it is not compared with the adapter's base.
        base_license: The license of the base, in place of the one in its card.
    """
    from adapterhub.manifest import card, derive, oci_manifest
    from adapterhub.trust.bill import bill

    with sources.open_source(source, workspace) as adapter_source, sources.as_folder(adapter_source) as folder:
        files = derive.digests(folder)
        manifest, _ = derive.finalize(folder, files)
        digest = adapter_source.digest or oci_manifest.build(folder).digest
        name = (
            (adapter_source.ref or "").rpartition("://")[2].partition("@")[0].partition(":")[0] or manifest.name or folder.name
        )
    if base_license is None and base is not None and base.folder is not None:
        base_license = card.license_in(base.folder)
    return bill(name, digest, manifest, ancestors=_ancestors(manifest, workspace), base_license=base_license)


def _ancestors(manifest: AdapterManifest, workspace: Workspace) -> list[Ancestor]:
    if not manifest.parents:
        return []
    try:
        with workspace.open_registry() as registry:
            return _walk_ancestors(manifest, registry.adapter_manifest)
    except NotFoundError:  # no registry
        return _walk_ancestors(manifest, lambda _: None)


def _walk_ancestors(manifest: AdapterManifest, read: Callable[[Digest], AdapterManifest | None]) -> list[Ancestor]:
    """Return the ancestors, parents first; an ancestor whose manifest cannot be read has only its name and digest."""
    from adapterhub.trust.bill import Ancestor

    ancestors: dict[Digest, Ancestor] = {}
    pending = deque(manifest.parents)
    while pending and len(ancestors) < _MAX_ANCESTORS:
        parent = pending.popleft()
        # Ancestors are often shared, so each digest is visited once.
        if parent.digest and parent.digest not in ancestors:
            try:
                parent_manifest = read(parent.digest)
            except AdapterhubError:  # not in this registry
                parent_manifest = None
            ancestors[parent.digest] = Ancestor(
                parent.digest, (parent.ref or parent.digest[:19]).partition("@")[0], parent_manifest
            )
            pending.extend(parent_manifest.parents if parent_manifest else ())
    return list(ancestors.values())
