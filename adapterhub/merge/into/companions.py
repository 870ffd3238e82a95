"""The files of a model folder beside its weights: which go along into a merged model, and which must not.

Configuration, tokenizer and documents go along. A second copy of the weights would still be the unmerged model, an
adapter in the folder would be loaded on top by transformers, and a pickle can run code when it is loaded.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_WEIGHTS = (".safetensors", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack", ".npz", ".tflite", ".mlmodel", ".ot")
_ADAPTER = ("adapter_config.json", "adapter.json", "adapter.toml")


def companions(base: Path, shards: set[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Paths relative to `base` to copy, and those left behind with the reason; hidden files and folders are neither."""
    take, skipped = [], {}
    for folder, folders, files in os.walk(base):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(files):
            path = Path(folder, name)
            relative = path.relative_to(base).as_posix()
            if name.startswith(".") or relative in shards:
                continue
            reason = _reason(path, base)
            if reason:
                skipped[relative] = reason
            else:
                take.append(relative)
    return tuple(take), skipped


def _reason(path: Path, base: Path) -> str | None:
    """Why a file stays behind; None when it goes along."""
    name = path.name.lower()
    if name.endswith(_PICKLES):
        return "a pickle can run code when it is loaded"
    if name.endswith((*_WEIGHTS, ".safetensors.index.json")) and name != "model.safetensors.index.json":
        return "other weights, which would still be the unmerged model"
    if name in _ADAPTER or path == base / "README.md":
        return "belongs to an adapter" if name in _ADAPTER else "the merged model has a card of its own"
    if not path.is_file():
        return "not a regular file"
    if path.is_symlink() and not _inside(path.resolve(), base):
        return "a link that leads out of the model"
    return None


def _inside(target: Path, base: Path) -> bool:
    # huggingface_hub's cache: snapshots/<revision>/config.json -> ../../blobs/<digest>.
    real = base.resolve()
    return target.is_relative_to(real) or target.parent == real.parent.parent / "blobs"


def copy_companions(base: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Copy the contents of files, not their modes: a blob in a cache may be read-only."""
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(base / name, target)
