"""The tensors of one PEFT module as a delta, for each kind of adapter that PEFT has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from adapterhub_converters.adapter import (
    AdaLora,
    Delta,
    Hadamard,
    Kronecker,
    LowRank,
    LowRankConv,
    LowRankEmbedding,
    PooledLowRank,
    Rows,
    StackedLowRank,
    Vera,
)
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import FormatError, NotUnderstoodError, RefusedError, refused

from . import experts
from .config import CONFIG, WEIGHTS, Scales
from .keys import What


class DeltaReader:
    """Reader of the deltas of one file.

    Attributes:
        turned: The stacked targets whose two factors were swapped; filled by `all`.
    """

    def __init__(
        self, config: Mapping[str, Any], scales: Scales, where: str, base: BaseSpec | None, known: frozenset[str] | None
    ) -> None:
        self._config, self._scales, self._where, self._base, self._known = config, scales, where, base, known
        self._transposed = bool(config.get("fan_in_fan_out"))
        self.turned: set[str] = set()
        self._targets: dict[str, str] = {}
        self._shared: Mapping[str, np.ndarray] = {}
        kinds = {"ADALORA": self._adalora, "LOHA": self._lycoris, "LOKR": self._lycoris, "VERA": self._vera}
        self._one = kinds.get(config["peft_type"], self._lora)

    def all(self, pairs: Mapping[str, dict[str, np.ndarray]], shared: Mapping[str, np.ndarray]) -> dict[str, Delta]:
        """Every target and its delta; `shared` are VeRA's projections. One error for all that is not supported."""
        self._shared = shared
        if self._config["peft_type"] == "VERA":
            self._check_projections(pairs)
        elif shared:
            raise RefusedError(self._where, f"base_model.{min(shared)} is supported in VeRA adapters only")
        lora = [name for name, part in pairs.items() if set(part) == {"A", "B"}]
        self._targets = experts.targeted(self._config, lora, f"{self._where}")
        stacks = self._stacks(pairs)
        deltas: dict[str, Delta] = {}
        first: RefusedError | None = None
        reasons: list[str] = []  # not the errors, which hold on to their frames
        for name, part in pairs.items():
            try:
                if name in self._targets and self._targets[name] in stacks:
                    deltas[self._targets[name]] = self._stack(self._targets[name], stacks)
                else:
                    deltas[name] = self._one(name, part)
            except RefusedError as error:
                first = first or error
                reasons.append(error.what)
        if first:
            raise refused(first.where, reasons, first.hint, code=first.code, **first.fields)
        return deltas

    def renamed(self, names: Mapping[What, str]) -> Mapping[What, str]:
        """`names` with the adapter's targets for stacks, where the file has the wrapped module."""
        if not self._targets:
            return names
        return {(kind, self._targets.get(name, name), part): key for (kind, name, part), key in names.items()}

    def _stacks(self, pairs: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, experts.Halves]:
        stacks: dict[str, experts.Halves] = {}
        for name, target in list(self._targets.items()):
            rank = self._scales.rank(target)
            found = experts.halves(pairs[name]["A"], pairs[name]["B"], rank, target, self._where)
            if found.experts > 1:
                stacks[target] = found
            elif target.endswith(".weight") and not name.endswith(".base_layer"):
                del self._targets[name]  # a matrix: the weight of an ordinary module
            else:
                raise RefusedError(
                    self._where, f"{target}: one expert, or a matrix that is no module's weight, is not supported"
                )
        return stacks

    def _stack(self, target: str, stacks: Mapping[str, experts.Halves]) -> StackedLowRank:
        version = self._config.get("peft_version")
        if self._known is not None:
            is_turned = target in self._known
        else:
            is_turned = experts.turned(target, stacks, version, self._base, self._where)
        if is_turned:
            self.turned.add(target)
        transposed = experts.transposed_base(is_turned, version, self._base)
        alpha, rslora = self._scales.alpha(target), self._scales.rslora
        return experts.stacked(stacks[target], alpha, rslora=rslora, is_turned=is_turned, transposed=transposed)

    def _lora(self, target: str, part: Mapping[str, np.ndarray]) -> Delta:
        embedding = "embedding_A" in part or "embedding_B" in part
        a_name, b_name = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        foreign = set(part) - {a_name, b_name, "magnitude", "bias"}
        if foreign:
            raise RefusedError(self._where, f"{target}.{min(foreign)} is not supported in a LoRA adapter")
        self._need(target, part, {a_name: "lora_A", b_name: "lora_B"})
        lora_A, lora_B = part[a_name], part[b_name]
        self._check_shapes(target, lora_A, lora_B)
        self._scales.check_rank(target, lora_A.shape[0])
        alpha, rslora = self._scales.alpha(target), self._scales.rslora
        magnitude, bias = part.get("magnitude"), part.get("bias")
        if embedding:
            if bias is not None:
                raise RefusedError(self._where, f"{target}: a bias on an embedding is not supported")
            return LowRankEmbedding(lora_A, lora_B, alpha, rslora, magnitude)
        if lora_A.ndim > 2:
            return LowRankConv(lora_A, lora_B, alpha, rslora, magnitude, bias)
        if self._config.get("use_qalora") and not self._is_whole(target, lora_A):
            if magnitude is not None or bias is not None:
                raise RefusedError(self._where, f"{target}: QALoRA with DoRA or a bias is not supported")
            return PooledLowRank(lora_A, lora_B, alpha, int(self._config.get("qalora_group_size") or 16), rslora)
        return LowRank(lora_A, lora_B, alpha, rslora, magnitude, bias, self._transposed)

    def _is_whole(self, target: str, lora_A: np.ndarray) -> bool:
        """Whether a module, by its shape, takes its inputs unpooled, as all but GPTQ's do (peft, `tuners/lora/gptq.py`)."""
        weight = self._base.tensor(f"{target}.weight") if self._base is not None else None
        return weight is not None and weight.shape[-1:] == lora_A.shape[-1:]

    def _need(self, target: str, part: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
        for name, tensor_name in names.items():
            if name not in part:
                raise FormatError(self._where, f"{target}: {tensor_name} is missing, but its counterpart exists")

    def _check_shapes(self, target: str, lora_A: np.ndarray, lora_B: np.ndarray) -> None:
        if 0 in lora_A.shape or 0 in lora_B.shape:
            raise FormatError(self._where, f"{target}: an empty tensor, as ZeRO-3 saves if weights were not gathered")
        if lora_A.ndim != lora_B.ndim or lora_A.ndim not in (2, 3, 4, 5):
            raise FormatError(self._where, f"{target}: lora_A {lora_A.shape} and lora_B {lora_B.shape} do not make a delta")
        if lora_A.shape[0] != lora_B.shape[1] or any(size != 1 for size in lora_B.shape[2:]):
            raise FormatError(self._where, f"{target}: lora_A {lora_A.shape} and lora_B {lora_B.shape} do not share a rank")

    def _adalora(self, target: str, part: Mapping[str, np.ndarray]) -> Delta:
        self._need(target, part, {name: name for name in ("lora_A", "lora_B", "lora_E")})
        lora_A, lora_B, lora_E = part["lora_A"], part["lora_B"], part["lora_E"]
        if len(part) > 3 or lora_A.ndim != 2:
            raise RefusedError(self._where, f"{target}: an AdaLoRA delta of {', '.join(sorted(part))} is not supported")
        self._check_shapes(target, lora_A, lora_B)
        if lora_E.shape != (len(lora_A), 1):
            raise FormatError(self._where, f"{target}: lora_E {lora_E.shape} for a rank of {len(lora_A)}")
        return AdaLora(lora_A, lora_B, lora_E, self._scales.alpha(target), self._transposed)

    def _lycoris(self, target: str, part: Mapping[str, np.ndarray]) -> Delta:
        kind = self._config["peft_type"]
        shapes = {name: tensor.shape for name, tensor in part.items()}
        if not (Hadamard if kind == "LOHA" else Kronecker).fits(shapes):
            listed = ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
            raise FormatError(self._where, f"{target}: {listed} do not make a {kind} delta")
        alpha = self._scales.alpha(target)
        if kind == "LOHA":
            self._scales.check_rank(target, part["hada_w1_b"].shape[0])
            return Hadamard(dict(part), alpha)
        rank = self._scales.rank(target)
        if rank < 1:
            raise FormatError(self._where, f"{target}: a rank of {rank}")
        return Kronecker(dict(part), alpha, rank)

    def _check_projections(self, pairs: Mapping[str, object]) -> None:
        """Refuse a VeRA adapter whose projections are not in its file but come from torch's random numbers."""
        if not self._config.get("save_projection", True):
            found = "are in the file, but peft makes others" if self._shared else "were not saved; peft makes them"
            hint = 'Set "save_projection" to true' if self._shared else "Save it again with save_projection=True"
            kind = RefusedError if self._shared else NotUnderstoodError
            raise kind(self._where, f"vera_A and vera_B {found} from the random numbers of a seed", hint)
        for name in ("vera_A", "vera_B"):
            if name not in self._shared:
                what = f"base_model.{name} is missing, which peft saves unless save_projection is false"
                raise FormatError(self._where, what, "Save it again with save_projection=True")
        vera_A, vera_B = self._shared["vera_A"], self._shared["vera_B"]
        shapes = f"vera_A {vera_A.shape} and vera_B {vera_B.shape}"
        if vera_A.ndim != 2 or vera_B.ndim != 2 or vera_A.shape[0] != vera_B.shape[1] or 0 in (*vera_A.shape, *vera_B.shape):
            raise FormatError(self._where, f"{shapes} do not share a rank")
        if not pairs:
            raise FormatError(self._where, "there are projections, but no module that uses them")

    def _vera(self, target: str, part: Mapping[str, np.ndarray]) -> Delta:
        self._need(target, part, {name: name for name in ("vera_lambda_b", "vera_lambda_d")})
        lambda_b, lambda_d = part["vera_lambda_b"], part["vera_lambda_d"]
        vera_A, vera_B = self._shared["vera_A"], self._shared["vera_B"]
        if len(part) > 2:
            raise RefusedError(self._where, f"{target}: a VeRA delta of {', '.join(sorted(part))} is not supported")
        if lambda_d.shape != (len(vera_A),) or lambda_b.ndim != 1 or not 0 < len(lambda_b) <= len(vera_B):
            what = f"vera_lambda_b {lambda_b.shape} and vera_lambda_d {lambda_d.shape}"
            raise FormatError(self._where, f"{target}: {what} do not fit vera_A {vera_A.shape} and vera_B {vera_B.shape}")
        self._scales.check_rank(target, len(lambda_d))
        width = self._width(target, len(lambda_b))
        known = width if width is not None and width <= vera_A.shape[1] else None
        return Vera(lambda_b, lambda_d, vera_A, vera_B, known, self._transposed)

    def _width(self, target: str, out_features: int) -> int | None:
        """The input features of the base's module, if it exists and has `out_features`; else None."""
        tensors = self._base.tensors if self._base else {}
        # A base saved without its head lacks the first component.
        weight = tensors.get(f"{target}.weight") or tensors.get(f"{target.partition('.')[2]}.weight")
        shape = weight.shape[::-1] if weight and self._transposed else weight.shape if weight else ()
        return shape[1] if len(shape) == 2 and shape[0] == out_features else None


def rows_of(target: str, values: np.ndarray, config: Mapping[str, Any], where: str) -> Rows:
    """The rows of a table that `values` replace, by `trainable_token_indices`; FormatError if the numbers differ."""
    indices = config.get("trainable_token_indices") or {}
    if isinstance(indices, dict):
        ids = next((ids for key, ids in indices.items() if target == key or target.endswith("." + key)), None)
    else:
        ids = indices
    if values.ndim != 2:
        raise FormatError(f"{where}/{WEIGHTS}", f"{target}: shape {values.shape} does not match any embedding table")
    if not isinstance(ids, list) or len(ids) != len(values) or not all(isinstance(number, int) for number in ids):
        raise FormatError(f"{where}/{CONFIG}", f'"trainable_token_indices" does not list the {len(values)} rows of {target}')
    return Rows(tuple(ids), values)
