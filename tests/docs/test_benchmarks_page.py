"""`make bench`: what was measured is kept, a peer that is missing is listed so, and the page has nothing else."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support import pages

sys.path.insert(0, str(ROOT / "benchmarks"))
import _run

OURS = {"figures": {"seconds": 0.5, "peak MB": 49.0}, "ratios": {}}
THEIRS = {"figures": {"seconds": 8.0, "peak MB": 354.0}, "ratios": {"seconds": 16.0, "peak MB": 7.2}}
REPORT: dict[str, Any] = {
    "commit": "c0ffee", "options": [], "date": "2026-11-26", "machine": "2 × EPYC", "versions": {"torch": "2.13.0"},
    "sizes": {"rank": 16, "full": False},
    "results": [
        {
            "job": "convert", "detail": "r = 16", "claims": {"the tensors are equal": True},
            "programs": {"adapterhub": OURS, "theirs | slow": THEIRS, "oras": {"missing": "oras"}},
        }
    ],
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_run, "RESULTS", tmp_path)
    monkeypatch.setattr(_run, "commit", lambda: "c0ffee")
    return tmp_path


def test_the_page_has_the_ratios_and_keeps_the_text_around_them(results: Path) -> None:
    (results / "convert.json").write_text(json.dumps(REPORT))
    page = _run.written(f"# Before\n{_run.BEGIN}old\n{_run.END}after\n", results)
    assert page.startswith(f"# Before\n{_run.BEGIN}### Summary\n")
    assert "| convert: r = 16 | theirs \\| slow |  | 16× | 49, 354 |" in page
    assert page.endswith(f"{_run.END}after\n")
    assert "old" not in page
    assert _run.written(page, results) == page


def test_a_ratio_that_fell_by_more_than_a_tenth_since_the_last_run_with_the_same_options_is_marked(results: Path) -> None:
    slower = copy.deepcopy(REPORT)
    _run.add_last_ratios(slower, REPORT)
    assert [str(row) for row in _run.rows({"convert": slower})] == ["convert: r = 16, theirs | slow: 16× -> 16×"]
    slower["results"][0]["programs"]["theirs | slow"]["ratios"]["seconds"] = 14.3
    assert [str(row) for row in _run.rows({"convert": slower})] == ["convert: r = 16, theirs | slow: 16× -> 14× ▼"]
    (results / "convert.json").write_text(json.dumps(slower))
    page = _run.written(_run.BEGIN + _run.END, results)
    assert "| convert: r = 16 | theirs \\| slow | 16× | 14× ▼ | 49, 354 |" in page

    other_options = copy.deepcopy(REPORT)
    _run.add_last_ratios(other_options, {**REPORT, "options": ["--smoke"]})
    assert other_options == REPORT


def test_the_last_run_is_the_one_that_the_commit_has() -> None:
    assert _run.committed_report("convert")["results"]
    assert _run.committed_report("no-such-script") == {}


def test_the_tables_have_every_figure_and_what_is_missing(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "convert.json").write_text(json.dumps(REPORT))
    tables = _run.tables(results)
    assert tables.startswith("### convert\n")
    assert "on 2026-11-26, 2 × EPYC; rank 16.\nWith torch 2.13.0." in tables
    assert "| theirs \\| slow | 8 | 354 | 16× | ▇▇▇▇▇▇▇ |" in tables
    assert "| oras | missing: oras | | | |" in tables
    assert "The tensors are equal: yes." in tables
    assert (_run.main(["--tables"]), capsys.readouterr().out) == (0, tables)


def test_only_what_this_commit_has_not_measured_with_these_options_is_measured(results: Path) -> None:
    (results / "convert.json").write_text(json.dumps(REPORT))
    assert _run.is_done("convert", [])
    assert not _run.is_done("convert", ["--smoke"])
    assert not _run.is_done("merge", [])
    (results / "convert.json").write_text(json.dumps({**REPORT, "commit": "another"}))
    assert not _run.is_done("convert", [])


def test_a_script_that_is_named_is_measured_again_and_an_unknown_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run.split(["convert", "--", "--smoke"]) == (["convert"], ["--smoke"])
    assert _run.main(["convrt"]) == 2
    assert "convrt: no such script; there are convert, " in capsys.readouterr().err


def test_the_page_of_this_repository_is_that_of_its_results() -> None:
    page = pages.page("benchmarks.md")
    assert _run.written(page, ROOT / "benchmarks/results") == page


def test_the_errors_of_rollouts_that_the_page_on_releases_states_are_those_that_were_simulated() -> None:
    report = json.loads((ROOT / "benchmarks/results/rollout.json").read_text())
    figures = {result["detail"]: result["programs"]["adapterhub"]["figures"] for result in report["results"]}
    page = pages.page("release.md")
    assert f"In {report['sizes']['seeds']} simulated rollouts" in page
    for drop in (2, 5, 20):
        cleared, noticed = figures[f"no worse, for a drop of {drop} points"], figures[f"worse by {drop} points"]
        cells = [f"{round(row['% wrong'], 1):g} %" for row in (cleared, noticed)]
        cells += [f"{int(noticed[column]):,}" for column in ("pairs", "requests")]
        cells += [f"{int(cleared[column]):,}" for column in ("pairs", "pairs planned")]
        assert f"| `errors = {drop}` | {' | '.join(cells)} |" in page
