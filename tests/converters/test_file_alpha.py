"""One alpha for a file: which it is, what is multiplied into the factors, and that a reader gets them back bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Loss, TensorLoss
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import file_alpha

F64 = np.dtype(np.float64)


@pytest.mark.parametrize(
    ("needed", "common", "factors"),
    [
        ({"a": 8.0, "b": 8.0, "c": 16.0}, 8.0, {"a": 1.0, "b": 1.0, "c": 2.0}),  # the most common
        ({"a": 8.0, "b": 16.0}, 16.0, {"a": 0.5, "b": 1.0}),  # of two as common, the larger
        ({"a": 8.0, "b": -16.0}, -16.0, {"a": -0.5, "b": 1.0}),  # by magnitude
        ({"a": 8.0, "b": -8.0}, 8.0, {"a": 1.0, "b": -1.0}),  # then by sign
        ({"a": 0.0, "b": 0.0, "c": 4.0}, 4.0, {"a": 2.0**-100, "b": 2.0**-100, "c": 1.0}),  # 0 is never the one
    ],
)
def test_the_alpha_of_the_file_is_what_most_modules_need(
    needed: dict[str, float], common: float, factors: dict[str, float]
) -> None:
    plan = file_alpha.plan(needed, F64, "alpha")
    assert plan is not None
    assert (plan.common, plan.factors) == (common, factors)
    assert bool(plan.notes) == (0.0 in needed.values())


def test_an_adapter_whose_modules_all_need_0_has_no_plan() -> None:
    assert file_alpha.plan({"a": 0.0}, F64, "alpha") is None


def test_a_number_that_the_file_rounds_is_noted_and_the_other_modules_are_scaled_by_what_is_stored() -> None:
    plan = file_alpha.plan({"a": 0.1, "b": 0.1, "c": 0.3}, dtypes.F32, "alpha")
    assert plan is not None
    stored = float(np.float32(0.1))
    assert (plan.common, plan.factors) == (stored, {"a": 1.0, "b": 1.0, "c": 0.3 / stored})
    assert plan.notes == (f"alpha 0.1 is stored as the float32 {stored}",)


@pytest.mark.parametrize("number", [1e39, -1e39, 1e-31, -1e-31])
def test_a_number_that_the_file_cannot_hold_is_refused(number: float) -> None:
    with pytest.raises(RefusedError, match="a float32 cannot hold the alpha"), np.errstate(over="ignore"):
        file_alpha.plan({"a": number}, dtypes.F32, "alpha")
    assert file_alpha.plan({"a": 1e-30}, F64, "alpha") is not None


def array(dtype: np.dtype) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(64, 4)).astype(dtype)


def test_a_factor_of_1_changes_nothing() -> None:
    lora_B = array(dtypes.F16)
    folded = file_alpha.fold("x", lora_B, 1.0)
    assert folded.lora_B is lora_B
    assert folded.loss == TensorLoss("x", Loss.EXACT)


@pytest.mark.parametrize("factor", [2.0, 0.25, -0.5, -4.0])
def test_a_power_of_two_keeps_the_type_and_is_exact(factor: float) -> None:
    lora_B = array(dtypes.F16)
    folded = file_alpha.fold("x", lora_B, factor)
    assert folded.lora_B.dtype == dtypes.F16
    assert (folded.lora_B == lora_B * np.float16(factor)).all()
    assert (folded.loss.loss, folded.ulps) == (Loss.EXACT, None)


def test_a_power_of_two_beyond_the_type_takes_float32() -> None:
    lora_B = array(dtypes.F16)
    folded = file_alpha.fold("x", lora_B, 2.0**20)
    assert folded.lora_B.dtype == dtypes.F32
    assert (folded.lora_B == lora_B.astype(np.float32) * 2.0**20).all()
    assert folded.loss.loss == Loss.EXACT


@pytest.mark.parametrize("dtype", [dtypes.F16, dtypes.BF16])
def test_any_factor_of_16_bits_takes_float32_and_is_recovered_bit_for_bit(dtype: np.dtype) -> None:
    lora_B = array(dtype)
    folded = file_alpha.fold("x", lora_B, 1 / 3)
    assert folded.lora_B.dtype == dtypes.F32
    assert folded.loss.loss == Loss.EXACT
    assert file_alpha.unfold(folded.lora_B, 1 / 3, dtype).tobytes() == lora_B.tobytes()


def test_any_factor_of_float32_is_recovered_bit_for_bit_with_what_is_recorded() -> None:
    lora_B = np.random.default_rng(0).normal(size=(512, 8)).astype(np.float32)
    folded = file_alpha.fold("x", lora_B, 0.7)
    assert folded.ulps is not None
    assert sorted({*folded.ulps.ravel().tolist()}) == [-1, 0, 1]
    assert (folded.loss.loss, folded.loss.error) == (Loss.EXACT, None)
    assert file_alpha.unfold(folded.lora_B, 0.7, dtypes.F32, folded.ulps).tobytes() == lora_B.tobytes()
    assert np.abs(folded.lora_B / (lora_B.astype(np.float64) * 0.7) - 1).max() <= 2.0**-24


def test_numbers_that_vanish_are_reported_as_rounded() -> None:
    for dtype in (dtypes.F16, dtypes.F32):
        folded = file_alpha.fold("x", array(dtype), 1e-40)
        assert (folded.loss.loss, folded.loss.error, folded.ulps) == (Loss.ROUNDED, 2.0**-24, None)


def test_two_units_in_the_last_place_are_not_recorded_but_reported() -> None:
    lora_B = np.array([[1 + 7 * 2.0**-23]], np.float32)
    factor = 0.3 * 2.0**-126  # the product is subnormal
    folded = file_alpha.fold("x", lora_B, factor)
    off = file_alpha.unfold(folded.lora_B, factor, dtypes.F32).view(np.int32) - lora_B.view(np.int32)
    assert abs(off) == 2
    assert (folded.loss.loss, folded.ulps) == (Loss.ROUNDED, None)


def test_a_product_beyond_float32_is_refused() -> None:
    with pytest.raises(RefusedError, match="times 3e[+]38 does not fit into float32"):
        file_alpha.fold("x", array(dtypes.F32) * 10, 3e38)


def test_padding_adds_zeros_at_the_end_of_an_axis() -> None:
    lora_A = np.ones((2, 3), np.float32)
    assert file_alpha.pad(lora_A, 2, 0) is lora_A
    for axis, shape in ((0, (5, 3)), (1, (2, 5))):
        padded = file_alpha.pad(lora_A, 5, axis)
        assert padded.shape == shape
        assert padded.sum() == lora_A.sum()
        assert (padded[:2, :3] == 1).all()


@pytest.mark.parametrize("loss", [Loss.EXACT, Loss.ROUNDED])
def test_the_report_of_padding_is_never_milder_than_the_one_before(loss: Loss) -> None:
    padded_report = file_alpha.padded_loss(TensorLoss("x", loss, "before" if loss else "", 0.5), 8)
    assert padded_report.loss == max(loss, Loss.REWRITTEN)
    assert (padded_report.name, padded_report.error) == ("x", 0.5)
    assert padded_report.note == "padded with zeros to rank 8, recoverable bit for bit" + ("; before" if loss else "")
