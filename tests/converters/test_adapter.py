"""The canonical form of an adapter: what it counts, what only PEFT can say of it, and the worst of a report."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from adapterhub_converters.adapter import Adapter, LowRank, LowRankEmbedding, Meta, StackedLowRank
from adapterhub_converters.adapter.adapter import (
    Loss,
    LossReport,
    TensorLoss,
    factor_pairs,
    plain_pairs,
    problems_beyond_deltas,
    refuse_conditions,
    without_invocation,
)
from adapterhub_converters.errors import RefusedError

Q, TABLE = "model.layers.0.self_attn.q_proj", "model.embed_tokens"


def filled_with_ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


PLAIN = Adapter({Q: LowRank(filled_with_ones(2, 9), filled_with_ones(12, 2), 4.0)})


def test_tensors_are_in_a_fixed_order_and_counted_once() -> None:
    delta = LowRank(filled_with_ones(2, 9), filled_with_ones(12, 2), 4.0, bias=filled_with_ones(12))
    adapter = Adapter({"b": delta, "a": delta}, replaced={"norm.weight": filled_with_ones(9)})
    assert [name for name, _ in adapter.tensors()] == [
        "a.lora_A", "a.lora_B", "a.lora_B.bias", "b.lora_A", "b.lora_B", "b.lora_B.bias", "norm.weight",
    ]  # fmt: skip
    assert adapter.parameters == 2 * (18 + 24 + 12) + 9
    assert adapter.distinct_deltas == [(delta, 2)]
    assert repr(adapter) == "Adapter(2 deltas, 1 replaced, 117 parameters)"


@pytest.mark.parametrize(
    ("adapter", "place"),
    [
        (replace(PLAIN, meta=Meta(invocation=(1, 2))), "alora_invocation_tokens"),
        (replace(PLAIN, meta=Meta(layers=((0, 4), (2, 6)))), "layer_replication"),
        (replace(PLAIN, meta=Meta(ties=True), replaced={f"{TABLE}.weight": filled_with_ones(4, 9)}), "ensure_weight_tying"),
        (replace(PLAIN, meta=Meta(dora=True)), "use_dora"),
        (replace(PLAIN, copies={f"{TABLE}.weight": filled_with_ones(4, 9)}), f"{TABLE}.weight"),
        (replace(PLAIN, added={"norm.weight": filled_with_ones(9)}), "added"),
    ],
)
def test_what_only_peft_can_say_is_refused_by_its_name(adapter: Adapter, place: str) -> None:
    with pytest.raises(RefusedError) as caught:
        refuse_conditions(adapter)
    assert caught.value.where == place


def test_a_condition_that_changes_nothing_is_none() -> None:
    refuse_conditions(replace(PLAIN, meta=Meta(ties=True)))  # no table changes
    refuse_conditions(without_invocation(replace(PLAIN, meta=Meta(invocation=(1,)))))


def test_pairs_are_those_of_one_module_or_of_a_stack() -> None:
    stack = Adapter({"experts": StackedLowRank(filled_with_ones(3, 2, 9), filled_with_ones(3, 12, 2), 4.0)})
    assert [*factor_pairs(stack)] == ["experts"]
    with pytest.raises(RefusedError, match="StackedLowRank is not supported here"):
        plain_pairs(stack)
    table = Adapter(
        {TABLE: LowRankEmbedding(filled_with_ones(2, 100), filled_with_ones(9, 2), 4.0, magnitude=filled_with_ones(1, 100))}
    )
    with pytest.raises(RefusedError, match="DoRA on an embedding table"):
        factor_pairs(table)


def test_all_that_deltas_cannot_say_is_listed_at_once() -> None:
    adapter = Adapter({}, replaced={"norm.weight": filled_with_ones(9)}, meta=Meta(init="olora", invocation=(1,)))
    problems = problems_beyond_deltas(adapter, "this format")
    assert len(problems) == 4
    assert "no low-rank delta" in problems[0]
    assert "olora" in problems[1]
    assert problems[2].startswith("norm.weight")
    assert problems[3].startswith("alora_invocation_tokens")


def test_a_report_has_its_worst_loss_and_every_kind_in_its_summary() -> None:
    report = LossReport((TensorLoss("a", Loss.EXACT), TensorLoss("b", Loss.ROUNDED)), ("a note",))
    assert report.worst == Loss.ROUNDED
    assert report.summary == {"exact": 1, "rewritten": 0, "rounded": 1, "approximated": 0, "dropped": 0, "refused": 0}
    assert repr(report) == "<LossReport: 1 exact, 1 rounded; 1 note>"
    assert LossReport(()).worst == Loss.EXACT
