"""Merge adapters into a base: `fuse`, or `prepare_merge` and then `Merge.write`; `merge_proof.prove` checks a merged model."""

from .fuse import FuseReport, Merge, fuse, prepare_merge
from .loss_estimate import ChangeEstimate
from .merge_options import Options
from .read_base import read_base

__all__ = ["ChangeEstimate", "FuseReport", "Merge", "Options", "fuse", "prepare_merge", "read_base"]
