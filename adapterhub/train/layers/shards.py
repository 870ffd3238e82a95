"""Quantized matrices of which each process holds a part: FSDP2 puts a block together before its use, and lets it go.

`fully_shard` (torch.distributed.fsdp) divides the packed bytes alone, which are nearly all there is and never change: all
else is replicated, so that factors, gradients, moments and checkpoints are as in one process. One exchange a block, the next
block's while this one computes where the device has streams. Every process has to go through the same blocks, so every one
makes the same number of passes in a step (`loop`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from adapterhub.train import distributed

from .nf4 import NF4


class Part(nn.Module):  # type: ignore[misc]
    """A matrix whose packed bytes are a parameter: of this process's part, but while its block is in use."""

    def __init__(self, matrix: NF4) -> None:
        super().__init__()
        self.packed = nn.Parameter(matrix.packed, requires_grad=False)
        self.rest = replace(matrix, packed=matrix.packed.new_empty(0))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole matrix."""
        return self.rest.shape

    @property
    def device(self) -> Any:
        """Where it lies."""
        return self.packed.device

    def whole(self) -> NF4:
        """The matrix; outside its block's passes all processes have to ask for it."""
        packed = self.packed
        return replace(self.rest, packed=packed.full_tensor() if hasattr(packed, "full_tensor") else packed)


def part(matrix: Any) -> Any:
    """A matrix that can be divided; itself where there is one process, or where it isn't quantized."""
    return Part(matrix) if distributed.count() > 1 and isinstance(matrix, NF4) else matrix


def divide(module: Any, device: Any) -> None:
    """Divide what in `module` can be and isn't yet: a block at a time, and at last the model around them."""
    if distributed.count() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    others = {parameter for parameter in module.parameters() if parameter.dtype != torch.uint8}
    fully_shard(module, mesh=init_device_mesh(device.type, (distributed.count(),)), ignored_params=others)
