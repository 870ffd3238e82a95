"""What a format cannot say, said nearly or left out, and only when asked for.

A writer names everything that it refuses. What of it may be approximated or dropped is replaced here, and the writer is
asked again; what is still refused, is. So nothing is lost that the format could have said.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, Kept, Loss, LowRank, LowRankEmbedding, Rows, unmeasured
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.bases.weights import ModelWeights
from adapterhub_converters.errors import RefusedError

KINDS = ("norms", "biases", "weights", "rows", "magnitudes", "copies")
"""Words for what may be dropped, beside names of tensors and modules and patterns like `*.lm_head`."""


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What a conversion may lose.

    Attributes:
        approx: Whether deltas may be replaced by the nearest of low rank.
        drop: Kinds, names and shell patterns of what may be left out.
        rank: The rank of an approximation; None for the delta's own.
    """

    approx: bool = False
    drop: Collection[str] = ()
    rank: int | None = None

    def drops(self, name: str, kind: str) -> bool:
        """Whether the tensor or module `name`, which is of a kind of KINDS or of none, may be left out."""
        return kind in self.drop or any(fnmatch.fnmatchcase(name, word) for word in self.drop if word not in KINDS)


@dataclasses.dataclass(frozen=True)
class Reduced:
    """The adapter with what was refused replaced or gone, what that lost, why some of it could not be, and where it is."""

    adapter: Adapter
    kept: tuple[Kept, ...]
    failed: tuple[str, ...]
    hint: str


def reduced(adapter: Adapter, items: Sequence[str], allowed: Allowed, base: BaseSpec | None) -> Reduced:
    """`adapter` without what a writer refused with `items`, as far as it is `allowed`."""
    names = dict.fromkeys(item.partition(": ")[0] for item in items)
    with ExitStack() as stack:
        weights = stack.enter_context(FloatWeights(base.folder, tied=base.tied)) if base is not None and base.folder else None
        work = _Work(adapter, allowed, weights, base)
        for name in names:
            work.change(name)
    return work.result()


class _Work:
    def __init__(self, adapter: Adapter, allowed: Allowed, weights: FloatWeights | None, base: BaseSpec | None) -> None:
        self._adapter, self._allowed, self._weights, self._base = adapter, allowed, weights, base
        self._deltas, self._replaced, self._rows = dict(adapter.deltas), dict(adapter.replaced), dict(adapter.rows)
        self._copies = dict(adapter.copies)
        self._kept: list[Kept] = []
        self._failed: list[str] = []
        self._would: dict[str, None] = {}

    def result(self) -> Reduced:
        meta = self._adapter.meta
        changed = dataclasses.replace(
            self._adapter,
            deltas=self._deltas,
            replaced=self._replaced,
            rows=self._rows,
            copies=self._copies,
            source=None,
            # A module whose magnitude was given up here is plain; one that came without is not.
            meta=meta if unmeasured(self._adapter) else dataclasses.replace(meta, dora=False),
        )
        return Reduced(changed if self._kept else self._adapter, tuple(self._kept), tuple(self._failed), _hint(self._would))

    def change(self, name: str) -> None:
        try:
            if name in self._deltas:
                self._delta(name, self._deltas[name])
            if name in self._replaced:
                self._parameter(name, self._replaced[name])
            if name in self._rows:
                self._table(name, self._rows[name])
            if name in self._copies:
                self._copy(name)
        except RefusedError as error:
            self._failed.append(f"{error.where or name}: {error.what}")

    def _delta(self, target: str, delta: Delta) -> None:
        if self._allowed.drops(target, ""):
            del self._deltas[target]
            self._drop(f"{target}.lora_A", f"{target}.lora_B")
            return
        if not isinstance(delta, LowRank):
            return
        if delta.bias is not None:
            if self._allowed.drops(f"{target}.lora_B.bias", "biases"):
                delta = dataclasses.replace(delta, bias=None)
                self._drop(f"{target}.lora_B.bias")
            else:
                self._would["--allow-drop biases"] = None
        if delta.magnitude is not None:
            delta = self._dora(target, delta)
        self._deltas[target] = delta

    def _dora(self, target: str, delta: LowRank) -> LowRank:
        if self._allowed.drops(f"{target}.magnitude", "magnitudes"):
            self._drop(f"{target}.magnitude")
            return dataclasses.replace(delta, magnitude=None)
        if not self._allows_approx():
            return delta
        plain, error = low_rank_dora(target, delta, self._need(target), rank=self._allowed.rank)
        note = f"DoRA as a plain delta of rank {plain.r}"
        self._kept += [Kept(f"{target}.{part}", Loss.APPROXIMATED, note, error) for part in ("lora_A", "lora_B", "magnitude")]
        return plain

    def _parameter(self, name: str, value: np.ndarray) -> None:
        kind = "biases" if name.endswith(".bias") else "norms" if value.ndim == 1 else "weights"
        if self._allowed.drops(name, kind):
            del self._replaced[name]
            self._drop(name)
        elif kind != "weights" or value.ndim != 2 or not name.endswith(".weight") or name[: -len(".weight")] in self._deltas:
            self._would[f"--allow-drop {kind}"] = None
        elif self._allows_approx():
            rank = self._allowed.rank or max((delta.r for delta in self._deltas.values()), default=16)
            delta, error = low_rank_weight(name, value, self._need(name), rank=rank)
            self._deltas[name.removesuffix(".weight")] = delta
            del self._replaced[name]
            self._kept.append(Kept(name, Loss.APPROXIMATED, f"a replaced weight as a delta of rank {delta.r}", error))

    def _table(self, target: str, rows: Rows) -> None:
        if self._allowed.drops(target, "rows"):
            del self._rows[target]
            self._drop(f"{target}.rows")
            return
        vocab = self._base.config.get("vocab_size") if self._base else None
        if target in self._deltas or not isinstance(vocab, int) or not all(0 <= number < vocab for number in rows.ids):
            self._would["--allow-drop rows"] = None
            return
        self._deltas[target] = low_rank_rows(target, rows, self._need(target), vocab)
        del self._rows[target]
        note = f"{len(rows.ids)} rows as the difference to the base's, each sum within 2^-23 of its larger part"
        self._kept.append(Kept(f"{target}.rows", Loss.ROUNDED, note, 2.0**-23))

    def _copy(self, name: str) -> None:
        # The writer refuses with the first copy alone; what may be said of one may be said of all.
        for each in list(self._copies):
            if self._allowed.drops(each, "copies"):
                del self._copies[each]
                self._drop(each)
        if name in self._copies:
            self._would["--allow-drop copies"] = None

    def _drop(self, *names: str) -> None:
        self._kept += [Kept(name, Loss.DROPPED, "left out, as allowed") for name in names]

    def _allows_approx(self) -> bool:
        if not self._allowed.approx:
            self._would["--allow-approx"] = None
        return self._allowed.approx

    def _need(self, name: str) -> FloatWeights:
        if self._weights is None:
            self._would["--base with a Hugging Face folder that has the weights"] = None
            raise RefusedError(name, "the base's own weight is needed to say it otherwise")
        return self._weights


def _hint(would: Iterable[str]) -> str:
    words = list(would)
    return f"{' and '.join([', '.join(words[:-1]), words[-1]] if len(words) > 1 else words)} would help" if words else ""


# ---- The best low-rank delta in place of one that a format has no words for, and how far off it is


_EXACT = 512  # rows or columns up to which a whole decomposition is quick
_OVERSAMPLING, _ITERATIONS = 16, 4


class FloatWeights(ModelWeights):
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


def low_rank_dora(target: str, delta: LowRank, weights: FloatWeights, *, rank: int | None = None) -> tuple[LowRank, float]:
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


def low_rank_weight(
    name: str, value: np.ndarray, weights: FloatWeights, *, rank: int
) -> tuple[LowRank | LowRankEmbedding, float]:
    """A delta of rank `rank` in place of the replaced weight `name`, and its relative error."""
    change = value.astype(np.float32) - weights.tensor(name, value.shape)
    dtype = value.dtype if value.dtype in (dtypes.F16, dtypes.BF16) else dtypes.F32
    lora_A, lora_B, error = nearest(change, rank, dtype)
    r = float(len(lora_A))
    if is_embedding(name.removesuffix(".weight")):
        return LowRankEmbedding(np.ascontiguousarray(lora_B.T), np.ascontiguousarray(lora_A.T), r), error
    return LowRank(lora_A, lora_B, r), error


def low_rank_rows(target: str, rows: Rows, weights: FloatWeights, vocab: int) -> LowRank | LowRankEmbedding:
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
