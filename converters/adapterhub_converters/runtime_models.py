"""The models that vLLM and SGLang serve with LoRA, as `tests/support/runtime_models.py` reads them from their sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from functools import cache
from pathlib import Path
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.lazy_dataclass import dataclass

_EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class VllmModel:
    """What is particular to a model that vLLM serves with LoRA (vllm/lora/model_manager.py).

    Attributes:
        tables: The embedding tables and output layers that take LoRA; None if a text model decides that is not named.
        stacked_experts: Whether it reads experts in one stack (`is_3d_moe_weight`); others read them one by one.
        packed: Names of fused layers, and the parts by which an adapter names each.
        unwrapped: Names of fused layers that it has no form with LoRA for.
        packed_projections: Projections that become such a layer, to the option of the base's config without which they do not.
        absent: Names that transformers has for parts of layers and vLLM has not.
        language: Prefixes of the language model in vLLM's names; empty for a text model, like the next two.
        towers: Prefixes of vision and audio models.
        connectors: Prefixes of the modules between these and the language model.
        tower_option: Whether `enable_tower_connector_lora` has an effect.
        prefixes: Prefixes of names in files, and what vLLM replaces them by.
        substrings: The same for parts of names.
    """

    tables: tuple[str, ...] | None = ()
    stacked_experts: bool = False
    packed: Mapping[str, list[str]] = field(default_factory=dict)
    unwrapped: tuple[str, ...] = ()
    packed_projections: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()
    connectors: tuple[str, ...] = ()
    tower_option: bool = False
    prefixes: Mapping[str, str] = field(default_factory=dict)
    substrings: Mapping[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> frozenset[str]:
        """The names that adapters have for the parts of fused layers."""
        return frozenset(part for parts in self.packed.values() for part in parts)

    def is_in_tower(self, module: str) -> bool:
        """Return whether a module is in a tower or a connector, which vLLM leaves out unless it is told otherwise."""
        name = self._own_name(module)
        outside = (*self.towers, *self.connectors)
        prefix = max((prefix for prefix in (*self.language, *outside) if name.startswith(prefix)), key=len, default="")
        return prefix in outside

    def is_elsewhere(self, module: str) -> bool:
        """Return whether vLLM has a module under another name, since a part of its path differs.

        Its rules may leave a `model.` before a component.
        """
        if not self.is_in_tower(module) and not {*self.absent}.isdisjoint(module.split(".")[:-1]):
            return True
        components = (*self.language, *self.towers, *self.connectors)
        return bool(components) and self._own_name(module).startswith(tuple(f"model.{prefix}" for prefix in components))

    def _own_name(self, module: str) -> str:
        """Return vLLM's name of a module (vllm/model_executor/models/utils.py, WeightsMapper)."""
        name = f"{module}."
        for old, new in self.substrings.items():
            name = name.replace(old, new, 1)
        for old, new in self.prefixes.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
        return name.removesuffix(".")


def vllm_model(architecture: str) -> VllmModel | None:
    """Return what vLLM has for Hugging Face's name of a class; None if it does not serve it with LoRA."""
    record: dict[str, Any] | None = _tables()["vllm"]["models"].get(architecture)
    if record is None:
        return None
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
    return VllmModel(**fields)


def vllm_has_without_lora(architecture: str) -> bool:
    """Return whether vLLM has a model, and no LoRA for it."""
    return architecture in _tables()["vllm"]["without_lora"]


def last_vllm(architecture: str) -> str | None:
    """Return the last release of vLLM that had a model, if it has it no more."""
    release: str | None = _tables()["vllm"]["removed"].get(architecture)
    return release


def is_in_sglang(architecture: str) -> bool:
    """Return whether SGLang has a model; it has LoRA for each."""
    return architecture in _tables()["sglang"]["models"]


def sglang_has_memory_for(architecture: str, module: str) -> bool:
    """Return whether SGLang can size its LoRA memory for a module (sglang/srt/lora/utils.py, get_hidden_dim)."""
    table = _tables()["sglang"]
    names = table["models"].get(architecture, {}).get("names", table["names"])
    last = module.rpartition(".")[2]
    name = table["normalized"].get(last, last)
    return names is None or name in names or name in _EMBEDDINGS


@cache
def _tables() -> dict[str, Any]:
    return json_file.read_object(Path(__file__).with_suffix(".json"))
