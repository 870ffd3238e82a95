"""A run of golden tests: each prompt is answered once, or several times at a temperature, and what must hold is checked.

A function answers: an engine on this machine, or an endpoint. The result has the pass rate of each test by name, so that
two versions can be compared test by test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any

from adapterhub_converters.lazy_dataclass import dataclass

from .answer_checks import Commands, check_case, failure
from .test_cases import Case, CaseFile

_MAX_SHOWN = 2000  # characters of an answer that a report repeats


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: Its text.
        is_complete: It ended by itself, and not because of a limit.
    """

    text: str
    is_complete: bool


Answerer = Callable[[Case, int, int], Answer]
"""A function of a test, the most tokens of its answer, and a seed, that returns the answer."""


@dataclass(frozen=True)
class CaseResult:
    """The result of a test.

    Attributes:
        case: The test.
        passed: The number of samples for which all of it held, of `samples`.
        problem: What did not hold of the first wrong answer; empty if all are right.
        answer: That answer, shortened; else the first one.
    """

    case: Case
    passed: int
    samples: int
    problem: str
    answer: str

    @property
    def rate(self) -> float:
        """The share of the samples that are right."""
        return self.passed / self.samples

    @property
    def ok(self) -> bool:
        """Whether as many are right as the test demands."""
        return self.rate >= self.case.pass_rate

    def document(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {
            "id": self.case.id,
            "ok": self.ok,
            "passed": self.passed,
            "samples": self.samples,
            "problem": self.problem,
            "answer": self.answer,
        }


@dataclass(frozen=True)
class TestReport:
    """The results of all tests of a file."""

    # pytest would collect a class with such a name.
    __test__ = False
    file: CaseFile
    results: tuple[CaseResult, ...] = field(default_factory=tuple)

    @property
    def failures(self) -> list[CaseResult]:
        """The results of the tests that failed."""
        return [result for result in self.results if not result.ok]

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics, with the names of `adapterhub.manifest.measurement`.

        `pass_rate` is the share of the right answers: the mean over tests of equally many samples.
        """
        rates = [result.rate for result in self.results]
        return {
            "pass_rate": sum(rates) / len(rates),
            "passed": len(self.results) - len(self.failures),
            "cases": len(self.results),
            "samples": sum(result.samples for result in self.results),
        }

    @property
    def rates(self) -> Mapping[str, float]:
        """The pass rate of each test."""
        return {result.case.id: result.rate for result in self.results}


def run(
    file: CaseFile,
    answer: Answerer,
    *,
    samples: int = 1,
    seed: int = 0,
    max_tokens: int = 256,
    commands: Commands,
    progress: Callable[[int, int], None] | None = None,
) -> TestReport:
    """Answer each test `samples` times and check the answers.

    Args:
        file: The tests; `check` has accepted them.
        answer: Answers one.
        samples: Answers of each test; the seed of each is one higher.
        seed: The seed of the first.
        max_tokens: The most tokens of an answer whose test has no limit of its own.
        commands: The programs that tests may run.
        progress: Called with the number of answers so far and the total.
    """
    results: list[CaseResult] = []
    total = len(file.cases) * samples
    for case in file.cases:
        passed, problem, kept_answer = 0, "", ""
        # One more than the limit tells whether the answer ends within it.
        limit = max_tokens if case.max_tokens is None else case.max_tokens + 1
        for sample in range(samples):
            reply = answer(case, limit, seed + sample)
            reason = failure(case, reply.text, is_complete=reply.is_complete, commands=commands)
            passed += not reason
            if not sample or (reason and not problem):
                kept_answer = reply.text[:_MAX_SHOWN]
            problem = problem or reason
            if progress is not None:
                progress(len(results) * samples + sample + 1, total)
        results.append(CaseResult(case, passed, samples, problem, kept_answer))
    return TestReport(file, tuple(results))


def check(file: CaseFile, commands: Commands) -> None:
    """Raise the errors of `answer_checks.check_case` for all tests, before anything is answered."""
    for case in file.cases:
        check_case(case, file.name, commands)
