"""`adapterhub lineage`."""

from __future__ import annotations

import click

from adapterhub.cli import catalogs, output
from adapterhub.cli.options import Settings, command
from adapterhub.cli.remote_choice import remote_option
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
    # Other remotes have the parents in their manifests, but nothing that leads from a parent to its children.
    with catalogs.catalog_of(settings, ref, remote, "record of what was made from an adapter") as (catalog, target):
        graph = catalog.lineage(target)
    for node in graph["nodes"]:
        for deprecated_ref, message in node["deprecated"].items():
            output.warn_deprecated(deprecated_ref, message)
    if dot:
        output.write_lines(view.dot(graph))
        return
    output.emit(graph, as_json=settings.as_json, text=lambda: output.write_lines(view.tree(graph)))
