"""A registry on this disk as a Python object: the work of the commands, with `str` or `Path`."""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from adapterhub.ref import Ref
from adapterhub_converters import display
from adapterhub_converters.errors import ParameterError

from . import source_names
from .base_sources import Base
from .pull import PullResult, pull
from .push import push
from .signature_checks import NO_DEMAND, Demand
from .workspace import Progress, StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.index.queries import VersionRow
    from adapterhub.manifest.package_files import Selection
    from adapterhub.project.policy import Policy
    from adapterhub.registry.adapter_recipe import Conversion, ConversionFormat
    from adapterhub.registry.content_search import ContentMatches
    from adapterhub.registry.lineage_graph import Lineage
    from adapterhub.registry.registry import Version
    from adapterhub.registry.shown_version import VersionDocument
    from adapterhub.registry.version_lookup import RestoreResult
    from adapterhub.store.ref_log import Entry

    from .push_result import PushResult


class Versions(list["VersionRow"]):
    """Rows of versions of a registry, in the order of a list or a search."""

    def __repr__(self) -> str:
        return f"<Versions: {', '.join(str(row.ref) for row in self[:5])}{' …' if self[5:] else ''}>"

    def _repr_html_(self) -> str:
        head = ("ref", "tags", "base", "method", "r", "size")
        sizes = (None if row.size is None else display.format_size(row.size) for row in self)
        rows = [
            (row.ref, ", ".join(row.tags), row.base, row.method, row.rank, size) for row, size in zip(self, sizes, strict=True)
        ]
        return display.table(rows, head=head)


class Registry:
    """A registry on this disk; a context manager.

    Args:
        folder: Its folder, created if there is none; `~` is the user's home.
        policy: Requirements on what is pushed and pulled; those of the nearest adapterhub.toml if None.

    Attributes:
        folder: Its folder.
        workspace: The workspace of its operations: pass it to other functions to have their refs looked up in this registry.

    Example:
        >>> with ah.Registry("adapters") as registry:
        ...     version = registry.push("./sql", "team/sql:prod")
        ...     [str(row.ref) for row in registry.search("sql")]
        ['team/sql:v1']
    """

    def __init__(self, folder: StrPath, *, policy: Policy | None = None) -> None:
        from adapterhub.registry.registry import Registry as Opened

        self.folder = Path(folder).expanduser()
        self._registry = Opened.init(self.folder)
        self.workspace = Workspace(self.folder) if policy is None else Workspace(self.folder, policy)
        self._registry.gate.rules_of_caller = self.workspace.rules

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Registry {self.folder}>"

    def __iter__(self) -> Iterator[VersionRow]:
        return iter(self.list())

    def close(self) -> None:
        """Close the registry."""
        self._registry.close()

    def push(
        self,
        source: StrPath,
        ref: str,
        *,
        base: Base | None = None,
        to: ConversionFormat | Conversion | None = None,
        expect: str | None = None,
        force: bool = False,
        selection: Selection | None = None,
        message: str = "",
        tags: Sequence[str] = (),
        metrics: Mapping[str, float] | None = None,
        progress: Progress | None = None,
    ) -> PushResult:
        """Check an adapter and store it as a new version; the arguments are those of `adapterhub.push`.

        Raises:
            ParameterError: `ref` is an address. This class is one registry; a push to an address would bypass it.
        """
        if source_names.is_address(ref):
            raise ParameterError("ref", f"{ref!r} is an address", "Push to an address with adapterhub.push")
        return push(
            source,
            ref,
            base=base,
            to=to,
            expect=expect,
            force=force,
            selection=selection,
            message=message,
            tags=tags,
            metrics=metrics,
            progress=progress,
            workspace=self.workspace,
        )

    def pull(
        self,
        ref: str,
        out: StrPath | None = None,
        *,
        to: ConversionFormat | Conversion | None = None,
        base: Base | None = None,
        model: str | None = None,
        replace: bool = False,
        demand: Demand = NO_DEMAND,
        progress: Progress | None = None,
    ) -> PullResult:
        """Write the files of a version; the arguments are those of `adapterhub.pull`."""
        return pull(
            ref,
            out,
            to=to,
            base=base,
            model=model,
            replace=replace,
            demand=demand,
            progress=progress,
            workspace=self.workspace,
        )

    def list(self, prefix: str | None = None) -> Versions:
        """Return every version, or those of a name or namespace, by name and newest first."""
        return Versions(self._registry.list(prefix))

    def search(self, words: str = "", *, limit: int = 20, all_versions: bool = False, **facets: str) -> Versions:
        """Search versions by words and facets, the best match first.

        Args:
            words: Words in names, tags, descriptions, manifests and model cards; all of them must match.
            limit: The most versions to return.
            all_versions: Return every version that matches, instead of the newest of each name.
            facets: Values that must be equal: `base`, `method`, `target`, `license`, `task`, `language`, `format` …
        """
        from adapterhub.index import version_search as index

        query = index.Query(words=words, facets=tuple(facets.items()), limit=limit, all_versions=all_versions)
        return Versions(index.search(self._registry.index, query).rows)

    def resolve(self, ref: str) -> Version:
        """Return the version that a ref names now: by tag, number, digest or range; without any of them the newest."""
        return self._registry.resolve(Ref.parse(ref))

    def show(self, ref: str) -> VersionDocument:
        """Return everything about a version: its refs, its adapter.json, its manifest, its evaluations."""
        return self._registry.show(Ref.parse(ref))

    def tag(self, ref: str, tag: str, *, expect: str | None = None) -> Version:
        """Point a tag at the version that `ref` names; `expect` is the digest it must still have, or `absent`."""
        return self._registry.tag(Ref.parse(ref), tag, expect=expect)

    def remove(self, ref: str, *, force: bool = False) -> None:
        """Remove a tag, or a whole name with all its versions; `restore` brings a name back."""
        self._registry.rm(Ref.parse(ref), force=force)

    def restore(self, name: str) -> RestoreResult:
        """Bring back a name that was removed, with those of its versions whose data gc has not deleted."""
        return self._registry.restore(name)

    def log(self, ref: str) -> builtins.list[Entry]:
        """Return the log of a name, removed or not, newest entry first; for a tag or a version, only the entries about it."""
        return self._registry.log(Ref.parse(ref))

    def lineage(self, ref: str) -> Lineage:
        """Return what a version was made from, and what was made from it."""
        from adapterhub.registry.lineage_graph import trace

        return trace(self._registry, Ref.parse(ref))

    def find(self, source: StrPath) -> ContentMatches:
        """Return the versions that contain a file by the digest of its bytes, or that a folder is; else those with its tensors.

        Args:
            source: A file, or a folder with an adapter.
        """
        from adapterhub.registry import content_search

        return content_search.by_content(
            self._registry, str(source), source_names.existing_path(os.fspath(source)), self.workspace.bar
        )

    def deprecate(self, ref: str, message: str = "", *, undo: bool = False) -> int:
        """Mark a version, or all versions of a bare name, as deprecated; return its number, 0 for all.

        Args:
            ref: The version or the name.
            message: The reason, which every use of the version shows.
            undo: Withdraw the warning.
        """
        return self._registry.deprecate(Ref.parse(ref), message, undo=undo)
