"""PEFT's tuners that are not LoRA: what each stores for a module, and how it changes the base's weight.

`TUNERS` has one row for each, read from peft 0.21.2 (`tuners/*/layer.py`, `merge` and `get_delta_weight`). Numbers are float32,
and a weight is `(out_features, in_features)`. Nothing here is stored as a low-rank pair; some tuners equal one, which
`Tuner.pair` returns.
"""

from __future__ import annotations

import math

from adapterhub_converters.lazy_imports import np

from . import sparse_tuners as sparse
from . import subspace_tuners as subspace
from .deltas import LowRank
from .tuner import Numbers, Shape, Tensors, Tuner, Weight, f32

# ---- IA3 (arXiv 2205.05638): a factor for each input, or each output


def _ia3_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    return tensors["ia3_l"].shape in ((1, shape[1]), (shape[0], 1))


def _ia3_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    return weight * f32(tensors["ia3_l"])


# ---- OFT (arXiv 2306.07280) and BOFT (arXiv 2311.06243): rotations of blocks of the inputs


def _cayley(skew: Weight) -> Weight:
    """Return `(I - Q) (I + Q)^-1` of skew-symmetric matrices."""
    eye = np.eye(skew.shape[-1], dtype=np.float32)
    return np.linalg.solve((eye + skew).swapaxes(1, 2), (eye - skew).swapaxes(1, 2)).swapaxes(1, 2)


def _neumann(skew: Weight, terms: int) -> Weight:
    """Return `_cayley` as a series of `terms` terms (peft's `_cayley_batch`), the last with half the factor of the others."""
    rotation = np.broadcast_to(np.eye(skew.shape[-1], dtype=np.float32), skew.shape).copy()
    power = skew
    for term in range(1, terms):
        rotation += power if term == terms - 1 and terms > 3 else 2 * power
        power = power @ skew
    return rotation


def _oft_skew(tensors: Tensors, numbers: Numbers) -> Weight:
    vectors = f32(tensors["oft_R.weight"])
    size = _oft_size(vectors.shape[1])
    skew = np.zeros((len(vectors), size, size), np.float32)
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = vectors
    skew -= skew.swapaxes(1, 2)
    if numbers["coft"]:  # project into a ball around the identity, as peft does at each use
        eps = float(numbers["eps"]) / math.sqrt(len(skew))
        norms = np.sqrt(np.sum(np.square(skew), axis=(1, 2), keepdims=True))
        skew = np.where(norms <= eps, skew, eps * (skew / np.where(norms == 0, 1, norms))).astype(np.float32)
    return skew


def _oft_size(elements: int) -> int:
    """Return the size of a block with this many elements above its diagonal."""
    return (1 + math.isqrt(1 + 8 * elements)) // 2


def _oft_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    vectors = tensors["oft_R.weight"]
    size = _oft_size(vectors.shape[1]) if vectors.ndim == 2 else 0
    blocks = 1 if numbers["block_share"] else len(vectors)
    return size > 0 and vectors.shape == (blocks, size * (size - 1) // 2) and shape[1] == size * (
        shape[1] // size if numbers["block_share"] else blocks
    )  # fmt: skip


def _oft_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    skew = _oft_skew(tensors, numbers)
    terms = int(numbers["num_cayley_neumann_terms"])
    return _rotate_blocks(weight, _neumann(skew, terms) if numbers["use_cayley_neumann"] else _cayley(skew))


def _rotate_blocks(weight: Weight, rotations: Weight) -> Weight:
    """Return `weight @ R.T` for a matrix R with the blocks `rotations` on its diagonal, or one block repeated."""
    size = rotations.shape[-1]
    blocks = weight.reshape(len(weight), -1, size)
    block_rotations = np.broadcast_to(rotations, (blocks.shape[1], size, size))
    result: Weight = np.einsum("obk,bck->obc", blocks, block_rotations).reshape(weight.shape)
    return result


def _boft_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    blocks, scale = tensors["boft_R"], tensors["boft_s"]
    # peft has more than one factor only with its CUDA extension, which permutes the inputs between them.
    is_square = blocks.ndim == 4 and blocks.shape[0] == 1 and blocks.shape[2] == blocks.shape[3]
    return is_square and blocks.shape[1] * blocks.shape[2] == shape[1] and scale.shape == (shape[0], 1)


def _boft_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    blocks = f32(tensors["boft_R"])[0]
    return _rotate_blocks(weight, _cayley(0.5 * (blocks - blocks.swapaxes(1, 2)))) * f32(tensors["boft_s"])


# ---- HRA (arXiv 2405.17484): reflections of the inputs


def _hra_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    return tensors["hra_u"].ndim == 2 and tensors["hra_u"].shape[0] == shape[1]


def _hra_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    axes = f32(tensors["hra_u"])
    unit: list[Weight] = []
    for column in axes.T:
        axis = column
        for earlier_axis in unit if numbers["apply_GS"] else ():
            axis = axis - (earlier_axis @ axis) * earlier_axis
        unit.append(axis / np.sqrt(np.sum(np.square(axis))))
    for axis in unit:
        weight = weight - 2 * np.outer(weight @ axis, axis)
    return weight


# ---- RoAD (arXiv 2409.00119): rotations and scales of pairs of outputs


def _road_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    group, size = numbers["group_size"], _ROAD_SIZES.get(str(numbers["variant"]), 0)
    is_even_split = isinstance(group, int) and group > 0 and group % 2 == 0 and shape[0] % group == 0
    return (
        is_even_split
        and all(tensors[part].shape == (int(size * shape[0]),) for part in ("road_theta", "road_alpha"))
        and size > 0
    )


_ROAD_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}


def _road_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    group, variant = int(numbers["group_size"]), numbers["variant"]
    theta, alpha = (f32(tensors[part]) for part in ("road_theta", "road_alpha"))
    # The variants share numbers differently: one per pair, one per element, or two per element.
    if variant == "road_1":
        theta, alpha = (np.repeat(values.reshape(-1, group // 2), 2, axis=0).reshape(-1) for values in (theta, alpha))
    if variant == "road_4":
        (theta, theta_2), (alpha, alpha_2) = (
            values.reshape(-1, 2, group).swapaxes(0, 1).reshape(2, -1) for values in (theta, alpha)
        )
    else:
        theta_2, alpha_2 = theta, alpha
    halves = weight.reshape(-1, 2, group // 2, weight.shape[1])
    rotated = np.stack([-halves[:, 1], halves[:, 0]], axis=1).reshape(weight.shape)
    result: Weight = weight * (alpha * np.cos(theta))[:, None] + rotated * (alpha_2 * np.sin(theta_2))[:, None]
    return result


# ---- Sums


def _miss_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    block = tensors["miss_block"]
    if block.ndim == 3:
        r = block.shape[1]
        return block.shape == (shape[0] // r, r, r) and not shape[0] % r and not shape[1] % r if r else False
    wide = block.shape[1] if block.ndim == 2 and numbers["init_weights"] == "mini" else shape[0]
    return block.ndim == 2 and 0 < block.shape[0] <= shape[1] and block.shape[1] == wide and not shape[0] % max(wide, 1)


def _miss_pair(tensors: Tensors, numbers: Numbers, shape: Shape) -> LowRank:
    """Return the pair of MiSS (arXiv 2409.15371): a block of rows for each `r` inputs, so `lora_A` is a repeated identity."""
    block = f32(tensors["miss_block"])
    r, out_features, in_features = len(block), *shape
    lora_A = np.tile(np.eye(r, dtype=np.float32), (1, -(-in_features // r)))[:, :in_features]
    return LowRank(lora_A, np.tile(block, (1, out_features // block.shape[1])).T, float(r))


def _miss_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    block = f32(tensors["miss_block"])
    if block.ndim == 2:
        pair = _miss_pair(tensors, numbers, (weight.shape[0], weight.shape[1]))
        result: Weight = weight + pair.lora_B @ pair.lora_A
        return result
    r = block.shape[1]
    blocks = weight.reshape(weight.shape[0] // r, r, weight.shape[1] // r, r).transpose(2, 0, 1, 3)
    return weight + (blocks @ block + block).transpose(1, 2, 0, 3).reshape(weight.shape)


def _c3a_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    kernel = tensors["c3a_kernel"]
    return kernel.ndim == 3 and (kernel.shape[0] * kernel.shape[2], kernel.shape[1] * kernel.shape[2]) == shape


def _c3a_change(tensors: Tensors, numbers: Numbers, weight: Weight) -> Weight:
    """Apply C3A (arXiv 2407.19342): circulant blocks, divided by the number of inputs."""
    kernel = f32(tensors["c3a_kernel"])
    size = kernel.shape[2]
    shifts = (np.arange(size)[None, :] - np.arange(size)[:, None]) % size  # [output, input]
    delta = kernel[:, :, shifts].transpose(0, 2, 1, 3).reshape(weight.shape)
    return weight + delta / np.float32(weight.shape[1])


def _randlora_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    A, B, factors, gamma = (tensors[f"randlora_{part}"] for part in ("A", "B", "lambda", "gamma"))
    narrow, wide = min(shape), max(shape)
    if (A.ndim, B.ndim, factors.ndim, gamma.ndim) != (3, 3, 2, 2) or not len(factors):
        return False
    r, bases = len(factors), -(-narrow // len(factors))
    return (
        (factors.shape[1], gamma.shape) == (bases, (bases, narrow))
        and (A.shape[0], B.shape[2]) == (r, r)
        and A.shape[1] in (1, bases, max(bases, A.shape[1]))
        and A.shape[2] >= narrow and B.shape[0] >= wide and B.shape[1] >= bases
    )  # fmt: skip


def _randlora_pair(tensors: Tensors, numbers: Numbers, shape: Shape) -> LowRank:
    """Return the pair of RandLora (arXiv 2502.00987): random bases of full rank together, with trained factors."""
    A, B, factors, gamma = (f32(tensors[f"randlora_{part}"]) for part in ("A", "B", "lambda", "gamma"))
    bases, narrow, wide = factors.shape[1], min(shape), max(shape)
    small = (factors[:, :, None] * A[:, :bases, :narrow] * gamma[None]).reshape(-1, narrow)
    large = B[:wide, :bases].reshape(wide, -1)
    alpha = float(numbers["randlora_alpha"]) / len(factors) * small.shape[0]
    return LowRank(small, large, alpha) if narrow == shape[1] else LowRank(large.T, small.T, alpha)


def _vblora_fits(tensors: Tensors, numbers: Numbers, shape: Shape) -> bool:
    bank = tensors["vblora_vector_bank"]
    if bank.ndim != 2 or not bank.shape[1]:
        return False
    a, b = (_mixture_shape(tensors, half, len(bank), numbers) for half in "AB")
    return a is not None and b is not None and a[0] == b[1] and (b[0] * bank.shape[1], a[1] * bank.shape[1]) == shape


def _mixture_shape(tensors: Tensors, half: str, vectors: int, numbers: Numbers) -> tuple[int, ...] | None:
    logits = tensors.get(f"vblora_logits_{half}")
    if logits is not None:
        is_valid = logits.ndim == 3 and logits.shape[2] == vectors and 0 < int(numbers["topk"]) <= vectors
        return logits.shape[:2] if is_valid else None
    places, weights = (tensors.get(f"vblora_logits_{half}_topk_{part}") for part in ("indices", "weights"))
    if places is None or weights is None or places.ndim != 3 or places.dtype.kind not in "iu" or not places.size:
        return None
    are_in_range = int(places.min()) >= 0 and int(places.max()) < vectors
    return places.shape[:2] if are_in_range and weights.shape == (*places.shape[:2], places.shape[2] - 1) else None


def _mixture(tensors: Tensors, half: str, numbers: Numbers) -> Weight:
    """Return the vectors of one half: means of the best vectors in the bank, weighted by the softmax of their logits."""
    bank, logits = f32(tensors["vblora_vector_bank"]), tensors.get(f"vblora_logits_{half}")
    if logits is None:
        places = tensors[f"vblora_logits_{half}_topk_indices"].astype(np.int64)
        weights = f32(tensors[f"vblora_logits_{half}_topk_weights"])
        weights = np.concatenate([weights, 1 - weights.sum(axis=-1, keepdims=True)], axis=-1)
    else:
        places = np.argsort(-f32(logits), axis=-1, kind="stable")[..., : int(numbers["topk"])]
        best = np.take_along_axis(f32(logits), places, axis=-1)
        weights = np.exp(best - best.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
    mixed: Weight = (weights[..., None] * bank[places]).sum(axis=-2)
    return mixed


def _vblora_pair(tensors: Tensors, numbers: Numbers, shape: Shape) -> LowRank:
    """Return the pair of VB-LoRA (arXiv 2405.15179), whose halves are mixtures of shared vectors."""
    lora_A = _mixture(tensors, "A", numbers)
    lora_B = _mixture(tensors, "B", numbers).transpose(0, 2, 1)
    r = len(lora_A)
    return LowRank(lora_A.reshape(r, -1), np.ascontiguousarray(lora_B).reshape(-1, r), float(r))


# ---- The table

# VB-LoRA's tensors with `save_only_topk_weights`.
_TOPK_PARTS = tuple(f"vblora_logits_{half}_topk_{part}" for half in "AB" for part in ("indices", "weights"))
_UNILORA_PLACES = tuple(f"unilora_{kind}_{half}" for kind in ("indices", "scales") for half in "AB")
_PROMPT_KEYS = frozenset({
    "num_attention_heads", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path",
    "init_weights", "num_transformer_submodules", "encoder_dropout", "encoder_reparameterization_type", "encoder_num_layers",
})  # fmt: skip


def _prompt_tuner(method: str, **numbers: object) -> Tuner:
    """Return a tuner of tokens that are put before the input."""
    defaults = {"num_virtual_tokens": None, "token_dim": None, "num_layers": None, **numbers}
    reason = "adds tokens to the input, which no weight can express"
    return Tuner(method, defaults, _PROMPT_KEYS, tensor_names=("prompt_embeddings",), unmerged=reason)


TUNERS: dict[str, Tuner] = {
    "IA3": Tuner(
        "ia3", {}, frozenset({"feedforward_modules", "init_ia3_weights"}), ("ia3_l",), _ia3_fits, _ia3_change, bias=True,
    ),
    "OFT": Tuner(
        "oft",
        {"oft_block_size": 32, "block_share": False, "coft": False, "eps": 6e-5, "use_cayley_neumann": True,
         "num_cayley_neumann_terms": 5},
        frozenset({"init_weights", "module_dropout"}), ("oft_R.weight",), _oft_fits, _oft_change,
    ),
    "BOFT": Tuner(
        "boft", {"boft_block_size": 4, "boft_block_num": 0, "boft_n_butterfly_factor": 1},
        frozenset({"init_weights", "boft_dropout"}), ("boft_R", "boft_s"), _boft_fits, _boft_change,
    ),
    "HRA": Tuner("hra", {"r": 8, "apply_GS": False}, frozenset({"init_weights"}), ("hra_u",), _hra_fits, _hra_change),
    "ROAD": Tuner(
        "road", {"variant": "road_1", "group_size": 64}, frozenset({"init_weights"}), ("road_theta", "road_alpha"),
        _road_fits, _road_change, bias=True,
    ),
    "MISS": Tuner(
        "miss", {"r": 64, "mini_r": 1, "init_weights": True}, frozenset({"miss_dropout"}), ("miss_block",), _miss_fits,
        _miss_change,
    ),
    "FOURIERFT": Tuner(
        "fourierft", {"n_frequency": 1000, "scaling": 150.0, "random_loc_seed": 777},
        frozenset({"init_weights", "n_frequency_pattern"}), ("fourierft_spectrum",), sparse.fourier_fits, sparse.fourier_change,
        refuse=sparse.refuse_seed,
    ),
    "SHIRA": Tuner(
        "shira", {"r": 32, "mask_type": "random"}, frozenset({"init_weights", "random_seed"}),
        ("shira_indices", "shira_weight"), sparse.shira_fits, sparse.shira_change, integers=frozenset({"shira_indices"}),
    ),
    "C3A": Tuner(
        "c3a", {"block_size": 256}, frozenset({"init_weights", "block_size_pattern"}), ("c3a_kernel",), _c3a_fits, _c3a_change,
    ),
    "RANDLORA": Tuner(
        "randlora", {"r": 32, "randlora_alpha": 640},
        frozenset({"init_weights", "projection_prng_key", "randlora_dropout", "save_projection", "sparse", "very_sparse"}),
        ("randlora_lambda", "randlora_gamma"), _randlora_fits, pair=_randlora_pair,
        shared=("randlora_A", "randlora_B"),
    ),
    "VBLORA": Tuner(
        "vblora", {"r": 4, "num_vectors": 256, "vector_length": 256, "topk": 2},
        frozenset({"init_logits_std", "init_vector_bank_bound", "save_only_topk_weights", "vblora_dropout"}),
        ("vblora_logits_A", "vblora_logits_B"), _vblora_fits, pair=_vblora_pair, shared=("vblora_vector_bank",),
        variants=(_TOPK_PARTS,),
        integers=frozenset(name for name in _TOPK_PARTS if name.endswith("indices")),
    ),
    "WAVEFT": Tuner(
        "waveft",
        {"n_frequency": 2592, "scaling": 25.0, "wavelet_family": "db1", "use_idwt": True, "random_loc_seed": 777},
        frozenset({"init_weights", "n_frequency_pattern", "proportional_parameters"}), ("waveft_spectrum",), sparse.waveft_fits,
        sparse.waveft_change, refuse=sparse.refuse_wavelet,
    ),
    "SUPERTUNING": Tuner(
        "supertuning", {"sparsity": 0.99, "select_top": True, "r": None, "lora_alpha": None},
        frozenset({"init_weights", "lora_dropout", "save_precomputed_indices"}),
        ("supertuning_indices", "supertuning_values"), sparse.supertuning_fits, sparse.supertuning_change,
        optional=("supertuning_lora_A.weight", "supertuning_lora_B.weight"), integers=frozenset({"supertuning_indices"}),
        unsaved={"supertuning_indices": "save_precomputed_indices"},
    ),
    "DELORA": Tuner(
        "delora", {"r": 8}, frozenset({"init_weights", "delora_lambda", "lambda_pattern", "module_dropout"}),
        ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"), subspace.delora_fits, pair=subspace.delora_pair,
    ),
    "GRALORA": Tuner(
        "gralora", {"r": 32, "hybrid_r": 0, "alpha": 64, "gralora_k": 2}, frozenset({"init_weights", "gralora_dropout"}),
        ("gralora_A", "gralora_B"), subspace.gralora_fits, pair=subspace.gralora_pair,
        optional=("gralora_A_general.weight", "gralora_B_general.weight"),
    ),
    "PVERA": Tuner(
        "pvera", {"r": 256},
        frozenset({"init_weights", "projection_prng_key", "save_projection", "pvera_dropout", "d_initial",
                   "sample_at_inference", "generator_seed"}),
        ("pvera_lambda_b", "pvera_lambda_d"), subspace.pvera_fits, pair=subspace.pvera_pair, shared=("pvera_A", "pvera_B"),
    ),
    "UNILORA": Tuner(
        "unilora", {"r": 4, "theta_d_length": 256},
        frozenset({"init_weights", "proj_seed", "unilora_dropout", "init_theta_d_bound", "save_indices"}),
        _UNILORA_PLACES, subspace.unilora_fits, pair=subspace.unilora_pair, shared=("unilora_theta_d",),
        integers=frozenset(name for name in _UNILORA_PLACES if "indices" in name),
        unsaved=dict.fromkeys(_UNILORA_PLACES, "save_indices"),
    ),
    "TINYLORA": Tuner(
        "tinylora", {"r": 2, "u": 64, "weight_tying": 0.0},
        frozenset({"init_weights", "projection_seed", "save_projection", "init_v_bound", "tinylora_dropout"}),
        ("tinylora_A", "tinylora_B", "tinylora_P"), subspace.tinylora_fits, pair=subspace.tinylora_pair,
        shared=("tinylora_v.0",), unsaved={"tinylora_P": "save_projection"},
    ),
    "HIRA": Tuner(
        "hira", {"r": 32}, frozenset({"init_weights", "hira_dropout"}), ("hira_A", "hira_B"), subspace.hira_fits,
        subspace.hira_change, variants=(("hira_embedding_A", "hira_embedding_B"),),
    ),
    "DEFT": Tuner(
        "deft", {"r": 8, "decomposition_method": "relu", "alpha": None, "para": False},
        frozenset({"init_weights", "init_scale", "deft_dropout"}), ("deft_P",), subspace.deft_fits, subspace.deft_change,
        optional=("deft_R",),
    ),
    "FROD": Tuner(
        "frod", {},
        frozenset({"init_weights", "projection_prng_key", "save_projection", "frod_dropout", "sparse_rate",
                   "regularization_alpha", "progressbar", "runtime_offload_base_weight"}),
        ("frod_lambda_l", "frod_lambda_s_values"), subspace.frod_fits, subspace.frod_change,
        shared=("frod_V", "frod_s_indices", "frod_s_size"), category=subspace.frod_category,
        integers=frozenset({"frod_s_indices", "frod_s_size"}),
    ),
    "OSF": Tuner(
        "osf", {"effective_rank": None}, frozenset({"init_weights", "target_svd_config"}),
        ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low"), subspace.osf_fits, subspace.osf_change,
    ),
    "PEANUT": Tuner(
        "peanut", {"r": 32, "depth": 0, "act_fn": "relu", "scaling": 1.0}, frozenset({"init_weights"}),
        ("peanut_A.weight", "peanut_B.weight"), subspace.peanut_fits, subspace.peanut_change,
        optional=tuple(f"peanut_{half}.{level}.weight" for level in range(32) for half in ("encoders", "decoders")),
        refuse=subspace.refuse_activation,
    ),
    "GLORA": Tuner(
        "glora", {"r": 8, "config_A_B": "lora", "config_C": "lora", "config_D_E": "constant"}, frozenset({"init_weights"}), (),
        subspace.glora_fits, subspace.glora_change, change_bias=subspace.glora_bias,
        optional=tuple(f"glora_{path}.{part}" for path in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")),
    ),
    "BEFT": Tuner("beft", {}, frozenset({"init_weights"}), ("beft_bias",)),
    "LN_TUNING": Tuner("ln_tuning"),
    "TRAINABLE_TOKENS": Tuner("trainable_tokens", {}, frozenset({"init_weights", "token_indices"})),
    "PROMPT_TUNING": _prompt_tuner("prompt_tuning"),
    "PREFIX_TUNING": _prompt_tuner("prefix_tuning", prefix_projection=False, encoder_hidden_size=None),
    "P_TUNING": _prompt_tuner("p_tuning", encoder_hidden_size=None),
    "XLORA": Tuner(
        "xlora",
        {"hidden_size": 4096, "xlora_depth": 1, "xlora_size": 2048, "layerwise_scalings": False, "enable_softmax": True,
         "enable_softmax_topk": False, "softmax_temperature": 1.0, "top_k_lora": None, "scaling_pass_value": 0.0,
         "global_scaling_weight": 1.0},
        frozenset({"adapters", "use_trainable_adapters", "xlora_dropout_p"}), ("weight", "bias"),
        unmerged="mixes LoRA adapters anew for each token, by a classifier of the input, which no weight can express",
    ),
}  # fmt: skip
"""The row of each peft_type."""


def layers_of_classifier(config: Numbers) -> dict[int, Shape]:
    """Return the linear layers of X-LoRA's classifier (arXiv 2402.07148) by number, `(out, in)`; peft, `xlora/classifier.py`.

    The last layer has one row for each adapter, or a multiple of that if it has some for each layer of the model.
    """
    numbers = {**TUNERS["XLORA"].numbers, "xlora_dropout_p": 0.2, **config}
    sizes: list[int] = [n for key in ("hidden_size", "xlora_size", "xlora_depth") if type(n := numbers[key]) is int]
    adapters = numbers.get("adapters")
    # The numbers come from a file: a layer must not become gigabytes because a config says so.
    if len(sizes) < 3 or not all(0 < n < 2**20 for n in sizes) or not isinstance(adapters, dict) or not adapters:
        return {}
    hidden, size, depth = sizes
    if depth > 1000:
        return {}
    step = 3 if numbers["xlora_dropout_p"] else 2  # an activation follows each, and a dropout
    widths = [hidden, *[size] * (depth - 1), len(adapters)]
    return {step * n: (widths[n + 1], widths[n]) for n in range(depth)}


def tuner_of(peft_type: object) -> Tuner | None:
    """Return the row of a peft_type; None for one of LoRA's kinds, an unknown one, or a value that is not text."""
    return TUNERS.get(peft_type) if isinstance(peft_type, str) else None
