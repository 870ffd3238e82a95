"""The LoRA linear layer, and how it gets into a model.

`y = x W^T + scaling * (x A^T) B^T` (arXiv 2106.09685), W frozen. The autograd function below dequantises W in the
forward pass and again in the backward pass, so that nothing of W's size outlives either, and keeps only `x`, which
layers that share an input share, and `x A^T`, which is r numbers a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from adapterhub_converters.adapter import scaling
from adapterhub_converters.errors import RefusedError

from .nf4 import NF4, dequantise

Tensor = Any


class _LoRAFunction(torch.autograd.Function):  # type: ignore[misc]
    """x `(tokens, in)`, A `(r, in)`, B `(out, r)` float32; W `(out, in)` in x's dtype or NF4."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """`(tokens, out)`."""
        x, lora_A, lora_B, weight, bias, factor = inputs
        W = _dense(weight, x.dtype)
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        y = x @ W.t() if bias is None else torch.addmm(bias, x, W.t())
        xA = x @ A.t()
        y.addmm_(xA, B.t(), alpha=factor)
        ctx.save_for_backward(x, xA, A, B)
        ctx.weight, ctx.factor = weight, factor
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Gradients of x, A and B; W has none."""
        x, xA, A, B = ctx.saved_tensors
        dyB = (dy @ B).mul_(ctx.factor)
        dA = (dyB.t() @ x).float()
        dB = (dy.t() @ xA).float().mul_(ctx.factor)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ _dense(ctx.weight, dy.dtype)
            dx.addmm_(dyB, A)
        return dx, dA, dB, None, None, None


def _dense(weight: Tensor | NF4, dtype: Any) -> Tensor:
    return dequantise(weight, dtype) if isinstance(weight, NF4) else weight.to(dtype)


class LoRALinear(nn.Module):  # type: ignore[misc]
    """A frozen linear layer, dense or NF4, with a trainable low-rank delta; float32 factors, x's dtype in between."""

    def __init__(self, weight: Tensor | NF4, bias: Tensor | None, *, r: int, alpha: float, rslora: bool = False) -> None:
        super().__init__()
        out_features, in_features = weight.shape
        self.base = weight  # not a parameter: frozen, and maybe not even a tensor
        self.bias = bias
        self.scaling = scaling(alpha, r, rslora=rslora)
        self.lora_A = nn.Parameter(torch.zeros(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))

    def reset(self, generator: Any) -> None:
        """A as peft begins it (kaiming uniform with a = sqrt 5: within 1 / sqrt(in_features)), B zero: no delta yet."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        with torch.no_grad():
            self.lora_A.uniform_(-bound, bound, generator=generator)
            self.lora_B.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """`(…, in)` to `(…, out)`."""
        flat = x.reshape(-1, x.shape[-1])
        y = _LoRAFunction.apply(flat, self.lora_A, self.lora_B, self.base, self.bias, self.scaling)
        return y.view(*x.shape[:-1], y.shape[-1])


class FrozenLinear(nn.Module):  # type: ignore[misc]
    """A linear layer that isn't a target: quantised all the same, only passing gradients through."""

    def __init__(self, weight: Tensor | NF4, bias: Tensor | None) -> None:
        super().__init__()
        self.base = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """`(…, in)` to `(…, out)`."""
        y = _FrozenFunction.apply(x.reshape(-1, x.shape[-1]), self.base)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias


class _FrozenFunction(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | NF4) -> Tensor:
        ctx.weight = weight
        return x @ _dense(weight, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return dy @ _dense(ctx.weight, dy.dtype), None


def linears(model: Any) -> dict[str, Any]:
    """Path to layer of every `nn.Linear` but the output layer, in the model's order."""
    head = model.get_output_embeddings()
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}


def targets(paths: Sequence[str], wanted: str | Sequence[str], where: str) -> list[str]:
    """The paths that `wanted` names: `"all-linear"`, or names that match a path or its end, each at least one."""
    if wanted == "all-linear":
        return list(paths)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if not any(_matches(path, name) for path in paths):
            known = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
            raise RefusedError(where, f"target {name!r} is no linear layer of this model", f"It has {known}")
    return [path for path in paths if any(_matches(path, name) for name in names)]


def _matches(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def replace(model: Any, path: str, module: Any) -> None:
    """Put `module` at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def lora_layers(model: Any) -> Iterator[tuple[str, LoRALinear]]:
    """Path and layer of every LoRA layer, in the model's order."""
    for path, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield path, module


def reset(model: Any, seed: int) -> None:
    """Begin every layer anew from `seed`; the same layers get the same numbers."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in lora_layers(model):
        layer.reset(generator)
