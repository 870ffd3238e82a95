"""Lineage of an adapter: parents, bases, training data and children.

It follows the digests in each adapter.json. A parent that is not in this registry is still a node, with its digest and the ref
it once had.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adapterhub.manifest.document import AdapterManifest, BaseInfo, Parent, TrainingData
from adapterhub.store.store import MERGES
from adapterhub_converters.errors import AdapterhubError

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.ref import Ref

    from .registry import Registry

_MANY = 10_000  # adapters; a longer chain is an attack


@dataclass(frozen=True)
class Node:
    """One adapter.

    Attributes:
        digest: Digest of its OCI manifest.
        refs: Its refs in this registry, first the one asked for, or that its children were made from; without any, those
            under which its children knew it.
        manifest: Its adapter.json; None if the adapter is not in this registry.
        deprecated: Those of `refs` that are deprecated, with the reason.
    """

    digest: Digest
    refs: tuple[str, ...]
    manifest: AdapterManifest | None = None
    deprecated: Mapping[str, str] = field(default_factory=dict)

    @property
    def how(self) -> str:
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
        """Its base model: repository and revision, else the first digits of the fingerprint, else empty."""
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
        """The adapters it was made from, so far as their digests are known."""
        return tuple(parent for parent in self.manifest.parents if parent.digest) if self.manifest else ()


@dataclass(frozen=True)
class Edge:
    """A step of the lineage: `child` was made from `parent`."""

    parent: Digest
    child: Digest
    weight: float | None = None
    method: str | None = None


@dataclass(frozen=True)
class Model:
    """A merged model, stored as a recipe under a name, that contains one of the adapters."""

    name: str
    parent: Digest
    weight: float
    base: str


@dataclass(frozen=True)
class Lineage:
    """All ancestors and descendants of an adapter, itself included, and the merged models that contain them."""

    root: Digest
    nodes: Mapping[Digest, Node]
    edges: tuple[Edge, ...]
    models: tuple[Model, ...] = ()

    def parents(self, digest: Digest) -> list[Edge]:
        """Return the edges from the adapters that an adapter was made from."""
        return [edge for edge in self.edges if edge.child == digest]

    def children(self, digest: Digest) -> list[Edge]:
        """Return the edges to the adapters that were made from it."""
        return [edge for edge in self.edges if edge.parent == digest]


def trace(registry: Registry, ref: Ref) -> Lineage:
    """Return the lineage of a version."""
    asked = registry.resolve(ref)
    root = asked.digest
    deprecations = registry.deprecations()
    nodes: dict[Digest, Node] = {}
    for upwards in (True, False):
        waiting = [root]
        seen = set()
        while waiting and len(nodes) < _MANY:
            digest = waiting.pop()
            if digest in seen:
                continue
            seen.add(digest)
            node = nodes.setdefault(digest, _node(registry, digest, deprecations))
            waiting += [edge.parent for edge in _edges(node)] if upwards else [row.digest for row in registry.children(digest)]
    edges = tuple(edge for node in nodes.values() for edge in _edges(node) if edge.parent in nodes)
    known = _known_as(nodes) | {root: {str(asked.ref)}}
    named = {digest: _named(node, known.get(digest, set())) for digest, node in nodes.items()}
    return Lineage(root, named, edges, tuple(_models(registry, nodes)))


def _models(registry: Registry, nodes: Mapping[Digest, Node]) -> Iterator[Model]:
    names = registry.store.log.document_names(MERGES)
    if not names:
        return
    from . import merge_recipes  # numpy, which most lineages do without

    for name in names:
        with contextlib.suppress(AdapterhubError):  # removed, or damaged, which fsck reports
            recipe = merge_recipes.get(registry, name).recipe
            for adapter in recipe.adapters:
                if adapter.digest in nodes:
                    yield Model(name, adapter.digest, adapter.weight, str(recipe.base))


def _node(registry: Registry, digest: Digest, deprecations: Mapping[tuple[str, int], str]) -> Node:
    rows = registry.holding(digest)
    found = {str(row.ref): deprecations.get((row.name, row.number), deprecations.get((row.name, 0))) for row in rows}
    deprecated = {ref: why for ref, why in found.items() if why is not None}
    try:
        return Node(digest, tuple(found), registry.adapter_manifest(digest), deprecated)
    except AdapterhubError:
        return Node(digest, tuple(found), deprecated=deprecated)


def _edges(node: Node) -> Iterator[Edge]:
    for parent in node.parents:
        yield Edge(parent.digest, node.digest, parent.weight, parent.method)


def _known_as(nodes: Mapping[Digest, Node]) -> dict[Digest, set[str]]:
    """Return the refs by which children name their parents."""
    found: dict[Digest, set[str]] = {}
    for child in nodes.values():
        for parent in child.parents:
            if parent.ref:
                found.setdefault(parent.digest, set()).add(parent.ref)
    return found


def _named(node: Node, known: set[str]) -> Node:
    """Return a node with the refs that it is known by first; one that is not in this registry has no others."""
    if not node.refs:
        return replace(node, refs=tuple(sorted(known)))
    return replace(node, refs=tuple(sorted(node.refs, key=lambda ref: ref not in known)))
