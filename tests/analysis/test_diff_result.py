"""A difference as a whole: whether two adapters are the same function or the same version, and how much they differ."""

from __future__ import annotations

import math

import pytest

from adapterhub.analysis.diff_result import Difference, KeyChange, ModuleChange, Side, Status, TensorChange

DIGESTS = (f"sha256:{'a' * 64}", f"sha256:{'b' * 64}")


def module(status: Status, size: float | None = 4.0, distance: float | None = 0.0) -> ModuleChange:
    side = Side("LowRank", (8, 8), 2, 4.0, False, 2.0, "F32", size)
    return ModuleChange("layers.0.q_proj", status, side, side, distance=distance)


@pytest.mark.parametrize(
    ("statuses", "same", "identical"),
    [
        (["same"], True, True),
        (["same", "rounded"], True, False),
        (["same", "changed"], False, False),
        (["unknown"], False, False),
    ],
)
def test_rounding_leaves_the_function_the_same_and_not_the_numbers(statuses: list[Status], same: bool, identical: bool) -> None:
    of_modules = Difference(tuple(map(module, statuses)))
    of_tensors = Difference(tensors=tuple(TensorChange("lm_head.weight", status) for status in statuses))
    for difference in (of_modules, of_tensors):
        assert (difference.same, difference.identical) == (same, identical)


def test_a_condition_makes_another_function_of_equal_numbers() -> None:
    difference = Difference((module("same"),), conditions=(KeyChange("init_lora_weights", None, "pissa", semantic=True),))
    assert not difference.same
    assert not difference.identical


def test_the_change_is_relative_to_all_of_the_first_adapter() -> None:
    modules = module("changed", 3.0, 1.0), module("changed", 4.0, 2.0), module("added", None, 2.0)
    assert Difference(modules).change == pytest.approx(math.hypot(1, 2, 2) / 5)
    assert Difference((*modules, module("unknown", None, None))).change is None
    assert Difference((module("same"),)).change == Difference().change == 0.0


def test_only_equal_digests_are_the_same_version() -> None:
    assert Difference(digests=(DIGESTS[0], DIGESTS[0])).same_version
    assert not Difference(digests=DIGESTS).same_version
    assert not Difference(digests=("", "")).same_version


def test_it_is_shown_as_counts_of_what_differs() -> None:
    difference = Difference((module("same"), module("changed"), module("changed")), names=("team/sql:v1", "team/sql:v2"))
    assert repr(difference) == "<Difference team/sql:v1 -> team/sql:v2: 2 modules>"
    assert repr(Difference()) == "<Difference : none>"
    assert difference.count("changed") == 2
