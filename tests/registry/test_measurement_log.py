"""A measurement is said in the log of a version, found by search, and changes no version."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.index import queries
from adapterhub.index.version_search import Query, parse_metric, search
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc
from adapterhub.manifest import measurement
from adapterhub.manifest.measurement import Evaluation
from adapterhub.ref import Ref
from adapterhub.registry import measurement_log
from adapterhub.registry.registry import Registry
from adapterhub.store.store import Entry
from adapterhub_converters.errors import NotFoundError, RefusedError
from tests.conftest import Run
from tests.support.adapters import Make

SQL = Ref.parse("team/sql")
METRICS = {
    "perplexity": 9.5, "loss": 2.25, "base_perplexity": 12.0, "base_loss": 2.48, "perplexity_ratio": 0.79, "tokens": 640.0,
}  # fmt: skip
DATA = ({"path": "heldout.jsonl", "digest": f"sha256:{1:064}"},)
SAID = Evaluation("eval", METRICS, DATA, {"quantize": "nf4"})


DECLARED = "[training.metrics]\nsql_bleu = 3.0\nsql_loss = 3.0\n"


@pytest.fixture
def registry(make: Make, tmp_path: Path) -> Iterator[Registry]:
    """Two versions."""
    with Registry.init(tmp_path / "registry") as opened:
        for seed in (1, 2):
            opened.push(make(f"a{seed}", seed), SQL)
        yield opened


def v(number: int) -> Ref:
    return Ref("team/sql", number=number)


def refs_within(registry: Registry, bound: str) -> list[str]:
    rows = search(registry.index, Query(metrics=(parse_metric(bound, ""),), all_versions=True)).rows
    return [str(row.ref) for row in rows]


def test_it_is_found_by_its_numbers_shown_and_in_the_log_and_the_version_stays_the_same(registry: Registry) -> None:
    before = registry.resolve(v(1)).digest
    assert measurement_log.record(registry, v(1), SAID)
    assert registry.resolve(v(1)).digest == before
    assert refs_within(registry, "eval_perplexity<10") == ["team/sql:v1"]
    assert refs_within(registry, "eval_perplexity_ratio<0.5") == []
    assert registry.show(v(1))["evaluations"] == [SAID.document()]
    assert registry.show(v(2))["evaluations"] == []
    entry = registry.log(v(1))[0]
    assert (entry.op, entry.number, measurement.parse(entry.message)) == ("evaluate", 1, SAID)


def test_a_search_finds_no_number_of_a_replaced_measurement(registry: Registry, make: Make) -> None:
    """The training's own number, or that of another measurement with the name, is found again."""
    folder = make("trained", 3)
    (folder / "adapter.toml").write_text(DECLARED)
    registry.push(folder, SQL)
    for version in (v(1), v(3)):
        measurement_log.record(registry, version, Evaluation("sql", {"loss": 9.0, "bleu": 9.0, "x_pass": 9.0, "Rouge": 9.0}))
        measurement_log.record(registry, version, Evaluation("sql_x", {"pass": 8.0}))
        measurement_log.record(registry, version, Evaluation("sql", {"loss": 7.0, "rouge": 7.0}))
    for _ in range(2):
        assert [refs_within(registry, f"{name}>=9") for name in ("sql_loss", "sql_bleu", "sql_x_pass", "sql_rouge")] == [[]] * 4
        assert refs_within(registry, "sql_bleu>0") == ["team/sql:v3"]
        assert refs_within(registry, "sql_bleu=3") == ["team/sql:v3"]
        for bound in ("sql_loss=7", "sql_rouge=7", "sql_x_pass=8"):
            assert refs_within(registry, bound) == ["team/sql:v3", "team/sql:v1"]
        assert queries.metrics(registry.index, registry.resolve(v(1)).digest) == {
            "sql_loss": 7.0, "sql_rouge": 7.0, "sql_x_pass": 8.0,
        }  # fmt: skip
        registry.rebuild_index()


def test_the_last_of_a_name_counts_and_the_same_again_is_no_entry(registry: Registry) -> None:
    assert measurement_log.record(registry, v(1), SAID)
    assert not measurement_log.record(registry, v(1), SAID)
    better = Evaluation("eval", {**METRICS, "perplexity": 5.0})
    other_evaluation = Evaluation("sql-test", {"perplexity": 7.0})
    assert measurement_log.record(registry, v(1), better)
    assert measurement_log.record(registry, v(1), other_evaluation)
    assert refs_within(registry, "eval_perplexity<6") == ["team/sql:v1"]
    assert refs_within(registry, "eval_perplexity>6") == []
    assert refs_within(registry, "sql-test_perplexity=7") == ["team/sql:v1"]
    assert registry.show(v(1))["evaluations"] == [better.document(), other_evaluation.document()]


def test_the_rebuilt_index_has_the_same_content(registry: Registry) -> None:
    measurement_log.record(registry, v(1), SAID)
    measurement_log.record(registry, v(2), Evaluation("eval", {"perplexity": 3.0}))
    before = queries.marks(registry.index, "evaluate", "team/sql"), refs_within(registry, "eval_perplexity<10")
    assert registry.rebuild_index() == []
    assert (queries.marks(registry.index, "evaluate", "team/sql"), refs_within(registry, "eval_perplexity<10")) == before
    assert {finding.code for finding in fsck(registry)} <= {"orphans"}


def test_it_goes_with_its_version(registry: Registry) -> None:
    measurement_log.record(registry, v(1), SAID)
    measurement_log.record(registry, v(2), SAID)
    gc(registry, grace=0, last=1)
    assert refs_within(registry, "eval_perplexity<10") == ["team/sql:v2"]
    assert list(queries.marks(registry.index, "evaluate", "team/sql")) == ["2 eval"]
    with pytest.raises(NotFoundError):
        measurement_log.record(registry, v(1), SAID)


def test_an_older_adapterhub_names_such_an_entry() -> None:
    raw = Entry("team/sql", 1, "evaluate", "", message="x").dump()
    assert json.loads(raw)["version"] == 3
    with pytest.raises(RefusedError, match="entry version 9 is newer than version 8, the last supported"):
        Entry.parse(raw.replace(b'"version":3', b'"version":9'), "x")


def test_show_and_log_display_it(run: Run, make: Make, tmp_path: Path) -> None:
    run("init")
    run("push", str(make("a", 1)), "team/sql")
    with Registry.open(tmp_path) as registry:
        measurement_log.record(registry, v(1), SAID)
    assert "evaluated  " in run("show", "team/sql").stdout
    assert "perplexity 9.5, perplexity_ratio 0.79" in run("log", "team/sql").stdout
    assert json.loads(run("search", "--metric", "eval_perplexity<10", "--json").stdout)["total"] == 1
