"""Whole models read row by row in float32, a Hugging Face folder or a GGUF file, under Hugging Face's names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import bases as base_model
from adapterhub_converters import dtypes
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.gguf_types import MAGIC
from adapterhub_converters.containers.open_file import open_regular
from adapterhub_converters.errors import RefusedError

from .read_base import Folder, Weight, read_folder
from .tensor_files import OpenFiles, StoredRows, TensorSource, new_buffer
from .tensor_types import kind

if TYPE_CHECKING:
    from adapterhub_converters.formats.gguf_model.arrangement import ArrangedTensor, Arrangement, SourcePart

F32Array = NDArray[np.float32]


class Model(AbstractContextManager["Model"], Protocol):
    """The weights of a model; a context manager.

    Attributes:
        absent: Tensors of the original folder that this file format leaves out.
    """

    location: str
    names: set[str]
    absent: frozenset[str]

    def dtype(self, name: str) -> str:
        """Return the type of a stored tensor: `BF16`, `Q4_K` …"""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    def rows(self, name: str, start: int, stop: int) -> F32Array:
        """Return rows `start` to `stop` of a tensor, seen as a matrix (`as_matrix`)."""

    def shift(self, name: str) -> float:
        """Return the number that was added to a tensor before it was stored, and that `rows` subtracts."""

    def release(self, name: str) -> None:
        """Release the memory of a tensor."""


def open_model(path: Path) -> Model:
    """Open the model in a folder or a .gguf file, dequantized if it is quantized.

    Raises:
        RefusedError: The weights have an unknown quantization, or are not safetensors.
    """
    if _is_gguf(path):
        return GgufModel(path)
    if path.is_file():
        raise RefusedError(str(path), "neither a folder nor a GGUF file", "Name the folder of the model")
    return FolderModel(read_folder(path))


def _is_gguf(path: Path) -> bool:
    if not path.is_file() or path.suffix == ".gguf":
        return path.is_file()
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def open_like(path: Path, folder: Folder, added: Mapping[str, Weight]) -> Model:
    """Open the model at `path`, which may be made from `folder`.

    A GGUF's tensors that combine or rearrange those of the folder then appear under the folder's names.
    """
    if not _is_gguf(path):
        return open_model(path)
    from adapterhub_converters.formats.gguf_model.arrangement import arrange  # late: only a GGUF of a folder is rearranged
    from adapterhub_converters.formats.gguf_model.model_config import complete_config

    try:
        architecture = architecture_lookup.by_class(folder.spec.architecture, str(folder.path), folder=True)
        shapes = {name: weight.shape for name, weight in (*folder.weights.items(), *added.items())}
        plan = arrange(architecture, shapes, complete_config(folder.config, str(folder.path)))
    except RefusedError:
        # An architecture or config that cannot be arranged: compare under GGUF's own names.
        return GgufModel(path)
    weights = {**folder.weights, **added}
    decays = {part.source: weights[part.source] for tensor in plan.tensors if tensor.decay for part in tensor.parts}
    return GgufModel(path, plan, shapes, decays)


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return a tensor's rows and columns as a matrix: a vector is a column, the matrices of a stack follow one another."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


class FolderModel:
    """A model in a folder.

    Args:
        added: Tensors that a merge adds to it, as they are before the merge.
        training_sources: Numbers to use in place of the folder's own, by tensor name.
    """

    def __init__(
        self,
        folder: Folder,
        added: Mapping[str, Weight] | None = None,
        training_sources: Mapping[str, TensorSource] | None = None,
    ) -> None:
        self._training_sources = training_sources or {}
        self.location, self.spec = str(folder.path), folder.spec
        self._weights = {**folder.weights, **(added or {})}
        self._method = folder.method
        self._opened = folder.opened
        self.names = set(self._weights)
        self.absent: frozenset[str] = frozenset()

    def dtype(self, name: str) -> str:
        """Return the type as named in safetensors, or the quantization."""
        weight = self._weights[name]
        return self._method or "" if weight.dequantized else weight.dtype

    def floats(self, name: str) -> str:
        """Return the type of floats of a tensor, before quantization."""
        return self._weights[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._weights[name].shape

    def rows(self, name: str, start: int, stop: int) -> F32Array:
        """Return rows, read from the file."""
        weight = self._weights[name]
        out = np.empty((stop - start, weight.columns), np.float32)
        (self._training_sources.get(name) or weight.source()).read(self._opened, start, stop, out, new_buffer)
        return out

    def shift(self, name: str) -> float:
        """Return zero: a folder stores all numbers unshifted."""
        return 0.0

    def release(self, name: str) -> None:
        """Do nothing: no memory is held."""

    def __enter__(self) -> FolderModel:
        self._opened.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.__exit__()


class GgufModel:
    """A model in GGUF, dequantized as it is read, the rows of q and k in Hugging Face's order.

    Args:
        plan: How a folder with tensors of these `shapes` becomes this GGUF; then its parts have the folder's names.
        decays: The folder's tensors whose numbers x become -exp(x), which cannot be inverted exactly without them.

    Attributes:
        absent: Tensors of the folder that this GGUF does not contain, such as those of a vision model.
    """

    def __init__(
        self,
        path: Path,
        plan: Arrangement | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        decays: Mapping[str, Weight] | None = None,
    ) -> None:
        self.location = str(path)
        spec = base_model.read_base(path)
        self.config: Mapping[str, Any] = spec.config
        self._file = GGUFFile(path)
        try:
            architecture = self._file.header.text("general.architecture")
            experts = any("_exps." in name for name in self._file.tensors)
            self._architecture = architecture_lookup.by_gguf(architecture, self.location, experts=experts)
        except BaseException:
            # `__exit__` will not run for an object whose construction fails.
            self._file.__exit__(None, None, None)
            raise
        self._stored_names = {self._architecture.parameter(name) or name: name for name in self._file.tensors}
        self._shapes, self._decays = shapes or {}, decays or {}
        self._parts = self._rearranged_parts(plan.tensors if plan else ())
        self._numbers = self._metadata_tensors(plan.numbers if plan else {})
        expected = {name for name in self._shapes if not name.endswith("lm_head.weight")}
        self.absent = frozenset(expected - plan.sources) if plan else frozenset()
        rearranged = {tensor.name for parts in self._parts.values() for tensor, _, _ in parts}
        self._stored_names = {
            name: stored_name for name, stored_name in self._stored_names.items() if stored_name not in rearranged
        }
        self.names = set(self._stored_names) | set(self._parts) | set(self._numbers)
        self._opened, self._path = OpenFiles(), path
        self._cached: tuple[str, F32Array] | None = None

    def _rearranged_parts(self, plan: Sequence[ArrangedTensor]) -> dict[str, list[tuple[ArrangedTensor, int, SourcePart]]]:
        """Return the parts of each tensor of the folder that this file stores in another form, each with its first row.

        A tensor that is merely renamed or shifted is not among them.
        """
        parts_by_source: dict[str, list[tuple[ArrangedTensor, int, SourcePart]]] = {}
        for tensor in plan:
            at = 0
            for part in tensor.parts:
                parts_by_source.setdefault(part.source, []).append((tensor, at, part))
                at += tensor.rows // len(tensor.parts)
        stored_shapes = {name: info.shape for name, info in self._file.tensors.items()}
        return {
            name: parts
            for name, parts in parts_by_source.items()
            if all(stored_shapes.get(tensor.name) == tensor.shape for tensor, _, _ in parts)
            and (len(parts) > 1 or self._is_rearranged(name, *parts[0]))
        }

    def _is_rearranged(self, name: str, tensor: ArrangedTensor, _: int, part: SourcePart) -> bool:
        """Return whether a tensor differs from its source in the folder by more than a shift."""
        ordered = part.transposed or part.picks is not None or part.columns is not None
        return ordered or tensor.decay or self._stored_names.get(name) != tensor.name or self._shapes[name] != tensor.shape

    def _metadata_tensors(self, numbers: Mapping[str, Sequence[str]]) -> dict[str, F32Array]:
        """Return the tensors of the folder whose numbers are in the metadata."""
        arrays: dict[str, F32Array] = {}
        for key, tensor_names in numbers.items():
            values = self._file.header.metadata.get(key)
            if isinstance(values, list | np.ndarray) and len(values) == len(tensor_names):
                arrays |= {name: np.array([[value]], np.float32) for name, value in zip(tensor_names, values, strict=True)}
        return arrays

    def dtype(self, name: str) -> str:
        """Return the type as named in GGUF."""
        if name in self._numbers:
            return "F32"
        stored_name = self._parts[name][0][0].name if name in self._parts else self._stored_names[name]
        return self._file.tensors[stored_name].type_name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor in numpy's order."""
        from_plan = name in self._parts or name in self._numbers
        return self._shapes[name] if from_plan else self._file.tensors[self._stored_names[name]].shape

    def _gather(self, name: str) -> F32Array:
        """Put a tensor of the folder together from its parts."""
        gathered = np.empty(as_matrix(self._shapes[name]), np.float32)
        for tensor, at, part in self._parts[name]:
            info, stored_as = self._file.tensors[tensor.name], kind(self.dtype(name))
            if stored_as is None:
                raise RefusedError(tensor.name, f"is {info.type_name}, a type without weights to compare")
            rows = np.empty((tensor.rows // len(tensor.parts), tensor.columns), np.float32)
            stored = StoredRows(self._path, info.offset, tensor.rows, tensor.columns, stored_as)
            stored.read(self._opened, at, at + len(rows), rows, new_buffer)
            slab = gathered[part.first : part.first + part.height]
            slab = slab.T if part.transposed else slab
            picks = slice(None) if part.picks is None else part.picks
            columns = slice(None) if part.columns is None else part.columns
            slab[picks, columns] = self._undo_decay(part, rows) if tensor.decay else rows - np.float32(tensor.shift)
        return gathered

    def _undo_decay(self, part: SourcePart, rows: F32Array) -> F32Array:
        """Return the numbers x behind `rows`, which hold -exp(x): the folder's own where they give exactly these rows."""
        from adapterhub_converters.formats.gguf_model.arrangement import negative_exp  # late, as in `open_like`

        folder_weight = self._decays[part.source]
        folder_rows = np.empty((folder_weight.rows, folder_weight.columns), np.float32)
        folder_weight.source().read(self._opened, 0, folder_weight.rows, folder_rows, new_buffer)
        folder_rows = folder_rows if part.picks is None else folder_rows[part.picks]
        return np.where(negative_exp(folder_rows) == rows, folder_rows, np.log(-rows))

    def rows(self, name: str, start: int, stop: int) -> F32Array:
        """Return rows of a tensor, which is dequantized as a whole and cached."""
        if name in self._numbers:
            return self._numbers[name][start:stop]
        if name in self._parts and (self._cached is None or self._cached[0] != name):
            self._cached = name, self._gather(name)
        if self._cached is None or self._cached[0] != name:
            tensor = self._file.tensor(self._stored_names[name]).astype(np.float32) - np.float32(self.shift(name))
            order = self._architecture.order(name.rpartition(".")[0], self.config, self.location)
            ordered = architecture_lookup.unpermute_rows(tensor, order) if order else tensor
            self._cached = name, ordered.reshape(as_matrix(ordered.shape))
        return self._cached[1][start:stop].copy()

    def shift(self, name: str) -> float:
        """Return 1 for the norms of Gemma and Nemotron, else 0."""
        return self._architecture.shift(name)

    def release(self, name: str) -> None:
        """Release the cached tensor."""
        self._cached = None

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.__exit__()
        self._file.__exit__(None, None, None)


def is_float(dtype: str) -> bool:
    """Return whether a type stores plain floats."""
    return dtype in dtypes.FLOATS


def match_names(names: set[str], available: set[str]) -> dict[str, str]:
    """Map `names` to those `available`: the same, or all with one leading component more or less."""
    heads = sorted({name.partition(".")[0] + "." for name in available | names})
    renamings: list[tuple[str, str]] = [("", ""), *((head, "") for head in heads), *(("", head) for head in heads)]
    prefix, dropped_prefix = max(
        renamings, key=lambda renaming: len({renaming[0] + name.removeprefix(renaming[1]) for name in names} & available)
    )
    return {name: new for name in names if (new := prefix + name.removeprefix(dropped_prefix)) in available}
