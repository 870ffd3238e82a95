"""`adapterhub lineage`."""

from __future__ import annotations

import click

from adapterhub.cli import output, remotes
from adapterhub.cli.environment import open_registry, ref_at_remote, remote_option
from adapterhub.cli.options import Settings, command
from adapterhub.cli.views import lineage_tree as view


@command(
    "lineage",
    example="""
    adapterhub lineage team/both:v1
    adapterhub lineage team/both --dot | dot -Tsvg > both.svg""",
)
@click.argument("ref")
@click.option("--dot", is_flag=True, help="Print a graph for Graphviz.")
@remote_option
@click.pass_obj
def lineage(settings: Settings, *, ref: str, dot: bool, remote: str | None) -> None:
    """Show what an adapter was made from, and what was made from it.

    Upward: its parents with their weights, their parents, and the base and training data of each. Downward: adapters that were
    trained further, merged or converted from it.
    """
    from adapterhub.ref import Ref
    from adapterhub.registry.lineage_graph import trace
    from adapterhub.remotes.remote_address import is_address

    address = ref_at_remote(ref, remote)
    if is_address(address):
        # A remote has the parents in its manifests, but nothing that leads from a parent to its children.
        raise remotes.unsupported_error(address, "record of what was made from an adapter")

    with open_registry(settings) as registry:
        graph = trace(registry, Ref.parse(ref))
    for node in graph.nodes.values():
        for ref_, message in node.deprecated.items():
            output.warn_deprecated(ref_, message)
    if dot:
        output.write_lines(view.dot(graph))
        return
    output.emit(view.document(graph), as_json=settings.as_json, text=lambda: output.write_lines(view.tree(graph)))
