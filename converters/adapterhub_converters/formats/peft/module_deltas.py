"""Conversion of one PEFT module's tensors to a delta, for each kind of adapter that PEFT has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

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
from adapterhub_converters.errors import FormatError, NotUnderstoodError, RefusedError, refused_error
from adapterhub_converters.lazy_imports import np

from . import target_parameters
from .adapter_config import CONFIG, WEIGHTS, Scales
from .tensor_keys import TensorId

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec


class DeltaReader:
    """A reader for the deltas of one file.

    Attributes:
        swapped: The stacked targets whose two factors were swapped; filled by `all`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        scales: Scales,
        location: str,
        base: BaseSpec | None,
        swapped_stacks: frozenset[str] | None,
    ) -> None:
        self._config, self._scales, self._where, self._base, self._swapped_stacks = (
            config,
            scales,
            location,
            base,
            swapped_stacks,
        )
        self._transposed = bool(config.get("fan_in_fan_out"))
        self.swapped: set[str] = set()
        self._stack_targets: dict[str, str] = {}
        self._shared: Mapping[str, np.ndarray] = {}
        # Any other kind is LoRA itself.
        kinds = {"ADALORA": self._adalora, "LOHA": self._lycoris, "LOKR": self._lycoris, "VERA": self._vera}
        self._read_delta = kinds.get(config["peft_type"], self._lora)

    def read_all(self, pairs: Mapping[str, dict[str, np.ndarray]], shared: Mapping[str, np.ndarray]) -> dict[str, Delta]:
        """Return every target and its delta; `shared` holds VeRA's projections. One error lists everything unsupported."""
        self._shared = shared
        # VeRA's projections belong to all modules, so they are checked before any of them.
        if self._config["peft_type"] == "VERA":
            self._check_projections(pairs)
        elif shared:
            raise RefusedError(self._where, f"base_model.{min(shared)} is supported in VeRA adapters only")
        lora = [name for name, tensors in pairs.items() if set(tensors) == {"A", "B"}]
        self._stack_targets = target_parameters.parameter_targets(self._config, lora, f"{self._where}")
        stacks = self._stacks(pairs)
        deltas: dict[str, Delta] = {}
        # Of headers alone, tensors of one kind are one array: modules that are alike get one delta.
        are_shared = self._config["peft_type"] == "LORA" and not self._scales.has_patterns and self._base is None
        deltas_by_tensors: dict[tuple[object, ...], Delta] = {}
        first_error: RefusedError | None = None
        reasons: list[str] = []  # not the errors, which hold on to their frames
        for name, tensors in pairs.items():
            try:
                if name in self._stack_targets and self._stack_targets[name] in stacks:
                    deltas[self._stack_targets[name]] = self._stack(self._stack_targets[name], stacks)
                elif not are_shared:
                    deltas[name] = self._read_delta(name, tensors)
                elif delta := deltas_by_tensors.get(key := (*tensors, *map(id, tensors.values()))):
                    self._scales.check_rank(name, delta.r)
                    deltas[name] = delta
                else:
                    deltas[name] = deltas_by_tensors[key] = self._read_delta(name, tensors)
            except RefusedError as error:
                first_error = first_error or error
                reasons.append(error.what)
        if first_error:
            raise refused_error(first_error.where, reasons, first_error.hint, code=first_error.code, **first_error.fields)
        return deltas

    def with_stack_targets(self, names: Mapping[TensorId, str]) -> Mapping[TensorId, str]:
        """Return `names` with the adapter's targets for stacks in place of the wrapped modules in the file."""
        if not self._stack_targets:
            return names
        return {(kind, self._stack_targets.get(name, name), part): key for (kind, name, part), key in names.items()}

    def _stacks(self, pairs: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, target_parameters.Halves]:
        stacks: dict[str, target_parameters.Halves] = {}
        # A copy of the items, as entries are removed on the way.
        for name, target in list(self._stack_targets.items()):
            rank = self._scales.rank(target)
            halves = target_parameters.check_halves(pairs[name]["A"], pairs[name]["B"], rank, target, self._where)
            if halves.experts > 1:
                stacks[target] = halves
            # target_parameters may also name the weight of an ordinary module.
            elif target.endswith(".weight") and not name.endswith(".base_layer"):
                del self._stack_targets[name]  # a matrix: the weight of an ordinary module
            else:
                raise RefusedError(
                    self._where, f"{target}: one expert, or a matrix that is no module's weight, is not supported"
                )
        return stacks

    def _stack(self, target: str, stacks: Mapping[str, target_parameters.Halves]) -> StackedLowRank:
        version = self._config.get("peft_version")
        if self._swapped_stacks is not None:
            is_swapped = target in self._swapped_stacks
        else:
            is_swapped = target_parameters.is_stack_swapped(target, stacks, version, self._base, self._where)
        if is_swapped:
            self.swapped.add(target)
        transposed = target_parameters.is_base_transposed(is_swapped, version, self._base)
        alpha, rslora = self._scales.alpha(target), self._scales.rslora
        return target_parameters.stacked_delta(
            stacks[target], alpha, rslora=rslora, is_swapped=is_swapped, transposed=transposed
        )

    def _lora(self, target: str, tensors: Mapping[str, np.ndarray]) -> Delta:
        embedding = "embedding_A" in tensors or "embedding_B" in tensors
        a_name, b_name = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        foreign = set(tensors) - {a_name, b_name, "magnitude", "bias"}
        if foreign:
            raise RefusedError(self._where, f"{target}.{min(foreign)} is not supported in a LoRA adapter")
        self._require(target, tensors, {a_name: "lora_A", b_name: "lora_B"})
        lora_A, lora_B = tensors[a_name], tensors[b_name]
        self._check_shapes(target, lora_A, lora_B)
        self._scales.check_rank(target, lora_A.shape[0])
        alpha, rslora = self._scales.alpha(target), self._scales.rslora
        magnitude, bias = tensors.get("magnitude"), tensors.get("bias")
        if embedding:
            if bias is not None:
                raise RefusedError(self._where, f"{target}: a bias on an embedding is not supported")
            return LowRankEmbedding(lora_A, lora_B, alpha, rslora, magnitude)
        if lora_A.ndim > 2:
            return LowRankConv(lora_A, lora_B, alpha, rslora, magnitude, bias)
        if self._config.get("use_qalora") and not self._takes_unpooled_inputs(target, lora_A):
            if magnitude is not None or bias is not None:
                raise RefusedError(self._where, f"{target}: QALoRA with DoRA or a bias is not supported")
            return PooledLowRank(lora_A, lora_B, alpha, int(self._config.get("qalora_group_size") or 16), rslora)
        return LowRank(lora_A, lora_B, alpha, rslora, magnitude, bias, self._transposed)

    def _takes_unpooled_inputs(self, target: str, lora_A: np.ndarray) -> bool:
        """Return whether a module, judging by its shape, takes its inputs unpooled.

        In peft all modules but GPTQ's do (`tuners/lora/gptq.py`).
        """
        weight = self._base.tensor(f"{target}.weight") if self._base is not None else None
        return weight is not None and weight.shape[-1:] == lora_A.shape[-1:]

    def _require(self, target: str, tensors: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
        for name, tensor_name in names.items():
            if name not in tensors:
                raise FormatError(self._where, f"{target}: {tensor_name} is missing, but its counterpart exists")

    def _check_shapes(self, target: str, lora_A: np.ndarray, lora_B: np.ndarray) -> None:
        if 0 in lora_A.shape or 0 in lora_B.shape:
            raise FormatError(self._where, f"{target}: an empty tensor, as ZeRO-3 saves if weights were not gathered")
        if lora_A.ndim != lora_B.ndim or lora_A.ndim not in (2, 3, 4, 5):
            raise FormatError(self._where, f"{target}: lora_A {lora_A.shape} and lora_B {lora_B.shape} do not make a delta")
        if lora_A.shape[0] != lora_B.shape[1] or any(size != 1 for size in lora_B.shape[2:]):
            raise FormatError(self._where, f"{target}: lora_A {lora_A.shape} and lora_B {lora_B.shape} do not share a rank")

    def _adalora(self, target: str, tensors: Mapping[str, np.ndarray]) -> Delta:
        self._require(target, tensors, {name: name for name in ("lora_A", "lora_B", "lora_E")})
        lora_A, lora_B, lora_E = tensors["lora_A"], tensors["lora_B"], tensors["lora_E"]
        if len(tensors) > 3 or lora_A.ndim != 2:
            raise RefusedError(self._where, f"{target}: an AdaLoRA delta of {', '.join(sorted(tensors))} is not supported")
        self._check_shapes(target, lora_A, lora_B)
        if lora_E.shape != (len(lora_A), 1):
            raise FormatError(self._where, f"{target}: lora_E {lora_E.shape} for a rank of {len(lora_A)}")
        return AdaLora(lora_A, lora_B, lora_E, self._scales.alpha(target), self._transposed)

    def _lycoris(self, target: str, tensors: Mapping[str, np.ndarray]) -> Delta:
        kind = self._config["peft_type"]
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if not (Hadamard if kind == "LOHA" else Kronecker).fits(shapes):
            shapes_text = ", ".join(f"{name} {shape}" for name, shape in sorted(shapes.items()))
            raise FormatError(self._where, f"{target}: {shapes_text} do not make a {kind} delta")
        alpha = self._scales.alpha(target)
        if kind == "LOHA":
            self._scales.check_rank(target, tensors["hada_w1_b"].shape[0])
            return Hadamard(dict(tensors), alpha)
        rank = self._scales.rank(target)
        if rank < 1:
            raise FormatError(self._where, f"{target}: a rank of {rank}")
        return Kronecker(dict(tensors), alpha, rank)

    def _check_projections(self, pairs: Mapping[str, object]) -> None:
        """Refuse a VeRA adapter whose projections are not in its file but derived from torch's random numbers."""
        if not self._config.get("save_projection", True):
            origin = "are in the file, but peft makes others" if self._shared else "were not saved; peft makes them"
            hint = 'Set "save_projection" to true' if self._shared else "Save it again with save_projection=True"
            kind = RefusedError if self._shared else NotUnderstoodError
            raise kind(self._where, f"vera_A and vera_B {origin} from the random numbers of a seed", hint)
        for name in ("vera_A", "vera_B"):
            if name not in self._shared:
                problem = f"base_model.{name} is missing, which peft saves unless save_projection is false"
                raise FormatError(self._where, problem, "Save it again with save_projection=True")
        vera_A, vera_B = self._shared["vera_A"], self._shared["vera_B"]
        shapes = f"vera_A {vera_A.shape} and vera_B {vera_B.shape}"
        if vera_A.ndim != 2 or vera_B.ndim != 2 or vera_A.shape[0] != vera_B.shape[1] or 0 in (*vera_A.shape, *vera_B.shape):
            raise FormatError(self._where, f"{shapes} do not share a rank")
        if not pairs:
            raise FormatError(self._where, "there are projections, but no module that uses them")

    def _vera(self, target: str, tensors: Mapping[str, np.ndarray]) -> Delta:
        self._require(target, tensors, {name: name for name in ("vera_lambda_b", "vera_lambda_d")})
        lambda_b, lambda_d = tensors["vera_lambda_b"], tensors["vera_lambda_d"]
        vera_A, vera_B = self._shared["vera_A"], self._shared["vera_B"]
        if len(tensors) > 2:
            raise RefusedError(self._where, f"{target}: a VeRA delta of {', '.join(sorted(tensors))} is not supported")
        if lambda_d.shape != (len(vera_A),) or lambda_b.ndim != 1 or not 0 < len(lambda_b) <= len(vera_B):
            shapes = f"vera_lambda_b {lambda_b.shape} and vera_lambda_d {lambda_d.shape}"
            raise FormatError(self._where, f"{target}: {shapes} do not fit vera_A {vera_A.shape} and vera_B {vera_B.shape}")
        self._scales.check_rank(target, len(lambda_d))
        # VeRA's projections are as large as the largest module; only the base tells how many columns this module uses.
        width = self._in_features(target, len(lambda_b))
        in_features = width if width is not None and width <= vera_A.shape[1] else None
        return Vera(lambda_b, lambda_d, vera_A, vera_B, in_features, self._transposed)

    def _in_features(self, target: str, out_features: int) -> int | None:
        """Return the input features of the base's module, if it exists and has `out_features`; else None."""
        tensors = self._base.tensors if self._base else {}
        # A base saved without its head lacks the first component.
        weight = tensors.get(f"{target}.weight") or tensors.get(f"{target.partition('.')[2]}.weight")
        shape = weight.shape[::-1] if weight and self._transposed else weight.shape if weight else ()
        return shape[1] if len(shape) == 2 and shape[0] == out_features else None


def trainable_rows(target: str, values: np.ndarray, config: Mapping[str, Any], location: str) -> Rows:
    """Return the rows of a table that `values` replace by `trainable_token_indices`; FormatError if the counts differ."""
    indices = config.get("trainable_token_indices") or {}
    if isinstance(indices, dict):
        ids = next((ids for key, ids in indices.items() if target == key or target.endswith("." + key)), None)
    else:
        ids = indices
    if values.ndim != 2:
        raise FormatError(f"{location}/{WEIGHTS}", f"{target}: shape {values.shape} does not match any embedding table")
    if not isinstance(ids, list) or len(ids) != len(values) or not all(isinstance(number, int) for number in ids):
        raise FormatError(f"{location}/{CONFIG}", f'"trainable_token_indices" does not list the {len(values)} rows of {target}')
    return Rows(tuple(ids), values)
