"""peft's own merges (`LoraModel.add_weighted_adapter`, 0.21), to reproduce its results: on A and B separately, in float32.

A product of merged factors is not the merged product: even the plain sum includes products of one adapter's B with
another's A. The factors are peft's; the result has a scaling of 1, whereas peft leaves `use_rslora` on in the config with
`lora_alpha = r`, which makes an rsLoRA adapter sqrt(r) times too strong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, cast

import numpy as np
from numpy.typing import NDArray

from adapterhub.analysis.low_rank import Factors
from adapterhub.merging.adapters.tiled_matrix import F32Array, TiledMatrix, magnitude_thresholds

from .element_rules import draw_mask, drop, elect_as_peft, trim, weighted_sum
from .elementwise import _drop, _merge_tiles, _trim
from .method_table import Density, OneOf, Random

Sign = Annotated[str, OneOf(("total", "frequency")), "election of signs"]
Merge = Callable[[Sequence[F32Array], Sequence[float]], F32Array]


def peft_linear(terms: Sequence[Factors], weights: Sequence[float], *, scales: Sequence[float]) -> Factors:
    """peft's `linear`: A and B summed separately.

    Formula: B = sum(sqrt|w_i s_i| B_i), A = sum(sign(w_i s_i) sqrt|w_i s_i| A_i), s_i the scaling of the adapter
    Rank: that of the adapters, which must be equal
    Paper: none; peft, `tuners/lora/model.py`, `_generalized_task_arithmetic_weighted_adapter`
    Cost: O((m + n) r)
    """
    return merge_factors(terms, weights, scales, lambda _index, part: part, weighted_sum)


def peft_magnitude_prune(
    terms: Sequence[Factors], weights: Sequence[float], *, density: Density = 0.5, scales: Sequence[float]
) -> Factors:
    """peft's `magnitude_prune`: the small elements of A and B dropped, the rest summed separately.

    Formula: as peft_linear, of A_i and B_i without all but the `density` largest magnitudes of each
    Rank: that of the adapters, which must be equal
    Paper: none; peft, `utils/merge_utils.py`, `magnitude_prune`
    Cost: O((m + n) r)
    """
    return merge_factors(terms, weights, scales, lambda _index, part: _prune(part, density), weighted_sum)


def peft_ties(
    terms: Sequence[Factors],
    weights: Sequence[float],
    *,
    density: Density = 0.2,
    sign: Sign = "total",
    scales: Sequence[float],
) -> Factors:
    """peft's `ties`: trimmed, elected and averaged on A and B separately.

    Formula: as peft_linear, over the factors that have the elected sign, divided by their number; elected by
        sum(A_i) or sum(sign(A_i)), without the weights
    Rank: that of the adapters, which must be equal
    Paper: TIES-Merging (Yadav et al., 2023, arXiv 2306.01708), as in peft, `utils/merge_utils.py`, `ties`
    Cost: O((m + n) r)
    """
    return merge_factors(terms, weights, scales, lambda _index, part: _prune(part, density), election(sign))


def peft_dare_linear(
    terms: Sequence[Factors], weights: Sequence[float], *, density: Density = 0.5, random: Random, scales: Sequence[float]
) -> Factors:
    """peft's `dare_linear`: random elements of A and B dropped, the rest scaled up and summed separately.

    Formula: as peft_linear, of m * A_i / density and m' * B_i / density with random masks
    Rank: that of the adapters, which must be equal
    Paper: Language Models are Super Mario (Yu et al., 2023, arXiv 2311.03099), as in peft, `utils/merge_utils.py`
    Cost: O((m + n) r)
    """
    return merge_factors(terms, weights, scales, masking(seeded_masks(random, density), density), weighted_sum)


def peft_dare_ties(
    terms: Sequence[Factors],
    weights: Sequence[float],
    *,
    density: Density = 0.5,
    sign: Sign = "total",
    random: Random,
    scales: Sequence[float],
) -> Factors:
    """peft's `dare_ties`: random elements of A and B dropped, then elected and averaged separately.

    Formula: as peft_ties, of m * A_i / density and m' * B_i / density with random masks
    Rank: that of the adapters, which must be equal
    Paper: Language Models are Super Mario (Yu et al., 2023, arXiv 2311.03099), as in peft, `utils/merge_utils.py`
    Cost: O((m + n) r)
    """
    return merge_factors(terms, weights, scales, masking(seeded_masks(random, density), density), election(sign))


def peft_ties_svd(
    terms: Sequence[Factors], weights: Sequence[float], *, density: Density = 0.2, sign: Sign = "total"
) -> TiledMatrix:
    """peft's `ties_svd`: TIES on the dense deltas, elected without the weights and divided by the number that agree.

    Formula: sum(w_i x_i) / count over the i with sign(x_i) = sign(sum(x_i)), x_i as in ties
    Rank: the largest among the adapters, unless one is given
    Paper: TIES-Merging (Yadav et al., 2023, arXiv 2306.01708), as in peft, `utils/merge_utils.py`, `ties`
    Cost: O(m n R), in memory a tile
    """
    elect = election(sign)
    return _merge_tiles(terms, _trim(terms, density), lambda parts: elect(parts, weights))


def peft_dare_ties_svd(
    terms: Sequence[Factors], weights: Sequence[float], *, density: Density = 0.5, sign: Sign = "total", random: Random
) -> TiledMatrix:
    """peft's `dare_ties_svd`: DARE on the dense deltas, elected without the weights and divided by the number that agree.

    Formula: as peft_ties_svd, where x_i is m_i * D_i / density with a random mask
    Rank: the largest among the adapters, unless one is given
    Paper: Language Models are Super Mario (Yu et al., 2023, arXiv 2311.03099), as in peft, `utils/merge_utils.py`
    Cost: O(m n R), in memory a tile
    """
    elect = election(sign)
    return _merge_tiles(terms, _drop(density, random), lambda parts: elect(parts, weights))


Masks = Callable[[int, tuple[int, ...]], NDArray[np.bool_]]  # number of the factor (A_1 …, B_1 …) and its shape, to a mask


def seeded_masks(random: Random, density: float) -> Masks:
    """Return random masks."""
    return lambda index, shape: draw_mask(random.generator(index), shape, density)


def masking(masks: Masks, density: float) -> Callable[[int, F32Array], F32Array]:
    """Return a pruning by DARE with given masks."""
    return lambda index, part: drop(part, masks(index, part.shape), density)


def merge_factors(
    terms: Sequence[Factors],
    weights: Sequence[float],
    scales: Sequence[float],
    prune: Callable[[int, F32Array], F32Array],
    merge: Merge,
) -> Factors:
    """Prune and merge A and B separately.

    Args:
        prune: Called with the number of a factor (A_1 …, then B_1 …) and the factor.
    """
    # peft gives each factor the root of the weight, and its sign to A alone, so that their product has the weight.
    effective = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    roots = [math.sqrt(abs(weight)) for weight in effective]
    signed = [math.copysign(root, weight) if weight else root for root, weight in zip(roots, effective, strict=True)]
    right = [prune(index, term.right.astype(np.float32)) for index, term in enumerate(terms)]
    left = [prune(index + len(terms), term.left.astype(np.float32)) for index, term in enumerate(terms)]
    return Factors(merge(left, roots).astype(np.float64), merge(right, signed).astype(np.float64))


def _prune(part: F32Array, density: float) -> F32Array:
    """Zero all but the `density` largest magnitudes of a factor."""
    if density >= 1:
        return part
    # peft's `topk` keeps this many elements of each factor.
    return trim(part, magnitude_thresholds(TiledMatrix(part.shape, part.__getitem__), [int(density * part.size)])[0])


def election(sign: str) -> Merge:
    """Return peft's election, by the sum or by the number of signs."""
    counting = cast(Literal["total", "frequency"], sign)
    return lambda parts, weights: elect_as_peft(parts, weights, counting)
