"""The version of this program, for all that records it."""

__version__ = "0.1.0"
