"""The tensors of a base: a Hugging Face folder in floats or in NF4, or a GGUF file; each is read when it is needed.

transformers 5 renames, stacks and splits tensors as it loads them: Qwen3's experts are single tensors in files and one stacked
parameter in memory. Its own tables (`conversion_mapping.py`) and operations are used here, so that the trained model is the one
that it would load.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from adapterhub.training.layers import bitsandbytes_format, nf4_matrix
from adapterhub_converters import dtypes
from adapterhub_converters.bases.bitsandbytes_state import STATE_INFIX
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError
from adapterhub_converters.formats.gguf_model.to_folder import GGUFBase, GGUFWeights
from adapterhub_converters.lazy_dataclass import dataclass

_FLOATS = ("BF16", "F16", "F32")
_INTEGERS = ("I64", "I32")  # of tables, such as DeepSeek-V4's experts by token
_COMPUTED_BUFFERS = ("rotary_emb.inv_freq", ".attn.bias")  # in old checkpoints; models compute them


class Weights(ABC):
    """The tensors of a base, for the parameters of a model; a context manager.

    Attributes:
        location: The base, in messages.
        names: The names of all tensors.
        fresh: Matrices that were quantized here, with the dtype they had, by name; None if they are not collected.
    """

    location: str
    names: frozenset[str]
    fresh: dict[str, tuple[nf4_matrix.NF4, str]] | None = None

    def __init__(self) -> None:
        self._used: set[str] = set()
        self._open = ExitStack()
        self._conversions: dict[str, Conversion] = {}

    def bind(self, model: nn.Module, removed_paths: Iterable[str] = ()) -> None:
        """Map each parameter and buffer of `model` to its tensors; the parts at `removed_paths` were removed from the model."""
        # Some conversions ask for shapes of parameters, and layers of `model` are replaced while it is filled.
        self._model, self._conversions = copy.deepcopy(model), conversions(model, self.names)
        # Tensors of removed parts count as used, so that `check_all_used` does not refuse them.
        removed_prefixes = tuple(f"{path}." for path in removed_paths)
        for name, conversion in self._conversions.items():
            if name.startswith(removed_prefixes):
                self._used.update(source for source, _ in conversion.sources)

    def __contains__(self, name: object) -> bool:
        return name in self._conversions

    @abstractmethod
    def dtype(self, name: str) -> str:
        """Return the dtype that a tensor is stored in, as safetensors spells it."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""

    @abstractmethod
    def raw(self, name: str) -> np.ndarray:
        """Read a tensor as it is stored, into its own memory."""

    def stored_nf4(self, name: str) -> nf4_matrix.NF4 | None:
        """Read a matrix that is stored in NF4; None for any other tensor."""
        return None

    @property
    def quantized(self) -> bool:
        """Whether another program quantized the checkpoint: tensors that it left in floats then stay in floats."""
        return False

    def take(self, name: str, shape: tuple[int, ...], *, integers: bool = False) -> Any:
        """Read a parameter or a buffer in the dtype that its tensors are stored in: floats, or `integers`."""
        self._check(name)
        parameter = self._conversions[name].parameter(name, partial(self._read, integers=integers), self._model)
        if tuple(parameter.shape) != shape:
            raise RefusedError(self.location, f"{name}: shape {tuple(parameter.shape)}, but the model has {shape}")
        return parameter

    def _read(self, name: str, *, integers: bool) -> Any:
        if self.stored_nf4(name) is not None:
            raise RefusedError(self.location, f"{name}: stored in NF4 only, and its values before quantization are needed")
        if self.dtype(name) not in (_INTEGERS if integers else _FLOATS):
            raise RefusedError(
                self.location,
                f"{name}: {self.dtype(name)} {self.shape(name)} is not {'an integer' if integers else 'a float'} tensor",
            )
        self._used.add(name)
        return as_torch(self.raw(name))

    def nf4(self, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> Any:
        """Return a parameter of `shape` as an NF4 matrix `(out, in)`, stored so or quantized here.

        If another program quantized the checkpoint, a matrix that it left in floats is returned in floats.

        Args:
            transposed: Whether `shape` is `(in, out)`.
        """
        self._check(name)
        conversion = self._conversions[name]
        # Only a parameter that is a single tensor can be taken over in NF4: conversions work on floats.
        source = conversion.sources[0][0] if conversion.converter is None else None
        stored = self.stored_nf4(source) if source else None
        if source and stored is not None:
            if stored.shape != (shape[::-1] if transposed else shape):
                raise RefusedError(self.location, f"{name}: NF4 of shape {stored.shape}, but the model has {shape}")
            self._used.add(source)
            return stored
        dense = self.take(name, shape)
        dense = dense.t().contiguous() if transposed else dense
        if self.quantized:
            return dense
        matrix = nf4_matrix.quantize(dense, name)
        if source and self.fresh is not None:
            self.fresh[source] = (matrix, self.dtype(source))
        return matrix

    def _check(self, name: str) -> None:
        if name not in self:
            raise RefusedError(self.location, f"no tensor for the model's parameter {name!r}")

    def check_all_used(self, model: nn.Module) -> None:
        """Refuse a tensor that no parameter used: the model would not be the one in the files."""
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        unused = sorted(name for name in self.names - self._used - tied if not name.endswith(_COMPUTED_BUFFERS))
        if unused:
            raise RefusedError(self.location, f"tensor {unused[0]!r} belongs to no parameter of the model")
        # A tied tensor may be stored twice; then both copies have to be equal.
        for name in sorted((self.names - self._used) & tied):
            used = model.get_parameter(name)
            if self.shape(name) != tuple(used.shape) or not torch.equal(as_torch(self.raw(name)).to(used), used):
                problem = (
                    f"{name} differs from the table that config.json ties it to, and programs differ in which one they use"
                )
                raise RefusedError(self.location, problem, "Set tie_word_embeddings to false, or remove the tensor")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


class FolderWeights(Weights):
    """The tensors of the safetensors files `paths` of a folder: floats, or NF4 as bitsandbytes serializes it."""

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        super().__init__()
        self.location = str(folder)
        self._files: dict[str, SafetensorsFile] = {}
        try:
            for path in paths:
                file = self._open.enter_context(SafetensorsFile(path))
                self._files.update(dict.fromkeys(file.tensors, file))
        except BaseException:
            self._open.close()
            raise
        self._states = {name.partition(STATE_INFIX)[0]: name for name in self._files if STATE_INFIX in name}
        self.names = frozenset(name for name in self._files if not bitsandbytes_format.is_part(name))
        if not self.names:
            raise NotFoundError(self.location, "no weights: there is no model.safetensors")

    @property
    def quantized(self) -> bool:
        """Whether any tensor is in four bits."""
        return bool(self._states)

    def dtype(self, name: str) -> str:
        """Return the dtype in the header."""
        return self._files[name].tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in the header."""
        return self._files[name].tensors[name].shape

    def raw(self, name: str) -> np.ndarray:
        """Read the tensor at its offset."""
        if name not in self._files:
            raise FormatError(self.location, f"tensor {name!r} is missing")
        return self._files[name].tensor(name)

    def stored_nf4(self, name: str) -> nf4_matrix.NF4 | None:
        """Read a matrix in NF4 with its codes unchanged; None for any other tensor."""
        return bitsandbytes_format.read(name, self.raw, self._states[name], self.location) if name in self._states else None


class GGUFFileWeights(Weights):
    """The tensors of an open GGUF file, dequantized one at a time; the caller closes the file."""

    def __init__(self, base: GGUFBase) -> None:
        super().__init__()
        self.location = base.where
        self._tensors = GGUFWeights(base)
        self._shapes = self._tensors.shapes
        self.names = frozenset(self._shapes)

    def dtype(self, name: str) -> str:
        """Return the dtype after dequantization."""
        return "F32"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in Hugging Face's order."""
        return self._shapes[name]

    def raw(self, name: str) -> np.ndarray:
        """Dequantize the tensor with the gguf package."""
        return self._tensors.tensor(name)


def as_torch(array: np.ndarray) -> Any:
    """Return the same memory as a tensor; bfloat16 is passed as bits, because neither library knows the other's type."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_numpy(tensor: Tensor) -> np.ndarray:
    """Return a float32 copy in C order, for the writers."""
    return np.array(tensor.detach().cpu().to(torch.float32).numpy(), order="C")


def stored_name(array: np.ndarray) -> str:
    """Return the dtype of an array as safetensors spells it."""
    return dtypes.name_of(array.dtype)


# ---- Parameters that are made of other tensors


@dataclass(frozen=True, eq=False)
class Conversion:
    """The conversion of tensors into one or several parameters.

    Attributes:
        sources: The names of the tensors, each with the pattern that it matched.
        converter: The operation of transformers; None if the parameter is a single tensor, possibly with another name.
        first: The first parameter that it makes.
    """

    sources: tuple[tuple[str, str | None], ...]
    converter: Any
    first: str

    def parameter(self, name: str, read: Callable[[str], Tensor], model: nn.Module) -> Tensor:
        """Make the parameter `name`; `read` returns a tensor of the files, and `model` has shapes alone."""
        if self.converter is None:
            return read(self.sources[0][0])
        # Converters collect tensors, so each parameter needs its own copy.
        converter = copy.deepcopy(self.converter)
        for source, pattern in self.sources:
            converter.add_tensor(self.first, source, pattern, read(source))
        try:
            converted = converter.convert(self.first, model=model, config=model.config)[name]
        except (AttributeError, KeyError, RuntimeError, ValueError, TypeError) as error:
            problem = f"transformers cannot convert {self.sources[0][0]} to it ({str(error).splitlines()[0][:200]})"
            raise FormatError(name, problem) from error
        # Some operations return a list with a single tensor.
        return converted[0] if isinstance(converted, list) else converted


def conversions(model: nn.Module, names: Iterable[str]) -> dict[str, Conversion]:
    """Return the conversion of each parameter and buffer, by name, for files with tensors of these `names`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    parameters = model.state_dict()
    sources_by_target: dict[str, list[tuple[str, str | None]]] = {}
    # In natural order, so that expert 10 follows expert 9 in a stack.
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, parameters)
        if target not in parameters and name in parameters:
            # As transformers does: a saved name may look like one that a renaming is for (DeepSeek-V4's last norm).
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, parameters)
        sources_by_target.setdefault(target, []).append((name, pattern))
    conversions_by_name: dict[str, Conversion] = {}
    for target, sources in sources_by_target.items():
        converter = next((candidate for candidate in converters if sources[0][1] in candidate.source_patterns), None)
        conversion = Conversion(tuple(sources), converter, target)
        for name in _targets(target, converter):
            conversions_by_name[name] = conversion
    return conversions_by_name


def _targets(first: str, converter: Any) -> list[str]:
    if converter is None or len(converter.target_patterns) == 1:
        return [first]
    matching_pattern = next((pattern for pattern in converter.target_patterns if pattern in first), None)
    if matching_pattern is None:
        return [first]
    return [first.replace(matching_pattern, target_pattern) for target_pattern in converter.target_patterns]
