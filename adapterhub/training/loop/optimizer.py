"""The update of the trained parameters: AdamW, its learning rate at each step, and the scale of the loss in float16."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.training.layers.lora import trained_parameters
from adapterhub.training.train_config import OptimConfig
from adapterhub_converters.errors import MissingExtraError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

_FIRST_SCALE, _MAX_SCALE = 65536.0, 2.0**24
_GOOD_STEPS = 2000  # in a row, after which the scale of the loss doubles


def new_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return torch's AdamW, or bitsandbytes' with 8-bit moments, for all trained parameters.

    Each of its groups has a `ratio` of the learning rate, `loraplus` for lora_B; the loop sets the rate before each step. Only
    factors decay, toward no delta: biases do not (transformers' `get_decay_parameter_names`), and neither do magnitudes and
    rows of tables, whose initial values are not 0.

    Raises:
        RefusedError: Paged memory is configured and the parameters are not on a CUDA device.
        MissingExtraError: bitsandbytes is not installed.
    """
    parameters = dict(trained_parameters(model))
    groups_by_kind: dict[tuple[bool, bool], list[Tensor]] = {
        (decays, is_fast): [] for decays in (True, False) for is_fast in (False, True)
    }
    for name, parameter in parameters.items():
        groups_by_kind[name.endswith((".lora_A", ".lora_B")), name.endswith((".lora_B", ".lora_bias"))].append(parameter)
    groups = [
        {"params": group, "ratio": config.loraplus if is_fast else 1.0, "weight_decay": config.weight_decay if decays else 0.0}
        for (decays, is_fast), group in groups_by_kind.items()
        if group
    ]
    options = {"lr": 0.0, "betas": (config.beta1, config.beta2)}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, fused=True, **options)
    location = "[train] optimizer"
    paged = config.optimizer == "paged_adamw8bit"
    if paged and not all(parameter.is_cuda for parameter in parameters.values()):
        raise RefusedError(location, "only a CUDA device has paged memory, but this training runs on the CPU", "Set adamw8bit")
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise MissingExtraError(location, f"{config.optimizer} needs bitsandbytes", "Run `pip install bitsandbytes`") from error
    return (optim.PagedAdamW8bit if paged else optim.AdamW8bit)(groups, **options)


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Any]:
    """Return the optimizer's state of a parameter, by name, as tensors; empty before its first gradient."""
    state = optimizer.state.get(parameter, {})
    # The code books of 8-bit moments are constants and not part of the state.
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and not name.startswith("qmap")}
    return {**tensors, "step": torch.tensor(float(state["step"]))} if state else {}


def restore_moments(optimizer: torch.optim.Optimizer, parameter: Tensor, tensors: Mapping[str, Any]) -> None:
    """Set the optimizer's state of a parameter to a result of `moments`."""
    step = tensors["step"]
    if not hasattr(optimizer, "init_state"):
        optimizer.state[parameter] = {name: value.to(parameter.device) for name, value in tensors.items()}
        return
    # bitsandbytes' moments may be in memory that only it can allocate.
    for group_number, group in enumerate(optimizer.param_groups):
        for parameter_number, candidate in enumerate(group["params"]):
            if candidate is parameter:
                optimizer.init_state(group, parameter, group_number, parameter_number)
    state = optimizer.state[parameter]
    for name, value in tensors.items():
        if name != "step":
            state[name].copy_(value)
    state["step"] = int(step)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Return the rate of step `step` (from 0): it rises in the warm-up, then falls without reaching 0."""
    if step < config.warmup:
        # The first step has a rate above 0, and the first one after the warm-up the full rate.
        return config.learning_rate * (step + 1) / (config.warmup + 1)
    progress = (step - config.warmup) / max(1, steps - config.warmup)
    shares = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.learning_rate * shares[config.schedule]


@dataclass
class LossScale:
    """The factor of the loss in the backward pass, which keeps float16 gradients from vanishing; other dtypes need none.

    It follows torch's GradScaler (arXiv 1710.03740, section 3.2): halved when a gradient overflows, which skips that step;
    doubled after 2,000 good steps. `skipped` counts skipped steps in a row. All fields are plain numbers, which checkpoints
    contain.
    """

    needed: bool
    factor: float = 1.0
    good: int = 0
    skipped: int = 0

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients by the factor."""
        if self.needed:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / self.factor)

    def accepts(self, norm: float) -> bool:
        """Return whether gradients of this norm may be applied, and adjust the factor."""
        if not math.isfinite(norm):
            self.factor, self.good = max(1.0, self.factor / 2), 0
            self.skipped += 1
            return False
        self.skipped = 0
        if not self.needed:
            return True
        self.good += 1
        if self.good == _GOOD_STEPS:
            self.factor, self.good = min(_MAX_SCALE, self.factor * 2), 0
        return True


def initial_scale(model: nn.Module) -> LossScale:
    """Return the initial loss scale for `model`."""
    needed = getattr(model, "dtype", None) == torch.float16
    return LossScale(needed, _FIRST_SCALE if needed else 1.0)
