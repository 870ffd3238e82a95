"""Whether a merged model, by whatever tool, is its base plus an adapter, at the strength that it claims; tensor by tensor.

With the base's tensor `W`, the merged one's `M` and what the adapter adds `D`, the strength is the least-squares `s` in
`M - W = s D + rest`. It is 1 where the adapter is in as it should be, `sqrt(r)` or its inverse where rsLoRA was
overlooked, 0 where the tensor was passed over or a grid of four bits swallowed it. `rest` is what neither base nor adapter
explains: the rounding to the merged model's dtype, if it is right, which is computed and not guessed.

What could not be compared is a finding, never a pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapterhub.merge.checks import Weighted
from adapterhub_converters import dtypes
from adapterhub_converters.errors import RefusedError

from .edits import Edit, Replace
from .loss_estimate import as_trained
from .nf4 import ThroughNF4
from .open_model import FolderModel, Model, as_matrix, is_float, open_like, renamed
from .options import Options
from .plan import Plan, plan
from .read_folder import Folder, read_folder
from .strengths import COARSE, GRID, Sums, judged, rounded, square
from .tensor_io import Buffer, Floats, Opened

F32Array = NDArray[np.float32]
Progress = Callable[[int, int], None]
"""Is told tensors done and tensors in all."""

_TILE = 1 << 20  # elements

GOOD = ("exact", "rounded", "near", "quantized", "untouched")
"""The verdicts with which a merged model passes."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found of one tensor.

    Attributes:
        verdict: `exact` (our own merge, bit for bit), `rounded` (nothing but rounding lies between), `near` (the right
            strength, a little noise), `quantized` (the right strength, through a coarser grid), `untouched` (as the base's);
            or `weaker`, `stronger`, `absent`, `other` (something else is in it), `changed` (though no adapter touches it),
            `missing`, `shape`, `unknown` (a tensor that the base has not).
        strength: Of each adapter that touches it, in their order, relative to the weight it was to be merged with; None
            where nothing was to be measured.
        rest: The norm of what is not explained over that of all deltas; for an untouched tensor over the tensor's.
        note: One line, perhaps empty.
    """

    name: str
    verdict: str
    strength: tuple[float, ...] | None = None
    rest: float | None = None
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether it is as it should be."""
        return self.verdict in GOOD


@dataclass(frozen=True)
class Proofs:
    """Of all tensors, by name; `notes` are those of the plan."""

    tensors: tuple[Proof, ...]
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether every tensor is."""
        return all(proof.good for proof in self.tensors)

    def strengths(self) -> tuple[tuple[float, float, float] | None, ...]:
        """By adapter its least, median and largest strength in any tensor; None for one that was measured nowhere."""
        found = [proof.strength for proof in self.tensors if proof.strength]
        columns = [
            [row[i] for row in found if i < len(row) and not math.isnan(row[i])] for i in range(max(map(len, found), default=0))
        ]
        return tuple((min(c), float(np.median(c)), max(c)) if c else None for c in columns)


def prove(
    adapters: Weighted, base: Path, merged: Path, *, options: Options | None = None, progress: Progress | None = None
) -> Proofs:
    """Compare every tensor of a merged model, a folder or a .gguf, with base and adapters, as `fuse` would merge them.

    Of the `options` counts whether the base is to be taken as training saw it.

    Raises:
        RefusedError: The adapters could not be merged into this base at all.
        NotFoundError: Something is not there.
    """
    if base.is_file():
        raise RefusedError(
            str(base), "is a file, and a base is compared as a Hugging Face folder", "Name the one it was made of"
        )
    folder = read_folder(base, dequantize=True)
    steps = plan(adapters, folder)
    owners = _owners(adapters, folder, steps)
    seen = as_trained(folder, options) if options and options.as_trained else {}
    with FolderModel(folder, steps.added, seen) as have, open_like(merged, folder, steps.added) as made:
        called = renamed(have.names, made.names)
        found = []
        for number, name in enumerate(sorted(have.names), 1):
            edits, other = steps.edits.get(name, ()), called.get(name)
            if other is None:
                found.append(_lacking(name, have, touched=bool(edits)))
            else:
                found.append(_prove(_Task(name, have, made, other, edits, owners.get(name, ()), len(adapters))))
            if progress:
                progress(number, len(have.names))
        extra = made.names - set(called.values())
        found += [Proof(name, "unknown", note="the base has no such tensor") for name in sorted(extra) if not _is_derived(name)]
    return Proofs(tuple(found), steps.notes)


def _owners(adapters: Weighted, folder: Folder, steps: Plan) -> Mapping[str, tuple[int, ...]]:
    """Of each tensor which adapters its edits are of, in their order; `steps` are those of all together."""
    if len(adapters) == 1:  # a plan may take a decomposition of every weight
        return {name: (0,) * len(edits) for name, edits in steps.edits.items()}
    found: dict[str, list[int]] = {}
    for number, one in enumerate(adapters):
        for name, edits in plan([one], folder).edits.items():
            found.setdefault(name, []).extend([number] * len(edits))
    return {name: tuple(numbers) for name, numbers in found.items()}


def _is_derived(name: str) -> bool:
    """Tensors that a converter computes from the config."""
    return name.startswith("rope_f") or name.endswith(("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias"))


@dataclass(frozen=True, slots=True)
class _Task:
    """One tensor: what the base and the merged model call it, and what is to be done to it, by which adapters of how many."""

    name: str
    have: Model
    made: Model
    other: str
    edits: Sequence[Edit]
    owners: Sequence[int]
    count: int
    resized: bool = False  # a table of another size than the base's, which an adapter brings whole

    @property
    def dtype(self) -> str:
        return self.made.dtype(self.other)

    def tiles(self) -> Iterator[tuple[int, F32Array, F32Array]]:
        for start, stop in _tiles(self.made.shape(self.other)):
            made = self.made.rows(self.other, start, stop)
            yield start, np.zeros_like(made) if self.resized else self.have.rows(self.name, start, stop), made


def _prove(task: _Task) -> Proof:
    have, made = task.have.shape(task.name), task.made.shape(task.other)
    if have != made and any(isinstance(edit, Replace) and edit.values.shape == made for edit in task.edits):
        found = _touched(replace(task, resized=True))
        return replace(found, note=found.note or f"{made}, {have} in the base")
    if have != made:
        return Proof(task.name, "shape", note=f"{made} in the merged model, {have} in the base")
    try:
        return _touched(task) if task.edits else _untouched(task)
    finally:
        task.have.done(task.name)
        task.made.done(task.other)


def _lacking(name: str, have: Model, *, touched: bool) -> Proof:
    """A tensor that the merged model lacks, which may be the base's table, bit for bit."""
    table = next((other for other in sorted(have.names) if other.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if not touched and table and name.endswith("lm_head.weight") and have.shape(table) == have.shape(name):
        tiles = _tiles(have.shape(name))
        if all(np.array_equal(have.rows(name, *tile), have.rows(table, *tile)) for tile in tiles):
            return Proof(name, "untouched", note="the output layer is the embedding table there")
    return Proof(name, "missing", note="the merged model has no such tensor")


def _tiles(shape: Sequence[int]) -> list[tuple[int, int]]:
    rows, columns = as_matrix(tuple(shape))
    step = max(2, _TILE // max(1, columns) // 2 * 2)
    return [(start, min(start + step, rows)) for start in range(0, rows, max(1, step))]


def _untouched(task: _Task) -> Proof:
    """Equal, or the base's numbers in the merged model's dtype."""
    name, dtype, off, size, exact = task.name, task.dtype, 0.0, 0.0, True
    shift = np.float32(task.made.shift(task.other))
    for _, one, two in task.tiles():
        expected = rounded(one + shift, dtype) - shift
        same = np.array_equal(expected, two, equal_nan=True) or np.array_equal(one, two, equal_nan=True)
        exact = exact and same
        off += 0.0 if same else square(two - expected)
        size += square(one)
    if exact:
        return Proof(name, "untouched")
    rest = math.sqrt(off / size) if size else math.inf
    if not is_float(dtype) and rest <= GRID.get(dtype, COARSE):
        return Proof(name, "quantized", rest=rest, note=f"{dtype}, {rest:.1%} off")
    return Proof(name, "changed", rest=rest, note=f"{rest:.2g} of its norm, and no adapter touches it")


def _touched(task: _Task) -> Proof:
    stored = dtypes.NUMPY.get(task.have.dtype(task.name), dtypes.F32)
    sums = Sums([edit.ready(stored) for edit in task.edits], stored, task.dtype)
    if sums.twice:
        for start, one, _ in task.tiles():
            sums.look(one, start)
    for start, one, two in task.tiles():
        sums.add(one, two, start)
    sums.exact = sums.exact or _is_ours_in_nf4(task, sums.replay)
    if not sums.delta:
        silent = sums.exact or sums.off <= sums.noise_limit
        return Proof(task.name, "rounded" if silent else "other", note="the adapter adds nothing here")
    strength = sums.strengths()
    rest = math.sqrt(max(0.0, sums.rest(strength)) / sums.delta)
    shown = _by_adapter(strength, task.owners, task.count)
    return Proof(task.name, judged(sums, strength, rest, task.dtype), shown, rest)


@dataclass(frozen=True, eq=False)
class _Replayed:
    """The merge in floats of the type that was quantized."""

    task: _Task
    replay: Callable[[F32Array, int], F32Array]
    floats: str

    @property
    def rows(self) -> int:
        return as_matrix(self.task.have.shape(self.task.name))[0]

    @property
    def columns(self) -> int:
        return as_matrix(self.task.have.shape(self.task.name))[1]

    def read(self, opened: Opened, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        rows = self.task.have.rows(self.task.name, start, stop)
        np.copyto(out, rounded(self.replay(rows, start), self.floats))


def _is_ours_in_nf4(task: _Task, replay: Callable[[F32Array, int], F32Array]) -> bool:
    """Whether a tensor in bitsandbytes' NF4 is our own merge, quantized, bit for bit."""
    if task.dtype != "nf4" or not isinstance(task.made, FolderModel):
        return False
    source = ThroughNF4(task.name, _Replayed(task, replay, task.made.floats(task.other)), Floats("F32", dtypes.F32))
    with Opened() as opened, suppress(RefusedError):  # of NaN, which is never right
        for start, stop in _tiles(task.made.shape(task.other)):
            rows = np.empty((stop - start, source.columns), np.float32)
            source.read(opened, start, stop, rows, lambda _use, size: np.empty(size, np.uint8))
            if not np.array_equal(rows, task.made.rows(task.other, start, stop)):
                return False
        return True
    return False


def _by_adapter(strength: Sequence[float], owners: Sequence[int], count: int) -> tuple[float, ...]:
    row = [math.nan] * count
    for value, owner in zip(strength, owners, strict=True):
        row[owner] = value
    return tuple(row)
