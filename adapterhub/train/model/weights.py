"""Where a base's numbers come from: a Hugging Face folder in floats or in NF4, or a GGUF file; each tensor when asked for.

Beside the tensors stand the small files that transformers builds model and tokenizer from, which a GGUF file has in its
metadata. What else a base may be quantized with is refused by name.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from adapterhub.train.layers import bitsandbytes, nf4
from adapterhub_converters import dtypes
from adapterhub_converters.bases import weight_files
from adapterhub_converters.bases.bitsandbytes import STATE
from adapterhub_converters.bases.quantized import settings
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError
from adapterhub_converters.formats.gguf_model.to_folder import GGUFBase, GGUFWeights, documents

from . import checkpoint_names

_FLOATS = ("BF16", "F16", "F32")
_DERIVED = ("rotary_emb.inv_freq", ".attn.bias")  # buffers that old checkpoints hold and that a model computes itself


class Weights(ABC):
    """The tensors of a base, for the parameters of a model. A context manager.

    Attributes:
        where: What messages call it.
        names: Of all tensors there are.
        made: What `nf4` quantized, by name; None where nobody wants to keep it.
    """

    where: str
    names: frozenset[str]
    made: dict[str, tuple[nf4.NF4, str]] | None = None

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._open = ExitStack()
        self._recipes: dict[str, checkpoint_names.Recipe] = {}

    def bind(self, model: Any) -> None:
        """Find which tensors each parameter and buffer of `model` is made of."""
        self._model, self._recipes = model, checkpoint_names.recipes(model, self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._recipes

    @abstractmethod
    def dtype(self, name: str) -> str:
        """How a tensor is stored, in safetensors' words."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""

    @abstractmethod
    def raw(self, name: str) -> np.ndarray:
        """A tensor as it is stored, in memory of its own."""

    def held(self, name: str) -> nf4.NF4 | None:
        """A matrix that is stored in NF4; None for one that isn't."""
        return None

    @property
    def quantized(self) -> bool:
        """Whether somebody else has quantized it: what isn't in NF4 then stays as it is."""
        return False

    def take(self, name: str, shape: tuple[int, ...]) -> Any:
        """The parameter, in the dtype that its tensors are stored in, which must be a float."""
        self._check(name)
        made = self._recipes[name].made(name, self._read, self._model)
        if tuple(made.shape) != shape:
            raise RefusedError(self.where, f"{name}: {tuple(made.shape)} isn't of the model's shape {shape}")
        return made

    def _read(self, name: str) -> Any:
        if self.held(name) is not None:
            raise RefusedError(self.where, f"{name}: only its NF4 is there, and its numbers before that are needed")
        if self.dtype(name) not in _FLOATS:
            raise RefusedError(self.where, f"{name}: {self.dtype(name)} {self.shape(name)} isn't a float tensor")
        self._taken.add(name)
        return as_torch(self.raw(name))

    def nf4(self, name: str, shape: tuple[int, ...], *, transposed: bool = False) -> Any:
        """The matrix in NF4, `(out, in)`, which a parameter of `shape` is or, `transposed`, is turned to.

        As it is stored, or quantized here. Where others quantized, what they left in floats stays so.
        """
        self._check(name)
        recipe = self._recipes[name]
        own = recipe.sources[0][0] if recipe.converter is None else None
        held = self.held(own) if own else None
        if own and held is not None:
            if held.shape != (shape[::-1] if transposed else shape):
                raise RefusedError(self.where, f"{name}: NF4 {held.shape} isn't of shape {shape}")
            self._taken.add(own)
            return held
        dense = self.take(name, shape)
        dense = dense.t().contiguous() if transposed else dense
        if self.quantized:
            return dense
        made = nf4.quantize(dense, name)
        if own and self.made is not None:
            self.made[own] = (made, self.dtype(own))
        return made

    def _check(self, name: str) -> None:
        if name not in self:
            raise RefusedError(self.where, f"the model has a parameter {name!r}, its files have no such tensor")

    def check_all_used(self, model: Any) -> None:
        """Refuse a tensor that no parameter took: the model would not be the one in the files."""
        tied = set(getattr(model, "all_tied_weights_keys", None) or ())
        left = sorted(name for name in self.names - self._taken - tied if not name.endswith(_DERIVED))
        if left:
            raise RefusedError(self.where, f"tensor {left[0]!r} belongs to no parameter of the model")
        for name in sorted((self.names - self._taken) & tied):
            used = model.get_parameter(name)
            if self.shape(name) != tuple(used.shape) or not torch.equal(as_torch(self.raw(name)).to(used), used):
                what = f"{name} isn't the table that config.json ties it to, and programs differ in which of the two they take"
                raise RefusedError(self.where, what, "Set tie_word_embeddings to false, or take the tensor out")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


class FolderWeights(Weights):
    """Those of a Hugging Face folder: floats, or NF4 as bitsandbytes serializes it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.where = str(folder)
        self._files: dict[str, SafetensorsFile] = {}
        try:
            for path in weight_files(folder):
                file = self._open.enter_context(SafetensorsFile(path))
                self._files.update(dict.fromkeys(file.tensors, file))
        except BaseException:
            self._open.close()
            raise
        self._states = {name.partition(STATE)[0]: name for name in self._files if STATE in name}
        self.names = frozenset(name for name in self._files if not bitsandbytes.is_beside(name))
        if not self.names:
            raise NotFoundError(self.where, "no weights: there is no model.safetensors")

    @property
    def quantized(self) -> bool:
        """Whether any is in four bits."""
        return bool(self._states)

    def dtype(self, name: str) -> str:
        """As the header says."""
        return self._files[name].tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """As the header says."""
        return self._files[name].tensors[name].shape

    def raw(self, name: str) -> np.ndarray:
        """Read at its offset."""
        if name not in self._files:
            raise FormatError(self.where, f"tensor {name!r} is missing")
        return self._files[name].tensor(name)

    def held(self, name: str) -> nf4.NF4 | None:
        """The codes as they are."""
        return bitsandbytes.read(name, self.raw, self._states[name], self.where) if name in self._states else None


class FileWeights(Weights):
    """Those of a GGUF file, dequantized one at a time."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.where = str(path)
        file = self._open.enter_context(GGUFFile(path))
        try:
            self.base = GGUFBase(self.where, file)
            self._tensors = GGUFWeights(self.base)
        except BaseException:
            self._open.close()
            raise
        self._shapes = self._tensors.shapes
        self.names = frozenset(self._shapes)

    def dtype(self, name: str) -> str:
        """What it is dequantized to."""
        return "F32"

    def shape(self, name: str) -> tuple[int, ...]:
        """In Hugging Face's order."""
        return self._shapes[name]

    def raw(self, name: str) -> np.ndarray:
        """Dequantized by the gguf package."""
        return self._tensors.tensor(name)


def is_gguf(path: Path) -> bool:
    """Whether a base is a GGUF file rather than a folder."""
    return not path.is_dir() and (path.suffix == ".gguf" or path.is_file())


def opened(path: Path) -> Weights:
    """The weights of the base at `path`; RefusedError for a folder that is quantized with anything but NF4."""
    return FileWeights(path) if is_gguf(path) else FolderWeights(path)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A folder with config.json and tokenizer of the base at `path`: itself, or for the block one made from a GGUF file."""
    if not is_gguf(path):
        if not (path / "config.json").is_file():
            raise NotFoundError(str(path), "no base model: there is no config.json")
        _check_method(path)
        yield path
        return
    with GGUFFile(path) as file, tempfile.TemporaryDirectory() as name:
        for document, text in documents(GGUFBase(str(path), file)).items():
            json_file.write_text(Path(name, document), text)
        yield Path(name)


def _check_method(folder: Path) -> None:
    said = settings(json_file.read_object(folder / "config.json"))
    method = said.get("quant_method", "bitsandbytes" if said.get("load_in_4bit") else None)
    if said and (method != "bitsandbytes" or said.get("load_in_8bit")):
        name = "LLM.int8" if method == "bitsandbytes" else method or "an unknown method"
        raise RefusedError(
            f"{folder}/config.json",
            f"the weights are quantized with {name}, which isn't trained on",
            "Take the model in 16 bits",
        )


def as_torch(array: np.ndarray) -> Any:
    """The same memory as a tensor; bfloat16 goes by its bits, since neither library knows the other's."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_numpy(tensor: Any) -> np.ndarray:
    """A float32 copy in C order, for the writers."""
    return np.array(tensor.detach().cpu().to(torch.float32).numpy(), order="C")


def stored_name(array: np.ndarray) -> str:
    """The dtype of an array in safetensors' words."""
    return dtypes.name_of(array.dtype)
