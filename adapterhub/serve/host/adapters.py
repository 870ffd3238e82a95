"""Adapters in memory: read from PEFT folders, refused by name where slots cannot represent them, and forgotten when unused.

Versions never change, so a version that was forgotten to make room is read again from its folder when it is asked for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapterhub.training.events import InitialAdapter
from adapterhub.training.model import adapters as trained
from adapterhub_converters.adapter import LowRank, scaling
from adapterhub_converters.errors import NotFoundError, RefusedError

from .model import Model
from .slots import Factors
from .values import Blend

NOT_LOADED = "not-loaded"
"""The code of the error for a version that the host was never given, or has dropped."""
_numbers = count()


@dataclass(eq=False)
class LoadedAdapter:
    """A version in memory.

    Attributes:
        key: Its name, `team/sql@sha256:…`.
        factors: In the dtype of the model.
        number: One for each time that something is loaded: what is cached under it is of these bytes.
        uses: Requests that run or wait with it.
    """

    key: str
    factors: Factors
    number: int = field(default_factory=_numbers.__next__)
    uses: int = 0

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return max(len(A) for A, _ in self.factors.values())

    @property
    def size(self) -> int:
        """Bytes in memory."""
        return sum(part.numel() * part.element_size() for pair in self.factors.values() for part in pair)


Parts = tuple[tuple[LoadedAdapter, float], ...]
"""The adapters of a blend, with their weights."""


class Adapters:
    """The adapters of a model by their keys, for any thread.

    Args:
        most: Bytes of those that no request uses.
        rank: The largest rank.
    """

    def __init__(self, model: Model, *, most: int, rank: int) -> None:
        self._model, self._most, self._rank = model, most, rank
        self._folders: dict[str, Path] = {}
        self._loaded: OrderedDict[str, LoadedAdapter] = OrderedDict()  # the last used at the end
        self._lock, self._loading = threading.RLock(), threading.Lock()

    @property
    def size(self) -> int:
        """Bytes in memory."""
        with self._lock:
            return sum(adapter.size for adapter in self._loaded.values())

    def __len__(self) -> int:
        return len(self._loaded)

    def load(self, key: str, folder: Path) -> None:
        """Read a PEFT folder, unless it is in memory; RefusedError names what slots cannot represent."""
        if key not in self._loaded:
            self._read(key, folder)

    def _read(self, key: str, folder: Path, *, again: bool = False) -> None:
        with self._loading:
            if key in self._loaded:  # another thread was faster
                return
            adapter = LoadedAdapter(key, read(folder, self._model, rank=self._rank))
            with self._lock:
                if again and key not in self._folders:  # dropped meanwhile
                    return
                self._folders[key], self._loaded[key] = folder, adapter
                self._make_room(adapter)

    def drop(self, key: str) -> None:
        """Forget a version; requests that use it keep it until they end."""
        with self._lock:
            self._folders.pop(key, None)
            self._loaded.pop(key, None)

    def taken(self, blend: Blend) -> Parts:
        """Return the adapters of a blend, which stay in memory until they are released.

        Raises:
            NotFoundError: One was never loaded, or was dropped.
        """
        found: list[tuple[LoadedAdapter, float]] = []
        try:
            for key, weight in blend:
                found.append((self._taken(key), weight))
        except BaseException:
            self.release(tuple(found))
            raise
        return tuple(found)

    def _taken(self, key: str) -> LoadedAdapter:
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
        unused = [one for one in self._loaded.values() if not one.uses and one is not just_loaded]
        size = sum(one.size for one in unused)
        for adapter in unused:
            if size <= self._most:
                break
            size -= adapter.size
            del self._loaded[adapter.key]


# ---- Reading


def read(folder: Path, model: Model, *, rank: int) -> Factors:
    """Read a PEFT folder into factors for the slots of a model; of the largest `rank`.

    Raises:
        RefusedError: It has parts that slots cannot represent, or is for another base. `code` is that of a check.
    """
    found = trained.read(InitialAdapter(folder, folder, "", str(folder)), model.spec)
    trained.check_base(found, model.spec, None)
    _check_parts(found)
    for name, array in found.adapter.copies.items():
        trained.check_copy(model.base, name, array, found.where)
    return {path: _factors(path, delta, found.where, model, rank=rank) for path, delta in found.pairs.items()}


def _check_parts(found: trained.Factors) -> None:
    """Refuse whatever is not a low-rank delta."""
    parts: Mapping[str, object] = {
        "has magnitudes (DoRA)": found.dora,
        "has biases of its deltas (lora_bias)": found.lora_bias,
        "replaces rows of a table": found.adapter.rows,
        "replaces whole parameters": found.adapter.replaced,
        "has no low-rank delta": not found.pairs,
    }
    for what, there in parts.items():
        if there:
            names = f": {', '.join(sorted(there)[:3])}" if isinstance(there, Mapping) else ""
            hint = "Merge it into the base, or serve it with another engine" if found.pairs else ""
            raise RefusedError(found.where, f"{what}{names}, which cannot share a base in a batch", hint, code="runtime")


def _factors(path: str, delta: object, where: str, model: Model, *, rank: int) -> tuple[Tensor, Tensor]:
    """Return A and the transpose of B, scaled, in the dtype of the model."""
    where = f"{where}: {path}"
    shape = model.slots.shapes.get(path)
    if not isinstance(delta, LowRank):
        raise RefusedError(where, "is not a delta of one linear layer, which cannot share a base in a batch", code="runtime")
    if shape is None:
        known = path in dict(model.base.model.named_modules())
        what = "is not a linear layer that can be shared in a batch" if known else "the base has no such module"
        raise RefusedError(where, what, code="runtime" if known else "no-such-module")
    if delta.shape != shape:
        what = f"is a delta of shape {delta.shape}, but the base's layer has {shape}"
        raise RefusedError(where, what, code="shape-mismatch")
    if delta.r > rank:
        raise RefusedError(where, f"has rank {delta.r}, and slots have room for {rank}", code="rank-above-max")
    factor = scaling(delta.alpha, delta.r, rslora=delta.rslora)
    A, B = (torch.from_numpy(np.ascontiguousarray(part, np.float32)) for part in (delta.lora_A, delta.lora_B))
    A, B = A.to(model.slots.dtype), (B * factor).to(model.slots.dtype).t().contiguous()
    for part in (A, B):
        if not all(map(torch.isfinite, part.aminmax())):  # a NaN is both; eight times as fast as to ask every number
            raise RefusedError(where, f"has a number that is not finite in {model.slots.dtype}", code="non-finite")
    return A, B
