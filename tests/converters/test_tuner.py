"""The change of one module by a tuner that is not LoRA, as its row of the table says."""

from __future__ import annotations

import numpy as np

from adapterhub_converters.adapter import LowRank
from adapterhub_converters.adapter.tuner import TunedModule, Tuner, f32

SHIFT = Tuner(
    "shift",
    numbers={"by": 1},
    tensor_names=("scale",),
    fits=lambda tensors, numbers, shape: tensors["scale"].shape == shape[:1],
    change=lambda tensors, numbers, weight: weight * tensors["scale"][:, None] + numbers["by"] * tensors["shared"],
)


def module(**fields: object) -> TunedModule:
    return TunedModule(SHIFT, {"scale": np.full(3, 2, np.float32)}, {"by": 1}, {"shared": np.float32([5])}, **fields)  # type: ignore[arg-type]


def test_a_weight_is_changed_by_its_own_tensors_and_those_that_all_share() -> None:
    change = module().changed_weight
    assert change is not None
    assert change(np.ones((3, 2), np.float32)).tolist() == [[7, 7]] * 3


def test_the_shape_of_a_weight_is_compared_as_the_base_stores_it() -> None:
    assert (module().fits((3, 2)), module().fits((2, 3)), module().fits((3,))) == (True, False, False)
    assert module(transposed_base=True).fits((2, 3))


def test_a_tuner_without_a_change_or_a_pair_does_not_act_on_the_weight() -> None:
    assert module().acts_on_weight
    prompt = TunedModule(Tuner("prompt"), {}, {})
    assert (prompt.acts_on_weight, prompt.changed_weight, prompt.changed_bias, prompt.pair((3, 2))) == (False, None, None, None)


def test_a_pair_is_made_for_the_shape_of_the_weight() -> None:
    zero = Tuner("zero", pair=lambda tensors, numbers, shape: LowRank(np.zeros((1, shape[1])), np.zeros((shape[0], 1)), 1))
    pair = TunedModule(zero, {}, {}).pair((3, 2))
    assert pair is not None
    assert pair.shape == (3, 2)


def test_a_bias_changes_unless_a_factor_is_of_inputs() -> None:
    ia3 = Tuner("ia3", bias=True)
    assert TunedModule(ia3, {"ia3_l": np.ones((3, 1))}, {}).fits_bias
    assert not TunedModule(ia3, {"ia3_l": np.ones((1, 3))}, {}).fits_bias


def test_a_repr_has_shapes_and_no_numbers_and_float32_is_not_copied() -> None:
    assert repr(module()) == "<TunedModule: shift, scale (3,)>"
    array = np.ones(2, np.float32)
    assert f32(array) is array
