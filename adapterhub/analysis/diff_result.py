"""The differences between two adapters: modules, other tensors, keys of configs, files and facts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any, Literal, get_args

from adapterhub.checks import Verdict
from adapterhub.digest import Digest
from adapterhub.manifest.fact_changes import FactChange, FileChange
from adapterhub_converters import display
from adapterhub_converters.lazy_dataclass import dataclass

Status = Literal["same", "rounded", "changed", "added", "removed", "unknown"]
SAME, ROUNDED, CHANGED, ADDED, REMOVED, UNKNOWN = get_args(Status)


@dataclass(frozen=True, slots=True)
class Side:
    """A module in one of the two adapters.

    Attributes:
        size: The Frobenius norm of the delta; None if it has no factors, or if no module has changed and none was computed.
    """

    kind: str
    shape: tuple[int, ...]
    r: int
    alpha: float
    rslora: bool
    scaling: float
    dtype: str
    size: float | None


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """A module in both adapters, or in one of them.

    Attributes:
        change: The norm of the difference of the deltas over the norm of A's; None if that is 0, or not comparable.
        ratio: The norm of B's delta over that of A's.
        cosine: Between the two deltas as long vectors, 1 for equal numbers; None if one is 0.
        distance: The norm of the difference.
    """

    name: str
    status: Status
    a: Side | None = None
    b: Side | None = None
    change: float | None = None
    ratio: float | None = None
    cosine: float | None = None
    distance: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class TensorChange:
    """A tensor other than factors: a magnitude, a bias, a replaced weight, rows, a copy."""

    name: str
    status: Status
    change: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A key with different values, None if absent; `semantic` if it can change the function."""

    key: str
    a: Any
    b: Any
    semantic: bool


@dataclass(frozen=True, repr=False)
class Difference:
    """The differences between two adapters, or between their functions alone.

    Attributes:
        modules: All modules, unchanged ones included; empty where the files that decide what an adapter computes are the same,
            and nothing had to be computed.
        tensors: All other tensors, likewise.
        config: Keys of the configs.
        conditions: Settings that decide when and on what the adapter acts: part of the function, although not in its tensors.
        verdicts: Runtimes that treat the two differently.
        names: The names of the two.
        digests: The digests of the two versions; for files, those that a push would give them.
        files: Files that differ.
        facts: Facts of adapter.json that differ.
    """

    modules: tuple[ModuleChange, ...] = ()
    tensors: tuple[TensorChange, ...] = ()
    config: tuple[KeyChange, ...] = ()
    conditions: tuple[KeyChange, ...] = ()
    verdicts: Mapping[str, tuple[Verdict, Verdict]] = field(default_factory=dict)
    names: tuple[str, str] = ("", "")
    digests: tuple[Digest, Digest] = ("", "")
    files: tuple[FileChange, ...] = ()
    facts: tuple[FactChange, ...] = ()

    def __repr__(self) -> str:
        return f"<Difference {' -> '.join(filter(None, self.names))}: {', '.join(self._parts()) or 'none'}>"

    def _parts(self) -> Iterator[str]:
        counts = {"file": len(self.files), "fact": len(self.facts), "module": len(self.modules) - self.count(SAME)}
        yield from (f"{count} {name}{'s' * (count > 1)}" for name, count in counts.items() if count)

    def _repr_html_(self) -> str:
        rows = [(row.path, row.status, "") for row in self.files] + [(row.key, row.old, row.new) for row in self.facts]
        head = ("file or fact", *self.names)
        changed = [
            (module.name, module.status, None if module.change is None else f"{module.change:.1%}")
            for module in self.modules
            if module.status not in (SAME, ROUNDED)
        ]
        return display.table(rows, head=head, caption=repr(self)) + display.table(changed, head=("module", "status", "change"))

    @property
    def same_version(self) -> bool:
        """Whether the two are the same version: every byte and every fact."""
        return bool(self.digests[0]) and self.digests[0] == self.digests[1]

    @property
    def same(self) -> bool:
        """Whether the two are the same function, up to the rounding of float32."""
        return self._statuses <= {SAME, ROUNDED} and not self.conditions

    @property
    def identical(self) -> bool:
        """Whether all numbers are equal."""
        return self.same and self._statuses <= {SAME}

    @property
    def _statuses(self) -> set[str]:
        return {module.status for module in self.modules} | {tensor.status for tensor in self.tensors}

    @property
    def change(self) -> float | None:
        """The norm of the difference of all deltas over the norm of all of A's; None if a module cannot be compared."""
        if any(module.distance is None for module in self.modules):
            return None
        if not any(module.distance for module in self.modules):
            return 0.0
        norm = math.hypot(*(module.a.size for module in self.modules if module.a and module.a.size))
        return math.hypot(*(module.distance for module in self.modules if module.distance)) / norm if norm else None

    def count(self, status: Status) -> int:
        """Return the number of modules with a status."""
        return sum(module.status == status for module in self.modules)
