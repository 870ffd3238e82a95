"""The reports of `adapterhub validate` as text for people; `report_documents` has those for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from adapterhub.checks import CODES, ERROR, NOTE, WARNING, Problem, Report, Verdict
from adapterhub.checks.report import Severity
from adapterhub.cli.errors import reword
from adapterhub.cli.output import Column, color, number, one_line, plural, table
from adapterhub.manifest.package_files import shorten_names
from adapterhub_converters.runtime_rules import APPLIED

from . import groups

SHOWN = 1_000  # problems of one code that a report lists; more are only counted
_MAX_REASONS = 2  # reasons of a verdict that the text report shows
SUMMARY = ("ADAPTER", "VERDICT", "ERRORS", "WARNINGS", "NOT APPLIED BY")
_COLORS = {ERROR: "red", WARNING: "yellow", NOTE: "blue"}
# Code of a problem to the option or command that helps.
_NAME_BASE = "Pass --base with its folder, or hf://org/model"
_HINTS = {"needs-base": _NAME_BASE, "order-unknown": _NAME_BASE, "unpinned": "`adapterhub push SRC REF --base BASE` pins it"}


def lines(reports: Sequence[Report], *, screen: int | None = None, verbose: bool = False) -> Iterator[str]:
    """Yield the text report: problems grouped by code, a verdict per runtime, a summary.

    Of several adapters, only those with errors or warnings are shown in this form, without the runtimes that apply them, unless
    `verbose`; a table has a line for each, and the last line names those that failed.
    """
    for report in reports:
        if len(reports) == 1 or verbose or report.count(ERROR) or report.count(WARNING):
            yield from _report_lines(report, screen, all_verdicts=len(reports) == 1 or verbose)
            yield from [""] if len(reports) > 1 else []
    if len(reports) > 1:
        columns = [*map(Column, SUMMARY[:4]), Column(SUMMARY[4], wrap=True)]
        yield from table(columns, [summary_row(report) for report in reports], screen=screen)
        failed = [report.where for report in reports if not report.ok]
        verdict = (
            color(f"{len(failed)} not ok", "red") + one_line(f": {shorten_names(failed, 10)}")
            if failed
            else color("all ok", "green")
        )
        yield from ("", f"{len(reports)} adapters: {verdict}")


def problem_lines(report: Report, screen: int | None) -> Iterator[str]:
    """Yield the problems of a report, grouped by code."""
    left_out = {_kind(code): report.left_out(code) for code in report.counted()}
    return groups.lines(map(_item, report.problems), screen, hidden=left_out)


def summary_row(report: Report) -> list[str]:
    """Return the row of an adapter in a table of several."""
    refused = ", ".join(verdict.runtime for verdict in report.verdicts.values() if verdict.verdict != APPLIED)
    numbers = [str(_kinds(report, severity) or "") for severity in (ERROR, WARNING)]
    return [one_line(report.where), "ok" if report.ok else "not ok", *numbers, refused if report.format else "not read"]


def _report_lines(report: Report, screen: int | None, *, all_verdicts: bool) -> Iterator[str]:
    yield from (*_headline(report), "")
    if report.problems:
        yield from (*problem_lines(report, screen), "")
    verdicts = [verdict for verdict in report.verdicts.values() if all_verdicts or verdict.verdict != APPLIED]
    if report.format is not None and verdicts:
        yield from (*_verdict_lines(verdicts, screen), "")
    yield _summary_line(report)


def _headline(report: Report) -> list[str]:
    facts: Mapping[str, Any] = report.facts
    if not facts:
        return [one_line(report.where)]
    ranks = facts["r"]
    rank = f"r {ranks[0]}" if len(ranks) == 1 else f"r {ranks[0]} to {ranks[-1]}" if ranks else "no low-rank pairs"
    properties = [
        str(report.format),
        rank,
        plural(facts["modules"], "module"),
        f"{number(facts['parameters'])} parameters",
        "/".join(facts["dtypes"]),
    ]
    base = f"on {report.base}" if report.base else "without a base: shapes and identity not compared (--base)"
    gaps = ["identity not compared: no adapter.json"] if report.base and "identity" not in report.levels else []
    return [one_line(f"{report.where}: {', '.join(properties)}"), base, *gaps]


def _item(problem: Problem) -> groups.Item:
    return groups.Item(
        _kind(problem.code), problem.name, problem.what, hint_of(problem), problem.file, _COLORS[problem.severity]
    )


def _kind(code: str) -> str:
    return f"{CODES[code][0]}[{code}]"


def hint_of(problem: Problem) -> str:
    """Return the hint of a problem in the words of the command line."""
    hint = reword(problem.cause).hint if problem.cause else problem.hint
    repair = "`adapterhub fix` repairs it" if problem.repairable else ""
    return "; ".join(filter(None, (_HINTS.get(problem.code, hint), repair)))


def _verdict_lines(verdicts: Iterable[Verdict], screen: int | None) -> list[str]:
    rows = [[verdict.runtime, verdict.verdict, _verdict_reason(verdict)] for verdict in verdicts]
    return table([Column("RUNTIME"), Column("VERDICT"), Column("WHY", wrap=True)], rows, screen=screen)


def _verdict_reason(verdict: Verdict) -> str:
    first = [f"after `adapterhub convert --to {verdict.convert_to}`"] if verdict.convert_to else []
    return one_line("; ".join([*first, *verdict.reasons[:_MAX_REASONS]]))


def _summary_line(report: Report) -> str:
    counts = [text for severity in (ERROR, WARNING, NOTE) if (text := report.count_text(severity))]
    ignored = f"; ignored: {ignored_text(report)}" if report.ignored else ""
    if report.ok:
        return color("ok", "green") + (f": {', '.join(counts)}" if counts else ": nothing to report") + ignored
    reason = "" if report.count(ERROR) else " (--strict)"
    return color("not ok", "red") + f"{reason}: {', '.join(counts)}{ignored}"


def _kinds(report: Report, severity: Severity) -> int:
    """Return the number of codes: one wrong rank in the config is one error, in however many modules."""
    return sum(CODES[code][0] == severity for code in report.counted())


def ignored_text(report: Report) -> str:
    """Return how many problems of each ignored code there were."""
    return ", ".join(f"{count:,} {code}" for code, count in report.ignored.items())
