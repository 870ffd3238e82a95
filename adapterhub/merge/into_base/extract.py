"""An adapter out of a full fine-tune: of each weight the best low-rank part of what training changed, with its true error.

Randomized subspace iteration (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1) on `D = W_tuned - W_base`, which
is never held as a whole: every pass reads both weights tile by tile. What is reported is not an estimate: the last pass
compares the adapter as it is written with `D`. Cost per weight `(m, n)` at rank k: `2 * rounds + 3` passes of
`2 m n (k + 16)` multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapterhub.analysis.low_rank import basis
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, LowRank, LowRankEmbedding, Meta
from adapterhub_converters.errors import RefusedError

from .open_model import FolderModel, Model, as_matrix, is_float, renamed
from .plan import stored_transposed
from .read_folder import Folder, read_folder

F32Array = NDArray[np.float32]
F64Array = NDArray[np.float64]

Progress = Callable[[int, int], None]
"""Is told weights done and weights in all."""

_TILE = 1 << 20  # elements
_EXTRA = 16  # directions beyond those asked for (Halko et al., section 4.2)
_ROUNDS = 3  # of subspace iteration; the spectrum of a fine-tune falls slowly
_FIRST = 32  # the rank that is tried first where an energy is asked for
_TABLES = ("embed_tokens", "wte", "word_embeddings", "embeddings")
DTYPES = {"F32": dtypes.F32, "F16": dtypes.F16, "BF16": dtypes.BF16}


@dataclass(frozen=True, slots=True)
class Extracted:
    """What became of one weight. Norms are Frobenius.

    Attributes:
        rank: Of the delta in the adapter; None where the weight is not in it, 0 where it is as a whole.
        change: The norm of the change over that of the base's weight; infinite where that is zero.
        error: The norm of what the adapter lacks of the change over that of the change; 1 for one that was left out.
        why: Why a weight that changed was left out, else empty.
    """

    name: str
    rank: int | None
    change: float
    error: float
    why: str = ""


@dataclass(frozen=True)
class Extraction:
    """What was taken out: every weight that changed, by name.

    Attributes:
        error: Of all changes together, with what was left out.
        unchanged: How many weights training did not touch.
    """

    weights: tuple[Extracted, ...]
    error: float
    unchanged: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """What is asked for: a `rank`, or the least ranks that keep this share of the squared norm of each change (`energy`).

    `limit`: the largest rank that an energy may take. `rest`: keep what no low-rank delta holds (norms, biases, stacked
    experts) as whole tensors, as peft's `modules_to_save` does. `dtype`: what the factors are stored in.
    """

    rank: int | None = None
    energy: float | None = None
    limit: int = 256
    rest: bool = False
    dtype: str = "F32"


def extract(base: Path, tuned: Path, wanted: Wanted, *, progress: Progress | None = None) -> tuple[Adapter, Extraction]:
    """The adapter that on `base` comes nearest to `tuned`, two Hugging Face folders with the same weights in floats.

    Raises:
        RefusedError: They are no base and fine-tune of it: another architecture, other shapes, other names; NaN in one.
    """
    if (wanted.rank is None) == (wanted.energy is None):
        raise RefusedError("rank", "a rank or an energy is asked for, not both", "Name one")
    with FolderModel(_in_floats(base)) as before, FolderModel(_in_floats(tuned)) as after:
        called = _matched(before, after)
        run = _Run(before, after, called, wanted)
        names = sorted(called)
        for number, name in enumerate(names, 1):
            run.weight(name)
            if progress:
                progress(number, len(names))
        return run.adapter(base), run.report()


def _in_floats(path: Path) -> Folder:
    folder = read_folder(path, dequantize=True)
    if folder.method:
        what = f"the weights are quantized ({folder.method}), and what training changed is less than their rounding"
        raise RefusedError(str(path), what, "Name the model in 16 or 32 bits")
    return folder


def _matched(before: FolderModel, after: FolderModel) -> dict[str, str]:
    called = renamed(before.names, after.names)
    missing = before.names - set(called)
    heads = {name for name in missing if name.endswith("lm_head.weight") and after.spec.tied}
    if missing - heads:
        first = sorted(missing - heads)[0]
        raise RefusedError(first, f"is in the base and not in {after.where}", "Is it a fine-tune of this base?")
    for name, other in called.items():
        if before.shape(name) != after.shape(other):
            hint = "The vocabulary was resized" if before.shape(name)[1:] == after.shape(other)[1:] else ""
            raise RefusedError(name, f"{before.shape(name)} in the base, {after.shape(other)} in {after.where}", hint)
        for model, one in ((before, name), (after, other)):
            if not is_float(model.dtype(one)) and "inv_freq" not in one:
                raise RefusedError(one, f"{model.dtype(one)} in {model.where}, not floats", "Name the model in 16 or 32 bits")
    extra = sorted(after.names - set(called.values()))
    if extra and not (len(extra) == 1 and extra[0].endswith("lm_head.weight")):
        raise RefusedError(extra[0], f"is in {after.where} and not in the base", "Is it a fine-tune of this base?")
    if extra:
        raise RefusedError(extra[0], "the base has no output layer of its own and the fine-tune has", "Untie the base first")
    return called


class _Run:
    """One extraction: weight by weight."""

    def __init__(self, before: FolderModel, after: FolderModel, called: Mapping[str, str], wanted: Wanted) -> None:
        self._before, self._after, self._called, self._wanted = before, after, called, wanted
        self._deltas: dict[str, Delta] = {}
        self._replaced: dict[str, np.ndarray] = {}
        self._found: list[Extracted] = []
        self._total = self._lost = 0.0
        self._unchanged = 0

    def weight(self, name: str) -> None:
        """Take one weight's change into the adapter, or say why not."""
        change = Change(self._before, self._after, name, self._called[name])
        norm, base = change.norms()
        if not math.isfinite(norm):
            raise RefusedError(name, "NaN or infinity in it, in the base or in the fine-tune")
        if not norm:
            self._unchanged += 1
            return
        share = norm / base if base else math.inf
        why = self._unfit(name)
        if why and self._wanted.rest:
            self._replaced[name] = self._after_whole(name)
            self._found.append(Extracted(name, 0, share, 0.0))
        elif why:
            self._found.append(Extracted(name, None, share, 1.0, why))
            self._lost += norm**2
        else:
            error = self._low_rank(name, change, norm, share)
            self._lost += (error * norm) ** 2
        self._total += norm**2
        self._before.done(name)
        self._after.done(self._called[name])

    def _unfit(self, name: str) -> str:
        shape = self._before.shape(name)
        if not name.endswith(".weight"):
            return "no weight of a module"
        if len(shape) == 1:
            return "a vector"
        return "" if len(shape) == 2 else f"{len(shape)} dimensions"

    def _after_whole(self, name: str) -> np.ndarray:
        other = self._called[name]
        shape = self._after.shape(other)
        rows = self._after.rows(other, 0, as_matrix(shape)[0])
        return rows.reshape(shape).astype(dtypes.NUMPY[self._after.dtype(other)])

    def _low_rank(self, name: str, change: Change, norm: float, share: float) -> float:
        left, right = leading(change, norm, self._wanted)
        dtype = DTYPES[self._wanted.dtype]
        left, right = left.astype(dtype), right.astype(dtype)
        target, r = name.removesuffix(".weight"), len(right)
        if target.rpartition(".")[2] in _TABLES:  # `(vocab, d)`: A looks the token up
            self._deltas[target] = LowRankEmbedding(np.ascontiguousarray(left.T), np.ascontiguousarray(right.T), float(r))
        elif stored_transposed(self._before.spec.model_type, target):
            up, down = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
            self._deltas[target] = LowRank(down, up, float(r), transposed_base=True)
        else:
            self._deltas[target] = LowRank(np.ascontiguousarray(right), np.ascontiguousarray(left), float(r))
        error = change.distance(left.astype(np.float32), right.astype(np.float32)) / norm
        self._found.append(Extracted(name, r, share, error))
        return error

    def adapter(self, base: Path) -> Adapter:
        """What was taken out."""
        if not self._deltas and not self._replaced:
            raise RefusedError(str(base), "the two models are the same in every weight that an adapter can hold")
        repo = self._before.spec.repo
        meta = Meta(base_model=repo, task_type="CAUSAL_LM" if self._causal() else None)
        return Adapter(dict(self._deltas), dict(self._replaced), meta=meta)

    def _causal(self) -> bool:
        return self._before.spec.architecture.endswith(("ForCausalLM", "LMHeadModel"))

    def report(self) -> Extraction:
        """What became of every weight."""
        error = math.sqrt(self._lost / self._total) if self._total else 0.0
        return Extraction(tuple(self._found), error, self._unchanged)


class Change:
    """`W_tuned - W_base` as a matrix of float32 that is read in tiles of rows, pass after pass."""

    def __init__(self, before: Model, after: Model, name: str, other: str) -> None:
        self._before, self._after, self._name, self._other = before, after, name, other
        shape = before.shape(name)
        self.shape = as_matrix(shape)
        self._norms: tuple[float, float] | None = None

    def tiles(self) -> Iterator[tuple[slice, F32Array]]:
        """Rows of it, and which."""
        step = max(1, _TILE // self.shape[1])
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            rows = self._after.rows(self._other, start, stop)
            with np.errstate(invalid="ignore"):
                rows -= self._before.rows(self._name, start, stop)
            yield slice(start, stop), rows

    def norms(self) -> tuple[float, float]:
        """Its norm and that of the base's weight."""
        if self._norms is None:
            change = sum(_square(rows) for _, rows in self.tiles())
            step = max(1, _TILE // self.shape[1])
            starts = range(0, self.shape[0], step)
            base = sum(_square(self._before.rows(self._name, at, min(at + step, self.shape[0]))) for at in starts)
            self._norms = math.sqrt(change), math.sqrt(base)
        return self._norms

    def times(self, right: F32Array) -> F32Array:
        """`D @ right`."""
        out = np.empty((self.shape[0], right.shape[1]), np.float32)
        for rows, tile in self.tiles():
            np.matmul(tile, right, out=out[rows])
        return out

    def across(self, left: F32Array) -> F32Array:
        """`D.T @ left`."""
        out = np.zeros((self.shape[1], left.shape[1]), np.float32)
        for rows, tile in self.tiles():
            out += tile.T @ left[rows]
        return out

    def distance(self, left: F32Array, right: F32Array) -> float:
        """The norm of `D - left @ right`."""
        return math.sqrt(sum(_square(tile - left[rows] @ right) for rows, tile in self.tiles()))


def leading(change: Change, norm: float, wanted: Wanted) -> tuple[F32Array, F32Array]:
    """`(m, r)` and `(r, n)` whose product is near the best of that rank, the singular values shared between them.

    For an energy the rank is doubled until it is reached; RefusedError where `wanted.limit` does not suffice.
    """
    most = min(change.shape)
    if wanted.rank is not None:
        return _split(*_svd(change, min(wanted.rank, most)), min(wanted.rank, most))
    energy = wanted.energy or 0.0
    rank = min(_FIRST, most)
    while True:
        U, S, Vt = _svd(change, rank)
        kept = np.cumsum(S.astype(np.float64) ** 2) / norm**2
        enough = int(np.searchsorted(kept, energy - 1e-7)) + 1
        if enough <= len(S) and (enough <= rank or rank == most):
            rank = min(enough, wanted.limit)
            break
        if rank >= min(wanted.limit, most):
            rank = min(wanted.limit, most)
            break
        rank = min(2 * rank, most, wanted.limit)
    return _split(U, S, Vt, rank)


def _split(U: F32Array, S: F32Array, Vt: F32Array, rank: int) -> tuple[F32Array, F32Array]:
    root = np.sqrt(S[:rank])
    return U[:, :rank] * root, root[:, None] * Vt[:rank]


def _svd(change: Change, rank: int) -> tuple[F32Array, F32Array, F32Array]:
    """The leading singular triplets, `rank` and a few more; the same change gives the same result."""
    width = min(rank + _EXTRA, *change.shape)
    V = np.random.default_rng(0).standard_normal((change.shape[1], width), np.float32)
    for _ in range(_ROUNDS):
        V = _orthonormal(change.across(_orthonormal(change.times(V))))
    images = change.times(V)
    vectors, squares, _ = np.linalg.svd(images.T.astype(np.float64) @ images)
    S = np.sqrt(squares)
    scale = np.divide(1, S, out=np.zeros_like(S), where=(1e-7 * S[0] < S))
    U = images @ (vectors * scale).astype(np.float32)
    return U, S.astype(np.float32), (V @ vectors.astype(np.float32)).T


def _orthonormal(block: F32Array) -> F32Array:
    return basis(block.astype(np.float64))[0].astype(np.float32)


def _square(values: np.ndarray) -> float:
    flat = values.reshape(-1)
    return float(np.einsum("i,i", flat, flat, dtype=np.float64)) if flat.size else 0.0


def ranks(found: Sequence[Extracted]) -> list[int]:
    """The ranks there are, sorted."""
    return sorted({one.rank for one in found if one.rank})
