"""The best of what was measured on the held-out data: when it was, what was learned then, and when to give up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adapterhub.train.layers.lora import trained


def measured(log: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Step and held-out loss of every evaluation."""
    return [(line["step"], line["heldout_loss"]) for line in log if "heldout_loss" in line]


def step(log: Sequence[Mapping[str, Any]]) -> int | None:
    """The step with the lowest held-out loss, the first of several; None if there was no evaluation."""
    found = measured(log)
    return min(found, key=lambda one: one[1])[0] if found else None


def given_up(log: Sequence[Mapping[str, Any]], patience: int) -> bool:
    """Whether the last `patience` evaluations brought nothing better; 0 never gives up."""
    found = measured(log)
    if not patience or not found:
        return False
    steps = [one[0] for one in found]
    return len(steps) - 1 - steps.index(step(log) or 0) >= patience


def copy(model: Any) -> dict[str, Any]:
    """All that is learned, as it is now."""
    return {name: parameter.detach().clone() for name, parameter in trained(model)}


def put_back(model: Any, values: Mapping[str, Any]) -> None:
    """All that is learned, as it was."""
    with torch.no_grad():
        for name, parameter in trained(model):
            parameter.copy_(values[name])
