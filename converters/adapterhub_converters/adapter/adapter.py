"""The canonical form of an adapter, which every format reads to and writes from.

An adapter changes a base model in three ways, each keyed by the base's own Hugging Face names: a low-rank delta on a module, a
replaced parameter, and replaced rows of a table. Factors have one orientation here, whatever a file stores: `lora_A` is `(r,
in_features)`, `lora_B` is `(out_features, r)`. The scale stays symbolic (`alpha`, `r`, rsLoRA or not) until a writer needs a
number, so that no format rounds it for another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field, replace
from enum import IntEnum
from functools import cached_property

from adapterhub_converters import display
from adapterhub_converters.errors import RefusedError, refused_error
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.lazy_imports import np

from .deltas import HasArrays, LowRank, LowRankConv, LowRankEmbedding, StackedLowRank
from .factored_deltas import Factored, Vera, as_pairs
from .peft_tuners import TUNERS
from .tuner import TunedModule

# Names in `Adapter.tensors` of parts that deltas name differently.
_LABELS = {"bias": "lora_B.bias"}

FULL = "full"
"""`Meta.method` of an adapter with complete parameters and no delta, from a model that was tuned without one."""

Pair = LowRank | LowRankEmbedding
FactorPair = Pair | StackedLowRank
Delta = FactorPair | LowRankConv | Factored


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Rows(HasArrays):
    """Rows `ids` of an embedding table, replaced by `values` `(len(ids), d)` (PEFT's `trainable_token_indices`)."""

    ids: tuple[int, ...]
    values: np.ndarray


@dataclass(frozen=True)
class Meta:
    """The properties of an adapter that its files record in addition to its tensors."""

    base_model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    dropout: float = 0.0
    init: str = "default"
    """The initialization of the factors: `default`, or `pissa`, `olora`, …, for which the delta also depends on the initial
    adapter.
    """
    invocation: tuple[int, ...] = ()
    """aLoRA: the adapter acts only after the last occurrence of these tokens (arXiv 2504.12397)."""
    layers: tuple[tuple[int, int], ...] = ()
    """PEFT's `layer_replication`: the ranges of the base's layers from which the deeper model is stacked."""
    parts: tuple[str, ...] = ()
    """The models of a pipeline (`unet`, `text_encoder`, …) with whose names the targets begin; empty for a single model."""
    header: Mapping[str, str] = field(default_factory=dict)
    """Entries of the source's header to preserve verbatim."""
    ties: bool = False
    """PEFT's `ensure_weight_tying`: changes of the embedding table also apply to the output layer tied to it."""
    family: str = ""
    """The family of image models that the adapter is for (`FLUX.1`); empty for language models, or if unknown."""
    program: str = ""
    """The program that saved it, according to the header of its file; empty if the header does not say."""
    dora: bool = False
    """PEFT's `use_dora`: modules without a magnitude use the norms of the base's rows, which none of the adapter's files
    contain.
    """
    method: str = ""
    """The name of a tuner that is not LoRA (`Tuner.method`), or FULL; empty for all others."""
    numbers: Mapping[str, object] = field(default_factory=dict)
    """The tuner's own numbers, by the keys of its config."""
    parameters: int | None = None
    """The number of elements in the source if deltas here have copies of elements that are shared there; else None."""


@dataclass(frozen=True)
class Source:
    """The content of an adapter's file beyond the canonical form, so that a writer of the same format reproduces its bytes.

    Attributes:
        format: The name of the format.
        config: The text of the config.
        metadata: The metadata in the header of the weights.
        names: The format's name of a tensor to its name in the file, where the two differ.
        turned: The stacked targets whose two factors were swapped in the file.
    """

    format: str
    config: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    turned: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Adapter:
    """Everything that an adapter does to its base.

    Attributes:
        deltas: Module path (`model.layers.0.self_attn.q_proj`) to its low-rank delta.
        replaced: Parameter path (`lm_head.weight`) to the tensor that replaces it.
        rows: Module path of a table to its replaced rows.
        added: Parameter path (`blocks.0.norm.weight`) to a tensor that is added to it.
        meta: Further properties.
        source: The file it was read from; set if nothing has changed since.
        notes: The reader's remarks, one line each.
        copies: Parameter path to a copy of the base's own weight, as PEFT saves it for a table that has a delta; it differs
            from the base's if the vocabulary was resized. A delta is added to the copy.
        tuned: Module path to its change by a tuner that is not LoRA; `meta.method` names the tuner.
    """

    deltas: Mapping[str, Delta]
    replaced: Mapping[str, np.ndarray] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    meta: Meta = field(default_factory=Meta)
    source: Source | None = None
    notes: tuple[str, ...] = ()
    copies: Mapping[str, np.ndarray] = field(default_factory=dict)
    tuned: Mapping[str, TunedModule] = field(default_factory=dict)
    added: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __repr__(self) -> str:
        counts = {
            "replaced": self.replaced, "differences": self.added, "tables with replaced rows": self.rows, "copies": self.copies,
            f"changes by {self.meta.method}": self.tuned,
        }  # fmt: skip
        other_counts = "".join(f", {len(parts)} {name}" for name, parts in counts.items() if parts)
        return f"Adapter({len(self.deltas)} deltas{other_counts}, {self.parameters} parameters)"

    def tensors(self) -> Iterable[tuple[str, np.ndarray]]:
        """Yield every tensor with a descriptive name, in a fixed order."""
        # Sorted, so that reports and digests don't depend on the order in a file.
        for target, delta in sorted(self.deltas.items()):
            yield from ((f"{target}.{_LABELS.get(part, part)}", tensor) for part, tensor in delta.parts())
        for target, change in sorted(self.tuned.items()):
            yield from ((f"{target}.{part}", tensor) for part, tensor in change.parts())
        yield from self.shared.items()
        yield from sorted(self.replaced.items())
        yield from ((f"{name} (difference)", tensor) for name, tensor in sorted(self.added.items()))
        yield from ((f"{target}.rows", rows.values) for target, rows in sorted(self.rows.items()))
        yield from ((f"{name} (copy)", tensor) for name, tensor in sorted(self.copies.items()))

    @cached_property
    def distinct_deltas(self) -> list[tuple[Delta, int]]:
        """The different deltas, and the number of modules of each: of headers alone, modules that are alike share one."""
        counts = Counter(map(id, self.deltas.values()))
        return [(delta, counts[key]) for key, delta in {id(delta): delta for delta in self.deltas.values()}.items()]

    def counted_tensors(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield the tensors in any order, each with the number of times that it is in `tensors`."""
        for delta, count in self.distinct_deltas:
            yield from ((tensor, count) for _, tensor in delta.parts())
        for change in self.tuned.values():
            yield from ((tensor, 1) for _, tensor in change.parts())
        for tensors in (self.shared, self.replaced, self.added, self.copies):
            yield from ((tensor, 1) for tensor in tensors.values())
        yield from ((rows.values, 1) for rows in self.rows.values())

    @property
    def shared(self) -> Mapping[str, np.ndarray]:
        """Tensors that all deltas share: VeRA's projections, VB-LoRA's vectors."""
        if tuned := next(iter(self.tuned.values()), None):
            return tuned.shared
        delta = next((delta for delta in self.deltas.values() if isinstance(delta, Vera)), None)
        return {} if delta is None else {"vera_A": delta.vera_A, "vera_B": delta.vera_B}

    @property
    def parameters(self) -> int:
        """The number of elements of all tensors, counting each tensor once."""
        return self.meta.parameters or sum(count * tensor.size for tensor, count in self.counted_tensors())


def factor_pairs(adapter: Adapter) -> dict[str, FactorPair]:
    """Return the deltas of an adapter, all of which must be pairs, including those for all experts together.

    Raises:
        RefusedError: There is a delta of another kind, or a condition on which the adapter acts (`refuse_conditions`).
    """
    refuse_conditions(adapter)
    pairs: dict[str, FactorPair] = {}
    for target, delta in adapter.deltas.items():
        if not isinstance(delta, FactorPair):
            raise _unsupported_kind_error(target, delta)
        if isinstance(delta, LowRankEmbedding) and delta.magnitude is not None:
            raise RefusedError(target, "DoRA on an embedding table is not supported here")
        pairs[target] = delta
    return pairs


def plain_pairs(adapter: Adapter) -> dict[str, Pair]:
    """Return the deltas of an adapter, all of which must be pairs for one module; raise as `factor_pairs` does."""
    pairs: dict[str, Pair] = {}
    for target, delta in factor_pairs(adapter).items():
        if not isinstance(delta, Pair):
            raise _unsupported_kind_error(target, delta)
        pairs[target] = delta
    return pairs


def _unsupported_kind_error(target: str, delta: Delta) -> RefusedError:
    return RefusedError(target, f"a delta of kind {type(delta).__name__} is not supported here")


def targets_without_magnitude(adapter: Adapter) -> list[str]:
    """Return the targets that are DoRA without a magnitude, and use the norms of the base's rows instead."""
    # The kinds that can have a magnitude.
    kinds = (LowRank, LowRankEmbedding, LowRankConv)
    targets = (target for target, delta in adapter.deltas.items() if isinstance(delta, kinds) and delta.magnitude is None)
    return list(targets) if adapter.meta.dora else []


def refuse_tuned(adapter: Adapter) -> None:
    """Raise a RefusedError for an adapter by a tuner that is not LoRA."""
    if reason := next((row.unmerged for row in TUNERS.values() if row.method == adapter.meta.method), ""):
        raise RefusedError("adapter", f"{adapter.meta.method} {reason}")
    if adapter.tuned:
        raise RefusedError(next(iter(adapter.tuned)), f"its change is by {adapter.meta.method}, which is no low-rank delta")


def refuse_differences(adapter: Adapter, location: str) -> None:
    """Raise a RefusedError for an adapter that adds to parameters other than weights with a delta; `location` is the format."""
    if adapter.added:
        raise refused_error(location, _difference_problems(adapter))


def _difference_problems(adapter: Adapter) -> list[str]:
    """Return a problem for each parameter to which the adapter adds a difference."""
    return [f"{name}: a difference to the base's own parameter cannot be expressed here" for name in sorted(adapter.added)]


BUNDLED = "bundle_emb."
"""The beginning of the names of embeddings that OneTrainer stores with an adapter; no model has such a parameter."""


def refuse_bundled(adapter: Adapter) -> None:
    """Raise a RefusedError for embeddings that OneTrainer bundled with the adapter; it names all of them."""
    if names := [name for name in sorted(adapter.replaced) if name.startswith(BUNDLED)]:
        problem = "an embedding that OneTrainer bundled with the adapter, which cannot be expressed here"
        reasons = [f"{name}: {problem}" for name in names]
        raise refused_error("adapter", reasons, code="bundled-embeddings")


def without_invocation(adapter: Adapter) -> Adapter:
    """Return an adapter without its invocation tokens (aLoRA), for a format that records them beside it."""
    return replace(adapter, meta=replace(adapter.meta, invocation=())) if adapter.meta.invocation else adapter


def refuse_conditions(adapter: Adapter) -> None:
    """Raise a RefusedError for properties that only PEFT can express: when the adapter acts, on what, and by what tuner."""
    refuse_tuned(adapter)
    refuse_bundled(adapter)
    refuse_differences(adapter, "added")
    if adapter.meta.invocation:
        problem = "the adapter acts only after certain tokens (aLoRA), which cannot be expressed here"
        raise RefusedError("alora_invocation_tokens", problem)
    if adapter.meta.layers:
        problem = "the adapter is for a base with repeated layers, which cannot be expressed here"
        raise RefusedError("layer_replication", problem)
    # Tying matters only if the table itself changes.
    tables = [*adapter.replaced, *adapter.rows, *(t for t, d in adapter.deltas.items() if isinstance(d, LowRankEmbedding))]
    if adapter.meta.ties and tables:
        problem = f"the change of {tables[0]} applies to the layer tied to it too, which cannot be expressed here"
        raise RefusedError("ensure_weight_tying", problem)
    if targets := targets_without_magnitude(adapter):
        problem = (
            f"is true, but {targets[0]} has no magnitude: it uses the norms of the base's rows, which cannot be expressed here"
        )
        raise RefusedError("use_dora", problem, "Save it again from where it was trained")
    for name in adapter.copies:
        problem = (
            "the adapter contains a copy of the base's weight, which cannot be expressed here and may differ from the base's"
        )
        raise RefusedError(name, problem, "Save it again with save_embedding_layers=False")


def problems_beyond_deltas(adapter: Adapter, format_name: str) -> list[str]:
    """Return why a format with only deltas cannot express an adapter; `format_name` is `mlx-lm's adapters` or the like."""
    problems = [] if adapter.deltas else ["there is no low-rank delta to write"]
    if adapter.meta.init != "default":
        problems.append(f"its factors were initialized with {adapter.meta.init}, which changed the base before training")
    problems += [f"{name}: a replaced parameter cannot be expressed in {format_name}" for name in sorted(adapter.replaced)]
    problems += [f"{target}: replaced rows cannot be expressed in {format_name}" for target in sorted(adapter.rows)]
    problems += _difference_problems(adapter)
    try:
        # Differences and replaced parameters are listed above, one by one.
        refuse_conditions(replace(adapter, added={}, replaced={}))
    except RefusedError as error:
        problems.append(f"{error.where}: {error.what}")
    return problems


def with_factored_as_pairs(adapter: Adapter) -> Adapter:
    """Return an adapter with AdaLoRA, QALoRA, LoHa, LoKr and VeRA as the low-rank pairs that they equal.

    The result is the same function up to one rounding of the factors in float32. It is `adapter` itself if that has none of
    these kinds; otherwise `source` is None, since it is no longer what was read.
    """
    # All at once: the limit on growth is one for the whole adapter.
    pairs = as_pairs({target: delta for target, delta in adapter.deltas.items() if isinstance(delta, Factored)})
    if not pairs:
        return adapter
    kinds = sorted({type(delta).__name__ for delta in adapter.deltas.values() if isinstance(delta, Factored)})
    note = f"{len(pairs)} deltas of kind {' and '.join(kinds)} are written as the low-rank pairs that they equal"
    return replace(adapter, deltas={**adapter.deltas, **pairs}, source=None, notes=(*adapter.notes, note))


class Loss(IntEnum):
    """The effects that a conversion may have on a tensor, from best to worst."""

    EXACT = 0
    """The bytes can be recovered."""
    REWRITTEN = 1
    """The same function in other numbers, exactly."""
    ROUNDED = 2
    """Within the stated bound."""
    APPROXIMATED = 3
    """With the stated relative error; only on request."""
    DROPPED = 4
    """Not in the result; only on request."""
    REFUSED = 5
    """The reason why there is no result: never in a report, only in an error."""


@dataclass(frozen=True, slots=True)
class TensorLoss:
    """One line of a loss report.

    Attributes:
        name: The tensor.
        loss: The kind of loss.
        note: The reason, or the bound.
        error: For ROUNDED, the bound on each element's relative error; for APPROXIMATED, the measured relative error of the
            delta in Frobenius norm.
    """

    name: str
    loss: Loss
    note: str = ""
    error: float | None = None


@dataclass(frozen=True, repr=False)
class LossReport:
    """A report on every tensor in a conversion.

    Attributes:
        losses: One line for each tensor of the source.
        notes: Further remarks, one line each.
    """

    losses: tuple[TensorLoss, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.summary.items() if count)
        return f"<LossReport: {counts or 'no tensors'}; {display.format_plural(len(self.notes), 'note')}>"

    @property
    def worst(self) -> Loss:
        """The greatest loss of any tensor."""
        return max((line.loss for line in self.losses), default=Loss.EXACT)

    @property
    def summary(self) -> dict[str, int]:
        """The number of tensors of each kind of loss, with every kind among the keys."""
        return {loss.name.lower(): sum(line.loss == loss for line in self.losses) for loss in Loss}

    def _repr_html_(self) -> str:
        rows = [(line.name, line.loss.name.lower(), line.note, line.error) for line in self.losses]
        return display.table(rows, head=("tensor", "loss", "note", "error"), caption=repr(self))
