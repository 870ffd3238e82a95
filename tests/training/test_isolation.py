"""Documents in a row: whether a model separates them, for every family that docs/train-models.md lists, in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from adapterhub.training.layers import row_attention, varlen  # noqa: E402
from adapterhub.training.model.base_model import Base  # noqa: E402
from adapterhub.training.model.probes import isolates_documents, with_documents_if_equivalent  # noqa: E402
from adapterhub_converters.errors import RefusedError  # noqa: E402
from tests.support import tiny  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "train-models.md"
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What a tiny model of a family needs besides the numbers that all have.
CONFIGS: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "codegen": {"rotary_dim": 8},
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64, "mamba_n_heads": 4},
    "gemma4_text": {"vocab_size_per_layer_input": 259},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4, "vocab_size_per_layer_input": 259, "hidden_size_per_layer_input": 16,
        "laurel_rank": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1, **EXPERTS},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"], "n_mamba_heads": 8, "mamba_d_state": 16, "mamba_ngroups": 1,
        "num_mem_blocks": 1,
    },
}  # fmt: skip


def families() -> list[tuple[str, bool]]:
    """The families of the table in the docs, and whether their documents share rows."""
    families_and_shares = []
    for line in DOCS.read_text().splitlines():
        names, _, share = line.strip("| ").rpartition(" | ")
        if share in ("yes", "no") or names.startswith("gpt_oss"):
            words = names.replace("(its experts stay as they are)", "").split(": ")
            listed = words[0] if len(words) == 1 or words[0] == "gpt_oss" else words[1]
            families_and_shares += [(name.strip(), share == "yes") for name in listed.split(",")]
    return families_and_shares


def tiny_model(family: str, **words: Any) -> Any:
    """A tiny model of the family, with the attention of trainings where it takes one."""
    model = tiny.model(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family], vocab_size=259, **CONFIGS.get(family, {}), **words)
    if row_attention.suits(type(model)):
        model.set_attn_implementation(row_attention.register())
    return model


@pytest.mark.parametrize(("family", "share"), families())
def test_documents_share_the_rows_of_the_families_that_the_docs_list(family: str, share: bool) -> None:
    assert isolates_documents(Base(tiny_model(family).to(torch.bfloat16), None, ())) is share


# Of the families that share rows: with windows, several kinds of layers, experts, fused projections; those that need a mask are
# gemma2 (soft caps), gpt2 (dropout of the attention) and nemotron (an attention of its own).
@pytest.mark.parametrize("family", [
    "llama", "mistral", "cohere2", "exaone4", "gemma3_text", "gemma4_text", "phi3", "glm4_moe", "deepseek_v3",
    "gemma2", "gpt2", "nemotron",
])  # fmt: skip
def test_attention_by_documents_computes_what_masks_do(family: str) -> None:
    window = {"sliding_window": 4} if family in ("mistral", "cohere2", "exaone4", "gemma3_text", "gemma4_text") else {}
    masked = Base(tiny_model(family, **window), None, ())
    base = with_documents_if_equivalent(masked)
    assert base.by_documents is (family not in ("gemma2", "gpt2", "nemotron"))
    positions = np.stack([np.concatenate([np.arange(20), np.arange(9), np.arange(11)]), np.arange(40)])
    ids = torch.randint(0, 259, positions.shape, generator=torch.Generator().manual_seed(2))
    base.model.eval()
    with torch.no_grad():
        expected = masked.states(ids, torch.from_numpy(positions))
        states = base.states(ids, torch.from_numpy(positions), base.documents(positions))
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-5)


def test_documents_begin_where_positions_do_and_padding_is_one() -> None:
    positions = np.array([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    documents = varlen.documents_at(positions, torch.device("cpu"))
    assert documents.edges == (0, 3, 5, 6, 12)
    assert documents.bounds.tolist() == [0, 3, 5, 6, 12]
    assert documents.bounds.dtype == torch.int32
    assert documents.longest == 6


def test_torchs_kernel_takes_what_it_is_given_and_has_a_gradient() -> None:
    """On torch's device without memory: the numbers of a GPU are compared with those of a CPU in test_devices.py."""
    q, k, v = (torch.zeros(2, heads, 40, 16, device="meta", requires_grad=True) for heads in (4, 2, 2))
    documents = varlen.documents_at(np.tile(np.arange(20), (2, 2)), torch.device("meta"))
    output = varlen.attend_with_flash(q, k, v, documents, window=8, factor=0.25)
    assert output.shape == (2, 40, 4, 16)
    gradients = torch.autograd.grad(output.sum(), (q, k, v))
    assert [gradient.shape for gradient in gradients] == [part.shape for part in (q, k, v)]


def test_a_model_that_does_not_pass_on_where_documents_begin_is_not_trained_without_a_mask() -> None:
    model = tiny_model("llama")
    ids, positions = torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None]
    with pytest.raises(RefusedError, match="LlamaAttention: needs an attention mask"):
        model.base_model(input_ids=ids, position_ids=positions, attention_mask=varlen.empty_mask(ids.device), use_cache=False)
