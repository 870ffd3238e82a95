"""`adapterhub scan`."""

from __future__ import annotations

import click

from adapterhub.cli.options import Settings, command, headers_only_option
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import remote_option, source_at_remote


@command(
    "scan",
    example="""
    adapterhub scan ./from-a-stranger
    adapterhub scan hf://org/adapter@main
    adapterhub scan team/sql:v2 --sarif > scan.sarif""",
)
@click.argument("source", metavar="SRC")
@click.option("--sarif", is_flag=True, help="Print the problems as SARIF 2.1.0, for code scanning.")
@click.option("--strict", is_flag=True, help="Fail on warnings too.")
@headers_only_option("leave out the numbers of the weights.")
@remote_option
@click.pass_obj
def scan(settings: Settings, *, source: str, sarif: bool, strict: bool, headers_only: bool, remote: str | None) -> int:
    """Scan an adapter for code and misleading content; nothing in it is run or loaded.

    SRC is a folder, a file, a ref or an address, and need not be an adapter. It is searched for pickles, archives and programs
    under any name, bytes hidden in weights, configs that import code, chat templates that leave their sandbox or watch for
    words and dates, and script in cards. The table shows the norms of the weights, and their percentiles among adapters of the
    same base in the registry, without a verdict. Finding nothing proves nothing about what the adapter makes a model write.
    Exits 0 without errors, else 1. docs/scan.md lists the codes.
    """
    from adapterhub.cli import output
    from adapterhub.cli.views import report_documents, reports, scans
    from adapterhub.operations import scan as scan_operation

    command_workspace = workspace(settings)
    result = scan_operation.scan(
        source_at_remote(source, remote),
        weights=not (sarif or headers_only),
        strict=strict,
        limit=reports.SHOWN,
        workspace=command_workspace,
    )
    if sarif:
        output.write_document(report_documents.sarif([result.report]))
    else:
        output.emit(
            scans.document(result),
            as_json=settings.as_json,
            text=lambda: output.write_lines(scans.lines(result, output.width())),
        )
    return 0 if result.report.ok else 1
