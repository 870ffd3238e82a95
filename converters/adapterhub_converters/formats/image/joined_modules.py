"""Modules of a trainer that are several of the base's: their rows are split when reading, and joined when writing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from adapterhub_converters.adapter import Delta, Hadamard, Kronecker, LowRank
from adapterhub_converters.errors import FormatError, RefusedError

from .name_table import Reading


def split_difference(stem: str, values: np.ndarray, reading: Reading, location: str) -> dict[str, np.ndarray]:
    """Return a difference for each of the base's modules."""
    if len(reading.targets) > 1:
        if not reading.shares or len(values) % sum(reading.shares):
            raise RefusedError(location, f"{stem}: {len(values)} numbers do not match {reading.targets[0]} and others")
        ends = np.cumsum(reading.shares)[:-1] * (len(values) // sum(reading.shares))
        return dict(zip(reading.targets, np.split(values, ends), strict=True))
    if reading.swapped and (reading.halves is not None or len(values) % 2):
        raise RefusedError(location, f"{stem}: which half of its {len(values)} numbers comes first is not known")
    return {reading.targets[0]: _swap_halves(values) if reading.swapped else values}


def split_delta(stem: str, delta: Delta, reading: Reading, location: str) -> dict[str, Delta]:
    """Return the delta of each of the base's modules.

    Block-diagonal factors, as written for modules that were trained separately, are split into their blocks.
    """
    if isinstance(delta, Hadamard | Kronecker) and len(reading.targets) > 1:
        return _split_product(stem, delta, reading, location)
    if not isinstance(delta, LowRank):
        if len(reading.targets) > 1 or reading.is_swapped(*delta.shape[:2]):
            problem = f"a delta of kind {type(delta).__name__} on a module that is {len(reading.targets)} of diffusers'"
            raise RefusedError(location, f"{stem}: {problem} is not supported")
        return {reading.targets[0]: delta}
    if len(reading.targets) == 1:
        return {reading.targets[0]: _swap_delta_halves(stem, delta, location) if reading.is_swapped(*delta.shape) else delta}
    ends = np.cumsum(_checked_sizes(stem, delta, reading, location))[:-1]
    blocks = [np.split(rows, ends) if rows is not None else [None] * (len(ends) + 1) for rows in _by_row(delta)]
    factors = [(delta.lora_A, np.ascontiguousarray(rows)) for rows in blocks[0]]
    blocks_of_own = _diagonal_blocks(factors)
    deltas: dict[str, Delta] = {}
    for target, (lora_A, lora_B), magnitude, bias in zip(reading.targets, blocks_of_own or factors, *blocks[1:], strict=True):
        if blocks_of_own and not np.any(lora_A) and not np.any(lora_B) and magnitude is None and bias is None:
            continue  # zeros: it was not trained
        alpha = delta.alpha * len(lora_A) / delta.r
        deltas[target] = LowRank(lora_A, lora_B, alpha, magnitude=magnitude, bias=bias)
    return deltas


def _by_row(delta: LowRank) -> tuple[np.ndarray | None, ...]:
    return delta.lora_B, delta.magnitude, delta.bias


def _split_product(stem: str, delta: Hadamard | Kronecker, reading: Reading, location: str) -> dict[str, Delta]:
    """Split LoHa by the rows of its first factors, LoKr by the rows of its first matrix, each of which covers the second."""
    sizes = _checked_sizes(stem, delta, reading, location)
    cut = [name for name in ("hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a") if name in delta.tensors]
    step = delta.shape[0] // len(delta.tensors[cut[0]])
    ends = np.cumsum(sizes)[:-1]
    pieces = {name: np.split(delta.tensors[name], ends // step) for name in cut}
    magnitudes = [None] * len(sizes) if delta.magnitude is None else np.split(delta.magnitude, ends)
    return {
        target: dataclasses.replace(
            delta, tensors={**delta.tensors, **{name: pieces[name][n] for name in cut}}, magnitude=magnitudes[n]
        )
        for n, target in enumerate(reading.targets)
    }


def stays_product(delta: Delta, reading: Reading) -> bool:
    """Return whether the base's modules can keep their rows of a product as products of its kind; True for other kinds."""
    if not isinstance(delta, Hadamard | Kronecker):
        return True
    if len(reading.targets) == 1:
        return not reading.is_swapped(*delta.shape[:2])
    first = next((delta.tensors[name] for name in ("lokr_w1", "lokr_w1_a", "hada_w1_a") if name in delta.tensors), None)
    step = 1 if first is None else delta.shape[0] // len(first)
    return len(delta.shape) == 2 and all(size % step == 0 for size in _sizes(delta.shape[1], reading))


def _checked_sizes(stem: str, delta: Delta, reading: Reading, location: str) -> list[int]:
    sizes = _sizes(delta.shape[1], reading)
    if sum(sizes) != delta.shape[0]:
        target_names = f"{reading.targets[0]} and {len(reading.targets) - 1} more"
        reason = f"{delta.shape[0]} rows and {delta.shape[1]} columns do not match {target_names}"
        raise RefusedError(location, f"{stem}: {reason}")
    return sizes


def _sizes(columns: int, reading: Reading) -> list[int]:
    """Return the number of rows of each of the reading's modules; empty if they are not whole numbers."""
    rows = columns * (reading.ratio or Fraction(0))
    sizes = [rows * share / sum(reading.shares) for share in reading.shares]
    return [int(size) for size in sizes] if all(size.denominator == 1 for size in sizes) else []


def _diagonal_blocks(factors: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """Return the blocks if each block of rows has columns of its own; None if rows share columns."""
    count, r = len(factors), factors[0][1].shape[1]
    if r % count or not any(np.any(rows) for _, rows in factors):
        return None
    size = r // count
    blocks = []
    for n, (lora_A, rows) in enumerate(factors):
        columns = slice(n * size, (n + 1) * size)
        if np.any(rows[:, : n * size]) or np.any(rows[:, (n + 1) * size :]):
            return None
        blocks.append((np.ascontiguousarray(lora_A[columns]), np.ascontiguousarray(rows[:, columns])))
    return blocks


def _swap_delta_halves(stem: str, delta: LowRank, location: str) -> LowRank:
    """Return the delta with the two halves of its rows swapped."""
    if delta.shape[0] % 2:
        raise FormatError(location, f"{stem}: {delta.shape[0]} rows cannot be halved")
    magnitude, bias = (None if rows is None else _swap_halves(rows) for rows in (delta.magnitude, delta.bias))
    return dataclasses.replace(delta, lora_B=_swap_halves(delta.lora_B), magnitude=magnitude, bias=bias)


def _swap_halves(rows: np.ndarray) -> np.ndarray:
    return np.concatenate([*reversed(np.split(rows, 2))])


def join_deltas(stem: str, deltas: Mapping[str, Delta], reading: Reading) -> Delta:
    """Return the single delta of the trainer's module, joined from `deltas` of some or all of `reading.targets`.

    Raises:
        RefusedError: They cannot be joined: one module has one scale and one magnitude.
    """
    first = next(iter(deltas.values()))
    if len(reading.targets) == 1 and not reading.is_swapped(*first.shape[:2]):
        return first
    members = {target: d for target in reading.targets if isinstance(d := deltas.get(target), LowRank)}  # in their order
    if len(members) < len(deltas):
        raise RefusedError(stem, f"a delta of kind {type(first).__name__} cannot be part of a larger module")
    if len(reading.targets) == 1:
        return _swap_delta_halves(stem, members[reading.targets[0]], stem)
    if len({delta.scaling for delta in members.values()}) > 1:
        raise RefusedError(stem, f"{', '.join(members)} are one module in this format, with one scale, but have several")
    kinds = {(delta.magnitude is None, delta.bias is None) for delta in members.values()}
    if kinds != {(True, True)} and (len(kinds) > 1 or len(members) < len(reading.targets)):
        problem = "are one module in this format, which has DoRA or a bias for all rows or for none"
        raise RefusedError(stem, f"{', '.join(members)} {problem}")
    return _stack_deltas(stem, members, reading)


def _stack_deltas(stem: str, members: Mapping[str, LowRank], reading: Reading) -> LowRank:
    deltas = list(members.values())
    width, dtype = deltas[0].lora_A.shape[1], deltas[0].lora_A.dtype
    if {delta.lora_A.shape[1] for delta in deltas} != {width} or len({d.lora_B.dtype for d in deltas} | {dtype}) > 1:
        raise RefusedError(stem, f"{', '.join(members)} are one module in this format, but differ in columns or dtypes")
    magnitude, bias = (_concatenate_present([getattr(delta, name) for delta in deltas]) for name in ("magnitude", "bias"))
    sizes = _sizes(width, reading)
    members_in_order = [members.get(target) for target in reading.targets]
    if not sizes or any(
        delta is not None and delta.shape[0] != size for delta, size in zip(members_in_order, sizes, strict=True)
    ):
        raise RefusedError(stem, f"{', '.join(members)} are one module in this format, but have other numbers of rows")
    scaling = deltas[0].scaling
    if len(deltas) == len(reading.targets) and len({delta.lora_A.tobytes() for delta in deltas}) == 1:
        lora_B = np.concatenate([delta.lora_B for delta in deltas])
        return LowRank(deltas[0].lora_A, lora_B, scaling * deltas[0].r, magnitude=magnitude, bias=bias)
    # Each gets one block of the largest rank on the diagonal; missing and smaller ones are padded with zeros.
    r = max(delta.r for delta in deltas)
    lora_A = np.zeros((r * len(members_in_order), width), dtype)
    lora_B = np.zeros((sum(sizes), r * len(members_in_order)), dtype)
    row = 0
    for n, (delta, size) in enumerate(zip(members_in_order, sizes, strict=True)):
        if delta is not None:
            lora_A[n * r : n * r + delta.r] = delta.lora_A
            lora_B[row : row + size, n * r : n * r + delta.r] = delta.lora_B
        row += size
    return LowRank(lora_A, lora_B, scaling * r * len(members_in_order), magnitude=magnitude, bias=bias)


def _concatenate_present(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    present = [rows for rows in arrays if rows is not None]
    return np.concatenate(present) if present else None
