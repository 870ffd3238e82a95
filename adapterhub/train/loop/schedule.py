"""The learning rate of each step."""

from __future__ import annotations

import math

from adapterhub.train.config import OptimConfig

_DECAY = 0.2  # share of the steps in which `wsd` falls


def rate(config: OptimConfig, step: int, steps: int) -> float:
    """The rate of step `step` (from 0): rises in the warm-up, then falls toward, never to, its floor."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / (config.warmup + 1)
    done = (step - config.warmup) / max(1, steps - config.warmup)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "wsd": min(1.0, (1.0 - done) / _DECAY),
        "inverse_sqrt": math.sqrt((config.warmup + 1) / (step + 1)),
    }
    return config.learning_rate * (config.floor + (1 - config.floor) * shape[config.schedule])
