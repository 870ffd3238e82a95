"""The lineage of an adapter as a tree, a document, or a graph for Graphviz."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub_converters.display import printable

if TYPE_CHECKING:
    from adapterhub.registry.lineage_graph import Edge, Lineage, Node

_MAX_NAMES = 3  # other names of an adapter


def document(graph: Lineage) -> dict[str, Any]:
    """Return the graph as JSON; the keys are stable."""
    return {
        "digest": graph.root,
        "nodes": [_node(node) for node in graph.nodes.values()],
        "edges": [
            {"parent": edge.parent, "child": edge.child, "weight": edge.weight, "method": edge.method} for edge in graph.edges
        ],
        "models": [
            {"name": model.name, "parent": model.parent, "weight": model.weight, "base": model.base} for model in graph.models
        ],
    }


def _node(node: Node) -> dict[str, Any]:
    manifest = node.manifest.to_dict() if node.manifest else {}
    return {
        "digest": node.digest,
        "refs": list(node.refs),
        "here": node.manifest is not None,
        "deprecated": dict(node.deprecated),
        "how": node.origin,
        "base": manifest.get("base"),
        "data": (manifest.get("training") or {}).get("data") or [],
        "recipe": manifest.get("recipe"),
    }


def name_of(node: Node) -> str:
    """Return the first ref of a node, else its shortened digest."""
    return node.refs[0] if node.refs else output.digest(node.digest)


def _about(node: Node) -> str:
    rank = node.manifest.rank if node.manifest else ""
    facts = [node.origin, f"r {rank}" if rank else "", node.base and f"on {node.base}"]
    return ", ".join(fact for fact in facts if fact)


def tree(graph: Lineage) -> Iterator[str]:
    """Yield the lines of the tree, ancestors first."""
    root = graph.nodes[graph.root]
    yield f"{name_of(root)}  {output.digest(root.digest)}  {_about(root)}"
    if len(root.refs) > 1:
        yield f"   also {_shorten_refs(root.refs[1:])}"
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
            description = f"{model.weight:g} × {name_of(graph.nodes[model.parent])} in {model.base}"
            yield f"   {model.name}  {description}"


def _shorten_refs(refs: Sequence[str]) -> str:
    return ", ".join(refs[:_MAX_NAMES]) + (f" and {len(refs) - _MAX_NAMES} more" if len(refs) > _MAX_NAMES else "")


def _branches(graph: Lineage, digest: str, indent: str, shown_digests: set[str], *, up: bool) -> Iterator[str]:
    """Yield the lines below an adapter. The ancestors of each are shown once, because the paths to it can be countless."""
    edges = graph.parents(digest) if up else graph.children(digest)
    for number, edge in enumerate(edges, 1):
        neighbor = edge.parent if up else edge.child
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
    return f"{edge.weight:g} × " if edge.weight is not None else ""


def _data(node: Node, indent: str) -> Iterator[str]:
    for item in node.data:
        name = item.name or item.path or "data"
        yield f"{indent}   data {name}  {output.digest(item.digest or '')}".rstrip()


def dot(graph: Lineage) -> Iterator[str]:
    """Yield the lines of the graph in the language of Graphviz."""
    yield "digraph lineage {"
    yield "  rankdir=BT; node [shape=box, fontname=sans];"
    for node in graph.nodes.values():
        # Dashed: an ancestor that is known by its digest only.
        style = "" if node.manifest else ", style=dashed"
        bold = ", penwidth=2" if node.digest == graph.root else ""
        label = _quote(f"{name_of(node)}: {_about(node)}")
        yield f"  {_quote(node.digest)} [label={label}{style}{bold}];"
    bases = {node.base for node in graph.nodes.values() if node.base}
    for base in sorted(bases):
        yield f"  {_quote(f'base {base}')} [label={_quote(base)}, shape=cylinder];"
    for node in graph.nodes.values():
        if node.base and not graph.parents(node.digest):
            yield f"  {_quote(node.digest)} -> {_quote(f'base {node.base}')} [style=dotted];"
    for edge in graph.edges:
        label = f" [label={_quote(f'{edge.weight:g}')}]" if edge.weight is not None else ""
        yield f"  {_quote(edge.child)} -> {_quote(edge.parent)}{label};"
    yield "}"


def _quote(text: str) -> str:
    return '"' + printable(text).replace("\\", "\\\\").replace('"', '\\"') + '"'
