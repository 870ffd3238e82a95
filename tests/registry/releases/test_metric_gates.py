"""A gate is met by the last number of its metric, within its bound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.manifest import measurement
from adapterhub.manifest.measurement import Evaluation
from adapterhub.registry import measurement_log
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import metric_gates
from adapterhub_converters.errors import RefusedError, UsageError
from tests.registry.releases.test_tag_requirements import GOOD, PROD, SQL, prod, require, requirement, v
from tests.registry.test_measurement_log import METRICS
from tests.support.adapters import Make


def test_gates() -> None:
    expected = {"ppl<12": True, "ppl<9.5": False, "ppl/base<0.8": True, "loss >= 2.25": True, "tokens=640": True}
    for text, passes in expected.items():
        assert metric_gates.parse_gate(text, "--gate").passes(METRICS) is passes, text
    with pytest.raises(UsageError, match="'bleu' is not measured. Choose one of ppl, perplexity, loss"):
        metric_gates.parse_gate("bleu>0.8", "--gate")
    with pytest.raises(UsageError, match="'a b' is not a valid name for an evaluation"):
        measurement.check_name("a b", "--name")


@pytest.fixture
def registry(tmp_path: Path, make: Make) -> Iterator[Registry]:
    """Three versions by ana, the first of which is prod."""
    with Registry.init(tmp_path / "registry") as opened:
        opened.author = "ana"
        for seed in (1, 2, 3):
            opened.push(make(f"a{seed}", seed), PROD if seed == 1 else SQL)
        yield opened


@pytest.mark.parametrize(
    ("metrics", "gate", "value", "is_met"),
    [
        (
            {"pass_rate": 0.975, "cases": 40.0},
            "pass>=0.95",
            "cannot tell yet: 40 of about 300 needed (0.975 so far)",
            False,
        ),
        ({"pass_rate": 0.9, "cases": 40.0}, "pass>=0.95", "0.9 (40 samples)", False),
        ({"pass_rate": 1.0, "cases": 100.0}, "pass>=0.95", "1 (100 samples)", True),
        ({"pass_rate": 1.0, "cases": 3.0}, "pass>=1", "1 (3 samples)", True),
        ({"perplexity": 9.5}, "ppl<12", "9.5", True),
        ({"exact_match": 0.71, "exact_match_stderr": 0.02, "samples": 500.0}, "exact_match>0.6", "0.71 (500 samples)", True),
        ({"loss": 1.0}, "ppl<12", "perplexity was not measured", False),
    ],
)
def test_a_gate_holds_by_the_last_record_if_there_are_enough_samples(
    metrics: dict[str, float], gate: str, value: str, is_met: bool, registry: Registry
) -> None:
    require(registry, f'eval = {{ tests = "{gate}" }}')
    assert (requirement(registry).rule, requirement(registry).value) == ("eval.tests", "was not measured")
    measurement_log.record(registry, v(2), Evaluation("tests", metrics))
    assert (requirement(registry).value, requirement(registry).is_met) == (value, is_met)
    assert requirement(registry).evidence == "log entry 4"
    assert not requirement(registry, 3).is_met  # the record is of these bytes only


def test_a_gate_against_the_tag_compares_the_same_tests_of_both_versions(registry: Registry) -> None:
    require(registry, 'eval = { tests = "pass>=against" }')
    measurement_log.record(registry, v(2), GOOD)
    assert requirement(registry).value == "v1, which it means now, was not measured"
    measurement_log.record(registry, v(1), Evaluation("tests", {}, cases={"other": 1.0}))
    assert requirement(registry).value == "v1 was measured on other tests"
    worse = {f"t{n}": float(n > 20) for n in range(100)}
    measurement_log.record(registry, v(1), Evaluation("tests", {}, cases=worse))
    assert requirement(registry).is_met
    assert requirement(registry).evidence == "log entry 4, log entry 6"
    measurement_log.record(registry, v(3), Evaluation("tests", {}, cases=worse))
    registry.tag(v(2), "prod")
    assert not requirement(registry, 3).is_met


def test_a_gate_against_a_tag_that_was_removed_compares_with_what_it_meant_last(registry: Registry, make: Make) -> None:
    require(registry, 'eval = { tests = "pass>=against" }')
    worse = Evaluation("tests", {}, cases={f"t{n}": float(n > 20) for n in range(100)})
    for number, measured in ((1, GOOD), (2, worse)):
        measurement_log.record(registry, v(number), measured)
    before = requirement(registry)
    registry.rm(PROD)
    assert (requirement(registry), before.is_met) == (before, False)
    with pytest.raises(RefusedError, match="eval.tests"):
        registry.tag(v(2), "prod")
    with pytest.raises(RefusedError, match="eval.tests: was not measured"):
        registry.push(make("a4", 4), PROD)
    assert requirement(registry, 1).value == "is what prod meant last"
    registry.tag(v(1), "prod")
    assert prod(registry) == 1


def test_a_gate_that_cannot_be_read_is_not_met(registry: Registry) -> None:
    require(registry, 'eval = { tests = "pass is good" }')
    assert not requirement(registry).is_met
    assert requirement(registry).value.startswith("cannot be read: ")
