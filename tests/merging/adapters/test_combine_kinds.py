"""What adapters can have beside plain pairs: merged exactly, or refused by name, as docs/merge.md says."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import METHODS, combine
from adapterhub.merging.adapters.methods.method_table import Method
from adapterhub_converters.adapter import (
    Adapter,
    Hadamard,
    LowRank,
    LowRankConv,
    LowRankEmbedding,
    Meta,
    Rows,
    StackedLowRank,
    Vera,
)
from adapterhub_converters.errors import AdapterhubError, RefusedError
from adapterhub_converters.formats import peft
from tests.merging.factored import adapter, dense, low_rank

DOCS = Path(__file__).parents[3] / "docs/merge.md"
TWO = [name for name, method in METHODS.items() if method.count[0] <= 2 <= method.count[1]]
SUMS = [name for name, method in METHODS.items() if method.sums and method.count[1] > 1]


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stack(r: int, seed: int) -> StackedLowRank:
    return StackedLowRank(numbers(3, r, 8, seed=seed), numbers(3, 10, r, seed=seed + 50), alpha=2.0, transposed_base=True)


def conv(r: int, seed: int) -> LowRankConv:
    return LowRankConv(numbers(r, 4, 3, 3, seed=seed), numbers(12, r, 1, 1, seed=seed + 50), alpha=2.0, rslora=True)


def table(r: int, seed: int) -> LowRankEmbedding:
    return LowRankEmbedding(numbers(r, 30, seed=seed), numbers(8, r, seed=seed + 50), alpha=2.0)


def whole(delta: Any) -> Any:
    if isinstance(delta, LowRankConv):
        return delta.scaling * np.einsum("or,rikl->oikl", delta.lora_B[:, :, 0, 0].astype(np.float64), delta.lora_A)
    return dense(delta)


@pytest.mark.parametrize("make", [stack, conv, table])
@pytest.mark.parametrize("method", SUMS)
def test_experts_convolutions_and_tables_are_summed(make: Any, method: str) -> None:
    first, second = make(2, 0), make(2, 1)
    result, report = combine(
        [adapter(q=first), adapter(q=second)], [0.7, -0.4], method=method, rank=None if method != "svd" else 4
    )
    assert result.deltas["q"].shape == first.shape
    assert type(result.deltas["q"]) is type(first)
    np.testing.assert_allclose(whole(result.deltas["q"]), 0.7 * whole(first) - 0.4 * whole(second), atol=1e-5)
    assert report.error < 1e-6


@pytest.mark.parametrize("make", [stack, conv, table])
@pytest.mark.parametrize("method", TWO)
def test_every_method_takes_experts_convolutions_and_tables(make: Any, method: str) -> None:
    result, report = combine([adapter(q=make(2, 0)), adapter(q=make(2, 1))], [1, 1], method=method)
    delta = result.deltas["q"]
    assert delta.shape == make(2, 0).shape
    assert np.isfinite(whole(delta)).all()
    assert 0 < report.modules["q"].signs < 1


def test_the_experts_of_a_stack_are_merged_each_for_itself() -> None:
    first, second = stack(2, 0), stack(3, 1)
    result, _ = combine([adapter(q=first), adapter(q=second)], [1, 1], method="iso_c")
    for expert, expert_delta in enumerate(dense(result.deltas["q"])):
        u, s, vt = np.linalg.svd(dense(first)[expert] + dense(second)[expert])
        np.testing.assert_allclose(expert_delta, s[:5].mean() * u[:, :5] @ vt[:5], atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_dtypes_may_differ(dtype: Any) -> None:
    first, second = low_rank(2), low_rank(3, seed=1)
    converted = dataclasses.replace(second, lora_A=second.lora_A.astype(dtype))
    result, _ = combine([adapter(q=first), adapter(q=converted)], [1, 1], method="linear")
    np.testing.assert_allclose(dense(result.deltas["q"]), dense(first) + dense(converted), atol=1e-5)


def test_what_is_a_pair_in_disguise_is_merged_as_the_pair() -> None:
    loha = Hadamard({f"hada_{part}": numbers(*shape, seed=seed) for seed, (part, shape) in enumerate(
        [("w1_a", (12, 2)), ("w1_b", (2, 9)), ("w2_a", (12, 2)), ("w2_b", (2, 9))])}, alpha=1.0)  # fmt: skip
    result, report = combine([adapter(q=loha), adapter(q=low_rank(2))], [0.5, 1], method="linear")
    np.testing.assert_allclose(dense(result.deltas["q"]), 0.5 * dense(loha.as_low_rank()) + dense(low_rank(2)), atol=1e-5)
    assert "Hadamard are written as the low-rank pairs" in report.notes[0]


# ---- beside the deltas


PLAIN = adapter(q=low_rank(2))
VECTOR = np.ones(12, np.float32)
OTHERS: dict[str, tuple[Adapter, str]] = {
    "DoRA": (adapter(q=low_rank(2, magnitude=VECTOR)), "q: DoRA rescales"),
    "bias": (adapter(q=low_rank(2, bias=VECTOR)), "q: has a bias (lora_bias)"),
    "modules_to_save": (dataclasses.replace(PLAIN, replaced={"head.weight": VECTOR}), "head.weight: replaces"),
    "rows": (dataclasses.replace(PLAIN, rows={"embed": Rows((1,), VECTOR[None])}), "embed: replaces"),
    "aLoRA": (dataclasses.replace(PLAIN, meta=Meta("b", invocation=(1,))), "aLoRA"),
    "an infinite scale": (adapter(q=low_rank(2, alpha=float("inf"))), "q: alpha inf does not give a finite scaling"),
    "PiSSA": (dataclasses.replace(PLAIN, meta=Meta("b", init="pissa")), "initialized by pissa"),
    "a copy of the base's table": (dataclasses.replace(PLAIN, copies={"embed.weight": VECTOR}), "a copy of the base's weight"),
    "layer_replication": (dataclasses.replace(PLAIN, meta=Meta("b", layers=((0, 2),))), "repeated layers"),
    "VeRA without its base": (adapter(q=Vera(VECTOR, numbers(2), numbers(2, 9), numbers(12, 2), None)), "Name its base model"),
    "another base": (adapter(base="other", q=low_rank(2)), "trained on different models"),
    "another shape": (adapter(q=low_rank(2, m=13)), "q: the adapters change it differently"),
    "another orientation": (adapter(q=low_rank(2, transposed_base=True)), "q: the adapters change it differently"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("method", TWO)
def test_what_cannot_be_merged_is_refused_by_name(method: str, kind: str) -> None:
    incompatible, says = OTHERS[kind]
    if METHODS[method].sums and kind == "bias":
        combine([PLAIN, incompatible], [1, 1], method=method)
        return
    with pytest.raises(AdapterhubError) as caught:
        combine([PLAIN, incompatible], [1, 1] if kind not in ("modules_to_save", "rows") else [0.5, 0.5], method=method)
    if METHODS[method].weights == "none" and kind in ("modules_to_save", "rows"):
        assert "takes no weights" in str(caught.value)
    elif METHODS[method].sums and kind in ("modules_to_save", "rows"):
        assert "the weights of the adapters that do sum to 0.5" in str(caught.value)
    else:
        assert says in str(caught.value)


@pytest.mark.parametrize("method", [name for name in TWO if not METHODS[name].on_factors])
def test_ranks_scales_and_targets_may_differ(method: str) -> None:
    first = adapter(q=low_rank(2, alpha=1.0), k=low_rank(3))
    second = adapter(q=low_rank(5, seed=1, rslora=True), v=low_rank(1, seed=2))
    result, report = combine([first, second], [1, 1], method=method)
    assert set(result.deltas) == {"q", "k", "v"}
    assert report.modules["q"].ranks == (2, 5)
    alone, _ = combine([adapter(k=low_rank(3))], [1], method=method) if METHODS[method].count[0] == 1 else (None, None)
    if alone and not METHODS[method].random and METHODS[method].missing == "left out":
        np.testing.assert_allclose(dense(result.deltas["k"]), dense(alone.deltas["k"]), atol=1e-5)


@pytest.mark.parametrize("method", [name for name in TWO if METHODS[name].on_factors])
def test_pefts_own_need_one_rank(method: str) -> None:
    with pytest.raises(RefusedError, match=r"q: .* needs equal ranks, not 2, 5. Use a method without peft_"):
        combine([adapter(q=low_rank(2)), adapter(q=low_rank(5))], [1, 1], method=method)


def test_the_table_of_the_docs_is_the_table_of_the_code() -> None:
    page = DOCS.read_text()

    def names(fits: Callable[[Method], bool]) -> str:
        return ", ".join(f"`{name}`" for name, method in METHODS.items() if fits(method))

    assert dict(re.findall(r"^\| ([^|]+) \| ((?:`\w+`(?:, )?)+) \|$", page, re.MULTILINE)) == {
        "one adapter": names(lambda method: method.count[1] == 1),
        "two adapters": names(lambda method: method.count == (2, 2)),
        "two adapters or more": names(lambda method: method.count[0] == 2 < method.count[1]),
        "`--weights`, relative to their sum": names(lambda method: method.weights == "shares"),
        "no `--weights`": names(lambda method: method.weights == "none"),
        "adapters of one rank": names(lambda method: method.on_factors),
        "a missing module as zeros": names(lambda method: method.missing == "zeros"),
        "biases, `modules_to_save`, rows": names(lambda method: method.sums),
    }
    assert [name for name in METHODS if f"`{name}`" not in page] == []


def test_a_pair_is_what_a_linear_module_gets() -> None:
    result, _ = combine([PLAIN], [1.0], method="rerank")
    assert isinstance(result.deltas["q"], LowRank)


BESIDE = dataclasses.replace(
    adapter(q=low_rank(2, bias=VECTOR)), replaced={"head.weight": numbers(5, 4)}, rows={"embed": Rows((1,), numbers(1, 4))}
)


@pytest.mark.parametrize(
    "merge_input",
    [
        Adapter({"model.layers.0.mlp.experts.down_proj": stack(2, 0)}, meta=Meta(base_model="b")),
        adapter(conv=conv(2, 0)),
        adapter(embed=table(2, 0)),
        BESIDE,
    ],
    ids=["experts", "convolution", "table", "beside"],
)
def test_what_comes_out_is_written_and_read_as_it_is(tmp_path: Path, merge_input: Adapter) -> None:
    result, _ = combine([merge_input, merge_input], [0.5, 0.5], method="linear")
    peft.write(result, tmp_path)
    read_back = peft.read(tmp_path)
    assert read_back.parameters == result.parameters
    for (name, tensor), (expected_name, expected_tensor) in zip(read_back.tensors(), result.tensors(), strict=True):
        assert (name, tensor.tobytes()) == (expected_name, expected_tensor.tobytes())
    for target, delta in result.deltas.items():
        assert read_back.deltas[target].scaling == delta.scaling == 1
