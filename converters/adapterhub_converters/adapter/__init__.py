"""The canonical form of an adapter, which every format reads to and writes from."""

from .adapter import (
    FULL,
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
    problems_beyond_deltas,
    factor_pairs,
    with_factored_as_pairs,
    plain_pairs,
    refuse_conditions,
    refuse_differences,
    refuse_tuned,
    without_invocation,
    targets_without_magnitude,
)
from .deltas import MAX_EXPERTS, LowRank, LowRankConv, LowRankEmbedding, StackedLowRank, scaling
from .factored import AdaLora, CpConv, Factored, Hadamard, Kronecker, PooledLowRank, Vera, as_pairs, count_pair_numbers
from .tuned import TUNERS, TunedModule, Tuner, layers_of_classifier, tuner_of

__all__ = [
    "FULL", "MAX_EXPERTS", "TUNERS", "AdaLora", "Adapter", "CpConv", "Delta", "FactorPair", "Factored", "Hadamard",
    "Kronecker", "Loss", "LossReport", "LowRank", "LowRankConv", "LowRankEmbedding", "Meta", "Pair", "PooledLowRank",
    "Rows", "Source", "StackedLowRank", "TensorLoss", "Tuned", "Tuner", "Vera", "as_pairs", "beyond_deltas",
    "factor_pairs", "factored_out", "layers_of_classifier", "pair_numbers", "plain_pairs", "refuse_conditions",
    "refuse_differences", "refuse_tuned", "scaling", "tuner_of", "unconditional", "unmeasured",
]  # fmt: skip
