"""The device to compute on, the CPU or CUDA: its selection and memory, and torch's threads."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import distributed

from adapterhub.training import machine
from adapterhub_converters.errors import RefusedError

Dtype = Literal["bfloat16", "float16", "float32"]
_STATUS = Path("/proc/self/status")
_FIRST_WITH_BFLOAT16 = (8, 0)  # the lowest compute capability (Ampere; CUDA C++ Programming Guide, "Compute Capabilities")


def select(setting: str) -> Any:
    """Return the device for the setting `auto`, `cpu` or `cuda`; each of several processes gets its own CUDA device.

    Raises:
        RefusedError: There is no CUDA device, or none for this process.
    """
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RefusedError("[base] device", "torch finds no CUDA device", 'Set "auto" or "cpu"')
    # torchrun numbers the processes of each machine; a single process has number 0.
    local_rank = distributed.get_node_local_rank(fallback_rank=0) if distributed.is_available() else 0
    if local_rank >= torch.cuda.device_count():
        raise RefusedError("[base] device", f"process {local_rank} of this machine has no CUDA device of its own")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    # No TF32, as on a CPU and in torch's default: float32 is for comparisons, and TF32 has the 10 bits of float16's fraction.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return device


def capability(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a CUDA device; None for the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def supported_dtype(dtype: Dtype, capability: tuple[int, int] | None) -> tuple[Dtype, list[str]]:
    """Return the dtype to compute in on a device of this capability for the configured one, and a note if it is another.

    Cards before Ampere (T4, V100, RTX 20) have tensor cores for float16 alone, and emulate bfloat16 in float32.
    """
    if dtype != "bfloat16" or capability is None or capability >= _FIRST_WITH_BFLOAT16:
        return dtype, []
    version = ".".join(map(str, capability))
    note = f"this card (compute capability {version}) has no bfloat16: float16 is used, and the loss is scaled"
    return "float16", [f'{note}; dtype = "float32" in [base] overflows at no step, and is slower']


@contextlib.contextmanager
def deterministic(setting: str) -> Iterator[None]:
    """Within the block, allow only CUDA kernels that give the same bytes each time, as all kernels of a CPU do.

    Args:
        setting: The device, as for `select`.

    Raises:
        RefusedError: An operation has no such kernel.
    """
    if setting == "cpu" or not torch.cuda.is_available():
        yield
        return
    previous_settings = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # Filling costs a pass over each new tensor, which is written before it is read.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        problem = str(error).partition("\n")[0].partition(", but you set")[0][:200]
        # cuBLAS reads the variable when it starts; the command line sets it early enough, a caller of the API may not.
        hint = "Set CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts" if "CUBLAS" in str(error) else "Set it to false"
        raise RefusedError("[train] deterministic", problem, hint) from error
    finally:
        torch.use_deterministic_algorithms(previous_settings[0])
        torch.utils.deterministic.fill_uninitialized_memory = previous_settings[1]


def dtype_notes(dtype: str, device: torch.device, remedy: str = 'set dtype = "float32" in [base]') -> list[str]:
    """Return a note for a dtype that the device multiplies in a slow loop: bfloat16 on CPUs without AVX-512 or its like."""
    has_fast_products = device.type != "cpu" or multiplies_bfloat16()
    if dtype != "bfloat16" or has_fast_products:
        return []
    return [f"this processor multiplies bfloat16 4 to 15 times slower than float32: {remedy}"]


def multiplies_bfloat16() -> bool:
    """Return whether torch has fast products of bfloat16 for this processor."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to multiply small matrices in: float32 instead of one that the CPU has no kernels for."""
    is_slow = device.type == "cpu" and dtype.itemsize == 2 and not multiplies_bfloat16()
    return torch.float32 if is_slow else dtype


def name(device: torch.device) -> str | None:
    """Return the name of a CUDA device; None for the CPU."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def free(device: torch.device) -> int | None:
    """Return the free bytes of a CUDA device, or of this machine for the CPU; None if the system does not report them."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else machine.free_memory()


def memory(device: torch.device) -> int | None:
    """Return the total bytes of a CUDA device; None for the CPU."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def allocated_memory(device: torch.device) -> int:
    """Return the bytes of this process's tensors on a CUDA device, or of the whole process on the CPU; 0 if unknown."""
    on_device = int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0
    return on_device or machine.proc_bytes(_STATUS, "VmRSS") or 0


def peak(device: torch.device) -> int:
    """Return the maximum of `allocated_memory` so far; 0 if unknown."""
    on_device = int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0
    # ru_maxrss would include the memory that the parent had when it started this program (getrusage(2)).
    if measured := on_device or machine.proc_bytes(_STATUS, "VmHWM"):
        return measured
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
    return 0


def gain_of_one_thread(work: Callable[[], object]) -> float:
    """Return how many times faster `work` runs with one thread than with torch's current number, measuring each twice."""
    best: dict[int | None, float] = {}
    # In turn, and the best of two each: a busy machine slows both alike.
    for count in (None, 1, None, 1):
        with threads(count):
            started = time.perf_counter()
            work()
            best[count] = min(best.get(count, math.inf), time.perf_counter() - started)
    return best[None] / max(best[1], 1e-9)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Within the block, use `count` threads in torch; None changes nothing. Yields their number."""
    previous_count = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(previous_count)
