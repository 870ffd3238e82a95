"""The loss of rows, in passes, and cross-entropy without all logits: 50,000 per token would take more memory than the model.

The output layer is frozen, so its gradient is only needed for the hidden states. Loss and gradient are computed chunk by chunk
in the forward pass, where the logits are available, and the backward pass is one multiplication.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapterhub.training import compute_device, distributed
from adapterhub.training.cost.memory import logits_at_once
from adapterhub.training.data.packed_rows import IGNORED, Rows, lengths
from adapterhub.training.model.base_model import Base, Logits

_CACHED_BYTES = 1 << 20  # of logits that are worked on at a time: they stay in the cache of a core

Loss = Callable[[Tensor, Rows], Tensor]
"""The part of a loss that some rows have, a scalar: of the log-probabilities `(rows, tokens)` of their labels, 0 where there is
none, and the rows themselves. The parts of several passes are added up."""


def passes(rows: Rows, size: int) -> Iterator[tuple[int, Rows]]:
    """Yield this process's part of the rows, `size` at a time, each with the number of its first row; or nothing."""
    own_rows = distributed.share(np.arange(len(rows)))
    for start in range(0, len(own_rows), size):
        numbers = own_rows[start : start + size]
        yield int(numbers[0]), rows.take(numbers)


def trim(rows: Rows) -> Rows:
    """Return rows cut after the last label, which changes no result, to a width that is computed fast."""
    # Matrix products are fast at multiples of 16.
    width = -(max(1, int(lengths(rows.labels).max())) // -16) * 16
    return Rows(rows.ids[:, :width], rows.labels[:, :width], rows.positions[:, :width])


def logprobs(base: Base, rows: Rows) -> Tensor:
    """Return the log-probability of each label, in nats, float32 `(rows, tokens)` with a gradient; 0 without a label."""
    ids, positions = (torch.from_numpy(array).to(base.device, non_blocking=True) for array in (rows.ids, rows.positions))
    hidden = base.states(ids, positions, base.documents(rows.positions))
    trained_rows = base.head_rows
    trained_head_rows = {} if trained_rows is None else {"ids": trained_rows.places, "rows": trained_rows.rows}
    return -cross_entropy(
        hidden, base.head, torch.from_numpy(rows.labels), bias=base.head_bias, shape=base.logits, **trained_head_rows
    )


def evaluated_passes(base: Base, rows: Rows, size: int) -> Iterator[tuple[Rows, Tensor]]:
    """Yield this process's part of the rows as `passes` does, trimmed, with `logprobs` as an evaluation computes them.

    Until the last one, neither gradients nor dropout are computed, by the caller either.
    """
    base.model.eval()
    with torch.no_grad():
        for _, batch in passes(rows, size):
            trimmed_rows = trim(batch)
            yield trimmed_rows, logprobs(base, trimmed_rows)
    base.model.train()


def mean_loss(label_tokens: int) -> Loss:
    """Return the negative log-likelihood for rows of a step with `label_tokens` labels, so that each label counts the same."""
    return lambda logprobs, _: -logprobs.sum() / max(1, label_tokens)


def sum_of_parts(scalars: Sequence[Tensor]) -> float:
    """Return the sum of the scalars of all passes and processes, read at once, because each read waits for the device."""
    values = torch.stack([scalar.detach() for scalar in scalars]).cpu().tolist() if scalars else []
    return distributed.total(math.fsum(values))


# ---- Cross-entropy


class _CrossEntropy(torch.autograd.Function):  # type: ignore[misc]
    """The cross-entropy of labels.

    hidden is `(tokens, d)`, head `(vocab, d)`, labels `(tokens,)` without IGNORED; the result is float32 `(tokens,)`. `bias` is
    `(vocab,)` or None. `rows` `(n, d)` float32 are the trained rows `ids` of the head, which contains them already.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        hidden, head, labels, ids, rows, bias, shape = inputs
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # The gradient of the logits of trained rows.
        d_rows = losses.new_empty(len(hidden), len(rows)) if ctx.needs_input_grad[4] else None
        # One buffer serves all chunks: allocating this much costs more than the arithmetic in it.
        chunk_size = min(logits_at_once(len(head), head.element_size(), compute_device.memory(head.device)), len(hidden))
        buffer = head.new_empty(chunk_size, len(head))
        # The output layer is fast for many rows at once; what follows reads each row several times, from the cache for a few.
        is_on_cpu, row_bytes = head.device.type == "cpu", 4 * len(head)
        block_size = max(1, min(chunk_size, _CACHED_BYTES // row_bytes)) if is_on_cpu else chunk_size
        floats = buffer if head.dtype == torch.float32 else head.new_empty(block_size, len(head), dtype=torch.float32)
        trains = gradient is not None or d_rows is not None
        slope = torch.empty_like(floats[:block_size]) if trains and shape.cap is not None else None
        for start in range(0, len(hidden), chunk_size):
            h = hidden[start : start + chunk_size]
            products = torch.mm(h, head.t(), out=buffer[: len(h)])
            for first in range(0, len(h), block_size):
                block = products[first : first + block_size]
                numbers = slice(start + first, start + first + len(block))
                logits = block if floats is buffer else floats[: len(block)].copy_(block)
                to_logits(logits, bias, shape, slope)
                losses[numbers] = _cross_entropy_and_slope(logits, labels[numbers, None], trains=trains)
                if not trains:
                    continue
                if slope is not None:
                    logits.mul_(slope[: len(block)])
                if shape.scale != 1.0:
                    logits.mul_(shape.scale)
                if d_rows is not None:
                    d_rows[numbers] = logits[:, ids]
                if floats is not buffer:
                    block.copy_(logits)
            if gradient is not None:
                torch.mm(products, head, out=gradient[start : start + chunk_size])
        ctx.gradient, ctx.d_rows = gradient, d_rows
        ctx.hidden = None if d_rows is None else hidden
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        d_hidden = None if ctx.gradient is None else ctx.gradient * upstream[:, None].to(ctx.gradient.dtype)
        d_rows = None if ctx.d_rows is None else (ctx.d_rows * upstream[:, None]).t() @ ctx.hidden.float()
        ctx.gradient = ctx.d_rows = ctx.hidden = None
        return d_hidden, None, None, None, d_rows, None, None


def _cross_entropy_and_slope(logits: Tensor, labels: Tensor, *, trains: bool) -> Tensor:
    """Return the losses of rows of logits, which become their gradient in place: the softmax, minus 1 at the label."""
    # The largest logit is subtracted so that the exponentials cannot overflow.
    logits -= logits.amax(dim=1, keepdim=True)
    label_logits = logits.gather(1, labels)
    sums = logits.exp_().sum(dim=1, keepdim=True)
    if trains:
        logits.div_(sums).scatter_add_(1, labels, torch.full_like(sums, -1.0))
    return (sums.log() - label_logits).view(-1)


def to_logits(z: Tensor, bias: Tensor | None, shape: Logits, slope: Tensor | None) -> None:
    """Turn the output layer's `z` into logits in place; `slope` gets the derivative of the cap, if there is one."""
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
    """Return the negative log-likelihood (nats) of each label, float32 in the shape of `labels`; 0 where a label is IGNORED.

    Args:
        hidden: `(rows, sequence, d)`.
        head: `(vocab, d)`, frozen.
        labels: int64 `(rows, sequence)`, on the CPU, so that finding those that count does not wait for a device.
        ids: Trained rows of the head, int64.
        rows: Their values, `(len(ids), d)` float32.
        bias: The bias of the output layer, `(vocab,)`, frozen.
        shape: How logits are computed from the output layer; None leaves them unchanged.
    """
    flat = labels.reshape(-1)
    labeled = (flat != IGNORED).nonzero().view(-1)
    chosen_labels = flat[labeled].to(hidden.device, non_blocking=True)
    labeled = labeled.to(hidden.device, non_blocking=True)
    # Mamba's last norm returns states in float32.
    states = hidden.reshape(-1, hidden.shape[-1])[labeled].to(head.dtype)
    losses = _CrossEntropy.apply(states, head, chosen_labels, ids, rows, bias, shape or Logits())
    return losses.new_zeros(flat.shape).index_put((labeled,), losses).view(labels.shape)
