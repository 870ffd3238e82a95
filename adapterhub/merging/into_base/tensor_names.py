"""The tensors of a Hugging Face folder that hold an adapter's modules, and the errors where no tensor matches.

A base may have other names in its files than in memory, or one leading component more or less than the adapter, tie its output
layer to its embedding table, and store experts one by one or stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from adapterhub_converters.adapter import Adapter, Delta, LowRank, StackedLowRank
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.architectures.architecture import Architecture
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .edits import AddLowRank
from .read_base import Folder, Weight
from .tensor_files import OpenFiles

HEADS = ("lm_head.weight", "embed_out.weight")
"""The names of an output layer's weight."""
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_COMPARED = 1 << 20  # bytes of two tensors that are compared at a time


def architecture_of(folder: Folder) -> Architecture | None:
    """Return the architecture of a base; None for an unknown class."""
    try:
        return folder.spec.llama_cpp_architecture()
    except RefusedError:
        return None


def absent_error(target: str, location: str) -> RefusedError:
    """Return the error for a module or parameter that the base at `location` lacks."""
    return RefusedError(target, f"not in the base {location}", "Is this the model the adapter was trained on?")


def check_shape(target: str, name: str, shape: tuple[int, ...], base_shape: tuple[int, ...]) -> None:
    """Raise RefusedError if the base's tensor `name` has another shape than the weight that the adapter changes."""
    if tuple(shape) != base_shape:
        hint = "The adapter was trained after the vocabulary was resized" if base_shape[1:] == tuple(shape)[1:] else ""
        raise RefusedError(target, f"changes a weight of shape {tuple(shape)}, the base's {name} is {base_shape}", hint)


class StoredNames:
    """A map from parameters of the model in memory to names in a folder's files."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self._weights, self._renaming = folder, folder.weights, folder.spec.renaming
        self.in_memory = {name: stored for stored, name in self._renaming.names(self._weights).items()}

    def __call__(self, parameter: str) -> str | None:
        """Return the tensor of a parameter: one that transformers renames to it, or of the same name; None if there is none."""
        # In memory first: another tensor of the file may have the parameter's name.
        if stored := self.in_memory.get(parameter):
            return stored
        return parameter if parameter in self._weights else self.in_memory.get(self._renaming(parameter))


class TensorNames:
    """A map from an adapter's names to the base's: equal in memory, or all with one leading component more or less.

    `GPT2LMHeadModel` names its blocks `transformer.h…`, its published checkpoint `h…`: transformers adds the prefix when it
    loads the checkpoint (`base_model_prefix`), so the adapter's names have it.
    """

    def __init__(self, folder: Folder, stored: StoredNames, adapter: Adapter, alias: Mapping[str, str]) -> None:
        tensors = folder.weights
        self._tensors = tensors
        self._location = folder.spec.source
        self._alias = alias
        self._stored = stored
        stems = {f"{target}.weight" for target in (*adapter.deltas, *adapter.rows)} | set(adapter.replaced)
        # A tied output layer is not missing: it has an alias.
        missing = sorted(stem for stem in stems if not self._stored(stem) and stem not in alias)
        self._renamed = self._find_renaming(missing) if missing else {}
        self.notes = sorted({f"{old}… in the adapter is {new}… in the base" for old, new in self._prefixes()})

    def _find_renaming(self, missing: list[str]) -> dict[str, str]:
        """Return the only renaming of the `missing` names that the base has in full."""
        first = missing[0]
        head = first.partition(".")[0] + "."
        # In memory too: the files of a model that holds the adapter's model keep other names (Qwen3-Omni and its thinker).
        names = {*self._tensors, *self._stored.in_memory}
        added = {name.removesuffix(first) for name in names if name.endswith("." + first)}
        renamings = (
            [{name: name.removeprefix(head) for name in missing}] if all(name.startswith(head) for name in missing) else []
        )
        renamings += [{name: prefix + name for name in missing} for prefix in sorted(added)]
        fitting = [renaming for renaming in renamings if all(map(self._stored, renaming.values()))]
        # Two ways fit: guessing could merge into the wrong tower of a model.
        if len({tuple(map(self._stored, renaming.values())) for renaming in fitting}) > 1:
            raise RefusedError(
                first, f"could be {' or '.join(renaming[first] for renaming in fitting)} in the base {self._location}"
            )
        if not fitting:
            module = first.removesuffix(".bias")
            if module != first and self._stored(f"{module}.weight"):
                problem = "is changed by the adapter, but this module of the base has no bias; peft merges into none either"
                raise RefusedError(first, problem, "Use the adapter unmerged, with peft")
            raise absent_error(first, self._location)
        return fitting[0]

    def _prefixes(self) -> Iterator[tuple[str, str]]:
        for old, new in self._renamed.items():
            longer = max(old, new, key=len)
            prefix = longer[: len(longer) - min(len(old), len(new))]
            yield (prefix, "") if len(old) > len(new) else ("", prefix)

    def experts(self, target: str) -> str:
        """Return the name of a module or parameter of experts with the leading component that the base's other names have."""
        (removed, added), *others = set(self._prefixes()) or {("", "")}
        return target if others else added + target.removeprefix(removed)

    def parameter(self, name: str, *, reason: str = "not in the base") -> str:
        """Return the base's name of a parameter; RefusedError with the `reason` if it has none."""
        if stored := self._stored(name):
            return stored
        if name in self._alias:
            return self._alias[name]
        stem = name.rpartition(".")[0] + ".weight"
        new = self._renamed.get(name) or self._renamed.get(stem, stem).rpartition(".")[0] + "." + name.rpartition(".")[2]
        stored = self._stored(new)
        if stored is None:
            raise RefusedError(name.rpartition(".")[0], reason)
        return stored


class TokenTables:
    """The tables of a base that have a row for each token: the embedding table and the output layer.

    Attributes:
        tied: Whether they are one, so that changing one changes the other.
        head: The tensor of the output layer; None if there is none.
        stored: Whether the base stores such a tensor.
        table: The tensor of the embedding table, if its name is known.
    """

    def __init__(self, folder: Folder) -> None:
        spec, self._weights, self._opened = folder.spec, folder.weights, folder.opened
        self._vocabulary = spec.config.get("vocab_size")
        self.head = next((name for name in self._weights if name.endswith(HEADS)), None)
        self.stored = self.head is not None
        self.table = next(
            (f"{name}.weight" for name in architecture_lookup.EMBEDDINGS if f"{name}.weight" in self._weights), None
        )
        self.tied = spec.tied or (self.head is None and spec.architecture.endswith(_WITH_HEAD))
        if self.head and "tie_word_embeddings" not in spec.config:
            # The config is silent and both are stored: transformers uses the class's default; equal bytes settle it.
            head = self._weights[self.head]
            same_shape = [
                weight for weight in self._weights.values() if weight.shape == head.shape and weight.name != head.name
            ]
            self.tied = any(_same_bytes(self._opened, head, candidate) for candidate in same_shape)

    @property
    def alias(self) -> dict[str, str]:
        """The tensor that a base without an output layer of its own uses in its place."""
        return {"lm_head.weight": self.table} if self.tied and not self.stored and self.table else {}

    def can_untie(self, architecture: Architecture | None) -> bool:
        """Return whether transformers loads a separate output layer for this class, under a known name."""
        return architecture is not None and self.table is not None and "lm_head" in architecture.top

    def is_table(self, name: str) -> bool:
        """Return whether a tensor has a row for each token."""
        if name == self.head:
            return True
        weight = self._weights.get(name)
        in_a_layer = any(part.isdigit() for part in name.split("."))
        return weight is not None and len(weight.shape) == 2 and weight.shape[0] == self._vocabulary and not in_a_layer


def _same_bytes(opened: OpenFiles, first: Weight, second: Weight) -> bool:
    """Return whether two stored weights are equal, byte by byte."""
    if first.size != second.size or not first.size:
        return False
    pieces = np.empty((2, _COMPARED), np.uint8)
    for start in range(0, first.size, _COMPARED):
        count = min(_COMPARED, first.size - start)
        for piece, weight in zip(pieces, (first, second), strict=True):
            opened.read(weight.path, piece[:count], weight.offset + start)
        if not np.array_equal(pieces[0, :count], pieces[1, :count]):
            return False
    return True


@dataclass(frozen=True)
class ExpertEdit:
    """An edit of the tensor `name`: of `rows` (first, count), seen as a matrix, or of all rows if None."""

    name: str
    edit: AddLowRank
    rows: tuple[int, int] | None = None


def expert_edits(
    stored: StoredNames, architecture: Architecture | None, target: str, delta: Delta, weight: float
) -> Iterator[ExpertEdit]:
    """Yield the edits of a delta of one expert or of all, its scale times `weight`, however the base stores its experts.

    Raises:
        RefusedError: The base has no such experts, or other shapes; or the delta has more than its factors.
    """
    if not isinstance(delta, LowRank | StackedLowRank) or not delta.plain:
        raise RefusedError(target, f"a {type(delta).__name__} with more than its factors cannot be merged into experts")
    scale, folder = delta.scaling * weight, stored.folder
    if isinstance(delta, LowRank):
        yield _edit_in_stack(folder, architecture, target, delta, scale)
    elif stack := folder.weights.get(stored(target) or ""):
        yield from _edits_of_stack(target, stack, delta, scale)
    else:
        yield from _edits_by_expert(folder, stored, target, delta, scale)


def _edits_of_stack(target: str, stack: Weight, delta: StackedLowRank, scale: float) -> Iterator[ExpertEdit]:
    """Yield the edits of all experts in one tensor of the base."""
    experts, out, into = delta.shape
    out_in, in_out = (experts, out, into), (experts, into, out)
    transposed = delta.transposed_base
    if transposed is None:
        if out_in == in_out:
            raise RefusedError(target, "square, and whether the base stores it (in, out) or (out, in) is not known")
        transposed = stack.shape == in_out
    check_shape(target, stack.name, in_out if transposed else out_in, stack.shape)
    rows = stack.shape[1]
    for number in range(experts):
        factors = LowRank(delta.lora_A[number], delta.lora_B[number], delta.alpha)
        yield ExpertEdit(stack.name, AddLowRank(factors, scale, transposed), (number * rows, rows))


_LISTED = (
    {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)},
    {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
)
"""From a parameter of all experts to the modules of a single expert that have its rows, in each dialect."""


def _edits_by_expert(
    folder: Folder, stored: StoredNames, target: str, delta: StackedLowRank, scale: float
) -> Iterator[ExpertEdit]:
    """Yield the edits of a stacked parameter on a base that stores its experts one by one."""
    stack, _, parameter = target.rpartition(".")

    def weight_name(expert: int, module: str) -> str:
        return f"{stack}.{expert}.{module}.weight"

    dialects = (dialect.get(parameter, ()) for dialect in _LISTED)
    modules = next(
        (
            dialect_modules
            for dialect_modules in dialects
            if dialect_modules and all(stored(weight_name(0, module)) for module in dialect_modules)
        ),
        (),
    )
    if not modules:
        raise absent_error(target, folder.spec.source)
    experts, out, _ = delta.shape
    count = out // len(modules)
    for expert in range(experts):
        for number, module in enumerate(modules):
            name = stored(weight_name(expert, module))
            if name is None:
                raise RefusedError(target, f"{experts} experts, and the base has no {weight_name(expert, module)}")
            rows = slice(number * count, (number + 1) * count)
            factors = LowRank(delta.lora_A[expert], delta.lora_B[expert][rows], delta.alpha)
            check_shape(target, name, factors.shape, folder.weights[name].shape)
            yield ExpertEdit(name, AddLowRank(factors, scale, transposed=False))
    if last := stored(weight_name(experts, modules[0])):
        raise RefusedError(target, f"{experts} experts, and the base has more: {last}")


def _edit_in_stack(folder: Folder, architecture: Architecture | None, target: str, delta: LowRank, scale: float) -> ExpertEdit:
    """Return the edit of one expert on a base that stores all experts in one tensor."""
    stem, expert = (architecture.stem(target), architecture.expert(target)) if architecture else (None, None)
    parameter = architecture.stacked_module(stem) if architecture and stem else None
    stack = folder.weights.get(parameter or "")
    if architecture is None or stack is None or parameter is None or expert is None or stem is None:
        raise absent_error(target, folder.spec.source)
    stems = architecture.stems(parameter)
    differs_in_layout = bool(architecture.experts and (architecture.experts.transposed or architecture.experts.interleaved))
    # A fused stack holds the rows of gate and up one after the other.
    count = stack.shape[1] // len(stems) if len(stack.shape) == 3 else 0
    if differs_in_layout or not count or expert >= stack.shape[0] or delta.shape != (count, stack.shape[2]):
        raise RefusedError(target, f"changes a weight of shape {delta.shape}, the base's {parameter} is {stack.shape}")
    first = expert * stack.shape[1] + stems.index(stem) * count
    return ExpertEdit(parameter, AddLowRank(delta, scale, transposed=False), (first, count))
