"""A run of golden tests counts samples and tests, keeps what failed first, and is JUnit's XML for others."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from adapterhub.evidence import golden_tests, junit_report
from adapterhub.evidence.golden_tests import Answer
from adapterhub.evidence.test_cases import Case, CaseFile

ASKED = ({"role": "user", "content": "?"},)
FILE = CaseFile(
    "golden.jsonl",
    "sha256:" + "1" * 64,
    (
        Case("always", ASKED, contains=("a",)),
        Case("half", ASKED, equals="0", pass_rate=0.5),
        Case("never <&>", ASKED, equals="\x00", max_tokens=3),
    ),
)


def answer(case: Case, limit: int, seed: int) -> Answer:
    assert limit == (4 if case.max_tokens else 256)
    return {"always": Answer("abc", True), "half": Answer(str(seed % 2), True)}.get(case.id, Answer("\x00]]>", False))


def test_rates_are_of_samples_and_a_test_passes_by_its_own() -> None:
    steps: list[tuple[int, int]] = []
    report = golden_tests.run(FILE, answer, samples=4, commands={}, progress=lambda *step: steps.append(step))
    assert report.metrics == {"pass_rate": 0.5, "passed": 2, "cases": 3, "samples": 12}
    assert report.rates == {"always": 1.0, "half": 0.5, "never <&>": 0.0}
    [failed] = report.failures
    assert (failed.case.id, failed.problem, failed.answer) == ("never <&>", "does not end within 3 tokens", "\x00]]>")
    assert (report.results[1].problem, report.results[1].answer) == ("is '1', not '0'", "1")
    assert (steps[0], steps[-1], len(steps)) == ((1, 12), (12, 12), 12)


def test_junit_names_the_version_and_escapes_what_a_model_says() -> None:
    text = junit_report.render(golden_tests.run(FILE, answer, commands={}), version="team/sql@sha256:00")
    [suite] = ET.fromstring(text)
    assert suite.attrib == {"name": "golden.jsonl", "tests": "3", "failures": "1"}
    properties = {entry.attrib["name"]: entry.attrib["value"] for entry in suite.iter("property")}
    assert properties == {"adapterhub.version": "team/sql@sha256:00", "adapterhub.tests": FILE.digest}
    failed = suite.findall("testcase")[2]
    assert failed.attrib["name"] == "never <&>"
    assert (failed[0].attrib["message"], failed[0].text) == ("does not end within 3 tokens", "\ufffd]]>")
