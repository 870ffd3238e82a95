"""The methods that merge low-rank matrices: a function each, grouped by idea, and a table of their properties.

method_table  the methods and their properties
sums          the weighted sum; `sphere`, on a sphere; `subspaces`, in the subspace that all adapters span
elementwise   TIES, DARE and others, entry by entry, over `element_rules`
as_peft       the same as peft computes it
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Literal

from adapterhub_converters.errors import ParameterError

from .as_peft import (
    peft_dare_linear,
    peft_dare_ties,
    peft_dare_ties_svd,
    peft_linear,
    peft_magnitude_prune,
    peft_ties,
    peft_ties_svd,
)
from .elementwise import breadcrumbs, dare_linear, dare_ties, della, magnitude_prune, sce, ties
from .method_table import Matrix, Method, Random
from .sphere import karcher, model_stock, nuslerp, slerp
from .subspaces import core_space, iso_c, knots, tsv
from .sums import cat, linear, rerank, svd

__all__ = ["METHODS", "Matrix", "MergeMethod", "Method", "Random", "method_named"]

MergeMethod = Literal[
    "cat", "linear", "svd", "rerank", "slerp", "nuslerp", "karcher", "model_stock", "knots", "core_space", "tsv", "iso_c",
    "ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "sce", "magnitude_prune", "peft_linear", "peft_ties",
    "peft_dare_linear", "peft_dare_ties", "peft_magnitude_prune", "peft_ties_svd", "peft_dare_ties_svd",
]  # fmt: skip
"""The names of `METHODS`."""

_TABLE = (
    Method(cat, keeps="factors", sums=True, cuts=False),
    Method(linear, sums=True),
    Method(svd, keeps="largest", sums=True),
    Method(rerank, count=(1, 1), sums=True),
    Method(slerp, weights="none", count=(2, 2), missing="zeros"),
    Method(nuslerp, weights="shares", count=(2, 2), missing="zeros"),
    Method(karcher, weights="shares", missing="zeros"),
    Method(model_stock, weights="none", count=(2, 1000)),
    Method(knots),
    Method(core_space),
    Method(tsv),
    Method(iso_c),
    Method(ties, keeps="largest"),
    Method(dare_linear, keeps="largest"),
    Method(dare_ties, keeps="largest"),
    Method(della, keeps="largest"),
    Method(breadcrumbs, keeps="largest"),
    Method(sce, keeps="largest", weights="none", missing="zeros"),
    Method(magnitude_prune, keeps="largest"),
    Method(peft_linear, keeps="factors", on_factors=True),
    Method(peft_ties, keeps="factors", on_factors=True),
    Method(peft_dare_linear, keeps="factors", on_factors=True),
    Method(peft_dare_ties, keeps="factors", on_factors=True),
    Method(peft_magnitude_prune, keeps="factors", on_factors=True),
    Method(peft_ties_svd, keeps="largest"),
    Method(peft_dare_ties_svd, keeps="largest"),
)

METHODS: Mapping[str, Method] = {method.name: method for method in _TABLE}


def method_named(name: str) -> Method:
    """Return the method of that name; ParameterError for an unknown one."""
    if name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(name, METHODS, 1)
    reason = f"{name!r} is not one of {', '.join(METHODS)}"
    if close:
        raise ParameterError("method", reason, f"Did you mean {close[0]}?")
    raise ParameterError("method", reason, code="unknown-method")
