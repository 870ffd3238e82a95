"""A registry on this disk as a Python object: the work of the commands, with `str` or `Path`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from adapterhub_converters import display
from adapterhub_converters.errors import ParameterError

from . import api
from .operations.pull import PullResult
from .operations.push_result import PushResult
from .operations.workspace import StrPath, Workspace
from .ref import Ref

if TYPE_CHECKING:
    from adapterhub.index.queries import VersionRow
    from adapterhub.project.policy import Policy
    from adapterhub.registry.registry import Version
    from adapterhub.registry.version_lookup import RestoreResult


class Versions(list["VersionRow"]):
    """Rows of versions of a registry, in the order of a list or a search."""

    def __repr__(self) -> str:
        return f"<Versions: {', '.join(str(row.ref) for row in self[:5])}{' …' if self[5:] else ''}>"

    def _repr_html_(self) -> str:
        head = ("ref", "tags", "base", "method", "r", "size")
        rows = [(row.ref, ", ".join(row.tags), row.base, row.method, row.r, row.size) for row in self]
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

    def push(self, source: StrPath, ref: str, **options: Any) -> Version:
        """Check an adapter and store it as a new version; the arguments are those of `adapterhub.push`."""
        result = api.push(source, ref, workspace=self.workspace, **options)
        # This class is one registry; a push to an address would bypass it.
        if isinstance(result, PushResult):
            raise ParameterError("ref", f"{ref!r} is an address", "Push to an address with adapterhub.push")
        return result

    def pull(self, ref: str, out: StrPath | None = None, **options: Any) -> PullResult:
        """Write the files of a version; the arguments are those of `adapterhub.pull`."""
        return api.pull(ref, out, workspace=self.workspace, **options)

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

    def show(self, ref: str) -> dict[str, Any]:
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
