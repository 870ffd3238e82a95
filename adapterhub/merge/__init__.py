"""Two things under one verb: adapters into a base (`fuse`), and adapters into an adapter (`combine`); numpy alone."""

from .combine import Merged, MergeReport, combine
from .fuse import FuseReport, fuse
from .measure import Change
from .methods import METHODS

__all__ = ["METHODS", "Change", "FuseReport", "MergeReport", "Merged", "combine", "fuse"]
