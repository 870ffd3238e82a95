"""Experts whose matrices transformers 5 stacks in one parameter: each is quantized by itself and has its own LoRA.

`y = x W_e^T + scaling * (x A_e^T) B_e^T` for the tokens that the router sends to expert e, as peft's `target_parameters`
computes it (`tuners/lora/layer.py`, `ParamWrapper`, which adds every expert's product to its weight). Here only experts that
get a token are dequantized, in the forward and again in the backward pass; the gradients of the others are zeros, as in peft.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.training.train_config import LoRAConfig
from adapterhub_converters.adapter import scaling
from adapterhub_converters.errors import RefusedError

from .nf4_matrix import NF4, dense_for_one_product

NAME = "adapterhub_experts"
_ROW_MULTIPLE = 32
_STACKS = ("gate_up_proj", "up_proj", "down_proj")


class _StackFunction(torch.autograd.Function):  # type: ignore[misc]
    """The product of a stack of experts with their tokens.

    x is `(pairs, in)`, a pair being a token with one of its experts, sorted by expert; A `(experts, r, in)` and B
    `(experts, out, r)` are float32, or None if nothing is trained; `counts` are the pairs of each expert.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Return `(pairs, out)`."""
        x, lora_A, lora_B, stack, counts = inputs
        ctx.stack, ctx.visited = stack, _expert_rows(counts)
        y = x.new_empty(len(x), stack.shape[1])
        for expert, rows in ctx.visited:
            torch.mm(x[rows], stack.dense(expert, x.dtype).t(), out=y[rows])
        if lora_A is None:
            return y
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        xA = x.new_empty(len(x), A.shape[1])
        for expert, rows in ctx.visited:
            torch.mm(x[rows], A[expert].t(), out=xA[rows])
            y[rows].addmm_(xA[rows], B[expert].t(), alpha=stack.scaling)
        ctx.save_for_backward(x, xA, A, B)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """Return the gradients of x, A and B."""
        stack, visited = ctx.stack, ctx.visited
        dy = dy.contiguous()
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy.new_empty(len(dy), stack.shape[2])
            for expert, rows in visited:
                torch.mm(dy[rows], stack.dense(expert, dy.dtype), out=dx[rows])
        saved = ctx.saved_tensors  # read only once: with checkpointing, a second access fails
        if not saved:
            return dx, None, None, None, None
        x, xA, A, B = saved
        dA, dB = torch.zeros_like(A, dtype=torch.float32), torch.zeros_like(B, dtype=torch.float32)
        for expert, rows in visited:
            dyB = (dy[rows] @ B[expert]).mul_(stack.scaling)
            dA[expert] = dyB.t() @ x[rows]
            dB[expert] = (dy[rows].t() @ xA[rows]).float().mul_(stack.scaling)
            if dx is not None:
                dx[rows].addmm_(dyB, A[expert])
        return dx, dA, dB, None, None


def _expert_rows(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """Return each expert that has tokens, with its rows."""
    visits, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            visits.append((expert, slice(start, start + count)))
        start += count
    return visits


class Stack(nn.Module):  # type: ignore[misc]
    """The frozen matrices of all experts; if `transposed`, each is `(in, out)`."""

    scaling = 0.0

    def __init__(self, matrices: Sequence[Tensor | NF4], *, transposed: bool) -> None:
        super().__init__()
        self.matrices = tuple(matrices)
        self.transposed = transposed
        # Registered as None, so that `lora_A` and `lora_B` exist on every stack and its forward pass is one function.
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape `(experts, out, in)`."""
        first, second = self.matrices[0].shape
        return (len(self.matrices), second, first) if self.transposed else (len(self.matrices), first, second)

    def dense(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Return the matrix of an expert, `(out, in)`, for one product."""
        matrix = dense_for_one_product(self.matrices[expert], dtype)
        return matrix.t() if self.transposed else matrix

    def forward(self, x: Tensor, counts: Sequence[int]) -> Tensor:
        """Return `(pairs, out)` for `x` `(pairs, in)`, sorted by expert."""
        return _StackFunction.apply(x, self.lora_A, self.lora_B, self, counts)


class LoRAStack(Stack):
    """A `Stack` with a trainable low-rank delta for each expert."""

    def __init__(self, matrices: Sequence[Tensor | NF4], *, transposed: bool, r: int, alpha: float, rslora: bool) -> None:
        super().__init__(matrices, transposed=transposed)
        experts, out_features, in_features = self.shape
        self.alpha, self.rslora, self.initial = alpha, rslora, None
        self.scaling = scaling(alpha, r, rslora=rslora)
        self.lora_A = nn.Parameter(torch.zeros(experts, r, in_features, device=matrices[0].device))
        self.lora_B = nn.Parameter(torch.zeros(experts, out_features, r, device=matrices[0].device))

    def reset(self, generator: torch.Generator) -> None:
        """Initialize A uniformly within 1 / sqrt(in_features) and B with zeros, as in a linear layer."""
        bound = 1 / math.sqrt(self.lora_A.shape[2])
        with torch.no_grad():
            self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound, generator=generator))
            self.lora_B.zero_()


def register() -> str:
    """Register `_run_experts` with transformers, and return its name for a config's `_experts_implementation`."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, _run_experts)
    return NAME


def stacks(model: nn.Module) -> dict[str, Any]:
    """Return the module of every stacked parameter by its path, for modules with transformers' experts interface, in order."""
    return {
        f"{path}.{name}": module
        for path, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed")
        for name in _STACKS
        if isinstance(getattr(module, name, None), nn.Parameter)
    }


def _run_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run experts as `integrations/moe.py` requires: states are `(tokens, d)`, ids and weights of experts `(tokens, k)`."""
    expert_ids = top_k_index.reshape(-1)
    # A token occurs once for each of its experts. Sorted by expert, the rows of each are contiguous.
    by_expert, order = torch.sort(expert_ids, stable=True)
    up, down = module.gate_up_proj if module.has_gate else module.up_proj, module.down_proj
    counts = torch.bincount(expert_ids, minlength=down.shape[0]).tolist()
    x = hidden_states[order // top_k_index.shape[-1]]
    places = None
    if x.dtype != torch.float32 and x.device.type == "cpu":
        places, by_expert, counts = _pad_expert_rows(by_expert, counts)
        x = x.new_zeros(len(by_expert), x.shape[1]).index_copy(0, places, x)
    x = up(x, counts)
    if module.has_bias:
        x = x + (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias)[by_expert]
    y = down(module._apply_gate(x) if module.has_gate else module.act_fn(x), counts)
    if module.has_bias:
        y = y + module.down_proj_bias[by_expert]
    if getattr(module, "has_post_expert_norm", False):
        y = module.post_expert_norm(y)
    y = y if places is None else y[places]
    weighted = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    # Back in the order of tokens, to sum the weighted outputs of each token's experts.
    original_order = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    summed = weighted[original_order].view(len(hidden_states), -1, weighted.shape[-1]).sum(dim=1)
    return summed.to(hidden_states.dtype)


def _pad_expert_rows(by_expert: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
    """Pad each expert's pairs to a multiple of `_ROW_MULTIPLE`; return their places, the expert of every place, and the counts.

    oneDNN, which multiplies 16-bit matrices on a CPU, caches half a megabyte or more for every number of rows it has seen.
    """
    counts_tensor = torch.tensor(counts)
    padded = -(counts_tensor // -_ROW_MULTIPLE) * _ROW_MULTIPLE
    shifts = (padded.cumsum(0) - padded) - (counts_tensor.cumsum(0) - counts_tensor)
    places = torch.arange(len(by_expert)) + shifts[by_expert]
    return places, torch.repeat_interleave(torch.arange(len(counts)), padded), padded.tolist()


def check(config: LoRAConfig, location: str) -> None:
    """Refuse options that peft cannot combine with a stack either, because it adds the product to the expert's weight."""
    for key, default in (("dora", False), ("lora_bias", False), ("dropout", 0.0), ("init", "default")):
        if getattr(config, key) != default:
            raise RefusedError(location, f"[lora] {key} cannot be combined with LoRA on a stack of experts", "Leave one out")
