"""The mean of float32 numbers with torch's every bit, in numpy.

bitsandbytes stores block magnitudes less their mean, and a float32 sum depends on its order. torch on a CPU (2.13,
`aten/src/ATen/native/cpu/SumKernel.cpp`, `cascade_sum`) adds eight lanes side by side, each in four chains, each chain in
blocks of 16 or more whose sums are summed in blocks again, four levels deep; then the numbers that fill no eight, and the
lanes. It is the same with AVX2 and AVX-512, to which torch gives no wider kernel here.

That is the order of one thread. From 32,768 numbers on torch shares them out evenly to its threads and adds up what each
of these found, so that two threads may give a mean up to 2 units in the last place away. One thread is the definition here:
any number of threads below 32,768 numbers (2 million weights in blocks of 64), and OMP_NUM_THREADS=1 above.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32Array = NDArray[np.float32]

_LANES = 8  # float32 numbers in a vector
_CHAINS = 4  # vectors that are added up side by side
_LEAST = 4  # the logarithm of the shortest block


def mean(values: F32Array) -> np.float32:
    """The mean of `values`, flat and not empty."""
    return np.float32(_total(values) / np.float32(values.size))


def _total(values: F32Array) -> np.float32:
    if values.size < _LANES:
        return np.float32(_in_chains(values.reshape(-1, 1))[0])
    whole = values.size // _LANES * _LANES
    lanes = _in_chains(values[:whole].reshape(-1, _LANES))
    return np.float32(_one_by_one(np.concatenate([values[whole:], lanes])))


def _in_chains(vectors: F32Array) -> F32Array:
    """The sum of `(n, width)` over n."""
    count = len(vectors) // _CHAINS
    first, *others = _cascade(vectors[: count * _CHAINS].reshape(count, _CHAINS, vectors.shape[1]))
    return _one_by_one(np.stack([first, *vectors[count * _CHAINS :], *others]))


def _cascade(rows: F32Array) -> F32Array:
    """The sum over rows, in blocks of blocks of blocks; what fills no block is added up on its own on every level."""
    step = 1 << max(_LEAST, (len(rows) - 1).bit_length() // 4)
    rests = []
    for _ in range(3):
        whole = len(rows) // step * step
        rests.append(_one_by_one(rows[whole:]))
        rows = _one_by_one(np.moveaxis(rows[:whole].reshape(-1, step, *rows.shape[1:]), 1, 0))
    return _one_by_one(np.stack([*rests, _one_by_one(rows)]))


def _one_by_one(rows: F32Array) -> F32Array:
    """The sum over the first axis from its first row to its last; zeros where there is none."""
    total: F32Array = np.zeros(rows.shape[1:], np.float32)
    for row in rows:
        total = total + row
    return total
