"""The bill of materials of an adapter by path, ref or address, with its parents in the registry."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from adapterhub_converters.errors import AdapterhubError, NotFoundError

from . import sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterhub_converters.bases import BaseSpec

    from .digest import Digest
    from .manifest.document import AdapterManifest
    from .trust.bill import Ancestor, Bill

_MANY = 1_000  # ancestors; a longer line is an attack


def bom(source: StrPath, workspace: Workspace, *, base: BaseSpec | None = None, base_license: str | None = None) -> Bill:
    """Return the bill of materials of an adapter.

    Args:
        source: A folder, a file, a ref or an address.
        workspace: The registry, in which its parents are looked up.
        base: The base model, whose card has its license; it is not compared with the adapter's.
        base_license: The license of the base, in place of that of its card.
    """
    from adapterhub.manifest import card, describe, oci_manifest
    from adapterhub.trust.bill import bill

    with sources.opened(source, workspace) as found, sources.as_folder(found) as folder:
        files = describe.digests(folder)
        manifest, _ = describe.settle(folder, files)
        digest = found.digest or oci_manifest.build(folder).digest
        name = (found.ref or "").rpartition("://")[2].partition("@")[0].partition(":")[0] or manifest.name or folder.name
    if base_license is None and base is not None and base.folder is not None:
        base_license = card.license_in(base.folder)
    return bill(name, digest, manifest, ancestors=_ancestors(manifest, workspace), base_license=base_license)


def _ancestors(manifest: AdapterManifest, workspace: Workspace) -> list[Ancestor]:
    if not manifest.parents:
        return []
    try:
        with workspace.opened() as registry:
            return _walked(manifest, registry.adapter_manifest)
    except NotFoundError:  # no registry
        return _walked(manifest, lambda _: None)


def _walked(manifest: AdapterManifest, read: Callable[[Digest], AdapterManifest | None]) -> list[Ancestor]:
    """The ancestors, parents first; those whose manifest cannot be read are there by name and digest."""
    from adapterhub.trust.bill import Ancestor

    found: dict[Digest, Ancestor] = {}
    waiting = deque(manifest.parents)
    while waiting and len(found) < _MANY:
        parent = waiting.popleft()
        if parent.digest and parent.digest not in found:
            try:
                known = read(parent.digest)
            except AdapterhubError:  # not in this registry
                known = None
            found[parent.digest] = Ancestor(parent.digest, (parent.ref or parent.digest[:19]).partition("@")[0], known)
            waiting.extend(known.parents if known else ())
    return list(found.values())
