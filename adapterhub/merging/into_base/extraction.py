"""Extract an adapter from a full fine-tune: the best low-rank part of the change of each weight, with its true error.

Randomized subspace iteration (Halko, Martinsson and Tropp, 2011, algorithms 4.4 and 5.1) on `D = W_tuned - W_base`, which is
never held as a whole: every pass reads both weights tile by tile. The reported error is not an estimate: the last pass compares
the adapter as written with `D`. Cost per weight `(m, n)` at rank k: `2 * rounds + 3` passes of `2 m n (k + 16)`
multiplications.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapterhub.analysis.low_rank import basis
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, LowRank, LowRankEmbedding, Meta
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .open_model import FolderModel, Model, as_matrix, is_float, match_names
from .plan_folder import stored_transposed
from .read_base import Folder, read_folder

F32Array = NDArray[np.float32]
F64Array = NDArray[np.float64]

Progress = Callable[[int, int], None]
"""Called with the number of weights done and of all weights."""

_TILE = 1 << 20  # elements
_EXTRA = 16  # directions beyond the rank (Halko et al., section 4.2)
_ROUNDS = 3  # of subspace iteration; the spectrum of a fine-tune falls slowly
_FIRST = 32  # the first rank to try for an energy
_TABLES = ("embed_tokens", "wte", "word_embeddings", "embeddings")
DTYPES = {"F32": dtypes.F32, "F16": dtypes.F16, "BF16": dtypes.BF16}


@dataclass(frozen=True, slots=True)
class WeightExtraction:
    """The result for one weight. Norms are Frobenius.

    Attributes:
        rank: The rank of its delta; None if the adapter omits it, 0 if the adapter replaces it as a whole.
        change: The norm of the change over that of the base's weight; infinite if that is zero.
        error: The norm of the part of the change that the adapter lacks, over that of the change; 1 for an omitted weight.
        reason: Why a weight that changed was omitted, else empty.
    """

    name: str
    rank: int | None
    change: float
    error: float
    reason: str = ""


@dataclass(frozen=True)
class Extraction:
    """The results for all weights that changed, by name.

    Attributes:
        error: The relative error of all changes together, omitted weights included.
        unchanged: The number of weights that training did not change.
    """

    weights: tuple[WeightExtraction, ...]
    error: float
    unchanged: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExtractionOptions:
    """The adapter to make: one of a `rank`, or of the least ranks that keep a share of each change (`energy`).

    Attributes:
        energy: The share of the squared norm to keep.
        limit: The largest rank to use for an energy.
        keep_other_tensors: Keep what a low-rank delta cannot hold (norms, biases, stacked experts) as whole tensors, like
            peft's `modules_to_save`.
        dtype: The type of the factors.
    """

    rank: int | None = None
    energy: float | None = None
    limit: int = 256
    keep_other_tensors: bool = False
    dtype: str = "F32"


def extract(
    base: Path, tuned: Path, options: ExtractionOptions, *, progress: Progress | None = None
) -> tuple[Adapter, Extraction]:
    """Return the adapter that on `base` comes closest to `tuned`, two Hugging Face folders with the same weights in floats.

    Raises:
        RefusedError: `tuned` is not a fine-tune of `base` (another architecture, other shapes or names), or one contains NaN.
    """
    if (options.rank is None) == (options.energy is None):
        raise RefusedError("rank", "either a rank or an energy is needed", "Name one of them")
    with FolderModel(_read_float_folder(base)) as before, FolderModel(_read_float_folder(tuned)) as after:
        tuned_names = _matching_names(before, after)
        run = _ExtractionRun(before, after, tuned_names, options)
        names = sorted(tuned_names)
        for number, name in enumerate(names, 1):
            run.add_weight(name)
            if progress:
                progress(number, len(names))
        return run.adapter(base), run.report()


def _read_float_folder(path: Path) -> Folder:
    """Read a folder whose weights are stored as floats."""
    folder = read_folder(path)
    if folder.method:
        reason = f"the weights are quantized ({folder.method}), and the change in training is smaller than their rounding"
        raise RefusedError(str(path), reason, "Name the model in 16 or 32 bits")
    return folder


def _matching_names(before: FolderModel, after: FolderModel) -> dict[str, str]:
    """Return the fine-tune's name of each of the base's tensors, after checking that shapes and types match."""
    tuned_names = match_names(before.names, after.names)
    missing = before.names - set(tuned_names)
    # A fine-tune may omit the output layer if it is tied to the embedding table.
    heads = {name for name in missing if name.endswith("lm_head.weight") and after.spec.tied}
    if missing - heads:
        first = sorted(missing - heads)[0]
        raise RefusedError(first, f"is in the base and not in {after.location}", "Is it a fine-tune of this base?")
    # Shapes and types of both sides, before any weight is read.
    for name, tuned_name in tuned_names.items():
        if before.shape(name) != after.shape(tuned_name):
            hint = "The vocabulary was resized" if before.shape(name)[1:] == after.shape(tuned_name)[1:] else ""
            raise RefusedError(name, f"{before.shape(name)} in the base, {after.shape(tuned_name)} in {after.location}", hint)
        for model, tensor in ((before, name), (after, tuned_name)):
            if not is_float(model.dtype(tensor)) and "inv_freq" not in tensor:
                raise RefusedError(
                    tensor,
                    f"is {model.dtype(tensor)} in {model.location}, not a type of floats",
                    "Name the model in 16 or 32 bits",
                )
    extra = sorted(after.names - set(tuned_names.values()))
    if extra and not (len(extra) == 1 and extra[0].endswith("lm_head.weight")):
        raise RefusedError(extra[0], f"is in {after.location} and not in the base", "Is it a fine-tune of this base?")
    if extra:
        raise RefusedError(extra[0], "the base has no output layer of its own and the fine-tune has", "Untie the base first")
    return tuned_names


class _ExtractionRun:
    """An extraction in progress, weight by weight."""

    def __init__(
        self, before: FolderModel, after: FolderModel, tuned_names: Mapping[str, str], options: ExtractionOptions
    ) -> None:
        self._before, self._after, self._tuned_names, self._options = before, after, tuned_names, options
        self._deltas: dict[str, Delta] = {}
        self._replaced: dict[str, np.ndarray] = {}
        self._extractions: list[WeightExtraction] = []
        self._total_energy = self._lost_energy = 0.0
        self._unchanged = 0

    def add_weight(self, name: str) -> None:
        """Add the change of one weight to the adapter, or the reason why it is omitted."""
        change = WeightChange(self._before, self._after, name, self._tuned_names[name])
        norm, base = change.norms()
        if not math.isfinite(norm):
            raise RefusedError(name, "contains NaN or infinity, in the base or in the fine-tune")
        if not norm:
            self._unchanged += 1
            return
        share = norm / base if base else math.inf
        reason = self._why_not_low_rank(name)
        if reason and self._options.keep_other_tensors:
            self._replaced[name] = self._tuned_tensor(name)
            self._extractions.append(WeightExtraction(name, 0, share, 0.0))
        elif reason:
            self._extractions.append(WeightExtraction(name, None, share, 1.0, reason))
            self._lost_energy += norm**2
        else:
            error = self._add_low_rank(name, change, norm, share)
            self._lost_energy += (error * norm) ** 2
        self._total_energy += norm**2
        self._before.release(name)
        self._after.release(self._tuned_names[name])

    def _why_not_low_rank(self, name: str) -> str:
        """Return why a weight cannot have a low-rank delta; empty if it can."""
        shape = self._before.shape(name)
        if not name.endswith(".weight"):
            return "not the weight of a module"
        if len(shape) == 1:
            return "a vector"
        return "" if len(shape) == 2 else f"{len(shape)} dimensions"

    def _tuned_tensor(self, name: str) -> np.ndarray:
        """Return a whole tensor of the fine-tune in its own type."""
        tuned_name = self._tuned_names[name]
        shape = self._after.shape(tuned_name)
        rows = self._after.rows(tuned_name, 0, as_matrix(shape)[0])
        return rows.reshape(shape).astype(dtypes.NUMPY[self._after.dtype(tuned_name)])

    def _add_low_rank(self, name: str, change: WeightChange, norm: float, share: float) -> float:
        """Add a low-rank delta of a weight and return its relative error."""
        left, right = leading_factors(change, norm, self._options)
        dtype = DTYPES[self._options.dtype]
        left, right = left.astype(dtype), right.astype(dtype)
        target, r = name.removesuffix(".weight"), len(right)
        if target.rpartition(".")[2] in _TABLES:  # `(vocab, d)`: A looks the token up
            self._deltas[target] = LowRankEmbedding(np.ascontiguousarray(left.T), np.ascontiguousarray(right.T), float(r))
        elif stored_transposed(self._before.spec.model_type, target):
            up, down = np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)
            self._deltas[target] = LowRank(down, up, float(r), transposed_base=True)
        else:
            self._deltas[target] = LowRank(np.ascontiguousarray(right), np.ascontiguousarray(left), float(r))
        # Measure the factors as stored: their rounding to the file's type counts.
        error = change.distance(left.astype(np.float32), right.astype(np.float32)) / norm
        self._extractions.append(WeightExtraction(name, r, share, error))
        return error

    def adapter(self, base: Path) -> Adapter:
        """Return the extracted adapter."""
        if not self._deltas and not self._replaced:
            raise RefusedError(str(base), "the two models are the same in every weight that an adapter can hold")
        spec = self._before.spec
        causal = spec.architecture.endswith(("ForCausalLM", "LMHeadModel"))
        meta = Meta(base_model=spec.repo, task_type="CAUSAL_LM" if causal else None)
        return Adapter(dict(self._deltas), dict(self._replaced), meta=meta)

    def report(self) -> Extraction:
        """Return the results for all weights."""
        error = math.sqrt(self._lost_energy / self._total_energy) if self._total_energy else 0.0
        return Extraction(tuple(self._extractions), error, self._unchanged)


class WeightChange:
    """`W_tuned - W_base` as a float32 matrix that is read in tiles of rows, once for each pass."""

    def __init__(self, before: Model, after: Model, name: str, tuned_name: str) -> None:
        self._before, self._after, self._name, self._tuned_name = before, after, name, tuned_name
        shape = before.shape(name)
        self.shape = as_matrix(shape)
        self._norms: tuple[float, float] | None = None

    def tiles(self) -> Iterator[tuple[slice, F32Array]]:
        """Yield ranges of rows, and those rows of the change."""
        step = max(1, _TILE // self.shape[1])
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            rows = self._after.rows(self._tuned_name, start, stop)
            # Infinity minus infinity is NaN, which is refused by the tensor's name once the norm is known.
            with np.errstate(invalid="ignore"):
                rows -= self._before.rows(self._name, start, stop)
            yield slice(start, stop), rows

    def norms(self) -> tuple[float, float]:
        """Return the norm of the change and that of the base's weight."""
        if self._norms is None:
            change = sum(_square(rows) for _, rows in self.tiles())
            step = max(1, _TILE // self.shape[1])
            starts = range(0, self.shape[0], step)
            base = sum(_square(self._before.rows(self._name, at, min(at + step, self.shape[0]))) for at in starts)
            self._norms = math.sqrt(change), math.sqrt(base)
        return self._norms

    def times(self, right: F32Array) -> F32Array:
        """Return `D @ right`."""
        out = np.empty((self.shape[0], right.shape[1]), np.float32)
        for rows, tile in self.tiles():
            np.matmul(tile, right, out=out[rows])
        return out

    def transposed_times(self, left: F32Array) -> F32Array:
        """Return `D.T @ left`."""
        out = np.zeros((self.shape[1], left.shape[1]), np.float32)
        for rows, tile in self.tiles():
            out += tile.T @ left[rows]
        return out

    def distance(self, left: F32Array, right: F32Array) -> float:
        """Return the norm of `D - left @ right`."""
        return math.sqrt(sum(_square(tile - left[rows] @ right) for rows, tile in self.tiles()))


def leading_factors(change: WeightChange, norm: float, options: ExtractionOptions) -> tuple[F32Array, F32Array]:
    """Return `(m, r)` and `(r, n)` whose product is close to the best of that rank, the singular values split between them.

    For an energy the rank is doubled until it is enough or `options.limit` is reached.
    """
    largest_rank = min(change.shape)
    if options.rank is not None:
        return _split(*_svd(change, min(options.rank, largest_rank)), min(options.rank, largest_rank))
    energy = options.energy or 0.0
    rank = min(_FIRST, largest_rank)
    while True:
        U, S, Vt = _svd(change, rank)
        kept_energy = np.cumsum(S.astype(np.float64) ** 2) / norm**2
        # Singular values come in float32, so a share can be short by their rounding.
        enough_rank = int(np.searchsorted(kept_energy, energy - 1e-7)) + 1
        if enough_rank <= len(S) and (enough_rank <= rank or rank == largest_rank):
            rank = min(enough_rank, options.limit)
            break
        if rank >= min(options.limit, largest_rank):
            rank = min(options.limit, largest_rank)
            break
        rank = min(2 * rank, largest_rank, options.limit)
    return _split(U, S, Vt, rank)


def _split(U: F32Array, S: F32Array, Vt: F32Array, rank: int) -> tuple[F32Array, F32Array]:
    """Return the factors of the first `rank` triplets, each scaled by the root of the singular value."""
    root = np.sqrt(S[:rank])
    return U[:, :rank] * root, root[:, None] * Vt[:rank]


def _svd(change: WeightChange, rank: int) -> tuple[F32Array, F32Array, F32Array]:
    """Return the leading singular triplets, `rank` of them and a few more; deterministic."""
    width = min(rank + _EXTRA, *change.shape)
    V = np.random.default_rng(0).standard_normal((change.shape[1], width), np.float32)
    for _ in range(_ROUNDS):
        V = _orthonormal(change.transposed_times(_orthonormal(change.times(V))))
    images = change.times(V)
    # The SVD of the small Gram matrix, in float64, since squaring takes half of the digits: float32 would leave three.
    vectors, squares, _ = np.linalg.svd(images.T.astype(np.float64) @ images)
    S = np.sqrt(squares)
    # Directions with a negligible singular value are noise: they get a zero vector instead of a division by almost 0.
    scale = np.divide(1, S, out=np.zeros_like(S), where=(1e-7 * S[0] < S))
    U = images @ (vectors * scale).astype(np.float32)
    return U, S.astype(np.float32), (V @ vectors.astype(np.float32)).T


def _orthonormal(block: F32Array) -> F32Array:
    return basis(block.astype(np.float64))[0].astype(np.float32)


def _square(values: np.ndarray) -> float:
    flat = values.reshape(-1)
    return float(np.einsum("i,i", flat, flat, dtype=np.float64)) if flat.size else 0.0


def ranks(weights: Sequence[WeightExtraction]) -> list[int]:
    """Return the distinct ranks, sorted."""
    return sorted({weight.rank for weight in weights if weight.rank})
