"""AdamW over all that is learnt: torch's, or bitsandbytes' with its moments in 8 bits, which needs CUDA."""

from __future__ import annotations

from typing import Any

import torch

from adapterhub.train.config import OptimConfig
from adapterhub.train.layers.lora import trained
from adapterhub_converters.errors import MissingExtraError, RefusedError


def make(model: Any, config: OptimConfig) -> Any:
    """The optimiser, with lora_B's rate `loraplus` times that of all others; its rate is set before each step.

    Raises:
        RefusedError: 8 bits are asked for and what is learnt doesn't lie on a CUDA device.
        MissingExtraError: bitsandbytes isn't installed.
    """
    parameters = dict(trained(model))
    fast = (".lora_B", ".lora_bias")
    groups = [
        {"params": [p for name, p in parameters.items() if not name.endswith(fast)], "ratio": 1.0},
        {"params": [p for name, p in parameters.items() if name.endswith(fast)], "ratio": config.loraplus},
    ]
    options = {"lr": 0.0, "betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    if config.optimiser == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    where = "[train] optimiser"
    if not all(parameter.is_cuda for parameter in parameters.values()):
        raise RefusedError(where, f"{config.optimiser} works on a CUDA device only, and this training runs on the CPU")
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise MissingExtraError(where, f"{config.optimiser} is bitsandbytes'", "pip install bitsandbytes") from error
    kind = optim.PagedAdamW8bit if config.optimiser == "paged_adamw8bit" else optim.AdamW8bit
    return kind(groups, **options)
