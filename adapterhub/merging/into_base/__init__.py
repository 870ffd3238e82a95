"""Merge adapters into a base: `fuse`, or `prepared` and then written; `verify.prove` checks a merged model."""

from .fuse import FuseReport, Merge, fuse, prepared
from .loss_estimate import Change
from .options import Options
from .read_base import read_base

__all__ = ["Change", "FuseReport", "Merge", "Options", "fuse", "prepared", "read_base"]
