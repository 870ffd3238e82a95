"""The chat templates in trl's package, which has those of many models."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tests.conftest import need_module


def _folder() -> Path:
    spec = importlib.util.find_spec("trl")
    return Path(str(spec.origin)).parent / "chat_templates" if spec else Path()


def names() -> list[str]:
    """The templates as the models have them, without those that trl marks for training; one empty name without trl."""
    return sorted(path.stem for path in _folder().glob("*.jinja") if not path.stem.endswith("_training")) or [""]


def trls(name: str) -> str:
    """A chat template of trl's package."""
    need_module("trl")
    # The tiny tokenizer has no token for the start of a text.
    return "{% set bos_token = '' %}" + (_folder() / f"{name}.jinja").read_text()
