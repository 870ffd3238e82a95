"""`adapterhub policy`."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import click

from adapterhub.cli import output
from adapterhub.cli.completions import complete_ref
from adapterhub.cli.options import Group, Settings
from adapterhub.cli.output import Column
from adapterhub.cli.registry_choice import workspace
from adapterhub_converters.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from adapterhub.operations.policy_report import PolicyReport

USES = ("pull", "run", "eval", "merge", "convert", "fix", "rebuild", "bundle", "lock", "resolve", "serve")
"""The ways of using a version: each asks what a pull does, of the name that the version has."""
ARRIVALS = ("push", "copy")
"""The ways of storing a version under another name, or at an address, which are asked of that one."""
_COLUMNS = (Column(""), Column("RULE"), Column("VALUE", wrap=True), Column("PROBLEM", wrap=True))


@click.group("policy", cls=Group, example="adapterhub policy check team/sql:v2")
def policy() -> None:
    """Compare versions with the policies in adapterhub.toml."""


@policy.command(
    "check",
    example="""
    adapterhub policy check team/sql:v2
    adapterhub policy check team/sql:v2 --way copy --target release/sql
    adapterhub policy check oci://registry.example/team/sql:v2 --json""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.option(
    "--way", type=click.Choice((*USES, *ARRIVALS)), default="pull", help="Way that the version would take.  [default: pull]"
)
@click.option("--target", "to", metavar="NAME|ADDRESS", help="Push, copy: the name that it would get.  [default: its own]")
@click.pass_obj
def check(settings: Settings, *, ref: str, way: str, to: str | None) -> int:
    """List every rule for a version, with what it has.

    REF is a version of the registry, or an address. The rules are those of the project and of the registry. Every use asks what
    a pull does; a push or a copy is asked of the name that the version would get. Exits 0 if all rules are met, else 6.
    """
    from adapterhub.operations import policy_report

    if to is not None and way not in ARRIVALS:
        raise UsageError("--target", f"is for a push or a copy, and {way} keeps the name", "Leave it out")
    report = policy_report.report(ref, workspace(settings), to=to or "")
    document = {
        "ref": report.ref,
        "digest": report.digest,
        "way": way,
        "ok": not report.violations,
        "rules": [
            {
                "file": rule.file,
                "rule": rule.rule,
                "value": rule.value,
                "ok": not rule.problem,
                "problem": rule.problem or None,
            }
            for rule in report.checks
        ],
    }
    output.emit(document, as_json=settings.as_json, text=lambda: _write(report))
    return RefusedError.exit_code if report.violations else 0


def _write(report: PolicyReport) -> None:
    for file, rules in groupby(report.checks, key=lambda rule: rule.file):
        output.write(output.one_line(file))
        rows = [
            [
                "NO" if rule.problem else "ok",
                output.one_line(rule.rule),
                output.one_line(rule.value),
                output.one_line(rule.problem),
            ]
            for rule in rules
        ]
        output.write_table(_COLUMNS, rows)
    count = len(report.checks)
    if not count:
        output.write(f"{report.ref}: no policy applies")
    elif report.violations:
        output.write(f"{report.ref}: does not meet {len(report.violations)} of {output.plural(count, 'rule')}")
    else:
        output.write(f"{report.ref}: meets {output.plural(count, 'rule')}")
