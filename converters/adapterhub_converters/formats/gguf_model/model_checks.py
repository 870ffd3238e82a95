"""Refusal of models that llama.cpp cannot load or would compute differently (`src/models/*.cpp`).

The tensors must be complete and of consistent shapes. llama.cpp computes some steps in one fixed way whatever config.json sets,
and its conversion ignores the difference; a model that needs another way is refused. If only long texts differ, a note is given
instead: Mistral's first models and gpt-oss are widely used this way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from adapterhub_converters.architectures.architecture import Architecture
from adapterhub_converters.errors import RefusedError

from .model_config import Config
from .shared_keys import layer_kinds

Shape = tuple[int, ...]
_BIASES = ("attn_q.", "attn_k.", "attn_v.", "attn_qkv.", "attn_output.", "ffn_")
_UNBIASED = dict.fromkeys(
    (
        "smollm3", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "olmo2", "command-r", "cohere2", "arcee", "ernie4_5",
        "falcon", "exaone4", "olmoe", "minimax-m2", "ernie4_5-moe", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe", "apertus",
        "lfm2", "hunyuan-dense", "glm4moe",
    ),
    _BIASES,
) | {"seed_oss": ("attn_output.", "ffn_"), "deepseek2": ("ffn_",)}  # fmt: skip
_UNBIASED["glm4moe"] = ("attn_output.", "ffn_")
"""Biases that llama.cpp does not support (`src/models/*.cpp`): it does not load a file with them."""
_NEEDS_BIAS = {
    "starcoder2": ("attn_output.", "ffn_down.", "ffn_up."),
    "gpt-oss": ("attn_q.", "attn_k.", "attn_v.", "attn_output."),
}
"""Biases without which llama.cpp does not load a file."""
_UNTIED = ("qwen2moe", "olmo2", "stablelm", "gpt-oss", "nemotron", "olmoe", "phi2", "minimax-m2", "apertus")
"""Architectures that llama.cpp does not load without an output layer."""


def check_complete(architecture: Architecture, shapes: Mapping[str, Shape], config: Config) -> None:
    """Raise RefusedError if a tensor is missing, is not supported by llama.cpp, or has a shape unlike other layers."""
    _check_top(architecture, shapes, config)
    _check_biases(architecture.gguf, shapes, config)
    _check_layers(architecture.gguf, shapes, config)


def _check_top(architecture: Architecture, shapes: Mapping[str, Shape], config: Config) -> None:
    table, head = shapes.get("token_embd.weight"), shapes.get("output.weight")
    missing = [stem for stem in architecture.top.values() if stem != "output" and f"{stem}.weight" not in shapes]
    untied = config.get("tie_word_embeddings") is False or architecture.gguf in _UNTIED
    if architecture.head and head is None and untied:
        missing.append("output")
    if missing:
        raise RefusedError(config.where, f"no tensor for llama.cpp's {missing[0]}.weight")
    if table is None or len(table) != 2 or table[1] != config.count("hidden_size") or head not in (None, table):
        raise RefusedError(
            config.where, f"embeddings {table} and an output layer {head} that contradict the sizes in config.json"
        )


def _check_biases(gguf: str, shapes: Mapping[str, Shape], config: Config) -> None:
    for name in shapes:
        _, _, inner = name.removeprefix("blk.").partition(".")
        if name.endswith(".bias") and inner.startswith(_UNBIASED.get(gguf, ())):
            raise RefusedError(config.where, f"a bias {name}, but llama.cpp's {gguf} has none")
    for stem in _NEEDS_BIAS.get(gguf, ()):
        if f"blk.0.{stem}bias" not in shapes:
            raise RefusedError(config.where, f"no bias blk.0.{stem}bias, but llama.cpp's {gguf} needs one")


def _check_layers(gguf: str, shapes: Mapping[str, Shape], config: Config) -> None:
    count = config.count("num_hidden_layers")
    kinds = layer_kinds(gguf, config)
    layers: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        if name.startswith("blk."):
            layer, _, inner = name.removeprefix("blk.").partition(".")
            layers.setdefault(layer, {})[inner] = shape
    if len(layers) != count:
        raise RefusedError(config.where, f"config.json: num_hidden_layers is {count}, but there are {len(layers)}")
    for layer, tensors in layers.items():
        reference = layers[str(kinds.index(kinds[int(layer)]))]
        differing = next(
            (inner for inner in sorted({*tensors, *reference}) if tensors.get(inner) != reference.get(inner)), None
        )
        if differing:
            problem = (
                f"layer {layer} has {tensors.get(differing, 'no tensor')} for {differing}, "
                f"but others have {reference.get(differing, 'none')}"
            )
            raise RefusedError(config.where, problem)


# ---- The computation


_FIXED: dict[str, dict[str, tuple[Any, Any]]] = {
    "qwen2_moe": {"norm_topk_prob": (False, False)},
    "qwen3_moe": {"norm_topk_prob": (False, True)},
    "gemma3_text": {"use_bidirectional_attention": (False, False)},
    "gpt_oss": {"swiglu_limit": (7.0, 7.0)},
    "deepseek_v2": {"norm_topk_prob": (False, False)},
    "deepseek_v3": {"rope_interleave": (True, True), "scoring_func": (None, "sigmoid")},
    "ernie4_5_moe": {"moe_layer_interval": (1, 1)},
    "olmoe": {"norm_topk_prob": (False, False), "clip_qkv": (None, None)},
    "phi": {"qk_layernorm": (False, False)},
    "minimax_m2": {"scoring_func": (None, "sigmoid")},
    "qwen3_vl_moe_text": {"norm_topk_prob": (True, True)},
    "lfm2": {"conv_bias": (False, False)},
}
"""Key to transformers' default, and the value that llama.cpp always uses."""
_PERIODS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "gpt_oss": 2}
"""The period of the layers that attend to the whole text: the last of every so many."""
_WINDOWED = {"mistral": 4096, "mixtral": None, "starcoder2": None, "phi3": None, "ministral3": None}
"""Model types with a window on all layers, and transformers' default for it."""
_SQUARE = (
    "qwen2", "qwen2_moe", "olmo", "olmo2", "phi3", "starcoder2", "stablelm", "cohere", "cohere2", "nemotron", "gpt2", "falcon",
    "bloom", "olmo3", "olmoe", "phi", "qwen2_vl", "qwen2_5_vl", "qwen2_vl_text", "qwen2_5_vl_text", "exaone4", "lfm2",
)  # fmt: skip
"""Model types whose heads together are as wide as the model."""
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0}


def check_computed(config: Config) -> tuple[str, ...]:
    """Return a note for each difference on long texts; raise RefusedError if llama.cpp computes something else."""
    for key, (default, computed) in _FIXED.get(config.model_type, {}).items():
        value = config.values.get(key, default)
        if value != computed:
            _refuse(config, f"{key} is {str(value)[:40]}", f"{computed}")
    heads = config.count("num_attention_heads")
    if (
        config.model_type in _SQUARE
        and config.get("head_dim")
        and config.count("head_dim") * heads != config.count("hidden_size")
    ):
        _refuse(config, f"head_dim is {config.get('head_dim')}", f"{config.count('hidden_size') // max(1, heads)}")
    _check_windows(config)
    _CHECKS_BY_TYPE.get(config.model_type, _no_check)(config)
    return (*_rope(config), *_window(config))


def _refuse(config: Config, configured: str, computed: str) -> None:
    raise RefusedError(config.where, f"config.json: {configured}, but llama.cpp's code for {config.model_type} uses {computed}")


def _no_check(_: Config) -> None:
    return


def _check_windows(config: Config) -> None:
    """Refuse a model unless the layers with a window are those that llama.cpp expects."""
    period, count = _PERIODS.get(config.model_type), config.count("num_hidden_layers")
    if not period:
        return
    layer_types = config.get("layer_types")
    if isinstance(layer_types, list):
        full_attention = [index for index, kind in enumerate(layer_types[:count]) if kind != "sliding_attention"]
    else:
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or period
        full_attention = list(range(pattern - 1, count, pattern)) if isinstance(pattern, int) and pattern > 0 else []
    if config.model_type == "gemma3_text" and config.get("sliding_window_pattern") == 1 and len(full_attention) == count:
        return
    if full_attention != list(range(period - 1, count, period)):
        _refuse(config, "other layers attend to the whole text", f"the last of every {period} layers for that")


def _cohere(config: Config) -> None:
    if config.get("use_qk_norm") and config.count("num_hidden_layers") < 64:
        _refuse(config, "use_qk_norm is True", "norms of queries and keys from 64 layers on")


def _granite(config: Config) -> None:
    for key in ("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"):
        if config.number(key) == 0:
            _refuse(config, f"{key} is 0", "no such factor then")


def _smollm3(config: Config) -> None:
    count, step = config.count("num_hidden_layers"), config.values.get("no_rope_layer_interval", 4)
    computed = [int((layer + 1) % 4 != 0) for layer in range(count)]
    configured = config.get("no_rope_layers")
    if configured is None and isinstance(step, int) and step > 0:
        configured = [int((layer + 1) % step != 0) for layer in range(count)]
    if configured != computed:
        _refuse(config, "other layers are without a rotary embedding", "the last of every 4 layers without one")


def _gemma3(config: Config) -> None:
    is_27b = config.count("num_hidden_layers") == 62
    computed = config.count("hidden_size") // config.count("num_attention_heads") if is_27b else config.count("head_dim")
    configured = config.values.get("query_pre_attn_scalar", 256)
    if configured != computed:
        _refuse(config, f"query_pre_attn_scalar is {str(configured)[:40]}", str(computed))


def _deepseek2(config: Config) -> None:
    groups = config.get("n_group") or 1
    if groups != 1 and config.model_type == "deepseek_v2":
        _refuse(config, "groups of experts are chosen by their best one", "the sum of their two best")
    if groups != 1 and groups == config.get("topk_group"):
        _refuse(config, f"all {groups} groups of experts are chosen", "fewer")
    if config.rope["rope_type"] == "linear":
        _refuse(config, "the rotary embedding is linear", "another scale for it")


def _ernie4_5_moe(config: Config) -> None:
    last = config.count("num_hidden_layers") - 1
    if config.get("moe_layer_end_index") not in (None, -1) and config.count("moe_layer_end_index") < last:
        _refuse(config, f"moe_layer_end_index is {config.get('moe_layer_end_index')}", "experts up to the last layer")


def _nemotron(config: Config) -> None:
    if config.rope["rope_type"] == "yarn":
        _refuse(config, "the rotary embedding is yarn", "a linear one")


_CHECKS_BY_TYPE: dict[str, Callable[[Config], None]] = {
    "cohere": _cohere, "granite": _granite, "smollm3": _smollm3, "gemma3_text": _gemma3, "deepseek_v2": _deepseek2,
    "deepseek_v3": _deepseek2, "nemotron": _nemotron, "granitemoe": _granite, "glm4_moe": _deepseek2,
    "ernie4_5_moe": _ernie4_5_moe,
}  # fmt: skip


def _rope(config: Config) -> tuple[str, ...]:
    rope = config.rope
    if rope["rope_type"] in ("longrope", "su"):
        scale = config.count("max_position_embeddings") / max(1, config.count("original_max_position_embeddings"))
        log = math.log(max(2, config.count("original_max_position_embeddings")))
        _attention(config, math.sqrt(1 + math.log(scale) / log) if scale > 1 else 1.0)
    if rope["rope_type"] != "yarn":
        return ()
    for key, computed in _YARN.items():
        if rope.get(key) not in (None, computed):
            _refuse(config, f"{key} of the rotary embedding is {str(rope[key])[:40]}", f"{computed:g}")
    mscales = rope.get("mscale"), rope.get("mscale_all_dim")
    if config.model_type.startswith("deepseek") or config.model_type == "ministral3":
        if not mscales[0] or mscales[0] != mscales[1]:
            _refuse(config, f"mscale and mscale_all_dim are {str(mscales)[:60]}", "one number for both")
    elif all(mscales) and rope.get("attention_factor") is None:
        _refuse(config, f"mscale and mscale_all_dim are {str(mscales)[:60]}", "neither")
    _attention(config, 1 + 0.1 * math.log(max(1.0, config.rope_number("factor"))))
    if rope.get("truncate") is False:
        return ("llama.cpp rounds the bounds of the rotary embedding's ramp, which this model does not (truncate)",)
    return ()


def _attention(config: Config, computed: float) -> None:
    if config.rope.get("attention_factor") is not None:
        configured = config.rope_number("attention_factor")
        if not math.isclose(configured, computed, rel_tol=1e-4):
            _refuse(config, f"attention_factor of the rotary embedding is {configured:g}", f"{computed:g}")


def _window(config: Config) -> tuple[str, ...]:
    kind, layer_types = config.model_type, config.get("layer_types")
    if kind in _PERIODS or not (kind in _WINDOWED or config.get("use_sliding_window")):
        return ()
    if kind not in _WINDOWED and isinstance(layer_types, list) and "sliding_attention" not in layer_types:
        return ()
    size = config.values.get("sliding_window", _WINDOWED.get(kind, 4096))
    longest = config.get("max_position_embeddings")
    if not isinstance(size, int) or size <= 0 or (isinstance(longest, int) and longest <= size):
        return ()
    return (
        f"llama.cpp attends to the whole text, not to the last {size} tokens (sliding_window): longer texts give other results",
    )
