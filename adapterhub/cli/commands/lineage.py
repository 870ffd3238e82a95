"""`adapterhub lineage` and `adapterhub rebuild`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import open_registry
from adapterhub.cli.options import Settings, command
from adapterhub_converters.errors import NotFoundError

if TYPE_CHECKING:
    from adapterhub.registry.lineage import Edge, Lineage, Node
    from adapterhub.registry.recipe import Difference, Parent
    from adapterhub.registry.registry import Registry


@command(
    "lineage",
    short="Say where an adapter comes from, and what came of it.",
    example="""
    adapterhub lineage team/both:v1
    adapterhub lineage team/both --dot | dot -Tsvg > both.svg""",
)
@click.argument("ref")
@click.option("--dot", is_flag=True, help="Print a graph for Graphviz.")
@click.option("--plot", metavar="PNG", help="Draw the graph into a file (needs matplotlib).")
@click.pass_obj
def lineage(settings: Settings, *, ref: str, dot: bool, plot: str | None) -> None:
    """Say where an adapter comes from, and what came of it.

    Its parents with their weights, and theirs; the base and the training data of each; what was merged or converted from it.
    """
    from adapterhub.ref import Ref
    from adapterhub.registry.lineage import trace

    with open_registry(settings) as registry:
        found = trace(registry, Ref.parse(ref))
    for node in found.nodes.values():
        for called, why in node.deprecated.items():
            output.deprecated(called, why)
    if plot:
        from adapterhub.cli.views import lineage_plot

        lineage_plot.draw(found, Path(plot))
    if dot:
        output.write("\n".join(_dot(found)))
        return
    output.emit(_document(found), as_json=settings.as_json, text=lambda: output.write("\n".join(_tree(found))))
    if plot:
        output.say(f"drawn: {plot}")


def _document(found: Lineage) -> dict[str, Any]:
    return {
        "digest": found.root,
        "nodes": [
            {
                "digest": node.digest,
                "refs": list(node.refs),
                "here": bool(node.facts),
                "deprecated": dict(node.deprecated),
                "how": node.how,
                "base": node.facts.get("base"),
                "data": [dict(item) for item in node.data],
                "recipe": node.facts.get("recipe"),
            }
            for node in found.nodes.values()
        ],
        "edges": [
            {"parent": edge.parent, "child": edge.child, "weight": edge.weight, "method": edge.method} for edge in found.edges
        ],
        "models": [
            {"name": model.name, "parent": model.parent, "weight": model.weight, "base": model.base} for model in found.models
        ],
    }


def name_of(node: Node) -> str:
    """The first of its refs, else its digest, shortened."""
    return node.refs[0] if node.refs else output.digest(node.digest)


def _about(node: Node) -> str:
    rank = node.facts.get("r")
    parts = [node.how, f"r {rank}" if rank else "", node.base and f"on {node.base}"]
    return ", ".join(part for part in parts if part)


def _tree(found: Lineage) -> Iterator[str]:
    root = found.nodes[found.root]
    yield output.printable(f"{name_of(root)}  {output.digest(root.digest)}  {_about(root)}")
    yield from _data(root, "")
    yield from _branches(found, found.root, "", {found.root}, up=True)
    if found.children(found.root):
        yield ""
        yield "made from it:"
        yield from _branches(found, found.root, "", {found.root}, up=False)
    if found.models:
        yield ""
        yield "models kept as recipes:"
        for model in found.models:
            what = f"{model.weight:g} × {name_of(found.nodes[model.parent])} in {model.base}"
            yield output.printable(f"   {model.name}  {what}")


def _branches(found: Lineage, digest: str, indent: str, above: set[str], *, up: bool) -> Iterator[str]:
    edges = found.parents(digest) if up else found.children(digest)
    for number, edge in enumerate(edges, 1):
        other = edge.parent if up else edge.child
        node = found.nodes[other]
        last = number == len(edges)
        yield output.printable(f"{indent}{'└─' if last else '├─'} {_weight(edge)}{name_of(node)}  {_about(node)}")
        deeper = indent + ("   " if last else "│  ")
        if up:
            yield from _data(node, deeper)
        if other not in above:
            yield from _branches(found, other, deeper, above | {other}, up=up)


def _weight(edge: Edge) -> str:
    return f"{edge.weight:g} × " if edge.weight is not None else ""


def _data(node: Node, indent: str) -> Iterator[str]:
    for item in node.data:
        name = item.get("name") or item.get("path") or "data"
        yield output.printable(f"{indent}   data {name}  {output.digest(item.get('digest') or '')}".rstrip())


def _dot(found: Lineage) -> Iterator[str]:
    yield "digraph lineage {"
    yield "  rankdir=BT; node [shape=box, fontname=sans];"
    for node in found.nodes.values():
        style = "" if node.facts else ", style=dashed"
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
    return '"' + output.printable(text).replace('"', '\\"') + '"'


@command(
    "rebuild",
    short="Make a merged or converted adapter again, and compare.",
    example="""
    adapterhub rebuild team/both:v1
    adapterhub rebuild team/sql-gguf --base ./Qwen3-0.6B""",
)
@click.argument("ref")
@click.option("--base", metavar="BASE", help="The base it was converted with, where one was.")
@click.option("-o", "--output", "out", metavar="DIR", help="Keep what was made anew.")
@click.pass_obj
def rebuild(settings: Settings, *, ref: str, base: str | None, out: str | None) -> int:
    """Make a merged or converted adapter again from its recipe and its parents, and compare.

    The parents have to be in the registry. Exits 0 when every byte is the same, 1 when not: then it says which tensors differ
    and by how many units in the last place at most, as another kind of CPU can make them.
    """
    from adapterhub.ref import Ref
    from adapterhub.registry import recipe

    spec = inputs.read_base(base, settings) if base else None
    with open_registry(settings) as registry, tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        kept = Path(temporary) / "kept"
        version = registry.pull(Ref.parse(ref), kept)
        output.deprecated(str(version.ref), version.deprecated)
        parents = list(_parents(registry, version.digest, Path(temporary)))
        made = Path(out) if out else Path(temporary) / "made"
        with inputs.naming(kept, str(version.ref)):
            recipe.again(kept, parents, made, base=spec)
        found = recipe.differences(kept, made)
    output.emit(
        {"ref": str(version.ref), "digest": version.digest, "same": not found, "differences": [_difference(d) for d in found]},
        as_json=settings.as_json,
        text=lambda: output.write("\n".join(_verdict(str(version.ref), found))),
    )
    return 1 if found else 0


def _parents(registry: Registry, digest: str, folder: Path) -> Iterator[Parent]:
    from adapterhub.manifest.package_files import adapter_in
    from adapterhub.registry import recipe

    for number, parent in enumerate(registry.facts(digest).get("parents") or ()):
        held = registry.holding(parent["digest"])
        if not held:
            called = parent.get("ref") or parent["digest"]
            raise NotFoundError(called, "a parent that this registry does not hold", "Push or pull it here first")
        place = folder / f"{number}"
        registry.pull(held[0].ref, place)
        weight = parent.get("weight", 1.0)
        yield recipe.Parent(place, adapter_in(place), parent["digest"], parent.get("ref"), weight)


def _difference(found: Difference) -> dict[str, Any]:
    return {"name": found.name, "what": found.what, "ulps": found.ulps}


def _verdict(ref: str, found: list[Difference]) -> Iterator[str]:
    if not found:
        yield f"{ref}: made again, the same to the last byte"
        return
    ulps = [difference.ulps for difference in found if difference.ulps is not None]
    largest = f", at most {max(ulps)} units in the last place apart" if len(ulps) == len(found) else ""
    yield f"{ref}: {output.plural(len(found), 'difference')}{largest}"
    for difference in found[:10]:
        count = f" (by {difference.ulps} units in the last place at most)" if difference.ulps is not None else ""
        yield output.printable(f"  {difference.name}: {difference.what}{count}")
    if len(found) > 10:
        yield f"  and {len(found) - 10} more; --json has them all"
