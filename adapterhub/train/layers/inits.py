"""Factors that begin as part of the weight: PiSSA its principal part, LoftQ that of what quantizing loses.

Both train on another base than the one in the files, and a loader that doesn't know gets something else. So what is saved
is the difference: `scaling * (BA - B0 A0)`, a plain LoRA of twice the rank (`plain`), for the base as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from adapterhub.train.config import LoRAConfig
from adapterhub_converters.errors import RefusedError

from .lora import dense
from .nf4 import NF4, quantize

Tensor = Any
Factors = tuple[Tensor, Tensor]


def begin(
    weight: Tensor, config: LoRAConfig, *, r: int, scaling: float, quantized: bool, where: str
) -> tuple[Tensor | NF4, Factors | None]:
    """The base that is trained on and the factors A `(r, in)`, B `(out, r)` to begin with; None: by chance.

    PiSSA as peft has it (`pissa_init`); LoftQ with NF4 for its quantization (`utils/loftq_utils.py`).
    """

    def held(matrix: Tensor) -> Tensor | NF4:
        return quantize(matrix, where) if quantized else matrix

    if config.init == "default":
        return held(weight), None
    if r > min(weight.shape):
        raise RefusedError(
            where, f"has no {r} directions for {config.init} to begin with", f"Set r to {min(weight.shape)} at most"
        )
    full = weight.float()
    if config.init == "pissa":
        A, B = _principal(full, r, scaling, iterations=config.init_iterations, seed=len(where))
        return held((full - scaling * B @ A).to(weight.dtype)), (A, B)
    base = quantize(weight, where)
    A, B = _principal(full - dense(base, torch.float32), r, scaling)
    for _ in range(config.init_iterations - 1):
        base = quantize(full - scaling * B @ A, where)
        A, B = _principal(full - dense(base, torch.float32), r, scaling)
    return base, (A, B)


def _principal(matrix: Tensor, r: int, scaling: float, *, iterations: int = 0, seed: int = 0) -> Factors:
    """A and B, alike in size, such that `scaling * B A` is the best approximation of rank r."""
    if iterations:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(matrix, r, niter=iterations)
        Vh = V.t()
    else:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    return root.unsqueeze(1) * Vh[:r], U[:, :r] * root


def plain(A: Tensor, B: Tensor, initial: Factors) -> Factors:
    """Factors of twice the rank whose product is `B A - B0 A0`."""
    return torch.cat([A, initial[0]]), torch.cat([B, -initial[1]], dim=1)
