"""Compare two adapters: as functions, module by module, and by the keys of their configs.

Deltas are compared as matrices, independent of rank, scaling and factors (`low_rank`), so a conversion, rsLoRA with another
alpha or a padded rank is not a difference. Changes below the rounding of float32 count as the same; equal numbers give a change
of exactly 0 and a cosine of exactly 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.checks import open_check
from adapterhub.checks.contents import Contents
from adapterhub.manifest.folder_contents import Inspection
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, Rows, refuse_tuned, targets_without_magnitude
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert, peft

from .diff_result import (
    ADDED,
    CHANGED,
    REMOVED,
    ROUNDED,
    SAME,
    UNKNOWN,
    Difference,
    KeyChange,
    ModuleChange,
    Side,
    Status,
    TensorChange,
)
from .low_rank import Factors, are_comparable, delta_norm, distance, inner, terms

Progress = Callable[[int, int], None]

ROUNDING = 1e-6
"""Relative; half a step of float32 is 6e-8, and a conversion may multiply twice."""


def diff(
    a: Path,
    b: Path,
    *,
    base: BaseSpec | None = None,
    inspected: tuple[Inspection | None, Inspection | None] = (None, None),
    progress: Progress | None = None,
) -> Difference:
    """Compare the adapters `a` and `b` as functions, and their configs.

    Args:
        a: A folder or a file of any format.
        b: Likewise.
        base: The model of both, for formats that cannot be read without it.
        inspected: What the caller has read of each, with that base.
        progress: Called with modules compared and modules in all.
    """
    with ExitStack() as stack:
        checks = [
            stack.enter_context(open_check(path, base=base, headers_only=True, inspected=known))
            for path, known in zip((a, b), inspected, strict=True)
        ]
        adapters = _read(a, b, [contents for _, contents in checks], base)
    difference = compare(*adapters, progress=progress)
    verdicts = [report.verdicts for report, _ in checks]
    different_verdicts = {
        name: (verdict_a, verdict_b)
        for name, verdict_a in verdicts[0].items()
        if (verdict_b := verdicts[1].get(name)) is not None
        and (verdict_a.verdict, verdict_a.reasons) != (verdict_b.verdict, verdict_b.reasons)
    }
    return dataclasses.replace(difference, verdicts=different_verdicts)


def _read(a: Path, b: Path, opened: list[Contents | None], base: BaseSpec | None) -> list[Adapter]:
    """Read both adapters, with experts in stacks where the base has them.

    Without a base, two files whose rows are both in llama.cpp's order can be compared in that order.
    """
    try:
        adapters = [
            (contents and contents.complete_adapter(base)) or convert.read(path, base=base, mapped=True)
            for path, contents in zip((a, b), opened, strict=True)
        ]
        return [peft.stack_experts(adapter, base) for adapter in adapters]
    except RefusedError as error:
        if error.code != "base-required":
            raise
        readings = [convert.read_unordered(path, base=base) for path in (a, b)]
        if any(ordered for _, ordered in readings):
            raise
        return [adapter for adapter, _ in readings]


def compare(a: Adapter, b: Adapter, *, progress: Progress | None = None) -> Difference:
    """Compare `a` and `b` without verdicts. Norms are computed only if any module has other numbers."""
    refuse_tuned(a)
    refuse_tuned(b)
    names = sorted({*a.deltas, *b.deltas}, key=natural)
    pairs = [(name, a.deltas.get(name), b.deltas.get(name)) for name in names]
    equal = [delta_a is not None and delta_b is not None and _equal(delta_a, delta_b) for _, delta_a, delta_b in pairs]
    modules: list[ModuleChange] = []
    for (name, delta_a, delta_b), same in zip(pairs, equal, strict=True):
        if progress:
            progress(len(modules), len(pairs))
        modules.append(_module(name, delta_a, delta_b, same=same, measured=not all(equal)))
    return Difference(tuple(modules), tuple(_tensors(a, b)), tuple(_config(a, b)), tuple(_conditions(a, b)))


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Return a key that sorts module paths naturally: layer 2 before layer 10."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in name.split("."))


def _module(name: str, a: Delta | None, b: Delta | None, *, same: bool, measured: bool) -> ModuleChange:
    """Compare one module; `measured` if its norm is needed even where its numbers are the same."""
    first = _side(a, delta_norm(a) if a and measured else None)
    # Equal numbers need no algebra, and give exactly 0 and 1.
    if same and first:
        return ModuleChange(name, SAME, first, _side(b, first.size), 0.0, 1.0, 1.0, 0.0)
    second = _side(b, delta_norm(b) if b else None)
    if a is None or b is None:
        side = first or second
        return ModuleChange(name, ADDED if a is None else REMOVED, first, second, distance=side.size if side else None)
    if not are_comparable(a, b):
        note = f"{type(a).__name__} {a.shape} became {type(b).__name__} {b.shape}"
        return ModuleChange(name, CHANGED, first, second, note=note)
    try:
        return _measured_change(name, (first, second), list(zip(terms(a), terms(b), strict=True)))
    except RefusedError as error:
        return ModuleChange(name, UNKNOWN, first, second, note=f"not compared: {error.what}")


def _measured_change(name: str, sides: tuple[Side | None, Side | None], pairs: list[tuple[Factors, Factors]]) -> ModuleChange:
    """Return the change of a module, computed from its matrices."""
    sizes = [side.size for side in sides if side and side.size is not None]
    if len(sizes) < 2:
        return ModuleChange(name, UNKNOWN, *sides, note="not compared: contains NaN or infinity")
    size_a, size_b = sizes
    ratio = size_b / size_a if size_a else None
    delta_distance = math.hypot(*(distance(term_a, term_b) for term_a, term_b in pairs))
    if not delta_distance:
        return ModuleChange(name, SAME, *sides, 0.0, ratio, 1.0 if size_a and size_b else None, 0.0)
    cosine = None
    if size_a and size_b:
        # Rounding can leave a cosine just outside of its range.
        cosine = max(-1.0, min(1.0, sum(inner(term_a, term_b) for term_a, term_b in pairs) / (size_a * size_b)))
    change = delta_distance / size_a if size_a else None
    return ModuleChange(name, _changed_status(change), *sides, change, ratio, cosine, delta_distance)


def _changed_status(change: float | None) -> Status:
    """Return the status for a relative change above 0; None if there is nothing to relate it to."""
    status: Status = ROUNDED if change is not None and change <= ROUNDING else CHANGED
    return status


def _side(delta: Delta | None, length: float | None) -> Side | None:
    if delta is None:
        return None
    names = sorted({dtypes.name_of(tensor.dtype) for _, tensor in delta.parts()})
    kind = type(delta).__name__
    return Side(kind, delta.shape, delta.r, delta.alpha, delta.rslora, delta.scaling, "/".join(names), length)


def _equal(a: Delta, b: Delta) -> bool:
    """Return whether scaling and factors are the same numbers, in any dtypes."""
    parts_a, parts_b = dict(a.parts()), dict(b.parts())
    extra = ("magnitude", "bias")
    if type(a) is not type(b) or a.scaling != b.scaling or {*parts_a} - {*extra} != {*parts_b} - {*extra}:
        return False
    return all(same_numbers(array, parts_b[name]) for name, array in parts_a.items() if name not in extra)


def same_numbers(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two arrays contain the same numbers; if of one dtype, the same bytes."""
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype:
        return a.tobytes() == b.tobytes()
    return bool(np.array_equal(a.astype(np.float64), b.astype(np.float64)))


def _tensors(a: Adapter, b: Adapter) -> Iterator[TensorChange]:
    first, second = dict(_other_tensors(a)), dict(_other_tensors(b))
    for name in sorted({*first, *second}, key=natural):
        tensor_a, tensor_b = first.get(name), second.get(name)
        if tensor_a is None or tensor_b is None:
            yield TensorChange(name, ADDED if tensor_a is None else REMOVED)
        else:
            yield _tensor(name, tensor_a, tensor_b)
    for target in sorted({*a.rows, *b.rows}):
        yield _rows(target, a.rows.get(target), b.rows.get(target))


def _other_tensors(adapter: Adapter) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of an adapter other than factors."""
    for target, delta in adapter.deltas.items():
        yield from ((f"{target}.{name}", array) for name, array in delta.parts() if name in ("magnitude", "bias"))
    yield from (*adapter.replaced.items(), *adapter.added.items())
    yield from ((f"{name} (copy)", array) for name, array in adapter.copies.items())


def _tensor(name: str, a: np.ndarray, b: np.ndarray) -> TensorChange:
    if a.shape != b.shape:
        return TensorChange(name, CHANGED, note=f"{a.shape} became {b.shape}")
    if same_numbers(a, b):
        return TensorChange(name, SAME, 0.0)
    wide_a, wide_b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    norm, difference_norm = (float(np.sqrt(np.sum(array * array))) for array in (wide_a, wide_b - wide_a))
    if not (math.isfinite(norm) and math.isfinite(difference_norm)):
        return TensorChange(name, UNKNOWN, note="not compared: contains NaN or infinity")
    change = difference_norm / norm if norm else None
    return TensorChange(name, _changed_status(change), change)


def _rows(target: str, a: Rows | None, b: Rows | None) -> TensorChange:
    name = f"{target} (rows)"
    if a is None or b is None:
        return TensorChange(name, ADDED if a is None else REMOVED)
    if a.ids != b.ids:
        return TensorChange(name, CHANGED, note=f"{len({*b.ids} - {*a.ids})} ids more, {len({*a.ids} - {*b.ids})} less")
    return _tensor(name, a.values, b.values)


_EMPTY: tuple[Any, ...] = (None, False, "", [], {})
_SEMANTIC_THOUGH_SETTLED_BY_TENSORS = {"target_modules", "modules_to_save", "bias", "lora_bias", "use_dora"}


def _config(a: Adapter, b: Adapter) -> Iterator[KeyChange]:
    """Yield keys that differ, first those that can change the function; null, false and empty values count as absent."""
    both_peft = all(adapter.source and adapter.source.format == "peft" for adapter in (a, b))
    config_a, config_b = ((_peft_config if both_peft else _common_config)(adapter) for adapter in (a, b))
    inert = peft.INERT - _SEMANTIC_THOUGH_SETTLED_BY_TENSORS
    keys = sorted({*config_a, *config_b}, key=lambda key: (key in inert, key))
    for key in keys:
        x, y = (_normalize(config.get(key)) for config in (config_a, config_b))
        if x != y:
            yield KeyChange(key, x, y, key not in inert)


def _peft_config(adapter: Adapter) -> Mapping[str, Any]:
    source = adapter.source
    return json_file.parse_object(source.config, peft.CONFIG) if source and source.format == "peft" else {}


def _common_config(adapter: Adapter) -> Mapping[str, Any]:
    """Return the settings that every format has, under PEFT's names; a list of numbers where they differ between modules."""
    deltas = list(adapter.deltas.values())
    numbers: dict[str, list[Any]] = {
        "r": sorted({delta.r for delta in deltas}),
        "lora_alpha": sorted({delta.alpha for delta in deltas}),
        "use_rslora": sorted({delta.rslora for delta in deltas}),
    }
    return {
        "base_model_name_or_path": adapter.meta.base_model,
        "task_type": adapter.meta.task_type,
        **{key: values[0] if len(values) == 1 else values for key, values in numbers.items()},
        "target_modules": sorted({name.rpartition(".")[2] for name in adapter.deltas}),
        "modules_to_save": peft.saved_modules(adapter),
    }


def _normalize(value: Any) -> Any:
    """Return a value without differences that mean nothing: the order of a list of names, and null, false or empty."""
    if any(value is empty or (value == empty and type(value) is type(empty)) for empty in _EMPTY):
        return None
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return sorted(value)
    return value


def _conditions(a: Adapter, b: Adapter) -> Iterator[KeyChange]:
    """Yield the settings outside of tensors that differ and change when or on what an adapter acts."""
    attributes = {
        "init_lora_weights": "init", "alora_invocation_tokens": "invocation", "layer_replication": "layers",
        "ensure_weight_tying": "ties",
    }  # fmt: skip
    for key, name in attributes.items():
        setting_a, setting_b = getattr(a.meta, name), getattr(b.meta, name)
        if setting_a != setting_b:
            yield KeyChange(key, setting_a, setting_b, semantic=True)
    setting_a, setting_b = ("missing" if targets_without_magnitude(adapter) else None for adapter in (a, b))
    if setting_a != setting_b:
        yield KeyChange("lora_magnitude_vector", setting_a, setting_b, semantic=True)
