"""Whether a model sees each document of a row by itself: asked of the model, because its code alone knows.

Positions that begin again tell most attention where a document begins. Recurrent layers, convolutions over tokens, and models
that take no positions read on, and what they learn of one document is then partly another's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from adapterhub.train.data.dataset import IGNORED, Rows
from adapterhub_converters.errors import RefusedError

from .base import Base

_FIRST, _SECOND, _PAIRS = 7, 9, 3  # tokens of the documents that are tried, and how many pairs of them


def shared(rows: Rows) -> bool:
    """Whether in any row something is learned of a document behind the first."""
    behind = np.logical_or.accumulate((rows.positions == 0) & (np.arange(rows.positions.shape[1]) > 0), axis=1)
    return bool((behind & (rows.labels != IGNORED)).any())


def check(base: Base, given: Iterable[Rows | None], where: str) -> None:
    """RefusedError if documents share rows and the model cannot tell them apart."""
    if any(rows is not None and shared(rows) for rows in given) and not separates(base):
        what = f"{type(base.model).__name__} cannot tell apart the documents that share a row"
        raise RefusedError(f"{where}: [data] pack", what, "Set pack = false")


def separates(base: Base) -> bool:
    """Whether a document's first state is the same behind another document and at the start of a row."""
    generator = torch.Generator().manual_seed(0)
    length = _FIRST + _SECOND
    behind = torch.randint(0, len(base.head), (_PAIRS, length), generator=generator)
    alone = torch.cat([behind[:, _FIRST:], behind[:, :_FIRST]], dim=1)
    first, second = torch.arange(_FIRST), torch.arange(_SECOND)
    positions = torch.stack([torch.cat([first, second])] * _PAIRS + [torch.cat([second, first])] * _PAIRS)
    base.model.eval()
    with torch.no_grad():
        device = base.head.device
        states = base.states(torch.cat([behind, alone]).to(device), positions.to(device)).float()
    base.model.train()
    there, here = states[:_PAIRS, _FIRST], states[_PAIRS:, 0]
    # The median: where numbers are rounded, one of them may go to another expert.
    error = float(((there - here).norm(dim=1) / here.norm(dim=1).clamp(min=1e-30)).median())
    return error <= 16 * math.pow(torch.finfo(base.head.dtype).eps, 0.75)
