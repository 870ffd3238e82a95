"""The names of mlx-lm's modules for each model type, and which of the modules accept an adapter.

mlx-lm refuses a file with any other tensor (`tuner/utils.py`, `load_adapters`), and has fewer such modules than transformers:
most routers are not linear layers there, and other modules absorb the `kv_b_proj` of DeepSeek's attention. Its names are those
in files on the Hub, not those in memory; experts are one `switch_mlp`, or keep the name `experts`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

from adapterhub_converters import safe_regex
from adapterhub_converters.architectures.architecture import text_name
from adapterhub_converters.bases import names_in_memory
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

VERSION = "0.32.2"
_LAYER = safe_regex.Pattern(
    r"(?:model\.layers|transformer\.h|gpt_neox\.layers|backbone\.layers)\.(0|[1-9][0-9]{0,5})\.([A-Za-z0-9_.]+)"
)
_EXPERT = safe_regex.Pattern(r"([A-Za-z0-9_.]*experts)\.(0|[1-9][0-9]{0,3})\.([a-z0-9_]+)")
_STACK = safe_regex.Pattern(r"([A-Za-z0-9_.]*experts)\.(gate_up_proj|up_proj|down_proj)")
_STACK_IN_FILE = safe_regex.Pattern(r"(.+\.)(?:switch_mlp|switch_glu|experts)\.(gate_proj|up_proj|down_proj|fc1|fc2)")
_TEXT = "language_model."
_MIXTRAL = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_UNGATED = {"up_proj": "fc1", "down_proj": "fc2"}  # for experts without a gate
_PROJECTIONS = {**_MIXTRAL, **{name: name for name in _MIXTRAL.values()}}
_TABLE, _HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Row:
    """The modules that mlx-lm has for some model types.

    Attributes:
        types: The model types, separated by spaces.
        paths: The paths of linear modules within a layer.
        experts: The path of stacked experts within a layer; empty if no adapter is written for them.
        layers: The list of layers.
        table: The embedding table.
        head: The output layer.
        gated: Whether the experts have a gate.
        alternating: Whether the rows of gate and up alternate in transformers' stack of both.
    """

    types: str
    paths: tuple[str, ...]
    experts: str = ""
    layers: str = "model.layers"
    table: str = "model.embed_tokens"
    head: str = "lm_head"
    gated: bool = True
    alternating: bool = False


def _in(parent: str, names: str) -> tuple[str, ...]:
    return tuple(f"{parent}.{name}" for name in names.split())


def _vision_row(types: str, paths: tuple[str, ...], experts: str = "") -> Row:
    """Return the row of vision models, whose text model is under a prefix."""
    prefix = "language_model."
    return Row(types, paths, experts, f"{prefix}model.layers", f"{prefix}model.embed_tokens", f"{prefix}lm_head")


_GATED = "gate_proj up_proj down_proj"
_QKV = _in("self_attn", "q_proj k_proj v_proj")
_ATTENTION = _QKV + _in("self_attn", "o_proj")
_MLP = _in("mlp", _GATED)
_SHARED = _in("mlp.shared_experts", _GATED)
_LLAMA = _ATTENTION + _MLP
_QWEN_MOE = _ATTENTION + _in("mlp", "gate shared_expert_gate") + _in("mlp.shared_expert", _GATED)
_DELTA = _in("linear_attn", "in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj")
_COMPRESSED = "q_a_proj q_b_proj kv_a_proj_with_mqa o_proj"
_MLA = ("self_attn.q_proj", *_in("self_attn", _COMPRESSED), *_MLP)
_INDEXER = _in("self_attn.indexer", "wq_b wk weights_proj")
_GEMMA_4 = (*_LLAMA, "per_layer_input_gate", "per_layer_projection", "router.proj")
_GPT_2 = _in("mlp", "c_fc c_proj")
_STATES = "in_proj x_proj dt_proj out_proj"
_FEED = _in("feed_forward", _GATED)
_LONGCAT = tuple(path for n in "01" for path in (*_in(f"self_attn.{n}", _COMPRESSED), *_in(f"mlps.{n}", _GATED)))
_SWITCH, _SPARSE = "mlp.switch_mlp", "block_sparse_moe.switch_mlp"

ROWS = (
    Row(
        "cohere cohere2 ernie4_5 exaone4 gemma gemma2 gemma3_text granite helium hunyuan_v1_dense internlm3 iquestcoder llama "
        "ministral3 mistral olmo2 olmo3 qwen2 qwen3 seed_oss smollm3 stablelm",
        _LLAMA,
    ),
    Row("apertus nemotron", _ATTENTION + _in("mlp", "up_proj down_proj")),
    Row("glm glm4", _ATTENTION + _in("mlp", "gate_up_proj down_proj")),
    Row("phi3", _in("self_attn", "qkv_proj o_proj") + _in("mlp", "gate_up_proj down_proj")),
    Row("phi", _QKV + _in("self_attn", "dense") + _in("mlp", "fc1 fc2")),
    Row("starcoder2", _ATTENTION + _in("mlp", "c_fc c_proj")),
    Row("minicpm3", _in("self_attn", f"{_COMPRESSED} kv_b_proj") + _MLP),
    Row("muse_glimmer", _LLAMA + _in("self_attn", "gate_proj")),
    Row("gemma4_text", _GEMMA_4, "experts.switch_glu"),
    Row("mixtral minimax minimax_m2 phimoe", _ATTENTION + _in("block_sparse_moe", "gate"), _SPARSE),
    Row("granitemoe", _ATTENTION + _in("block_sparse_moe.router", "layer"), _SPARSE),
    Row(
        "granitemoehybrid",
        (
            *_ATTENTION, "block_sparse_moe.router.layer", *_in("shared_mlp", "input_linear output_linear"),
            *_in("mamba", "in_proj out_proj"),
        ),
        _SPARSE,
    ),
    Row("olmoe mellum", _ATTENTION + _in("mlp", "gate"), _SWITCH),
    Row("qwen2_moe", _QWEN_MOE, _SWITCH),
    Row("qwen3_moe", _LLAMA + _in("mlp", "gate"), _SWITCH),
    Row("qwen3_next", _QWEN_MOE + _MLP + _in("linear_attn", "in_proj_qkvz in_proj_ba out_proj"), _SWITCH),
    Row("ernie4_5_moe", _LLAMA + _in("mlp", "gate") + _SHARED, _SWITCH),
    Row("glm4_moe exaone_moe solar_open", _LLAMA + _SHARED, _SWITCH),
    Row("mimo_v2_flash", _LLAMA, _SWITCH),
    Row("dots1", _LLAMA + _SHARED, "mlp.experts"),
    Row("afmoe", _LLAMA + _in("self_attn", "gate_proj") + _in("mlp.router", "gate") + _SHARED, "mlp.experts"),
    Row("laguna", (*_LLAMA, "self_attn.g_proj", "mlp.gate.proj", *_in("mlp.shared_expert", _GATED)), _SWITCH),
    Row("gpt_oss", _ATTENTION + _in("mlp", "router"), "mlp.experts", alternating=True),
    Row("deepseek_v2", _MLA + _in("self_attn", "kv_b_proj") + _SHARED, _SWITCH),
    Row("deepseek_v3 glm4_moe_lite", _MLA + _SHARED, _SWITCH),
    Row("deepseek_v32 glm_moe_dsa", _in("self_attn", _COMPRESSED) + _MLP + _SHARED + _INDEXER, _SWITCH),
    Row("mistral4", _MLA + _in("mlp", "gate") + _SHARED, _SWITCH),
    Row(
        "kimi_linear",
        (
            *_LLAMA, *_SHARED, "mlp.gate", "self_attn.kv_a_proj_with_mqa",
            *_in("self_attn", "b_proj f_a_proj f_b_proj g_a_proj g_b_proj"),
        ),
        _SWITCH,
    ),
    Row("longcat_flash", (*_LONGCAT, "mlp.router.classifier"), _SWITCH),
    Row("jamba", (*_ATTENTION, *_FEED, "feed_forward.router", *_in("mamba", _STATES)), "feed_forward.switch_mlp"),
    Row("lfm2", _QKV + _in("self_attn", "out_proj") + _in("conv", "in_proj out_proj") + _in("feed_forward", "w1 w2 w3")),
    Row(
        "lfm2_moe",
        _QKV + _in("self_attn", "out_proj") + _in("conv", "in_proj out_proj") + _FEED + _in("feed_forward", "gate"),
        "feed_forward.switch_mlp",
    ),
    Row("falcon_h1", _ATTENTION + _FEED + _in("mamba", "in_proj out_proj")),
    Row("llama4_text", _ATTENTION + _FEED, head="output"),
    Row("olmo_hybrid", _LLAMA + _in("linear_attn", "q_proj k_proj v_proj a_proj b_proj g_proj o_proj")),
    Row(
        "recurrent_gemma",
        (*_in("mlp_block", _GATED), *_in("temporal_block", "linear_x linear_y linear_out q_proj k_proj v_proj o_proj")),
    ),
    Row("mamba falcon_mamba", _in("mixer", _STATES), layers="backbone.layers", table="backbone.embeddings"),
    Row("mamba2", _in("mixer", "in_proj out_proj"), layers="backbone.layers", table="backbone.embeddings"),
    Row(
        "nemotron_h",
        (
            *_in("mixer", "in_proj out_proj q_proj k_proj v_proj o_proj up_proj down_proj"),
            *_in("mixer.shared_experts", "up_proj down_proj"),
        ),
        "mixer.switch_mlp", layers="backbone.layers", table="backbone.embeddings", gated=False,
    ),
    Row(
        "exaone", _in("attn.attention", "q_proj k_proj v_proj out_proj") + _in("mlp", "c_fc_0 c_fc_1 c_proj"),
        layers="transformer.h", table="transformer.wte",
    ),
    Row("nanochat", (*_in("attn", "c_q c_k c_v c_proj"), *_GPT_2), layers="transformer.h", table="transformer.wte"),
    Row("gpt_bigcode", ("attn.c_attn", "attn.c_proj", *_GPT_2), layers="transformer.h", table="transformer.wte"),
    Row("gpt2", ("attn.c_attn", "attn.c_proj", *_GPT_2), layers="model.h", table="model.wte"),
    Row("gptj", _in("attn", "q_proj k_proj v_proj out_proj") + _in("mlp", "fc_in fc_out"), layers="model.h", table="model.wte"),
    Row(
        "gpt_neox", _in("attention", "query_key_value dense") + _in("mlp", "dense_h_to_4h dense_4h_to_h"),
        layers="model.h", table="model.embed_in", head="model.embed_out",
    ),
    _vision_row("gemma3 llava mistral3 qwen2_vl qwen2_5_vl qwen3_vl", _LLAMA),
    _vision_row("gemma4 gemma4_unified", _GEMMA_4, "experts.switch_glu"),
    _vision_row("qwen3_vl_moe", _LLAMA + _in("mlp", "gate"), _SWITCH),
    _vision_row("qwen3_5", _LLAMA + _DELTA),
    _vision_row("qwen3_5_moe", _QWEN_MOE + _DELTA, _SWITCH),
    _vision_row("kimi_k25", _MLA + _SHARED, _SWITCH),
    _vision_row(
        "llama4",
        _ATTENTION + _FEED + _in("feed_forward", "router") + _in("feed_forward.shared_expert", _GATED),
        "feed_forward.experts",
    ),
)  # fmt: skip
"""The rows of the table. A test compares each with the model that mlx-lm builds from a small config."""


class Names:
    """The names that mlx-lm has for the modules of one base, looked up by their names in the text model (`text_name`).

    Without a base, or if its model type is not known, the names are those of Hugging Face, and experts are one `switch_mlp`.

    Attributes:
        table: The embedding table in mlx-lm.
        head: The output layer in mlx-lm.
    """

    def __init__(self, base: BaseSpec | None) -> None:
        self._type = base.model_type if base is not None else ""
        self._row = rows().get(self._type)
        self.table, self.head = (self._row.table, self._row.head) if self._row else (_TABLE, _HEAD)
        self._parts = _PROJECTIONS if self._row is None or self._row.gated else _UNGATED
        self._paths = {self._in_memory(path): path for path in self._row.paths} if self._row else {}

    @property
    def is_known(self) -> bool:
        """Whether the model type is known."""
        return self._row is not None

    @property
    def alternating(self) -> bool:
        """Whether the rows of gate and up alternate in transformers' stack of both."""
        return self._row is not None and self._row.alternating

    @property
    def unknown_reason(self) -> str:
        """The reason why the base cannot have any adapter; empty if it can, or if it is not known."""
        return (
            f"mlx-lm {VERSION} has no model type {self._type} that is known to take adapters"
            if self._type and not self._row
            else ""
        )

    def module(self, target: str) -> str | None:
        """Return mlx-lm's name of a linear module or a table; None for a module that accepts no adapter."""
        if target in (_TABLE, _HEAD):
            return self.table if target == _TABLE else self.head
        number, path = _layer(target)
        if not number or ".experts." in target:
            return None
        if self._row is None:
            return target if target.startswith("model.layers.") else None
        module_path = self._paths.get(self._in_memory(path))
        return f"{self._row.layers}.{number}.{module_path}" if module_path else None

    def expert(self, target: str) -> tuple[str, int] | None:
        """Return the module with all experts of a layer, and the number of the expert `target`; None for another module."""
        number, path = _layer(target)
        match = _EXPERT.fullmatch(path)
        stack = self._stack(number, match[1]) if match else ""
        part = self._parts.get(match[3]) if match else None
        return (f"{stack}.{part}", int(match[2])) if stack and match and part else None

    def parameter(self, target: str) -> tuple[str, ...]:
        """Return the modules into which a parameter with all experts of a layer is split; empty for another name."""
        number, path = _layer(target)
        match = _STACK.fullmatch(path)
        stack = self._stack(number, match[1]) if match else ""
        stacked_names = ("gate_up_proj", "down_proj") if self._parts is _PROJECTIONS else ("up_proj", "down_proj")
        if not stack or not match or match[2] not in stacked_names:
            return ()
        sides = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else (match[2],)
        return tuple(f"{stack}.{self._parts[side]}" for side in sides)

    def _stack(self, number: str, experts: str) -> str:
        if not number:
            return ""
        if self._row is None:
            return f"model.layers.{number}.{experts.removesuffix('experts')}switch_mlp" if experts.endswith(".experts") else ""
        return f"{self._row.layers}.{number}.{self._row.experts}" if self._row.experts else ""

    def _in_memory(self, path: str) -> str:
        return names_in_memory.renaming(self._type).module(f"model.layers.0.{path}").partition(".layers.0.")[2]


def expert_place(name: str) -> tuple[str, str] | None:
    """Return the experts' list and the expert's part for a module with all experts of a layer; None for any other module.

    Args:
        name: mlx-lm's name of the module.
    """
    match = _STACK_IN_FILE.fullmatch(name)
    if not match:
        return None
    place, part = match[1].removesuffix("experts."), match[2]
    if part in _UNGATED.values():
        return f"{place}experts", next(name for name, mlx_name in _UNGATED.items() if mlx_name == part)
    # Mixtral's files call the projections w1 to w3, which mlx-lm renames.
    mixtral_names = {value: key for key, value in _MIXTRAL.items()}
    return f"{place}experts", mixtral_names[part] if place.endswith("block_sparse_moe.") else part


def in_base(name: str, base: BaseSpec | None) -> str:
    """Return transformers' name for a module or parameter of the text model, unless the base's files use mlx-lm's name."""
    # Vision models have their text model at `model.language_model` in transformers.
    if base is None or not name.startswith(_TEXT) or name in base.tensors or f"{name}.weight" in base.tensors:
        return name
    inner = name.removeprefix(_TEXT)
    return f"model.{_TEXT}{inner.removeprefix('model.')}" if inner.startswith("model.") else inner


def expert_number(target: str) -> int:
    """Return the number of the expert that a module belongs to; 0 for another module."""
    match = _EXPERT.fullmatch(_layer(text_name(target))[1])
    return int(match[2]) if match else 0


def unsupported_reason(targets: Iterable[str], base: BaseSpec) -> str:
    """Return why mlx-lm cannot have an adapter on the first of these modules that it lacks; empty if it has all of them."""
    names = Names(base)
    if names.unknown_reason:
        return names.unknown_reason
    texts = ((target, text_name(target)) for target in targets)
    unsupported = next((t for t, text in texts if not (names.module(text) or names.expert(text) or names.parameter(text))), "")
    return (
        f"{unsupported} is not a module that mlx-lm is known to have under this name, or takes an adapter on"
        if unsupported
        else ""
    )


@cache
def rows() -> dict[str, Row]:
    """Return the table as a map of each model type to its row."""
    return {name: row for row in ROWS for name in row.types.split()}


def _layer(target: str) -> tuple[str, str]:
    """Return the number of a module's layer, and the module's path there; both empty if it is in no layer of the text model."""
    match = _LAYER.fullmatch(target)
    return (match[1], match[2]) if match else ("", "")
