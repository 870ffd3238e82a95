"""Merge adapters into a base (`fuse`) or into one adapter (`combine`), with numpy alone."""

from .adapters import METHODS, Merged, MergeReport, Progress, combine, join
from .into_base import Change, FuseReport, Merge, Options, fuse, prepared, read_base

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
