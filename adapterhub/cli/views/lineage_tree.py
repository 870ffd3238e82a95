"""The lineage of an adapter as a tree or a graph for Graphviz, from its document (`content_documents.lineage_document`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapterhub.cli import output
from adapterhub_converters.display import printable

_MAX_NAMES = 3  # other names of an adapter
_SHORT = 12 + len("sha256:")
Node = Mapping[str, Any]
Edge = Mapping[str, Any]


class _Graph:
    """The document of a lineage, by node."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.root: str = document["digest"]
        self.nodes: dict[str, Node] = {node["digest"]: node for node in document["nodes"]}
        self.edges: Sequence[Edge] = document["edges"]
        self.models: Sequence[Mapping[str, Any]] = document["models"]
        self._parents: dict[str, list[Edge]] = {}
        self._children: dict[str, list[Edge]] = {}
        for edge in self.edges:
            self._parents.setdefault(edge["child"], []).append(edge)
            self._children.setdefault(edge["parent"], []).append(edge)

    def parents(self, digest: str) -> Sequence[Edge]:
        """Return the edges from the parents of an adapter."""
        return self._parents.get(digest, ())

    def children(self, digest: str) -> Sequence[Edge]:
        """Return the edges to the children of an adapter."""
        return self._children.get(digest, ())


def name_of(node: Node) -> str:
    """Return the first ref of a node, else its shortened digest."""
    return str(node["refs"][0] if node["refs"] else output.digest(node["digest"]))


def base_of(node: Node) -> str:
    """Return the base model: repository and revision, or the first digits of the fingerprint, or empty."""
    base = node["base"] or {}
    if base.get("repo"):
        return f"{base['repo']}@{base['revision']}" if base.get("revision") else str(base["repo"])
    return str(base.get("fingerprint") or "")[:_SHORT]


def _about(node: Node) -> str:
    base = base_of(node)
    facts = [node["how"], f"r {node['rank']}" if node["rank"] else "", base and f"on {base}"]
    return ", ".join(fact for fact in facts if fact)


def tree(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the tree, ancestors first."""
    graph = _Graph(document)
    root = graph.nodes[graph.root]
    yield f"{name_of(root)}  {output.digest(root['digest'])}  {_about(root)}"
    if len(root["refs"]) > 1:
        yield f"   also {_shorten_refs(root['refs'][1:])}"
    yield from _data(root, "")
    yield from _branches(graph, graph.root, "", {graph.root}, up=True)
    if graph.children(graph.root):
        yield ""
        yield "made from it:"
        yield from _branches(graph, graph.root, "", {graph.root}, up=False)
    if graph.models:
        yield ""
        yield "models in recipes:"
        for model in graph.models:
            description = f"{model['weight']:g} × {name_of(graph.nodes[model['parent']])} in {model['base']}"
            yield f"   {model['name']}  {description}"


def _shorten_refs(refs: Sequence[str]) -> str:
    return ", ".join(refs[:_MAX_NAMES]) + (f" and {len(refs) - _MAX_NAMES} more" if len(refs) > _MAX_NAMES else "")


def _branches(graph: _Graph, digest: str, indent: str, shown_digests: set[str], *, up: bool) -> Iterator[str]:
    """Yield the lines below an adapter. The ancestors of each are shown once, because the paths to it can be countless."""
    edges = graph.parents(digest) if up else graph.children(digest)
    for number, edge in enumerate(edges, 1):
        neighbor = edge["parent"] if up else edge["child"]
        node = graph.nodes[neighbor]
        last = number == len(edges)
        is_repeat = neighbor in shown_digests and bool(graph.parents(neighbor) if up else graph.children(neighbor))
        description = "(see above)" if is_repeat else _about(node)
        yield f"{indent}{'└─' if last else '├─'} {_weight(edge)}{name_of(node)}  {description}"
        child_indent = indent + ("   " if last else "│  ")
        if up and not is_repeat:
            yield from _data(node, child_indent)
        if neighbor not in shown_digests:
            shown_digests.add(neighbor)
            yield from _branches(graph, neighbor, child_indent, shown_digests, up=up)


def _weight(edge: Edge) -> str:
    return f"{edge['weight']:g} × " if edge["weight"] is not None else ""


def _data(node: Node, indent: str) -> Iterator[str]:
    for item in node["data"]:
        name = item.get("name") or item.get("path") or "data"
        yield f"{indent}   data {name}  {output.digest(item.get('digest') or '')}".rstrip()


def dot(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of the graph in the language of Graphviz."""
    graph = _Graph(document)
    yield "digraph lineage {"
    yield "  rankdir=BT; node [shape=box, fontname=sans];"
    for node in graph.nodes.values():
        # Dashed: an ancestor that is known by its digest only.
        style = "" if node["here"] else ", style=dashed"
        bold = ", penwidth=2" if node["digest"] == graph.root else ""
        label = _quote(f"{name_of(node)}: {_about(node)}")
        yield f"  {_quote(node['digest'])} [label={label}{style}{bold}];"
    bases = {base_of(node) for node in graph.nodes.values() if base_of(node)}
    for base in sorted(bases):
        yield f"  {_quote(f'base {base}')} [label={_quote(base)}, shape=cylinder];"
    for node in graph.nodes.values():
        if base_of(node) and not graph.parents(node["digest"]):
            yield f"  {_quote(node['digest'])} -> {_quote(f'base {base_of(node)}')} [style=dotted];"
    for edge in graph.edges:
        weight = edge["weight"]
        label = f" [label={_quote(f'{weight:g}')}]" if weight is not None else ""
        yield f"  {_quote(edge['child'])} -> {_quote(edge['parent'])}{label};"
    yield "}"


def _quote(text: str) -> str:
    return '"' + printable(text).replace("\\", "\\\\").replace('"', '\\"') + '"'
