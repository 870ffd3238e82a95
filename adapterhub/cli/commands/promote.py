"""`adapterhub promote`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from adapterhub.cli import catalogs, output
from adapterhub.cli.completions import complete_ref
from adapterhub.cli.options import Settings, command, dry_run_option
from adapterhub.cli.output import Column
from adapterhub.cli.remote_choice import place_words, remote_option
from adapterhub_converters.errors import RefusedError

if TYPE_CHECKING:
    from adapterhub.remotes.release_documents import PromotionReport

_COLUMNS = (Column(""), Column("REQUIREMENT"), Column("NEEDED"), Column("VALUE", wrap=True), Column("EVIDENCE", wrap=True))


@command(
    "promote",
    example="""
    adapterhub promote team/sql:v4 prod --dry-run
    adapterhub promote team/sql:v4 prod -m "golden tests, two reviews"
    adapterhub promote team/sql:staging prod --remote""",
)
@click.argument("ref", shell_complete=complete_ref)
@click.argument("tag")
@dry_run_option
@click.option("-m", "--message", metavar="TEXT", default="", help="Record a reason, for the log.")
@remote_option
@click.pass_obj
def promote(settings: Settings, *, ref: str, tag: str, dry_run: bool, message: str, remote: str | None) -> int:
    """Point a tag at a version that meets the requirements of the tag, [promote.TAG] in adapterhub.toml.

    The requirements are those of the project, of the registry and, with a hub, of the hub: each is shown with its value and the
    place of its evidence. If one is not met, the tag stays where it is (exit 6). If the tag moves in the meantime, it is not
    moved again (exit 7). A plain `tag` or `push --tag` to such a tag is decided in the same way.
    """
    with catalogs.catalog_of(settings, ref, remote, "requirements of tags") as (catalog, target):
        report = catalog.assess(target, tag)
        if not (dry_run or report.missing):
            report = catalog.promote(target, tag, message)
    from adapterhub.remotes.release_documents import promotion_document

    document = promotion_document(report)
    output.emit(document, as_json=settings.as_json, text=lambda: _write(report, remote, is_asked=dry_run))
    return RefusedError.exit_code if report.missing else 0


def _write(report: PromotionReport, remote: str | None, *, is_asked: bool) -> None:
    rows = [
        [
            "ok" if requirement.is_met else "MISSING",
            requirement.rule,
            requirement.needed,
            output.one_line(requirement.value),
            requirement.evidence or "-",
        ]
        for requirement in report.requirements
    ]
    if rows:
        output.write_table(_COLUMNS, rows)
    ref, tag = f"{report.name}:v{report.number}", f"{report.name}:{report.tag}"
    if report.missing:
        count = f"{len(report.missing)} of {output.plural(len(rows), 'requirement')}"
        output.write(f"{tag} stays {f'v{report.current}' if report.current else 'unset'}: {ref} does not meet {count}")
    elif is_asked:
        met = f"meets {output.plural(len(rows), 'requirement')}" if rows else "has no requirements to meet"
        output.write(f"{ref} {met}: `adapterhub promote {ref} {report.tag}{place_words(remote)}` moves {tag}")
    else:
        condition = "" if rows else "; no requirements of this tag are in force here"
        output.write(f"{tag} is {ref}{'' if report.moved else ' already'}{condition}")
