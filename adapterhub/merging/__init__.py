"""Merge adapters into a base (`fuse`) or into one adapter (`combine`), with numpy alone."""

from .adapters import METHODS, ModuleMerge, MergeReport, Progress, combine, join
from .into_base import ChangeEstimate, FuseReport, Merge, Options, fuse, prepare_merge, read_base

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
    "join",
    "prepared",
    "read_base",
]
