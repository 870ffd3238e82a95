"""`adapterhub bom`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.options import Settings, base_option, command, output_option, replace_option
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.remote_choice import remote_option, source_at_remote
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import UsageError

_TIME = safe_regex.Pattern(r"[0-9]{4}-[01][0-9]-[0-3][0-9]T[0-2][0-9]:[0-5][0-9]:[0-5][0-9]Z")


@command(
    "bom",
    example="""
    adapterhub bom team/sql:v2 -o sql.cdx.json
    adapterhub bom team/sql:v2 --base ./Qwen3-0.6B --html -o sql.html
    adapterhub bom ./sql --base-license apache-2.0
    adapterhub bom team/sql:v2 --spdx --created 2026-11-26T00:00:00Z -o sql.spdx.json""",
)
@click.argument("source", metavar="SRC")
@output_option("file. [default: stdout]")
@click.option("--html", is_flag=True, help="Write one page of HTML instead of CycloneDX.")
@click.option("--spdx", is_flag=True, help="Write SPDX 3.0.1 instead of CycloneDX.")
@base_option("its model card has the license.")
@click.option("--base-license", metavar="SPDX", help="License of the base, instead of the one in its model card.")
@click.option("--supplier", metavar="NAME", help="Supplier: who publishes it, instead of the one in adapter.json.")
@click.option(
    "--created",
    metavar="TIME",
    help="Time of the bill, such as 2026-11-26T00:00:00Z. [default: none; in SPDX, that of the training]",
)
@replace_option
@remote_option
@click.pass_obj
def bom(
    settings: Settings,
    *,
    source: str,
    out: str | None,
    html: bool,
    spdx: bool,
    base: str | None,
    base_license: str | None,
    supplier: str | None,
    created: str | None,
    replace: bool,
    remote: str | None,
) -> None:
    """Write a bill of materials of an adapter: CycloneDX 1.7, SPDX 3.0.1, or one page for people.

    It lists what adapter.json records, by digest: the base, the parents and their ancestors in the registry, the training data
    with totals, the files, and the combined license with the reasons. What is not recorded is marked as such.
    """
    from adapterhub.cli.views.boms import page
    from adapterhub.operations import bom as bom_operation
    from adapterhub.trust.cyclonedx_bom import dump
    from adapterhub_converters.containers import atomic, json_file

    if html and spdx:
        raise UsageError("--html and --spdx", "exclude each other", "Leave one out", code="conflicting-options")
    if created and not _TIME.fullmatch(created):
        raise UsageError("--created", f"{created[:40]!r} is not a time in UTC", "Write it like 2026-11-26T00:00:00Z")
    spec = inputs.read_base(base, settings) if base else None
    facts: dict[str, Any] = {"base": spec, "base_license": base_license, "supplier": supplier, "created": created}
    source = source_at_remote(source, remote)
    bill = bom_operation.bom(source, **facts, workspace=workspace(settings))
    if spdx:
        text = dump(bom_operation.spdx_bom(source, **facts, workspace=workspace(settings)))
    else:
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
