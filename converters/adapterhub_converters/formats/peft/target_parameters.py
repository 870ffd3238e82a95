"""`target_parameters`: LoRA on parameters with all experts of a layer, in the layouts that versions of peft save.

For a parameter `(experts, d1, d2)` the file has A `(r * experts, ·)`, with experts as the slow axis, and B `(·, r * experts)`,
with experts as the fast axis (peft, `tuners/lora/layer.py`, `ParamWrapper`). Which of d1 and d2 belongs to which factor changed
between versions: A has the expert's input columns since 0.19.1, the other ones in 0.19.0, and those of d1 before that. A file
with the two factors exchanged is called swapped. It is recognized by the base's shape; else by the shapes of gate_up_proj and
down_proj together, as the output of one is the input of the other; else by peft_version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub_converters import safe_regex
from adapterhub_converters.adapter.deltas import StackedLowRank
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.lazy_dataclass import dataclass
from adapterhub_converters.lazy_imports import np

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_VERSION = safe_regex.Pattern(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?")

ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""The order in which transformers' expert modules define their parameters: peft wraps the first innermost."""
# Bases that store `(experts, in, out)`; the first set declares it (`is_transposed`).
_FLAGGED = {"gpt_oss", "aria", "aria_text", "openai_privacy_filter"}
_UNFLAGGED = {"llama4", "llama4_text"}
_UNFLAGGED_MODULE = "feed_forward.experts"  # llama4 alone
WRITTEN_VERSION = "0.19.1"  # the peft_version to write: the first with the layout that is written


@dataclass(frozen=True, eq=False, slots=True)
class Halves:
    """The two factors of a stack in the file's layout, and the rank of one expert."""

    lora_A: np.ndarray
    lora_B: np.ndarray
    r: int

    @property
    def experts(self) -> int:
        """The number of experts."""
        return int(self.lora_A.shape[0]) // self.r


def wrapper_names(module: str, parameters: Iterable[str]) -> dict[str, str]:
    """Map the parameters of one module to the names of peft's wrappers: the first is innermost, one `.base_layer` per level."""
    ordered = sorted(parameters, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    unknown = [name for name in ordered if name not in ORDER]
    if unknown and len(ordered) > 1:
        raise RefusedError(
            module, f"target_parameters {', '.join(ordered)}: the order of the wrappers of {unknown[0]} is unknown"
        )
    return {name: module + ".base_layer" * (len(ordered) - 1 - depth) for depth, name in enumerate(ordered)}


def parameter_targets(config: Mapping[str, Any], modules: Iterable[str], location: str) -> dict[str, str]:
    """Map the wrapped names in a file to the parameters that `target_parameters` names."""
    parameter_names = config.get("target_parameters") or []
    if not isinstance(parameter_names, list) or not all(isinstance(name, str) and name for name in parameter_names):
        raise FormatError(location, '"target_parameters" is not a list of names')
    # Without target_parameters only a wrapper's `.base_layer` in a name can mean a parameter.
    if not parameter_names:
        modules = [name for name in modules if ".base_layer" in name]
    depth: dict[str, int] = {}
    for name in modules:
        parts = name.split(".")
        while len(parts) > 1 and parts[-1] == "base_layer":
            parts.pop()
        module = ".".join(parts)
        depth[module] = max(depth.get(module, 0), name.count(".base_layer"))
    parameter_of_wrapper: dict[str, str] = {}
    for module, deepest in depth.items():
        owned = {entry.rpartition(".")[2] for entry in parameter_names if _owns(module, entry.rpartition(".")[0], deepest)}
        if not owned:
            if deepest:
                raise RefusedError(
                    location, f"{module}.base_layer has a delta, but target_parameters does not name its parameter"
                )
            continue
        if len(owned) != deepest + 1:
            if deepest or len(owned) > 1:
                problem = f"{module}: {deepest + 1} deltas for the parameters {', '.join(sorted(owned))} of target_parameters"
                raise RefusedError(location, problem)
            continue
        parameter_of_wrapper |= {stem: f"{module}.{parameter}" for parameter, stem in wrapper_names(module, owned).items()}
    return parameter_of_wrapper


def _owns(module: str, owner: str, deepest: int) -> bool:
    # For the experts of transformers 5, peft writes a parameter's bare name, which matches every module with that parameter.
    if not owner:
        return bool(deepest) or module.endswith(".experts")
    return module == owner or module.endswith(f".{owner}")


def check_halves(lora_A: np.ndarray, lora_B: np.ndarray, r: int, target: str, location: str) -> Halves:
    """Return the two factors of a stack, checked against the config's rank, from which alone the number of experts follows."""
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise FormatError(location, f"{target}: lora_A {lora_A.shape} and lora_B {lora_B.shape} do not share a rank")
    if 0 in lora_A.shape or 0 in lora_B.shape:
        raise FormatError(location, f"{target}: an empty tensor, as ZeRO-3 saves if weights were not gathered")
    if r < 1 or lora_A.shape[0] % r:
        raise FormatError(location, f"{target}: {lora_A.shape[0]} rows of lora_A are not a multiple of the rank {r}")
    return Halves(lora_A, lora_B, r)


def is_stack_swapped(target: str, stacks: Mapping[str, Halves], version: object, base: BaseSpec | None, location: str) -> bool:
    """Return whether the file has the two factors of a stack swapped; RefusedError if it cannot be determined."""
    stack = stacks[target]
    by_shape = _swapped_by_base(target, stack, base)
    if by_shape is None:
        by_shape = _swapped_by_neighbor(target, stacks)
    if by_shape is not None:
        return by_shape
    by_version = _swapped_by_version(target, _version_tuple(version), base)
    if by_version is None:
        problem = f"{target}: which factor of the experts is which depends on how the base stores them"
        hint = "Name its base model"
        raise RefusedError(location, f"{problem} (peft_version {str(version)[:20]!r})", hint, code="base-required")
    return by_version


def is_base_transposed(stack_is_swapped: bool, version: object, base: BaseSpec | None) -> bool | None:
    """Return whether the base stores `(experts, in, out)`; None if it cannot be determined."""
    if base is not None and base.model_type:
        return base.model_type in _FLAGGED | _UNFLAGGED
    known_version = _version_tuple(version)
    return not stack_is_swapped if known_version is not None and known_version < (0, 19, 0) else None


def _swapped_by_base(target: str, stack: Halves, base: BaseSpec | None) -> bool | None:
    weight = base.tensor(target) if base else None
    if base is None or weight is None or len(weight.shape) != 3 or weight.shape[1] == weight.shape[2]:
        return None
    in_features, out_features = weight.shape[:0:-1] if base.model_type not in _FLAGGED | _UNFLAGGED else weight.shape[1:]
    file_shape = stack.lora_A.shape[1], stack.lora_B.shape[0]
    return False if file_shape == (in_features, out_features) else True if file_shape == (out_features, in_features) else None


def _swapped_by_neighbor(target: str, stacks: Mapping[str, Halves]) -> bool | None:
    """Decide by the other parameter of the layer; None if the shapes allow both.

    gate_up_proj has twice down_proj's inputs as outputs, and down_proj has gate_up_proj's inputs as outputs.
    """
    module = target.rpartition(".")[0]
    up, down = stacks.get(f"{module}.gate_up_proj"), stacks.get(f"{module}.down_proj")
    if up is None or down is None or not target.endswith(("gate_up_proj", "down_proj")):
        return None
    a, b, c, d = up.lora_A.shape[1], up.lora_B.shape[0], down.lora_A.shape[1], down.lora_B.shape[0]
    return False if (a, b) == (d, 2 * c) else True if (b, a) == (c, 2 * d) else None


def _swapped_by_version(target: str, version: tuple[int, int, int] | None, base: BaseSpec | None) -> bool | None:
    kind = base.model_type if base is not None else ""
    if version is None:
        return None
    if version >= (0, 19, 1):
        return kind in _UNFLAGGED or target.rpartition(".")[0].endswith(_UNFLAGGED_MODULE)
    if version >= (0, 19, 0):
        return kind not in _UNFLAGGED and not target.rpartition(".")[0].endswith(_UNFLAGGED_MODULE)
    return None if not kind else kind not in _FLAGGED | _UNFLAGGED


def _version_tuple(version: object) -> tuple[int, int, int] | None:
    match = _VERSION.match(version) if isinstance(version, str) else None
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else None


def stacked_delta(stack: Halves, alpha: float, *, rslora: bool, is_swapped: bool, transposed: bool | None) -> StackedLowRank:
    """Return the canonical delta of a stack in the file's layout."""
    rows = stack.lora_A.reshape(stack.experts, stack.r, -1)  # (experts, r, columns of A)
    columns = stack.lora_B.reshape(-1, stack.r, stack.experts).transpose(2, 0, 1)  # (experts, rows of B, r)
    lora_A, lora_B = (columns.swapaxes(1, 2), rows.swapaxes(1, 2)) if is_swapped else (rows, columns)
    return StackedLowRank(lora_A, lora_B, alpha, rslora, transposed)


def file_factors(delta: StackedLowRank, *, is_swapped: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B as the file stores them: the inverse of `stacked_delta`."""
    rows, columns = delta.lora_A, delta.lora_B
    if is_swapped:
        rows, columns = columns.swapaxes(1, 2), rows.swapaxes(1, 2)
    r = delta.r
    return (
        np.ascontiguousarray(rows.reshape(-1, rows.shape[2])),
        np.ascontiguousarray(columns.transpose(1, 2, 0).reshape(columns.shape[1], r * len(columns))),
    )


def is_written_swapped(target: str, delta: StackedLowRank) -> bool:
    """Return whether the newest peft expects this stack swapped: if the base stores `(in, out)` and does not declare it."""
    return delta.transposed_base is not False and target.rpartition(".")[0].endswith(_UNFLAGGED_MODULE)


def is_swap_expected(target: str, version: object, base: BaseSpec | None, *, is_swapped: bool) -> bool:
    """Return whether the newest peft expects a stack swapped; as the file has it if that cannot be determined."""
    known_version = _version_tuple(version)
    if base is not None and base.model_type:
        return base.model_type in _UNFLAGGED
    if known_version is None or known_version >= (0, 19, 1):
        return is_swapped
    if known_version >= (0, 19, 0):
        return not is_swapped
    return not is_swapped and target.rpartition(".")[0].endswith(_UNFLAGGED_MODULE)


def wrapper_names_by_target(targets: Sequence[str]) -> dict[str, str]:
    """Map stacked targets to the names of peft's wrappers."""
    modules: dict[str, list[str]] = {}
    for target in targets:
        module, _, parameter = target.rpartition(".")
        modules.setdefault(module, []).append(parameter)
    return {f"{m}.{p}": stem for m, parameters in modules.items() for p, stem in wrapper_names(m, parameters).items()}
