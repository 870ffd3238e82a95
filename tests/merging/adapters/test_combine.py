"""Adapters into an adapter: the factor algebra against dense matrices, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.merging import METHODS, combine
from adapterhub_converters.adapter import Adapter, LowRankEmbedding, Meta, Rows
from adapterhub_converters.errors import AdapterhubError
from tests.merging.factored import adapter, dense, low_rank

terms = st.lists(st.tuples(st.integers(1, 6), st.floats(-2, 2), st.booleans(), st.floats(0.1, 64)), min_size=1, max_size=4)


@given(terms=terms, m=st.integers(1, 20), n=st.integers(1, 20), method=st.sampled_from(["cat", "linear"]))
@settings(max_examples=60, deadline=None)
def test_cat_and_linear_are_the_weighted_sum(terms: Any, m: int, n: int, method: str) -> None:
    deltas = [low_rank(r, m, n, seed, alpha=alpha, rslora=rslora) for seed, (r, _, rslora, alpha) in enumerate(terms)]
    weights = [weight for _, weight, _, _ in terms]
    expected = sum(weight * dense(delta) for weight, delta in zip(weights, deltas, strict=True))
    result, report = combine([adapter(q=delta) for delta in deltas], weights, method=method)
    scale = sum(abs(weight) * np.abs(dense(delta)).max() for weight, delta in zip(weights, deltas, strict=True))
    np.testing.assert_allclose(dense(result.deltas["q"]), expected, atol=1e-6 * scale + 1e-30)
    assert result.deltas["q"].scaling == 1.0
    if method == "linear":
        assert report.modules["q"].rank <= max(1, min(m, n))


@given(ranks=st.lists(st.integers(1, 6), min_size=2, max_size=3), keep=st.integers(1, 8), m=st.integers(2, 20))
@settings(max_examples=60, deadline=None)
def test_svd_is_as_close_as_any_matrix_of_its_rank(ranks: list[int], keep: int, m: int) -> None:
    deltas = [low_rank(r, m, 11, seed) for seed, r in enumerate(ranks)]
    expected = sum(dense(delta) for delta in deltas)
    result, report = combine([adapter(q=delta) for delta in deltas], [1.0] * len(deltas), method="svd", rank=keep)
    values = np.linalg.svd(expected, compute_uv=False)
    best = np.sqrt(np.sum(values[keep:] ** 2)) / np.sqrt(np.sum(values**2))
    error = np.linalg.norm(dense(result.deltas["q"]) - expected) / np.linalg.norm(expected)
    assert result.deltas["q"].r <= keep
    assert error == pytest.approx(best, abs=1e-6)
    assert report.error == pytest.approx(error, abs=1e-7)


def test_the_same_adapter_twice_needs_no_more_rank() -> None:
    same_adapter = adapter(q=low_rank(4))
    result, report = combine([same_adapter, same_adapter], [0.25, 0.75], method="linear")
    assert result.deltas["q"].r == 4
    assert report.error < 1e-6
    assert report.modules["q"].cosines[0][1] == pytest.approx(1)


def test_an_adapter_minus_itself_is_nothing() -> None:
    same_adapter = adapter(q=low_rank(4))
    for method in [name for name, method in METHODS.items() if method.sums and method.count[1] > 1]:
        result, _ = combine([same_adapter, same_adapter], [1, -1], method=method)
        assert np.abs(dense(result.deltas["q"])).max() < 1e-5


def test_modules_that_come_out_as_zero_are_reported() -> None:
    first, opposite = low_rank(4), low_rank(4, alpha=-3.0)
    _, report = combine([adapter(q=first, k=first), adapter(q=opposite, k=first)], [1, 1], method="model_stock")
    assert report.notes == ("1 of 2 modules became zero, for example q",)


def test_notes_on_the_adapters_appear_once_in_the_merge() -> None:
    first, second = (dataclasses.replace(adapter(q=low_rank(4, seed=seed)), notes=("is odd",)) for seed in (0, 1))
    _, report = combine([first, second], [1, 1], method="linear")
    assert report.notes == ("is odd",)


def test_karcher_takes_the_mean_length_over_adapters_that_lack_the_module_too() -> None:
    shared = low_rank(4)
    result, _ = combine([adapter(q=shared), adapter(k=shared)], [1, 3], method="karcher")
    np.testing.assert_allclose(dense(result.deltas["q"]), dense(shared) / 4, atol=1e-6)


def test_modules_that_one_adapter_lacks_keep_the_other(tmp_path: Any) -> None:
    embedding = LowRankEmbedding(np.ones((2, 30), np.float32), np.ones((8, 2), np.float32), alpha=1)
    result, report = combine(
        [adapter(q=low_rank(2), e=embedding), adapter(q=low_rank(3, seed=1), k=low_rank(5))], [1, 0.5], method="svd"
    )
    assert {target: delta.r for target, delta in result.deltas.items()} == {"q": 3, "e": 1, "k": 5}
    assert report.modules["q"].ranks == (2, 3)
    assert report.modules["k"].error < 1e-6
    assert result.meta == Meta(base_model="b")


def test_default_rank_is_the_largest_of_the_module() -> None:
    result, report = combine([adapter(q=low_rank(2)), adapter(q=low_rank(5, seed=1))], [1, 1], method="svd")
    assert result.deltas["q"].r == 5
    assert 0 < report.error < 1


PLAIN = adapter(q=low_rank(2))
VECTOR = np.ones(12, np.float32)


@pytest.mark.parametrize(
    ("second", "arguments", "says"),
    [
        (adapter(q=low_rank(2, magnitude=VECTOR)), {}, "q: DoRA rescales"),
        (adapter(q=low_rank(2, bias=VECTOR)), {"method": "ties"}, "q: has a bias (lora_bias), which ties does not merge"),
        (
            dataclasses.replace(PLAIN, replaced={"lm_head.weight": VECTOR}),
            {"method": "knots"},
            "lm_head.weight: replaces weights",
        ),
        (
            dataclasses.replace(PLAIN, rows={"embed": Rows((1,), VECTOR[None])}),
            {"weights": [1, 0.5]},
            "row 1: replaces a weight",
        ),
        (adapter(base="other", q=low_rank(2)), {}, "trained on different models: b, other"),
        (dataclasses.replace(PLAIN, meta=Meta("b", init="pissa")), {}, "initialized by pissa"),
        (adapter(q=low_rank(2, m=13)), {}, "q: the adapters change it differently: LowRank (12, 9) and LowRank (13, 9)"),
        (adapter(q=low_rank(2, transposed_base=True)), {}, "transposed"),
        (adapter(q=low_rank(2, alpha=float("nan"))), {}, "q: alpha nan"),
        (adapter(q=dataclasses.replace(low_rank(2), lora_A=np.full((2, 9), np.nan, np.float32))), {}, "contains NaN or Inf"),
        (adapter(q=dataclasses.replace(low_rank(2), lora_A=np.ones((2, 9), np.int32))), {}, "int32 is not a type of floats"),
        (adapter(q=low_rank(2, alpha=1e37)), {"weights": [1.0, 1e9], "method": "cat"}, "q: the weighted factors are over"),
        (PLAIN, {"budget": 0}, "budget: 0 is below 1"),
        (PLAIN, {"method": "average"}, "'average' is not one of cat, linear, svd, "),
        (PLAIN, {"method": "cat", "rank": 4}, "cat keeps the sum exactly and takes no rank"),
        (PLAIN, {"rank": 0}, "0 is below 1"),
        (PLAIN, {"weights": [1.0]}, "1 weights for 2 adapters"),
        (PLAIN, {"weights": [1.0, float("inf")]}, "inf is not a finite number"),
    ],
)
def test_refused(second: Adapter, arguments: dict[str, Any], says: str) -> None:
    keywords = {"method": "svd", "weights": [1.0, 1.0], **arguments}
    with pytest.raises(AdapterhubError) as caught:
        combine([PLAIN, second], keywords.pop("weights"), **keywords)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("first_fields", "second_fields", "says"),
    [
        ({"meta": Meta("b", revision="1")}, {"meta": Meta("b", revision="2")}, "trained on different revisions of it: 1, 2"),
        ({"replaced": {"h": VECTOR}}, {"replaced": {"h": VECTOR[:5]}}, "h: the adapters replace it by tensors of different"),
        ({"replaced": {"h": VECTOR * 3e38}}, {"replaced": {"h": VECTOR * -3e38}}, "h: the weighted sum is over the largest"),
        (
            {"deltas": {"q": low_rank(2, bias=VECTOR)}},
            {"deltas": {"e": LowRankEmbedding(np.ones((2, 30), np.float32), np.ones((8, 2), np.float32), alpha=1)}},
            "e: cannot have a bias",
        ),
    ],
)
def test_two_adapters_that_do_not_agree_are_refused(
    first_fields: dict[str, Any], second_fields: dict[str, Any], says: str
) -> None:
    weights = [3.0, -2.0] if "over" in says else [0.5, 0.5]
    with pytest.raises(AdapterhubError) as caught:
        combine(
            [dataclasses.replace(PLAIN, **first_fields), dataclasses.replace(PLAIN, **second_fields)], weights, method="cat"
        )
    assert says in str(caught.value)


def test_a_report_is_a_line_and_a_table() -> None:
    _, report = combine([PLAIN, PLAIN], [1, 1], method="svd")
    assert repr(report).startswith("<MergeReport: svd, 1 modules, largest relative error ")
    assert "<td>q</td>" in report._repr_html_()
