"""The tiny base of the tests of training."""

from tests.training.conftest import tiny_base

__all__ = ["tiny_base"]
