"""The tensors of one module, under the words of kohya, LyCORIS and diffusers, and the delta they make."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import CpConv, Delta, Hadamard, Kronecker, LowRank, LowRankConv
from adapterhub_converters.errors import FormatError, RefusedError

from .table import Reading

Parts = dict[str, np.ndarray]
Shape = tuple[int, ...] | None

_LYCORIS = [f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")]
_LYCORIS += [f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
_ENDS = {
    ".lora_down.weight": "A", ".lora_up.weight": "B", ".lora_mid.weight": "mid", ".alpha": "alpha", ".dora_scale": "dora_scale",
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "bias",
    ".lora_A.default.weight": "A", ".lora_B.default.weight": "B", ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude", ".diff": "diff", ".diff_b": "diff_b",
    ".lora.down.weight": "A", ".lora.up.weight": "B", ".down.weight": "A", ".up.weight": "B",
    ".lora_linear_layer.down.weight": "A", ".lora_linear_layer.up.weight": "B",
    **{f".{name}": name for name in _LYCORIS},
}  # fmt: skip
_BY_LENGTH = sorted(_ENDS, key=len, reverse=True)
TINY = 1e-38  # a normal float32; times any factor it adds nothing to any weight


def split_name(name: str) -> tuple[str, str] | None:
    """The module's name in that of a tensor, and which part of a delta it is; None for no part of any."""
    end = next((end for end in _BY_LENGTH if name.endswith(end)), None)
    return (name.removesuffix(end), _ENDS[end]) if end else None


def outline(part: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
    """Rows and columns of the weight of a module, a kernel aside; None where the tensors don't say them at a glance."""
    matrices = {name: array for name, array in part.items() if array.ndim > 1 and 0 not in array.shape}
    for up, down in (("B", "A"), ("diff", "diff"), ("hada_w1_a", "hada_w1_b")):
        if up in matrices and down in matrices and "hada_t1" not in matrices:
            return matrices[up].shape[0], matrices[down].shape[1]
    one, two = (_factor_outline(matrices, n) for n in (1, 2))
    return (one[0] * two[0], one[1] * two[1]) if one and two else None


def _factor_outline(matrices: Mapping[str, np.ndarray], n: int) -> tuple[int, int] | None:
    whole, a, b = (matrices.get(f"lokr_w{n}{end}") for end in ("", "_a", "_b"))
    if whole is not None:
        return whole.shape[0], whole.shape[1]
    return None if a is None or b is None or f"lokr_t{n}" in matrices else (a.shape[0], b.shape[1])


def delta_of(target: str, given: Mapping[str, np.ndarray], kernel: tuple[int, ...], where: str) -> Delta:
    """What the tensors of one module make. RefusedError for what isn't read, FormatError for what makes no sense.

    An alpha that is missing or 0 counts as the rank (sd-scripts, `networks/lora.py`).
    """
    part = dict(given)
    for name, array in part.items():
        if name != "alpha" and (0 in array.shape or dtypes.name_of(array.dtype) not in dtypes.FLOATS):
            raise FormatError(where, f"{target}: {name} is {array.dtype} {array.shape}, which no factor is")
    alpha = _alpha(target, part.pop("alpha", None), where)
    if any(name.startswith("hada_") for name in part):
        return _hadamard(target, part, alpha, kernel, where)
    if any(name.startswith("lokr_") for name in part):
        return _kronecker(target, part, alpha, kernel, where)
    if "diff" in part and "A" not in part:
        return _difference(target, part, where)
    return _pair(target, part, alpha, where)


def _alpha(target: str, array: np.ndarray | None, where: str) -> float:
    """0 where it is the rank."""
    if array is None:
        return 0.0
    value = float(array.astype(np.float64).reshape(-1)[0]) if array.size == 1 else math.nan
    if not math.isfinite(value) or abs(value) > 2**40:
        raise FormatError(where, f"{target}: alpha is {array.dtype} {array.shape}, not a number that makes sense")
    return value


def _pair(target: str, part: Parts, alpha: float, where: str) -> Delta:
    lora_A, lora_B, mid = part.pop("A", None), part.pop("B", None), part.pop("mid", None)
    if lora_A is None or lora_B is None:
        there = ", ".join(sorted(part) or ["lora_up" if lora_A is None and lora_B is not None else "lora_down"])
        if lora_A is None and lora_B is None:
            raise RefusedError(where, f"{target}: {there} alone, without a pair of factors, is not read")
        raise FormatError(where, f"{target} has {there} alone, its other half is missing")
    shapes = f"lora_down {lora_A.shape} and lora_up {lora_B.shape}"
    if lora_A.ndim != lora_B.ndim or not 2 <= lora_A.ndim <= 5 or lora_A.shape[0] != lora_B.shape[1]:
        raise FormatError(where, f"{target}: {shapes} are no pair")
    if any(size != 1 for size in lora_B.shape[2:]):
        raise FormatError(where, f"{target}: {shapes}: the second of two convolutions is 1 by 1")
    r = len(lora_A)
    alpha = alpha or float(r)
    if mid is not None:
        if part:
            raise RefusedError(where, f"{target}: {', '.join(sorted(part))} beside lora_mid is not read")
        if lora_A.ndim != 4 or lora_A.shape[2:] != (1, 1) or mid.ndim != 4 or mid.shape[:2] != (r, r):
            raise FormatError(where, f"{target}: lora_mid {mid.shape} does not fit lora_down {lora_A.shape}")
        return CpConv(lora_A, lora_B, mid, alpha)
    magnitude = _magnitude(target, part, lora_B, where)
    bias = _bias(target, part, lora_B, alpha / r, where)
    if part:
        raise RefusedError(where, f"{target}: {', '.join(sorted(part))} beside a pair of factors is not read")
    if lora_A.ndim == 2:
        return LowRank(lora_A, lora_B, alpha, magnitude=magnitude, bias=bias)
    return LowRankConv(lora_A, lora_B, alpha, magnitude=magnitude, bias=bias)


def _magnitude(target: str, part: Parts, lora_B: np.ndarray, where: str) -> np.ndarray | None:
    """DoRA's: one number for each output; `dora_scale` `(out, 1, …)` has as many dimensions as the weight."""
    own, scale = part.pop("magnitude", None), part.pop("dora_scale", None)
    found = own if own is not None else scale
    if found is None:
        return None
    rows = len(lora_B)
    if found.size != rows or (found.ndim > 1 and found.shape.index(rows) != (1 if own is not None and found.ndim > 2 else 0)):
        reason = f"{target}: a DoRA scale of the shape {found.shape} is not one number for each of {rows} outputs"
        raise RefusedError(where, f"{reason}; scales of inputs, as LyCORIS first had them, are another function")
    return found.reshape(rows) if lora_B.ndim == 2 else found.reshape(1, rows, *lora_B.shape[2:])


def _bias(target: str, part: Parts, lora_B: np.ndarray, scaling: float, where: str) -> np.ndarray | None:
    own, added = part.pop("bias", None), part.pop("diff_b", None)
    found = own if own is not None else added
    if found is None:
        return None
    if found.shape != lora_B.shape[:1] or (own is not None and added is not None):
        raise FormatError(
            where, f"{target}: a bias of the shape {found.shape} is not one number for each of {len(lora_B)} outputs"
        )
    if own is not None or scaling == 1:
        return found
    result: np.ndarray = (found.astype(np.float64) / scaling).astype(np.float32)
    return result


def _difference(target: str, part: Parts, where: str) -> Delta:
    """A whole difference as the pair of itself and an identity."""
    diff = part.pop("diff")
    if part:
        raise RefusedError(where, f"{target}: {', '.join(sorted(part))} beside diff is not read")
    if not 2 <= diff.ndim <= 5:
        raise RefusedError(where, f"{target}: a difference of the shape {diff.shape}, as of a norm, is not read")
    flat = diff.reshape(len(diff), -1)
    out, width = flat.shape
    # The identity is on the shorter side: no larger than the difference, whatever shape a file claims.
    lora_A, lora_B = (np.eye(width, dtype=diff.dtype), flat) if width < out else (flat, np.eye(out, dtype=diff.dtype))
    alpha = float(min(out, width))
    if diff.ndim == 2:
        return LowRank(lora_A, lora_B, alpha)
    ones = (1,) * (diff.ndim - 2)
    return LowRankConv(lora_A.reshape(-1, *diff.shape[1:]), lora_B.reshape(*lora_B.shape, *ones), alpha)


def _hadamard(target: str, part: Parts, alpha: float, kernel: tuple[int, ...], where: str) -> Delta:
    shapes = {name: array.shape for name, array in part.items()}
    wanted, cores = {f"hada_w{n}_{half}" for n in (1, 2) for half in "ab"}, {"hada_t1", "hada_t2"} & set(part)
    if set(part) - wanted - cores:
        raise RefusedError(where, f"{target}: {', '.join(sorted(set(part) - wanted - cores))} beside LoHa is not read")
    fits = wanted <= set(part) and len(cores) != 1 and all(len(shapes[name]) == 2 for name in wanted)
    if fits:
        r = shapes["hada_w1_b"][0]
        fits = all(shapes[f"hada_w1_{half}"] == shapes[f"hada_w2_{half}"] for half in "ab")
        fits = fits and shapes["hada_w1_a"][0 if cores else 1] == r and all(shapes[core][:2] == (r, r) for core in cores)
    if not fits:
        raise FormatError(where, f"{target}: {_said(shapes)} make no LoHa delta")
    flat = () if cores else _flat(target, kernel, shapes["hada_w1_b"][1], where)
    return Hadamard(part, alpha or float(r), flat)


def _kronecker(target: str, part: Parts, alpha: float, kernel: tuple[int, ...], where: str) -> Delta:
    shapes = {name: array.shape for name, array in part.items()}
    if other := sorted(name for name in part if not name.startswith("lokr_")):
        raise RefusedError(where, f"{target}: {', '.join(other)} beside LoKr is not read")
    whole = [f"lokr_w{n}" in part for n in (1, 2)]
    ranks = {shapes[f"lokr_w{n}_b"][0] for n in (1, 2) if len(shapes.get(f"lokr_w{n}_b", ())) == 2}
    if not _is_kronecker(shapes) or (len(ranks) != 1) != all(whole):
        raise FormatError(where, f"{target}: {_said(shapes)} make no LoKr delta")
    if all(whole):  # nothing has a rank: LyCORIS and ComfyUI then scale by 1, whatever alpha says
        return Kronecker(part, 1.0, 1)
    r = ranks.pop()
    flat = () if "lokr_t2" in part or whole[1] else _flat(target, kernel, shapes["lokr_w2_b"][1], where)
    return Kronecker(part, alpha or float(r), r, flat)


def _is_kronecker(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(_is_factor(n, *(shapes.get(f"lokr_{end}") for end in (f"w{n}", f"w{n}_a", f"w{n}_b", f"t{n}"))) for n in (1, 2))


def _is_factor(n: int, whole: Shape, a: Shape, b: Shape, core: Shape) -> bool:
    """Whether one of LoKr's two is there whole, or as a pair of one rank, with a core that fits if it has one."""
    if whole is not None:
        return not (a or b or core) and len(whole) in ((2,) if n == 1 else (2, 4))
    if not a or not b or len(a) != 2 or len(b) != 2:
        return False
    return a[1] == b[0] if core is None else len(core) == 4 and core[:2] == (a[0], b[0])


def _flat(target: str, kernel: tuple[int, ...], columns: int, where: str) -> tuple[int, ...]:
    if columns % math.prod(kernel):
        raise FormatError(where, f"{target}: {columns} columns are no convolution of {kernel}")
    return kernel


def _said(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))


def tensors_of(given: Delta) -> tuple[Parts, float | None]:
    """The tensors of a delta that has them in these formats, without its alpha, and the alpha, None where it has none.

    PEFT's alpha of 0 does nothing, kohya's is the rank; a tiny one does nothing in both.
    """
    if isinstance(given, Hadamard):
        return dict(given.tensors), given.alpha or TINY
    if isinstance(given, Kronecker):
        ranks = [given.tensors[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in given.tensors]
        return dict(given.tensors), (given.scaling * ranks[0] or TINY) if ranks else None
    if not isinstance(given, LowRank | LowRankConv | CpConv):
        raise RefusedError("", f"a delta of the kind {type(given).__name__} cannot be said in these words")
    alpha = given.scaling * given.r or TINY
    found: Parts = {"lora_down.weight": given.lora_A, "lora_up.weight": given.lora_B}
    if isinstance(given, CpConv):
        return {**found, "lora_mid.weight": given.lora_mid}, alpha
    if given.magnitude is not None:
        found["dora_scale"] = given.magnitude.reshape(-1, *(1,) * (given.lora_A.ndim - 1))
    if given.bias is not None:
        found["diff_b"] = (
            given.bias if given.scaling == 1 else (given.bias.astype(np.float64) * given.scaling).astype(np.float32)
        )
    return found, alpha


def alpha_tensor(alpha: float, dtype: np.dtype) -> np.ndarray:
    """A 0-d tensor of `alpha`, in `dtype` where that holds it exactly, else in float32."""
    own = np.asarray(alpha, dtype)
    return own if float(own) == alpha else np.asarray(alpha, dtypes.F32)


# ---- One module of a trainer that is several of the base's, its rows one below the other: apart, and together again


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
