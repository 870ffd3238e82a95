"""The low-rank deltas of one module that PEFT's LoRA has.

Factors have one orientation here, whatever a file stores: `lora_A` is `(r, in_features)`, `lora_B` is `(out_features, r)`. The
scale stays symbolic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields

from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.lazy_imports import np

Parts = Iterator[tuple[str, "np.ndarray"]]
MAX_EXPERTS = 4_096
"""The maximum number of experts in a layer that is read."""


class HasArrays:
    """A dataclass whose repr has the shapes of its arrays, and no numbers of them."""

    __slots__ = ()

    def __repr__(self) -> str:
        values = ((field.name, getattr(self, field.name), field.default) for field in fields(self))  # type: ignore[arg-type]
        shown = (
            f"{name} {value.shape}" if hasattr(value, "shape") else f"{name} {value!r}"
            for name, value, default in values
            if hasattr(value, "shape") or value != default
        )
        return f"<{type(self).__name__}: {', '.join(shown)}>"


class HasFactors(HasArrays):
    """The properties shared by all kinds with a `lora_A` whose number of rows is the rank."""

    __slots__ = ()
    lora_A: np.ndarray
    lora_B: np.ndarray
    alpha: float
    rslora: bool

    @property
    def r(self) -> int:
        """The rank, from the tensors rather than from a config."""
        return int(self.lora_A.shape[0])

    @property
    def scaling(self) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` for rsLoRA (arXiv 2312.03732)."""
        return scaling(self.alpha, self.r, rslora=self.rslora)

    def parts(self) -> Parts:
        """Return the tensors with their names."""
        # Not every kind has all of these.
        names = ("lora_A", "lora_B", "magnitude", "bias")
        return ((name, tensor) for name in names if (tensor := getattr(self, name, None)) is not None)

    @property
    def plain(self) -> bool:
        """Whether the delta is only the low-rank product."""
        return all(name in ("lora_A", "lora_B") for name, _ in self.parts())


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class LowRank(HasFactors):
    """`scaling * lora_B @ lora_A`, added to the weight of a linear module.

    `magnitude` `(out_features,)` makes it DoRA (arXiv 2402.09353): the sum is then rescaled per output row. `bias`
    `(out_features,)` is PEFT's `lora_bias`: added to the output, times `scaling`. `transposed_base`: the base stores its weight
    `(in, out)`, as Hugging Face's Conv1D does (`fan_in_fan_out`); the factors have the usual orientation.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    alpha: float
    rslora: bool = False
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None
    transposed_base: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)` of the delta."""
        return int(self.lora_B.shape[0]), int(self.lora_A.shape[1])


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class LowRankEmbedding(HasFactors):
    """`scaling * (lora_B @ lora_A).T`, added to an embedding table `(vocab, d)`; A is `(r, vocab)`, B `(d, r)`.

    `magnitude` `(1, vocab)` makes it DoRA: the sum is then rescaled per token, as peft does it.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    alpha: float
    rslora: bool = False
    magnitude: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """`(vocab, d)` of the delta."""
        return int(self.lora_A.shape[1]), int(self.lora_B.shape[0])


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class StackedLowRank(HasFactors):
    """`scaling * lora_B[e] @ lora_A[e]`, added to the weight of expert `e`, for all experts of a stacked parameter.

    `lora_A` is `(experts, r, in_features)`, `lora_B` `(experts, out_features, r)`; in and out are those of the function that an
    expert computes. `transposed_base`: the base stores the parameter `(experts, in, out)`; None if that is unknown.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    alpha: float
    rslora: bool = False
    transposed_base: bool | None = None

    @property
    def r(self) -> int:
        """The rank of one expert."""
        return int(self.lora_A.shape[1])

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(experts, out_features, in_features)` of the delta."""
        return int(self.lora_B.shape[0]), int(self.lora_B.shape[1]), int(self.lora_A.shape[2])


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class LowRankConv(HasFactors):
    """A convolution by `lora_A` `(r, in_channels / groups, *kernel)` followed by one by `lora_B` `(out_channels, r, 1, …)`.

    `magnitude` `(1, out_channels, 1, …)` makes it DoRA; `bias` `(out_channels,)` is PEFT's `lora_bias`.
    """

    lora_A: np.ndarray
    lora_B: np.ndarray
    alpha: float
    rslora: bool = False
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out_channels, in_channels / groups, *kernel)` of the delta."""
        return int(self.lora_B.shape[0]), *map(int, self.lora_A.shape[1:])


def scaling(alpha: float, r: int, *, rslora: bool) -> float:
    """Return the factor of `lora_B @ lora_A` (peft, `tuners/lora/layer.py`, `update_layer`)."""
    return alpha / (math.sqrt(r) if rslora else r)
