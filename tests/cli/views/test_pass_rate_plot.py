"""The pass rates of a name's versions: the latest count, other tests are another line, and `show --plot` draws them."""

from __future__ import annotations

from pathlib import Path

from adapterhub.cli.views.pass_rate_plot import PassRates, pass_rates
from adapterhub.manifest.measurement import Evaluation
from adapterhub.store.ref_log import Entry
from tests.conftest import Run, need_module
from tests.support.folders import adapter, pairs

OLD_TESTS, NEW_TESTS = "sha256:" + "1" * 64, "sha256:" + "2" * 64
JUNIT = '<testsuite name="golden"><testcase name="berlin"/><testcase name="parses"><failure/></testcase></testsuite>'


def evaluated(seq: int, number: int, tests: str, **metrics: float) -> Entry:
    message = Evaluation("tests", metrics, ({"path": "golden.jsonl", "digest": tests},)).dump()
    return Entry("team/sql", seq, "evaluate", "2026-12-01T00:00:00Z", number=number, message=message)


def test_the_latest_result_of_a_version_counts_and_other_tests_are_another_line() -> None:
    log = [
        evaluated(6, 3, NEW_TESTS, pass_rate=0.9),
        evaluated(5, 2, OLD_TESTS, pass_rate=0.75),
        evaluated(4, 1, OLD_TESTS, pass_rate=0.5),
        evaluated(3, 2, OLD_TESTS, pass_rate=0.25),
        Entry("team/sql", 2, "push", "2026-12-01T00:00:00Z", number=2),
    ]
    assert pass_rates(log) == [PassRates("tests", {1: 0.5, 2: 0.75}), PassRates("tests", {3: 0.9})]


def test_what_is_no_pass_rate_is_left_out() -> None:
    log = [evaluated(3, 3, OLD_TESTS, pass_rate=7), evaluated(2, 2, OLD_TESTS, perplexity=9)]
    garbage = Entry("team/sql", 1, "evaluate", "2026-12-01T00:00:00Z", number=1, message="{")
    assert pass_rates([*log, garbage]) == []


def height(png: Path) -> int:
    return int.from_bytes(png.read_bytes()[20:24])


def test_show_draws_the_pass_rates_below_the_norms(run: Run, tmp_path: Path) -> None:
    need_module("matplotlib")
    adapter(tmp_path / "a", pairs(3))
    run("push", "a", "team/sql")
    run("show", "team/sql", "--plot", "norms.png")
    (tmp_path / "golden.xml").write_text(JUNIT)
    run("eval", "team/sql", "--import", "golden.xml", "--trust-name")
    run("show", "team/sql", "--plot", "both.png")
    assert height(tmp_path / "both.png") - height(tmp_path / "norms.png") == 330  # 2.2 inches
