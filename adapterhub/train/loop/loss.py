"""Cross-entropy without the logits: a vocabulary of 50,000 times a thousand tokens would be more than the model.

The output layer is frozen, so its gradient is only needed toward the hidden states. Both are computed chunk by
chunk in the forward pass, where the logits are at hand, and the backward pass is one multiplication.
"""

from __future__ import annotations

from typing import Any

import torch

from adapterhub.train.data.dataset import IGNORED
from adapterhub.train.model.logits import Logits

Tensor = Any
CHUNK = 128  # tokens whose logits exist at once


class _CrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """hidden `(tokens, d)`, head `(vocab, d)`, labels `(tokens,)` without IGNORED; the sum, float32 scalar.

    `bias` `(vocab,)` or None. `rows` `(n, d)` float32 are the rows `ids` of the head where these are trained; the head holds
    them already.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, head, labels, ids, rows, bias, shape = inputs
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_rows = torch.zeros_like(rows) if ctx.needs_input_grad[4] else None
        # One buffer for all chunks: fresh memory of this size costs more than the arithmetic in it.
        size = min(CHUNK, len(hidden))
        narrow, wide = head.new_empty(size, len(head)), head.new_empty(size, len(head), dtype=torch.float32)
        learns = gradient is not None or d_rows is not None
        slope = torch.empty_like(wide) if learns and shape.cap is not None else None
        for start in range(0, len(hidden), CHUNK):
            h, label = hidden[start : start + CHUNK], labels[start : start + CHUNK, None]
            logits = wide[: len(h)].copy_(torch.mm(h, head.t(), out=narrow[: len(h)]))
            shaped(logits, bias, shape, slope)
            logits -= logits.amax(dim=1, keepdim=True)
            label_logits = logits.gather(1, label)
            sums = logits.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - label_logits).sum()
            if not learns:
                continue
            changes = logits.div_(sums)
            changes.scatter_add_(1, label, torch.full_like(sums, -1.0))
            if slope is not None:
                changes.mul_(slope[: len(h)])
            if shape.scale != 1.0:
                changes.mul_(shape.scale)
            if gradient is not None:
                torch.mm(narrow[: len(h)].copy_(changes), head, out=gradient[start : start + CHUNK])
            if d_rows is not None:
                d_rows += changes[:, ids].t() @ h.float()
        ctx.gradient, ctx.d_rows = gradient, d_rows
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        gradients = [None if part is None else part * upstream.to(part.dtype) for part in (ctx.gradient, ctx.d_rows)]
        ctx.gradient = ctx.d_rows = None
        return gradients[0], None, None, None, gradients[1], None, None


def shaped(z: Tensor, bias: Tensor | None, shape: Logits, slope: Tensor | None) -> None:
    """Make logits of `z` in its place; `slope` gets how fast a bounded one still rises with what it bounds."""
    if bias is not None:
        z += bias
    if shape.scale != 1.0:
        z *= shape.scale
    if shape.cap is not None:
        z.div_(shape.cap).tanh_()
        if slope is not None:
            torch.mul(z, z, out=slope[: len(z)]).neg_().add_(1)
        z *= shape.cap


def cross_entropy(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    ids: Tensor = None,
    rows: Tensor = None,
    bias: Tensor | None = None,
    shape: Logits | None = None,
) -> Tensor:
    """The summed negative log-likelihood (nats) of the labels that aren't IGNORED; a float32 scalar.

    Args:
        hidden: `(rows, sequence, d)`.
        head: `(vocab, d)`, frozen.
        labels: int64 `(rows, sequence)`.
        ids: Which rows of the head are trained, int64, if any are.
        rows: These rows, `(len(ids), d)` float32.
        bias: The output layer's, `(vocab,)`, frozen.
        shape: What becomes of the output layer's numbers; None: nothing.
    """
    flat = labels.reshape(-1)
    kept = (flat != IGNORED).nonzero().view(-1)
    states = hidden.reshape(-1, hidden.shape[-1])[kept]
    return _CrossEntropy.apply(states, head, flat[kept], ids, rows, bias, shape or Logits())
