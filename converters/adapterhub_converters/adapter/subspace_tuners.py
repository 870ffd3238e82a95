"""PEFT's tuners whose change is made of factors, or is a function of the weight in a small subspace.

Read from peft 0.21.2 (`tuners/*/layer.py`). Some equal one low-rank pair, however the factors are arranged; the others depend
on the weight that they change.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from adapterhub_converters.lazy_imports import np

from .deltas import LowRank
from .tuner import Numbers, Shape, Tensors, Weight, f32


def _is_pair(first: np.ndarray, second: np.ndarray, shape: Shape) -> bool:
    """Return whether `second @ first` has the shape of the weight."""
    return first.ndim == second.ndim == 2 and second.shape[1] == first.shape[0] and (second.shape[0], first.shape[1]) == shape


# ---- Low-rank pairs


def delora_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether the factors and the norms have the weight's sizes."""
    norms = tensors["delora_w_norm"].shape
    is_pair = _is_pair(tensors["delora_A"], tensors["delora_B"], shape)
    return is_pair and norms == shape[1:] and tensors["delora_lambda"].size == 1


def delora_pair(tensors: Tensors, numbers: Numbers, shape: Shape) -> LowRank:
    """Return the pair of DeLoRA (arXiv 2503.18225): unit directions, times a bound and the norms of the weight's columns."""
    first, second = f32(tensors["delora_A"]), f32(tensors["delora_B"])
    norms = np.maximum(np.linalg.norm(first, axis=1), 1e-4) * np.maximum(np.linalg.norm(second, axis=0), 1e-4)
    r = len(first)
    bounds = f32(tensors["delora_lambda"]).reshape(()) / np.float32(r) / norms
    return LowRank(first * f32(tensors["delora_w_norm"]), second * bounds, float(r))


def gralora_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether there is a pair for each block, and the hybrid's pair, if any, has the weight's shape."""
    first, second = tensors["gralora_A"], tensors["gralora_B"]
    if first.ndim != 3 or second.ndim != 3:
        return False
    blocks, inputs, r = first.shape
    general_A, general_B = (tensors.get(f"gralora_{half}_general.weight") for half in "AB")
    has_hybrid = general_A is not None and general_B is not None
    if has_hybrid != (general_A is not None or general_B is not None):
        return False
    return (
        (general_A is None or general_B is None or _is_pair(general_A, general_B, shape))
        and r % blocks == 0
        and shape[1] == inputs * blocks
        and second.shape == (blocks, r, shape[0] // blocks)
        and shape[0] % blocks == 0
    )


def gralora_pair(tensors: Tensors, numbers: Numbers, shape: Shape) -> LowRank:
    """Return the pair of GraLoRA (arXiv 2505.20355): a pair for each block of inputs and outputs, and one for all of them."""
    first, second = f32(tensors["gralora_A"]), f32(tensors["gralora_B"])
    blocks, inputs, r = first.shape
    outputs, share = shape[0] // blocks, r // blocks
    lora_A = np.zeros((blocks, blocks, share, blocks, inputs), np.float32)  # of a block of outputs, and one of inputs
    lora_B = np.zeros((blocks, outputs, blocks, blocks, share), np.float32)
    for out_block in range(blocks):
        for in_block in range(blocks):
            part = first[in_block, :, out_block * share : (out_block + 1) * share]
            lora_A[out_block, in_block, :, in_block] = part.T
            lora_B[out_block, :, out_block, in_block] = second[out_block, in_block * share : (in_block + 1) * share].T
    pair = lora_A.reshape(-1, shape[1]), lora_B.reshape(shape[0], -1)
    hybrid = tensors.get("gralora_A_general.weight")
    if hybrid is not None:
        general_B = f32(tensors["gralora_B_general.weight"])
        pair = np.concatenate([pair[0], f32(hybrid)]), np.concatenate([pair[1], general_B], axis=1)
    scale = float(numbers["alpha"]) / (r + (0 if hybrid is None else len(hybrid)))
    return LowRank(*pair, scale * len(pair[0]))


def pvera_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether the shared factors are large enough for the weight, and each has its scales."""
    first, second = tensors["pvera_A"], tensors["pvera_B"]
    if first.ndim != 2 or second.ndim != 2 or tensors["pvera_lambda_b"].shape != shape[:1]:
        return False
    r = second.shape[1]
    return (
        first.shape[0] == 2 * r == tensors["pvera_lambda_d"].size
        and tensors["pvera_lambda_d"].ndim == 1
        and first.shape[1] >= shape[1]
        and second.shape[0] >= shape[0]
    )


def pvera_pair(tensors: Tensors, numbers: Numbers, shape: Shape) -> LowRank:
    """Return the pair of PVeRA: VeRA's shared factors with the means of their scales, the first half of what is trained."""
    first, second = f32(tensors["pvera_A"]), f32(tensors["pvera_B"])
    r = second.shape[1]
    lora_A = f32(tensors["pvera_lambda_d"])[:r, None] * first[:r, : shape[1]]
    return LowRank(lora_A, f32(tensors["pvera_lambda_b"])[:, None] * second[: shape[0]], float(r))


def unilora_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether all places are in the shared vector, and the factors have the weight's shape."""
    length = tensors["unilora_theta_d"].size
    places = [tensors[f"unilora_indices_{half}"] for half in "AB"]
    scales = [tensors[f"unilora_scales_{half}"] for half in "AB"]
    return (
        tensors["unilora_theta_d"].ndim == 1
        and _is_pair(places[0], places[1], shape)
        and all(int(place.min()) >= 0 and int(place.max()) < length for place in places)
        and [place.shape for place in places] == [scale.shape for scale in scales]
    )


def unilora_pair(tensors: Tensors, numbers: Numbers, shape: Shape) -> LowRank:
    """Return the pair of Uni-LoRA (arXiv 2506.00799), whose numbers are all from one vector."""
    vector = f32(tensors["unilora_theta_d"])
    first, second = (
        vector[tensors[f"unilora_indices_{half}"].astype(np.int64)] * f32(tensors[f"unilora_scales_{half}"]) for half in "AB"
    )
    return LowRank(first, second, float(len(first)))


def tinylora_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether the factors have the weight's shape, and there is a projection for each number of the vector."""
    first, projections = tensors["tinylora_A"], tensors["tinylora_P"]
    r = len(first)
    return _is_pair(first, tensors["tinylora_B"], shape) and projections.shape == (tensors["tinylora_v.0"].size, r, r)


def tinylora_pair(tensors: Tensors, numbers: Numbers, shape: Shape) -> LowRank:
    """Return the pair of TinyLoRA: the weight's largest singular vectors, mixed by a sum of random matrices."""
    mixed = np.einsum("i,ijk->jk", f32(tensors["tinylora_v.0"]).reshape(-1), f32(tensors["tinylora_P"]))
    first = f32(tensors["tinylora_A"])
    return LowRank(first, f32(tensors["tinylora_B"]) @ mixed, float(len(first)))


# ---- Functions of the weight


def hira_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether the factors, or those of an embedding table, have the weight's shape."""
    if "hira_A" in tensors:
        return _is_pair(tensors["hira_A"], tensors["hira_B"], shape)
    return _is_pair(tensors["hira_embedding_A"], tensors["hira_embedding_B"], shape[::-1])


def hira_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    """Apply HiRA (ICLR 2025): each element grows by its product with that of a low-rank matrix."""
    if "hira_A" in tensors:
        return weight + weight * (f32(tensors["hira_B"]) @ f32(tensors["hira_A"]))
    return weight + weight * (f32(tensors["hira_embedding_B"]) @ f32(tensors["hira_embedding_A"])).T


def deft_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether the directions have a number for each output; what is injected, if anything, has the weight's inputs."""
    directions, injected = tensors["deft_P"], tensors.get("deft_R")
    if directions.ndim != 2 or directions.shape[0] != shape[0] or directions.shape[1] > shape[0]:
        return False
    return injected is None if numbers["para"] else injected is not None and injected.shape == (directions.shape[1], shape[1])


def deft_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    """Apply DEFT: a subspace of the outputs is taken out of the weight, and with `para` nothing is put in its place."""
    directions = f32(tensors["deft_P"])
    # LAPACK's convention decides the signs of Q, in torch as in numpy (geqrf).
    left = directions if numbers["decomposition_method"] == "relu" else np.linalg.qr(directions)[0]
    removed = (np.maximum(left, 0) if left is directions else left).T @ weight
    if numbers["para"]:
        return weight - left @ removed
    scale = np.float32(float(numbers["alpha"]) / directions.shape[1]) if numbers["alpha"] else np.float32(1)
    return weight + left @ (f32(tensors["deft_R"]) * scale - removed)


def frod_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether the basis and the sparse factor have the weight's number of inputs."""
    values, places, size = tensors["frod_lambda_s_values"], tensors["frod_s_indices"], shape[1]
    return (
        tensors["frod_V"].shape == (size, size)
        and tensors["frod_lambda_l"].shape == (size,)
        and tensors["frod_s_size"].shape == (2,)
        and places.shape == (2, *values.shape)
        and (not places.size or (int(places.min()) >= 0 and int(places.max()) < size))
    )


def frod_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    """Apply FRoD: the weight's columns in a shared basis keep their directions, and get other lengths and a sparse mixture."""
    basis = tensors["frod_V"].astype(np.float64)
    try:
        columns = np.linalg.solve(basis, weight.T.astype(np.float64)).T
    except np.linalg.LinAlgError:
        columns = weight.astype(np.float64) @ np.linalg.pinv(basis, rcond=1e-6).T
    lengths = np.linalg.norm(columns, axis=0)
    directions = np.divide(columns, lengths, out=np.zeros_like(columns), where=lengths > 1e-12).astype(np.float32)
    mixture = np.diag(f32(tensors["frod_lambda_l"]))
    np.add.at(mixture, tuple(tensors["frod_s_indices"].astype(np.int64)), f32(tensors["frod_lambda_s_values"]))
    result: Weight = directions @ mixture @ f32(tensors["frod_V"]).T
    return result


def frod_category(target: str) -> str:
    """Return the name under which modules share a basis: their last two components (peft, `_category_from_key`)."""
    parts = target.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    return "attention_output" if parts[-3:] == ["attention", "output", "dense"] else "_".join(parts[-2:])


def osf_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether the trained components have the weight's shape."""
    left, values, right = (tensors[f"osf_svd_params.{part}_low"] for part in "USV")
    return _is_pair(right, left, shape) and values.shape == right.shape[:1] and len(values) <= min(shape)


def osf_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    """Apply OSF (arXiv 2504.07097): the weight's smallest singular components are replaced by the trained ones."""
    left, values, right = (f32(tensors[f"osf_svd_params.{part}_low"]) for part in "USV")
    base_left, base_values, base_right = np.linalg.svd(weight, full_matrices=False)
    first = len(base_values) - len(values)
    result: Weight = weight + ((left * values) @ right - (base_left[:, first:] * base_values[first:]) @ base_right[first:])
    return result


def _sigmoid(values: Weight) -> Weight:
    return f32(1 / (1 + np.exp(-values.clip(-80, 80))))


def _erf(values: Weight) -> Weight:
    result: Weight = np.vectorize(math.erf, otypes=[np.float32])(values)
    return result


_ACTIVATIONS: dict[str, Callable[[Weight], Weight]] = {
    "relu": lambda values: f32(np.maximum(values, 0)),
    "relu2": lambda values: f32(np.square(np.maximum(values, 0))),
    "tanh": lambda values: f32(np.tanh(values)),
    "sigmoid": _sigmoid,
    "silu": lambda values: values * _sigmoid(values),
    "swish": lambda values: values * _sigmoid(values),
    "gelu": lambda values: f32(values * ((1 + _erf(f32(values / math.sqrt(2)))) / 2)),
    "linear": lambda values: values,
}


def refuse_activation(numbers: Numbers) -> str:
    """Return why a PEANuT config cannot be merged; empty if it can."""
    name = str(numbers["act_fn"])
    return "" if name in _ACTIVATIONS else f'"act_fn" is {name[:40]}: only {", ".join(_ACTIVATIONS)} are known here'


def peanut_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether the network takes the weight's columns, and has an encoder and a decoder for each level."""
    first, second = tensors["peanut_A.weight"], tensors["peanut_B.weight"]
    r = len(first)
    levels = [tensors.get(f"peanut_{half}.{level}.weight") for level in range(len(tensors) // 2 - 1) for half in _HALVES]
    return (
        (first.shape, second.shape) == ((r, shape[0]), (shape[0], r))
        and len(tensors) % 2 == 0
        and all(level is not None and level.shape == (r, r) for level in levels)
    )


_HALVES = ("encoders", "decoders")


def peanut_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    """Apply PEANuT (arXiv 2410.01870): a small network of the weight's columns is added to them."""
    activation, levels = _ACTIVATIONS[str(numbers["act_fn"])], len(tensors) // 2 - 1
    encoders, decoders = ([f32(tensors[f"peanut_{half}.{level}.weight"]) for level in range(levels)] for half in _HALVES)
    hidden = activation(weight.T @ f32(tensors["peanut_A.weight"]).T)
    residuals = []
    for encoder in encoders:
        residuals.append(hidden)
        hidden = activation(hidden @ encoder.T)
    for decoder, residual in zip(decoders, reversed(residuals), strict=True):
        hidden = activation(hidden @ decoder.T) + residual
    return weight + ((hidden @ f32(tensors["peanut_B.weight"]).T) * np.float32(numbers["scaling"])).T


# ---- GLoRA


def _glora_path(tensors: Tensors, name: str) -> Weight:
    """Return what one of GLoRA's paths adds or multiplies with: a product, a column, one number, or zeros."""
    if f"glora_{name}.Xd" in tensors:
        return f32(tensors[f"glora_{name}.Xd"]) @ f32(tensors[f"glora_{name}.Xu"])
    return f32(tensors.get(f"glora_{name}.X", tensors.get(f"glora_{name}.zeros", np.zeros(1))))


def glora_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    """Return whether all paths have the sizes of the weight and of its bias."""
    outputs, inputs = shape
    sizes = {"A": (outputs, inputs), "B": (outputs, inputs), "C": (inputs, 1), "D": (outputs,), "E": (outputs,)}
    for name, size in sizes.items():
        down, up = tensors.get(f"glora_{name}.Xd"), tensors.get(f"glora_{name}.Xu")
        if down is not None or up is not None:
            if down is None or up is None or len(size) != 2 or not _is_pair(up, down, (size[0], size[-1])):
                return False
        elif _glora_path(tensors, name).shape not in ((1,), size, (size[0], 1)[: len(size)]):
            return False
    return True


def glora_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    """Apply GLoRA (arXiv 2306.07967) to a weight: `W + W * A + B`."""
    return weight + (weight * _glora_path(tensors, "A") + _glora_path(tensors, "B"))


def glora_bias(tensors: Tensors, numbers: Numbers, weight: Weight, bias: Weight) -> Weight:
    """Apply GLoRA to the bias of the `weight` before its change: `b + b * D + E + W C`."""
    moved = (weight @ _glora_path(tensors, "C").reshape(-1, 1))[:, 0] if _glora_path(tensors, "C").size > 1 else np.float32(0)
    result: Weight = bias + (bias * _glora_path(tensors, "D") + _glora_path(tensors, "E") + moved)
    return result
