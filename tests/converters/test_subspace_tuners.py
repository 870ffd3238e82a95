"""Tuners made of factors or of a subspace of the weight, by the formulas of their papers on dense matrices."""

from __future__ import annotations

import numpy as np
import pytest

from adapterhub_converters.adapter import subspace_tuners as subspace
from adapterhub_converters.adapter.deltas import LowRank

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(6, 4)).astype(np.float32)


def numbers(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def matrix(pair: LowRank) -> np.ndarray:
    product: np.ndarray = pair.lora_B @ pair.lora_A * np.float32(pair.scaling)
    return product


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_delora_is_bounded_whatever_the_length_of_its_factors() -> None:
    tensors = {
        "delora_A": numbers(2, 4),
        "delora_B": numbers(6, 2),
        "delora_lambda": np.array([3], np.float32),
        "delora_w_norm": numbers(4),
    }
    assert subspace.delora_fits(tensors, {}, (6, 4))
    pair = matrix(subspace.delora_pair(tensors, {}, (6, 4)))
    longer = {**tensors, "delora_A": tensors["delora_A"] * 7}
    close(matrix(subspace.delora_pair(longer, {}, (6, 4))), pair)
    directions = [
        np.outer(b / np.linalg.norm(b), a / np.linalg.norm(a))
        for a, b in zip(tensors["delora_A"], tensors["delora_B"].T, strict=False)
    ]
    close(pair, np.sum(directions, axis=0) * 1.5 * tensors["delora_w_norm"])


def test_gralora_has_a_pair_for_each_block_of_inputs_and_outputs() -> None:
    tensors = {"gralora_A": numbers(2, 2, 4), "gralora_B": numbers(2, 4, 3)}  # two blocks, rank 4
    assert subspace.gralora_fits(tensors, {"alpha": 8}, (6, 4))
    dense = np.zeros((6, 4), np.float32)
    for out in range(2):
        for into in range(2):
            down = tensors["gralora_A"][into][:, 2 * out : 2 * out + 2]
            up = tensors["gralora_B"][out][2 * into : 2 * into + 2]
            dense[3 * out : 3 * out + 3, 2 * into : 2 * into + 2] = (down @ up).T
    close(matrix(subspace.gralora_pair(tensors, {"alpha": 8}, (6, 4))), dense * 2)


def test_osf_replaces_the_smallest_singular_components_and_keeps_the_largest() -> None:
    left_vectors, values, right_vectors = np.linalg.svd(WEIGHT, full_matrices=False)
    names = ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low")
    same = dict(zip(names, (left_vectors[:, 2:], values[2:], right_vectors[2:]), strict=False))
    close(subspace.osf_change(same, {}, WEIGHT), WEIGHT)
    zeroed = {**same, names[1]: np.zeros(2, np.float32)}
    close(subspace.osf_change(zeroed, {}, WEIGHT), (left_vectors[:, :2] * values[:2]) @ right_vectors[:2])


def test_deft_with_para_leaves_nothing_of_the_weight_in_its_directions() -> None:
    tensors = {"deft_P": numbers(6, 2)}
    options = {"para": True, "decomposition_method": "qr", "alpha": None}
    assert subspace.deft_fits(tensors, options, (6, 4))
    changed = subspace.deft_change(tensors, options, WEIGHT)
    close(tensors["deft_P"].T @ changed, np.zeros((2, 4)))


def test_frod_without_new_lengths_is_made_of_unit_columns_in_the_basis() -> None:
    tensors = {
        "frod_V": np.linalg.qr(numbers(4, 4))[0], "frod_lambda_l": np.ones(4, np.float32),
        "frod_s_size": np.array([4, 4], np.int64),
        "frod_lambda_s_values": np.zeros(0, np.float32), "frod_s_indices": np.zeros((2, 0), np.int64),
    }  # fmt: skip
    assert subspace.frod_fits(tensors, {}, (6, 4))
    columns = subspace.frod_change(tensors, {}, WEIGHT) @ tensors["frod_V"]
    close(np.linalg.norm(columns, axis=0), np.ones(4))
    outside = {**tensors, "frod_s_indices": np.array([[4], [0]], np.int64), "frod_lambda_s_values": np.ones(1, np.float32)}
    assert not subspace.frod_fits(outside, {}, (6, 4))


@pytest.mark.parametrize(
    ("target", "category"),
    [
        ("h.0.attention.output.dense", "attention_output"),
        ("h.0.mlp.up", "mlp_up"),
        ("h.0.up", "up"),
        ("h.up", "h_up"),
        ("q", "q"),
    ],
)
def test_modules_of_a_kind_share_the_basis_of_frod(target: str, category: str) -> None:
    assert subspace.frod_category(target) == category


def test_hira_and_glora_grow_with_the_weight() -> None:
    tensors = {"hira_A": numbers(2, 4), "hira_B": numbers(6, 2)}
    close(subspace.hira_change(tensors, {"r": 2}, WEIGHT), WEIGHT * (1 + tensors["hira_B"] @ tensors["hira_A"]))
    paths = {"glora_A.Xd": numbers(6, 2), "glora_A.Xu": numbers(2, 4), "glora_B.X": np.array([5], np.float32)}
    assert subspace.glora_fits(paths, {}, (6, 4))
    close(subspace.glora_change(paths, {}, WEIGHT), WEIGHT * (1 + paths["glora_A.Xd"] @ paths["glora_A.Xu"]) + 5)
    bias = numbers(6)
    close(subspace.glora_bias({**paths, "glora_C.X": numbers(4, 1) * 0 + 1}, {}, WEIGHT, bias), bias + WEIGHT.sum(axis=1))
    assert not subspace.glora_fits({"glora_A.Xd": numbers(6, 2)}, {}, (6, 4))


def test_peanut_without_levels_is_one_hidden_layer_and_unknown_activations_are_refused() -> None:
    tensors = {"peanut_A.weight": numbers(3, 6), "peanut_B.weight": numbers(6, 3)}
    options = {"act_fn": "relu", "scaling": 0.5}
    assert subspace.peanut_fits(tensors, options, (6, 4))
    hidden = np.maximum(tensors["peanut_A.weight"] @ WEIGHT, 0)
    close(subspace.peanut_change(tensors, options, WEIGHT), WEIGHT + tensors["peanut_B.weight"] @ hidden * 0.5)
    assert subspace.refuse_activation(options) == ""
    assert "only relu" in subspace.refuse_activation({"act_fn": "mish"})
