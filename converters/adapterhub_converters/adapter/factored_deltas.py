"""Deltas that equal low-rank pairs without the base: AdaLoRA, QALoRA, LoHa, LoKr, VeRA, CP convolutions.

Each keeps the tensors of its file, so that PEFT gets its own back, and has the pair that it equals (`as_low_rank`), if there is
one (`is_low_rank`). That pair is the same function in exact arithmetic; its factors are products, rounded once in float32. A
file of a few bytes can describe a huge pair, so `as_pairs` limits pairs to a multiple of the stored numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import field, replace
from typing import ClassVar

from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.lazy_imports import np

from .deltas import HasArrays, HasFactors, LowRank, LowRankConv, Parts


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class AdaLora(HasArrays):
    """`lora_B @ (lora_E * lora_A)` times `alpha / (r + 1e-5)` (arXiv 2303.10512; peft, `tuners/adalora/layer.py`)."""

    is_low_rank: ClassVar = True
    lora_A: np.ndarray
    lora_B: np.ndarray
    lora_E: np.ndarray
    alpha: float
    transposed_base: bool = False
    rslora: bool = field(default=False, init=False)

    @property
    def r(self) -> int:
        """The rank after pruning."""
        return int(self.lora_A.shape[0])

    @property
    def scaling(self) -> float:
        """The factor of the product; an `alpha` of 0 or less counts as `r`."""
        return (self.alpha if self.alpha > 0 else self.r) / (self.r + 1e-5)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)` of the delta."""
        return int(self.lora_B.shape[0]), int(self.lora_A.shape[1])

    def parts(self) -> Parts:
        """Yield the tensors with their names."""
        yield from (("lora_A", self.lora_A), ("lora_B", self.lora_B), ("lora_E", self.lora_E))

    def as_low_rank(self) -> LowRank:
        """Return the pair of the same rank, with `lora_E` multiplied into `lora_A`."""
        lora_A = _f32(self.lora_A) * _f32(self.lora_E)
        # An alpha of scaling * r makes the pair's own scaling the same number.
        return LowRank(lora_A, self.lora_B, self.scaling * self.r, transposed_base=self.transposed_base)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class PooledLowRank(HasFactors):
    """QALoRA (arXiv 2309.14717): a pair whose input is the mean over `group` neighbors, times the number of groups.

    `lora_A` is `(r, in_features / group)` (peft, `tuners/lora/variants.py`, `QALoraLinearVariant`).
    """

    is_low_rank: ClassVar = True
    lora_A: np.ndarray
    lora_B: np.ndarray
    alpha: float
    group: int
    rslora: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)` of the delta."""
        return int(self.lora_B.shape[0]), int(self.lora_A.shape[1]) * self.group

    def as_low_rank(self) -> LowRank:
        """Return the pair of the same rank, with every column of `lora_A` repeated for its group."""
        factor = self.lora_A.shape[1] / self.group
        return LowRank(
            np.repeat(_f32(self.lora_A) * np.float32(factor), self.group, axis=1), self.lora_B, self.alpha, self.rslora
        )


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Hadamard(HasArrays):
    """LoHa (arXiv 2108.06098): the element-wise product of two low-rank matrices.

    `tensors` has `hada_w1_a` `(out, r)`, `hada_w1_b` `(r, in)` and the same of `w2`. A convolution's kernel is flattened into
    `in` or, with cores `hada_t1` and `hada_t2` `(r, r, *kernel)`, separate (`w_a` is then `(r, out)`).
    """

    is_low_rank: ClassVar = True
    tensors: Mapping[str, np.ndarray]
    alpha: float
    kernel: tuple[int, ...] = ()
    """The convolution's kernel that is flattened into `in`, if it is known."""
    magnitude: np.ndarray | None = None
    """DoRA's magnitude, as in `LowRank` or `LowRankConv`."""
    rslora: bool = field(default=False, init=False)

    @staticmethod
    def fits(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether tensors of these names and shapes make a LoHa delta."""
        names = {f"hada_w{n}_{half}" for n in (1, 2) for half in "ab"}
        cores = {"hada_t1", "hada_t2"} & set(shapes)
        if set(shapes) != names | cores or len(cores) == 1 or any(0 in shape for shape in shapes.values()):
            return False
        if any(len(shapes[name]) != 2 for name in names):
            return False
        # With cores, `hada_w1_a` is `(r, out)`.
        rank = shapes["hada_w1_b"][0]
        are_same_shape = all(shapes[f"hada_w1_{half}"] == shapes[f"hada_w2_{half}"] for half in "ab")
        return (
            are_same_shape
            and shapes["hada_w1_a"][0 if cores else 1] == rank
            and all(shapes[c][:2] == (rank, rank) for c in cores)
        )

    @property
    def r(self) -> int:
        """The rank of each of the two matrices."""
        return int(self.tensors["hada_w1_b"].shape[0])

    @property
    def scaling(self) -> float:
        """`alpha / r`."""
        return self.alpha / self.r

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)` of the delta, or `(out, in, *kernel)` with cores."""
        a, b, core = self.tensors["hada_w1_a"], self.tensors["hada_w1_b"], self.tensors.get("hada_t1")
        if core is None:
            return a.shape[0], b.shape[1] // math.prod(self.kernel), *self.kernel
        return a.shape[1], b.shape[1], *core.shape[2:]

    def parts(self) -> Parts:
        """Yield the tensors with their names."""
        yield from self.tensors.items()
        if self.magnitude is not None:
            yield "magnitude", self.magnitude

    @property
    def pair_rank(self) -> int:
        """The rank of the pair that it equals."""
        return self.r * self.r

    def as_low_rank(self) -> LowRank | LowRankConv:
        """Return the pair of rank `r * r`: all products of a column of one matrix with a column of the other."""
        (a1, b1), (a2, b2) = self._pair(1), self._pair(2)
        r = self.r
        lora_B = (a1[:, :, None] * a2[:, None, :]).reshape(len(a1), r * r)
        lora_A = (b1[:, None, :] * b2[None, :, :]).reshape(r * r, b1.shape[1])
        return _with_kernel(LowRank(lora_A, lora_B, self.scaling * r * r), self.shape[2:], self.magnitude)

    def _pair(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors of one of the two matrices, with the kernel in the columns of the second."""
        a, b = _f32(self.tensors[f"hada_w{number}_a"]), _f32(self.tensors[f"hada_w{number}_b"])
        core = self.tensors.get(f"hada_t{number}")
        return (a, b) if core is None else (a.T, _with_core(core, b))


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Kronecker(HasArrays):
    """LoKr (arXiv 2212.10650): the Kronecker product of two matrices, each stored whole or as a low-rank pair.

    `tensors` has `lokr_w1` or `lokr_w1_a` and `lokr_w1_b`, and the same of `w2`; the scale is `alpha / r` in each case.
    """

    is_low_rank: ClassVar = True
    tensors: Mapping[str, np.ndarray]
    alpha: float
    r: int
    kernel: tuple[int, ...] = ()
    """The convolution's kernel that is flattened into the second matrix, if it is known."""
    magnitude: np.ndarray | None = None
    """DoRA's magnitude, as in `LowRank` or `LowRankConv`."""
    rslora: bool = field(default=False, init=False)

    @staticmethod
    def fits(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether tensors of these names and shapes make a LoKr delta.

        Each matrix is whole or a pair, and the second one may have a core.
        """
        if any(not name.startswith("lokr_") or 0 in shape or len(shape) < 2 for name, shape in shapes.items()):
            return False
        for n in (1, 2):
            matrix, a, b, core = (shapes.get(f"lokr_{end}") for end in (f"w{n}", f"w{n}_a", f"w{n}_b", f"t{n}"))
            if matrix is not None:
                if a or b or core or (n == 1 and len(matrix) != 2):
                    return False
            # A pair has two matrices of the same inner size, or a core between them that fits both.
            elif (
                not a
                or not b
                or len(a) != 2
                or len(b) != 2
                or (core is None and a[1] != b[0])
                or (core is not None and (len(core) < 3 or core[:2] != (a[0], b[0])))
            ):
                return False
        return True

    @property
    def scaling(self) -> float:
        """`alpha / r`."""
        return self.alpha / self.r

    @property
    def rank(self) -> int:
        """The rank of the matrices that are pairs, by the tensors; 0 if both are whole."""
        return max((self.tensors[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in self.tensors), default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in)` of the delta; `(out, in, *kernel)` if the second matrix is whole and has a kernel."""
        (out1, in1), (out2, *in2) = self._matrix_shape(1), self._matrix_shape(2)
        return out1 * out2, in1 * in2[0] // math.prod(self.kernel), *(self.kernel or in2[1:])

    def _matrix_shape(self, number: int) -> tuple[int, ...]:
        matrix = self.tensors.get(f"lokr_w{number}")
        if matrix is not None:
            return tuple(matrix.shape)
        core = self.tensors.get("lokr_t2") if number == 2 else None
        a, b = self.tensors[f"lokr_w{number}_a"], self.tensors[f"lokr_w{number}_b"]
        return (a.shape[0], b.shape[1]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])

    def parts(self) -> Parts:
        """Yield the tensors with their names."""
        yield from self.tensors.items()
        if self.magnitude is not None:
            yield "magnitude", self.magnitude

    @property
    def pair_rank(self) -> int:
        """The rank of the pair that it equals."""
        return math.prod(map(self._matrix_rank, (1, 2)))

    def _matrix_rank(self, number: int) -> int:
        matrix = self.tensors.get(f"lokr_w{number}")
        if matrix is not None:
            return min(len(matrix), math.prod(matrix.shape[1:]))
        return int(self.tensors[f"lokr_w{number}_b"].shape[0])

    def as_low_rank(self) -> LowRank | LowRankConv:
        """Return the pair whose rank is the product of the two ranks; the rank of a whole matrix is its shorter side."""
        (b1, a1), (b2, a2) = self._pair(1), self._pair(2)
        lora_B, lora_A = np.kron(b1, b2), np.kron(a1, a2)
        return _with_kernel(LowRank(lora_A, lora_B, self.scaling * len(lora_A)), self.shape[2:], self.magnitude)

    def _pair(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors, with the kernel in the columns of the second; a whole matrix is paired with an identity."""
        matrix = self.tensors.get(f"lokr_w{number}")
        if matrix is None:
            a, b = _f32(self.tensors[f"lokr_w{number}_a"]), _f32(self.tensors[f"lokr_w{number}_b"])
            core = self.tensors.get("lokr_t2") if number == 2 else None
            return (a, b) if core is None else (a.T, _with_core(core, b))
        matrix = matrix.reshape(len(matrix), -1)
        rows, columns = matrix.shape
        # The identity goes on the shorter side, to keep the rank of the pair low.
        if columns <= rows:
            return _f32(matrix), np.eye(columns, dtype=np.float32)
        return np.eye(rows, dtype=np.float32), _f32(matrix)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Vera(HasArrays):
    """VeRA (arXiv 2310.11454): `diag(lambda_b) @ vera_B[:out] @ diag(lambda_d) @ vera_A[:, :in]`, with a scale of 1.

    All modules share the projections `vera_A` `(r, widest in)` and `vera_B` `(widest out, r)`, and each uses their first
    columns and rows (peft, `tuners/vera/layer.py`). No file of the adapter has `in_features`, which is None without the base.
    """

    lambda_b: np.ndarray
    lambda_d: np.ndarray
    vera_A: np.ndarray
    vera_B: np.ndarray
    in_features: int | None
    transposed_base: bool = False
    rslora: bool = field(default=False, init=False)

    @property
    def r(self) -> int:
        """The rank of the projections."""
        return int(self.lambda_d.shape[0])

    @property
    def alpha(self) -> float:
        """The alpha for which the scale is 1."""
        return float(self.r)

    @property
    def scaling(self) -> float:
        """Always 1."""
        return 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)` of the delta; if its own width is unknown, the width of the widest module."""
        return int(self.lambda_b.shape[0]), self.in_features or int(self.vera_A.shape[1])

    def parts(self) -> Parts:
        """Yield its own tensors with their names, without the projections, which all modules share."""
        yield from (("vera_lambda_b", self.lambda_b), ("vera_lambda_d", self.lambda_d))

    @property
    def is_low_rank(self) -> bool:
        """Whether its low-rank pair is known, which takes the shape of the base's weight."""
        return self.in_features is not None

    def as_low_rank(self) -> LowRank:
        """Return the pair of the same rank, with each projection cut to the module and multiplied by its vector.

        Raises:
            RefusedError: The width of the module is unknown.
        """
        if self.in_features is None:
            problem = "the number of its columns that a module uses depends on the base, which is missing or lacks this module"
            raise RefusedError("vera_A", problem, "Name its base model", code="base-required")
        lora_A = _f32(self.lambda_d)[:, None] * _f32(self.vera_A[:, : self.in_features])
        lora_B = _f32(self.lambda_b)[:, None] * _f32(self.vera_B[: len(self.lambda_b)])
        return LowRank(lora_A, lora_B, self.alpha, transposed_base=self.transposed_base)


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class CpConv(HasFactors):
    """A convolution in three steps: `lora_A` `(r, in, 1, 1)`, `lora_mid` `(r, r, *kernel)`, `lora_B` `(out, r, 1, 1)`.

    LyCORIS calls it a Tucker or CP decomposition (its `functional/general.py`, `rebuild_tucker`).
    """

    is_low_rank: ClassVar = True
    lora_A: np.ndarray
    lora_B: np.ndarray
    lora_mid: np.ndarray
    alpha: float
    magnitude: np.ndarray | None = None
    rslora: bool = field(default=False, init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(out, in, *kernel)` of the delta."""
        return int(self.lora_B.shape[0]), int(self.lora_A.shape[1]), *map(int, self.lora_mid.shape[2:])

    def parts(self) -> Parts:
        """Yield the tensors with their names."""
        yield from (("lora_A", self.lora_A), ("lora_B", self.lora_B), ("lora_mid", self.lora_mid))
        if self.magnitude is not None:
            yield "magnitude", self.magnitude

    def as_low_rank(self) -> LowRankConv:
        """Return the pair of the same rank, with `lora_mid` multiplied into `lora_A`."""
        kernel = self.lora_mid.shape[2:]
        lora_A = _with_core(self.lora_mid, _f32(self.lora_A).reshape(self.lora_A.shape[:2]))
        magnitude = self.magnitude
        return LowRankConv(lora_A.reshape(self.r, -1, *kernel), self.lora_B, self.alpha, magnitude=magnitude)


Factored = AdaLora | PooledLowRank | Hadamard | Kronecker | Vera | CpConv

# Limits on the numbers in an adapter's pairs: always allowed; allowed for each number of its own; maximum. LoKr needs 350 for
# one.
_FREE_NUMBERS, _MAX_GROWTH, _MAX_NUMBERS = 1 << 24, 512, 1 << 31


def count_pair_numbers(deltas: Iterable[object]) -> int:
    """Return the number of elements in the pairs that deltas of these kinds equal, by their shapes."""
    factored = [delta for delta in deltas if isinstance(delta, Factored) and delta.is_low_rank]
    ranks = [delta.pair_rank if isinstance(delta, (Hadamard, Kronecker)) else delta.r for delta in factored]
    return sum(r * (delta.shape[0] + math.prod(delta.shape[1:])) for r, delta in zip(ranks, factored, strict=True))


def check_growth(stored_numbers: int, pair_count: int, location: str) -> None:
    """Raise a RefusedError if an adapter would have far more numbers in low-rank pairs than its `stored_numbers`."""
    # Small adapters may grow by any factor, large ones by a bounded one.
    if pair_count > min(_MAX_NUMBERS, _FREE_NUMBERS + _MAX_GROWTH * stored_numbers):
        problem = f"{stored_numbers:,} numbers are to become low-rank pairs of {pair_count:,}"
        raise RefusedError(location, problem, "Use a format that has this kind of adapter")


def as_pairs(deltas: Mapping[str, Factored]) -> dict[str, LowRank | LowRankConv]:
    """Return the pair of each delta.

    Raises:
        RefusedError: A delta has none, or the pairs would be far larger than the deltas.
    """
    numbers = count_pair_numbers(deltas.values())
    sizes_by_id: dict[int, int] = {}  # by tensor, so that those that several deltas share count once
    for delta in deltas.values():
        # All modules have the same projections in memory: count them once.
        shared = (delta.vera_A, delta.vera_B) if isinstance(delta, Vera) else ()
        sizes_by_id |= {id(tensor): tensor.size for tensor in (*shared, *(tensor for _, tensor in delta.parts()))}
    check_growth(sum(sizes_by_id.values()), numbers, next(iter(deltas), ""))
    return {target: delta.as_low_rank() for target, delta in deltas.items()}


def _with_kernel(pair: LowRank, kernel: tuple[int, ...], magnitude: np.ndarray | None) -> LowRank | LowRankConv:
    """Return a pair as that of a convolution whose kernel was flattened into its columns; `pair` itself without a kernel."""
    if not kernel:
        return replace(pair, magnitude=magnitude)
    lora_A = pair.lora_A.reshape(len(pair.lora_A), -1, *kernel)
    lora_B = pair.lora_B.reshape(*pair.lora_B.shape, *(1,) * len(kernel))
    return LowRankConv(lora_A, lora_B, pair.alpha, magnitude=magnitude)


def _with_core(core: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return a core `(i, j, *kernel)` times `(j, in)`: `(i, in * kernel)` (LyCORIS, its `rebuild_tucker`)."""
    product: np.ndarray = np.einsum("ij...,jc->ic...", _f32(core), right)
    return product.reshape(len(product), -1)


def _f32(array: np.ndarray) -> np.ndarray:
    result: np.ndarray = array.astype(np.float32)
    return result
