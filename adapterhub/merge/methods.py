"""The ways to merge low-rank matrices, each one function from weighted terms to factors.

A method gets what one module's adapters add, `terms[i] = scaling_i * lora_B_i @ lora_A_i`, and must be a function of
those matrices alone, never of how they happen to be factored: averaging `lora_A` and `lora_B` apart, as peft's
`linear` does, brings in products of one adapter's B with another's A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from adapterhub.factors import Factors, spectrum, stacked
from adapterhub_converters.errors import UsageError

Method = Callable[[Sequence[Factors], Sequence[float], int | None], Factors]


def cat(terms: Sequence[Factors], weights: Sequence[float], rank: int | None) -> Factors:
    """`sum(w_i D_i)`, exactly, by stacking: `B = [B_1 …]`, `A = [w_1 A_1; …]`.

    Rank: the sum of the ranks. Cost: a copy. Source: peft's `cat`; "LoRA Soups" (arXiv 2410.13025).
    """
    _no_rank("cat", rank)
    return stacked(terms, weights)


def linear(terms: Sequence[Factors], weights: Sequence[float], rank: int | None) -> Factors:
    """`sum(w_i D_i)`, exactly, in as few ranks as the sum has.

    Rank: that of the sum, at most the sum of the ranks and the smaller side. Cost: O((m + n) R^2). Unlike peft's
    `linear`, which weighs A and B apart by sqrt(w) (`tuners/lora/model.py`) and is not this sum.
    """
    _no_rank("linear", rank)
    found = spectrum(stacked(terms, weights))
    return found.truncated(found.rank)


def svd(terms: Sequence[Factors], weights: Sequence[float], rank: int | None) -> Factors:
    """The closest matrix to `sum(w_i D_i)` of rank `rank`, by default the largest rank among the terms.

    No matrix of that rank is closer in the Frobenius norm (Eckart & Young, 1936). Cost: O((m + n) R^2), where peft's
    `svd` decomposes the dense sum; the same matrix up to rounding.
    """
    found = spectrum(stacked(terms, weights))
    return found.truncated(min(rank or max(term.r for term in terms), found.rank))


def _no_rank(method: str, rank: int | None) -> None:
    if rank is not None:
        raise UsageError("rank", f"{method} keeps the sum exactly and takes no rank", "Use svd to choose one")


METHODS: Mapping[str, Method] = {"cat": cat, "linear": linear, "svd": svd}
