"""A report counts all problems, and keeps a few of each code."""

from __future__ import annotations

from pathlib import Path

from adapterhub import checks
from adapterhub.checks.report import Findings, RepeatedProblem
from tests.checks.test_checks import Q0
from tests.support.folders import adapter, pairs


def test_a_limit_keeps_some_problems_of_each_code_and_the_number_of_all(tmp_path: Path) -> None:
    path = adapter(tmp_path / "a", {**pairs(20, r=4), f"{Q0}.lora_E": (2, 1)})
    whole, limited = checks.check(path), checks.check(path, limit=3)
    assert [(group.code, group.count) for group in limited.grouped()] == [(g.code, g.count) for g in whole.grouped()]
    assert limited.counted() == whole.counted()
    assert limited.count(checks.ERROR) == len(whole.problems)
    assert {code: sum(problem.code == code for problem in limited.problems) for code in whole.counted()} == {
        code: min(count, 3) for code, count in whole.counted().items()
    }
    assert {name: verdict.verdict for name, verdict in limited.verdicts.items()} == {
        name: verdict.verdict for name, verdict in whole.verdicts.items()
    }


def test_problems_beyond_a_limit_are_counted_and_never_made() -> None:
    names = []

    def problem(name: str) -> checks.Problem:
        names.append(name)
        return checks.Problem("token-rows", "", name, "")

    findings = Findings(3)
    findings.add(
        [
            problem("a"),
            RepeatedProblem("token-rows", [str(n) for n in range(300_000)], problem),
            RepeatedProblem("bias-flag", [], problem),
        ]
    )
    assert findings.counts == {"token-rows": 300_001}
    assert [problem.name for problem in findings.by_code["token-rows"]] == names == ["a", "0", "1"]
