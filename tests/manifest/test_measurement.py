"""Measurements are read from messages, and wrong numbers are left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.index import queries
from adapterhub.manifest import measurement
from adapterhub.registry.registry import Registry
from adapterhub.store.store import Entry
from adapterhub_converters.errors import UsageError
from tests.registry.test_measurement_log import SAID, SQL, v
from tests.support.adapters import Make


@pytest.fixture
def registry(make: Make, tmp_path: Path) -> Iterator[Registry]:
    """Two versions."""
    with Registry.init(tmp_path / "registry") as opened:
        for seed in (1, 2):
            opened.push(make(f"a{seed}", seed), SQL)
        yield opened


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


@pytest.mark.parametrize(
    ("evaluation", "recorder"),
    [
        (measurement.Evaluation("gsm8k", {"acc": 0.5}, base={"tool": "lm-eval", "version": "0.4.9"}), "lm-eval 0.4.9"),
        (measurement.Evaluation("gsm8k", {"acc": 0.5}, base={"tool": "junit", "version": ""}), "junit"),
        (measurement.reported_evaluation({"acc": 0.5}, "here"), "owner"),
        (measurement.Evaluation("eval", {"acc": 0.5}, base={"quantize": "nf4"}), "adapterhub"),
    ],
)
def test_an_evaluation_names_who_measured(evaluation: measurement.Evaluation, recorder: str) -> None:
    line = f"{evaluation.name}: acc 0.5 (recorded by {recorder})"
    assert measurement.summary_line(evaluation.dump()) == line
