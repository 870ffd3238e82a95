"""Low-rank deltas of experts on a base that has a tensor for each expert, or one for all, whichever the adapter has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from adapterhub_converters.adapter import Delta, LowRank, StackedLowRank
from adapterhub_converters.architectures.architecture import Architecture
from adapterhub_converters.errors import RefusedError

from .edits import AddLowRank
from .read_folder import Folder, Weight
from .tensor_names import absent, check_shape


@dataclass(frozen=True)
class Piece:
    """One edit of a tensor of the base.

    Attributes:
        name: The tensor.
        edit: Of those rows alone.
        rows: The first, and how many, of the tensor seen as a matrix; None for all.
    """

    name: str
    edit: AddLowRank
    rows: tuple[int, int] | None = None


def pieces(folder: Folder, known: Architecture | None, target: str, delta: Delta, weight: float) -> Iterator[Piece]:
    """The edits that a delta of one expert or of all comes to, its scale times `weight`.

    Raises:
        RefusedError: The base has no such experts, or in other shapes; or the delta has more than its factors.
    """
    if not isinstance(delta, LowRank | StackedLowRank) or not delta.plain:
        raise RefusedError(target, f"a {type(delta).__name__} with more than its factors, on experts, cannot be merged")
    scale = delta.scaling * weight
    if isinstance(delta, LowRank):
        yield _one_of_stack(folder, known, target, delta, scale)
    elif own := folder.weights.get(target):
        yield from _stack(target, own, delta, scale)
    else:
        yield from _listed(folder, known, target, delta, scale)


def _stack(target: str, own: Weight, delta: StackedLowRank, scale: float) -> Iterator[Piece]:
    """All experts, in one tensor."""
    experts, out, into = delta.shape
    straight, across = (experts, out, into), (experts, into, out)
    transposed = delta.transposed_base
    if transposed is None:
        if straight == across:
            raise RefusedError(target, "square, and nothing says whether the base stores it (in, out) or (out, in)")
        transposed = own.shape == across
    check_shape(target, target, across if transposed else straight, own.shape)
    rows = own.shape[1]
    for number in range(experts):
        factors = LowRank(delta.lora_A[number], delta.lora_B[number], delta.alpha)
        yield Piece(target, AddLowRank(factors, scale, transposed), (number * rows, rows))


def _listed(folder: Folder, known: Architecture | None, target: str, delta: StackedLowRank, scale: float) -> Iterator[Piece]:
    """All experts of a parameter, on a base that lists them one by one."""
    if known is None or not known.listed or not known.is_stacked(target):
        raise absent(target, folder.spec.where)
    stems, (experts, out, _) = known.stems(target), delta.shape
    count = out // len(stems)
    interleaved = bool(known.experts and known.experts.interleaved)
    for expert in range(experts):
        for number, stem in enumerate(stems):
            rows = slice(number, None, len(stems)) if interleaved else slice(number * count, (number + 1) * count)
            name = f"{known.listed_module(stem, expert)}.weight"
            if name not in folder.weights:
                raise RefusedError(target, f"{experts} experts, and the base has no {name}")
            factors = LowRank(delta.lora_A[expert], delta.lora_B[expert][rows], delta.alpha)
            check_shape(target, name, factors.shape, folder.weights[name].shape)
            yield Piece(name, AddLowRank(factors, scale, transposed=False))
    last = f"{known.listed_module(stems[0], experts)}.weight"
    if last in folder.weights:
        raise RefusedError(target, f"{experts} experts, and the base has more: {last}")


def _one_of_stack(folder: Folder, known: Architecture | None, target: str, delta: LowRank, scale: float) -> Piece:
    """One expert, on a base that has one tensor for all."""
    stem, expert = (known.stem(target), known.expert(target)) if known else (None, None)
    parameter = known.stacked_module(stem) if known and stem else None
    own = folder.weights.get(parameter or "")
    if known is None or own is None or parameter is None or expert is None or stem is None:
        raise absent(target, folder.spec.where)
    stems = known.stems(parameter)
    turned = bool(known.experts and (known.experts.transposed or known.experts.interleaved))
    count = own.shape[1] // len(stems) if len(own.shape) == 3 else 0
    if turned or not count or expert >= own.shape[0] or delta.shape != (count, own.shape[2]):
        raise RefusedError(target, f"changes a weight of shape {delta.shape}, the base's {parameter} is {own.shape}")
    first = expert * own.shape[1] + stems.index(stem) * count
    return Piece(parameter, AddLowRank(delta, scale, transposed=False), (first, count))
