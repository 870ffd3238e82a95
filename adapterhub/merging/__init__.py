"""Merge adapters into a base (`fuse`) or into one adapter (`combine`), with numpy alone."""

from .adapters import METHODS, MergeReport, ModuleMerge, Progress, combine, join
from .into_base import ChangeEstimate, FuseReport, Merge, Options, fuse, prepare_merge, read_base

__all__ = [
    "METHODS",
    "ChangeEstimate",
    "FuseReport",
    "Merge",
    "MergeReport",
    "ModuleMerge",
    "Options",
    "Progress",
    "combine",
    "fuse",
    "join",
    "prepare_merge",
    "read_base",
]
