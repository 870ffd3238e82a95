"""Merge adapters by one of `METHODS`: `combine` into one adapter, `join` for a merge into a base."""

from .combine import MergeReport, ModuleMerge, Progress, combine, join
from .methods import METHODS

__all__ = ["METHODS", "MergeReport", "ModuleMerge", "Progress", "combine", "join"]
