"""Comparison of an adapter's targets with the modules of its base, before it is written under names that no module has.

mlx-lm calls the text half of a vision model `language_model.model`; transformers 5 calls it `model.language_model` in memory,
and files may have either. Names are compared from the layer number on: what precedes it differs between a file and the model in
memory, with and without a head. `validate` tells which of these a loader corrects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

from adapterhub_converters.adapter import Adapter
from adapterhub_converters.errors import refused_error

from . import pipeline

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_T = TypeVar("_T")
_TEXT, _IN_MEMORY = "language_model.", "model.language_model."


def match_targets(adapter: Adapter, base: BaseSpec | None, location: str) -> Adapter:
    """Return the adapter with its targets renamed to what the base's modules are called in memory.

    Raises:
        RefusedError: A name matches no module of the base; one error lists all such names.
    """
    modules = _base_modules(base)
    # Only a Hugging Face folder lists its modules; with any other base the names are taken as they are.
    if base is None or not modules:
        return adapter
    renamed = {target: _in_memory(target, modules, base) for target in (*adapter.deltas, *adapter.rows, *adapter.tuned)}
    tails = {_tail(module) for module in modules}
    if unknown := [t for t, name in renamed.items() if _tail(name) not in tails and not _may_be_absent(name, base, modules)]:
        reasons = [f"{target}: the base has no such module" for target in unknown]
        raise refused_error(location, reasons, "Is this the model that the adapter was trained on?")
    if all(target == name for target, name in renamed.items()):
        return adapter
    return dataclasses.replace(
        adapter,
        deltas=_rename_keys(adapter.deltas, renamed),
        rows=_rename_keys(adapter.rows, renamed),
        tuned=_rename_keys(adapter.tuned, renamed),
        source=None,
    )


def _rename_keys(by_target: Mapping[str, _T], renamed: Mapping[str, str]) -> dict[str, _T]:
    return {renamed[target]: value for target, value in by_target.items()}


def _base_modules(base: BaseSpec | None) -> set[str]:
    """Return the modules of a Hugging Face folder, under their names in files and in memory; empty if they are not known."""
    if base is None or base.kind != "hf":
        return set()
    names = {name.rpartition(".")[0] for name in (*base.tensors, *base.packed, *base.names)}
    names |= {*base.tensors, *base.packed}  # parameters with experts have no name of their own for the weight
    for module_names in pipeline.modules_of(base).values():
        names |= set(module_names)
    return names | {base.renaming.module(name) for name in names} | base.names_in_memory


def _in_memory(target: str, modules: Iterable[str], base: BaseSpec) -> str:
    # Not every rule leaves a name in memory as it is.
    name = target if target in base.names_in_memory else base.renaming.module(target)
    if name == target and target not in modules and target.startswith(_TEXT):
        # mlx-lm's prefix, which neither the files nor the models of transformers have.
        name = _IN_MEMORY + target.removeprefix(_TEXT).removeprefix("model.")
        name = target.removeprefix(_TEXT) if name.endswith(".lm_head") else name
    return name


def _tail(name: str) -> str:
    """Return a name from its layer number on; its last component if it has none."""
    parts = name.split(".")
    start = next((i for i in range(len(parts) - 1, -1, -1) if parts[i].isdecimal()), len(parts) - 1)
    return ".".join(parts[min(start, len(parts) - 2) :]) if start < len(parts) - 1 else parts[-1]


def _may_be_absent(name: str, base: BaseSpec, modules: Iterable[str]) -> bool:
    """Return whether a module may exist although no file names it: experts in another form, and a tied output layer."""
    if ".experts." in name:
        place = f"{_tail_before_experts(name)}.experts"
        return any(f"{module}.".find(f"{place}.") >= 0 for module in modules)
    return base.tied and name.rpartition(".")[2] in ("lm_head", "embed_out", "output")


def _tail_before_experts(name: str) -> str:
    return _tail(name.partition(".experts.")[0])
