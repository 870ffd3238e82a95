"""The files of a base model on disk: each is opened at most twice, and each digest is computed at most once.

The first opening is for headers, small files and digests, the second for the tensors (`base_tensors`). Other code gets the
base's `spec` instead of reading its files again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Self

from adapterhub import digest_cache
from adapterhub.digest import Digest, copy_hashing
from adapterhub_converters.bases import BaseSpec, LocalFiles, gguf_base, read_base, read_files, weight_files
from adapterhub_converters.bases.quantized_shapes import quantization_settings
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.errors import NotFoundError, RefusedError, StoppedError
from adapterhub_converters.formats.gguf_model.to_folder import GGUFBase, documents

from . import tokenizer_files, transformers_api
from .base_tensors import FolderWeights, GGUFFileWeights, Weights

_CONFIG = "config.json"


class BaseFiles:
    """The files of a Hugging Face folder or a GGUF file; a context manager that keeps them open.

    Attributes:
        path: The folder or file.
        cache: The folder of the digest cache and of quantized bases; None for neither.
        spec: The base as described by its headers and config.
    """

    def __init__(self, path: Path, cache: Path | None = None) -> None:
        self.path, self.cache = path, cache
        # Without such a file, only the suffix can tell what was meant.
        self._is_gguf = not path.is_dir() and (path.suffix == ".gguf" or path.is_file())
        self._stack = ExitStack()
        self._files = _OpenFiles(path if path.is_dir() else path.parent, self._stack)
        self._digests: Future[list[dict[str, Any]]] | None = None
        self._closed = False
        try:
            self.spec = self._read_spec()
        except BaseException:
            self._stack.close()
            raise

    def _read_spec(self) -> BaseSpec:
        if (self.path / _CONFIG if self.path.is_dir() else self.path).exists():
            return read_files(self._files, "" if self.path.is_dir() else self.path.name)
        return read_base(self.path)  # which reports what is missing

    @cached_property
    def weight_files(self) -> list[Path]:
        """The files of the weights, in the order of the base's index."""
        return gguf_base.part_paths(self.path) if self._is_gguf else weight_files(self.path)

    @property
    def digests(self) -> list[dict[str, Any]]:
        """The name, digest and size in bytes of each weight file; shapes alone do not tell a base from its fine-tunes."""
        return self._hashing().result()

    def _hashing(self) -> Future[list[dict[str, Any]]]:
        if self._digests is None:
            self._digests = self._stack.enter_context(ThreadPoolExecutor(1)).submit(self._hash_all)
        return self._digests

    def _hash_all(self) -> list[dict[str, Any]]:
        entries = []
        for path in self.weight_files:
            digest = digest_cache.digest(path, self.cache, partial(self._hash, path.name))
            entries.append({"path": path.name, "digest": digest, "size": path.stat().st_size})
        return entries

    def _hash(self, name: str) -> Digest:
        try:
            with self._files.open_file(name) as file:
                return copy_hashing(file, None, on_bytes=self._check_open)[0]
        except FileNotFoundError as error:
            raise NotFoundError(self._files.label(name), "no such file", code="no-such-file") from error

    def _check_open(self, _: int) -> None:
        if self._closed:
            raise StoppedError(str(self.path), "closed while its digests were computed")

    @cached_property
    def config_text(self) -> str:
        """The text of config.json, which is part of the metadata of a GGUF file."""
        if self._is_gguf:
            return self._documents[_CONFIG]
        raw = self._files.read_whole(_CONFIG, json_file.MAX_CONFIG)
        if raw is None:
            raise NotFoundError(str(self.path), "not a base model: there is no config.json", code="not-a-base")
        return raw.decode()

    def config_and_tokenizer(self) -> tuple[Any, Any]:
        """Return the config and the tokenizer that transformers builds; errors are those of `transformers_api` and `folder`."""
        location = str(self.path)
        document = json_file.parse_object(self.config_text, f"{location}: {_CONFIG}")
        return transformers_api.config_and_tokenizer(self.folder, document, location=location)

    @cached_property
    def folder(self) -> Path:
        """A folder with config.json and tokenizer for transformers: the base, or a temporary one made from a GGUF file.

        Raises:
            RefusedError: The weights are quantized with anything but bitsandbytes' four bits, or a file of the tokenizer is
                one that transformers must not open (`tokenizer_files`).
        """
        if not self._is_gguf:
            _check_quantization_method(
                json_file.parse_object(self.config_text, self._files.label(_CONFIG)), self._files.label(_CONFIG)
            )
            tokenizer_files.check(self.path, self._files.read_whole)
            return self.path
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        for name, text in self._documents.items():
            json_file.write_text(folder / name, text)
        return folder

    @cached_property
    def _gguf(self) -> GGUFBase:
        return GGUFBase(str(self.path), self._stack.enter_context(GGUFFile(self.path)))

    @cached_property
    def _documents(self) -> dict[str, str]:
        return documents(self._gguf)

    def weights(self) -> Weights:
        """Open the tensors; the caller closes them.

        Meanwhile, digests that have not been needed yet are computed on a thread, so that the disk is read once.
        """
        self._hashing()
        return GGUFFileWeights(self._gguf) if self._is_gguf else FolderWeights(self.path, self.weight_files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Stops the hashing thread, for which closing the stack would otherwise wait.
        self._closed = True
        self._stack.close()


def _check_quantization_method(config: dict[str, Any], location: str) -> None:
    quantization = quantization_settings(config)
    method = quantization.get("quant_method", "bitsandbytes" if quantization.get("load_in_4bit") else None)
    if quantization and (method != "bitsandbytes" or quantization.get("load_in_8bit")):
        method_name = "LLM.int8" if method == "bitsandbytes" else method or "an unknown method"
        raise RefusedError(location, f"weights quantized with {method_name} cannot be trained on", "Use the model in 16 bits")


class _OpenFiles(LocalFiles):
    """The files of a folder, each opened once and kept open."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        super().__init__(folder)
        self._stack = stack
        self._handles: dict[str, BinaryIO] = {}

    @contextmanager
    def open_file(self, name: str) -> Iterator[BinaryIO]:
        """Yield the open file, at its beginning."""
        if name not in self._handles:
            self._handles[name] = self._stack.enter_context(super().open_file(name))
        self._handles[name].seek(0)
        yield self._handles[name]
