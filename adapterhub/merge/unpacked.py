"""The weights of a quantised base in floats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_converters.errors import RefusedError

if TYPE_CHECKING:
    from .hf_base import Shard, Weight


def unpacked(base: Path, shards: Sequence[Shard], config: Mapping[str, Any]) -> Mapping[str, Weight]:
    """TODO."""
    raise RefusedError(str(base), "not yet")
