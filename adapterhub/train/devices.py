"""Where a model is computed: the CPU, or a CUDA device. What each holds, and what it is called."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed

from adapterhub_converters.errors import RefusedError


def chosen(asked: str) -> Any:
    """The device that `auto`, `cpu` or `cuda` means: of several processes each has a CUDA device of its own."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RefusedError("[base] device", "torch sees no CUDA device", 'Set "auto" or "cpu"')
    own = distributed.get_node_local_rank(fallback_rank=0) if distributed.is_available() else 0
    if own >= torch.cuda.device_count():
        raise RefusedError("[base] device", f"process {own} of this machine has no CUDA device of its own")
    device = torch.device("cuda", own)
    torch.cuda.set_device(device)
    return device


def name(device: Any) -> str | None:
    """What a CUDA device is called; None for the CPU."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def held(device: Any) -> int:
    """Bytes that this process holds in tensors of a CUDA device; 0 for the CPU."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0


def peak(device: Any) -> int:
    """The most that `held` was."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0


def free(device: Any) -> int | None:
    """Bytes that a CUDA device could still give; None for the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else None
