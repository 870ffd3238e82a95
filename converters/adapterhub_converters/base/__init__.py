"""What a base model is, as far as an adapter cares: names, logical shapes, and the numbers that change the function.

Read from headers alone; no weight is loaded. Names are Hugging Face's and shapes are those of the model before
quantisation, whatever the file stores, so that a base in 16 bits, in NF4 and as GGUF has one fingerprint.
"""

from pathlib import Path

from adapterhub_converters.errors import NotFoundError

from .gguf import read_gguf
from .hf import read_hf, weight_files
from .spec import BaseSpec, BaseTensor

__all__ = ["BaseSpec", "BaseTensor", "read_base", "read_gguf", "read_hf", "weight_files"]


def read_base(path: Path) -> BaseSpec:
    """The base at `path`: a folder with a `config.json` is Hugging Face's, whatever else lies in it; else a GGUF file."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return read_hf(path)
        found = sorted(item.name for item in path.glob("*.gguf"))
        hint = f"Name the file itself, {found[0]}" if found else "A base is a folder with config.json or a .gguf file"
        raise NotFoundError(str(path), "not a base model: there is no config.json", hint)
    if not path.exists():
        raise NotFoundError(str(path), "no such file or folder")
    return read_gguf(path)
