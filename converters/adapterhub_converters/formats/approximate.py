"""The best low-rank delta in place of one that a format has no words for, and how far off it is.

DoRA rescales every row of the sum (arXiv 2402.09353), a replaced weight is anything at all: as a delta of the base's
weight both are of full rank. The best approximation of rank k is the truncated singular value decomposition (Eckart and
Young 1936); where a matrix is large it is found by projecting on a random subspace (Halko, Martinsson and Tropp,
arXiv 0909.4061, algorithm 4.4). The error is measured on the factors as they will be stored, never estimated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import LowRank, LowRankEmbedding, Rows
from adapterhub_converters.bases.weights import ModelWeights
from adapterhub_converters.errors import RefusedError

_EXACT = 512  # rows or columns up to which a whole decomposition is quick
_OVERSAMPLING, _ITERATIONS = 16, 4


class Weights(ModelWeights):
    """The weights of a base in a Hugging Face folder, each in float32. A context manager."""

    def __init__(self, folder: Path, *, tied: bool) -> None:
        self._tied = tied
        super().__init__(folder)

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The weight in float32; RefusedError when there is none of that shape in floats."""
        found = name if name in self or not (self._tied and name == "lm_head.weight") else "model.embed_tokens.weight"
        if found not in self:
            raise RefusedError(name, f"the base's weight is needed and not in {self.where}", "Name a folder with weights")
        info = self.info(found)
        if info.dtype not in dtypes.FLOATS or info.shape != shape:
            raise RefusedError(name, f"the base's weight is {info.dtype} {info.shape}, not {shape} in floats")
        weight: np.ndarray = self.stored(found).astype(np.float32)
        return weight


def low_rank_dora(target: str, delta: LowRank, weights: Weights, *, rank: int | None = None) -> tuple[LowRank, float]:
    """A plain delta of rank `rank` (as many as it has, unless said) in place of a DoRA one, and its relative error."""
    shape = delta.shape[::-1] if delta.transposed_base else delta.shape
    weight = weights.tensor(f"{target}.weight", shape)
    weight = weight.T if delta.transposed_base else weight
    change = dora_change(weight, delta)
    lora_A, lora_B, error = nearest(change, rank or delta.r, delta.lora_B.dtype)
    return LowRank(lora_A, lora_B, float(len(lora_A)), bias=delta.bias, transposed_base=delta.transposed_base), error


def dora_change(weight: np.ndarray, delta: LowRank) -> np.ndarray:
    """What DoRA adds to a `weight` `(out, in)`: `diag(m / |V|) V - W` with `V = W + scaling * B @ A`, |V| row by row."""
    if delta.magnitude is None:
        raise ValueError("not a DoRA delta")
    V = weight + np.float32(delta.scaling) * (delta.lora_B.astype(np.float32) @ delta.lora_A.astype(np.float32))
    norms = np.sqrt(np.einsum("oi,oi->o", V, V, dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.where(norms > 0, delta.magnitude.reshape(-1).astype(np.float64) / norms, 0.0)
    change: np.ndarray = V * factors.astype(np.float32)[:, None]
    change -= weight
    return change


def low_rank_weight(name: str, value: np.ndarray, weights: Weights, *, rank: int) -> tuple[LowRank | LowRankEmbedding, float]:
    """A delta of rank `rank` in place of the replaced weight `name`, and its relative error."""
    change = value.astype(np.float32) - weights.tensor(name, value.shape)
    dtype = value.dtype if value.dtype in (dtypes.F16, dtypes.BF16) else dtypes.F32
    lora_A, lora_B, error = nearest(change, rank, dtype)
    r = float(len(lora_A))
    if is_embedding(name.removesuffix(".weight")):
        return LowRankEmbedding(np.ascontiguousarray(lora_B.T), np.ascontiguousarray(lora_A.T), r), error
    return LowRank(lora_A, lora_B, r), error


def low_rank_rows(target: str, rows: Rows, weights: Weights, vocab: int) -> LowRank | LowRankEmbedding:
    """The delta that replaces rows of a table: one direction a row, the difference to the base's row, in float32."""
    table = weights.tensor(f"{target}.weight", (vocab, rows.values.shape[1]))
    ids = np.asarray(rows.ids)
    change = rows.values.astype(np.float32) - table[ids]
    hot = np.zeros((len(ids), vocab), np.float32)
    hot[np.arange(len(ids)), ids] = 1
    if is_embedding(target):
        return LowRankEmbedding(hot, np.ascontiguousarray(change.T), float(len(ids)))
    return LowRank(change, np.ascontiguousarray(hot.T), float(len(ids)))


def is_embedding(target: str) -> bool:
    """Whether a module is a table that is looked up, by the names that Hugging Face gives them."""
    return target.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")


def nearest(matrix: np.ndarray, rank: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, float]:
    """`lora_A`, `lora_B` of at most `rank` whose product is nearest to `matrix`, in `dtype`, and the relative error.

    float32 instead where the factors are too large for `dtype`. The same matrix gives the same factors.
    """
    if not np.isfinite(matrix).all():
        raise RefusedError("", "the delta is not finite")
    k = max(1, min(rank, *matrix.shape))
    U, S, Vt = _decomposed(matrix, k)
    root = np.sqrt(S[:k])
    factors = (root[:, None] * Vt[:k], U[:, :k] * root)
    with np.errstate(over="ignore"):
        lora_A, lora_B = (np.ascontiguousarray(factor.astype(dtype)) for factor in factors)
    if not (np.isfinite(lora_A.astype(np.float32)).all() and np.isfinite(lora_B.astype(np.float32)).all()):
        lora_A, lora_B = (np.ascontiguousarray(factor.astype(np.float32)) for factor in factors)
    size = _norm(matrix)
    residual = matrix - lora_B.astype(np.float32) @ lora_A.astype(np.float32)
    return lora_A, lora_B, _norm(residual) / size if size else 0.0


def _decomposed(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if min(matrix.shape) <= max(_EXACT, k + _OVERSAMPLING):
        U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
        return U, S, Vt
    sketch = np.random.default_rng(0).standard_normal((matrix.shape[1], k + _OVERSAMPLING), np.float32)
    Q = np.linalg.qr(matrix @ sketch)[0]
    for _ in range(_ITERATIONS):
        Q = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ Q)[0])[0]
    U, S, Vt = np.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ U, S, Vt


def _norm(matrix: np.ndarray) -> float:
    return float(np.sqrt(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64)))
