"""Two things under one verb: adapters into a base (`fuse`), and adapters into an adapter (`combine`); numpy alone."""

from .adapters import METHODS, Merged, MergeReport, Progress, combine
from .into_base import Change, FuseReport, Merge, Options, fuse, prepared

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
