"""The tensors of one module under the names of kohya, LyCORIS and diffusers, and the delta that they form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import BUNDLED, Adapter, CpConv, Delta, Hadamard, Kronecker, LowRank, LowRankConv
from adapterhub_converters.errors import FormatError, NotUnderstoodError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

Parts = dict[str, np.ndarray]
Shape = tuple[int, ...] | None

_LYCORIS = [f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")]
_LYCORIS += [f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")]
_ENDS = {
    ".lora_down.weight": "A", ".lora_up.weight": "B", ".lora_mid.weight": "mid", ".alpha": "alpha", ".dora_scale": "dora_scale",
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_B.bias": "bias",
    ".lora_A.default.weight": "A", ".lora_B.default.weight": "B", ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude", ".diff": "diff", ".diff_b": "diff_b", ".w_norm": "diff", ".b_norm": "diff_b",
    ".scalar": "scalar", ".scale": "scale",
    ".lora.down.weight": "A", ".lora.up.weight": "B", ".down.weight": "A", ".up.weight": "B",
    ".lora_linear_layer.down.weight": "A", ".lora_linear_layer.up.weight": "B",
    **{f".{name}": name for name in _LYCORIS},
}  # fmt: skip
# Longest ending first: `.lora.down.weight` also ends in `.down.weight`.
_BY_LENGTH = sorted(_ENDS, key=len, reverse=True)
_OTHER_KINDS = {
    ".oft_blocks": "OFT", ".oft_diag": "OFT", ".a1.weight": "GLoRA", ".on_input": "IA3", ".lambda_layer": "T-LoRA",
    ".reshape_weight": "a weight of another shape",
}  # fmt: skip
_NUMBERS = ("alpha", "scalar")
TINY_ALPHA = 1e-38  # a normal float32, which times any factor vanishes in the sum with any weight


def split_name(name: str) -> tuple[str, str] | None:
    """Return the module and the part of a delta that a tensor's name denotes; None if it is not a part of a delta."""
    end = next((end for end in _BY_LENGTH if name.endswith(end)), None)
    return (name.removesuffix(end), _ENDS[end]) if end else None


def with_bundled(adapter: Adapter, tensors: Mapping[str, np.ndarray]) -> Adapter:
    """Return `adapter` with the embeddings that OneTrainer stored among the `tensors` of its file, and a note on them."""
    embeddings = {name: values for name, values in tensors.items() if name.startswith(BUNDLED)}
    if not embeddings:
        return adapter
    note = f"{len(embeddings)} embeddings are bundled with the adapter (OneTrainer)"
    return dataclasses.replace(adapter, replaced={**adapter.replaced, **embeddings}, notes=(*adapter.notes, note))


def unknown_reason(name: str) -> str:
    """Return why a tensor is not part of a delta, with the LyCORIS algorithm that it belongs to, if that is known."""
    kind = next((kind for end, kind in _OTHER_KINDS.items() if name.endswith(end)), "")
    return f"tensor {name!r}: this kind of tensor is not supported{f' ({kind})' if kind else ''}"


def weight_outline(part: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
    """Return rows and columns of a module's weight, without its kernel; None if the tensors do not give them directly."""
    matrices = {name: array for name, array in part.items() if array.ndim > 1 and 0 not in array.shape}
    for up, down in (("B", "A"), ("diff", "diff"), ("hada_w1_a", "hada_w1_b")):
        if up in matrices and down in matrices and "hada_t1" not in matrices:
            return matrices[up].shape[0], matrices[down].shape[1]
    first, second = (_factor_outline(matrices, n) for n in (1, 2))
    return (first[0] * second[0], first[1] * second[1]) if first and second else None


def _factor_outline(matrices: Mapping[str, np.ndarray], n: int) -> tuple[int, int] | None:
    full_matrix, a, b = (matrices.get(f"lokr_w{n}{end}") for end in ("", "_a", "_b"))
    if full_matrix is not None:
        return full_matrix.shape[0], full_matrix.shape[1]
    return None if a is None or b is None or f"lokr_t{n}" in matrices else (a.shape[0], b.shape[1])


def delta_of(target: str, tensors: Mapping[str, np.ndarray], kernel: tuple[int, ...], location: str) -> Delta:
    """Return the delta that the tensors of one module form.

    A missing alpha, or an alpha of 0, means the rank (sd-scripts, `networks/lora.py`).

    Args:
        target: The module, for errors.
        tensors: Part (as `split_name` calls it) to tensor.
        kernel: The kernel of the base's convolution, if the module is one.
        location: The file, for errors.

    Raises:
        RefusedError: The kind is not supported.
        FormatError: The tensors do not fit together.
    """
    part = dict(tensors)
    for name, array in part.items():
        check_floats(target, name, array, location)
    scale = _Scale(
        _number(target, "alpha", part.pop("alpha", None), location),
        _number(target, "scalar", part.pop("scalar", None), location, absent=1.0),
    )
    if any(name.startswith("hada_") for name in part):
        return _hadamard(target, part, scale, kernel, location)
    if any(name.startswith("lokr_") for name in part):
        return _kronecker(target, part, scale, kernel, location)
    if "diff" in part and "A" not in part:
        return _difference(target, part, location)
    return _pair(target, part, scale, location)


@dataclass(frozen=True)
class _Scale:
    """The factor on the product of factors: `alpha / r`, where an alpha of 0 means `r`, times LyCORIS' `scalar`."""

    alpha: float
    scalar: float

    def alpha_for(self, r: int) -> float:
        """Return the alpha for which `alpha / r` includes all of the scale."""
        return (self.alpha or float(r)) * self.scalar


def check_floats(target: str, name: str, array: np.ndarray, location: str) -> None:
    """Raise FormatError if a part of a delta is empty or does not consist of floats."""
    if name not in _NUMBERS and (0 in array.shape or dtypes.name_of(array.dtype) not in dtypes.FLOATS):
        raise FormatError(location, f"{target}: {name} is {array.dtype} {array.shape}, which is not a factor")


def _number(target: str, name: str, array: np.ndarray | None, location: str, *, absent: float = 0.0) -> float:
    """Return the number in a tensor of one element."""
    if array is None:
        return absent
    value = float(array.astype(np.float64).reshape(-1)[0]) if array.size == 1 else math.nan
    if not math.isfinite(value) or abs(value) > 2**40:
        raise FormatError(location, f"{target}: {name} is {array.dtype} {array.shape}, not a number in range")
    return value


def _pair(target: str, part: Parts, scale: _Scale, location: str) -> Delta:
    lora_A, lora_B, mid = part.pop("A", None), part.pop("B", None), part.pop("mid", None)
    if lora_A is None or lora_B is None:
        present = ", ".join(sorted(part) or ["lora_up" if lora_A is None and lora_B is not None else "lora_down"])
        if lora_A is None and lora_B is None:
            raise NotUnderstoodError(location, f"{target}: {present} alone, without a pair of factors, is not supported")
        raise FormatError(location, f"{target} has {present} alone; its counterpart is missing")
    shapes = f"lora_down {lora_A.shape} and lora_up {lora_B.shape}"
    if lora_A.ndim != lora_B.ndim or not 2 <= lora_A.ndim <= 5 or lora_A.shape[0] != lora_B.shape[1]:
        raise FormatError(location, f"{target}: {shapes} are not a pair")
    if any(size != 1 for size in lora_B.shape[2:]):
        raise FormatError(location, f"{target}: {shapes}: the second of two convolutions must be 1 by 1")
    r = len(lora_A)
    alpha = scale.alpha_for(r)
    magnitude = _magnitude(target, part, len(lora_B), lora_B.ndim, location)
    bias = None if mid is not None else _bias(target, part, lora_B, alpha / r, location)
    if part:
        description = "a pair of factors" if mid is None else "lora_mid"
        raise RefusedError(location, f"{target}: {', '.join(sorted(part))} with {description} is not supported")
    if mid is not None:
        if any(size != 1 for size in lora_A.shape[2:]) or mid.ndim != lora_A.ndim or mid.ndim < 3 or mid.shape[:2] != (r, r):
            raise FormatError(location, f"{target}: lora_mid {mid.shape} does not fit lora_down {lora_A.shape}")
        return CpConv(lora_A, lora_B, mid, alpha, magnitude)
    if lora_A.ndim == 2:
        return LowRank(lora_A, lora_B, alpha, magnitude=magnitude, bias=bias)
    return LowRankConv(lora_A, lora_B, alpha, magnitude=magnitude, bias=bias)


def _magnitude(target: str, part: Parts, rows: int, ndim: int, location: str) -> np.ndarray | None:
    """Remove DoRA's magnitude from the parts and return it: one number per output; None if there is none.

    `dora_scale` `(out, 1, …)` has as many dimensions as the weight, `ndim`.
    """
    peft_magnitude, scale = part.pop("magnitude", None), part.pop("dora_scale", None)
    magnitude = peft_magnitude if peft_magnitude is not None else scale
    if magnitude is None:
        return None
    # In peft's convolutions the magnitude is `(1, out, 1, 1)`; elsewhere the outputs come first.
    if magnitude.size != rows or (
        magnitude.ndim > 1 and magnitude.shape.index(rows) != (1 if peft_magnitude is not None and magnitude.ndim > 2 else 0)
    ):
        reason = f"{target}: a DoRA scale of shape {magnitude.shape} is not one number for each of {rows} outputs"
        raise RefusedError(location, f"{reason}; scales of inputs, as in early LyCORIS, are a different function")
    return magnitude.reshape(rows) if ndim == 2 else magnitude.reshape(1, rows, *(1,) * (ndim - 2))


def _bias(target: str, part: Parts, lora_B: np.ndarray, scaling: float, location: str) -> np.ndarray | None:
    peft_bias, added = part.pop("bias", None), part.pop("diff_b", None)
    bias = peft_bias if peft_bias is not None else added
    if bias is None:
        return None
    if bias.shape != lora_B.shape[:1] or (peft_bias is not None and added is not None):
        raise FormatError(
            location, f"{target}: a bias of shape {bias.shape} is not one number for each of {len(lora_B)} outputs"
        )
    if peft_bias is not None or scaling == 1:
        return bias
    if scaling == 0:
        raise RefusedError(location, f"{target}: a bias next to factors whose scale is 0 is not supported")
    # `diff_b` is added as it is, whereas a delta's bias is multiplied by its scale.
    result: np.ndarray = (bias.astype(np.float64) / scaling).astype(np.float32)
    return result


def _difference(target: str, part: Parts, location: str) -> Delta:
    """Return a full difference of weights as the pair of itself and an identity, with a scale of 1."""
    diff, bias = part.pop("diff"), part.pop("diff_b", None)
    if part:
        raise NotUnderstoodError(location, f"{target}: {', '.join(sorted(part))} with diff is not supported")
    if not 2 <= diff.ndim <= 5:
        raise NotUnderstoodError(location, f"{target}: a difference of shape {diff.shape} is not supported")
    if bias is not None and bias.shape != diff.shape[:1]:
        raise FormatError(location, f"{target}: a bias of shape {bias.shape} is not one number for each of {len(diff)} outputs")
    flat = diff.reshape(len(diff), -1)
    out, width = flat.shape
    # The identity is on the shorter side, so that it is not larger than the difference, whatever shape a file claims.
    lora_A, lora_B = (np.eye(width, dtype=diff.dtype), flat) if width < out else (flat, np.eye(out, dtype=diff.dtype))
    alpha = float(min(out, width))
    if diff.ndim == 2:
        return LowRank(lora_A, lora_B, alpha, bias=bias)
    kernel = (1,) * (diff.ndim - 2)
    return LowRankConv(lora_A.reshape(-1, *diff.shape[1:]), lora_B.reshape(*lora_B.shape, *kernel), alpha, bias=bias)


def _hadamard(target: str, part: Parts, scale: _Scale, kernel: tuple[int, ...], location: str) -> Delta:
    other_tensors = {name: part.pop(name) for name in list(part) if not name.startswith("hada_")}
    shapes = {name: array.shape for name, array in part.items()}
    if not Hadamard.fits(shapes):
        raise FormatError(location, f"{target}: {_shapes_text(shapes)} do not make a LoHa delta")
    rank, columns = shapes["hada_w1_b"]
    flat = () if "hada_t1" in part else _flat(target, kernel, columns, location)
    return _with_magnitude(target, Hadamard(part, scale.alpha_for(rank), flat), other_tensors, location)


def _kronecker(target: str, part: Parts, scale: _Scale, kernel: tuple[int, ...], location: str) -> Delta:
    other_tensors = {name: part.pop(name) for name in list(part) if not name.startswith("lokr_")}
    shapes = {name: array.shape for name, array in part.items()}
    is_full = [f"lokr_w{n}" in part for n in (1, 2)]
    fits = Kronecker.fits(shapes)
    ranks = {shapes[f"lokr_w{n}_b"][0] for n in (1, 2) if fits and f"lokr_w{n}_b" in part}
    if not fits or (len(ranks) != 1) != all(is_full):
        raise FormatError(location, f"{target}: {_shapes_text(shapes)} do not make a LoKr delta")
    if all(is_full):  # there is no rank: LyCORIS and ComfyUI then scale by 1, whatever the alpha
        return _with_magnitude(target, Kronecker(part, scale.scalar, 1), other_tensors, location)
    r = ranks.pop()
    flat = () if "lokr_t2" in part or is_full[1] else _flat(target, kernel, shapes["lokr_w2_b"][1], location)
    return _with_magnitude(target, Kronecker(part, scale.alpha_for(r), r, flat), other_tensors, location)


def _with_magnitude(target: str, delta: Hadamard | Kronecker, other_tensors: Parts, location: str) -> Delta:
    """Return `delta` with DoRA's magnitude, if that is among the module's other tensors."""
    magnitude = _magnitude(target, other_tensors, delta.shape[0], len(delta.shape), location)
    if other_tensors:
        kind = "LoHa" if isinstance(delta, Hadamard) else "LoKr"
        raise NotUnderstoodError(location, f"{target}: {', '.join(sorted(other_tensors))} with {kind} is not supported")
    return delta if magnitude is None else dataclasses.replace(delta, magnitude=magnitude)


def _flat(target: str, kernel: tuple[int, ...], columns: int, location: str) -> tuple[int, ...]:
    if columns % math.prod(kernel):
        raise FormatError(location, f"{target}: {columns} columns are not those of a convolution with kernel {kernel}")
    return kernel


def _shapes_text(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {tuple(shape)}" for name, shape in sorted(shapes.items()))


def tensors_of(delta: Delta) -> tuple[Parts, float | None]:
    """Return the tensors of a delta in these formats, without its alpha, and the alpha; None if it has none.

    An alpha of 0 has no effect in PEFT but means the rank in kohya; a tiny one has no effect in either.
    """
    if not isinstance(delta, LowRank | LowRankConv | Hadamard | Kronecker | CpConv):
        raise RefusedError("", f"a delta of kind {type(delta).__name__} cannot be expressed in this format")
    tensors: Parts = {}
    if delta.magnitude is not None:
        tensors["dora_scale"] = delta.magnitude.reshape(-1, *(1,) * (len(delta.shape) - 1))
    if isinstance(delta, Hadamard):
        return {**delta.tensors, **tensors}, delta.alpha or TINY_ALPHA
    if isinstance(delta, Kronecker):
        return {**delta.tensors, **tensors}, (delta.scaling * delta.rank or TINY_ALPHA) if delta.rank else None
    alpha = delta.scaling * delta.r or TINY_ALPHA
    tensors = {"lora_down.weight": delta.lora_A, "lora_up.weight": delta.lora_B, **tensors}
    if isinstance(delta, CpConv):
        return {**tensors, "lora_mid.weight": delta.lora_mid}, alpha
    if delta.bias is not None:
        tensors["diff_b"] = (
            delta.bias if delta.scaling == 1 else (delta.bias.astype(np.float64) * delta.scaling).astype(np.float32)
        )
    return tensors, alpha


def alpha_tensor(alpha: float, dtype: np.dtype) -> np.ndarray:
    """Return `alpha` as a 0-d tensor, in `dtype` if that holds it exactly, else in float32."""
    tensor = np.asarray(alpha, dtype)
    return tensor if float(tensor) == alpha else np.asarray(alpha, dtypes.F32)


# ---- Differences of parameters that have no factors


def differences(part: Mapping[str, np.ndarray], *, parameter: bool) -> tuple[Parts, Parts]:
    """Return the parts that form a delta, and the differences among the remaining parts.

    The differences are `weight`, of a norm or a parameter, and `bias`, of a module without factors.
    """
    remaining, changes = dict(part), Parts()
    if "diff" in remaining and "A" not in remaining and (remaining["diff"].ndim == 1 or parameter):
        changes["weight"] = remaining.pop("diff")
    if "diff_b" in remaining and not {"A", "diff"} & set(remaining):
        changes["bias"] = remaining.pop("diff_b")
    return ({} if changes and set(remaining) == {"alpha"} else remaining), changes


def scale_of(part: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the scale of a norm that replaces the base's, as in Black Forest Labs' own files; None for any other module."""
    return part["scale"] if set(part) == {"scale"} and part["scale"].ndim == 1 else None
