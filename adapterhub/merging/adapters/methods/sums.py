"""The weighted sum, exact or as close as a rank allows."""

from __future__ import annotations

from collections.abc import Sequence

from adapterhub.analysis.low_rank import Factors, stack_terms


def cat(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The weighted sum, exactly, by stacking the factors.

    Formula: sum(w_i D_i), with B = [B_1 …] and A = [w_1 A_1; …]
    Rank: the sum of the ranks
    Paper: LoRA Soups (Prabhakar et al., 2024, arXiv 2410.13025)
    Cost: a copy
    """
    return stack_terms(terms, weights)


def linear(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The weighted sum, exactly, in as few ranks as it has.

    Not peft's `linear`, which weighs A and B apart (`peft_linear`) and so brings in products of one adapter's B with
    another's A. A negative weight subtracts.

    Formula: sum(w_i D_i)
    Rank: that of the sum, unless one is given
    Paper: Editing Models with Task Arithmetic (Ilharco et al., 2022, arXiv 2212.04089)
    Cost: O((m + n) R^2), R the sum of the ranks
    """
    return stack_terms(terms, weights)


def svd(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The closest matrix to the weighted sum of a rank, by default the largest among the adapters.

    No matrix of that rank is closer in the Frobenius norm. The same matrix as peft's `svd`, which decomposes the dense sum.

    Formula: sum of the first k of s_j u_j v_j', where U S V' = sum(w_i D_i)
    Rank: the largest among the adapters, unless one is given
    Paper: The approximation of one matrix by another of lower rank (Eckart & Young, 1936)
    Cost: O((m + n) R^2), R the sum of the ranks
    """
    return stack_terms(terms, weights)


def rerank(terms: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """One adapter in another rank: as few as hold it exactly, or as close as the rank asked for allows.

    Formula: as svd, of w D
    Rank: that of D, unless one is given
    Paper: The approximation of one matrix by another of lower rank (Eckart & Young, 1936)
    Cost: O((m + n) r^2)
    """
    return stack_terms(terms, weights)
