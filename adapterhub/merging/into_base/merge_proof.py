"""Check that a merged model is its base plus its adapters at full strength, tensor by tensor, whatever tool made it.

With the base's tensor `W`, the merged tensor `M` and the adapter's delta `D`, the strength is the least-squares `s` in `M - W =
s D + residual`. It is 1 for a correct merge, `sqrt(r)` or its inverse if rsLoRA was overlooked, and 0 if the tensor was skipped
or a 4-bit grid swallowed the change. Neither base nor adapter explains the residual; in a correct merge it is the rounding to
the merged model's dtype, which is computed rather than guessed.

A tensor that cannot be compared is reported and never passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapterhub.merging.adapter_checks import WeightedAdapters
from adapterhub_converters import dtypes
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .edits import Apply, Edit, Replace, TwoPasses, look_before_change
from .loss_estimate import sources_as_trained
from .merge_options import Options
from .nf4_numpy import ThroughNF4
from .open_model import FolderModel, Model, as_matrix, is_float, match_names, open_like
from .plan_folder import Plan, plan
from .read_base import Folder, read_folder
from .tensor_files import Buffer, OpenFiles, new_buffer
from .tensor_types import Floats

F32Array = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Called with the number of tensors done and of all tensors."""

_TILE = 1 << 20  # elements
_FULL = 0.05  # deviation of a strength from 1 that rounding noise alone can explain
_UNEXPLAINED = 0.1  # of the delta's norm: products in 16 bits, as on a GPU, leave a few hundredths
# Largest error of a weight on a quantization grid, relative to its norm: about twice that of normally distributed numbers.
_GRID_ERROR = {
    "Q8_0": 0.02, "Q6_K": 0.05, "Q5_K": 0.09, "Q5_0": 0.1, "Q5_1": 0.1, "Q4_K": 0.15, "Q4_0": 0.18, "Q4_1": 0.15,
    "nf4": 0.18, "fp4": 0.25,
}  # fmt: skip
_COARSE = 0.45  # the same for grids of two or three bits

GOOD = ("exact", "rounded", "near", "quantized", "untouched")
"""The verdicts that a correct merge can have."""


@dataclass(frozen=True, slots=True)
class Proof:
    """The verdict on one tensor.

    Attributes:
        verdict: `exact` (bit-identical to a merge by this program), `rounded` (equal up to rounding), `near` (full strength, a
            little noise), `quantized` (full strength, on a coarser grid), `untouched` (the base's); or `weaker`, `stronger`,
            `absent`, `other` (unexplained), `changed` (although no adapter changes it), `missing`, `shape` (of another shape),
            `unknown` (not in the base).
        strength: The strength of each adapter that changes the tensor, in their order, relative to the weight that it should be
            merged with; None if there is nothing to measure.
        residual: The norm of the unexplained part over that of all deltas; for an untouched tensor, over that of the tensor.
        note: One line, or empty.
    """

    name: str
    verdict: str
    strength: tuple[float, ...] | None = None
    residual: float | None = None
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether the tensor is correct."""
        return self.verdict in GOOD


@dataclass(frozen=True)
class Proofs:
    """The verdicts on all tensors, by name, and the notes of the plan."""

    tensors: tuple[Proof, ...]
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether every tensor is correct."""
        return all(proof.good for proof in self.tensors)

    def strengths(self) -> tuple[tuple[float, float, float] | None, ...]:
        """Return the least, median and largest strength of each adapter over all tensors; None if not measured."""
        rows = [proof.strength for proof in self.tensors if proof.strength]
        count = max(map(len, rows), default=0)
        columns = [[row[i] for row in rows if i < len(row) and not math.isnan(row[i])] for i in range(count)]
        return tuple((min(c), float(np.median(c)), max(c)) if c else None for c in columns)


def prove(
    adapters: WeightedAdapters,
    base: Path | Folder,
    merged: Path,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Proofs:
    """Compare every tensor of a merged model with base and adapters, merged as `merge_into_base` would.

    Args:
        base: A Hugging Face folder: its path, or the result of `read_folder`.
        merged: A folder or a GGUF file.
        options: Only `as_trained` counts: whether the base was first rounded as it was in training.

    Raises:
        RefusedError: The adapters cannot be merged into this base at all.
        NotFoundError: A file or folder is missing.
    """
    if isinstance(base, Path) and base.is_file():
        reason = "is a file, and the base of a comparison is a Hugging Face folder"
        raise RefusedError(str(base), reason, "Name the folder that it was made of")
    folder = read_folder(base) if isinstance(base, Path) else base
    with folder:
        steps = plan(adapters, folder)
        owners = _owners(adapters, folder, steps)
        training_sources = sources_as_trained(folder, options) if options and options.as_trained else {}
        with (
            FolderModel(folder, steps.added, training_sources) as base_model,
            open_like(merged, folder, steps.added) as merged_model,
        ):
            not_in_gguf = merged_model.absent - set(steps.edits)
            merged_names = match_names(base_model.names, merged_model.names)
            proofs = []
            for number, name in enumerate(sorted(base_model.names - not_in_gguf), 1):
                edits, merged_name = steps.edits.get(name, ()), merged_names.get(name)
                if merged_name is None:
                    proofs.append(_missing_proof(name, base_model, touched=bool(edits)))
                else:
                    proofs.append(
                        _proof(_Task(name, base_model, merged_model, merged_name, edits, owners.get(name, ()), len(adapters)))
                    )
                if progress:
                    progress(number, len(base_model.names))
            extra = sorted(merged_model.names - set(merged_names.values()))
    proofs += [Proof(name, "unknown", note="the base has no such tensor") for name in extra if not _is_derived(name)]
    coverage_note = (
        (f"{len(not_in_gguf)} tensors that no GGUF of a text model contains were not compared",) if not_in_gguf else ()
    )
    return Proofs(tuple(proofs), (*steps.notes, *coverage_note))


def _owners(adapters: WeightedAdapters, folder: Folder, steps: Plan) -> Mapping[str, tuple[int, ...]]:
    """Return, for each tensor, the index of the adapter that each of its edits belongs to.

    Args:
        steps: The plan of all adapters together.
    """
    if len(adapters) == 1:  # a plan may decompose every weight
        return {name: (0,) * len(edits) for name, edits in steps.edits.items()}
    owners: dict[str, list[int]] = {}
    for number, adapter in enumerate(adapters):
        for name, edits in plan([adapter], folder).edits.items():
            owners.setdefault(name, []).extend([number] * len(edits))
    return {name: tuple(numbers) for name, numbers in owners.items()}


def _is_derived(name: str) -> bool:
    """Return whether a converter computes this tensor from the config."""
    return name.startswith("rope_f") or name.endswith(("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias"))


@dataclass(frozen=True, slots=True)
class _Task:
    """The comparison of one tensor.

    Attributes:
        name: Its name in `base`.
        merged_name: Its name in `merged`.
        owners: The index of the adapter that each of the `edits` belongs to, among `count` adapters.
        resized: Whether it is a table that an adapter replaces by one of another size.
    """

    name: str
    base: Model
    merged: Model
    merged_name: str
    edits: Sequence[Edit]
    owners: Sequence[int]
    count: int
    resized: bool = False

    @property
    def dtype(self) -> str:
        return self.merged.dtype(self.merged_name)

    def tiles(self) -> Iterator[tuple[int, F32Array, F32Array]]:
        """Yield the first row of each tile, and the tile's rows in the base and in the merged model."""
        for start, stop in _tiles(self.merged.shape(self.merged_name)):
            merged_rows = self.merged.rows(self.merged_name, start, stop)
            yield start, np.zeros_like(merged_rows) if self.resized else self.base.rows(self.name, start, stop), merged_rows


def _proof(task: _Task) -> Proof:
    """Return the verdict on a tensor that both models have."""
    base_shape, merged_shape = task.base.shape(task.name), task.merged.shape(task.merged_name)
    if base_shape != merged_shape and any(
        isinstance(edit, Replace) and edit.values.shape == merged_shape for edit in task.edits
    ):
        proof = _touched_proof(replace(task, resized=True))
        return replace(proof, note=proof.note or f"{merged_shape}, {base_shape} in the base")
    if base_shape != merged_shape:
        return Proof(task.name, "shape", note=f"{merged_shape} in the merged model, {base_shape} in the base")
    try:
        return _touched_proof(task) if task.edits else _untouched_proof(task)
    finally:
        task.base.release(task.name)
        task.merged.release(task.merged_name)


def _missing_proof(name: str, base: Model, *, touched: bool) -> Proof:
    """Return the verdict on a tensor that the merged model lacks.

    An output layer may be missing if it equals the embedding table bit for bit.
    """
    table = next(
        (candidate for candidate in sorted(base.names) if candidate.endswith(("embed_tokens.weight", "wte.weight"))), None
    )
    if not touched and table and name.endswith("lm_head.weight") and base.shape(table) == base.shape(name):
        tiles = _tiles(base.shape(name))
        if all(np.array_equal(base.rows(name, *tile), base.rows(table, *tile)) for tile in tiles):
            return Proof(name, "untouched", note="the output layer is the embedding table in the merged model")
    return Proof(name, "missing", note="the merged model has no such tensor")


def _tiles(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return row ranges of about a million elements."""
    rows, columns = as_matrix(tuple(shape))
    # An even number of rows, as in a merge: it decides the order of the sums (`product`).
    step = max(2, _TILE // max(1, columns) // 2 * 2)
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _untouched_proof(task: _Task) -> Proof:
    """Return the verdict on a tensor that no adapter changes: the base's, exactly or in the merged model's dtype."""
    name, dtype, squared_error, size, exact = task.name, task.dtype, 0.0, 0.0, True
    shift = np.float32(task.merged.shift(task.merged_name))
    for _, base_rows, merged_rows in task.tiles():
        expected = _round_to(base_rows + shift, dtype) - shift
        equal = np.array_equal(expected, merged_rows, equal_nan=True) or np.array_equal(base_rows, merged_rows, equal_nan=True)
        exact = exact and equal
        squared_error += 0.0 if equal else _square(merged_rows - expected)
        size += _square(base_rows)
    if exact:
        return Proof(name, "untouched")
    residual = math.sqrt(squared_error / size) if size else math.inf
    if not is_float(dtype) and residual <= _GRID_ERROR.get(dtype, _COARSE):
        return Proof(name, "quantized", residual=residual, note=f"{dtype}, {residual:.1%} off")
    return Proof(name, "changed", residual=residual, note=f"{residual:.2g} of its norm, and no adapter changes it")


def _touched_proof(task: _Task) -> Proof:
    """Return the verdict on a tensor that adapters change."""
    stored = dtypes.NUMPY.get(task.base.dtype(task.name), dtypes.F32)
    sums = _Sums([edit.ready(stored) for edit in task.edits], stored, task.dtype)
    if sums.takes_two_passes:
        for start, base_rows, _ in task.tiles():
            sums.look(base_rows, start)
    for start, base_rows, merged_rows in task.tiles():
        sums.add(base_rows, merged_rows, start)
    sums.exact = sums.exact or _is_own_merge_in_nf4(task, sums.replay)
    if not sums.delta:
        unchanged = sums.exact or sums.squared_error <= sums.noise_limit
        return Proof(task.name, "rounded" if unchanged else "other", note="the adapter adds nothing here")
    strength = sums.strengths()
    residual = math.sqrt(max(0.0, sums.squared_residual(strength)) / sums.delta)
    by_adapter = [math.nan] * task.count
    for value, owner in zip(strength, task.owners, strict=True):
        by_adapter[owner] = value
    return Proof(task.name, _verdict(sums, strength, residual, task.dtype), tuple(by_adapter), residual)


class _Sums:
    """Inner products of the deltas and of the actual change, summed tile by tile."""

    def __init__(self, applies: Sequence[Apply], stored: np.dtype, dtype: str) -> None:
        count = len(applies)
        self._applies, self._stored, self._dtype = applies, stored, dtype
        self.gram, self.along = np.zeros((count, count)), np.zeros(count)
        self.change = self.delta = self.squared_error = self.noise = self.weight = 0.0
        self.exact, self.size = True, 0

    @property
    def takes_two_passes(self) -> bool:
        """Whether an edit must see all tiles before it changes any."""
        return any(isinstance(apply, TwoPasses) for apply in self._applies)

    def look(self, base: F32Array, start: int) -> None:
        """Show a tile to an edit that takes two passes; overwrites the tile."""

        def round_tile(tile: F32Array) -> None:
            np.copyto(tile, tile.astype(self._stored), casting="unsafe")

        with np.errstate(all="ignore"):
            look_before_change(self._applies, base, start, np.empty(base.size + base.shape[1], np.float32), round_tile)

    def replay(self, base: F32Array, start: int) -> F32Array:
        """Return a tile merged as `merge_into_base` merges it, rounded after each adapter."""
        replay, scratch = base.copy(), np.empty(base.size + base.shape[1], np.float32)
        with np.errstate(all="ignore"):
            for apply in self._applies:
                apply(replay, start, scratch)
                replay = replay.astype(self._stored).astype(np.float32)
        return replay

    def add(self, base: F32Array, merged: F32Array, start: int) -> None:
        """Add a tile of the base and the same tile of the merged model to the sums."""
        scratch = np.empty(base.size + base.shape[1], np.float32)
        total, replay, deltas = base.copy(), self.replay(base, start), []
        with np.errstate(all="ignore"):
            for apply in self._applies:
                alone = base.copy()
                apply(alone, start, scratch)
                deltas.append((alone - base).astype(np.float64))
                apply(total, start, scratch)
            change = merged.astype(np.float64) - base
            for i, expected_rows in enumerate(deltas):
                self.along[i] += np.vdot(expected_rows, change)
                for j, two in enumerate(deltas[: i + 1]):
                    self.gram[i, j] += np.vdot(expected_rows, two)
                    self.gram[j, i] = self.gram[i, j]
            self.change += _square(change)
            self.delta += _square(np.sum(deltas, axis=0))
            self.weight += _square(base)
            self.size += base.size
            self.squared_error += _square(merged - total)
            self.noise += _square(_round_to(total, self._dtype) - total)
        # Two correct merges: rounded after each adapter, as peft does, or once at the end.
        expected = (_round_to(replay, self._dtype), _round_to(total, self._dtype))
        self.exact = self.exact and any(np.array_equal(expected_rows, merged, equal_nan=True) for expected_rows in expected)

    def strengths(self) -> list[float]:
        """Return the least-squares strengths; the smallest solution if deltas are multiples of each other."""
        solution = np.linalg.lstsq(self.gram, self.along, rcond=1e-10)[0]
        return [float(value) for value in solution]

    def squared_residual(self, strength: Sequence[float]) -> float:
        """Return the squared norm of the change that the deltas at these strengths do not explain."""
        s = np.asarray(strength)
        return float(self.change - 2 * s @ self.along + s @ self.gram @ s)

    @property
    def noise_limit(self) -> float:
        """The largest squared distance that rounding after each merge can leave."""
        return 4 * (len(self.along) + 1) * self.noise + 1e-12 * self.weight


def _verdict(sums: _Sums, strength: Sequence[float], residual: float, dtype: str) -> str:
    """Return the verdict.

    An estimated strength is off by about `residual / sqrt(n)` if the unexplained part is noise.
    """
    if sums.exact:
        return "exact"
    if is_float(dtype) and sums.squared_error <= sums.noise_limit:
        return "rounded"
    # Four standard deviations of the estimate, so that noise alone does not fail a tensor.
    tolerance = 4 * residual / math.sqrt(max(1, sums.size))
    worst = max(strength, key=lambda value: abs(value - 1))
    if not math.isfinite(worst):
        return "other"
    if abs(worst - 1) > _FULL + tolerance:
        return "absent" if abs(worst) < 0.1 + tolerance else "weaker" if worst < 1 else "stronger"
    if is_float(dtype):
        return "near" if residual <= _UNEXPLAINED else "other"
    error = math.sqrt(sums.squared_error / sums.weight) if sums.weight else math.inf
    return "quantized" if error <= _GRID_ERROR.get(dtype, _COARSE) else "other"


@dataclass(frozen=True, eq=False)
class _ReplayedMerge:
    """The merge of a tensor by this program, in the type of floats that was then quantized."""

    task: _Task
    replay: Callable[[F32Array, int], F32Array]
    floats: str

    @property
    def rows(self) -> int:
        return as_matrix(self.task.base.shape(self.task.name))[0]

    @property
    def columns(self) -> int:
        return as_matrix(self.task.base.shape(self.task.name))[1]

    def read(self, opened: OpenFiles, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        rows = self.task.base.rows(self.task.name, start, stop)
        np.copyto(out, _round_to(self.replay(rows, start), self.floats))


def _is_own_merge_in_nf4(task: _Task, replay: Callable[[F32Array, int], F32Array]) -> bool:
    """Return whether a tensor in bitsandbytes' NF4 is this program's merge, quantized, bit for bit."""
    if task.dtype != "nf4" or not isinstance(task.merged, FolderModel):
        return False
    source = ThroughNF4(
        task.name, _ReplayedMerge(task, replay, task.merged.floats(task.merged_name)), Floats("F32", dtypes.F32)
    )
    with OpenFiles() as opened, suppress(RefusedError):  # RefusedError: for a NaN, which is never correct
        for start, stop in _tiles(task.merged.shape(task.merged_name)):
            rows = np.empty((stop - start, source.columns), np.float32)
            source.read(opened, start, stop, rows, new_buffer)
            if not np.array_equal(rows, task.merged.rows(task.merged_name, start, stop)):
                return False
        return True
    return False


def _round_to(values: F32Array, dtype: str) -> F32Array:
    """Return values rounded to `dtype` if it is a type of floats, else unchanged."""
    if not is_float(dtype) or dtype in ("F32", "F64"):
        return values
    with np.errstate(over="ignore"):
        return values.astype(dtypes.NUMPY[dtype]).astype(np.float32)


def _square(values: np.ndarray) -> float:
    """Return the sum of squares."""
    flat = np.ascontiguousarray(values, np.float64).reshape(-1)
    return float(np.vdot(flat, flat))
