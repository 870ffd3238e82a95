"""RMSNorm with a frozen weight as one autograd function: `y = w * x / sqrt(mean(x²) + eps)` (arXiv 1910.07467).

transformers writes a norm as some eight operations, each of which reads and writes all of x in the backward pass. Since the
weight is frozen, x alone needs a gradient: with `r = 1 / sqrt(mean(x²) + eps)` and `g = w * dy` it is `r g - r³ x mean(g x)`.

Families round in different places. So a module is replaced only if a known formula returns its bits for random rows.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub_converters.lazy_dataclass import dataclass

from .lora import replace_module

_PROBE_ROWS = 24
_PROBE_SCALES = (1e-3, 1.0, 30.0)  # with the smallest, eps matters


@dataclass(frozen=True)
class Formula:
    """Where a family rounds.

    Attributes:
        rounds_first: Whether x is rounded to its dtype before it is multiplied by the weight (Llama), or only the product.
        offset: A number added to the weight in float32 (Gemma).
        power: Whether the root is `pow(-0.5)`, which rounds differently from `rsqrt` (Gemma 3n).
    """

    rounds_first: bool = False
    offset: float = 0.0
    power: bool = False

    def scale(self, weight: Tensor) -> Tensor:
        """Return what the normalized x is multiplied by, in float32."""
        return weight.float() + self.offset if self.offset else weight.float()


FORMULAS = (Formula(rounds_first=True), Formula(), Formula(offset=1.0), Formula(power=True), Formula(offset=1.0, power=True))


class _RMSNormFunction(torch.autograd.Function):  # type: ignore[misc]
    """The norm of x `(…, size)` with a frozen weight `(size,)`; it saves x, and one number for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, formula: Formula) -> Tensor:
        floats = x.float()
        shifted = floats.pow(2).mean(-1, keepdim=True) + eps
        inverse_root = torch.pow(shifted, -0.5) if formula.power else torch.rsqrt(shifted)
        ctx.save_for_backward(x, inverse_root, weight)
        ctx.formula = formula
        normalized = floats * inverse_root
        if formula.rounds_first:
            return weight * normalized.to(x.dtype)
        return normalized.mul_(formula.scale(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Return the gradient of x, computed in float32 and rounded once."""
        x, inverse_root, weight = ctx.saved_tensors
        floats, gradient = x.float(), dy.float() * ctx.formula.scale(weight)
        means = (gradient * floats).mean(-1, keepdim=True)
        dx = gradient.mul_(inverse_root).addcmul_(floats, means.mul_(inverse_root.pow(3)), value=-1)
        return dx.to(x.dtype), None, None, None


class FrozenRMSNorm(nn.Module):  # type: ignore[misc]
    """A norm whose weight is not trained."""

    def __init__(self, weight: nn.Parameter, eps: float, formula: Formula) -> None:
        super().__init__()
        self.weight, self.eps, self.formula = weight, eps, formula

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x `(…, size)`."""
        return _RMSNormFunction.apply(x, self.weight, self.eps, self.formula)


def replace_frozen(model: nn.Module) -> None:
    """Replace every RMSNorm of `model`, whose weights are loaded, by one that returns the same bits; others stay untouched."""
    for path, module in list(model.named_modules()):
        if path and (norm := _equivalent(module)) is not None:
            replace_module(model, path, norm)


def _equivalent(module: nn.Module) -> FrozenRMSNorm | None:
    """Return a norm that computes what `module` does from its only tensor, a frozen parameter; None if no formula does."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    tensors = [*module.parameters(), *module.buffers()]
    if not isinstance(eps, float) or not isinstance(weight, nn.Parameter) or len(tensors) != 1 or weight.ndim != 1:
        return None
    # A second argument, such as a gate, would make it another function.
    if weight.requires_grad or len(inspect.signature(module.forward).parameters) != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(_PROBE_ROWS, len(weight), generator=generator) * scale for scale in _PROBE_SCALES])
    # Some models keep the residual stream in float32.
    probes = [rows.to(weight.device, dtype) for dtype in {weight.dtype, torch.float32}]
    for formula in FORMULAS:
        norm = FrozenRMSNorm(weight, eps, formula)
        if all(_is_equal(norm, module, probe) for probe in probes):
            return norm
    return None


def _is_equal(norm: FrozenRMSNorm, module: nn.Module, probe: Tensor) -> bool:
    try:
        with torch.no_grad():
            expected, actual = module(probe), norm(probe)
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(expected, Tensor) and expected.dtype == actual.dtype and torch.equal(actual, expected)
