"""Adapters in memory: read from PEFT folders, refused with a reason if slots cannot represent them, and forgotten when unused.

Versions never change, so a version that was forgotten to make room is read from its folder again at the next request. A folder
whose files changed all the same is refused.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adapterhub.training.events import InitialAdapter
from adapterhub.training.model import adapter_transfer as trained
from adapterhub_converters.adapter import LowRank, scaling, targets_without_magnitude
from adapterhub_converters.errors import NotFoundError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .model import Model
from .slots import Factors, Gains
from .values import Blend

NOT_LOADED = "not-loaded"
"""The code of the error for a version that the host was never given, or has dropped."""
CHANGED = "changed-meanwhile"
"""The code of the error for a version whose files changed after they were read first, or while they are read."""
_numbers = count()


@dataclass(eq=False)
class LoadedAdapter:
    """A version in memory.

    Attributes:
        key: Its name, `team/sql@sha256:…`.
        factors: Its factors, in the dtype of the model.
        gains: Those of its magnitudes (DoRA); empty if it has none.
        number: A number that is unique to this load: what is cached under it belongs to these bytes.
        uses: Requests that run or wait with it.
    """

    key: str
    factors: Factors
    gains: Gains = field(default_factory=dict)
    number: int = field(default_factory=_numbers.__next__)
    uses: int = 0

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(len(A) for A, _ in self.factors.values())

    @property
    def size(self) -> int:
        """Bytes in memory."""
        parts = [*(part for pair in self.factors.values() for part in pair), *self.gains.values()]
        return sum(part.numel() * part.element_size() for part in parts)


@dataclass(frozen=True)
class _Folder:
    """The folder of a version, and the state of its files by name: size, time of the last change in nanoseconds, and number."""

    path: Path
    states: frozenset[tuple[str, int, int, int]]

    @classmethod
    def at(cls, path: Path) -> _Folder:
        """Return a folder as it is now; without states if there is none, which reading it then says."""
        try:
            with os.scandir(path) as entries:
                statuses = [(entry.name, entry.stat()) for entry in entries]
        except OSError:
            return cls(path, frozenset())
        return cls(path, frozenset((name, info.st_size, info.st_mtime_ns, info.st_ino) for name, info in statuses))


Parts = tuple[tuple[LoadedAdapter, float], ...]
"""The adapters of a blend, with their weights."""


class Adapters:
    """The adapters of a model by their keys, for any thread.

    Args:
        max_bytes: Bytes of the adapters that no request uses.
        rank: The largest rank.

    Attributes:
        pinned: The keys of versions that stay in memory.
    """

    def __init__(self, model: Model, *, max_bytes: int, rank: int) -> None:
        self._model, self._max_bytes, self._rank = model, max_bytes, rank
        self.pinned: frozenset[str] = frozenset()
        self._folders: dict[str, _Folder] = {}
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()  # the most recently used at the end
        self._lock, self._loading = threading.RLock(), threading.Lock()

    def __len__(self) -> int:
        return len(self._loaded)

    def load(self, key: str, folder: Path) -> None:
        """Read a PEFT folder, unless it is in memory; RefusedError names what slots cannot represent."""
        if key not in self._loaded:
            self._read(key, _Folder.at(folder))

    def _read(self, key: str, folder: _Folder, *, again: bool = False) -> None:
        """Read a folder into memory; with `again`, only if the version has not been dropped in the meantime.

        Raises:
            RefusedError: Its files are others than those of `folder`.
        """
        # One at a time: reading is bound by disk and memory, and two threads may want the same version.
        with self._loading:
            if key in self._loaded:  # another thread was faster
                return
            adapter = LoadedAdapter(key, *read(folder.path, self._model, rank=self._rank))
            if _Folder.at(folder.path) != folder:
                problem = "was changed after the server had prepared it"
                raise RefusedError(str(folder.path), problem, "Start the server again, which prepares it anew", code=CHANGED)
            with self._lock:
                if again and key not in self._folders:  # dropped in the meantime
                    return
                self._folders[key], self._loaded[key] = folder, adapter
                self._make_room(adapter)

    def drop(self, key: str) -> None:
        """Forget a version; requests that use it keep it until they end."""
        with self._lock:
            self._folders.pop(key, None)
            self._loaded.pop(key, None)

    def acquire(self, blend: Blend) -> Parts:
        """Return the adapters of a blend, which stay in memory until they are released.

        Raises:
            NotFoundError: One was never loaded, or was dropped.
            RefusedError: One has magnitudes, and is not alone and with weight 1.
        """
        acquired: list[tuple[LoadedAdapter, float]] = []
        try:
            for key, weight in blend:
                acquired.append((self._acquire_one(key), weight))
            _check_blend(acquired)
        # All or none: a blend that is only partly loaded must not keep versions in memory.
        except BaseException:
            self.release(tuple(acquired))
            raise
        return tuple(acquired)

    def _acquire_one(self, key: str) -> LoadedAdapter:
        """Return one adapter and count its use, reading it again if it was forgotten."""
        while True:
            with self._lock:
                folder, adapter = self._folders.get(key), self._loaded.get(key)
                if adapter:
                    self._loaded.move_to_end(key)
                    adapter.uses += 1
                    return adapter
            if folder is None:
                raise NotFoundError(key, "is not loaded", "Load it first", code=NOT_LOADED)
            self._read(key, folder, again=True)

    def release(self, parts: Parts) -> None:
        """End a use of adapters."""
        with self._lock:
            for adapter, _ in parts:
                adapter.uses -= 1
            self._make_room()

    def _make_room(self, just_loaded: LoadedAdapter | None = None) -> None:
        """Forget unused adapters, least recently used first, until the others fit; never the one that was just loaded."""
        candidates = [adapter for key, adapter in self._loaded.items() if key not in self.pinned]
        unused = [adapter for adapter in candidates if not adapter.uses and adapter is not just_loaded]
        size = sum(adapter.size for adapter in unused)
        for adapter in unused:
            if size <= self._max_bytes:
                break
            size -= adapter.size
            del self._loaded[adapter.key]


def _check_blend(parts: Sequence[tuple[LoadedAdapter, float]]) -> None:
    """Refuse a blend with magnitudes, whose result is not the base plus weighted deltas."""
    scaled = next((adapter for adapter, _ in parts if adapter.gains), None)
    if scaled is not None and [weight for _, weight in parts] != [1.0]:
        problem = "has magnitudes (DoRA), which cannot be blended or weighted"
        raise RefusedError(scaled.key, problem, "Ask for it alone", code="runtime")


# ---- Reading


def read(folder: Path, model: Model, *, rank: int) -> tuple[Factors, Gains]:
    """Read a PEFT folder into factors and gains for the slots of a model, with ranks up to `rank`.

    Raises:
        RefusedError: It has parts that slots cannot represent, or is for another base. `code` is that of a check.
    """
    # No views of the files: a file that becomes shorter while it is mapped would end the process.
    factors = trained.read(InitialAdapter(folder, folder, "", str(folder)), model.spec)
    trained.check_base(factors, model.spec, None)
    _check_parts(factors)
    for name, array in factors.adapter.copies.items():
        trained.check_copy(model.base, name, array, factors.location)
    deltas: dict[str, LowRank] = {}
    gains: dict[str, Tensor] = {}
    for path, delta in factors.pairs.items():
        deltas[path] = low_rank = _checked_delta(path, delta, factors.location, model, rank=rank)
        if low_rank.magnitude is not None:
            gains[path] = _gain(path, low_rank, factors.location, model)
    return _scaled_factors(deltas, gains, factors.location, model.slots.dtype), gains


def _check_parts(factors: trained.Factors) -> None:
    """Refuse whatever is not a low-rank delta."""
    parts: Mapping[str, object] = {
        "has DoRA without magnitudes": targets_without_magnitude(factors.adapter),
        "has biases of its deltas (lora_bias)": factors.lora_bias,
        "replaces rows of a table": factors.adapter.rows,
        "replaces whole parameters": factors.adapter.replaced,
        "has no low-rank delta": not factors.pairs,
    }
    for problem, present in parts.items():
        if present:
            names = f": {', '.join(sorted(present)[:3])}" if isinstance(present, Mapping) else ""
            hint = "Merge it into the base, or serve it with another engine" if factors.pairs else ""
            raise RefusedError(
                factors.location, f"{problem}{names}, which cannot share a base in a batch", hint, code="runtime"
            )


def _checked_delta(path: str, delta: object, location: str, model: Model, *, rank: int) -> LowRank:
    """Return the delta of a layer, if slots can represent it."""
    location = f"{location}: {path}"
    shape = model.slots.shapes.get(path)
    if not isinstance(delta, LowRank):
        raise RefusedError(location, "is not a delta of one linear layer, which cannot share a base in a batch", code="runtime")
    if shape is None:
        is_module = path in dict(model.base.model.named_modules())
        problem = "is not a linear layer that can be shared in a batch" if is_module else "the base has no such module"
        raise RefusedError(location, problem, code="runtime" if is_module else "no-such-module")
    if delta.shape != shape:
        problem = f"is a delta of shape {delta.shape}, but the base's layer has {shape}"
        raise RefusedError(location, problem, code="shape-mismatch")
    if delta.r > rank:
        raise RefusedError(location, f"has rank {delta.r}, and slots have room for {rank}", code="rank-above-max")
    return delta


def _gain(path: str, delta: LowRank, location: str, model: Model) -> Tensor:
    """Return `m / |W + sBA|` of each output, float32, as peft computes it (`tuners/lora/dora.py`)."""
    W = model.slots.weight(path)
    A, B, magnitude = (_tensor(part).to(W.device) for part in (delta.lora_A, delta.lora_B, delta.magnitude))
    if magnitude.numel() != len(W):
        problem = f"has {magnitude.numel()} magnitudes, but the base's layer has {len(W)} outputs"
        raise RefusedError(f"{location}: {path}", problem, code="shape-mismatch")
    gain = magnitude.flatten() / torch.linalg.norm(W + _scaling(delta) * (B @ A), dim=1)
    if not _is_finite(gain):
        raise _non_finite_error(gain.dtype, f"{location}: {path}")
    return gain


def _scaled_factors(deltas: Mapping[str, LowRank], gains: Gains, location: str, dtype: torch.dtype) -> Factors:
    """Return A and the transpose of B, scaled, in the dtype of the model, all in one block of memory."""
    sizes = [array.size for delta in deltas.values() for array in (delta.lora_A, delta.lora_B)]
    # numpy asks for large pages, so that the system does not hand out the block in thousands of small ones.
    block = torch.from_numpy(np.empty(sum(sizes) * dtype.itemsize, np.uint8)).view(dtype)
    parts = iter(block.split(sizes))
    scaled: dict[str, tuple[Tensor, Tensor]] = {}
    for path, delta in deltas.items():
        A, B = next(parts).view(delta.lora_A.shape), next(parts).view(delta.lora_B.shape[::-1])
        A.copy_(_tensor(delta.lora_A))
        # A clone is a copy in any case: the transpose of a single row is contiguous, and shares its memory.
        product = _tensor(delta.lora_B).t().clone(memory_format=torch.contiguous_format).mul_(_scaling(delta))
        B.copy_(product if path not in gains else product.mul_(gains[path].to(product.device)))
        scaled[path] = A, B
    if not _is_finite(block):
        path = next(path for path, pair in scaled.items() if not all(map(_is_finite, pair)))
        raise _non_finite_error(dtype, f"{location}: {path}")
    return scaled


def _scaling(delta: LowRank) -> float:
    return scaling(delta.alpha, delta.r, rslora=delta.rslora)


def _tensor(array: Any) -> Tensor:
    """Return an array as float32, which may share its memory: nothing writes to it."""
    return torch.from_numpy(np.ascontiguousarray(array, np.float32))


def _is_finite(part: Tensor) -> bool:
    # NaN is both minimum and maximum; eight times as fast as checking every number.
    return all(map(math.isfinite, map(float, part.aminmax())))


def _non_finite_error(dtype: torch.dtype, location: str) -> RefusedError:
    return RefusedError(location, f"has a number that is not finite in {dtype}", code="non-finite")
