"""Two things under one verb: adapters into a base (`fuse`), and adapters into an adapter (`combine`); numpy alone."""

from .combine import Merged, MergeReport, Progress, combine
from .fuse import Change, FuseReport, fuse
from .methods import METHODS

__all__ = ["METHODS", "Change", "FuseReport", "MergeReport", "Merged", "Progress", "combine", "fuse"]
