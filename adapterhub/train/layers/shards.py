"""A quantised matrix of which each process holds a part: put together for each use, and let go.

What FSDP does for parameters that are not trained, for the packed bytes alone: they are nearly all there is. Every process
has to use the same layers in the same order, so every one makes the same number of passes in a step (`loop`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from adapterhub.train import ranks

from .nf4 import NF4


@dataclass(frozen=True, eq=False)
class Part:
    """This process's part of a matrix.

    Attributes:
        own: uint8, as many bytes in every process; zeros behind the last.
        size: Bytes of the whole.
        rest: The matrix without its packed bytes.
    """

    own: Any
    size: int
    rest: NF4

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole matrix."""
        return self.rest.shape

    def whole(self) -> NF4:
        """The matrix; all processes have to ask for it."""
        return replace(self.rest, packed=ranks.gathered(self.own)[: self.size])


def part(matrix: NF4) -> Part | NF4:
    """This process's part of a matrix that it has whole; the matrix itself where there is one process."""
    if ranks.count() == 1:
        return matrix
    size = matrix.packed.numel()
    share = -(size // -ranks.count())
    own = torch.zeros(share, dtype=torch.uint8)
    mine = matrix.packed[ranks.number() * share : (ranks.number() + 1) * share]
    own[: mine.numel()] = mine
    return Part(own, size, replace(matrix, packed=matrix.packed.new_empty(0)))
