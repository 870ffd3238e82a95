"""One module of a trainer that is several of the base's, its rows one below the other: apart, and together again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from adapterhub_converters.adapter import Delta, Hadamard, Kronecker, LowRank
from adapterhub_converters.errors import FormatError, RefusedError

from .table import Reading


def apart(stem: str, delta: Delta, reading: Reading, where: str) -> dict[str, Delta]:
    """The delta of each of the base's modules.

    Factors that are blocks of the whole's, as trainers of the modules apart write them, come out as those blocks.
    """
    if isinstance(delta, Hadamard | Kronecker) and len(reading.targets) > 1:
        return _products(stem, delta, reading, where)
    if not isinstance(delta, LowRank):
        if len(reading.targets) > 1 or reading.is_turned(*delta.shape[:2]):
            what = f"a delta of the kind {type(delta).__name__} on a module that is {len(reading.targets)} of diffusers'"
            raise RefusedError(where, f"{stem}: {what} is not read")
        return {reading.targets[0]: delta}
    if len(reading.targets) == 1:
        return {reading.targets[0]: _turned(stem, delta, where) if reading.is_turned(*delta.shape) else delta}
    ends = np.cumsum(_checked_sizes(stem, delta, reading, where))[:-1]
    blocks = [np.split(rows, ends) if rows is not None else [None] * (len(ends) + 1) for rows in _by_row(delta)]
    factors = [(delta.lora_A, np.ascontiguousarray(rows)) for rows in blocks[0]]
    own = _diagonal(factors)
    found: dict[str, Delta] = {}
    for target, (lora_A, lora_B), magnitude, bias in zip(reading.targets, own or factors, *blocks[1:], strict=True):
        if own and not np.any(lora_A) and not np.any(lora_B) and magnitude is None and bias is None:
            continue  # zeros: what nobody trained
        alpha = delta.alpha * len(lora_A) / delta.r
        found[target] = LowRank(lora_A, lora_B, alpha, magnitude=magnitude, bias=bias)
    return found


def _by_row(delta: LowRank) -> tuple[np.ndarray | None, ...]:
    return delta.lora_B, delta.magnitude, delta.bias


def _products(stem: str, delta: Hadamard | Kronecker, reading: Reading, where: str) -> dict[str, Delta]:
    """Rows of LoHa are those of its first factors; of LoKr, as many together as the second has, those of the first."""
    sizes = _checked_sizes(stem, delta, reading, where)
    cut = [name for name in ("hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a") if name in delta.tensors]
    step = delta.shape[0] // len(delta.tensors[cut[0]])
    if not delta.is_low_rank or any(size % step for size in sizes):
        raise RefusedError(
            where, f"{stem}: a {type(delta).__name__} product whose rows are not those of {reading.targets[0]} alone"
        )
    ends = np.cumsum(sizes)[:-1] // step
    pieces = {name: np.split(delta.tensors[name], ends) for name in cut}
    return {
        target: dataclasses.replace(delta, tensors={**delta.tensors, **{name: pieces[name][n] for name in cut}})
        for n, target in enumerate(reading.targets)
    }


def _checked_sizes(stem: str, delta: Delta, reading: Reading, where: str) -> list[int]:
    sizes = _sizes(delta.shape[1], reading)
    if sum(sizes) != delta.shape[0]:
        several = f"{reading.targets[0]} and {len(reading.targets) - 1} more"
        reason = f"{delta.shape[0]} rows for {delta.shape[1]} columns are not those of {several}"
        raise RefusedError(where, f"{stem}: {reason}")
    return sizes


def _sizes(columns: int, reading: Reading) -> list[int]:
    """How many rows each of its modules has; none where they don't come out even."""
    rows = columns * (reading.ratio or Fraction(0))
    sizes = [rows * share / sum(reading.shares) for share in reading.shares]
    return [int(size) for size in sizes] if all(size.denominator == 1 for size in sizes) else []


def _diagonal(factors: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """The blocks, if each row block uses columns of its own; None if they share them."""
    count, r = len(factors), factors[0][1].shape[1]
    if r % count or not any(np.any(rows) for _, rows in factors):
        return None
    size = r // count
    found = []
    for n, (lora_A, rows) in enumerate(factors):
        mine = slice(n * size, (n + 1) * size)
        if np.any(rows[:, : n * size]) or np.any(rows[:, (n + 1) * size :]):
            return None
        found.append((np.ascontiguousarray(lora_A[mine]), np.ascontiguousarray(rows[:, mine])))
    return found


def _turned(stem: str, delta: LowRank, where: str) -> LowRank:
    """The two halves of all rows in each other's place."""
    if delta.shape[0] % 2:
        raise FormatError(where, f"{stem}: {delta.shape[0]} rows have no halves")
    magnitude, bias = (None if rows is None else _swapped(rows) for rows in (delta.magnitude, delta.bias))
    return dataclasses.replace(delta, lora_B=_swapped(delta.lora_B), magnitude=magnitude, bias=bias)


def _swapped(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([*reversed(np.split(rows, 2))])


def together(stem: str, deltas: Mapping[str, Delta], reading: Reading) -> Delta:
    """The one delta of the trainer's module; `deltas` are those of `reading.targets` that there are.

    RefusedError names what it can't be: one module has one scale and one magnitude.
    """
    first = next(iter(deltas.values()))
    if len(reading.targets) == 1 and not reading.is_turned(*first.shape[:2]):
        return first
    members = {target: d for target in reading.targets if isinstance(d := deltas.get(target), LowRank)}  # in their order
    if len(members) < len(deltas):
        raise RefusedError(stem, f"a delta of the kind {type(first).__name__} is not written for rows of a larger module")
    if len(reading.targets) == 1:
        return _turned(stem, members[reading.targets[0]], stem)
    if len({delta.scaling for delta in members.values()}) > 1:
        raise RefusedError(stem, f"{', '.join(members)} are one module there, with one scale, and have several")
    kinds = {(delta.magnitude is None, delta.bias is None) for delta in members.values()}
    if kinds != {(True, True)} and (len(kinds) > 1 or len(members) < len(reading.targets)):
        what = "are one module there, which is DoRA or has a bias whole or not at all"
        raise RefusedError(stem, f"{', '.join(members)} {what}")
    return _stacked(stem, members, reading)


def _stacked(stem: str, members: Mapping[str, LowRank], reading: Reading) -> LowRank:
    several = list(members.values())
    width, dtype = several[0].lora_A.shape[1], several[0].lora_A.dtype
    if {delta.lora_A.shape[1] for delta in several} != {width} or len({d.lora_B.dtype for d in several} | {dtype}) > 1:
        raise RefusedError(stem, f"{', '.join(members)} are one module there and differ in columns or dtypes")
    magnitude, bias = (_concatenated([getattr(delta, name) for delta in several]) for name in ("magnitude", "bias"))
    sizes = _sizes(width, reading)
    there = [members.get(target) for target in reading.targets]
    if not sizes or any(delta is not None and delta.shape[0] != size for delta, size in zip(there, sizes, strict=True)):
        raise RefusedError(stem, f"{', '.join(members)} have other numbers of rows than modules that are one there")
    scaling = several[0].scaling
    if len(several) == len(reading.targets) and len({delta.lora_A.tobytes() for delta in several}) == 1:
        lora_B = np.concatenate([delta.lora_B for delta in several])
        return LowRank(several[0].lora_A, lora_B, scaling * several[0].r, magnitude=magnitude, bias=bias)
    # A block for each on the diagonal, of the largest rank; what is missing or smaller is filled up with zeros.
    r = max(delta.r for delta in several)
    lora_A = np.zeros((r * len(there), width), dtype)
    lora_B = np.zeros((sum(sizes), r * len(there)), dtype)
    row = 0
    for n, (delta, size) in enumerate(zip(there, sizes, strict=True)):
        if delta is not None:
            lora_A[n * r : n * r + delta.r] = delta.lora_A
            lora_B[row : row + size, n * r : n * r + delta.r] = delta.lora_B
        row += size
    return LowRank(lora_A, lora_B, scaling * r * len(there), magnitude=magnitude, bias=bias)


def _concatenated(several: Sequence[np.ndarray | None]) -> np.ndarray | None:
    there = [rows for rows in several if rows is not None]
    return np.concatenate(there) if there else None
