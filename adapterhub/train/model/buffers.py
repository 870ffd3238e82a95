"""Buffers that no file holds (rotary frequencies, say), computed as transformers computes them when it loads a model.

Each is filled with what no computation gives, the model's own `_init_weights` is asked, and what it left alone is refused by
name.
"""

from __future__ import annotations

from typing import Any

import torch

from adapterhub_converters.errors import RefusedError

Tensor = Any


def compute(model: Any, where: str) -> None:
    """Give every buffer that is still empty its value; the parameters are there, and stay as they are."""
    for tensor in [*model.parameters(), *(buffer for buffer in model.buffers() if not buffer.is_meta)]:
        # What transformers' own initialization heeds, tensor by tensor (`initialization.py`).
        tensor._is_hf_initialized = True
    modules = {path: module for path, module in model.named_modules() if any(b.is_meta for b in module.buffers(recurse=False))}
    for module in modules.values():
        module._buffers.update(
            {name: _marked(buffer) for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        )
    for path, module in modules.items():
        for above in _above(model, path):
            for asked in (module, above):
                if _left(module):
                    above._init_weights(asked)
        _build_again(module, f"{where}: {path}")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise RefusedError(where, f"{name}: no value is known for it")


def _above(model: Any, path: str) -> list[Any]:
    """The models that a module is or lies in, the innermost first: some compute what is in their layers (Falcon-H1)."""
    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[:count])) for count in range(len(parts) + 1)]
    return [module for module in reversed(around) if hasattr(module, "_init_weights")]


def _left(module: Any) -> list[str]:
    """The names of the buffers that nothing was computed for yet."""
    return [name for name, buffer in module._buffers.items() if buffer is not None and _is_mark(buffer)]


def _build_again(module: Any, where: str) -> None:
    """What is left, from a new module of the same kind, where its config is all that it is built of."""
    for name in _left(module):
        try:
            module._buffers[name] = type(module)(module.config)._buffers[name]
        except (AttributeError, TypeError, KeyError) as error:
            raise RefusedError(f"{where}.{name}", "no way is known to compute it without its checkpoint") from error


def _marked(buffer: Tensor) -> Tensor:
    return torch.full_like(buffer, _mark(buffer.dtype), device="cpu")


def _is_mark(buffer: Tensor) -> bool:
    mark = _mark(buffer.dtype)
    marked = buffer.isnan() if mark != mark else buffer == mark  # noqa: PLR0124 - NaN
    return bool(buffer.numel()) and bool(marked.all())


def _mark(dtype: Any) -> Any:
    if dtype.is_floating_point:
        return float("nan")
    return False if dtype == torch.bool else torch.iinfo(dtype).min
