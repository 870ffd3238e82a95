"""The LoRA linear layer, and access to such layers in a model.

`y = x W^T + scaling * (x A^T) B^T` (arXiv 2106.09685), W frozen. The autograd function below dequantizes W in the forward pass
and again in the backward pass, so that nothing of W's size outlives either. It saves only `x`, which layers with the same input
share, and `x A^T`, which is r numbers per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub_converters.adapter import scaling

from .nf4_matrix import NF4, dense, dense_for_one_product

_TRAINED_NAMES = ("lora_A", "lora_B", "lora_bias", "magnitude", "rows")


class _LoRAFunction(torch.autograd.Function):  # type: ignore[misc]
    """The product of a LoRA layer.

    x is `(tokens, in)`; A `(r, in)` and B `(out, r)` are float32; W `(out, in)` is in x's dtype or NF4; `dropped` is x after
    dropout, or None without dropout.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return `(tokens, out)`."""
        x, dropped, lora_A, lora_B, weight, bias, factor = inputs
        W = dense_for_one_product(weight, x.dtype)
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        y = x @ W.t() if bias is None else torch.addmm(bias, x, W.t())
        delta_input = x if dropped is None else dropped
        xA = delta_input @ A.t()
        # In place, so that there is no second tensor of the output's size.
        y.addmm_(xA, B.t(), alpha=factor)
        ctx.save_for_backward(delta_input, xA, A, B)
        ctx.weight, ctx.factor, ctx.dropped = weight, factor, dropped is not None
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Return the gradients of x, of x after dropout, of A and B; W has none."""
        delta_input, xA, A, B = ctx.saved_tensors
        dyB = (dy @ B).mul_(ctx.factor)
        dA = (dyB.t() @ delta_input).float()
        dB = (dy.t() @ xA).float().mul_(ctx.factor)
        dx = d_dropped = None
        if ctx.needs_input_grad[0]:
            dx = dy @ dense_for_one_product(ctx.weight, dy.dtype)
            # With dropout, the delta's gradient belongs to `dropped`; autograd adds it to that of x.
            if not ctx.dropped:
                dx.addmm_(dyB, A)
        if ctx.needs_input_grad[1]:
            d_dropped = dyB @ A
        return dx, d_dropped, dA, dB, None, None, None


class Frozen(nn.Module):  # type: ignore[misc]
    """A frozen matrix `(out, in)`, dense or NF4, that is not a parameter, with its bias.

    Attributes:
        transposed: Whether the base stores it `(in, out)`, as Hugging Face's Conv1D does.
        dtype: The dtype that the model computes in, for an NF4 matrix.
    """

    transposed = False
    dtype = torch.float32

    def __init__(self, weight: Tensor | NF4, bias: Tensor | None) -> None:
        super().__init__()
        # Not a parameter: it is neither trained nor saved, and NF4 is not a tensor.
        self.base = weight
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """The matrix without the delta, as in peft, for a model that multiplies with it directly."""
        matrix = dense(self.base, self.base.dtype if isinstance(self.base, Tensor) else self.dtype)
        return matrix.t() if self.transposed else matrix


class LoRALinear(Frozen):
    """A frozen linear layer with a trainable low-rank delta; its factors are float32, its arithmetic is in x's dtype.

    Args:
        biased: Whether the delta has a bias, `(out,)`, scaled like the rest of it.
        initial: Factors to start from if they are not drawn at random (`variants`); their product was subtracted from the base.
    """

    def __init__(
        self,
        weight: Tensor | NF4,
        bias: Tensor | None,
        *,
        r: int,
        alpha: float,
        rslora: bool = False,
        dropout: float = 0.0,
        biased: bool = False,
        initial: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__(weight, bias)
        out_features, in_features = weight.shape
        self.alpha, self.rslora, self.dropout = alpha, rslora, dropout
        self.scaling = scaling(alpha, r, rslora=rslora)
        self.initial = initial
        self.lora_A = nn.Parameter(torch.zeros(r, in_features, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=weight.device))
        self.lora_bias = nn.Parameter(torch.zeros(out_features, device=weight.device)) if biased else None

    def reset(self, generator: torch.Generator) -> None:
        """Initialize A as peft does (kaiming uniform with a = sqrt 5, within 1 / sqrt(in_features)) and B with zeros."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        with torch.no_grad():
            if self.lora_bias is not None:
                self.lora_bias.zero_()
            if self.initial is not None:
                self.lora_A.copy_(self.initial[0])
                self.lora_B.copy_(self.initial[1])
                return
            # Drawn on the CPU, whose generator gives the same numbers everywhere.
            self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return `(…, out)` for `x` `(…, in)`."""
        dropped = self._dropout(x)
        flat = x.reshape(-1, x.shape[-1])
        y = self._apply_flat(flat, None if dropped is None else dropped.reshape(flat.shape))
        return y.view(*x.shape[:-1], y.shape[-1])

    def _dropout(self, x: Tensor) -> Tensor | None:
        # Applied before flattening, as peft does: from the same state of torch's generator, the same numbers are dropped.
        return nn.functional.dropout(x, self.dropout) if self.training and self.dropout else None

    def _apply_flat(self, x: Tensor, dropped: Tensor | None) -> Tensor:
        y = _LoRAFunction.apply(x, dropped, self.lora_A, self.lora_B, self.base, self.bias, self.scaling)
        return y if self.lora_bias is None else y + (self.scaling * self.lora_bias).to(y.dtype)


class FrozenLinear(Frozen):
    """A linear layer that is not a target; it is quantized like one and only passes gradients through."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `(…, out)` for `x` `(…, in)`."""
        y = multiply_frozen(x.reshape(-1, x.shape[-1]), self.base)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias


class _FrozenFunction(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | NF4) -> Tensor:
        ctx.weight = weight
        return x @ dense_for_one_product(weight, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return dy @ dense_for_one_product(ctx.weight, dy.dtype), None


def multiply_frozen(x: Tensor, weight: Tensor | NF4) -> Tensor:
    """Return `x W^T` for `x` `(tokens, in)`, with a gradient for x and without saving anything."""
    return _FrozenFunction.apply(x, weight)


def linears(model: nn.Module) -> dict[str, Any]:
    """Return every `nn.Linear` and `Conv1D` except the output layer, by path in the model's order: peft's `all-linear`.

    Subclasses that compute something else, as some routers do, are left out.
    """
    head = model.get_output_embeddings()
    return {path: module for path, module in model.named_modules() if module is not head and _is_plain_linear(module.__class__)}


@cache
def _is_plain_linear(layer_class: Any) -> bool:
    """Return whether layers of this class compute `x W^T + b`; a class with its own `forward` is tried on a small example."""
    from transformers.pytorch_utils import Conv1D

    if not issubclass(layer_class, nn.Linear):
        return bool(issubclass(layer_class, Conv1D) and layer_class.forward is Conv1D.forward)
    if layer_class.forward is nn.Linear.forward:
        return True
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        # Without the `__init__` of the class, which may need a config.
        probe, x = layer_class.__new__(layer_class), torch.randn(5, 3)
        nn.Linear.__init__(probe, 3, 2)
        try:
            return bool(torch.allclose(layer_class.forward(probe, x), nn.functional.linear(x, probe.weight, probe.bias)))
        except (AttributeError, RuntimeError, TypeError, ValueError):
            return False


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at `path` by `module`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the path and layer of every module with `lora_A` and `lora_B`, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.Parameter):
            yield path, module


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the name and parameter of everything that is trained, such as `PATH.lora_A` (all of `_TRAINED_NAMES`)."""
    for path, module in model.named_modules():
        for name in _TRAINED_NAMES:
            if isinstance(getattr(module, name, None), nn.Parameter):
                yield f"{path}.{name}", getattr(module, name)


@contextmanager
def without_delta(model: nn.Module) -> Iterator[None]:
    """Within the block, compute what the base alone does: deltas are scaled by 0, without dropout and gradients."""
    layers = [layer for _, layer in lora_layers(model)]
    scalings, training = [layer.scaling for layer in layers], model.training
    model.eval()
    try:
        for layer in layers:
            layer.scaling = 0.0
        with torch.no_grad():
            yield
    finally:
        for layer, original_scaling in zip(layers, scalings, strict=True):
            layer.scaling = original_scaling
        model.train(training)


def reset(model: nn.Module, seed: int) -> None:
    """Initialize every trained layer from `seed`; the same layers get the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    for _, module in model.named_modules():
        if any(isinstance(getattr(module, name, None), nn.Parameter) for name in ("lora_A", "rows")):
            module.reset(generator)
