"""Shapes of models that the benchmarks make adapters for."""

from __future__ import annotations

from typing import Any


def linear(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Path in a layer to (out_features, in_features)."""
    d, ff = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    return {
        "self_attn.q_proj": (d, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (ff, d), "mlp.up_proj": (ff, d), "mlp.down_proj": (d, ff),
    }  # fmt: skip
