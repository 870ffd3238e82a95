"""Whole models as numbers to be read row by row: a Hugging Face folder or a GGUF, under Hugging Face's names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters import base as base_model
from adapterhub_converters import dtypes, names
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.files.gguf_file import MAGIC, GGUFFile

from .hf_base import Folder, Weight, read_folder
from .running import Opened, Source

F32Array = NDArray[np.float32]


class Model(AbstractContextManager["Model"], Protocol):
    """The weights of a model; a context manager."""

    where: str
    names: set[str]

    def dtype(self, name: str) -> str:
        """What a tensor is stored as: `BF16`, `Q4_K` …"""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""

    def rows(self, name: str, start: int, stop: int) -> F32Array:
        """Some of its rows in float32, as `as_matrix` counts them."""

    def done(self, name: str) -> None:
        """Let go of the memory of a tensor."""


def open_model(path: Path) -> Model:
    """The model in a folder or a .gguf file, one that is quantised dequantised.

    Raises:
        RefusedError: Its weights are quantised in a way that is not read here, or are no safetensors.
    """
    if path.is_file() and (path.suffix == ".gguf" or _begins(path) == MAGIC):
        return GgufModel(path)
    if path.is_file():
        raise RefusedError(str(path), "a model is a folder or a GGUF file here", "Name its folder")
    return FolderModel(read_folder(path, dequantise=True))


def _begins(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(len(MAGIC))


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a tensor as it is read here: a vector is a column, of a stack the rows follow one another."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


class FolderModel:
    """One in safetensors; with `added`, tensors that a merge adds to it, as they are to begin with; `seen` instead of its own
    numbers, by name."""

    def __init__(
        self, folder: Folder, added: Mapping[str, Weight] | None = None, seen: Mapping[str, Source] | None = None
    ) -> None:
        self._seen = seen or {}
        self.where, self.spec = str(folder.path), folder.spec
        self._weights = {**folder.weights, **(added or {})}
        self._method = folder.method
        self._opened = Opened()
        self.names = set(self._weights)

    def dtype(self, name: str) -> str:
        """As safetensors calls it; how it is quantised, if it is."""
        weight = self._weights[name]
        return self._method or "" if weight.unpacked else weight.dtype

    def floats(self, name: str) -> str:
        """The floats that it has, or had before it was quantised."""
        return self._weights[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return self._weights[name].shape

    def rows(self, name: str, start: int, stop: int) -> F32Array:
        """Some rows, read from the file."""
        weight = self._weights[name]
        out = np.empty((stop - start, weight.columns), np.float32)
        (self._seen.get(name) or weight.source()).read(
            self._opened, start, stop, out, lambda _use, size: np.empty(size, np.uint8)
        )
        return out

    def done(self, name: str) -> None:
        """Nothing is held."""

    def __enter__(self) -> FolderModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.__exit__()


class GgufModel:
    """One in GGUF, dequantised as it is read, the rows of q and k in Hugging Face's order again."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        spec = base_model.read_base(path)
        self.config: Mapping[str, Any] = spec.config
        self._file = GGUFFile(path)
        try:
            architecture = self._file.header.text("general.architecture")
            experts = any("_exps." in name for name in self._file.tensors)
            self._architecture = names.by_gguf(architecture, self.where, experts=experts)
        except BaseException:
            self._file.__exit__(None, None, None)
            raise
        self._of = {self._architecture.parameter(name) or name: name for name in self._file.tensors}
        self.names = set(self._of)
        self._held: tuple[str, F32Array] | None = None

    def dtype(self, name: str) -> str:
        """As GGUF calls it."""
        return self._file.tensors[self._of[name]].type_name

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape in numpy's order."""
        return self._file.tensors[self._of[name]].shape

    def rows(self, name: str, start: int, stop: int) -> F32Array:
        """Some rows of the tensor, which is dequantised as a whole."""
        if self._held is None or self._held[0] != name:
            tensor = self._file.tensor(self._of[name]).astype(np.float32)
            order = self._architecture.order(name.rpartition(".")[0], self.config, self.where)
            whole = names.unpermuted(tensor, order) if order else tensor
            self._held = name, whole.reshape(as_matrix(whole.shape))
        return self._held[1][start:stop].copy()

    def done(self, name: str) -> None:
        """Forget it."""
        self._held = None

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__(None, None, None)


def is_float(dtype: str) -> bool:
    """Whether a tensor of this type holds its numbers as they are."""
    return dtype in dtypes.FLOATS


def renamed(wanted: set[str], have: set[str]) -> dict[str, str]:
    """What a model calls the tensors of another: the same, or with one leading component more or less, all alike."""
    heads = sorted({name.partition(".")[0] + "." for name in have | wanted})
    ways: list[tuple[str, str]] = [("", ""), *((head, "") for head in heads), *(("", head) for head in heads)]
    more, less = max(ways, key=lambda way: len({way[0] + name.removeprefix(way[1]) for name in wanted} & have))
    return {name: new for name in wanted if (new := more + name.removeprefix(less)) in have}
