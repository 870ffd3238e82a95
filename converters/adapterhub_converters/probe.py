"""What each format can do, found by doing it: a tiny adapter written, read, and taken there and back between all of them."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from . import formats, peft
from .adapter import Adapter, LowRank
from .base import BaseSpec
from .errors import AdapterhubError, RefusedError

BYTES, FUNCTION, NO = "bytes", "function", "no"
"""What comes back of a file that went through another format: its bytes, its function, or nothing."""
T = TypeVar("T")
_NAME = "NAME"
_PREFIX = "model.layers.0."
_SHAPES = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "mlp.down_proj": (8, 12)}


@dataclass(frozen=True)
class Row:
    """What one format can do.

    Attributes:
        name: As `--to` has it.
        files: What it is on the disk, with NAME for the name it is given.
        reads: Whether it is read.
        writes: Whether it is written.
        base: Whether writing it needs a base.
        back: Every other format, and what comes back from there of a file of this one.
    """

    name: str
    files: tuple[str, ...]
    reads: bool
    writes: bool
    base: bool
    back: dict[str, str]


def tried() -> list[Row]:
    """A row for each format, of an ordinary adapter of a Llama."""
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        return _Probe(Path(temporary)).rows()


def _adapter() -> Adapter:
    rng = np.random.default_rng(0)
    return Adapter({
        _PREFIX + kind: LowRank(
            rng.normal(size=(2, into)).astype(np.float32), rng.normal(size=(out, 2)).astype(np.float32), 4.0
        )
        for kind, (out, into) in _SHAPES.items()
    })  # fmt: skip


def _base() -> BaseSpec:
    config = {
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 2, "vocab_size": 16, "tie_word_embeddings": False,
    }  # fmt: skip
    return BaseSpec("a tiny Llama", "hf", "LlamaForCausalLM", "llama", config)


class _Probe:
    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._source = folder / "source"
        self._source.mkdir()
        peft.write(_adapter(), self._source)
        self._names = (*formats.FORMATS, *formats.PACKAGES)

    def rows(self) -> list[Row]:
        own = {name: _or_none(functools.partial(self._written, self._source, name)) for name in self._names}
        return [self._row(name, path) for name, path in own.items()]

    def _row(self, name: str, path: Path | None) -> Row:
        files = () if path is None else (f"{_NAME}{path.suffix}",) if path.is_file() else tuple(sorted(_contents(path)))
        reads = path is not None and _or_none(lambda: formats.read(_inside(path))) is not None
        back = {other: NO if path is None else self._back(path, name, other) for other in self._names if other != name}
        return Row(name, files, reads, path is not None, self._needs_base(name), back)

    def _needs_base(self, name: str) -> bool:
        try:
            self._written(self._source, name, given=False)
        except RefusedError as error:
            return "--base" in error.hint
        return False

    def _back(self, path: Path, name: str, other: str) -> str:
        there = _or_none(lambda: self._written(_inside(path), other))
        again = None if there is None else _or_none(lambda: self._written(_inside(there), name))
        if again is None:
            return NO
        return BYTES if _contents(again) == _contents(path) else FUNCTION if _same(path, again) else NO

    def _written(self, source: Path, to: str, *, given: bool = True) -> Path:
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        target = folder / f"{_NAME}{formats.ENDINGS.get(to, '')}"
        model = "a-tiny-llama" if to in formats.PACKAGES else None
        formats.convert(source, target, to=to, base=_base() if given else None, model=model)
        return target


def _inside(path: Path) -> Path:
    """The file to read of a package."""
    return next(iter(path.glob("*.gguf")), path) if path.is_dir() else path


def _contents(path: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in path.iterdir()} if path.is_dir() else {"": path.read_bytes()}


def _same(one: Path, other: Path) -> bool:
    found, wanted = (formats.read(_inside(path), base=_base()) for path in (one, other))
    return {t: _dense(d) for t, d in found.deltas.items()} == {t: _dense(d) for t, d in wanted.deltas.items()}


def _dense(delta: object) -> bytes | None:
    if not isinstance(delta, LowRank):
        return None
    product: np.ndarray = delta.scaling * delta.lora_B.astype(np.float64) @ delta.lora_A
    return product.round(5).tobytes()


def _or_none(make: Callable[[], T]) -> T | None:
    try:
        return make()
    except AdapterhubError:
        return None
