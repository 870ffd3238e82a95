"""The canonical form that every format reads to and writes from."""

from .adapter import (
    Adapter,
    Delta,
    FactorPair,
    Loss,
    LossReport,
    Meta,
    Pair,
    Rows,
    Source,
    TensorLoss,
    beyond_deltas,
    factor_pairs,
    factored_out,
    plain_pairs,
    refuse_conditions,
    unmeasured,
)
from .deltas import LowRank, LowRankConv, LowRankEmbedding, StackedLowRank, scaling
from .factored import AdaLora, CpConv, Factored, Hadamard, Kronecker, PooledLowRank, Vera

__all__ = [
    "AdaLora", "Adapter", "CpConv", "Delta", "FactorPair", "Factored", "Hadamard", "Kronecker", "Loss",
    "LossReport", "LowRank", "LowRankConv", "LowRankEmbedding", "Meta", "Pair", "PooledLowRank", "Rows", "Source",
    "StackedLowRank", "TensorLoss", "Vera", "beyond_deltas", "factor_pairs", "factored_out", "plain_pairs",
    "refuse_conditions", "scaling", "unmeasured",
]  # fmt: skip
