"""The canonical form that every format reads to and writes from.

An adapter changes a base model in three ways, each keyed by the base's own Hugging Face names: a low-rank
delta on a module, a parameter replaced as a whole, and single rows of a table replaced. Factors have one
orientation here, whatever a file stores: `lora_A` is `(r, in_features)`, `lora_B` is `(out_features, r)`. The
scale stays symbolic (`alpha`, `r`, rsLoRA or not) until a writer needs a number, so that no format rounds it
for another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from .errors import RefusedError


@dataclass(frozen=True, eq=False, slots=True)
class LowRank:
    """`scaling * lora_B @ lora_A` added to the weight of a linear module.

    `magnitude` `(out_features,)` makes it DoRA (arXiv 2402.09353): the sum is then rescaled per output row.
    `bias` `(out_features,)` is PEFT's `lora_bias`: added to the output, times `scaling`.
    `transposed_base` says that the base stores its weight `(in, out)`, as Hugging Face's Conv1D does
    (`fan_in_fan_out`); the factors are oriented as ever.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    alpha: float
    rslora: bool = False
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None
    transposed_base: bool = False

    @property
    def r(self) -> int:
        """The rank: what the tensors say, not what a config says."""
        return int(self.lora_A.shape[0])

    @property
    def scaling(self) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` for rsLoRA (arXiv 2312.03732)."""
        return scaling(self.alpha, self.r, rslora=self.rslora)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)` of the delta."""
        return int(self.lora_B.shape[0]), int(self.lora_A.shape[1])

    @property
    def plain(self) -> bool:
        """Whether the low-rank product is all there is."""
        return self.magnitude is None and self.bias is None


@dataclass(frozen=True, eq=False, slots=True)
class LowRankEmbedding:
    """`scaling * (lora_B @ lora_A).T` added to an embedding table `(vocab, d)`; A is `(r, vocab)`, B `(d, r)`."""

    lora_A: np.ndarray
    lora_B: np.ndarray
    alpha: float
    rslora: bool = False

    @property
    def r(self) -> int:
        """The rank."""
        return int(self.lora_A.shape[0])

    @property
    def scaling(self) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` for rsLoRA."""
        return scaling(self.alpha, self.r, rslora=self.rslora)

    @property
    def shape(self) -> tuple[int, int]:
        """`(vocab, d)` of the delta."""
        return int(self.lora_A.shape[1]), int(self.lora_B.shape[0])

    @property
    def plain(self) -> bool:
        """Always: an embedding delta has no further parts."""
        return True


@dataclass(frozen=True, eq=False, slots=True)
class StackedLowRank:
    """`scaling * lora_B[e] @ lora_A[e]` added to the weight of expert `e`, for all experts of a stacked parameter.

    `lora_A` is `(experts, r, in_features)`, `lora_B` `(experts, out_features, r)`; in and out are those of the
    function an expert computes. `transposed_base` says that the base stores the parameter `(experts, in, out)`.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    alpha: float
    rslora: bool = False
    transposed_base: bool = False

    @property
    def r(self) -> int:
        """The rank of one expert."""
        return int(self.lora_A.shape[1])

    @property
    def scaling(self) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` for rsLoRA."""
        return scaling(self.alpha, self.r, rslora=self.rslora)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(experts, out_features, in_features)` of the delta."""
        return int(self.lora_B.shape[0]), int(self.lora_B.shape[1]), int(self.lora_A.shape[2])

    @property
    def plain(self) -> bool:
        """Always: a stacked delta has no further parts."""
        return True


Pair = LowRank | LowRankEmbedding
Delta = Pair | StackedLowRank


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


@dataclass(frozen=True)
class Source:
    """The file an adapter was read from, where that format says more than the canonical form: lets a writer of the
    same format give back the same bytes. `config` is the text of the config, `metadata` the weights' header metadata."""

    format: str
    config: str
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Adapter:
    """All that an adapter does to its base.

    Attributes:
        deltas: Module path (`model.layers.0.self_attn.q_proj`) to its low-rank delta.
        replaced: Parameter path (`lm_head.weight`) to the tensor that takes its place.
        rows: Module path of a table to its replaced rows.
        source: Set when nothing was changed since reading.
        notes: What the reader found worth saying; each one line.
    """

    deltas: Mapping[str, Delta]
    replaced: Mapping[str, np.ndarray] = field(default_factory=dict)
    rows: Mapping[str, Rows] = field(default_factory=dict)
    meta: Meta = field(default_factory=Meta)
    source: Source | None = None
    notes: tuple[str, ...] = ()

    def tensors(self) -> Iterable[tuple[str, np.ndarray]]:
        """Every tensor with a name that says what it is, in a fixed order."""
        for target, delta in sorted(self.deltas.items()):
            yield f"{target}.lora_A", delta.lora_A
            yield f"{target}.lora_B", delta.lora_B
            if isinstance(delta, LowRank) and delta.magnitude is not None:
                yield f"{target}.magnitude", delta.magnitude
            if isinstance(delta, LowRank) and delta.bias is not None:
                yield f"{target}.lora_B.bias", delta.bias
        yield from sorted(self.replaced.items())
        yield from ((f"{target}.rows", rows.values) for target, rows in sorted(self.rows.items()))

    @property
    def parameters(self) -> int:
        """How many numbers the adapter has."""
        return sum(tensor.size for _, tensor in self.tensors())


def plain_pairs(adapter: Adapter) -> dict[str, Pair]:
    """The deltas of an adapter for who knows plain pairs only; RefusedError names a delta of any other kind."""
    found: dict[str, Pair] = {}
    for target, delta in adapter.deltas.items():
        if not isinstance(delta, Pair):
            raise RefusedError(target, f"a delta of the kind {type(delta).__name__} cannot be expressed here yet")
        found[target] = delta
    return found


def scaling(alpha: float, r: int, *, rslora: bool) -> float:
    """What `lora_B @ lora_A` is multiplied by (peft, `tuners/lora/layer.py`, `update_layer`)."""
    return alpha / (math.sqrt(r) if rslora else r)


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


@dataclass(frozen=True, slots=True)
class Kept:
    """One line of a loss report: what became of `name`, and why or within what bound."""

    name: str
    loss: Loss
    note: str = ""


@dataclass(frozen=True)
class LossReport:
    """What a conversion kept, tensor by tensor, and what else is worth saying."""

    kept: tuple[Kept, ...]
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> Loss:
        """The greatest loss of any tensor."""
        return max((line.loss for line in self.kept), default=Loss.EXACT)
