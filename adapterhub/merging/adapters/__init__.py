"""Merge adapters into one adapter: `combine` by one of `METHODS`."""

from .combine import Merged, MergeReport, Progress, combine
from .methods import METHODS

__all__ = ["METHODS", "MergeReport", "Merged", "Progress", "combine"]
