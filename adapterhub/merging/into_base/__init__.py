"""Merge adapters into a base: `fuse`, or `prepare_merge` and then `Merge.write`; `merge_proof.prove` checks a merged model."""

from .fuse import FuseReport, Merge, fuse, prepare_merge
from .loss_estimate import ChangeEstimate
from .options import Options
from .read_base import read_base

__all__ = ["Change", "FuseReport", "Merge", "Options", "fuse", "prepared", "read_base"]
