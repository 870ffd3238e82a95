"""What Megatron calls the modules of a layer, and which of a fused module's parts each of the base's is.

Queries, keys and values are one module, gate and up another; of experts that lie one by one (`moe_grouped_gemm=False`) each
has its own. CanonicalLoRA gives each part a LoRA, but for experts that lie stacked (Megatron-Bridge 067f987,
`peft/canonical_lora.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from adapterhub_converters.errors import RefusedError

QKV, FC1 = "self_attention.linear_qkv", "mlp.linear_fc1"
MODULES = {
    "self_attn.q_proj": QKV, "self_attn.k_proj": QKV, "self_attn.v_proj": QKV,
    "self_attn.o_proj": "self_attention.linear_proj", "mlp.gate_proj": FC1, "mlp.up_proj": FC1,
    "mlp.down_proj": "mlp.linear_fc2", "lm_head": "output_layer",
}  # fmt: skip
PARTS = {QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), FC1: ("mlp.gate_proj", "mlp.up_proj")}
OWN = {
    "self_attn.q_proj": "adapter_q", "self_attn.k_proj": "adapter_k", "self_attn.v_proj": "adapter_v",
    "mlp.gate_proj": "adapter_gate", "mlp.up_proj": "adapter_up",
}  # fmt: skip
_EXPERT = re.compile(
    r"(?:mlp|block_sparse_moe)\.experts\.(0|[1-9][0-9]{0,4})\.(?:(gate_proj|w1)|(up_proj|w3)|(?:down_proj|w2))"
)


@dataclass(frozen=True)
class Place:
    """Where a module of the base is: its path in a layer, which part of how many it is there, and CanonicalLoRA's word."""

    path: str
    part: int
    parts: int
    own: str


def place_of(kind: str) -> Place | None:
    """Of `self_attn.q_proj`, `lm_head` or `mlp.experts.3.up_proj`; None of what Megatron is not known to have a LoRA on."""
    if expert := _EXPERT.fullmatch(kind):
        gate, up = expert[2], expert[3]
        path = f"mlp.experts.local_experts.{expert[1]}.linear_fc{1 if gate or up else 2}"
        return Place(path, 1 if up else 0, 2 if gate or up else 1, "adapter_gate" if gate else "adapter_up" if up else "")
    if kind not in MODULES:
        return None
    path = MODULES[kind]
    parts = PARTS.get(path, (kind,))
    return Place(path, parts.index(kind), len(parts), OWN.get(kind, ""))


def place(kind: str) -> Place:
    """The same of a kind that has one; else RefusedError."""
    found = place_of(kind)
    if found is None:
        raise RefusedError(kind, "no module that Megatron is known to have a LoRA on")
    return found
