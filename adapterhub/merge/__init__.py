"""Two things under one verb: adapters into a base (`fuse`), and adapters into an adapter (`combine`); numpy alone."""

from .combine import Merged, MergeReport, Progress, combine
from .fuse import Merge, fuse, prepared
from .measure import Change
from .methods import METHODS
from .options import FuseReport, Options

__all__ = [
    "METHODS",
    "Change",
    "FuseReport",
    "Merge",
    "MergeReport",
    "Merged",
    "Options",
    "Progress",
    "combine",
    "fuse",
    "prepared",
]
