"""Cross-entropy without the logits: a vocabulary of 50,000 times a thousand tokens would be more than the model.

The output layer is frozen, so its gradient is only needed towards the hidden states. Both are computed chunk by
chunk in the forward pass, where the logits are at hand, and the backward pass is one multiplication.
"""

from __future__ import annotations

from typing import Any

import torch

from adapterhub.train.corpus.data import IGNORED

Tensor = Any
CHUNK = 128  # tokens whose logits exist at once


class _CrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """hidden `(tokens, d)`, head `(vocab, d)`, labels `(tokens,)` without IGNORED; the sum, float32 scalar.

    `rows` `(n, d)` float32 are the rows `ids` of the head where these are trained; the head holds them already.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, head, labels, ids, rows = inputs
        total = hidden.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_rows = torch.zeros_like(rows) if ctx.needs_input_grad[4] else None
        # One buffer for all chunks: fresh memory of this size costs more than the arithmetic in it.
        size = min(CHUNK, len(hidden))
        narrow, wide = (head.new_empty(size, len(head), dtype=kind) for kind in (head.dtype, torch.float32))
        for start in range(0, len(hidden), CHUNK):
            h, label = hidden[start : start + CHUNK], labels[start : start + CHUNK, None]
            logits = wide[: len(h)].copy_(torch.mm(h, head.t(), out=narrow[: len(h)]))
            logits -= logits.amax(dim=1, keepdim=True)
            label_logits = logits.gather(1, label)
            sums = logits.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - label_logits).sum()
            if gradient is None and d_rows is None:
                continue
            probabilities = logits.div_(sums)
            probabilities.scatter_add_(1, label, torch.full_like(sums, -1.0))
            if gradient is not None:
                torch.mm(narrow[: len(h)].copy_(probabilities), head, out=gradient[start : start + CHUNK])
            if d_rows is not None:
                d_rows += probabilities[:, ids].t() @ h.float()
        ctx.gradient, ctx.d_rows = gradient, d_rows
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        gradients = [None if part is None else part * upstream.to(part.dtype) for part in (ctx.gradient, ctx.d_rows)]
        ctx.gradient = ctx.d_rows = None
        return gradients[0], None, None, None, gradients[1]


def cross_entropy(hidden: Tensor, head: Tensor, labels: Tensor, *, ids: Tensor = None, rows: Tensor = None) -> Tensor:
    """The summed negative log-likelihood (nats) of the labels that aren't IGNORED; a float32 scalar.

    Args:
        hidden: `(rows, sequence, d)`.
        head: `(vocab, d)`, frozen.
        labels: int64 `(rows, sequence)`.
        ids: Which rows of the head are trained, int64, if any are.
        rows: These rows, `(len(ids), d)` float32.
    """
    flat = labels.reshape(-1)
    kept = (flat != IGNORED).nonzero().view(-1)
    return _CrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1])[kept], head, flat[kept], ids, rows)
