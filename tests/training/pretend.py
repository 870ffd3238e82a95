"""A device that is none: CPU tensors that say they lie elsewhere, so that a mixed operation fails without a GPU.

Every operation goes through `Elsewhere`, which computes on the CPU what is asked of tensors "there", with real numbers. As on
CUDA, an operation takes tensors of one device, but for single numbers and copies from one to the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
THERE = torch.device("pretend", 0)
_COPIES = ("aten._to_copy", "aten.copy_", "aten._copy_from")
_WAITS = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero")
waits: list[str] = []
"""What has made the host wait for numbers from there, as a GPU would: one after the other."""


class There(torch.Tensor):
    """A tensor that lies there; `inner` has its numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device=THERE
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Within it tensors can be made there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, torch.Tensor)]
    moved_tensors = [item for item in tensors if isinstance(item, There)]
    name = str(func).rpartition(".")[0]
    device = kwargs.get("device")
    leaves = name in _COPIES and device is not None and torch.device(device).type != THERE.type
    if moved_tensors and (name in _WAITS or leaves or (name == "aten.copy_" and not isinstance(args[0], There))):
        waits.append(name)
    if moved_tensors and name not in _COPIES:
        for place, item in enumerate(tensors):
            # A single number of the CPU may be read, not written.
            if not isinstance(item, There) and (item.ndim or (place == 0 and name.endswith("_"))):
                raise RuntimeError(
                    f"{func}: tensors on the CPU and elsewhere, {[(type(t).__name__, t.shape) for t in tensors]}"
                )
    to = (device is not None and torch.device(device).type == THERE.type) or (bool(moved_tensors) and device is None)
    if to and device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "aten.copy_":
        to = isinstance(args[0], There)
    plain_args, plain = tree_map(_inner, (args, kwargs))
    result = func(*plain_args, **plain)
    same = {id(item.inner): item for item in moved_tensors}

    def outer(item: Any) -> Any:
        if not isinstance(item, torch.Tensor) or not to:
            return item
        return same[id(item)] if id(item) in same else There(item)

    return tree_map(outer, result)


def _inner(item: Any) -> Any:
    return item.inner if isinstance(item, There) else item
