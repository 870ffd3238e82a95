"""The child process of `pickle_conversion`, which turns a pickle of tensors into a safetensors file under limits.

It is never imported by the package itself.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from adapterhub_converters import dtypes, safe_regex
from adapterhub_converters.containers import safetensors_file

_SLACK = 512 << 20  # bytes of address space in addition to the tensors
_SECONDS = 60  # of CPU time, and one more for each 10 MB


def main() -> None:
    """Convert the file `sys.argv[1]` to `sys.argv[2]`; on failure print one line of JSON and exit with code 1."""
    src, dst = Path(sys.argv[1]), Path(sys.argv[2])
    size = src.stat().st_size

    _limit("CPU", _SECONDS + size // 10_000_000)
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 6):
        _fail("version", f"torch {torch.__version__} is too old: weights_only can be deceived before 2.6 (CVE-2025-32434)")
    torch.set_num_threads(1)
    # Relative to what is mapped by now: torch alone maps gigabytes that it never touches.
    _limit("AS", _address_space() + 4 * size + _SLACK)
    _limit("FSIZE", 2 * size + (1 << 20))
    _limit("CORE", 0)
    # No new process or thread: nothing in a pickle may outlive this process.
    _limit("NPROC", 0)
    try:
        state = torch.load(src, map_location="cpu", weights_only=True)
        tensors = _tensors(state, torch, limit=2 * size)
    except (MemoryError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error) or type(error).__name__
        _fail("malformed", reason if "weights_only" not in reason else "torch does not read it")
    except Exception as error:  # noqa: BLE001 - UnpicklingError, whose module is not imported here, and whatever else a pickle can raise
        _fail("refused", _refused_global(str(error)))
    safetensors_file.write(dst, tensors, {"format": "pt"})


def _refused_global(message: str) -> str:
    """Return what a pickle asks for, without torch's advice to load it anyway."""
    match = safe_regex.Pattern(r"GLOBAL ([\w.]+)").search(message)
    return match[1] if match else "an instruction that no file of tensors needs"


def _limit(name: str, value: int) -> None:
    try:
        import resource

        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    except (ImportError, AttributeError, ValueError, OSError):
        return  # the system does not have this limit


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 64 << 30


def _tensors(state: Any, torch: Any, *, limit: int) -> dict[str, Any]:
    if isinstance(state, dict) and set(state) == {"model"} and isinstance(state["model"], dict):
        state = state["model"]  # as litgpt saves it
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise ValueError("it is not a map of names to tensors")
    # A pickle can describe a huge tensor with strides of 0 over one element.
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if total > limit:
        raise ValueError(f"its tensors are {total} bytes, more than twice the file: some repeat their elements")
    return {name: _array(tensor, torch) for name, tensor in state.items()}


def _array(tensor: Any, torch: Any) -> Any:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(dtypes.BF16)
    return tensor.numpy()


def _fail(kind: str, reason: str) -> None:
    print(json.dumps({"kind": kind, "reason": reason}), flush=True)  # noqa: T201 - the answer to the parent
    # Not sys.exit: no handler that loading may have registered gets to run.
    os._exit(1)
