"""The blocks of a model through `torch.compile`: what lies between the layers here (norms, rotations, activations) is fused.

The layers themselves stay outside of the graphs: they hold what is no tensor (NF4), and their arithmetic is matrix products
that no compiler makes faster.
"""

from __future__ import annotations

from typing import Any

import torch

from adapterhub.train.layers.embeddings import LoRAEmbedding, TokenRows
from adapterhub.train.layers.experts import Stack
from adapterhub.train.layers.lora import Frozen
from adapterhub_converters.errors import RefusedError

_OUTSIDE = (Frozen, Stack, LoRAEmbedding, TokenRows)


def apply(model: Any, where: str, *, backend: str = "inductor") -> None:
    """Have every block of `model` compiled when it is first used; `backend` as torch calls it.

    RefusedError if nothing can be compiled here, or where transformers doesn't say what the model's blocks are.
    """
    blocks = [module for module in model.modules() if type(module).__name__ in set(model._no_split_modules or ())]
    if not blocks:
        raise RefusedError(
            f"{where}: [train] compile", f"{type(model).__name__} doesn't say what its blocks are", "Leave it out"
        )
    _try(where, backend)
    for module in model.modules():
        if isinstance(module, _OUTSIDE):
            setattr(module, "forward", torch.compiler.disable(module.forward))  # noqa: B010 - mypy takes it for a method
    for block in blocks:
        block.compile(backend=backend)


def _try(where: str, backend: str) -> None:
    """Compile something small: what is wrong then is said in one line, and not in the first step in a hundred."""
    try:
        torch.compile(lambda x: x * 2 + 1, backend=backend)(torch.ones(2))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        what = f"torch.compile fails here ({lines[0][:200]})"
        hint = "On a CPU it needs a C++ compiler, g++ or clang; install one, or leave it out"
        raise RefusedError(f"{where}: [train] compile", what, hint) from error
