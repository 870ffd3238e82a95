"""Merge adapters by one of `METHODS`: `combine` into one adapter, `join` for a merge into a base.

combine      the merge, module by module
methods      what is computed
matrices     deltas as matrices; `tiled_matrix`, those too large for one
truncation   to a rank, an energy or a size; `untruncated_merge`, without, for a base
other_parts  biases, norms and whole weights
"""

from .combine import MergeReport, ModuleMerge, Progress, combine, join
from .methods import METHODS

__all__ = ["METHODS", "MergeReport", "ModuleMerge", "Progress", "combine", "join"]
