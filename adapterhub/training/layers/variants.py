"""Variants of LoRA that start from the base's weights: DoRA, and the initial factors of PiSSA.

DoRA (arXiv 2402.09353) splits every output's weights into a direction, which LoRA changes, and a trained length:
`y = magnitude / |W + sBA| * x (W + sBA)^T + bias`. The norm of each row is a constant in the backward pass (section 4.3), as
in peft (`tuners/lora/dora.py`). The norm needs no second matrix of W's size, row by row:
`|W + sBA|² = |W|² + 2s B·(W A^T) + s² B·(B (A A^T))`.

PiSSA starts with the principal part of the weight. It trains on another base than the one in the files, and a loader that does
not know this would compute something else. So the saved adapter is the difference `scaling * (BA - B0 A0)`, a plain LoRA of
twice the rank (`difference`), for the unchanged base.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapterhub_converters.errors import RefusedError

from .lora import LoRALinear, multiply_frozen
from .nf4_matrix import NF4, dense, dense_for_one_product, quantize

Factors = tuple[Tensor, Tensor]
"""A `(r, in)` and B `(out, r)`."""


class _DoRAFunction(torch.autograd.Function):  # type: ignore[misc]
    """The product of a DoRA layer.

    x is `(tokens, in)`; A, B and the magnitude `(out,)` are float32; `squares` `(out,)` is float32, |W|² of each row.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return `(tokens, out)`, without bias."""
        x, lora_A, lora_B, magnitude, weight, squares, factor = inputs
        W = dense_for_one_product(weight, x.dtype)
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        # The norm follows from W A^T, so that W + sBA is never built.
        norm = _row_norms(W @ A.t(), lora_A, lora_B, squares, factor)
        xA = x @ A.t()
        y = (x @ W.t()).addmm_(xA, B.t(), alpha=factor).mul_((magnitude / norm).to(x.dtype))
        ctx.save_for_backward(x, xA, A, B, magnitude, norm)
        ctx.weight, ctx.factor = weight, factor
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Return the gradients of x, A, B and the magnitude; the product, as large as the output, is computed again."""
        x, xA, A, B, magnitude, norm = ctx.saved_tensors
        W = dense_for_one_product(ctx.weight, dy.dtype)
        product = (x @ W.t()).addmm_(xA, B.t(), alpha=ctx.factor)
        d_magnitude = product.mul_(dy).sum(dim=0, dtype=torch.float32) / norm
        dz = dy * (magnitude / norm).to(dy.dtype)
        dzB = (dz @ B).mul_(ctx.factor)
        dA, dB = (dzB.t() @ x).float(), (dz.t() @ xA).float().mul_(ctx.factor)
        dx = (dz @ W).addmm_(dzB, A) if ctx.needs_input_grad[0] else None
        return dx, dA, dB, d_magnitude, None, None, None


def _row_norms(WA: Tensor, lora_A: Tensor, lora_B: Tensor, squares: Tensor, factor: float) -> Tensor:
    """Return |W + sBA| of each row, float32, from `WA` = W A^T `(out, r)`."""
    cross_terms = (WA.float() * lora_B).sum(dim=1)
    delta_squares = ((lora_B @ (lora_A @ lora_A.t())) * lora_B).sum(dim=1)
    return (squares + 2 * factor * cross_terms + factor**2 * delta_squares).clamp_(min=0).sqrt_()


class DoRALinear(LoRALinear):
    """A `LoRALinear` with a trainable `magnitude` `(out,)`, float32."""

    def __init__(self, weight: Tensor | NF4, bias: Tensor | None, **options: Any) -> None:
        super().__init__(weight, bias, **options)
        self.squares = dense(weight, torch.float32).square().sum(dim=1)
        self.magnitude = nn.Parameter(self.squares.sqrt())

    def reset(self, generator: torch.Generator) -> None:
        """Initialize the factors as LoRA does and the magnitudes with the resulting row norms, so that nothing changes yet."""
        super().reset(generator)
        with torch.no_grad():
            WA = dense(self.base, torch.float32) @ self.lora_A.t()
            self.magnitude.copy_(_row_norms(WA, self.lora_A, self.lora_B, self.squares, self.scaling))

    def _apply_flat(self, x: Tensor, dropped: Tensor | None) -> Tensor:
        arguments = self.lora_A, self.lora_B, self.magnitude, self.base, self.squares, self.scaling
        y = _DoRAFunction.apply(x if dropped is None else dropped, *arguments)
        if dropped is not None:
            # Inputs that dropout hides from the delta still go through the base's weight.
            y = y + multiply_frozen(x - dropped, self.base)
        return y if self.bias is None else y + self.bias


# ---- Initial factors


def initial_factors(weight: Tensor, *, r: int, scaling: float, quantized: bool, location: str) -> tuple[Tensor | NF4, Factors]:
    """Return the base to train on and the initial factors of PiSSA (peft's `pissa_init`).

    Args:
        weight: `(out, in)`, in floats.
        location: The weight's name, in messages.

    Raises:
        RefusedError: `weight` has fewer than `r` rows or columns.
    """
    if r > min(weight.shape):
        raise RefusedError(location, f"is too small for pissa with r = {r}", f"Set r to {min(weight.shape)} at most")
    full = weight.float()
    A, B = _principal_factors(full, r, scaling)
    remainder = (full - scaling * B @ A).to(weight.dtype)
    return quantize(remainder, location) if quantized else remainder, (A, B)


def _principal_factors(matrix: Tensor, r: int, scaling: float) -> Factors:
    """Return A and B, of equal norms, such that `scaling * B A` is the best approximation of rank r."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    # The square root of each singular value goes to either side, which gives A and B equal norms.
    root = (S[:r] / scaling).sqrt()
    return root.unsqueeze(1) * Vh[:r], U[:, :r] * root


def difference(A: Tensor, B: Tensor, initial: Factors) -> Factors:
    """Return factors of twice the rank whose product is `B A - B0 A0`."""
    return torch.cat([A, initial[0]]), torch.cat([B, -initial[1]], dim=1)
