"""Approximation and omission of what a format cannot express, where the caller allows it.

A writer names everything it refuses. Whatever may be approximated or dropped is replaced here, and the writer is called again;
what it still refuses is an error. So nothing that the format can express is lost.

DoRA rescales every row of the sum (arXiv 2402.09353), and a replaced weight is arbitrary: as deltas of the base's weight,
both have full rank. The best approximation of rank k is the truncated singular value decomposition (Eckart and Young 1936);
for large matrices it is found by projection onto a random subspace (Halko, Martinsson and Tropp, arXiv 0909.4061,
algorithm 4.4). The error is measured on the factors as they will be stored, never estimated.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import (
    BUNDLED,
    Adapter,
    Delta,
    Loss,
    LowRank,
    LowRankEmbedding,
    Rows,
    TensorLoss,
    targets_without_magnitude,
)
from adapterhub_converters.errors import NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

    from .base_weights import BaseWeights

KINDS = ("norms", "biases", "weights", "rows", "magnitudes", "copies", "embeddings")
"""The kinds of tensors that may be dropped. Names of tensors and modules, and patterns like `*.lm_head`, work as well."""
_EXACT = 512  # rows or columns up to which a full decomposition is quick
# Extra columns of the random projection, and its power iterations.
_OVERSAMPLING, _ITERATIONS = 16, 4


@dataclass(frozen=True)
class LossAllowance:
    """The losses that a conversion may cause.

    Attributes:
        approx: Whether deltas may be replaced by the nearest ones of low rank.
        drop: Kinds (`KINDS`), names and shell patterns of what may be dropped.
        rank: The rank of an approximation; None for the delta's own.
    """

    approx: bool = False
    drop: Collection[str] = ()
    rank: int | None = None

    def drops(self, name: str, kind: str) -> bool:
        """Return whether the tensor or module `name` may be dropped; `kind` is one of `KINDS`, or empty if none applies."""
        return kind in self.drop or any(fnmatch.fnmatchcase(name, word) for word in self.drop if word not in KINDS)


@dataclass(frozen=True)
class ReducedAdapter:
    """An adapter without the parts that a writer refused, as far as the loss was allowed.

    Attributes:
        adapter: The adapter with the refused parts replaced or removed; the original one if nothing could be changed.
        losses: The losses of the replaced and removed tensors.
        failed: Reasons why parts could not be replaced.
        options: What must be allowed or given for the remaining parts: `approx`, `drop KIND`, `weights` (the base's).
    """

    adapter: Adapter
    losses: tuple[TensorLoss, ...]
    failed: tuple[str, ...]
    options: tuple[str, ...]


def hint(options: Sequence[str]) -> str:
    """Return the `options` of a `ReducedAdapter` as a sentence."""
    phrases = {"approx": "approximation", "weights": "the base's weights, in a Hugging Face folder,"}
    words = [phrases.get(option, option.replace("drop", "dropping", 1)) for option in options]
    text = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    return f"{text[0].upper()}{text[1:]} would help"


def reduce_adapter(adapter: Adapter, items: Sequence[str], allowed: LossAllowance, base: BaseSpec | None) -> ReducedAdapter:
    """Return `adapter` without the parts that a writer refused.

    Args:
        adapter: The adapter given to the writer.
        items: The writer's reasons, each beginning with the name of a tensor or module and a colon.
        allowed: What may be lost.
        base: The base. Its weights are read for approximations and replaced rows, one at a time in float32.
    """
    with ExitStack() as stack:
        reduction = _Reduction(adapter, allowed, base, stack)
        for name in dict.fromkeys(item.partition(": ")[0] for item in items):
            reduction.change(name)
    return reduction.result()


class _Reduction:
    def __init__(self, adapter: Adapter, allowed: LossAllowance, base: BaseSpec | None, stack: ExitStack) -> None:
        self._adapter, self._allowed, self._base, self._stack = adapter, allowed, base, stack
        self._deltas, self._replaced, self._rows = dict(adapter.deltas), dict(adapter.replaced), dict(adapter.rows)
        self._copies, self._added = dict(adapter.copies), dict(adapter.added)
        self._losses: list[TensorLoss] = []
        self._failed: list[str] = []
        self._options: dict[str, None] = {}
        self._weights: BaseWeights | None = None

    def result(self) -> ReducedAdapter:
        meta = self._adapter.meta
        changed = dataclasses.replace(
            self._adapter,
            deltas=self._deltas,
            replaced=self._replaced,
            rows=self._rows,
            copies=self._copies,
            added=self._added,
            source=None,
            # A module whose magnitude was dropped here is plain; one that came without a magnitude is not.
            meta=meta if targets_without_magnitude(self._adapter) else dataclasses.replace(meta, dora=False),
        )
        adapter = changed if self._losses else self._adapter
        return ReducedAdapter(adapter, tuple(self._losses), tuple(self._failed), tuple(self._options))

    def change(self, name: str) -> None:
        try:
            if name in self._deltas:
                self._reduce_delta(name, self._deltas[name])
            if name in self._replaced:
                self._reduce_parameter(name, self._replaced[name])
            if name in self._rows:
                self._reduce_rows(name, self._rows[name])
            if name in self._copies:
                self._drop_copies(name)
            if name in self._added:
                self._drop_difference(name)
        except RefusedError as error:
            self._failed.append(f"{error.where or name}: {error.what}")

    def _reduce_delta(self, target: str, delta: Delta) -> None:
        if self._allowed.drops(target, ""):
            del self._deltas[target]
            self._record_dropped(f"{target}.lora_A", f"{target}.lora_B")
            return
        if not isinstance(delta, LowRank):
            return
        if delta.bias is not None:
            if self._allowed.drops(f"{target}.lora_B.bias", "biases"):
                delta = dataclasses.replace(delta, bias=None)
                self._record_dropped(f"{target}.lora_B.bias")
            else:
                self._options["drop biases"] = None
        if delta.magnitude is not None:
            delta = self._reduce_dora(target, delta)
        self._deltas[target] = delta

    def _reduce_dora(self, target: str, delta: LowRank) -> LowRank:
        if self._allowed.drops(f"{target}.magnitude", "magnitudes"):
            self._record_dropped(f"{target}.magnitude")
            return dataclasses.replace(delta, magnitude=None)
        if not self._may_approximate():
            return delta
        shape = delta.shape[::-1] if delta.transposed_base else delta.shape
        plain, error = low_rank_dora(delta, self._base_weight(f"{target}.weight", shape), rank=self._allowed.rank)
        note = f"DoRA as a plain delta of rank {plain.r}"
        self._losses += [
            TensorLoss(f"{target}.{part}", Loss.APPROXIMATED, note, error) for part in ("lora_A", "lora_B", "magnitude")
        ]
        return plain

    def _reduce_parameter(self, name: str, value: np.ndarray) -> None:
        kind = "biases" if name.endswith(".bias") else "norms" if value.ndim == 1 else "weights"
        kind = "embeddings" if name.startswith(BUNDLED) else kind
        target = name.removesuffix(".weight")
        if self._allowed.drops(name, kind):
            del self._replaced[name]
            self._record_dropped(name)
        elif kind != "weights" or value.ndim != 2 or target == name or target in self._deltas:
            self._options[f"drop {kind}"] = None
        elif self._may_approximate():
            rank = self._allowed.rank or max((delta.r for delta in self._deltas.values()), default=16)
            delta, error = low_rank_weight(target, value, self._base_weight(name, value.shape), rank=rank)
            self._deltas[target] = delta
            del self._replaced[name]
            self._losses.append(TensorLoss(name, Loss.APPROXIMATED, f"a replaced weight as a delta of rank {delta.r}", error))

    def _reduce_rows(self, target: str, rows: Rows) -> None:
        if self._allowed.drops(target, "rows"):
            del self._rows[target]
            self._record_dropped(f"{target}.rows")
            return
        # Without a valid vocabulary size, the rows cannot be addressed, and only dropping them remains.
        vocab = self._base.config.get("vocab_size") if self._base else None
        if target in self._deltas or not isinstance(vocab, int) or not all(0 <= number < vocab for number in rows.ids):
            self._options["drop rows"] = None
            return
        self._deltas[target] = low_rank_rows(target, rows, self._base_weight(f"{target}.weight", (vocab, rows.values.shape[1])))
        del self._rows[target]
        note = f"{len(rows.ids)} rows as the difference to the base's, each sum within 2^-23 of its larger part"
        self._losses.append(TensorLoss(f"{target}.rows", Loss.ROUNDED, note, 2.0**-23))

    def _drop_copies(self, name: str) -> None:
        # The writer refuses with the first copy alone; permission for one applies to all.
        for copy_name in list(self._copies):
            if self._allowed.drops(copy_name, "copies"):
                del self._copies[copy_name]
                self._record_dropped(copy_name)
        if name in self._copies:
            self._options["drop copies"] = None

    def _drop_difference(self, name: str) -> None:
        weight = self._adapter.added.get(f"{name.rpartition('.')[0]}.weight")
        # The bias of a normalization layer is dropped with its weight, as one kind.
        norm = weight is not None and weight.ndim == 1
        kind = "norms" if norm else "biases" if name.endswith(".bias") else "weights"
        if self._allowed.drops(name, kind):
            del self._added[name]
            self._record_dropped(name)
        else:
            self._options[f"drop {kind}"] = None

    def _record_dropped(self, *names: str) -> None:
        self._losses += [TensorLoss(name, Loss.DROPPED, "left out, as allowed") for name in names]

    def _may_approximate(self) -> bool:
        if not self._allowed.approx:
            self._options["approx"] = None
        return self._allowed.approx

    def _base_weight(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Return the base's weight `name` in float32; RefusedError if it is not available or has another shape."""
        if self._base is None or self._base.folder is None:
            self._options["weights"] = None
            raise RefusedError(name, "the base's own weight is needed to approximate it")
        if self._weights is None:
            from .base_weights import BaseWeights  # late: it imports the tables of architectures

            try:
                self._weights = self._stack.enter_context(BaseWeights(self._base.folder))
            except NotFoundError as error:
                raise RefusedError(name, f"the base's own weight is needed, and there is none in {error.where}") from error
        weight = self._weights.tensor(name)
        if weight.shape != shape:
            raise RefusedError(name, f"the base's weight is {weight.shape}, not {shape}")
        result: np.ndarray = weight.astype(np.float32)
        return result


# ---- Approximations


def low_rank_dora(delta: LowRank, weight: np.ndarray, *, rank: int | None = None) -> tuple[LowRank, float]:
    """Return a plain delta that approximates a DoRA delta, and its relative error.

    Args:
        delta: A delta with a magnitude.
        weight: The base's weight in float32, as stored: `(in, out)` if the base stores it transposed.
        rank: The rank of the result; None for the delta's own.
    """
    change = dora_change(weight.T if delta.transposed_base else weight, delta)
    lora_A, lora_B, error = nearest(change, rank or delta.r, delta.lora_B.dtype)
    return LowRank(lora_A, lora_B, float(len(lora_A)), bias=delta.bias, transposed_base=delta.transposed_base), error


def dora_change(weight: np.ndarray, delta: LowRank) -> np.ndarray:
    """Return what DoRA adds to a `weight` `(out, in)`: `diag(m / |V|) V - W` with `V = W + scaling * B @ A`, |V| per row."""
    if delta.magnitude is None:
        raise ValueError("not a DoRA delta")
    V = weight + np.float32(delta.scaling) * (delta.lora_B.astype(np.float32) @ delta.lora_A.astype(np.float32))
    # Summed in float64: a row may have many thousands of elements.
    norms = np.sqrt(np.einsum("oi,oi->o", V, V, dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = np.where(norms > 0, delta.magnitude.reshape(-1).astype(np.float64) / norms, 0.0)
    change: np.ndarray = V * factors.astype(np.float32)[:, None]
    change -= weight
    return change


def low_rank_weight(
    target: str, value: np.ndarray, weight: np.ndarray, *, rank: int
) -> tuple[LowRank | LowRankEmbedding, float]:
    """Return a delta of rank `rank` that approximates the replaced weight `value` of `target`, and its relative error."""
    dtype = value.dtype if value.dtype in (dtypes.F16, dtypes.BF16) else dtypes.F32
    lora_A, lora_B, error = nearest(value.astype(np.float32) - weight, rank, dtype)
    r = float(len(lora_A))
    if is_embedding(target):
        return LowRankEmbedding(np.ascontiguousarray(lora_B.T), np.ascontiguousarray(lora_A.T), r), error
    return LowRank(lora_A, lora_B, r), error


def low_rank_rows(target: str, rows: Rows, weight: np.ndarray) -> LowRank | LowRankEmbedding:
    """Return the delta that replaces rows of the table `weight` `(vocab, d)`.

    Each row takes one direction of the delta, which holds its difference in float32.
    """
    ids = np.asarray(rows.ids)
    change = rows.values.astype(np.float32) - weight[ids]
    hot = np.zeros((len(ids), len(weight)), np.float32)
    hot[np.arange(len(ids)), ids] = 1
    if is_embedding(target):
        return LowRankEmbedding(hot, np.ascontiguousarray(change.T), float(len(ids)))
    return LowRank(change, np.ascontiguousarray(hot.T), float(len(ids)))


def is_embedding(target: str) -> bool:
    """Return whether a module is an embedding table, judging by the names that Hugging Face's models use."""
    return target.rpartition(".")[2] in ("embed_tokens", "wte", "word_embeddings", "tok_embeddings")


def nearest(matrix: np.ndarray, rank: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, float]:
    """Return `lora_A` and `lora_B` of at most `rank` whose product is nearest to `matrix`, in `dtype`, and the relative error.

    The factors are in float32 if they are too large for `dtype`. The same matrix always gives the same factors.
    """
    if not np.isfinite(matrix).all():
        raise RefusedError("", "the delta is not finite", code="non-finite")
    # A rank above either dimension would only add zeros.
    k = max(1, min(rank, *matrix.shape))
    U, S, Vt = _truncated_svd(matrix, k)
    # Each factor gets the square root of the singular values, so that neither is needlessly large.
    root = np.sqrt(S[:k])
    factors = (root[:, None] * Vt[:k], U[:, :k] * root)
    with np.errstate(over="ignore"):
        lora_A, lora_B = (np.ascontiguousarray(factor.astype(dtype)) for factor in factors)
    # 16-bit factors may overflow although their product would not.
    if not (np.isfinite(lora_A.astype(np.float32)).all() and np.isfinite(lora_B.astype(np.float32)).all()):
        lora_A, lora_B = (np.ascontiguousarray(factor.astype(np.float32)) for factor in factors)
    size = _frobenius_norm(matrix)
    residual = matrix - lora_B.astype(np.float32) @ lora_A.astype(np.float32)
    return lora_A, lora_B, _frobenius_norm(residual) / size if size else 0.0


def _truncated_svd(matrix: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if min(matrix.shape) <= max(_EXACT, k + _OVERSAMPLING):
        U, S, Vt = np.linalg.svd(matrix, full_matrices=False)
        return U, S, Vt
    # A fixed seed: the same matrix must give the same bytes.
    sketch = np.random.default_rng(0).standard_normal((matrix.shape[1], k + _OVERSAMPLING), np.float32)
    Q = np.linalg.qr(matrix @ sketch)[0]
    for _ in range(_ITERATIONS):
        Q = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ Q)[0])[0]
    U, S, Vt = np.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ U, S, Vt


def _frobenius_norm(matrix: np.ndarray) -> float:
    return float(np.sqrt(np.einsum("ij,ij->", matrix, matrix, dtype=np.float64)))
