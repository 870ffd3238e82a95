"""Documents in a row: whether a model separates them, for every family that docs/train-models.md lists, in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from adapterhub.training.layers import attention  # noqa: E402
from adapterhub.training.model.base import Base, isolates_documents  # noqa: E402
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
    found = []
    for line in DOCS.read_text().splitlines():
        names, _, share = line.strip("| ").rpartition(" | ")
        if share in ("yes", "no") or names.startswith("gpt_oss"):
            words = names.replace("(its experts stay as they are)", "").split(": ")
            listed = words[0] if len(words) == 1 or words[0] == "gpt_oss" else words[1]
            found += [(name.strip(), share == "yes") for name in listed.split(",")]
    return found


@pytest.mark.parametrize(("family", "share"), families())
def test_documents_share_the_rows_of_the_families_that_the_docs_list(family: str, share: bool) -> None:
    made = tiny.model(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family], vocab_size=259, **CONFIGS.get(family, {})).to(torch.bfloat16)
    if made._supports_attention_backend:
        made.set_attn_implementation(attention.register())
    assert isolates_documents(Base(made, None, ())) is share
