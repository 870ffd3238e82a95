"""The lineage of an adapter: parents, bases, training data and children.

It follows the digests in each adapter.json. A parent that is not in this registry is still a node, with its digest and the refs
under which its children recorded it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field, replace
from typing import TYPE_CHECKING

from adapterhub.manifest.document import AdapterManifest, BaseInfo, Parent, TrainingData
from adapterhub.store.store import MERGES
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.lazy_dataclass import dataclass

from .version_lookup import find_row_with

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.index.queries import VersionRow
    from adapterhub.ref import Ref

    from .registry import Registry

_MAX_NODES = 10_000  # adapters; a longer chain is an attack


@dataclass(frozen=True)
class Node:
    """One adapter.

    Attributes:
        digest: Digest of its OCI manifest.
        refs: Its refs in this registry, where the ref that was asked for and those that its children recorded come first;
            without any, the refs that its children recorded.
        manifest: Its adapter.json; None if the adapter is not in this registry.
        deprecated: The deprecated ones among `refs`, with the reason.
    """

    digest: Digest
    refs: tuple[str, ...]
    manifest: AdapterManifest | None = None
    deprecated: Mapping[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Its origin in a few words."""
        if self.manifest is None:
            return "not in this registry"
        recipe, parents = self.manifest.recipe, self.manifest.parents
        if recipe and recipe.kind == "convert":
            return f"converted to {recipe.to}"
        if parents:
            method = (recipe.method if recipe else None) or parents[0].method
            if method == "train":
                return "trained further"
            return f"merged by {method}" if method else "merged"
        return "trained" if self.manifest.training else "origin not recorded"

    @property
    def base(self) -> str:
        """Its base model: repository and revision, or the first digits of the fingerprint, or empty."""
        base = self.manifest.base if self.manifest else BaseInfo()
        if base.repo:
            return f"{base.repo}@{base.revision}" if base.revision else base.repo
        return (base.fingerprint or "")[:19]

    @property
    def data(self) -> tuple[TrainingData, ...]:
        """The data it was trained on."""
        training = self.manifest.training if self.manifest else None
        return (training.data if training else None) or ()

    @property
    def parents(self) -> tuple[Parent, ...]:
        """The adapters it was made from, as far as their digests are known."""
        return tuple(parent for parent in self.manifest.parents if parent.digest) if self.manifest else ()


@dataclass(frozen=True)
class Edge:
    """A step of the lineage: `child` was made from `parent`."""

    parent: Digest
    child: Digest
    weight: float | None = None
    method: str | None = None


@dataclass(frozen=True)
class MergedModel:
    """A merged model, stored as a recipe under a name, that contains one of the adapters."""

    name: str
    parent: Digest
    weight: float
    base: str


@dataclass(frozen=True)
class Lineage:
    """All ancestors and descendants of an adapter, itself included, and the merged models that contain any of them."""

    root: Digest
    nodes: Mapping[Digest, Node]
    edges: tuple[Edge, ...]
    models: tuple[MergedModel, ...] = ()

    def parents(self, digest: Digest) -> list[Edge]:
        """Return the edges from the parents of an adapter."""
        return [edge for edge in self.edges if edge.child == digest]

    def children(self, digest: Digest) -> list[Edge]:
        """Return the edges to the children of an adapter."""
        return [edge for edge in self.edges if edge.parent == digest]


def trace(registry: Registry, ref: Ref) -> Lineage:
    """Return the lineage of a version, also of a withdrawn one, whose children somebody has to find."""
    return find_row_with(registry.ledger, ref, lambda row: _trace_row(registry, row))[1]


def _trace_row(registry: Registry, version: VersionRow) -> Lineage:
    root = version.digest
    nodes: dict[Digest, Node] = {}
    # Two walks from the root, up and down: siblings, reachable by going up and then down, are not part of the lineage.
    for upwards in (True, False):
        waiting = [root]
        visited = set()
        while waiting and len(nodes) < _MAX_NODES:
            digest = waiting.pop()
            if digest in visited:
                continue
            visited.add(digest)
            node = nodes.setdefault(digest, _node(registry, digest))
            waiting += [edge.parent for edge in _edges(node)] if upwards else [row.digest for row in registry.children(digest)]
    edges = tuple(edge for node in nodes.values() for edge in _edges(node) if edge.parent in nodes)
    refs_in_use = _refs_named_by_children(nodes) | {root: {str(version.ref)}}
    named_nodes = {digest: _with_refs_first(node, refs_in_use.get(digest, set())) for digest, node in nodes.items()}
    return Lineage(root, named_nodes, edges, tuple(_models(registry, nodes)))


def visible(lineage: Lineage, sees: Callable[[str], bool]) -> Lineage:
    """Return a lineage without the names that may not be seen; of such an ancestor, only what its children say about it.

    Recipes of merged models are left out: they are the operator's.
    """
    nodes: dict[Digest, Node] = {}
    recorded = {parent.digest for node in lineage.nodes.values() for parent in node.parents}
    for digest, node in lineage.nodes.items():
        refs = tuple(ref for ref in node.refs if sees(ref.partition(":")[0].partition("@")[0]))
        if refs or not node.manifest:
            deprecated = {ref: reason for ref, reason in node.deprecated.items() if ref in refs}
            nodes[digest] = Node(digest, refs, node.manifest, deprecated)
    above = _reachable(lineage.root, [(edge.child, edge.parent) for edge in lineage.edges])
    nodes |= {digest: Node(digest, ()) for digest in above & recorded - nodes.keys()}
    edges = [edge for edge in lineage.edges if edge.parent in nodes and edge.child in nodes]
    up, down = [(edge.child, edge.parent) for edge in edges], [(edge.parent, edge.child) for edge in edges]
    connected = _reachable(lineage.root, up) | _reachable(lineage.root, down)
    visible_nodes = {digest: node for digest, node in nodes.items() if digest in connected}
    visible_edges = tuple(edge for edge in edges if edge.parent in visible_nodes and edge.child in visible_nodes)
    return Lineage(lineage.root, visible_nodes, visible_edges)


def _reachable(start: str, steps: Iterable[tuple[str, str]]) -> set[str]:
    """Return what is reachable from a start, including the start."""
    after: dict[str, list[str]] = {}
    for source, target in steps:
        after.setdefault(source, []).append(target)
    reached, waiting = {start}, [start]
    while waiting:
        for target in after.get(waiting.pop(), []):
            if target not in reached:
                reached.add(target)
                waiting.append(target)
    return reached


def _models(registry: Registry, nodes: Mapping[Digest, Node]) -> Iterator[MergedModel]:
    names = registry.store.log.document_names(MERGES)
    if not names:
        return
    from . import recipe_store  # numpy, which most lineages do without

    for name in names:
        with contextlib.suppress(AdapterhubError):  # removed, or damaged, which fsck reports
            recipe = recipe_store.get(registry, name).recipe
            for adapter in recipe.adapters:
                if adapter.digest in nodes:
                    yield MergedModel(name, adapter.digest, adapter.weight, str(recipe.base))


def _node(registry: Registry, digest: Digest) -> Node:
    rows = registry.versions_with(digest)
    deprecations = registry.deprecations({row.name for row in rows})
    reason_by_ref = {str(row.ref): deprecations.get((row.name, row.number), deprecations.get((row.name, 0))) for row in rows}
    deprecated = {ref: reason for ref, reason in reason_by_ref.items() if reason is not None}
    try:
        return Node(digest, tuple(reason_by_ref), registry.adapter_manifest(digest), deprecated)
    except AdapterhubError:
        # A damaged version is still part of the lineage; fsck reports the damage.
        return Node(digest, tuple(reason_by_ref), deprecated=deprecated)


def _edges(node: Node) -> Iterator[Edge]:
    for parent in node.parents:
        yield Edge(parent.digest, node.digest, parent.weight, parent.method)


def _refs_named_by_children(nodes: Mapping[Digest, Node]) -> dict[Digest, set[str]]:
    """Return the refs that children recorded for their parents, by digest."""
    refs: dict[Digest, set[str]] = {}
    for child in nodes.values():
        for parent in child.parents:
            if parent.ref:
                refs.setdefault(parent.digest, set()).add(parent.ref)
    return refs


def _with_refs_first(node: Node, preferred: set[str]) -> Node:
    """Return a node with the `preferred` refs first; a node that is not in this registry has no others."""
    if not node.refs:
        return replace(node, refs=tuple(sorted(preferred)))
    return replace(node, refs=tuple(sorted(node.refs, key=lambda ref: ref not in preferred)))
