"""Two versions on the same tests: exact p-values, intervals that keep their word, and no verdict from too few tests."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from adapterhub.evidence.golden_tests import CaseResult, TestReport
from adapterhub.evidence.paired_tests import compare, mcnemar, parse_claim
from adapterhub.evidence.test_cases import Case, CaseFile
from adapterhub_converters.errors import RefusedError


def report(passed: list[bool]) -> TestReport:
    results = tuple(CaseResult(Case(f"t{number}", ()), int(ok), 1, "", "") for number, ok in enumerate(passed))
    return TestReport(CaseFile("t", "", ()), results)


def verdict(text: str, ours: list[bool], theirs: list[bool]) -> tuple[bool, str]:
    claim = parse_claim(text)
    assert claim is not None
    return claim.verdict(compare(report(ours), report(theirs)))


def test_flipped_tests_are_named_and_the_p_value_is_that_of_the_binomial_distribution() -> None:
    pair = compare(report([True, True, False, False]), report([True, False, True, False]))
    assert (pair.better, pair.worse, pair.difference, pair.p_value) == (("t1",), ("t2",), 0.0, 1.0)
    # 2 * (1/2)^5; 2 * (1 + 10) / 2^10
    for better, worse, p_value in ((0, 0, 1.0), (5, 0, 0.0625), (1, 9, 0.021484375)):
        assert mcnemar(better, worse) == pytest.approx(p_value, rel=1e-12)


def test_reports_on_a_file_that_changed_in_between_are_not_compared() -> None:
    changed = dataclasses.replace(report([True]), file=CaseFile("t.jsonl", "sha256:other", ()))
    with pytest.raises(RefusedError, match="was changed while its tests were answered") as error:
        compare(report([True]), changed)
    assert error.value.code == "changed-meanwhile"


def test_too_few_tests_cannot_tell_and_say_how_many_could() -> None:
    same = [True] * 40
    holds, reason = verdict("pass>=against", same, same)
    assert not holds
    assert reason.startswith("cannot tell yet: 40 of about ")
    assert reason.endswith("needed (+0.0%, 95 % interval -4.7% to +4.7%)")
    needed = int(reason.split()[6])
    assert verdict("pass>=against", same[:1] * needed, same[:1] * needed)[0]
    assert not verdict("pass>=against", same[:1] * (needed * 9 // 10), same[:1] * (needed * 9 // 10))[0]
    assert verdict("pass>=against", [True] * 300, [True] * 300)[0]
    assert verdict("pass>against", same, same)[1].startswith("cannot tell yet: 40 of over 100,000 needed")


def test_a_claim_holds_or_fails_by_the_whole_interval() -> None:
    theirs = [number % 2 == 0 for number in range(400)]
    better = [number % 2 == 0 or number % 4 == 1 for number in range(400)]
    assert verdict("pass>against", better, theirs)[0]
    assert verdict("pass>=against", theirs, better) == (False, "-25.0%, 95 % interval -29.1% to -20.6%")
    assert verdict("pass>=against-0.3", theirs, better)[0]


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    random = np.random.Generator(np.random.PCG64(1))
    for count, better, worse in ((50, 0.02, 0.02), (100, 0.05, 0.1), (300, 0.1, 0.02)):
        covered = 0
        for _ in range(400):
            drawn = random.random(count)
            ours, theirs = (drawn < better), (drawn > 1 - worse)
            pair = compare(report(ours.tolist()), report(theirs.tolist()))
            covered += pair.low <= better - worse <= pair.high
        assert covered >= 0.92 * 400, (count, better, worse, covered)


@pytest.mark.parametrize(
    "text", ["pass>=0.9", "pass<=against", "pass>=against+1", "pass>=against-x", "pass>=against-2", "pass>=against-"]
)
def test_other_gates_are_no_claim(text: str) -> None:
    assert parse_claim(text) is None
