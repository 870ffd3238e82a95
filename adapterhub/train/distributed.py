"""Several processes that train one adapter, as `torchrun` starts them: each has the model, and some rows of every step.

A process divides its rows' loss by the labels of the whole step, and gradients are summed, so that the number of processes
changes no loss. All then do the same step; the first writes, and speaks. One process is the usual case and needs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed


def count() -> int:
    """How many processes there are."""
    return int(distributed.get_world_size()) if distributed.is_available() and distributed.is_initialized() else 1


def number() -> int:
    """Which of them this is, from 0."""
    return int(distributed.get_rank()) if count() > 1 else 0


def first() -> bool:
    """Whether this is the one that writes."""
    return number() == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Within the block the processes that `torchrun` started know each other."""
    if count() > 1 or not distributed.is_torchelastic_launched():
        yield
        return
    # Single numbers are summed on the CPU, the rest where the model lies.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def share(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """This process's part of some rows, and how many come before it."""
    parts = np.array_split(rows, count())
    return parts[number()], sum(map(len, parts[: number()]))


def rounds(rows: int, size: int) -> int:
    """How many passes of `size` rows the process with the largest part of `rows` makes."""
    return -(-(rows // -count()) // -size)


def total(value: float) -> float:
    """The sum over all processes."""
    if count() == 1:
        return value
    summed = torch.tensor([value], dtype=torch.float64)
    distributed.all_reduce(summed)
    return float(summed)


def sum_gradients(parameters: Sequence[Any]) -> None:
    """Give every parameter the sum of all processes' gradients, in one exchange."""
    if count() == 1:
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).view(-1) for p in parameters])
    distributed.all_reduce(flat)
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view(parameter.shape).clone()


def wait() -> None:
    """Go on when all have come here."""
    if count() > 1:
        distributed.barrier()
