"""`adapterhub audit`: verify the logs of a registry, and sign checkpoints of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from adapterhub.cli import output, registry_choice, signing_options
from adapterhub.cli.options import Group, Settings, replace_option
from adapterhub.cli.registry_choice import workspace
from adapterhub.cli.views import finding_report as view
from adapterhub.identity import Identity
from adapterhub.maintenance.findings import Finding
from adapterhub_converters.errors import UsageError


@click.group(
    "audit",
    cls=Group,
    example="""
    adapterhub audit checkpoint -o 2026-11-26.json --key audit.key
    adapterhub audit verify --checkpoint 2026-11-26.json --key audit.pub""",
)
def audit() -> None:
    """Verify the logs of the registry and of its hub, and sign checkpoints of them.

    Every push, tag and removal is an entry of a log, and every change at a hub a row. Each has the digest of the one before it.
    Of a hub in PostgreSQL, set ADAPTERHUB_DATABASE as for `hub start`: its database is read, and not changed.
    """


@audit.command(
    "verify",
    short_help="Verify that no entry was changed.",
    example="""
    adapterhub audit verify
    adapterhub audit verify --registry ./copy --checkpoint 2026-11-26.json --key audit.pub""",
)
@click.option("--checkpoint", metavar="FILE", type=click.Path(path_type=Path), help="Compare with an earlier checkpoint.")
@signing_options.accepted_signers
@click.pass_obj
def verify(settings: Settings, *, checkpoint: Path | None, keys: tuple[Path | Identity, ...]) -> int:
    """Verify that no entry was changed, removed, moved or inserted; offline, on the registry or on a copy of it.

    Entries that were cut off at the end of a log, or a log that was rewritten, only show when compared with a checkpoint, which
    one of the keys must have signed. The first bad entry of each log is named. Exits 0 if all are as they were written, else 1.
    """
    from adapterhub.operations import audit as audit_operation

    if (checkpoint is None) != (not keys):
        raise UsageError("--checkpoint and --key", "require each other", "Pass both, or neither", code="conflicting-options")
    result = audit_operation.audit(_audit_target(settings), checkpoint=checkpoint, keys=keys)
    findings = [Finding(fault.kind, "error", fault.where, fault.what) for fault in result.faults]
    success_text = f"{_counts_text(result)} follow each from the one before"
    if result.checkpoint:
        success_text += f", and go on from the checkpoint of {result.checkpoint.time}, signed by {result.signer}"
    else:
        success_text += "; without a checkpoint, nothing shows what is missing at an end"
    return view.show(settings, result.where, findings, success_text=success_text)


@audit.command(
    "checkpoint",
    example="""
    adapterhub audit checkpoint -o 2026-11-26.json --key audit.key""",
)
@click.option("-o", "--output", "out", metavar="OUT", required=True, type=click.Path(path_type=Path), help="Output: file.")
@signing_options.required_signer
@replace_option
@click.pass_obj
def checkpoint(settings: Settings, *, out: Path, signer: signing_options.SignerOption, replace: bool) -> None:
    """Verify the logs, and write a signed file with the end of each.

    Keep the file where nobody who can write to the registry can write: it proves later that what is in the logs now still is.
    """
    from adapterhub.operations import audit as audit_operation

    result = audit_operation.sign_checkpoint(_audit_target(settings), out, signer.read(), replace=replace)
    document = {"checkpoint": str(out), "names": result.names, "entries": result.entries, "rows": result.rows}
    output.emit(
        document, as_json=settings.as_json, text=lambda: output.write(output.one_line(f"{out}: {_counts_text(result)} signed"))
    )


def _audit_target(settings: Settings) -> str | Path:
    """Return the folder of the registry in use, or the database of the hub unless an option names a folder with a registry."""
    hub_settings = registry_choice.shared_hub(settings, needs_bucket=False)
    return hub_settings.database if hub_settings else workspace(settings).folder()


def _counts_text(result: Any) -> str:
    rows = f" and {output.plural(result.rows, 'row')} of the hub" if result.rows else ""
    return f"{result.entries} {'entry' if result.entries == 1 else 'entries'} of {output.plural(result.names, 'log')}{rows}"
