"""Attention on a CPU, registered with transformers under a name of its own.

torch's flash attention for CPUs recomputes in the backward pass what fits easily for a few hundred tokens. Here the
probabilities are kept, in the compute dtype, and everything is a batched matrix product. Longer rows go to `blockwise`;
what asks for more than scaled dot products (soft caps, sinks) to the eager attention of the model's own file.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from adapterhub_converters.errors import RefusedError

from .blockwise import attend

NAME = "adapterhub_short_rows"
LONGEST = 512  # tokens in a row; beyond, T x T probabilities for every layer are too much to keep
# What a model may ask for beside scaled dot products under a mask.
_MORE = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")

Tensor = Any


def register() -> str:
    """Make the attention known to transformers; returns its name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    """q, k, v `(rows, heads, tokens, head_dim)`, bias `(rows or 1, 1, tokens, tokens)` of 0 and -inf."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, bias, factor = inputs
        q = q * factor
        scores = torch.matmul(q, k.transpose(-1, -2)).add_(bias)
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.factor = factor
        return torch.matmul(p, v)

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, k, v, p = ctx.saved_tensors
        dv = torch.matmul(p.transpose(-1, -2), do)
        dp = torch.matmul(do, v.transpose(-1, -2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        return torch.matmul(ds, k).mul_(ctx.factor), torch.matmul(ds.transpose(-1, -2), q), dv, None, None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' contract: heads before tokens in, tokens before heads out (`integrations/sdpa_attention.py`)."""
    if any(kwargs.get(key) is not None for key in _MORE):
        return _eager(module, query, key, value, attention_mask, **kwargs)
    tokens = query.shape[2]
    causal = attention_mask is not None or kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
    biased = tokens > LONGEST and attention_mask is not None and attention_mask.dtype != torch.bool
    if not causal or biased or key.shape[2] != tokens or kwargs.get("dropout"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        done: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return done
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    factor = kwargs.get("scaling") or query.shape[-1] ** -0.5
    if tokens > LONGEST:
        output = attend(query, key, value, attention_mask, factor)
    else:
        output = _Attention.apply(query, key, value, _bias(attention_mask, query, key), factor)
    return output.transpose(1, 2).contiguous(), None


def _eager(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None:
        raise RefusedError(type(module).__name__, "asks for an attention that isn't known here and has none of its own")
    return own(module, query, key, value, _bias(mask, query, key), **kwargs)[0], None


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """What is added to the scores: 0 where `mask` is True, -inf where not; a mask that is a bias already stays one."""
    if mask is None:
        tokens, seen = query.shape[2], key.shape[2]
        mask = torch.ones(1, 1, tokens, seen, dtype=torch.bool, device=query.device).tril(seen - tokens)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))
