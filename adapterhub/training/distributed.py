"""Several processes that train one adapter, as `torchrun` starts them: each has the model and a part of the rows of every step.

Each process divides the loss of its rows by the number of labels of the whole step, and gradients are summed, so the number of
processes does not change the loss. All then take the same step; the first process writes files and reports events. Usually
there is only one process.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import distributed

_MAX_WAIT = datetime.timedelta(hours=6)  # the first process quantizes or evaluates while the others wait


def count() -> int:
    """Return the number of processes."""
    return int(distributed.get_world_size()) if distributed.is_available() and distributed.is_initialized() else 1


def process() -> int:
    """Return the number of this process, from 0."""
    return int(distributed.get_rank()) if count() > 1 else 0


def first() -> bool:
    """Return whether this process is the one that writes files and reports events."""
    return process() == 0


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Connect the processes started by `torchrun` for the duration of the block."""
    if count() > 1 or not distributed.is_torchelastic_launched():
        yield
        return
    # Single numbers are summed on the CPU, tensors on the model's device.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=_MAX_WAIT)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def share(rows: np.ndarray) -> np.ndarray:
    """Return this process's part of the rows; with fewer rows than processes, the last ones have none."""
    return np.array_split(rows, count())[process()]


def total(value: float) -> float:
    """Return the sum of `value` over all processes."""
    if count() == 1:
        return value
    summed = torch.tensor([value], dtype=torch.float64)
    distributed.all_reduce(summed)
    return float(summed)


def sum_gradients(parameters: Sequence[Any]) -> None:
    """Replace the gradient of every parameter by its sum over all processes, in one exchange."""
    if count() == 1:
        return
    # One exchange of all gradients is faster than one for each parameter.
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).view(-1) for p in parameters])
    distributed.all_reduce(flat)
    for parameter, gradient in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        # A copy, because a view would keep the gradients of all parameters in memory.
        parameter.grad = gradient.view(parameter.shape).clone()


def wait() -> None:
    """Wait until all processes have arrived here. A sum on the CPU, because NCCL times out before a large base is quantized."""
    total(0.0)


@contextlib.contextmanager
def in_turn(*, enabled: bool) -> Iterator[None]:
    """Run the block in the first process and then in all others; if not `enabled`, the same value in all, run it at once."""
    if enabled and not first():
        wait()
    yield
    if enabled and first():
        wait()
