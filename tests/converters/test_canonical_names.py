"""Names and shapes of a base's tensors as the checkpoint has them, whichever program wrote the file."""

from __future__ import annotations

from adapterhub_converters.architectures.architecture_lookup import by_gguf
from adapterhub_converters.bases import canonical_names
from adapterhub_converters.bases.canonical_names import BaseTensor
from adapterhub_converters.containers import safetensors_header

LLAMA, GPT2, FALCON, PHI3 = (by_gguf(name, "") for name in ("llama", "gpt2", "falcon", "phi3"))
MIXTRAL = by_gguf("llama", "", experts=True)
EXPERTS = "model.layers.0.block_sparse_moe.experts"
CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def tensors(**shapes: tuple[int, ...]) -> dict[str, BaseTensor]:
    return {name: BaseTensor(shape, "F16") for name, shape in shapes.items()}


def shapes(renamed: dict[str, BaseTensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in renamed.items()}


def test_a_gguf_has_the_names_of_the_checkpoint_and_an_unknown_tensor_its_own() -> None:
    file = tensors(**{"blk.0.attn_q.weight": (32, 16), "output.weight": (40, 16), "rope_freqs.weight": (4,)})
    assert shapes(canonical_names.rename_gguf(LLAMA, file, CONFIG)) == {
        "model.layers.0.self_attn.q_proj.weight": (32, 16), "lm_head.weight": (40, 16), "rope_freqs.weight": (4,),
    }  # fmt: skip


def test_a_conv1d_is_turned_and_its_bias_and_the_table_are_not() -> None:
    file = tensors(**{"blk.0.attn_qkv.weight": (48, 16), "blk.0.attn_qkv.bias": (48,), "token_embd.weight": (40, 16)})
    assert {*shapes(canonical_names.rename_gguf(GPT2, file, {})).values()} == {(16, 48), (48,), (40, 16)}


def test_projections_that_a_file_has_fused_or_split_unlike_others_are_those_of_the_checkpoint() -> None:
    fused = tensors(**{"blk.0.attn_qkv.weight": (32 + 16 + 16, 16)})
    rows = {f"model.layers.0.self_attn.{name}_proj.weight": (count, 16) for name, count in (("q", 32), ("k", 16), ("v", 16))}
    assert shapes(canonical_names.rename_gguf(LLAMA, fused, CONFIG)) == rows
    assert shapes(canonical_names.rename_gguf(LLAMA, fused, {})) == shapes(fused)  # rows of unknown numbers stay together
    split = tensors(**{f"blk.0.attn_{name}.weight": (count, 16) for name, count in (("q", 32), ("k", 16), ("v", 16))})
    assert shapes(canonical_names.rename_gguf(PHI3, split, CONFIG)) == {"model.layers.0.self_attn.qkv_proj.weight": (64, 16)}


def test_experts_are_one_by_one_where_the_checkpoint_has_them_so_and_found_as_a_stack_all_the_same() -> None:
    parameter = "model.layers.0.mlp.experts.gate_up_proj"
    listed = canonical_names.rename_hf(MIXTRAL, tensors(**{parameter: (3, 20, 16)}))
    assert shapes(listed) == {f"{EXPERTS}.{n}.{name}.weight": (10, 16) for n in range(3) for name in ("w1", "w3")}
    assert canonical_names.lookup(MIXTRAL, listed, parameter) == BaseTensor((3, 20, 16), "F16")
    del listed[f"{EXPERTS}.0.w3.weight"]
    assert canonical_names.lookup(MIXTRAL, listed, parameter) is None


def test_a_header_does_not_decide_how_many_experts_are_listed() -> None:
    parameter = "model.layers.0.mlp.experts.gate_up_proj"
    stack = tensors(**{parameter: (safetensors_header.MAX_TENSORS, 20, 16)})
    assert [tensor.shape for tensor in canonical_names.rename_hf(MIXTRAL, stack).values()] == [stack[parameter].shape]


def test_the_first_norm_of_falcon_is_another_one_where_there_are_two() -> None:
    one_norm = tensors(**{"blk.0.attn_norm.weight": (16,)})
    assert [*canonical_names.rename_gguf(FALCON, one_norm, {})] == ["transformer.h.0.input_layernorm.weight"]
    two = one_norm | tensors(**{"blk.0.attn_norm_2.weight": (16,)})
    assert {*canonical_names.rename_gguf(FALCON, two, {})} == {
        "transformer.h.0.ln_mlp.weight", "transformer.h.0.ln_attn.weight",
    }  # fmt: skip
