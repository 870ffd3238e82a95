"""Estimate how much of the adapters a merge retains, on a sample of rows of each changed tensor, before anything is written.

A merge that would lose too much is refused, or warned about in 16 bits. The estimate also compares the result with the weights
that training saw, where the base was quantized for training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.errors import RefusedError, refused_error
from adapterhub_converters.lazy_dataclass import dataclass

from .edits import Edit
from .merge_options import NF4, Options
from .nf4_numpy import ThroughNF4, round_trip_sample
from .nf4_writer import ROUTERS, is_linear
from .output_files import EditedTensor, OutFile, OutputWriter, PreparedTensor, UnfitError, unfit_error
from .read_base import CONV1D, Folder
from .tensor_files import OpenFiles, StoredRows, TensorSource
from .tensor_types import kind

F32Array = NDArray[np.float32]

SAMPLE = 1 << 16
"""The least number of elements of a tensor on which its change is estimated; all of a smaller tensor."""
MIN_RETAINED = 0.9
"""The share of a module's change below which a quantized target is refused, and one in 16 bits warned about."""
_SPOTS = 4  # places in a tensor that the sample is taken from


@dataclass(frozen=True)
class ChangeEstimate:
    """The change of a tensor, estimated on some of its rows.

    Attributes:
        relative: The norm of the delta over that of the weight. This and `retained` are None if the sample does not change.
        retained: The share of the delta that survives rounding to the stored type (the projection of the effective change on
            the delta): near 1, or near 0 if the steps of the type swallow it. For NF4, the effective change is relative to the
            base in NF4.
        uncertainty: The largest error of `retained`, since rounding on these rows is partly chance: four standard deviations.
        original: The relative error of the result against the weight that training saw plus its delta, when merged into the
            base unchanged; for isotropic inputs this is the error of the module's output. None if it is not known what training
            saw.
        as_trained: The same error when the base is first rounded as in training.
        quantized: Whether the tensor is stored in blocks.
    """

    relative: float | None
    retained: float | None
    original: float | None = None
    as_trained: float | None = None
    quantized: bool = False
    uncertainty: float = 0.0

    @property
    def is_lost(self) -> bool:
        """Whether less than `MIN_RETAINED` survives, beyond the uncertainty."""
        return self.retained is not None and self.retained + self.uncertainty < MIN_RETAINED


@dataclass(frozen=True)
class TrainingQuantization:
    """The quantization of the base in training: which tensors it covered, and its effect on rows of numbers."""

    quantized: Callable[[str], bool]
    round_trip: Callable[[F32Array], F32Array]


def estimate_all(
    files: Sequence[OutFile],
    edits: Mapping[str, Sequence[Edit]],
    options: Options,
    opened: OpenFiles,
    base_sources: Mapping[str, TensorSource] | None = None,
) -> dict[str, ChangeEstimate]:
    """Estimate the change of each tensor that has edits.

    Args:
        base_sources: The base's own numbers of tensors that `files` compute from other numbers.

    Raises:
        RefusedError: A quantized tensor would retain too little of the adapter.
    """
    writer = OutputWriter(None, 0)
    # For a base in floats, NF4 is the one quantization of training that can be reproduced.
    trained = TrainingQuantization(is_linear, round_trip_sample) if options.trained_in == NF4 else None
    changes = {}
    for part in (part for file in files for part in file.parts if isinstance(part, EditedTensor) and edits.get(part.name)):
        original = (base_sources or {}).get(part.name, part.source)
        in_floats = isinstance(original, StoredRows) and not original.kind.is_quantized
        changes[part.name] = estimate(part, original, opened, writer, trained if in_floats else None)
    lost = {name: change.retained or 0.0 for name, change in changes.items() if change.quantized and change.is_lost}
    if lost and not options.force:
        # The worst first, as a message shows only a few.
        worst_first = sorted(lost.items(), key=lambda item: item[1])
        lines = [f"{name}: {retained:.1%} of the adapter's change would be kept" for name, retained in worst_first]
        hint = "Merge into 16 bits, or into the full-precision model"
        raise refused_error(
            "quantized", lines, hint, code="adapter-lost-in-nf4" if options.requantize == NF4 else "adapter-lost"
        )
    return changes


def estimate(
    tensor: EditedTensor, original: TensorSource, opened: OpenFiles, writer: OutputWriter, trained: TrainingQuantization | None
) -> ChangeEstimate:
    """Estimate the change of one tensor on rows from a few places, without rounding and as stored.

    Args:
        original: The base's own weight.
    """
    sums = _Sums()
    ready = tensor.prepare()
    writer.look(ready, opened)
    for start, stop in sampled_rows(tensor):
        before = _read(tensor.source, start, stop, opened, writer)
        exact, after = _outcome(ready, before, start)
        sums.add(before, exact, after, tensor.packing.round_trip(before) if tensor.packing else before)
        if trained:
            base_rows = before if original is tensor.source else _read(original, start, stop, opened, writer)
            training_rows = trained.round_trip(base_rows) if trained.quantized(tensor.name) else base_rows
            expected, as_trained = _outcome(ready, training_rows, start)
            sums.compare(expected, _outcome(ready, base_rows, start)[1], as_trained)
    return sums.change(quantized=tensor.kind.is_quantized or tensor.packing is not None, trained=trained is not None)


@dataclass
class _Sums:
    """Sums of squares over the sampled rows."""

    delta: float = 0.0
    weight: float = 0.0
    projection: float = 0.0
    effect: float = 0.0
    count: int = 0
    expected: float = 0.0
    original: float = 0.0
    as_trained: float = 0.0

    def add(self, before: F32Array, exact: F32Array, after: F32Array, stored: F32Array) -> None:
        """Add rows of the base, merged, merged and stored, and of the base as it would be stored."""
        delta, effect = exact - before, after - stored
        self.delta += float(np.vdot(delta, delta))
        self.weight += float(np.vdot(before, before))
        self.projection += float(np.vdot(effect, delta))
        self.effect += float(np.vdot(effect, effect))
        self.count += delta.size

    def compare(self, expected: F32Array, original: F32Array, as_trained: F32Array) -> None:
        """Add rows as training had them, and as both ways of merging leave them."""
        self.expected += float(np.vdot(expected, expected))
        self.original += float(np.vdot(original - expected, original - expected))
        self.as_trained += float(np.vdot(as_trained - expected, as_trained - expected))

    def change(self, *, quantized: bool, trained: bool) -> ChangeEstimate:
        """Return the estimate from all rows added."""
        errors = (None, None)
        if trained and self.expected:
            errors = ((self.original / self.expected) ** 0.5, (self.as_trained / self.expected) ** 0.5)
        # An untrained adapter, or a sample of zeros: there is no share to report.
        if not self.delta:
            return ChangeEstimate(None, None, *errors, quantized)
        relative = (self.delta / self.weight) ** 0.5 if self.weight else None
        retained = self.projection / self.delta
        variance = max(0.0, self.effect / self.delta - retained**2)
        return ChangeEstimate(relative, retained, *errors, quantized, 4 * math.sqrt(variance / self.count))


def sampled_rows(tensor: EditedTensor) -> list[tuple[int, int]]:
    """Return ranges of rows that represent a tensor; all rows of a small one."""
    rows, columns = tensor.source.rows, tensor.source.columns
    if rows * columns <= SAMPLE:
        return [(0, rows)]
    # Even starts and counts, as in the merge itself: an odd last row would use another kernel (`product`).
    count = min(rows, max(2, SAMPLE // max(1, columns) // _SPOTS // 2 * 2))
    starts = sorted({(rows - count) * (2 * spot + 1) // (2 * _SPOTS) // 2 * 2 for spot in range(_SPOTS)})
    return [(start, start + count) for start in starts]


def _read(source: TensorSource, start: int, stop: int, opened: OpenFiles, writer: OutputWriter) -> F32Array:
    rows = np.empty((stop - start, source.columns), np.float32)
    source.read(opened, start, stop, rows, writer.buffer)
    return rows


def _outcome(ready: PreparedTensor, before: F32Array, start: int) -> tuple[F32Array, F32Array]:
    """Return rows of the base after the edits, exact and as stored."""
    tensor = ready.tensor
    exact, after = before.copy(), before.copy()
    raw = np.empty((len(before), tensor.kind.row_size(before.shape[1])), np.uint8)
    scratch = np.empty(before.size + before.shape[1], np.float32)
    try:
        with np.errstate(all="ignore"):
            for apply in ready.applies:
                apply(exact, start, scratch)
            ready.change(after, raw, start, scratch)
            tensor.kind.decode(raw, after)
            if tensor.packing:
                after = tensor.packing.round_trip(after)
    except UnfitError as unfit:
        raise unfit_error(tensor, before) from unfit
    return exact, after


def sources_as_trained(folder: Folder, options: Options) -> dict[str, TensorSource]:
    """Return the weights of linear layers as training in NF4 saw them.

    Raises:
        RefusedError: It is not known what training saw.
    """
    saw = f"training saw the base in {options.trained_in}" if options.trained_in else "no quantization is recorded"
    reasons = {
        f"{saw}, and only nf4 can be reproduced": options.trained_in != NF4,
        f"the base is {folder.method} already": folder.method is not None,
        f"{folder.spec.model_type} stores its weights transposed": folder.spec.model_type in CONV1D,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise RefusedError("as-trained", reason, "Merge into the base as it is", code="as-trained")
    sources: dict[str, TensorSource] = {}
    for name, weight in folder.weights.items():
        form = kind(weight.dtype)
        if name.endswith(ROUTERS):
            reason_text = "a router: whether training saw it quantized is not known"
            raise RefusedError(name, reason_text, "Merge into the base as it is", code="as-trained")
        if is_linear(name) and len(weight.shape) == 2 and form:
            sources[name] = ThroughNF4(name, weight.source(), form)
    return sources


def warnings(changes: Mapping[str, ChangeEstimate]) -> tuple[str, ...]:
    """Return the effects that the user may not intend, one line each."""
    lost = [name for name, change in changes.items() if change.is_lost]
    if lost:
        worst = min(lost, key=lambda name: changes[name].retained or 0.0)
        survival = f"of the adapter's change in {worst} {changes[worst].retained:.0%} survives rounding"
        return (f"{survival}, less than {MIN_RETAINED:.0%} in {len(lost)} of {len(changes)} tensors",)
    if changes and all(change.relative is None for change in changes.values()):
        return ("the sampled rows do not change: was the adapter trained?",)
    return ()
