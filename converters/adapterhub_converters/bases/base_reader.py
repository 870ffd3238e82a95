"""Reading the base that a path names: a folder, a pipeline's folder, or one file, told apart by names and first bytes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.adapter_files import ADAPTER_CONFIG
from adapterhub_converters.errors import NotFoundError

from . import hf_base, hub_layout
from .model_files import Files, LocalFiles

if TYPE_CHECKING:
    from .base_spec import BaseSpec


def is_model(folder: Path) -> bool:
    """Return whether a folder has a complete Hugging Face model and no adapter."""
    return (folder / hf_base.CONFIG).is_file() and not (folder / ADAPTER_CONFIG).exists() and bool(hf_base.weight_files(folder))


def read_base(path: Path) -> BaseSpec:
    """Read the base at `path`: a folder with a `config.json`, a pipeline's folder, or a safetensors, index, or GGUF file."""
    if path.is_dir():
        if (path / hf_base.CONFIG).is_file():
            return read_files(LocalFiles(path), "")
        if (path / hf_base.PIPELINE_INDEX).is_file():
            return hub_layout.with_snapshot_name(hf_base.read_pipeline(path), path)
        if (path / ADAPTER_CONFIG).is_file():
            raise NotFoundError(
                str(path), "is an adapter, not a base model", "Name the folder or the .gguf file of the base", code="not-a-base"
            )
        weight_names = sorted(item.name for item in path.iterdir() if item.suffix in (".gguf", ".safetensors"))
        hint = (
            f"Name the file itself, {weight_names[0]}"
            if weight_names
            else "A base is a folder with config.json or a .gguf file"
        )
        raise NotFoundError(str(path), "not a base model: there is no config.json", hint, code="not-a-base")
    if not path.exists():
        raise NotFoundError(str(path), "no such file or folder", code="no-such-file")
    return read_files(LocalFiles(path.parent), path.name)


def read_files(files: Files, name: str) -> BaseSpec:
    """Read the base in the file `name`, or in all files if it is empty. The name, then the first bytes, tell the kind of file.

    A base in the cache of huggingface_hub gets the name and the commit of its model there.
    """
    return hub_layout.with_snapshot_name(_read_by_kind(files, name), files.local)


def _read_by_kind(files: Files, name: str) -> BaseSpec:
    if name in ("", hf_base.CONFIG):
        return hf_base.read(files)
    if name.endswith((".safetensors", ".json")):
        return hf_base.read(files, name)
    if not name.endswith(".gguf") and (ranged := files.open_ranged(name)) is not None:
        # A file in a cache may have a name without a suffix: a safetensors header begins with `{` after its length.
        head = ranged.read_at(0, min(9, ranged.size))
        if head[8:] == b"{":
            return hf_base.read(files, name)
    from . import gguf_base  # late: most bases are folders, which do not need it

    return gguf_base.read(files, name)
