"""What a format cannot say, said nearly or left out, and only when asked for.

A writer names everything that it refuses. What of it may be approximated or dropped is replaced here, and the writer is
asked again; what is still refused, is. So nothing is lost that the format could have said.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack

import numpy as np

from adapterhub_converters.adapter import Adapter, Delta, Kept, Loss, LowRank, Rows, unmeasured
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import RefusedError

from .approximate import Weights, low_rank_dora, low_rank_rows, low_rank_weight

KINDS = ("norms", "biases", "weights", "rows", "magnitudes", "copies")
"""Words for what may be dropped, beside names of tensors and modules and patterns like `*.lm_head`."""


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What a conversion may lose.

    Attributes:
        approx: Whether deltas may be replaced by the nearest of low rank.
        drop: Kinds, names and shell patterns of what may be left out.
        rank: The rank of an approximation; None for the delta's own.
    """

    approx: bool = False
    drop: Collection[str] = ()
    rank: int | None = None

    def drops(self, name: str, kind: str) -> bool:
        """Whether the tensor or module `name`, which is of a kind of KINDS or of none, may be left out."""
        return kind in self.drop or any(fnmatch.fnmatchcase(name, word) for word in self.drop if word not in KINDS)


@dataclasses.dataclass(frozen=True)
class Reduced:
    """The adapter with what was refused replaced or gone, what that lost, why some of it could not be, and where it is."""

    adapter: Adapter
    kept: tuple[Kept, ...]
    failed: tuple[str, ...]
    hint: str


def reduced(adapter: Adapter, items: Sequence[str], allowed: Allowed, base: BaseSpec | None) -> Reduced:
    """`adapter` without what a writer refused with `items`, as far as it is `allowed`."""
    names = dict.fromkeys(item.partition(": ")[0] for item in items)
    with ExitStack() as stack:
        weights = stack.enter_context(Weights(base.folder, tied=base.tied)) if base is not None and base.folder else None
        work = _Work(adapter, allowed, weights, base)
        for name in names:
            work.change(name)
    return work.result()


class _Work:
    def __init__(self, adapter: Adapter, allowed: Allowed, weights: Weights | None, base: BaseSpec | None) -> None:
        self._adapter, self._allowed, self._weights, self._base = adapter, allowed, weights, base
        self._deltas, self._replaced, self._rows = dict(adapter.deltas), dict(adapter.replaced), dict(adapter.rows)
        self._copies = dict(adapter.copies)
        self._kept: list[Kept] = []
        self._failed: list[str] = []
        self._would: dict[str, None] = {}

    def result(self) -> Reduced:
        meta = self._adapter.meta
        changed = dataclasses.replace(
            self._adapter,
            deltas=self._deltas,
            replaced=self._replaced,
            rows=self._rows,
            copies=self._copies,
            source=None,
            # A module whose magnitude was given up here is plain; one that came without is not.
            meta=meta if unmeasured(self._adapter) else dataclasses.replace(meta, dora=False),
        )
        return Reduced(changed if self._kept else self._adapter, tuple(self._kept), tuple(self._failed), _hint(self._would))

    def change(self, name: str) -> None:
        try:
            if name in self._deltas:
                self._delta(name, self._deltas[name])
            if name in self._replaced:
                self._parameter(name, self._replaced[name])
            if name in self._rows:
                self._table(name, self._rows[name])
            if name in self._copies:
                self._copy(name)
        except RefusedError as error:
            self._failed.append(f"{error.where or name}: {error.what}")

    def _delta(self, target: str, delta: Delta) -> None:
        if self._allowed.drops(target, ""):
            del self._deltas[target]
            self._drop(f"{target}.lora_A", f"{target}.lora_B")
            return
        if not isinstance(delta, LowRank):
            return
        if delta.bias is not None:
            if self._allowed.drops(f"{target}.lora_B.bias", "biases"):
                delta = dataclasses.replace(delta, bias=None)
                self._drop(f"{target}.lora_B.bias")
            else:
                self._would["--allow-drop biases"] = None
        if delta.magnitude is not None:
            delta = self._dora(target, delta)
        self._deltas[target] = delta

    def _dora(self, target: str, delta: LowRank) -> LowRank:
        if self._allowed.drops(f"{target}.magnitude", "magnitudes"):
            self._drop(f"{target}.magnitude")
            return dataclasses.replace(delta, magnitude=None)
        if not self._allows_approx():
            return delta
        plain, error = low_rank_dora(target, delta, self._need(target), rank=self._allowed.rank)
        note = f"DoRA as a plain delta of rank {plain.r}"
        self._kept += [Kept(f"{target}.{part}", Loss.APPROXIMATED, note, error) for part in ("lora_A", "lora_B", "magnitude")]
        return plain

    def _parameter(self, name: str, value: np.ndarray) -> None:
        kind = "biases" if name.endswith(".bias") else "norms" if value.ndim == 1 else "weights"
        if self._allowed.drops(name, kind):
            del self._replaced[name]
            self._drop(name)
        elif kind != "weights" or value.ndim != 2 or not name.endswith(".weight") or name[: -len(".weight")] in self._deltas:
            self._would[f"--allow-drop {kind}"] = None
        elif self._allows_approx():
            rank = self._allowed.rank or max((delta.r for delta in self._deltas.values()), default=16)
            delta, error = low_rank_weight(name, value, self._need(name), rank=rank)
            self._deltas[name.removesuffix(".weight")] = delta
            del self._replaced[name]
            self._kept.append(Kept(name, Loss.APPROXIMATED, f"a replaced weight as a delta of rank {delta.r}", error))

    def _table(self, target: str, rows: Rows) -> None:
        if self._allowed.drops(target, "rows"):
            del self._rows[target]
            self._drop(f"{target}.rows")
            return
        vocab = self._base.config.get("vocab_size") if self._base else None
        if target in self._deltas or not isinstance(vocab, int) or not all(0 <= number < vocab for number in rows.ids):
            self._would["--allow-drop rows"] = None
            return
        self._deltas[target] = low_rank_rows(target, rows, self._need(target), vocab)
        del self._rows[target]
        note = f"{len(rows.ids)} rows as the difference to the base's, each sum within 2^-23 of its larger part"
        self._kept.append(Kept(f"{target}.rows", Loss.ROUNDED, note, 2.0**-23))

    def _copy(self, name: str) -> None:
        # The writer refuses with the first copy alone; what may be said of one may be said of all.
        for each in list(self._copies):
            if self._allowed.drops(each, "copies"):
                del self._copies[each]
                self._drop(each)
        if name in self._copies:
            self._would["--allow-drop copies"] = None

    def _drop(self, *names: str) -> None:
        self._kept += [Kept(name, Loss.DROPPED, "left out, as allowed") for name in names]

    def _allows_approx(self) -> bool:
        if not self._allowed.approx:
            self._would["--allow-approx"] = None
        return self._allowed.approx

    def _need(self, name: str) -> Weights:
        if self._weights is None:
            self._would["--base with a Hugging Face folder that has the weights"] = None
            raise RefusedError(name, "the base's own weight is needed to say it otherwise")
        return self._weights


def _hint(would: Iterable[str]) -> str:
    words = list(would)
    return f"{' and '.join([', '.join(words[:-1]), words[-1]] if len(words) > 1 else words)} would help" if words else ""
