"""The canonical form of an adapter, which every format reads to and writes from.

adapter          `Adapter`, and the report of losses
deltas           what an adapter changes in one module; `factored_deltas`, other than by one pair of factors
tuner            other methods of peft, kept as they are: `peft_tuners`, `sparse_tuners`, `subspace_tuners`
singular_values  the largest of a matrix
"""

from .adapter import (
    BUNDLED,
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
    factor_pairs,
    plain_pairs,
    problems_beyond_deltas,
    refuse_bundled,
    refuse_conditions,
    refuse_differences,
    refuse_tuned,
    targets_without_magnitude,
    with_factored_as_pairs,
    without_invocation,
)
from .deltas import MAX_EXPERTS, LowRank, LowRankConv, LowRankEmbedding, StackedLowRank, scaling
from .factored_deltas import AdaLora, CpConv, Factored, Hadamard, Kronecker, PooledLowRank, Vera, as_pairs, count_pair_numbers
from .peft_tuners import TUNERS, layers_of_classifier, tuner_of
from .tuner import TunedModule, Tuner

__all__ = [
    "BUNDLED",
    "FULL",
    "MAX_EXPERTS",
    "TUNERS",
    "AdaLora",
    "Adapter",
    "CpConv",
    "Delta",
    "FactorPair",
    "Factored",
    "Hadamard",
    "Kronecker",
    "Loss",
    "LossReport",
    "LowRank",
    "LowRankConv",
    "LowRankEmbedding",
    "Meta",
    "Pair",
    "PooledLowRank",
    "Rows",
    "Source",
    "StackedLowRank",
    "TensorLoss",
    "TunedModule",
    "Tuner",
    "Vera",
    "as_pairs",
    "count_pair_numbers",
    "factor_pairs",
    "layers_of_classifier",
    "plain_pairs",
    "problems_beyond_deltas",
    "refuse_bundled",
    "refuse_conditions",
    "refuse_differences",
    "refuse_tuned",
    "scaling",
    "targets_without_magnitude",
    "tuner_of",
    "with_factored_as_pairs",
    "without_invocation",
]  # fmt: skip
