"""The lineage of an adapter as a tree, a document, or a graph for Graphviz."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub_converters.display import printable

if TYPE_CHECKING:
    from adapterhub.registry.lineage import Edge, Lineage, Node

_MANY = 3  # other names of an adapter


def document(found: Lineage) -> dict[str, Any]:
    """The graph with stable keys."""
    return {
        "digest": found.root,
        "nodes": [_node(node) for node in found.nodes.values()],
        "edges": [
            {"parent": edge.parent, "child": edge.child, "weight": edge.weight, "method": edge.method} for edge in found.edges
        ],
        "models": [
            {"name": model.name, "parent": model.parent, "weight": model.weight, "base": model.base} for model in found.models
        ],
    }


def _node(node: Node) -> dict[str, Any]:
    manifest = node.manifest.to_dict() if node.manifest else {}
    return {
        "digest": node.digest,
        "refs": list(node.refs),
        "here": node.manifest is not None,
        "deprecated": dict(node.deprecated),
        "how": node.how,
        "base": manifest.get("base"),
        "data": (manifest.get("training") or {}).get("data") or [],
        "recipe": manifest.get("recipe"),
    }


def name_of(node: Node) -> str:
    """The first of its refs, else its digest, shortened."""
    return node.refs[0] if node.refs else output.digest(node.digest)


def _about(node: Node) -> str:
    rank = node.manifest.r if node.manifest else None
    parts = [node.how, f"r {rank}" if rank else "", node.base and f"on {node.base}"]
    return ", ".join(part for part in parts if part)


def tree(found: Lineage) -> Iterator[str]:
    """Lines of the tree, ancestors first."""
    root = found.nodes[found.root]
    yield f"{name_of(root)}  {output.digest(root.digest)}  {_about(root)}"
    if len(root.refs) > 1:
        yield f"   also {_shortened(root.refs[1:])}"
    yield from _data(root, "")
    yield from _branches(found, found.root, "", {found.root}, up=True)
    if found.children(found.root):
        yield ""
        yield "made from it:"
        yield from _branches(found, found.root, "", {found.root}, up=False)
    if found.models:
        yield ""
        yield "models in recipes:"
        for model in found.models:
            what = f"{model.weight:g} × {name_of(found.nodes[model.parent])} in {model.base}"
            yield f"   {model.name}  {what}"


def _shortened(refs: Sequence[str]) -> str:
    return ", ".join(refs[:_MANY]) + (f" and {len(refs) - _MANY} more" if len(refs) > _MANY else "")


def _branches(found: Lineage, digest: str, indent: str, seen: set[str], *, up: bool) -> Iterator[str]:
    """Yield the lines below an adapter; what an adapter was made from is shown once, as paths to it can be countless."""
    edges = found.parents(digest) if up else found.children(digest)
    for number, edge in enumerate(edges, 1):
        other = edge.parent if up else edge.child
        node = found.nodes[other]
        last = number == len(edges)
        again = other in seen and bool(found.parents(other) if up else found.children(other))
        about = "(see above)" if again else _about(node)
        yield f"{indent}{'└─' if last else '├─'} {_weight(edge)}{name_of(node)}  {about}"
        deeper = indent + ("   " if last else "│  ")
        if up and not again:
            yield from _data(node, deeper)
        if other not in seen:
            seen.add(other)
            yield from _branches(found, other, deeper, seen, up=up)


def _weight(edge: Edge) -> str:
    return f"{edge.weight:g} × " if edge.weight is not None else ""


def _data(node: Node, indent: str) -> Iterator[str]:
    for item in node.data:
        name = item.name or item.path or "data"
        yield f"{indent}   data {name}  {output.digest(item.digest or '')}".rstrip()


def dot(found: Lineage) -> Iterator[str]:
    """Lines of the graph in the language of Graphviz."""
    yield "digraph lineage {"
    yield "  rankdir=BT; node [shape=box, fontname=sans];"
    for node in found.nodes.values():
        style = "" if node.manifest else ", style=dashed"
        bold = ", penwidth=2" if node.digest == found.root else ""
        label = _quoted(f"{name_of(node)}: {_about(node)}")
        yield f"  {_quoted(node.digest)} [label={label}{style}{bold}];"
    bases = {node.base for node in found.nodes.values() if node.base}
    for base in sorted(bases):
        yield f"  {_quoted(f'base {base}')} [label={_quoted(base)}, shape=cylinder];"
    for node in found.nodes.values():
        if node.base and not found.parents(node.digest):
            yield f"  {_quoted(node.digest)} -> {_quoted(f'base {node.base}')} [style=dotted];"
    for edge in found.edges:
        label = f" [label={_quoted(f'{edge.weight:g}')}]" if edge.weight is not None else ""
        yield f"  {_quoted(edge.child)} -> {_quoted(edge.parent)}{label};"
    yield "}"


def _quoted(text: str) -> str:
    return '"' + printable(text).replace("\\", "\\\\").replace('"', '\\"') + '"'
