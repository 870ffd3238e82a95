"""DoRA (arXiv 2402.09353): every output's weights are a direction, which LoRA changes, times a length of its own.

`y = magnitude / |W + sBA| * x (W + sBA)^T + bias`, the norm of each row taken as a constant in the backward pass
(section 4.3), as peft computes it (`tuners/lora/dora.py`). The norm needs no matrix of W's size beside W:
`|W + sBA|² = |W|² + 2s B·(W A^T) + s² B·(B (A A^T))`, row by row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .lora import LoRALinear, dense, through
from .nf4 import NF4

Tensor = Any


class _DoRAFunction(torch.autograd.Function):  # type: ignore[misc]
    """x `(tokens, in)`; A, B and the magnitude `(out,)` float32; `squares` `(out,)` float32, |W|² of each row."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """`(tokens, out)`, without bias."""
        x, lora_A, lora_B, magnitude, weight, squares, factor = inputs
        W = dense(weight, x.dtype)
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        norm = _norm(W @ A.t(), lora_A, lora_B, squares, factor)
        xA = x @ A.t()
        y = (x @ W.t()).addmm_(xA, B.t(), alpha=factor).mul_((magnitude / norm).to(x.dtype))
        ctx.save_for_backward(x, xA, A, B, magnitude, norm)
        ctx.weight, ctx.factor = weight, factor
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Gradients of x, A, B and the magnitude. The product is computed again: it is as large as the output."""
        x, xA, A, B, magnitude, norm = ctx.saved_tensors
        W = dense(ctx.weight, dy.dtype)
        product = (x @ W.t()).addmm_(xA, B.t(), alpha=ctx.factor)
        d_magnitude = product.mul_(dy).sum(dim=0, dtype=torch.float32) / norm
        dz = dy * (magnitude / norm).to(dy.dtype)
        dzB = (dz @ B).mul_(ctx.factor)
        dA, dB = (dzB.t() @ x).float(), (dz.t() @ xA).float().mul_(ctx.factor)
        dx = (dz @ W).addmm_(dzB, A) if ctx.needs_input_grad[0] else None
        return dx, dA, dB, d_magnitude, None, None, None


def _norm(WA: Tensor, lora_A: Tensor, lora_B: Tensor, squares: Tensor, factor: float) -> Tensor:
    """|W + sBA| of each row, float32, from `WA` = W A^T `(out, r)`."""
    crossed = (WA.float() * lora_B).sum(dim=1)
    own = ((lora_B @ (lora_A @ lora_A.t())) * lora_B).sum(dim=1)
    return (squares + 2 * factor * crossed + factor**2 * own).clamp_(min=0).sqrt_()


class DoRALinear(LoRALinear):
    """A `LoRALinear` with a trainable `magnitude` `(out,)`, float32."""

    def __init__(self, weight: Tensor | NF4, bias: Tensor | None, **options: Any) -> None:
        super().__init__(weight, bias, **options)
        self.squares = dense(weight, torch.float32).square().sum(dim=1)
        self.magnitude = nn.Parameter(self.squares.sqrt())

    def reset(self, generator: Any) -> None:
        """The factors as ever, and the lengths that the sum then has: no change yet."""
        super().reset(generator)
        with torch.no_grad():
            WA = dense(self.base, torch.float32) @ self.lora_A.t()
            self.magnitude.copy_(_norm(WA, self.lora_A, self.lora_B, self.squares, self.scaling))

    def _apply_flat(self, x: Tensor, dropped: Tensor | None) -> Tensor:
        arguments = self.lora_A, self.lora_B, self.magnitude, self.base, self.squares, self.scaling
        y = _DoRAFunction.apply(x if dropped is None else dropped, *arguments)
        if dropped is not None:
            # What dropout hides from the delta still goes through the weight, as it was.
            y = y + through(x - dropped, self.base)
        return y if self.bias is None else y + self.bias
