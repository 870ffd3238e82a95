"""Targets of an adapter compared with the modules of its base, before it is written under names that no module has.

mlx-lm calls the text half of a vision model `language_model.model`; transformers 5 has `model.language_model` in memory, and
files may have either. Names are compared from the layer's number on: what is before it differs between a file and the model in
memory, with and without a head, and `validate` tells which of these a loader corrects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TypeVar

from adapterhub_converters.adapter import Adapter
from adapterhub_converters.bases import BaseSpec, canonical_names
from adapterhub_converters.errors import refused

from .image import pipeline

_T = TypeVar("_T")
_TEXT, _IN_MEMORY = "language_model.", "model.language_model."


def checked(adapter: Adapter, base: BaseSpec | None, where: str) -> Adapter:
    """The adapter under the names that the base's modules have in memory.

    Raises:
        RefusedError: The base has no module that a name could mean; all such names in one error.
    """
    modules = _modules(base)
    if base is None or not modules:
        return adapter
    renamed = {target: _in_memory(target, modules, base) for target in (*adapter.deltas, *adapter.rows, *adapter.tuned)}
    tails = {_tail(module) for module in modules}
    if unknown := [t for t, name in renamed.items() if _tail(name) not in tails and not _may_be_absent(name, base, modules)]:
        reasons = [f"{target}: the base has no such module" for target in unknown]
        raise refused(where, reasons, "Is this the model that the adapter was trained on?")
    if all(target == name for target, name in renamed.items()):
        return adapter
    return dataclasses.replace(
        adapter,
        deltas=_keyed(adapter.deltas, renamed),
        rows=_keyed(adapter.rows, renamed),
        tuned=_keyed(adapter.tuned, renamed),
        source=None,
    )


def _keyed(given: Mapping[str, _T], renamed: Mapping[str, str]) -> dict[str, _T]:
    return {renamed[target]: value for target, value in given.items()}


def _modules(base: BaseSpec | None) -> set[str]:
    """The modules of a Hugging Face folder, by the names of its files and by those in memory; empty if they are not known."""
    if base is None or base.kind != "hf":
        return set()
    names = {name.rpartition(".")[0] for name in (*base.tensors, *base.packed, *base.names)}
    names |= {*base.tensors, *base.packed}  # parameters with experts have no name of their own for the weight
    for listed in pipeline.modules_of(base).values():
        names |= set(listed)
    return names | {canonical_names.in_memory(name, base.model_type) for name in names}


def _in_memory(target: str, modules: Iterable[str], base: BaseSpec) -> str:
    name = canonical_names.in_memory(target, base.model_type)
    if name == target and target not in modules and target.startswith(_TEXT):
        name = _IN_MEMORY + target.removeprefix(_TEXT).removeprefix("model.")
        name = target.removeprefix(_TEXT) if name.endswith(".lm_head") else name
    return name


def _tail(name: str) -> str:
    """A name from the number of its layer on; its last component without one."""
    parts = name.split(".")
    at = next((i for i in range(len(parts) - 1, -1, -1) if parts[i].isdecimal()), len(parts) - 1)
    return ".".join(parts[min(at, len(parts) - 2) :]) if at < len(parts) - 1 else parts[-1]


def _may_be_absent(name: str, base: BaseSpec, modules: Iterable[str]) -> bool:
    """Whether a module may be there although no file names it: experts in another form, and an output layer that is tied."""
    if ".experts." in name:
        place = f"{_tail_before_experts(name)}.experts"
        return any(f"{module}.".find(f"{place}.") >= 0 for module in modules)
    return base.tied and name.rpartition(".")[2] in ("lm_head", "embed_out", "output")


def _tail_before_experts(name: str) -> str:
    return _tail(name.partition(".experts.")[0])
