"""What a base model is, as far as an adapter cares: names, logical shapes, and the numbers that change the function.

Read from headers alone; no weight is loaded. Names are Hugging Face's and shapes are those of the model before
quantization, whatever the file stores, so that a base in 16 bits, in NF4 and as GGUF has one fingerprint.
"""

from pathlib import Path

from adapterhub_converters.errors import NotFoundError

from . import hf
from .canonical_names import BaseTensor
from .files import Files, LocalFiles, Ranged
from .hf import read_hf, weight_files
from .spec import BaseSpec

__all__ = ["BaseSpec", "BaseTensor", "Files", "LocalFiles", "Ranged", "read_base", "read_files", "read_hf", "weight_files"]


def read_base(path: Path) -> BaseSpec:
    """The base at `path`: a folder with a `config.json`, whatever else lies in it; a safetensors, index or GGUF file."""
    if path.is_dir():
        if (path / hf.CONFIG).is_file():
            return read_hf(path)
        if (path / hf.PIPELINE_INDEX).is_file():
            return hf.read_pipeline(path)
        found = sorted(item.name for item in path.iterdir() if item.suffix in (".gguf", ".safetensors"))
        hint = f"Name the file itself, {found[0]}" if found else "A base is a folder with config.json or a .gguf file"
        raise NotFoundError(str(path), "not a base model: there is no config.json", hint)
    if not path.exists():
        raise NotFoundError(str(path), "no such file or folder")
    return read_files(LocalFiles(path.parent), path.name)


def read_files(files: Files, name: str) -> BaseSpec:
    """The base in the file `name` among others, or in all of them when it is empty; by the name, else by the first bytes."""
    if name in ("", hf.CONFIG):
        return hf.read(files)
    if name.endswith((".safetensors", ".json")):
        return hf.read(files, name)
    if not name.endswith(".gguf") and (ranged := files.ranged(name)) is not None:
        head = ranged.read_at(0, min(9, ranged.size))
        if head[8:] == b"{":
            return hf.read(files, name)
    from . import gguf  # late: a folder, which most bases are, needs none of it

    return gguf.read(files, name)
