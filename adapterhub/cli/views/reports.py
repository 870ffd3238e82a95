"""The reports of `adapterhub validate` as text, JSON, SARIF, JUnit XML or GitHub workflow commands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from adapterhub.checks import CODES, ERROR, NOTE, WARNING, Problem, Report, Verdict
from adapterhub.cli.errors import in_words_of_the_command_line
from adapterhub.cli.output import Column, color, inert, json_text, number, one_line, plural, table
from adapterhub.version import __version__
from adapterhub_converters.display import printable
from adapterhub_converters.runtimes import APPLIED

from . import groups

SHOWN = 1_000  # problems of one code among which the text report groups; more are only counted there
_REASONS = 2  # reasons of a verdict that the text report shows
_COLORS = {ERROR: "red", WARNING: "yellow", NOTE: "blue"}
# Code of a problem to the option or command that helps.
_HINTS = {"needs-base": "Pass --base BASE", "unpinned": "`adapterhub push --base` pins it"}


def lines(reports: Sequence[Report], *, screen: int | None = None) -> Iterator[str]:
    """The text report: problems grouped by code, a verdict per runtime, a summary; for several adapters, one for all last."""
    for report in reports:
        yield from _lines(report, screen)
        yield from [""] if report is not reports[-1] else []
    if len(reports) > 1:
        bad = sum(not report.ok for report in reports)
        yield from ("", f"{len(reports)} adapters: " + (color(f"{bad} not ok", "red") if bad else color("all ok", "green")))


def _lines(report: Report, screen: int | None) -> Iterator[str]:
    yield from (*_headline(report), "")
    if report.problems:
        found = Counter(problem.code for problem in report.problems)
        others = {_kind(code): count - found[code] for code, count in report.counted().items()}
        yield from (*groups.lines(map(_item, report.problems), screen, others=others), "")
    if report.format is not None:
        yield from (*_verdict_lines(report.verdicts.values(), screen), "")
    yield _sum(report)


def _headline(report: Report) -> list[str]:
    facts: Mapping[str, Any] = report.facts
    if not facts:
        return [one_line(report.where)]
    ranks = facts["r"]
    rank = f"r {ranks[0]}" if len(ranks) == 1 else f"r {ranks[0]} to {ranks[-1]}" if ranks else "no low-rank pairs"
    parts = [
        str(report.format),
        rank,
        plural(facts["modules"], "module"),
        f"{number(facts['parameters'])} parameters",
        "/".join(facts["dtypes"]),
    ]
    base = f"on {report.base}" if report.base else "without a base: shapes and identity not compared (--base)"
    return [one_line(f"{report.where}: {', '.join(parts)}"), base]


def _item(problem: Problem) -> groups.Item:
    return groups.Item(
        _kind(problem.code), problem.name, problem.what, hint_of(problem), problem.file, _COLORS[problem.severity]
    )


def _kind(code: str) -> str:
    return f"{CODES[code][0]}[{code}]"


def hint_of(problem: Problem) -> str:
    """The hint of a problem in the words of the command line."""
    cause = in_words_of_the_command_line(problem.cause)
    said = cause.hint if cause else problem.hint
    repair = "`adapterhub fix` repairs it" if problem.repairable else ""
    return "; ".join(filter(None, (_HINTS.get(problem.code, said), repair)))


def _verdict_lines(verdicts: Iterable[Verdict], screen: int | None) -> list[str]:
    rows = [[verdict.runtime, verdict.verdict, _why(verdict)] for verdict in verdicts]
    return table([Column("RUNTIME"), Column("VERDICT"), Column("WHY", wrap=True)], rows, screen=screen)


def _why(verdict: Verdict) -> str:
    first = [f"after `adapterhub convert --to {verdict.convert_to}`"] if verdict.convert_to else []
    return one_line("; ".join([*first, *verdict.reasons[:_REASONS]]))


def _sum(report: Report) -> str:
    counts = [plural(report.count(severity), severity) for severity in (ERROR, WARNING, NOTE) if report.count(severity)]
    if report.ok:
        return color("ok", "green") + (f": {', '.join(counts)}" if counts else ": nothing to report")
    why = "" if report.count(ERROR) else " (--strict)"
    return color("not ok", "red") + f"{why}: {', '.join(counts)}"


def document(report: Report) -> dict[str, Any]:
    """The report with stable keys."""
    return {
        "ok": report.ok,
        "strict": report.strict,
        "source": report.where,
        "format": report.format,
        "base": report.base,
        "base_facts": dict(report.base_facts) or None,
        "levels": list(report.levels),
        "facts": dict(report.facts),
        "problems": [
            {
                "code": problem.code,
                "severity": problem.severity,
                "file": problem.file,
                "name": problem.name,
                "what": problem.what,
                "expected": problem.expected,
                "got": problem.got,
                "hint": hint_of(problem),
            }
            for problem in report.problems
        ],
        "runtimes": {
            name: {
                "version": verdict.version,
                "verdict": verdict.verdict,
                "reasons": list(verdict.reasons),
                "convert_to": verdict.convert_to,
            }
            for name, verdict in report.verdicts.items()
        },
    }


def as_json(reports: Sequence[Report]) -> str:
    """JSON of the only report, or of all under `reports`."""
    if len(reports) == 1:
        return json_text(document(reports[0]), indent=2)
    return json_text(
        {"ok": all(report.ok for report in reports), "reports": [document(report) for report in reports]}, indent=2
    )


def sarif(reports: Sequence[Report]) -> str:
    """SARIF 2.1.0 (OASIS), one run, as code-scanning services read it; they require a physical location and a start line."""
    found = [(report, problem) for report in reports for problem in report.problems]
    codes = list(dict.fromkeys(problem.code for _, problem in found))
    rules = [
        {"id": code, "shortDescription": {"text": CODES[code][1]}, "defaultConfiguration": {"level": CODES[code][0]}}
        for code in codes
    ]
    results = [
        {
            "ruleId": problem.code,
            "ruleIndex": codes.index(problem.code),
            "level": problem.severity,
            "message": {"text": _sentence(problem)},
            "locations": [_location(report, problem)],
        }
        for report, problem in found
    ]
    driver = {"name": "adapterhub", "version": __version__, "rules": rules}
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json_text({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=2)


def _location(report: Report, problem: Problem) -> dict[str, Any]:
    from urllib.parse import quote

    uri = quote(_file(report, problem).replace("\\", "/"), errors="surrogateescape")  # bytes of a name that is no UTF-8
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}}
    if problem.name:
        location["logicalLocations"] = [{"fullyQualifiedName": problem.name}]
    return location


def _file(report: Report, problem: Problem) -> str:
    return f"{report.where}/{problem.file}" if problem.file and not report.where.endswith(problem.file) else report.where


def _sentence(problem: Problem) -> str:
    name = f"{problem.name}: " if problem.name else ""
    hint = hint_of(problem)
    return one_line(f"{name}{problem.what}. {hint}" if hint else f"{name}{problem.what}")


def junit(reports: Sequence[Report]) -> str:
    """JUnit XML: a suite per adapter and a test case per code, so that a test has the same name whether or not it fails."""
    suites = [_suite(report) for report in reports]
    tests, failures = len(CODES) * len(reports), sum(len(_failing(report)) for report in reports)
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f'<testsuites name="adapterhub validate" tests="{tests}" failures="{failures}" errors="0">',
            *suites,
            "</testsuites>",
        ]
    )


def _failing(report: Report) -> set[str]:
    return {problem.code for problem in report.problems if report.fails(problem)}


def _suite(report: Report) -> str:
    found: dict[str, list[Problem]] = {}
    for problem in report.problems:
        found.setdefault(problem.code, []).append(problem)
    cases = [_case(report, code, found.get(code, [])) for code in CODES]
    head = f'name={_attribute(report.where)} tests="{len(cases)}" failures="{len(_failing(report))}" errors="0" skipped="0"'
    return "\n".join([f"  <testsuite {head}>", *cases, "  </testsuite>"])


def _case(report: Report, code: str, problems: list[Problem]) -> str:
    head = f"    <testcase classname={_attribute(report.where)} name={_attribute(f'{code}: {CODES[code][1]}')}"
    if not problems:
        return f"{head}/>"
    message = _attribute(_line(problems[0]))
    body = _element("\n".join(_line(problem) for problem in problems))
    if report.fails(problems[0]):
        return f'{head}><failure type="{code}" message={message}>{body}</failure></testcase>'
    return f"{head}><system-out>{body}</system-out></testcase>"


def _line(problem: Problem) -> str:
    return one_line(f"{problem.file}: {_sentence(problem)}" if problem.file else _sentence(problem))


def _attribute(value: str) -> str:
    from xml.sax.saxutils import quoteattr  # which imports urllib.request: 15 ms that only this report needs

    return inert(quoteattr(one_line(value)), "&#{};")


def _element(value: str) -> str:
    return inert(value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"), "&#{};")


def github(reports: Sequence[Report]) -> str:
    """Workflow commands that annotate a run (actions/toolkit, `command.ts`, for what must be escaped)."""
    return "\n".join(line for report in reports for line in _github(report))


def _github(report: Report) -> Iterator[str]:
    levels = {ERROR: "error", WARNING: "warning", NOTE: "notice"}
    for problem in report.problems:
        level = "error" if report.fails(problem) else levels[problem.severity]
        place = f"file={_property(_file(report, problem))},title={_property(problem.code)}"
        yield f"::{level} {place}::{_data(_sentence(problem))}"
    bad = [f"{v.runtime} {v.verdict}" for v in report.verdicts.values() if v.verdict != APPLIED]
    yield f"{inert(one_line(report.where))}: {'ok' if report.ok else 'not ok'}" + (f" ({', '.join(bad)})" if bad else "")


def _data(value: str) -> str:
    return inert(printable(value)).replace("%", "%25")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")


# Documents; `lines` is for people.
RENDERERS: dict[str, Callable[[Sequence[Report]], str]] = {
    "json": as_json,
    "sarif": sarif,
    "junit": junit,
    "github": github,
}
