"""Merge adapters into a base (`merge_into_base`) or into one adapter (`combine`), with numpy alone."""

from .adapters import METHODS, MergeReport, ModuleMerge, Progress, combine, join
from .into_base import ChangeEstimate, Merge, ModelMergeReport, Options, merge_into_base, prepare_merge, read_base

__all__ = [
    "METHODS",
    "ChangeEstimate",
    "Merge",
    "MergeReport",
    "ModelMergeReport",
    "ModuleMerge",
    "Options",
    "Progress",
    "combine",
    "join",
    "merge_into_base",
    "prepare_merge",
    "read_base",
]
