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
from adapterhub_converters.errors import RefusedError

if TYPE_CHECKING:
    from adapterhub.operations.policy_report import PolicyReport

_COLUMNS = (Column(""), Column("RULE"), Column("VALUE", wrap=True), Column("PROBLEM", wrap=True))


@click.group("policy", cls=Group, example="adapterhub policy check team/sql:v2")
def policy() -> None:
    """Compare versions with the policies in adapterhub.toml."""


@policy.command(
    "check",
    example="""
    adapterhub policy check team/sql:v2
    adapterhub policy check oci://registry.example/team/sql:v2 --json""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.pass_obj
def check(settings: Settings, *, ref: str) -> int:
    """List every rule for a version, with what it has.

    REF is a version of the registry, or an address: the rules are those that a pull asks, of the project and of the registry.
    Exits 0 if all of them are met, else 6.
    """
    from adapterhub.operations import policy_report

    report = policy_report.report(ref, workspace(settings))
    document = {
        "ref": report.ref,
        "digest": report.digest,
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
