"""The state of a run, apart from its config and data: the contents of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np
import torch
from torch import nn

from adapterhub.training.layers.lora import trained_parameters
from adapterhub.training.train_config import OptimConfig
from adapterhub_converters.lazy_dataclass import dataclass

from .optimizer import LossScale, initial_scale, new_optimizer


@dataclass
class State:
    """The progress of a run in steps, in tokens with a loss, and in tokens read; prompts count as read, padding does not."""

    optimizer: torch.optim.Optimizer
    step: int = 0
    tokens: int = 0
    read: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    """The lines of log.jsonl, without times, so that the same run gives the same bytes."""
    rows: int = 0
    """The number of rows whose gradients the next update applies; `loss` is theirs."""
    loss: float = 0.0
    order: np.ndarray | None = None
    """The row numbers of all steps. They follow from seed and data, so checkpoints do not contain them."""
    scale: LossScale = field(default_factory=lambda: LossScale(needed=False))
    best: dict[str, Any] = field(default_factory=dict)
    """The trained parameters at the lowest held-out loss, by name, with `keep_best`."""

    @property
    def kept_step(self) -> int:
        """The step whose parameters are the result."""
        return (best_step(self.log) or 0) if self.best else self.step

    def heldout(self, step: int) -> float | None:
        """Return the held-out loss after `step` steps, if it was evaluated."""
        return dict(evaluations(self.log)).get(step)


def new_state(model: nn.Module, config: OptimConfig) -> State:
    """Return the state before the first step."""
    return State(new_optimizer(model, config), scale=initial_scale(model))


def evaluations(log: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return the step and held-out loss of every evaluation."""
    return [(line["step"], line["heldout_loss"]) for line in log if "heldout_loss" in line]


def best_step(log: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the step with the lowest held-out loss, the first of several; None without an evaluation."""
    # Of equal losses, min takes the first; the default is for a log without evaluations.
    return min(evaluations(log), key=lambda evaluation: evaluation[1], default=(None, 0.0))[0]


def out_of_patience(log: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Return whether none of the last `patience` evaluations beat the best one before them; never for a patience of 0."""
    steps = [step for step, _ in evaluations(log)]
    # An evaluation that is only as good as the best one is no improvement: `best_step` stays with the first.
    return bool(patience and steps) and len(steps) - 1 - steps.index(best_step(log) or 0) >= patience


def copy_trained(model: nn.Module) -> dict[str, Any]:
    """Return a copy of all trained parameters, by name."""
    return {name: parameter.detach().clone() for name, parameter in trained_parameters(model)}


def restore_trained(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Set all trained parameters to the values of a copy."""
    with torch.no_grad():
        for name, parameter in trained_parameters(model):
            parameter.copy_(values[name])
