"""The weights of a model in a Hugging Face folder, whichever of its files each is in."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np

from adapterhub_converters.containers.safetensors_file import SafetensorsFile, TensorInfo

from . import weight_files


class ModelWeights:
    """Every tensor of a model folder by its name, read when asked for; empty without safetensors. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._files: dict[str, SafetensorsFile] = {}
        self._stack = ExitStack()
        try:
            for path in weight_files(folder):
                file = self._stack.enter_context(SafetensorsFile(path))
                self._files.update(dict.fromkeys(file.tensors, file))
        except BaseException:
            self._stack.close()
            raise

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def info(self, name: str) -> TensorInfo:
        """Dtype, shape and place of a tensor that is there."""
        return self._files[name].tensors[name]

    def stored(self, name: str) -> np.ndarray:
        """A tensor that is there, in its own dtype."""
        return self._files[name].tensor(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
