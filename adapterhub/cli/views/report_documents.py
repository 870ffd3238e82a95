"""The reports of `adapterhub validate` for programs: JSON, SARIF, JUnit XML, GitHub workflow commands and Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from adapterhub.checks import CODES, ERROR, NOTE, SCAN, WARNING, Problem, Report, level_of
from adapterhub.cli.output import escape_workflow_commands, json_text, one_line, plural
from adapterhub.manifest.package_files import shorten_names
from adapterhub.version import __version__
from adapterhub_converters.display import markdown as in_markdown
from adapterhub_converters.display import printable
from adapterhub_converters.runtime_rules import APPLIED

from . import groups
from .reports import SUMMARY, hint_of, ignored_text, summary_row

_PLACES = 10  # of one cause that SARIF and JUnit list
_TEXTS = 20  # different ones of one cause; problems with others are counted
_TESTED = tuple(code for code in CODES if code not in SCAN)  # the codes that a check can report


def document(report: Report) -> dict[str, Any]:
    """Return the report as JSON; the keys are stable."""
    return {
        "ok": report.ok,
        "strict": report.strict,
        "source": report.where,
        "format": report.format,
        "base": report.base,
        "base_facts": dict(report.base_facts) or None,
        "levels": list(report.levels),
        "facts": dict(report.facts),
        "problems": problems(report),
        "counts": dict(report.counted()),
        "ignored": dict(report.ignored),
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


def problems(report: Report) -> list[dict[str, str]]:
    """Return the problems of a report as JSON; the keys are stable."""
    return [
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
    ]


def as_json(reports: Sequence[Report]) -> str:
    """Return JSON of the reports, in one shape however many there are."""
    return json_text(
        {"ok": all(report.ok for report in reports), "reports": [document(report) for report in reports]}, indent=2
    )


def sarif(reports: Sequence[Report]) -> str:
    """Return SARIF 2.1.0 (OASIS) with one run, as code-scanning services read it, and one result for each cause.

    They require a physical location and a start line.
    """
    causes = [(report, cause) for report in reports for cause in _causes(report)]
    # A rule for each code that occurs: results refer to rules by their index.
    codes = list(dict.fromkeys(cause.first.code for _, cause in causes))
    rules = [
        {"id": code, "shortDescription": {"text": CODES[code][1]}, "defaultConfiguration": {"level": CODES[code][0]}}
        for code in codes
    ]
    results = [
        {
            "ruleId": cause.first.code,
            "ruleIndex": codes.index(cause.first.code),
            "level": cause.first.severity,
            "message": {"text": cause.text},
            "occurrenceCount": cause.total,
            "locations": [_location(report, cause)],
        }
        for report, cause in causes
    ]
    driver = {"name": "adapterhub", "version": __version__, "rules": rules}
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    schema = "https://json.schemastore.org/sarif-2.1.0.json"
    return json_text({"$schema": schema, "version": "2.1.0", "runs": [run]}, indent=2)


def _location(report: Report, cause: _Cause) -> dict[str, Any]:
    """Return the file of a cause, with the first of its places."""
    from urllib.parse import quote

    # A file name that is not UTF-8 keeps its bytes.
    uri = quote(_file(report, cause.first).replace("\\", "/"), errors="surrogateescape")
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}}
    if cause.places:
        location["logicalLocations"] = [{"fullyQualifiedName": name} for name in cause.places]
    return location


def _file(report: Report, problem: Problem) -> str:
    return f"{report.where}/{problem.file}" if problem.file and not report.where.endswith(problem.file) else report.where


def _sentence(problem: Problem) -> str:
    name = f"{problem.name}: " if problem.name else ""
    hint = hint_of(problem)
    return one_line(f"{name}{problem.what}. {hint}" if hint else f"{name}{problem.what}")


def junit(reports: Sequence[Report]) -> str:
    """Return JUnit XML: a suite per adapter and a test case per code, so a test has the same name whether or not it fails.

    A test case whose code was not checked, or is ignored, is skipped.
    """
    suites = [_suite(report) for report in reports]
    tests, failures = len(_TESTED) * len(reports), sum(len(_failing(report)) for report in reports)
    skipped = sum(bool(_skip_reason(report, code)) for report in reports for code in _TESTED)
    head = f'tests="{tests}" failures="{failures}" errors="0" skipped="{skipped}"'
    return "\n".join(
        [
            '<?xml version="1.0" encoding="UTF-8"?>',
            f'<testsuites name="adapterhub validate" {head}>',
            *suites,
            "</testsuites>",
        ]
    )


def _skip_reason(report: Report, code: str) -> str:
    """Return why a code has no result; empty if it was checked."""
    if code in report.ignored:
        return "ignored"
    if code in report.counted():
        return ""
    return "not checked" if report.format is None or level_of(code) not in report.levels else ""


def _failing(report: Report) -> set[str]:
    return {problem.code for problem in report.problems if report.fails(problem)}


def _suite(report: Report) -> str:
    by_code: dict[str, list[Problem]] = {}
    for problem in report.problems:
        by_code.setdefault(problem.code, []).append(problem)
    cases = [_case(report, code, by_code.get(code, [])) for code in _TESTED]
    numbers = f'tests="{len(cases)}" failures="{len(_failing(report))}" errors="0"'
    head = f'name={_attribute(report.where)} {numbers} skipped="{sum("<skipped" in case for case in cases)}"'
    return "\n".join([f"  <testsuite {head}>", *cases, "  </testsuite>"])


def _case(report: Report, code: str, problems: list[Problem]) -> str:
    head = f"    <testcase classname={_attribute(report.where)} name={_attribute(f'{code}: {CODES[code][1]}')}"
    if not problems:
        skip_reason = _skip_reason(report, code)
        return f'{head}><skipped message="{skip_reason}"/></testcase>' if skip_reason else f"{head}/>"
    message = _attribute(_line(problems[0]))
    # The first places, and one place for each text that none of them has.
    listed = [*problems[:_PLACES], *(same[0] for same in _by_text(problems)[:_TEXTS] if same[0] not in problems[:_PLACES])]
    unlisted = report.counted()[code] - len(listed)
    body = _element("\n".join([*map(_line, listed), *([f"and {unlisted:,} more"] if unlisted else [])]))
    if report.fails(problems[0]):
        return f'{head}><failure type="{code}" message={message}>{body}</failure></testcase>'
    return f"{head}><system-out>{body}</system-out></testcase>"


def _line(problem: Problem) -> str:
    return one_line(f"{problem.file}: {_sentence(problem)}" if problem.file else _sentence(problem))


def _attribute(value: str) -> str:
    from xml.sax.saxutils import quoteattr  # which imports urllib.request: 15 ms that only this report needs

    return escape_workflow_commands(quoteattr(one_line(value)), "&#{};")


def _element(value: str) -> str:
    return escape_workflow_commands(value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"), "&#{};")


def github(reports: Sequence[Report]) -> str:
    """Return workflow commands that annotate a run, one for each cause.

    The escapes are those of actions/toolkit, `command.ts`.
    """
    return "\n".join(line for report in reports for line in _github(report))


def _github(report: Report) -> Iterator[str]:
    levels = {ERROR: "error", WARNING: "warning", NOTE: "notice"}
    for cause in _causes(report):
        level = "error" if report.fails(cause.first) else levels[cause.first.severity]
        location = f"file={_property(_file(report, cause.first))},title={_property(cause.first.code)}"
        yield f"::{level} {location}::{_data(cause.text)}"
    refused = [f"{v.runtime} {v.verdict}" for v in report.verdicts.values() if v.verdict != APPLIED]
    ignored = f"; ignored: {ignored_text(report)}" if report.ignored else ""
    verdicts_text = f" ({', '.join(refused)})" if refused else ""
    yield f"{escape_workflow_commands(one_line(report.where))}: {'ok' if report.ok else 'not ok'}{verdicts_text}{ignored}"


class _Cause(NamedTuple):
    """Problems with one cause: the first of them, a sentence, their number, and the names of some."""

    first: Problem
    text: str
    total: int
    places: list[str]


def _causes(report: Report) -> Iterator[_Cause]:
    """Yield the causes of the problems of a report.

    Problems of one code in one file are one cause; consequences of other problems are left out.
    """
    by_code: dict[tuple[str, str], list[Problem]] = {}
    for problem in report.problems:
        # A runtime's verdict that another problem explains would only repeat that problem.
        verdict = report.verdicts.get(problem.name) if problem.code == "runtime" else None
        if not verdict or not set(verdict.causes) & report.counted().keys():
            by_code.setdefault((problem.code, problem.file), []).append(problem)
    files = dict(by_code.keys())  # the last one with each code
    for problems in by_code.values():
        first = problems[0]
        # Problems beyond the limit may be in any file with this code; nearly always there is only one such file.
        left_out = report.left_out(first.code) if first.file == files[first.code] else 0
        names = [problem.name for problem in problems if problem.name]
        if first.code == "runtime":
            text = one_line("; ".join(f"{problem.name} {problem.what}" for problem in problems))
        elif len(problems) == 1 and not report.left_out(first.code):
            text = _sentence(first)
        else:
            text = _joined_text(problems, left_out)
        yield _Cause(first, text, len(problems) + left_out, names[:_PLACES])


def _joined_text(problems: Sequence[Problem], left_out: int) -> str:
    """Return the different texts of problems with one cause, each with its first places; `left_out` more are only counted."""
    texts = _by_text(problems)
    sentences: list[str] = []
    for same in texts[:_TEXTS]:
        names = shorten_names([problem.name for problem in same if problem.name], 3, unlisted=0 if texts[1:] else left_out)
        sentences.append(_sentence(same[0]._replace(name=names, what=groups.joined_message([p.what for p in same]))))
    remaining = sum(map(len, texts[_TEXTS:])) + left_out
    return "; ".join([*sentences, *([f"and {remaining:,} more"] if texts[1:] and remaining else [])])


def _by_text(problems: Iterable[Problem]) -> list[list[Problem]]:
    """Return problems by what they say, apart from numbers and the names of their places."""
    by_text: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        hint = problem.hint.replace(problem.name, "") if problem.name else problem.hint
        by_text.setdefault((groups.without_numbers(problem.what), groups.without_numbers(hint)), []).append(problem)
    return list(by_text.values())


def markdown(reports: Sequence[Report]) -> str:
    """Return a table of the adapters and a list of the causes, for the summary of a job."""
    failed = sum(not report.ok for report in reports)
    title = f"{plural(len(reports), 'adapter')}: {f'{failed} not ok' if failed else 'all ok'}"
    rows = [["**not ok**" if cell == "not ok" else in_markdown(cell) for cell in summary_row(report)] for report in reports]
    cells = [[title.lower() for title in SUMMARY], ["---"] * len(SUMMARY), *rows]
    lines_ = [f"### {title}", "", *(f"| {' | '.join(row)} |" for row in cells)]
    for report in reports:
        causes = [f"- {cause.first.severity} `{cause.first.code}`: {in_markdown(cause.text)}" for cause in _causes(report)]
        ignored = [f"- ignored: {ignored_text(report)}"] if report.ignored else []
        if causes or ignored:
            lines_ += ["", f"**{in_markdown(report.where)}**", "", *causes, *ignored]
    return escape_workflow_commands("\n".join(lines_), "&#{};")


def _data(value: str) -> str:
    return escape_workflow_commands(printable(value)).replace("%", "%25")


def _property(value: str) -> str:
    return _data(value).replace(":", "%3A").replace(",", "%2C")


# Renderers of documents; `lines` is for people.
RENDERERS: dict[str, Callable[[Sequence[Report]], str]] = {
    "json": as_json,
    "sarif": sarif,
    "junit": junit,
    "github": github,
    "markdown": markdown,
}
