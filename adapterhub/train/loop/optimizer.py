"""AdamW over all that is learned: torch's, or bitsandbytes' with moments in 8 bits, in paged memory on CUDA if asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from adapterhub.train.config import OptimConfig
from adapterhub.train.layers.lora import trained
from adapterhub_converters.errors import MissingExtraError, RefusedError


def make(model: Any, config: OptimConfig) -> Any:
    """The optimizer, with lora_B's rate `loraplus` times that of all others; its rate is set before each step.

    Raises:
        RefusedError: Paged memory is asked for and what is learned doesn't lie on a CUDA device.
        MissingExtraError: bitsandbytes isn't installed.
    """
    parameters = dict(trained(model))
    fast = (".lora_B", ".lora_bias")
    groups = [
        {"params": [p for name, p in parameters.items() if not name.endswith(fast)], "ratio": 1.0},
        {"params": [p for name, p in parameters.items() if name.endswith(fast)], "ratio": config.loraplus},
    ]
    options = {"lr": 0.0, "betas": (config.beta1, config.beta2), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    where = "[train] optimizer"
    paged = config.optimizer == "paged_adamw8bit"
    if paged and not all(parameter.is_cuda for parameter in parameters.values()):
        raise RefusedError(where, "only a CUDA device has paged memory, and this training runs on the CPU", "Set adamw8bit")
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise MissingExtraError(where, f"{config.optimizer} is bitsandbytes'", "pip install bitsandbytes") from error
    return (optim.PagedAdamW8bit if paged else optim.AdamW8bit)(groups, **options)


def moments(optimizer: Any, parameter: Any) -> dict[str, Any]:
    """What the optimizer knows of a parameter, by name, as tensors; empty before its first gradient."""
    state = optimizer.state.get(parameter, {})
    # The code books of 8 bits are constants.
    found = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and not name.startswith("qmap")}
    return {**found, "step": torch.tensor(float(state["step"]))} if state else {}


def put(optimizer: Any, parameter: Any, known: Mapping[str, Any]) -> None:
    """Have the optimizer know what `moments` gave."""
    step = known["step"]
    if not hasattr(optimizer, "init_state"):
        optimizer.state[parameter] = {name: value.to(parameter.device) for name, value in known.items()}
        return
    # bitsandbytes' moments may lie in memory that it alone can make.
    for number, group in enumerate(optimizer.param_groups):
        for place, own in enumerate(group["params"]):
            if own is parameter:
                optimizer.init_state(group, parameter, number, place)
    state = optimizer.state[parameter]
    for name, value in known.items():
        if name != "step":
            state[name].copy_(value)
    state["step"] = int(step)
