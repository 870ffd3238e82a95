"""A row of the table of PEFT's tuners that are not LoRA (`peft_tuners.TUNERS`), and the change of one module by a tuner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.lazy_imports import np

from .deltas import LowRank, Parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

Weight: TypeAlias = "NDArray[np.float32]"
Tensors = Mapping[str, "np.ndarray"]
Numbers = Mapping[str, Any]
"""The keys of a config, with peft's defaults for those that are absent."""
Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Tuner:
    """One row of the table.

    Attributes:
        method: The name of the tuner in records.
        numbers: The keys of its config that describe it, and peft's defaults.
        ignored_keys: Further keys of its config, which do not change a trained adapter.
        tensor_names: The names of a module's tensors; empty for a tuner without tensors of its own.
        fits: Returns whether the tensors of a module can change a weight of this shape.
        change: Returns the changed weight of the base; None if the tuner changes no weight.
        pair: Returns the low-rank pair that the tensors equal, for a weight of this shape; None if they equal none.
        shared: The names of tensors that all modules share.
        variants: Other sets of names that `tensor_names` may be.
        optional: Further names of a module's tensors, any of which may be absent; `fits` decides.
        category: Returns the end of the names of the shared tensors that a module uses; None if all modules use the same.
        bias: Whether the bias of the module changes as a column of its weight does.
        change_bias: Returns the changed bias of the module, from its weight before the change and its bias.
        integers: The parts that are indices.
        unsaved: Parts that peft saves only if its config says so, to the key that says it.
        refuse: Returns why a config's numbers cannot be computed with here; empty if they can.
        unmerged: Why no weight can express the change, worded to follow the tuner's name; empty if one can.
    """

    method: str
    numbers: Numbers = field(default_factory=dict)
    ignored_keys: frozenset[str] = frozenset()
    tensor_names: tuple[str, ...] = ()
    fits: Callable[[Tensors, Numbers, Shape], bool] = lambda tensors, numbers, shape: True
    change: Callable[[Tensors, Numbers, Weight], Weight] | None = None
    pair: Callable[[Tensors, Numbers, Shape], LowRank] | None = None
    shared: tuple[str, ...] = ()
    variants: tuple[tuple[str, ...], ...] = ()
    optional: tuple[str, ...] = ()
    category: Callable[[str], str] | None = None
    bias: bool = False
    change_bias: Callable[[Tensors, Numbers, Weight, Weight], Weight] | None = None
    integers: frozenset[str] = frozenset()
    unsaved: Mapping[str, str] = field(default_factory=dict)
    refuse: Callable[[Numbers], str] = lambda numbers: ""
    unmerged: str = ""


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class TunedModule:
    """The change of one module by a tuner that is not LoRA.

    Attributes:
        tuner: The row of the table.
        tensors: By the names of `tuner.parts`.
        numbers: The values of the config for `tuner.numbers`.
        shared: The tensors that all modules share, by name; a file may have a copy of them for each module.
        transposed_base: The base stores its weight `(in, out)`.
    """

    tuner: Tuner
    tensors: Tensors
    numbers: Numbers
    shared: Tensors = field(default_factory=dict)
    transposed_base: bool = False

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in self.tensors.items())
        return f"<TunedModule: {self.tuner.method}, {shapes}>"

    def parts(self) -> Parts:
        """Yield its own tensors with their names."""
        yield from self.tensors.items()

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Return whether it can change a weight that the base stores in this shape."""
        if len(shape) != 2:
            return False
        # The tuners are written for `(out, in)`.
        out_features, in_features = shape[::-1] if self.transposed_base else shape
        return self.tuner.fits(self._all_tensors, self.numbers, (out_features, in_features))

    @property
    def acts_on_weight(self) -> bool:
        """Whether it changes a weight, rather than the input."""
        return self.tuner.change is not None or self.tuner.pair is not None

    @property
    def fits_bias(self) -> bool:
        """Whether the bias of the module changes too; it does not with IA3's factors of inputs."""
        return self.tuner.bias and all(tensor.shape[:1] != (1,) for tensor in self.tensors.values())

    def pair(self, shape: Shape) -> LowRank | None:
        """Return the low-rank pair that it equals on a weight of `(out_features, in_features)`; None if it equals none."""
        return self.tuner.pair(self._all_tensors, self.numbers, shape) if self.tuner.pair else None

    @property
    def changed_weight(self) -> Callable[[Weight], Weight] | None:
        """The function from the base's weight, `(out_features, in_features)`, to the changed one; None if there is none."""
        change = self.tuner.change
        return partial(change, self._all_tensors, self.numbers) if change else None

    @property
    def changed_bias(self) -> Callable[[Weight, Weight], Weight] | None:
        """The function from the base's weight and bias to the changed bias; None if there is none."""
        change = self.tuner.change_bias
        return partial(change, self._all_tensors, self.numbers) if change else None

    @property
    def _all_tensors(self) -> Tensors:
        return {**self.tensors, **self.shared}


def f32(array: np.ndarray) -> Weight:
    """Return an array in float32, the same one if it is."""
    return array.astype(np.float32, copy=False)
