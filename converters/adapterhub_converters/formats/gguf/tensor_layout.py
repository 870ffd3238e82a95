"""The place of each delta in the tensors of a GGUF adapter: which block of which tensor.

Usually one module is one pair of tensors. But llama.cpp stacks the experts of a layer into one tensor, its conversion may fuse
q, k and v, and transformers has the gate and up projections of all experts in one parameter. So a delta is laid out in parts:
rows of its `lora_B`, at a row, a column and an expert of a stem's `lora_b`, and its `lora_A` at the same columns and expert of
`lora_a`. Everything else is zero: experts without a delta, ranks below the largest, and the off-diagonal blocks of a fused
tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from itertools import pairwise

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import LowRank, LowRankEmbedding, StackedLowRank
from adapterhub_converters.architectures.architecture import FUSED, FUSED_IN, Architecture, Order, layer_of
from adapterhub_converters.architectures.architecture_lookup import piece_rows
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import source_config
from adapterhub_converters.lazy_dataclass import dataclass

INVOCATION = "adapter.alora.invocation_tokens"
"""The ids of the tokens after which an aLoRA starts to act, in a list of UINT32."""
ALL_EXPERTS = -1
"""All experts, in place of an expert's number."""


@dataclass(frozen=True, slots=True)
class Size:
    """The properties of a delta that determine its place.

    Attributes:
        r: Its rank.
        rows: Its number of rows.
        experts: The number of experts if it covers all of them, else 0.
        pieces: The number of rows in each of its tensors; empty if they are divided evenly.
    """

    r: int
    rows: int
    experts: int = 0
    pieces: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """`count` rows of a target's `lora_B`, from `start` in steps of `step`, and their place in the pair `stem`."""

    stem: str
    expert: int | None
    column: int
    row: int
    start: int
    step: int
    count: int


@dataclass
class Layout:
    """The parts of each target, and the rank, rows and experts of each stem."""

    parts: dict[str, list[Part]] = field(default_factory=dict)
    rank: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)

    def is_whole(self, target: str) -> bool:
        """Return whether a target is alone in a pair and fills it."""
        parts = self.parts[target]
        stem = parts[0].stem
        is_alone = len(parts) == 1 and self.members[stem] == [target] and parts[0].expert in (None, ALL_EXPERTS)
        return is_alone and (parts[0].step, parts[0].count) == (1, self.rows[stem])

    def rank_of(self, target: str) -> int:
        """Return the rank by which llama.cpp divides alpha for a target; all parts of the target have the same."""
        return self.rank[self.parts[target][0].stem]


def size_of(delta: LowRank | LowRankEmbedding | StackedLowRank, order: Order = 0) -> Size:
    """Return the size of a delta whose rows have an order in llama.cpp."""
    if isinstance(delta, StackedLowRank):
        return Size(delta.r, delta.shape[1], delta.shape[0])
    return Size(delta.r, delta.lora_B.shape[0], pieces=piece_rows(order))


def arrange(
    architecture: Architecture, sizes: Mapping[str, Size], n_experts: int, rows: Mapping[str, int], location: str
) -> Layout:
    """Lay out deltas of these sizes; RefusedError names a delta that has no place.

    Args:
        architecture: The base's architecture, which has every target.
        sizes: Target to the size of its delta, in the order of the file.
        n_experts: The number of experts in a layer of the base; 0 if it has none or the number is unknown.
        rows: The number of rows of each tensor of the base, or of the file, by stem. If empty, every module is assumed to be
            stored as the architecture has it.
        location: What errors name.
    """
    layout = Layout()
    columns: dict[tuple[str, int | None], int] = {}
    for target, size in sorted(sizes.items(), key=lambda item: _fused_order(architecture, item[0])):
        expert = ALL_EXPERTS if size.experts else architecture.expert(target)
        if expert is not None and expert != ALL_EXPERTS and expert >= n_experts:
            problem = f"{target}: the base has {n_experts or 'an unknown number of'} experts"
            raise RefusedError(location, problem, "Name its base model", code="base-required")
        parts = _place_rows(architecture, target, size, rows, location)
        # Each target gets columns of its own in a shared tensor, so that its factors do not mix with those of others.
        free = {part[0]: columns.get((part[0], expert), 0) for part in parts}
        for stem, row, start, step, count in parts:
            columns[stem, expert] = free[stem] + size.r
            layout.parts.setdefault(target, []).append(Part(stem, expert, free[stem], row, start, step, count))
            layout.rank[stem] = max(layout.rank.get(stem, 0), columns[stem, expert])
            fused = rows.get(stem, 0) if stem.rpartition(".")[2] in FUSED else 0
            layout.rows[stem] = max(layout.rows.get(stem, 0), fused, row + count)
            layout.experts[stem] = 0 if expert is None else n_experts if expert != ALL_EXPERTS else size.experts
            if target not in layout.members.setdefault(stem, []):
                layout.members[stem].append(target)
    _check_overlaps(layout, location)
    layout.parts = {target: layout.parts[target] for target in sizes}
    return layout


def _fused_order(architecture: Architecture, target: str) -> tuple[int, str, int]:
    """Return a sort key that puts deltas in their order within a fused tensor."""
    layer = layer_of(target)
    stem = str(architecture.stem(target)).rpartition(".")[2]
    fused_stem, parts = FUSED_IN.get(stem, (stem, (stem,)))
    return -1 if layer is None else layer, fused_stem, parts.index(stem)


_Rows = tuple[str, int, int, int, int]


def _place_rows(architecture: Architecture, target: str, size: Size, rows: Mapping[str, int], location: str) -> list[_Rows]:
    """Return, for each part, its stem, its row there, and start, step and count of its rows."""
    placements: list[_Rows] = []
    stems = architecture.stems(target)
    count, remainder = divmod(size.rows, len(stems))
    counts = size.pieces or (count,) * len(stems)
    if (remainder and not size.pieces) or len(counts) != len(stems) or sum(counts) != size.rows:
        raise RefusedError(location, f"{target}: {size.rows} rows cannot be divided evenly into {' and '.join(stems)}")
    interleaved = bool(architecture.experts and architecture.experts.interleaved)
    for number, (stem, count) in enumerate(zip(stems, counts, strict=True)):
        start, step = (number, len(stems)) if interleaved else (sum(counts[:number]), 1)
        prefix, _, name = stem.rpartition(".")
        prefix += "." if prefix else ""
        # What the base actually stores decides, not what the architecture usually has.
        fused_stem = f"{prefix}{FUSED_IN[name][0]}" if name in FUSED_IN else ""
        pieces = [f"{prefix}{piece}" for piece in FUSED.get(name, ())]
        # The base stores this tensor as a part of a fused one.
        if stem not in rows and fused_stem in rows:
            placements.append(
                (fused_stem, _first_row(name, count, rows[fused_stem], f"{location}: {target}"), start, step, count)
            )
        # The base stores this module as several tensors.
        elif stem not in rows and pieces and all(piece in rows for piece in pieces):
            for piece in pieces:
                placements.append((piece, 0, start, 1, rows[piece]))
                start += rows[piece]
            if start != size.rows:
                raise RefusedError(location, f"{target}: {size.rows} rows do not match {', '.join(pieces)} together")
        else:
            placements.append((stem, 0, start, step, count))
    return placements


def _first_row(name: str, count: int, total: int, location: str) -> int:
    """Return the first row of a tensor within the fused tensor of `total` rows.

    k and v have equally many rows, and so do gate and up.
    """
    row = {"attn_q": 0, "attn_k": total - 2 * count, "attn_v": total - count, "ffn_gate_exps": 0, "ffn_up_exps": count}[name]
    if name.endswith("_exps"):
        fits = total == 2 * count
    else:
        # Grouped-query attention: q never has fewer rows than k.
        keys = (total - count) // 2 if name == "attn_q" else count
        queries = total - 2 * keys
        fits = keys >= 1 and queries >= keys and (name != "attn_q" or queries == count)
    if not fits:
        raise RefusedError(location, f"{count} rows do not fit into a fused tensor of {total} rows")
    return row


def _check_overlaps(layout: Layout, location: str) -> None:
    ends: dict[tuple[str, int | None], list[tuple[int, int, str]]] = {}
    for target, parts in layout.parts.items():
        for part in parts:
            ends.setdefault((part.stem, part.expert), []).append((part.row, part.row + part.count, target))
    for (stem, expert), spans in ends.items():
        spans.sort()
        clash = next((later for earlier, later in pairwise(spans) if later[0] < earlier[1]), None)
        if clash or (expert != ALL_EXPERTS and (stem, ALL_EXPERTS) in ends):
            raise RefusedError(location, f"{(clash or spans[0])[2]}: there are several deltas for the same rows of {stem}")


Arrays = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Target to `lora_A`, and to `lora_B` with its rows in llama.cpp's order."""


def assemble(layout: Layout, stem: str, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Return `lora_a` and `lora_b` of a stem: the arrays themselves if one target fills it, else zeros around them."""
    targets = layout.members[stem]
    if layout.is_whole(targets[0]):
        return arrays[targets[0]]
    stack = (layout.experts[stem],) if layout.experts[stem] else ()
    columns, r = arrays[targets[0]][0].shape[-1], layout.rank[stem]
    lora_a = np.zeros((*stack, r, columns), _common_dtype([arrays[target][0] for target in targets]))
    lora_b = np.zeros((*stack, layout.rows[stem], r), _common_dtype([arrays[target][1] for target in targets]))
    for target in targets:
        lora_A, lora_B = arrays[target]
        for part in layout.parts[target]:
            if part.stem == stem:
                a, b = _blocks(part, lora_a, lora_b, lora_A.shape[-2])
                a[...] = lora_A
                b[...] = lora_B[..., part.start :: part.step, :][..., : part.count, :]
    return lora_a, lora_b


def take_apart(layout: Layout, target: str, size: Size, tensors: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of one target from the file's tensors by stem: the inverse of `assemble`."""
    first = layout.parts[target][0]
    if layout.is_whole(target):
        return tensors[first.stem]
    stack = (size.experts,) if size.experts else ()
    lora_B = np.zeros((*stack, size.rows, size.r), tensors[first.stem][1].dtype)
    for part in layout.parts[target]:
        lora_B[..., part.start :: part.step, :][..., : part.count, :] = _blocks(part, *tensors[part.stem], size.r)[1]
    return _blocks(first, *tensors[first.stem], size.r)[0].copy(), lora_B


def _blocks(part: Part, lora_a: np.ndarray, lora_b: np.ndarray, r: int) -> tuple[np.ndarray, np.ndarray]:
    if part.expert is not None and part.expert != ALL_EXPERTS:
        lora_a, lora_b = lora_a[part.expert], lora_b[part.expert]
    columns = slice(part.column, part.column + r)
    return lora_a[..., columns, :], lora_b[..., part.row : part.row + part.count, columns]


def _common_dtype(arrays: Sequence[np.ndarray]) -> np.dtype:
    """Return the dtype of all arrays or, if they differ, float32, which can hold every element of 16-bit ones."""
    kinds = {array.dtype for array in arrays}
    return kinds.pop() if len(kinds) == 1 else dtypes.F32


HUB = "https://huggingface.co/"


def file_digest(architecture: str, alpha: float, tensors: Mapping[str, np.ndarray], invocation: Sequence[int] = ()) -> str:
    """Return the digest of everything that determines what llama.cpp computes: a source's config belongs to this payload."""
    condition = [",".join(map(str, invocation))] if invocation else []
    return source_config.payload_digest(tensors, architecture, np.float32(alpha).tobytes().hex(), *condition)
