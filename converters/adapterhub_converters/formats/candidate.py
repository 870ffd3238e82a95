"""A path that may hold an adapter, opened once no matter how many formats look at it, and then read."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from adapterhub_converters.adapter_files import ADAPTER_CONFIG, ADAPTER_JSON, resolve_adapter
from adapterhub_converters.containers import json_file, safetensors_file, safetensors_header
from adapterhub_converters.containers.open_file import OpenFile
from adapterhub_converters.errors import FormatError

if TYPE_CHECKING:
    from adapterhub_converters.containers import gguf_file

_GGUF_MAGIC = b"GGUF"
# Ends of names of tensors that every language model has, in any of its shards.
# They tell a shard of a model, which has no config next to it, from an adapter in a single file.
_MODEL_TENSOR_ENDS = (
    "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "norm.weight", "layernorm.weight",
    "ln_1.weight", "down_proj.weight", "o_proj.weight",
)  # fmt: skip


class _Headers(OpenFile):
    """The header of a file that may be a GGUF or a safetensors file."""

    is_gguf = False
    gguf: gguf_file.GGUFHeader | None = None
    safetensors: safetensors_header.SafetensorsHeader | None = None

    def _parse(self, size: int) -> None:
        # GGUF has a magic number; a safetensors file begins with the length of its header, which may be anything.
        self.is_gguf = self._read_at(0, len(_GGUF_MAGIC)) == _GGUF_MAGIC
        try:
            if self.is_gguf:
                from adapterhub_converters.containers import gguf_file  # late: checks of PEFT folders do without it

                self.gguf = gguf_file.read_header(self._read_at, size, self.location)
            else:
                self.safetensors = safetensors_header.read_header(self._read_at, size, self.location)
        except FormatError:
            return  # reading the file gives the reason


class Candidate:
    """A path with the evidence that formats are recognized by: a file's header and a folder's config, each read once.

    The file stays open for the reader of its format, or until nobody holds the candidate.

    Args:
        path: The path.
        config: The text of the folder's `adapter_config.json`, if the caller has read it.
        folder: The folder that the path is a file of, as a candidate.
    """

    def __init__(self, path: Path, *, config: str | None = None, folder: Candidate | None = None) -> None:
        self.path = path
        self._config = config
        self._folder = folder
        self._files: dict[str, Candidate] = {}
        self._digest = ""

    @classmethod
    def of(cls, path: Path | Candidate) -> Candidate:
        """Return a candidate as it is, and one for a path."""
        return path if isinstance(path, Candidate) else cls(path)

    def file(self, name: str) -> Candidate:
        """Return a file in the folder as a candidate of its own."""
        return self._files.setdefault(name, Candidate(self.path / name, folder=self))

    @property
    def adapter(self) -> Candidate:
        """The adapter that the path means, as `resolve_adapter` finds it."""
        path = resolve_adapter(self.path)
        return self if path == self.path else self.file(path.name)

    @cached_property
    def config(self) -> str:
        """The text of the `adapter_config.json` in a folder; empty for a file, and without one."""
        path = self.path / ADAPTER_CONFIG
        if self._config is not None:
            return self._config
        return json_file.read_text(path) if path.is_file() else ""

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """The `adapter.json` in a folder or next to a file; empty without one."""
        if self._folder is not None:
            return self._folder.record
        path = (self.path if self.path.is_dir() else self.path.parent) / ADAPTER_JSON
        return json_file.read_object(path) if path.is_file() else {}

    def heads(self) -> dict[Path, bytes]:
        """Return the first bytes of the files that were opened."""
        file = self.__dict__.get("_headers")
        heads = {self.path: file.head} if file is not None else {}
        for candidate in self._files.values():
            heads |= candidate.heads()
        return heads

    def hash_open_files(self) -> None:
        """Hash the files that are open for their headers, so that nobody opens them again to do so."""
        if "_headers" in self.__dict__ and self._headers is not None and self._closing.alive:
            self._digest = self._headers.digest()
        for candidate in self._files.values():
            candidate.hash_open_files()

    def digests(self) -> dict[Path, str]:
        """Return the digests of the files that `hash_open_files` has hashed."""
        digests = {self.path: self._digest} if self._digest else {}
        for candidate in self._files.values():
            digests |= candidate.digests()
        return digests

    @property
    def head(self) -> bytes:
        """The first bytes of a file; empty for a folder."""
        return self._headers.head if self._headers else b""

    def open_safetensors(self, location: str | None = None) -> safetensors_file.SafetensorsFile:
        """Return the safetensors file that the path is, which the caller closes; `location` is its name in errors."""
        return safetensors_file.SafetensorsFile(self.path, location=location, file=self._take())

    def open_gguf(self) -> gguf_file.GGUFFile:
        """Return the GGUF file that the path is, which the caller closes."""
        from adapterhub_converters.containers import gguf_file  # late, like other readers

        return gguf_file.GGUFFile(self.path, file=self._take())

    def _take(self) -> BinaryIO | None:
        """Return the file if it is open for its header and nobody has read it since."""
        if "_headers" not in self.__dict__ or self._headers is None or not self._closing.alive:
            return None
        self._closing.detach()
        return self._headers.detach()

    @property
    def header(self) -> safetensors_header.SafetensorsHeader | None:
        """The checked header of a safetensors file; None for any other path, and for a malformed file."""
        return self._headers.safetensors if self._headers else None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors in a safetensors file; empty for any other path."""
        return tuple(self.header.tensors) if self.header else ()

    @property
    def gguf(self) -> gguf_file.GGUFHeader | None:
        """The checked header of a GGUF file; None for any other path, and for a malformed file."""
        return self._headers.gguf if self._headers else None

    @property
    def is_gguf(self) -> bool:
        """Whether it is a file with the magic number of GGUF, even if it is malformed."""
        return self._headers.is_gguf if self._headers else False

    @property
    def is_whole_model(self) -> bool:
        """Whether it is a file with a model's own weights and nothing that LoRA adds to them."""
        if self.gguf is not None:
            return self.gguf.text("general.type") in ("model", None) and "general.architecture" in self.gguf.metadata
        names = self.tensors
        return any(name.endswith(_MODEL_TENSOR_ENDS) for name in names) and not any("lora" in name.lower() for name in names)

    @cached_property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return self.path.is_file()

    @cached_property
    def _headers(self) -> _Headers | None:
        if not self.is_file:
            return None
        try:
            file = _Headers(self.path)
        except FormatError:  # such as the pointer that Git LFS leaves in place of a file
            return None
        # Most candidates are looked at and not read.
        self._closing = weakref.finalize(self, file.close)
        return file
