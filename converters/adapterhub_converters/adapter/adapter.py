"""The canonical form that every format reads to and writes from.

An adapter changes a base model in three ways, each keyed by the base's own Hugging Face names: a low-rank
delta on a module, a parameter replaced as a whole, and single rows of a table replaced. Factors have one
orientation here, whatever a file stores: `lora_A` is `(r, in_features)`, `lora_B` is `(out_features, r)`. The
scale stays symbolic (`alpha`, `r`, rsLoRA or not) until a writer needs a number, so that no format rounds it
for another.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np

from adapterhub_converters import display
from adapterhub_converters.errors import RefusedError

from .deltas import LowRank, LowRankConv, LowRankEmbedding, StackedLowRank, scaling
from .factored import AdaLora, CpConv, Factored, Hadamard, Kronecker, PooledLowRank, Vera

__all__ = [
    "AdaLora",
    "Adapter",
    "CpConv",
    "Delta",
    "Factored",
    "Hadamard",
    "Kept",
    "Kronecker",
    "Loss",
    "LossReport",
    "LowRank",
    "LowRankConv",
    "LowRankEmbedding",
    "Meta",
    "Pair",
    "PooledLowRank",
    "Rows",
    "Source",
    "StackedLowRank",
    "Vera",
    "factor_pairs",
    "factored_out",
    "plain_pairs",
    "refuse_conditions",
    "scaling",
    "unmeasured",
]  # fmt: skip


# What `Adapter.tensors` calls a part that the delta calls otherwise.
_LABELS = {"bias": "lora_B.bias"}

Pair = LowRank | LowRankEmbedding
FactorPair = Pair | StackedLowRank
Delta = FactorPair | LowRankConv | Factored


@dataclass(frozen=True, eq=False, slots=True)
class Rows:
    """Rows `ids` of an embedding table, replaced by `values` `(len(ids), d)` (PEFT's `trainable_token_indices`)."""

    ids: tuple[int, ...]
    values: np.ndarray


@dataclass(frozen=True)
class Meta:
    """What an adapter's files say of it beside its tensors."""

    base_model: str | None = None
    revision: str | None = None
    task_type: str | None = None
    dropout: float = 0.0
    init: str = "default"
    """How the factors began: `default`, or `pissa`, `olora`, … whose delta needs the initial adapter as well."""
    invocation: tuple[int, ...] = ()
    """aLoRA: the adapter acts only from where these tokens were last said (arXiv 2504.12397)."""
    layers: tuple[tuple[int, int], ...] = ()
    """PEFT's `layer_replication`: the ranges of the base's layers that the deeper model is stacked from."""
    parts: tuple[str, ...] = ()
    """Of an adapter of a pipeline: the models (`unet`, `text_encoder`, …) whose names its targets begin with."""
    header: Mapping[str, str] = field(default_factory=dict)
    """What a file's header may carry on of the source's own, word for word."""
    ties: bool = False
    """PEFT's `ensure_weight_tying`: what is done to the embedding table is done to the output layer tied to it."""
    dora: bool = False
    """PEFT's `use_dora`: where a module has no magnitude, its rows have the lengths of the base's, which no file here says."""


@dataclass(frozen=True)
class Source:
    """The file an adapter was read from, where that format says more than the canonical form: lets a writer of the
    same format give back the same bytes.

    Attributes:
        format: Its name.
        config: The text of the config.
        metadata: The weights' header metadata.
        names: What the format calls a tensor to what the file called it, where the two differ.
        turned: The stacked targets whose file held the two factors in each other's place.
    """

    format: str
    config: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    turned: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Adapter:
    """All that an adapter does to its base.

    Attributes:
        deltas: Module path (`model.layers.0.self_attn.q_proj`) to its low-rank delta.
        replaced: Parameter path (`lm_head.weight`) to the tensor that takes its place.
        rows: Module path of a table to its replaced rows.
        copies: Parameter path to a copy of the base's own weight that rides along, as PEFT saves it for a table that
            has a delta; another one than the base's if the vocabulary was resized. A delta adds to it.
        source: Set when nothing was changed since reading.
        notes: What the reader found worth saying; each one line.
    """

    deltas: Mapping[str, Delta]
    replaced: Mapping[str, np.ndarray] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    meta: Meta = field(default_factory=Meta)
    source: Source | None = None
    notes: tuple[str, ...] = ()
    copies: Mapping[str, np.ndarray] = field(default_factory=dict)

    def tensors(self) -> Iterable[tuple[str, np.ndarray]]:
        """Every tensor with a name that says what it is, in a fixed order."""
        for target, delta in sorted(self.deltas.items()):
            yield from ((f"{target}.{_LABELS.get(part, part)}", tensor) for part, tensor in delta.parts())
        yield from self.shared.items()
        yield from sorted(self.replaced.items())
        yield from ((f"{target}.rows", rows.values) for target, rows in sorted(self.rows.items()))
        yield from ((f"{name} (copy)", tensor) for name, tensor in sorted(self.copies.items()))

    @property
    def shared(self) -> Mapping[str, np.ndarray]:
        """Tensors that stand once for all deltas: VeRA's projections."""
        delta = next((delta for delta in self.deltas.values() if isinstance(delta, Vera)), None)
        return {} if delta is None else {"vera_A": delta.vera_A, "vera_B": delta.vera_B}

    @property
    def parameters(self) -> int:
        """How many numbers the adapter has."""
        return sum(tensor.size for _, tensor in self.tensors())


def factor_pairs(adapter: Adapter) -> dict[str, FactorPair]:
    """The deltas of an adapter for who knows pairs, those of all experts together as well, and no other kind."""
    refuse_conditions(adapter)
    found: dict[str, FactorPair] = {}
    for target, delta in adapter.deltas.items():
        if not isinstance(delta, FactorPair):
            raise _unknown_kind(target, delta)
        if isinstance(delta, LowRankEmbedding) and delta.magnitude is not None:
            raise RefusedError(target, "DoRA on an embedding table cannot be expressed here yet")
        found[target] = delta
    return found


def plain_pairs(adapter: Adapter) -> dict[str, Pair]:
    """The deltas of an adapter for who knows plain pairs only.

    RefusedError names a delta of any other kind, and a condition on which the adapter acts (`refuse_conditions`).
    """
    found: dict[str, Pair] = {}
    for target, delta in factor_pairs(adapter).items():
        if not isinstance(delta, Pair):
            raise _unknown_kind(target, delta)
        found[target] = delta
    return found


def _unknown_kind(target: str, delta: Delta) -> RefusedError:
    return RefusedError(target, f"a delta of the kind {type(delta).__name__} cannot be expressed here yet")


def unmeasured(adapter: Adapter) -> list[str]:
    """The targets that are DoRA without a magnitude, whose lengths are those of the base's rows."""
    kinds = (LowRank, LowRankEmbedding, LowRankConv)
    found = (target for target, delta in adapter.deltas.items() if isinstance(delta, kinds) and delta.magnitude is None)
    return list(found) if adapter.meta.dora else []


def refuse_conditions(adapter: Adapter) -> None:
    """Refuse what only PEFT can say of an adapter as a whole: when it acts, on which layers, on which copy of a weight."""
    if adapter.meta.invocation:
        raise RefusedError(
            "alora_invocation_tokens", "the adapter acts only after certain tokens (aLoRA), which cannot be said here"
        )
    if adapter.meta.layers:
        raise RefusedError("layer_replication", "the adapter belongs to a base with repeated layers, which cannot be said here")
    tables = [*adapter.replaced, *adapter.rows, *(t for t, d in adapter.deltas.items() if isinstance(d, LowRankEmbedding))]
    if adapter.meta.ties and tables:
        raise RefusedError(
            "ensure_weight_tying", f"what is done to {tables[0]} is done to the layer tied to it, which cannot be said here"
        )
    if bare := unmeasured(adapter):
        what = f"is true and {bare[0]} has no magnitude: it takes the lengths of the base's rows, which cannot be said here"
        raise RefusedError("use_dora", what, "Save it again from where it was trained")
    for name in adapter.copies:
        raise RefusedError(
            name,
            "a copy of the base's weight rides along, which cannot be said here and may differ from the base's",
            "Save it again with save_embedding_layers=False",
        )


def beside_deltas(adapter: Adapter, words: str) -> list[str]:
    """What a format cannot say of an adapter that knows deltas alone; `words` are those in which it cannot be said."""
    found = [] if adapter.deltas else ["there is no low-rank delta to write"]
    if adapter.meta.init != "default":
        found.append(f"its factors began as {adapter.meta.init}, which changed the base when training began")
    found += [f"{name}: a replaced parameter cannot be said in {words}" for name in sorted(adapter.replaced)]
    found += [f"{target}: replaced rows cannot be said in {words}" for target in sorted(adapter.rows)]
    try:
        refuse_conditions(adapter)
    except RefusedError as error:
        found.append(f"{error.where}: {error.what}")
    return found


def factored_out(adapter: Adapter) -> Adapter:
    """The adapter with AdaLoRA, QALoRA, LoHa, LoKr and VeRA as the low-rank pairs they equal; itself when there are none.

    The same function up to one rounding of the factors in float32. It is no longer what was read: `source` is None.
    """
    changed = {t: d.as_low_rank() for t, d in adapter.deltas.items() if isinstance(d, Factored)}
    if not changed:
        return adapter
    kinds = sorted({type(delta).__name__ for delta in adapter.deltas.values() if isinstance(delta, Factored)})
    note = f"{len(changed)} deltas of the kind {' and '.join(kinds)} are written as the low-rank pairs they equal"
    return replace(adapter, deltas={**adapter.deltas, **changed}, source=None, notes=(*adapter.notes, note))


class Loss(IntEnum):
    """How much of a tensor a conversion kept, best first."""

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
    """There is no result because of it: never in the report of a conversion, only in the error of one."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One line of a loss report: what became of `name`, and why or within what bound."""

    name: str
    loss: Loss
    note: str = ""
    error: float | None = None
    """ROUNDED: the bound of each element's relative error. APPROXIMATED: the delta's, in Frobenius norm, as measured."""


@dataclass(frozen=True, repr=False)
class LossReport:
    """What a conversion kept, tensor by tensor, and what else is worth saying."""

    kept: tuple[Kept, ...]
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> Loss:
        """The greatest loss of any tensor."""
        return max((line.loss for line in self.kept), default=Loss.EXACT)

    @property
    def summary(self) -> dict[str, int]:
        """How many tensors there are of each loss, every loss among the keys."""
        return {loss.name.lower(): sum(line.loss == loss for line in self.kept) for loss in Loss}

    def __repr__(self) -> str:
        return f"<LossReport: {', '.join(f'{count} {name}' for name, count in self.summary.items() if count)}>"

    def _repr_html_(self) -> str:
        rows = [(line.name, line.loss.name.lower(), line.note, line.error) for line in self.kept]
        return display.table(rows, head=("tensor", "loss", "note", "error"), caption=repr(self))
