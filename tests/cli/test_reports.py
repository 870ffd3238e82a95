"""The renderings of a report: what each consumer insists on."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from adapterhub import checks
from adapterhub.checks import Problem, Report
from adapterhub.cli.commands import validate
from adapterhub.cli.views import report_documents, reports
from adapterhub_converters.runtime_rules import RUNTIMES
from tests.support.folders import adapter, base, pairs

NASTY = 'a, "b": <c> & 100%\x1b[31m\nnext'


@pytest.fixture
def report(tmp_path: Path) -> Report:
    folder = adapter(tmp_path / "sql", pairs(12, r=4), use_dora=True)
    return checks.check(folder, base=base(tmp_path / "base", 12), display_name="out/my sql")


def nasty(severity_code: str = "malformed") -> Report:
    return Report(
        "a b,c:d",
        None if severity_code == "malformed" else "peft",
        None,
        (Problem(severity_code, "adapter_config.json", NASTY, NASTY, "50%"),),
    )


def test_text_groups_by_code_and_ends_with_the_sum(report: Report) -> None:
    lines = list(reports.lines([report]))
    assert lines[0].startswith("out/my sql: peft, r 4, 12 modules")
    assert sum("[rank-config]" in line for line in lines) == 1
    assert any(" and 9 more: rank 4, but " in line for line in lines)
    assert lines[-1] == "not ok: 2 errors in 24 places"


def test_text_shows_layer_2_before_layer_10(report: Report) -> None:
    assert [problem.name for problem in report.problems[:3]] == [f"model.layers.{n}.self_attn.q_proj" for n in range(3)]


@pytest.mark.parametrize("screen", [40, 80, 120])
def test_text_fits_the_screen(report: Report, screen: int) -> None:
    longest = max(reports.lines([report], screen=screen), key=len)
    # A module path is never cut: it would not be the module's name any more.
    assert len(longest) <= max(screen, max(len(word) for word in longest.split()) + 6)


def test_no_renderer_lets_a_control_character_through() -> None:
    for name, render in report_documents.RENDERERS.items():
        assert "\x1b" not in render([nasty()]), name


def test_json_has_every_problem_under_stable_keys(report: Report) -> None:
    whole = json.loads(report_documents.as_json([report]))
    assert (whole["ok"], len(whole["reports"])) == (False, 1)
    assert json.loads(report_documents.as_json([report, report])) == {"ok": False, "reports": whole["reports"] * 2}
    [document] = whole["reports"]
    keys = "ok strict source format base base_facts levels facts problems counts ignored runtimes"
    assert list(document) == keys.split()
    assert len(document["problems"]) == len(report.problems)
    assert list(document["problems"][0]) == ["code", "severity", "file", "name", "what", "expected", "got", "hint"]
    assert list(document["runtimes"]) == list(RUNTIMES)
    assert list(document["runtimes"]["peft"]) == ["version", "verdict", "reasons", "convert_to"]


def test_sarif(report: Report) -> None:
    document = json.loads(report_documents.sarif([report]))
    assert (document["version"], len(document["runs"])) == ("2.1.0", 1)
    run = document["runs"][0]
    rules = run["tool"]["driver"]["rules"]
    assert run["tool"]["driver"]["name"] == "adapterhub"
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        place = result["locations"][0]["physicalLocation"]
        assert place["artifactLocation"]["uri"].startswith("out/my%20sql")
        assert place["region"]["startLine"] >= 1
    assert len({rule["id"] for rule in rules}) == len(rules)


def test_sarif_and_junit_have_one_result_for_each_cause(report: Report) -> None:
    results = json.loads(report_documents.sarif([report]))["runs"][0]["results"]
    counts = [(result["ruleId"], result["occurrenceCount"]) for result in results]
    assert counts == [("rank-config", 12), ("no-magnitude", 12)]
    [location] = results[0]["locations"]
    assert [place["fullyQualifiedName"] for place in location["logicalLocations"]] == [
        f"model.layers.{number}.self_attn.q_proj" for number in range(10)
    ]
    failure = ET.fromstring(report_documents.junit([report])).find(".//failure")
    assert failure is not None
    assert len((failure.text or "").splitlines()) == 11
    assert (failure.text or "").endswith("and 2 more")


def test_every_report_has_each_text_of_a_cause_with_its_count_and_its_first_places() -> None:
    same = [Problem("unsupported", "a.json", f"layers.{n}", f"rank {n}", f"Mend layers.{n}") for n in range(20)]
    other_problems = [Problem("unsupported", "a.json", f"heads.{n}", "another text", "Another hint") for n in range(5)]
    grouped = Report("x", "peft", None, (*same, *other_problems))
    text = (
        "layers.0, layers.1, layers.2 and 17 more: rank 0 to 19. Mend layers.0; "
        "heads.0, heads.1, heads.2 and 2 more: another text. Another hint"
    )
    [result] = json.loads(report_documents.sarif([grouped]))["runs"][0]["results"]
    assert (result["message"]["text"], result["occurrenceCount"]) == (text, 25)
    assert text in report_documents.github([grouped])
    assert text in report_documents.markdown([grouped])
    failure = ET.fromstring(report_documents.junit([grouped])).find(".//failure")
    assert failure is not None
    lines = (failure.text or "").splitlines()
    assert lines[-2:] == ["a.json: heads.0: another text. Another hint", "and 14 more"]


def test_texts_that_all_differ_are_bounded() -> None:
    problems = tuple(Problem("unsupported", "", "", "x" * number) for number in range(1, 1000))
    text = report_documents.github([Report("x", "peft", None, problems)]).splitlines()[0]
    assert text.endswith(f"{'x' * report_documents._TEXTS}; and {999 - report_documents._TEXTS} more")


def test_junit_counts_add_up_and_names_stay(report: Report) -> None:
    suites = ET.fromstring(report_documents.junit([report]))
    (suite,) = suites
    cases = suite.findall("testcase")
    assert int(suite.get("tests", "")) == len(cases) == len(checks.CODES) - len(checks.SCAN)
    assert int(suite.get("failures", "")) == len(suite.findall("testcase/failure")) == 2
    (clean,) = ET.fromstring(report_documents.junit([Report("x", "peft", None, ())]))
    assert [case.get("name") for case in clean] == [case.get("name") for case in cases]


def test_junit_skips_what_was_not_checked(tmp_path: Path, report: Report) -> None:
    def skipped(*reports: Report) -> set[str]:
        cases = ET.fromstring(report_documents.junit(reports)).iter("testcase")
        return {str(case.get("name")).partition(":")[0] for case in cases if case.find("skipped") is not None}

    assert skipped(nasty()) == set(checks.CODES) - checks.SCAN - {"malformed"}
    assert "shape-mismatch" not in skipped(report)
    assert {"unpinned", "runtime", "rank-above-max"} <= skipped(report)
    alone = checks.check(adapter(tmp_path / "alone", pairs(2)), headers_only=True, ignore=["rank-config"])
    assert {"shape-mismatch", "non-finite"} <= skipped(alone)
    assert "rank-config" not in skipped(alone)  # it was checked, and there was none to ignore


def test_github_has_one_annotation_for_each_cause(report: Report) -> None:
    lines = [line for line in report_documents.github([report]).splitlines() if line.startswith("::")]
    assert [line.partition("title=")[2].partition("::")[0] for line in lines] == ["rank-config", "no-magnitude"]
    assert "and 9 more: rank 4, but" in lines[0]


def test_markdown_means_the_text_alone() -> None:
    text = report_documents.markdown([nasty(), Report("good", "peft", None, ())])
    assert "### 2 adapters: 1 not ok" in text
    assert "&lt;c&gt;" in text
    assert "| good | ok |  |  |  |" in text


def test_junit_is_xml_whatever_a_tensor_is_called() -> None:
    failure = ET.fromstring(report_documents.junit([nasty()])).find(".//failure")
    assert failure is not None
    assert "<c> & 100%" in (failure.text or "")


@pytest.mark.parametrize(("code", "level"), [("malformed", "error"), ("does-nothing", "warning"), ("new-head", "notice")])
def test_github_commands_are_escaped(code: str, level: str) -> None:
    line = report_documents.github([nasty(code)]).splitlines()[0]
    assert line.startswith(f"::{level} file=a b%2Cc%3Ad/adapter_config.json,title={code}::")
    message = line.split("::", 2)[2]
    assert "100%25" in message
    assert "50%25" in message


def test_the_command_names_every_format() -> None:
    assert ["text", *report_documents.RENDERERS] == list(validate._FORMATS)


def test_every_report_has_the_number_of_all_problems_where_a_limit_keeps_some(tmp_path: Path) -> None:
    odd = {f"base_model.model.layers.{n}.q_proj.odd": (1, 1) for n in range(reports.SHOWN + 7)}
    report = checks.check(adapter(tmp_path / "a", odd), limit=reports.SHOWN)
    document = report_documents.document(report)
    assert document["counts"]["unknown-tensor"] == reports.SHOWN + 7
    assert [problem["code"] for problem in document["problems"]].count("unknown-tensor") == reports.SHOWN
    assert f"and {reports.SHOWN + 4} more" in report_documents.github([report])
    assert f"and {reports.SHOWN + 4} more" in report_documents.markdown([report])
    assert f"and {reports.SHOWN - 3:,} more" in report_documents.junit([report])
