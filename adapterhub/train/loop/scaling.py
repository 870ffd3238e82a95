"""What the loss is multiplied by before the backward pass, so that gradients in float16 don't vanish.

As torch's GradScaler has it (arXiv 1710.03740, section 3.2): halved when a gradient overflows, and that step then changes
nothing; doubled after 2,000 steps without. Plain numbers that a checkpoint holds. Other dtypes need none of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

_FIRST = 65536.0
_STEPS = 2000
_MOST = 2.0**24


@dataclass
class Scale:
    """The factor, and how many steps went well with it; `needed` for float16 alone."""

    needed: bool
    factor: float = 1.0
    good: int = 0

    def undo(self, parameters: Iterable[Any]) -> None:
        """Take the factor out of the gradients."""
        if self.needed:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / self.factor)

    def passes(self, norm: float) -> bool:
        """Whether gradients of this norm may change anything; the factor follows."""
        if not self.needed:
            return True
        if not math.isfinite(norm):
            self.factor, self.good = max(1.0, self.factor / 2), 0
            return False
        self.good += 1
        if self.good == _STEPS:
            self.factor, self.good = min(_MOST, self.factor * 2), 0
        return True


def scale(model: Any) -> Scale:
    """What `model` begins with."""
    needed = getattr(model, "dtype", None) == torch.float16
    return Scale(needed, _FIRST if needed else 1.0)
