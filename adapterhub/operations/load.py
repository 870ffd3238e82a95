"""An adapter of any format in memory, with its manifest."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import adapterhub_converters.adapter as canonical
from adapterhub_converters.lazy_dataclass import dataclass

from . import base_sources, sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.manifest.document import AdapterManifest


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Adapter(canonical.Adapter):
    """An adapter in memory, with its manifest; `deltas`, `replaced` and `rows` are keyed by the base's own names.

    Attributes:
        where: The name it was loaded by.
        manifest: The content of adapter.json: the one in the folder, or one that was derived, whose `files` are empty.
    """

    where: str
    manifest: AdapterManifest

    @property
    def targets(self) -> list[str]:
        """The full paths of the modules that have a delta, sorted."""
        return sorted(self.deltas)

    def __repr__(self) -> str:
        return f"<Adapter {self.where}: {len(self.deltas)} modules, {self.parameters:,} parameters>"

    def _repr_html_(self) -> str:
        return self.manifest.to_html(repr(self))


def load(source: StrPath, *, base: base_sources.Base | None = None, workspace: Workspace | None = None) -> Adapter:
    """Read an adapter of any format into memory.

    Args:
        source: A folder, a file, a ref or an address.
        base: The model it is for, where the format needs one.
        workspace: Where names are looked up.

    Raises:
        NotFoundError: There is no such adapter.
        FormatError: A file is malformed; nothing of it was used.

    Example:
        >>> adapter = ah.load("./sql")
        >>> adapter.targets[0]
        'model.layers.0.self_attn.q_proj'
        >>> adapter.deltas[adapter.targets[0]].lora_A.shape  # (r, in_features)
        (2, 64)
    """
    from adapterhub.manifest import derive
    from adapterhub_converters.formats import convert

    workspace = workspace or Workspace()
    spec = base_sources.base_spec(base, workspace)
    with sources.open_source(source, workspace) as adapter_source, sources.as_folder(adapter_source) as folder:
        draft = derive.draft(folder, base=spec)
        complete = draft.inspected.complete_adapter if spec is None else None
        read = complete or convert.read(adapter_source.path, base=spec)
        # The folder's own adapter.json, else one that is derived from its files.
        manifest = draft.recorded or draft.manifest()
    canonical_fields = {field.name: getattr(read, field.name) for field in fields(read)}
    return Adapter(**canonical_fields, where=adapter_source.location, manifest=manifest)
