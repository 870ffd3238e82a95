"""`adapterhub bom`."""

from __future__ import annotations

from pathlib import Path

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import Settings, base_option, command, output_option, replace_option
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import remote_option, source_at_remote


@command(
    "bom",
    example="""
    adapterhub bom team/sql:v2 -o sql.cdx.json
    adapterhub bom team/sql:v2 --base ./Qwen3-0.6B --html -o sql.html
    adapterhub bom ./sql --base-license apache-2.0""",
)
@click.argument("source", metavar="SRC")
@output_option("file. [default: stdout]")
@click.option("--html", is_flag=True, help="Write one page of HTML instead of CycloneDX.")
@base_option("its model card has the license.")
@click.option("--base-license", metavar="SPDX", help="License of the base, instead of the one in its model card.")
@replace_option
@remote_option
@click.pass_obj
def bom(
    settings: Settings,
    *,
    source: str,
    out: str | None,
    html: bool,
    base: str | None,
    base_license: str | None,
    replace: bool,
    remote: str | None,
) -> None:
    """Write a bill of materials of an adapter: CycloneDX 1.7, or one page for people.

    It lists what adapter.json records, by digest: the base, the parents and their ancestors in the registry, the training data
    with totals, the files, and the combined license with the reasons. What is not recorded is marked as such.
    """
    from adapterhub.cli.views.bills import page
    from adapterhub.operations import bom as bom_operation
    from adapterhub_converters.containers import atomic, json_file

    spec = inputs.read_base(base, settings) if base else None
    bill = bom_operation.bom(
        source_at_remote(source, remote), base=spec, base_license=base_license, workspace=workspace(settings)
    )
    text = page(bill) if html else bill.dump()
    if out is None:
        output.write_document(text.rstrip("\n"))
        return
    with atomic.pending_output(Path(out), folder=False, replace=replace) as file:
        json_file.write_text(file, text)
    license_ = bill.license
    missing = f"; without a license: {', '.join(license_.missing)}" if license_.missing else ""
    line = output.one_line(f"{out}: {license_.expression or 'no license is recorded'}{missing}")
    document = {"output": out, "license": license_.expression or None, "missing": list(license_.missing)}
    output.emit(document, as_json=settings.as_json, text=lambda: output.write(line))
