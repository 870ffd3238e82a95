"""An adapter's files by name: constant names, which files have weights, which are pickles, and which one is the adapter.

The one place for each of these questions. Nothing here reads a whole file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .errors import FormatError, RefusedError

ADAPTER_JSON = "adapter.json"
"""The manifest of an adapter."""
ADAPTER_TOML = "adapter.toml"
"""What the owner of an adapter declares."""
ADAPTER_CONFIG = "adapter_config.json"
"""The config of PEFT, and of mlx-lm under other keys."""
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_INDEX = "adapter_model.safetensors.index.json"
MLX_WEIGHTS = "adapters.safetensors"
LITGPT_WEIGHTS = "lit_model.pth.lora"
"""A pickle."""

WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf"})
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib"})
# A file of an adapter's folder that may be named for the folder.
_PARTS = (ADAPTER_CONFIG, PEFT_WEIGHTS, PEFT_INDEX, MLX_WEIGHTS, ADAPTER_JSON)
_MODEL_INDEX = "model.safetensors.index.json"
HEAD = 16
"""Bytes at the start of a file that `starts_like_pickle` needs."""


def is_weights(path: str) -> bool:
    """True for a file whose name has the suffix of safetensors or GGUF."""
    return os.path.splitext(path)[1].lower() in WEIGHT_SUFFIXES


def decides(path: str) -> bool:
    """True for a file that decides what an adapter computes: weights, their index, or the config."""
    return is_weights(path) or path in (ADAPTER_CONFIG, PEFT_INDEX)


def is_pickle_name(path: str) -> bool:
    """True for a file whose name is that of a pickle, which can run code when it is loaded."""
    return os.path.splitext(path)[1].lower() in PICKLE_SUFFIXES or os.path.basename(path) == LITGPT_WEIGHTS


def starts_like_pickle(head: bytes) -> bool:
    """True for the first bytes of a pickle of protocol 2 to 5, or of the zip archive that torch saves one in."""
    return head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05")


def starts_like_safetensors(head: bytes) -> bool:
    """True if the byte after the length field opens a JSON object; the field itself may begin like a pickle."""
    return head[5:9] == b"\0\0\0{"


def pickled_weights(names: Iterable[str]) -> list[str]:
    """Those of `names` that are PEFT's weights as a pickle, sorted."""
    return sorted(name for name in names if name.startswith("adapter_model") and is_pickle_name(name))


def folder_for(path: Path) -> Path:
    """The folder of an adapter for a file of it whose config is next to it, such as its weights; any other path as it is."""
    return path.parent if path.name in _PARTS and path.is_file() and (path.parent / ADAPTER_CONFIG).is_file() else path


def adapters_below(folder: Path) -> list[Path]:
    """The folders in `folder` that have an adapter_config.json, sorted; no links are followed."""
    return sorted(item for item in folder.iterdir() if not item.is_symlink() and (item / ADAPTER_CONFIG).is_file())


def adapters_at(path: Path) -> list[Path]:
    """The adapters that a path stands for: those in a folder that is none itself, else the one that it is or is a file of."""
    if path.is_dir() and not any((path / name).exists() for name in (ADAPTER_CONFIG, PEFT_INDEX)):
        below = [] if any(is_weights(item.name) for item in path.iterdir()) else adapters_below(path)
        return below or [path]
    return [folder_for(path)]


def whole_model(path: Path) -> FormatError:
    """The error for a whole model where an adapter is expected."""
    return FormatError(str(path), "is a whole model, not an adapter", "Name the adapter that is used on it", code="whole-model")


def adapter_in(path: Path) -> Path:
    """The adapter that `path` means, by names alone: a file or a folder, as the readers of formats take it.

    A folder with an adapter_config.json, or with the index of PEFT's shards, is an adapter as a whole. Any other folder stands
    for the one file with weights that it has; without any it is returned as it is.

    Raises:
        RefusedError: The folder has several files with weights and no config.
        FormatError: They are the shards of a whole model.
    """
    if not path.is_dir() or any((path / name).exists() for name in (ADAPTER_CONFIG, PEFT_INDEX)):
        return path
    found = sorted(
        item for item in path.iterdir() if is_weights(item.name) and not item.name.startswith(".") and item.is_file()
    )
    if len(found) > 1 and (path / _MODEL_INDEX).exists():
        raise whole_model(path)
    if len(found) > 1:
        more = f" (of {len(found)} files with weights)" if found[2:] else ""
        what = f"{found[0].name} and {found[1].name} are two adapters{more}"
        raise RefusedError(str(path), what, "Name one of them, or give each a folder of its own")
    return found[0] if found else path
