"""The files of an adapter by name: constant names, which files are weights or pickles, and which path is the adapter.

Each of these questions is answered only here. No function here reads a complete file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .errors import FormatError, RefusedError

ADAPTER_JSON = "adapter.json"
"""The manifest of an adapter."""
ADAPTER_TOML = "adapter.toml"
"""The file in which the owner of an adapter declares what its other files do not say."""
ADAPTER_CONFIG = "adapter_config.json"
"""The config of PEFT, and of mlx-lm, which has other keys in it."""
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_INDEX = "adapter_model.safetensors.index.json"
MLX_WEIGHTS = "adapters.safetensors"
LITGPT_WEIGHTS = "lit_model.pth.lora"
"""A pickle."""

WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf"})
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
# Files that may be given instead of the adapter's folder.
_FIXED_NAMES = (ADAPTER_CONFIG, PEFT_WEIGHTS, PEFT_INDEX, MLX_WEIGHTS, ADAPTER_JSON)
_MODEL_INDEX = "model.safetensors.index.json"
HEAD_SIZE = 16
"""The number of bytes at the start of a file that `starts_like_pickle` needs."""


def is_weights(path: str) -> bool:
    """Return whether the name of a file has the suffix of safetensors or GGUF."""
    return os.path.splitext(path)[1].lower() in WEIGHT_SUFFIXES


def determines_function(path: str) -> bool:
    """Return whether a file decides what an adapter computes: weights, their index, or the config."""
    return is_weights(path) or path in (ADAPTER_CONFIG, PEFT_INDEX)


def is_pickle_name(path: str) -> bool:
    """Return whether a file is named like a pickle, which can run code when it is loaded."""
    return os.path.splitext(path)[1].lower() in PICKLE_SUFFIXES or os.path.basename(path) == LITGPT_WEIGHTS


def starts_like_pickle(head: bytes) -> bool:
    """Return whether a file begins like a pickle of protocol 2 to 5, or the zip archive in which torch saves one."""
    return head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05")


def starts_like_safetensors(head: bytes) -> bool:
    """Return whether the byte after the length field opens a JSON object; the field itself may begin like a pickle."""
    return head[5:9] == b"\0\0\0{"


def pickled_weights(names: Iterable[str]) -> list[str]:
    """Return the `names` of PEFT's weights as a pickle, sorted."""
    return sorted(name for name in names if name.startswith("adapter_model") and is_pickle_name(name))


def folder_for(path: Path) -> Path:
    """Return an adapter's folder for a file whose config is next to it, such as its weights; any other path unchanged."""
    return path.parent if path.name in _FIXED_NAMES and path.is_file() and (path.parent / ADAPTER_CONFIG).is_file() else path


def adapters_below(folder: Path) -> list[Path]:
    """Return the folders in `folder` that have an adapter_config.json, sorted; links are not followed."""
    return sorted(item for item in folder.iterdir() if not item.is_symlink() and (item / ADAPTER_CONFIG).is_file())


def adapters_at(path: Path) -> list[Path]:
    """Return the adapters at a path: those in a folder of adapters, else the one that the path is or belongs to."""
    if path.is_dir() and not any((path / name).exists() for name in (ADAPTER_CONFIG, PEFT_INDEX)):
        # A folder with weights is one adapter, even if there are others in it.
        subfolders = [] if any(is_weights(item.name) for item in path.iterdir()) else adapters_below(path)
        return subfolders or [path]
    return [folder_for(path)]


def whole_model_error(path: Path) -> FormatError:
    """Return the error for a complete model where an adapter is expected."""
    return FormatError(str(path), "is a whole model, not an adapter", "Name the adapter that is used on it", code="whole-model")


def resolve_adapter(path: Path) -> Path:
    """Return the adapter that `path` means, a file or a folder as the readers of formats take it, going by names alone.

    A folder with an adapter_config.json, or with the index of PEFT's shards, is an adapter as a whole. Any other folder means
    the only file with weights in it, or is returned unchanged if it has no weights.

    Raises:
        RefusedError: The folder has several files with weights and no config.
        FormatError: They are the shards of a complete model.
    """
    if not path.is_dir() or any((path / name).exists() for name in (ADAPTER_CONFIG, PEFT_INDEX)):
        return path
    # Hidden files are left out: macOS adds `._NAME` files next to the real ones.
    weight_files = sorted(
        item for item in path.iterdir() if is_weights(item.name) and not item.name.startswith(".") and item.is_file()
    )
    if len(weight_files) > 1 and (path / _MODEL_INDEX).exists():
        raise whole_model_error(path)
    if len(weight_files) > 1:
        count_text = f" (of {len(weight_files)} files with weights)" if weight_files[2:] else ""
        problem = f"{weight_files[0].name} and {weight_files[1].name} are two adapters{count_text}"
        raise RefusedError(str(path), problem, "Name one of them, or give each a folder of its own")
    return weight_files[0] if weight_files else path
