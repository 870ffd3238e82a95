"""The loss of rows, in passes, and cross-entropy without all logits: 50,000 for each token would be larger than the model.

The output layer is frozen, so its gradient is only needed toward the hidden states. Loss and gradient are computed chunk by
chunk in the forward pass, where the logits are available, and the backward pass is one multiplication.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from adapterhub.training import distributed
from adapterhub.training.data.dataset import IGNORED, Rows, lengths
from adapterhub.training.model.base import Base, Logits

Tensor = Any
CHUNK = 128  # tokens whose logits exist at once


def passes(rows: Rows, chosen: np.ndarray, size: int) -> Iterator[tuple[int, Rows]]:
    """Yield this process's part of the chosen rows, `size` at a time, each with the number of its first row.

    Every process makes the same number of passes, or those with a part of the base each would wait for one another: a process
    without rows left takes the first one, without labels.
    """
    own, before = distributed.share(chosen)
    for start in range(0, distributed.rounds(len(chosen), size) * size, size):
        numbers = own[start : start + size]
        if len(numbers):
            yield before + start, Rows(rows.ids[numbers], rows.labels[numbers], rows.positions[numbers])
        else:
            first = chosen[:1]
            yield before + start, Rows(rows.ids[first], np.full_like(rows.labels[first], IGNORED), rows.positions[first])


def summed_loss(base: Base, rows: Rows) -> Any:
    """Return the summed loss, in nats, of all rows: a float32 scalar with a gradient."""
    # Padding behind the last label changes no number; odd widths are slow.
    width = -(max(1, int(lengths(rows.labels).max())) // -16) * 16
    parts = (rows.ids, rows.positions, rows.labels)
    ids, positions, labels = (torch.from_numpy(part[:, :width]).to(base.device) for part in parts)
    hidden = base.states(ids, positions)
    trained_rows = base.head_rows
    extra = {} if trained_rows is None else {"ids": trained_rows.places, "rows": trained_rows.rows}
    return cross_entropy(hidden, base.head, labels, bias=base.head_bias, shape=base.logits, **extra)


# ---- Cross-entropy


class _CrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """hidden `(tokens, d)`, head `(vocab, d)`, labels `(tokens,)` without IGNORED; the sum, float32 scalar.

    `bias` `(vocab,)` or None. `rows` `(n, d)` float32 are the trained rows `ids` of the head, which contains them already.
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
        trains = gradient is not None or d_rows is not None
        slope = torch.empty_like(wide) if trains and shape.cap is not None else None
        for start in range(0, len(hidden), CHUNK):
            h, label = hidden[start : start + CHUNK], labels[start : start + CHUNK, None]
            logits = wide[: len(h)].copy_(torch.mm(h, head.t(), out=narrow[: len(h)]))
            to_logits(logits, bias, shape, slope)
            logits -= logits.amax(dim=1, keepdim=True)
            label_logits = logits.gather(1, label)
            sums = logits.exp_().sum(dim=1, keepdim=True)
            total += (sums.log() - label_logits).sum()
            if not trains:
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


def to_logits(z: Tensor, bias: Tensor | None, shape: Logits, slope: Tensor | None) -> None:
    """Turn the output layer's `z` into logits in place; `slope` gets the derivative of the bound, where there is one."""
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
    """Return the summed negative log-likelihood (nats) of the labels that are not IGNORED; a float32 scalar.

    Args:
        hidden: `(rows, sequence, d)`.
        head: `(vocab, d)`, frozen.
        labels: int64 `(rows, sequence)`.
        ids: Trained rows of the head, int64.
        rows: Their values, `(len(ids), d)` float32.
        bias: The output layer's, `(vocab,)`, frozen.
        shape: How logits are computed from the output layer; None: unchanged.
    """
    flat = labels.reshape(-1)
    labeled = (flat != IGNORED).nonzero().view(-1)
    states = hidden.reshape(-1, hidden.shape[-1])[labeled]
    return _CrossEntropy.apply(states, head, flat[labeled], ids, rows, bias, shape or Logits())
