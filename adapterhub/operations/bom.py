"""The bill of materials of an adapter by path, ref or address, with its parents in the registry."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapterhub_converters.errors import AdapterhubError, NotFoundError

from . import base_sources, sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from collections.abc import Callable

    from adapterhub.digest import Digest
    from adapterhub.manifest.document import AdapterManifest
    from adapterhub.trust.cyclonedx_bom import Ancestor, Bill, BilledAdapter

_MAX_ANCESTORS = 1_000  # no honest adapter has so many ancestors, but a hostile manifest may


def bom(
    source: StrPath,
    *,
    base: base_sources.Base | None = None,
    base_license: str | None = None,
    name: str | None = None,
    supplier: str | None = None,
    created: str | None = None,
    workspace: Workspace | None = None,
) -> Bill:
    """Return the bill of materials of an adapter: CycloneDX 1.7, with its base, parents, data and files by digest.

    Args:
        source: A folder, a file, a ref or an address.
        base: The base model, whose model card has its license.
        base_license: The license of the base, in place of that of its card.
        name: The name of the adapter in the bill, in place of its own.
        supplier: The name of its supplier, in place of the one in its adapter.json.
        created: The time of the bill, in ISO 8601 and UTC, which depends on no clock.
        workspace: The registry, in which its parents are looked up.

    Example:
        >>> bill = ah.bom("./sql", base_license="apache-2.0")
        >>> bill.license.expression, bill.license.missing
        ('Apache-2.0', ('adapter sql',))
        >>> bill.document["specVersion"], bill.document["metadata"]["component"]["type"]
        ('1.7', 'machine-learning-model')
    """
    from adapterhub.trust.cyclonedx_bom import bill

    billed = _billed(source, base, base_license, name, workspace or Workspace())
    return bill(replace(billed, supplier=supplier, created=created))


def spdx_bom(
    source: StrPath,
    *,
    base: base_sources.Base | None = None,
    base_license: str | None = None,
    supplier: str | None = None,
    created: str | None = None,
    workspace: Workspace | None = None,
) -> dict[str, Any]:
    """Return the bill of materials of an adapter in SPDX 3.0.1; the arguments are those of `bom`.

    Raises:
        RefusedError: No time is given, and no training records one.
    """
    from adapterhub.trust.spdx_bom import spdx_bill

    billed = _billed(source, base, base_license, None, workspace or Workspace())
    return spdx_bill(replace(billed, supplier=supplier, created=created))


def _billed(
    source: StrPath, base: base_sources.Base | None, base_license: str | None, name: str | None, workspace: Workspace
) -> BilledAdapter:
    """Return an adapter with the license of its base and its ancestors."""
    from adapterhub.trust.cyclonedx_bom import BilledAdapter

    spec = base_sources.base_spec(base, workspace)
    from adapterhub.manifest import card, derive, folder_contents, oci_manifest

    with sources.open_source(source, workspace, for_report=True) as adapter_source, sources.as_folder(adapter_source) as folder:
        contents = folder_contents.read_folder(folder)
        manifest, raw = derive.draft_contents(contents).finalize(contents.files)
        digest = adapter_source.digest or oci_manifest.complete(contents.files, manifest, raw).digest
        name = name or (
            (adapter_source.ref or "").rpartition("://")[2].partition("@")[0].partition(":")[0] or manifest.name or folder.name
        )
    if base_license is None and spec is not None and spec.folder is not None:
        base_license = card.license_in(spec.folder)
    return BilledAdapter(name, digest, manifest, _ancestors(manifest, workspace), base_license)


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
    from adapterhub.trust.cyclonedx_bom import Ancestor

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
