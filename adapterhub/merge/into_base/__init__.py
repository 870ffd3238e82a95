"""Adapters into a base: `fuse`, or first `prepared` and then written; what was merged is proven by `proof`."""

from .fuse import Merge, fuse, prepared
from .measure import Change
from .options import FuseReport, Options

__all__ = ["Change", "FuseReport", "Merge", "Options", "fuse", "prepared"]
