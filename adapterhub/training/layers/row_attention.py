"""Attention, registered with transformers under a name of its own.

On CUDA, documents that share rows are attended to by `varlen` without a mask; torch does everything else. On a CPU, torch's
flash attention recomputes in the backward pass what easily fits into memory for a few hundred tokens, takes a mask over every
pair, multiplies all pairs, and works in float32. So there everything is a batched matrix product in the compute dtype. Rows of
up to MAX_LENGTH tokens keep their probabilities; longer ones are attended to block by block, recomputed in the backward pass. A
module that needs more than scaled dot products (soft caps, sinks) gets the eager attention of its own file. An indexer's choice
of keys becomes a mask here: modules make one only for attention that is called eager or sdpa.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub_converters.errors import RefusedError

from . import varlen

NAME = "adapterhub_short_rows"
MAX_LENGTH = 512  # tokens; in longer rows, T x T probabilities for every layer take too much memory
BLOCK = 128  # queries at a time in longer rows
# Every keyword that a module of transformers passes, by what is done with it; any other is refused.
EAGER_ARGUMENTS = ("softcap", "s_aux", "sinks", "position_bias")  # more than masked scaled dot products
_CHOICES = ("indices", "block_indices")  # the keys that an indexer has chosen for each query
_COMPUTED = ("scaling", "dropout", "is_causal", "sliding_window", "documents")  # the mask has the window and the documents, too
# The mask is made from positions; the others ask for results that no training reads.
_WITHOUT_EFFECT = ("position_ids", "output_attentions", "output_hidden_states", "output_router_logits", "use_cache")
KNOWN_ARGUMENTS = frozenset({*EAGER_ARGUMENTS, *_CHOICES, *_COMPUTED, *_WITHOUT_EFFECT})
# Of flash attention and of encoders: they change the result, and no causal model passes them here.
REFUSED_ARGUMENTS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic"})


def register() -> str:
    """Register the attention with transformers, and return its name for `attn_implementation`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def suits(model_class: Any) -> bool:
    """Return whether models of a class of transformers call this attention, with masks of bool.

    Classes that do not support sdpa (sinks, soft caps) keep their eager attention: some compute with their mask as numbers to
    add (DeepSeek-V4).
    """
    return bool(model_class._supports_attention_backend and model_class._supports_sdpa)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend by transformers' contract: heads before tokens in, tokens before heads out (`integrations/sdpa_attention.py`).

    Raises:
        RefusedError: The module passes an unknown argument, or there is no mask (`varlen.empty_mask`), and it needs one.
    """
    unknown = sorted(name for name in kwargs.keys() - KNOWN_ARGUMENTS if kwargs[name] is not None)
    if unknown:
        raise RefusedError(type(module).__name__, f"passes {unknown[0]!r} to its attention, which is not supported")
    documents = kwargs.pop("documents", None)
    needs_eager = any(kwargs.get(key) is not None for key in EAGER_ARGUMENTS)
    has_chosen_keys = any(kwargs.get(key) is not None for key in _CHOICES)
    if varlen.is_empty(attention_mask):
        causal = kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
        needs_mask = needs_eager or has_chosen_keys or not causal or kwargs.get("dropout")
        if documents is None or needs_mask or key.shape[2] != query.shape[2]:
            raise RefusedError(type(module).__name__, "needs an attention mask")
        factor, window = kwargs.get("scaling") or query.shape[-1] ** -0.5, kwargs.get("sliding_window")
        return varlen.attend(query, key, value, documents, window=window, factor=factor, reference=_attend), None
    if has_chosen_keys:
        attention_mask = _mask_of_chosen_keys(module, query, key, attention_mask, **kwargs)
    kwargs = {name: argument for name, argument in kwargs.items() if name not in _CHOICES}
    if needs_eager:
        return _attend_eagerly(module, query, key, value, attention_mask, **kwargs)
    tokens = query.shape[2]
    causal = attention_mask is not None or kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
    biased = tokens > MAX_LENGTH and attention_mask is not None and attention_mask.dtype != torch.bool
    if query.device.type != "cpu" or not causal or biased or key.shape[2] != tokens or kwargs.get("dropout"):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return result
    # Grouped-query attention: each head of keys and values serves several heads of queries.
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    output = _attend(query, key, value, attention_mask, kwargs.get("scaling") or query.shape[-1] ** -0.5)
    return output.transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, factor: float) -> Tensor:
    if query.shape[2] > MAX_LENGTH:
        return attend_blockwise(query, key, value, mask, factor)
    return _ShortRows.apply(query, key, value, _score_bias(mask, query, key), factor)


def _attend_eagerly(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    eager_attention = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager_attention is None:
        raise RefusedError(type(module).__name__, "needs an attention that is not supported, and its file has no eager one")
    return eager_attention(module, query, key, value, _score_bias(mask, query, key), **kwargs)[0], None


def _mask_of_chosen_keys(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    *,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return `mask` with the keys alone that an indexer chose for each query, as the module makes it for eager attention.

    Args:
        indices: int `(rows, tokens, choices)`, the chosen keys; negative ones choose nothing (DeepSeek-V3.2).
        block_indices: The chosen blocks of keys, of which the module's indexer makes a mask (MiniMax-M3).
        position_ids: The positions of the queries, for `block_indices`.
    """
    if indices is None:
        build_mask = getattr(getattr(module, "indexer", None), "build_block_mask", None)
        if build_mask is None or position_ids is None:
            raise RefusedError(type(module).__name__, "chooses blocks of keys in a way that is not supported")
        # Numbers to add, of which none is -inf: a query of padding may have no visible key.
        bias: Tensor = build_mask(block_indices, mask, key.shape[2], query.dtype, query.device, position_ids)
        return bias
    if indices.ndim != 3 or indices.shape[:2] != (query.shape[0], query.shape[2]):
        raise RefusedError(type(module).__name__, f"chooses keys in the shape {tuple(indices.shape)}, which is not supported")
    key_count = key.shape[2]
    chosen = torch.zeros(*indices.shape[:2], key_count + 1, dtype=torch.bool, device=query.device)
    # Choices of nothing go into one more column, which is then dropped.
    chosen.scatter_(-1, indices.long().masked_fill(indices < 0, key_count), value=True)
    visible = chosen[:, None, :, :-1]
    if mask is not None and mask.dtype != torch.bool:
        return mask.masked_fill(~visible, torch.finfo(mask.dtype).min)
    if mask is None:
        mask = torch.ones(query.shape[2], key_count, dtype=torch.bool, device=query.device).tril(key_count - query.shape[2])
    return visible & mask


def _score_bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Return the bias to add to the scores, 0 where `mask` is True and -inf elsewhere; a mask that is a bias is unchanged."""
    if mask is None:
        tokens, key_count = query.shape[2], key.shape[2]
        mask = torch.ones(1, 1, tokens, key_count, dtype=torch.bool, device=query.device).tril(key_count - tokens)
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(~mask, float("-inf"))


class _ShortRows(torch.autograd.Function):  # type: ignore[misc]
    """Attention that keeps its probabilities.

    q, k, v are `(rows, heads, tokens, head_dim)`, the bias is `(rows or 1, 1, tokens, tokens)` of 0 and -inf.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, bias, factor = inputs
        # Scaling q is cheaper than scaling the scores, of which there are more.
        q = q * factor
        scores = torch.matmul(q, k.transpose(-1, -2)).add_(bias)
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, p)
        ctx.factor = factor
        return torch.matmul(p, v)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Any, ...]:
        q, k, v, p = ctx.saved_tensors
        dv = torch.matmul(p.transpose(-1, -2), d_output)
        dp = torch.matmul(d_output, v.transpose(-1, -2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        return torch.matmul(ds, k).mul_(ctx.factor), torch.matmul(ds.transpose(-1, -2), q), dv, None, None


# ---- Long rows


def attend_blockwise(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, factor: float) -> Tensor:
    """Return `softmax(factor * q k^T) v` over the keys visible to each query, computed BLOCK queries at a time.

    Keys after a block, and documents before its first, are never multiplied; nothing of the size of all scores is stored.

    Args:
        q: `(rows, heads, tokens, head_dim)`, as are `k` and `v`.
        mask: bool `(rows or 1, 1, tokens, tokens)`, True where visible, at least once for each query; None is causal.
    """
    return _Blockwise.apply(q, k, v, mask, factor)


class _Blockwise(torch.autograd.Function):  # type: ignore[misc]
    """Attention in blocks of queries; arguments are those of `attend_blockwise`."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, mask, factor = inputs
        q = q * factor
        output = torch.empty_like(q)
        ranges = list(_visible_ranges(mask, q.shape[2]))
        for queries, keys in ranges:
            p = _probabilities(q, k, mask, queries, keys)
            output[:, :, queries] = torch.matmul(p, v[:, :, keys])
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.factor, ctx.ranges = mask, factor, ranges
        return output

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        dq = torch.empty_like(q)
        # Sums over blocks, in float32 like the sums within a single matrix product.
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for queries, keys in ctx.ranges:
            p = _probabilities(q, k, ctx.mask, queries, keys)
            d_block = d_output[:, :, queries]
            dv[:, :, keys] += torch.matmul(p.transpose(-1, -2), d_block)
            ds = torch._softmax_backward_data(torch.matmul(d_block, v[:, :, keys].transpose(-1, -2)), p, -1, p.dtype)
            dq[:, :, queries] = torch.matmul(ds, k[:, :, keys]).mul_(ctx.factor)
            dk[:, :, keys] += torch.matmul(ds.transpose(-1, -2), q[:, :, queries])
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _visible_ranges(mask: Tensor | None, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Yield each block of queries, with the keys from the first to the last that is visible to one of them."""
    for start in range(0, tokens, BLOCK):
        queries = slice(start, min(start + BLOCK, tokens))
        if mask is None:
            yield queries, slice(0, queries.stop)
            continue
        visible_keys = mask[:, :, queries].any(dim=2).flatten(0, 1).any(dim=0).nonzero().view(-1)
        yield queries, slice(int(visible_keys[0]), int(visible_keys[-1]) + 1)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, queries: slice, keys: slice) -> Tensor:
    scores = torch.matmul(q[:, :, queries], k[:, :, keys].transpose(-1, -2))
    if mask is None:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(queries.start - keys.start)
    else:
        visible = mask[:, :, queries, keys]
    return torch.softmax(scores.masked_fill_(visible.logical_not(), float("-inf")), -1)
