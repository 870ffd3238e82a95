"""Attention for long rows on a CPU: some queries at a time against the keys that any of them sees, computed again backward.

torch's flash attention for CPUs takes a mask of every pair, multiplies all of them, and works in float32. Here a block's scores
are matrix products in the compute dtype; keys behind the block, and documents before the block's first, are never multiplied.
Nothing of the size of the scores is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

BLOCK = 128  # queries at a time

Tensor = Any


class _Blockwise(torch.autograd.Function):  # type: ignore[misc]
    """q, k, v `(rows, heads, tokens, head_dim)`; mask bool `(rows or 1, 1, tokens, tokens)`, True where seen, or None: all that
    is not behind."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        q, k, v, mask, factor = inputs
        q = q * factor
        output = torch.empty_like(q)
        ranges = list(_ranges(mask, q.shape[2]))
        for queries, keys in ranges:
            p = _probabilities(q, k, mask, queries, keys)
            output[:, :, queries] = torch.matmul(p, v[:, :, keys])
        ctx.save_for_backward(q, k, v)
        ctx.mask, ctx.factor, ctx.ranges = mask, factor, ranges
        return output

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        q, k, v = ctx.saved_tensors
        dq = torch.empty_like(q)
        # Sums over blocks, in float32 as one matrix product's are.
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for queries, keys in ctx.ranges:
            p = _probabilities(q, k, ctx.mask, queries, keys)
            part = do[:, :, queries]
            dv[:, :, keys] += torch.matmul(p.transpose(-1, -2), part)
            ds = torch._softmax_backward_data(torch.matmul(part, v[:, :, keys].transpose(-1, -2)), p, -1, p.dtype)
            dq[:, :, queries] = torch.matmul(ds, k[:, :, keys]).mul_(ctx.factor)
            dk[:, :, keys] += torch.matmul(ds.transpose(-1, -2), q[:, :, queries])
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _ranges(mask: Tensor | None, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Queries, and the keys from the first to the last that one of them sees."""
    for start in range(0, tokens, BLOCK):
        queries = slice(start, min(start + BLOCK, tokens))
        if mask is None:
            yield queries, slice(0, queries.stop)
            continue
        seen = mask[:, :, queries].any(dim=2).flatten(0, 1).any(dim=0).nonzero().view(-1)
        yield queries, slice(int(seen[0]), int(seen[-1]) + 1)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, queries: slice, keys: slice) -> Tensor:
    scores = torch.matmul(q[:, :, queries], k[:, :, keys].transpose(-1, -2))
    if mask is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(queries.start - keys.start)
    else:
        seen = mask[:, :, queries, keys]
    return torch.softmax(scores.masked_fill_(seen.logical_not(), float("-inf")), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, factor: float) -> Tensor:
    """`softmax(factor * q k^T) v` over what each query sees, which has to be at least one key; as `_Blockwise`."""
    return _Blockwise.apply(q, k, v, mask, factor)
