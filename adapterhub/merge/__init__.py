"""Two things under one verb: adapters into a base (`fuse`), and adapters into an adapter (`combine`); numpy alone."""

from .fuse import Change, FuseReport, fuse

__all__ = ["Change", "FuseReport", "fuse"]
