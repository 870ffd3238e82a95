"""A measurement is said in the log of a version, found by search, and changes no version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.index import queries
from adapterhub.index.version_search import Query, parse_metric, search
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc
from adapterhub.manifest import measurement
from adapterhub.manifest.measurement import Evaluation
from adapterhub.ref import Ref
from adapterhub.registry import measurement_log
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import metric_gates
from adapterhub.store.store import Entry
from adapterhub_converters.errors import NotFoundError, RefusedError, UsageError
from tests.conftest import Run
from tests.support.adapters import Make

SQL = Ref.parse("team/sql")
METRICS = {
    "perplexity": 9.5, "loss": 2.25, "base_perplexity": 12.0, "base_loss": 2.48, "perplexity_ratio": 0.79, "tokens": 640.0,
}  # fmt: skip
DATA = ({"path": "heldout.jsonl", "digest": f"sha256:{1:064}"},)
SAID = Evaluation("eval", METRICS, DATA, {"quantize": "nf4"})


@pytest.fixture
def registry(make: Make, tmp_path: Path) -> Iterator[Registry]:
    """Two versions."""
    with Registry.init(tmp_path / "registry") as made:
        for seed in (1, 2):
            made.push(make(f"a{seed}", seed), SQL)
        yield made


def v(number: int) -> Ref:
    return Ref("team/sql", number=number)


def found(registry: Registry, bound: str) -> list[str]:
    rows = search(registry.index, Query(metrics=(parse_metric(bound, ""),), all_versions=True)).rows
    return [str(row.ref) for row in rows]


def test_it_is_found_by_its_numbers_shown_and_in_the_log_and_the_version_stays_the_same(registry: Registry) -> None:
    before = registry.resolve(v(1)).digest
    assert measurement_log.record(registry, v(1), SAID)
    assert registry.resolve(v(1)).digest == before
    assert found(registry, "eval_perplexity<10") == ["team/sql:v1"]
    assert found(registry, "eval_perplexity_ratio<0.5") == []
    assert registry.show(v(1))["evaluations"] == [SAID.document()]
    assert registry.show(v(2))["evaluations"] == []
    entry = registry.log(v(1))[0]
    assert (entry.op, entry.number, measurement.parse(entry.message)) == ("evaluate", 1, SAID)


def test_the_last_of_a_name_counts_and_the_same_again_is_no_entry(registry: Registry) -> None:
    assert measurement_log.record(registry, v(1), SAID)
    assert not measurement_log.record(registry, v(1), SAID)
    better = Evaluation("eval", {**METRICS, "perplexity": 5.0})
    other = Evaluation("sql-test", {"perplexity": 7.0})
    assert measurement_log.record(registry, v(1), better)
    assert measurement_log.record(registry, v(1), other)
    assert found(registry, "eval_perplexity<6") == ["team/sql:v1"]
    assert found(registry, "eval_perplexity>6") == []
    assert found(registry, "sql-test_perplexity=7") == ["team/sql:v1"]
    assert registry.show(v(1))["evaluations"] == [better.document(), other.document()]


def test_the_rebuilt_index_has_the_same_content(registry: Registry) -> None:
    measurement_log.record(registry, v(1), SAID)
    measurement_log.record(registry, v(2), Evaluation("eval", {"perplexity": 3.0}))
    before = queries.marks(registry.index, "evaluate", "team/sql"), found(registry, "eval_perplexity<10")
    assert registry.rebuild_index() == []
    assert (queries.marks(registry.index, "evaluate", "team/sql"), found(registry, "eval_perplexity<10")) == before
    assert {finding.code for finding in fsck(registry)} <= {"orphans"}


def test_it_goes_with_its_version(registry: Registry) -> None:
    measurement_log.record(registry, v(1), SAID)
    measurement_log.record(registry, v(2), SAID)
    gc(registry, grace=0, last=1)
    assert found(registry, "eval_perplexity<10") == ["team/sql:v2"]
    assert list(queries.marks(registry.index, "evaluate", "team/sql")) == ["2 eval"]
    with pytest.raises(NotFoundError):
        measurement_log.record(registry, v(1), SAID)


@pytest.mark.parametrize(
    "message", ["", "none", "[]", '{"name": "../x", "metrics": {}, "data": [], "base": {}}', '{"name": "eval"}', "[" * 10_000]
)
def test_a_malformed_message_is_skipped(registry: Registry, message: str) -> None:
    state = queries.name(registry.index, "team/sql")
    entry = Entry("team/sql", state.seq + 1, "evaluate", "2026-01-01T00:00:00Z", number=1, previous=state.head, message=message)
    registry.move("team/sql", lambda _: entry)
    assert registry.show(v(1))["evaluations"] == []


def test_invalid_numbers_are_left_out() -> None:
    text = SAID.dump().replace("9.5", '"9.5"').replace("2.25", "1e308").replace('"tokens"', '"to kens"')
    read = measurement.parse(text)
    assert read is not None
    assert set(read.metrics) == {"base_perplexity", "base_loss", "perplexity_ratio"}


def test_an_older_adapterhub_names_such_an_entry() -> None:
    raw = Entry("team/sql", 1, "evaluate", "", message="x").dump()
    assert json.loads(raw)["version"] == 3
    with pytest.raises(RefusedError, match="entry version 8 is newer than version 7, the last supported"):
        Entry.parse(raw.replace(b'"version":3', b'"version":8'), "x")


def test_gates() -> None:
    expected = {"ppl<12": True, "ppl<9.5": False, "ppl/base<0.8": True, "loss >= 2.25": True, "tokens=640": True}
    for text, passes in expected.items():
        assert metric_gates.parse_gate(text, "--gate").passes(METRICS) is passes, text
    with pytest.raises(UsageError, match="'bleu' is not measured. Choose one of ppl, perplexity, loss"):
        metric_gates.parse_gate("bleu>0.8", "--gate")
    with pytest.raises(UsageError, match="'a b' is not a valid name for an evaluation"):
        measurement.check_name("a b", "--name")


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ({f"m{n}": 1.0 for n in range(101)}, "over 100 metrics. Report the most important ones"),
        (
            {"exact match": 1.0},
            "'exact match' is not a valid name for a metric. Use letters, digits, ., - and _, as in exact_match",
        ),
        ({"loss": float("nan")}, "loss=nan is not a number. Write NAME=VALUE, as in exact_match=0.71"),
    ],
)
def test_what_another_program_measured_is_checked_before_the_version_is_stored(
    registry: Registry, make: Make, metrics: dict[str, float], words: str
) -> None:
    with pytest.raises(UsageError) as error:
        ah.push(make("a3", 3), "team/sql", metrics=metrics, workspace=ah.Workspace(registry=registry.root))
    assert str(error.value) == f"team/sql: {words}"
    assert queries.name(registry.index, "team/sql").seq == 2


def test_show_and_log_display_it(run: Run, make: Make, tmp_path: Path) -> None:
    run("init")
    run("push", str(make("a", 1)), "team/sql")
    with Registry.open(tmp_path) as registry:
        measurement_log.record(registry, v(1), SAID)
    assert "evaluated  " in run("show", "team/sql").stdout
    assert "perplexity 9.5, perplexity_ratio 0.79" in run("log", "team/sql").stdout
    assert json.loads(run("search", "--metric", "eval_perplexity<10", "--json").stdout)["total"] == 1
