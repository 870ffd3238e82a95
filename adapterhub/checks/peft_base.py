"""The modules of a base as peft sees them: those of the model in memory, as transformers 5 loads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from adapterhub_converters.adapter import StackedLowRank
from adapterhub_converters.formats.peft import stacks
from adapterhub_converters.lazy_dataclass import dataclass

from .base_fit import delta_shape, is_conv1d
from .contents import Contents
from .target_modules import EMBEDDINGS, OUTPUTS, last_of

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

Shape = tuple[int, ...] | None
"""None where the shape is unknown."""

LINEAR, EMBEDDING, CONVOLUTION, OTHER = "linear", "embedding", "convolution", "other"
_EMBEDDING_ENDS = ("embedding", "embeddings", "embed", "embed_tokens_per_layer", "wpe", *EMBEDDINGS)
_ROUTERS = ("gate", "router")
# Model types whose routers are plain linear layers; those of all others with stacked experts are modules of their own.
_LINEAR_ROUTERS = frozenset({"jamba", "lfm2_moe"})
# Bases whose stacks peft knows to be `(experts, in, out)` by the flag `is_transposed` of their modules.
_FLAGGED_TRANSPOSED = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
_WITH_OUTPUT = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
_PARTS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


@dataclass(frozen=True, eq=False)
class PeftBase:
    """The parameters of a model in memory.

    Attributes:
        parameters: From parameter (`model.layers.0.mlp.up_proj.weight`) to its shape.
        kinds: From module to its kind: LINEAR, EMBEDDING, CONVOLUTION, or OTHER, on which peft puts no LoRA.
        model_type: Hugging Face's `model_type`; empty if it is unknown.
        tied: Whether the output layer is the embedding table.
        transposed: Whether linear layers store `(in, out)`.
        complete: Whether these are all modules of the base, and not only those that the adapter names.
    """

    parameters: Mapping[str, Shape]
    kinds: Mapping[str, str]
    model_type: str = ""
    tied: bool = False
    transposed: bool = False
    complete: bool = True

    @cached_property
    def own_parameters(self) -> Mapping[str, list[str]]:
        """From module to the last names of the parameters that it has itself, in their order."""
        by_module: dict[str, list[str]] = {}
        for name in self.parameters:
            module, _, leaf = name.rpartition(".")
            by_module.setdefault(module, []).append(leaf)
        return by_module

    @cached_property
    def modules(self) -> list[str]:
        """Every module below the model itself, also those that only contain others."""
        names: dict[str, None] = {}
        for module in self.kinds:
            parents, parent = [], module.rpartition(".")[0]
            while parent and parent not in names:  # whose own parents are there as well
                parents.append(parent)
                parent = parent.rpartition(".")[0]
            for name in reversed(parents):
                names[name] = None
            names[module] = None
        return list(names)

    @cached_property
    def prefix(self) -> str:
        """The module that has all others but the head: `model`, `transformer`; empty if there are no modules."""
        tops = Counter(module.partition(".")[0] for module in self.kinds)
        return tops.most_common(1)[0][0] if tops else ""

    @cached_property
    def output(self) -> str:
        """The output layer; empty if there is none."""
        return next((module for module in self.kinds if last_of(module) in OUTPUTS), "")

    @cached_property
    def embedding(self) -> str:
        """The table of input embeddings; empty if there is none."""
        tables = (module for module, kind in self.kinds.items() if kind == EMBEDDING and last_of(module) in EMBEDDINGS)
        return next(tables, "")

    @property
    def has_flagged_stacks(self) -> bool:
        """Whether peft takes the stacks of experts for `(experts, in, out)`."""
        return self.model_type in _FLAGGED_TRANSPOSED


def base_in_memory(base: BaseSpec) -> PeftBase:
    """Return a base's modules under their names in memory, with experts stacked where transformers stacks them."""
    stored: dict[str, Shape] = {name: tensor.shape for name, tensor in (base.tensors or base.derived).items()}
    stored |= {name if "." in name and name.endswith((".weight", ".bias")) else f"{name}.weight": None for name in base.packed}
    if not stored:
        stored = dict.fromkeys(base.names)
    parameters: dict[str, Shape] = {}
    listed: dict[str, dict[str, list[Shape]]] = {}
    names = base.renaming.names(stored)
    for name, shape in stored.items():
        in_memory = names[name]
        module, _, leaf = in_memory.rpartition(".")
        place = stacks.expert_place(module) if base.model_type in stacks.STACKED and leaf == "weight" else None
        if place:
            listed.setdefault(place[0], {}).setdefault(_PARTS[place[2]], []).append(shape)
        else:
            parameters[in_memory] = shape
    for module, parts in listed.items():
        parameters |= _stack_experts(module, parts)
    table = next((name for name in parameters if last_of(name.removesuffix(".weight")) in EMBEDDINGS), "")
    has_output = any(last_of(name.removesuffix(".weight")) in OUTPUTS for name in parameters)
    if base.tied and table and not has_output and base.architecture.endswith(_WITH_OUTPUT):
        parameters["lm_head.weight"] = parameters[table]
    return PeftBase(
        parameters, _kinds(parameters, base.model_type), base.model_type, tied=base.tied, transposed=is_conv1d(base)
    )


def _stack_experts(module: str, parts: Mapping[str, list[Shape]]) -> Iterator[tuple[str, Shape]]:
    """Yield the parameters in which transformers 5 stacks the experts of a layer."""
    first = {part: shapes[0] for part, shapes in parts.items()}
    count = len(next(iter(parts.values())))
    up, down = first.get("up"), first.get("down")
    if "gate" in first:
        yield f"{module}.gate_up_proj", (count, 2 * up[0], up[1]) if up and len(up) == 2 else None
    elif "up" in first:
        yield f"{module}.up_proj", (count, *up) if up else None
    if "down" in first:
        yield f"{module}.down_proj", (count, *down) if down else None


def _kinds(parameters: Mapping[str, Shape], model_type: str) -> dict[str, str]:
    """Return the kind of every module that has parameters of its own."""
    with_stacks = {name.rpartition(".")[0] for name, shape in parameters.items() if _is_stack(name, shape)}
    kinds: dict[str, str] = {}
    for name, shape in parameters.items():
        module, _, leaf = name.rpartition(".")
        if not module:
            continue
        kinds.setdefault(module, OTHER)
        if leaf == "weight":
            parent = module.rpartition(".")[0]
            is_router = f"{parent}.experts" in with_stacks and last_of(module) in _ROUTERS
            kinds[module] = OTHER if is_router and model_type not in _LINEAR_ROUTERS else _kind(module, shape)
    return kinds


def _is_stack(name: str, shape: Shape) -> bool:
    return name.endswith(("_proj", "_proj_blocks")) and (shape is None or len(shape) > 2)


def _kind(module: str, shape: Shape) -> str:
    """Return the kind of a module with a weight."""
    last = last_of(module)
    if shape is None and ("norm" in last or last.startswith("ln_")):
        return OTHER
    if shape is None or len(shape) == 2:
        return EMBEDDING if last.endswith(_EMBEDDING_ENDS) else LINEAR
    return CONVOLUTION if 3 <= len(shape) <= 5 else OTHER


def modules_of_adapter(contents: Contents) -> PeftBase:
    """Return the modules that an adapter names, as a base that it fits: all that is known where no base is given."""
    parameters: dict[str, Shape] = {}
    kinds: dict[str, str] = {}
    for target, parts in contents.pairs.items():
        parameters[f"{target}.weight"] = delta_shape(parts)
        kinds[target] = EMBEDDING if "embedding_A" in parts or "embedding_B" in parts else LINEAR
    for target, delta in contents.other_deltas.items():
        if isinstance(delta, StackedLowRank):
            parameters[target] = None
            kinds.setdefault(target.rpartition(".")[0], OTHER)
        else:
            parameters[f"{target}.weight"] = None
            kinds[target] = CONVOLUTION if len(delta.shape) > 2 else LINEAR
    for name in (*contents.replaced, *contents.copies):
        parameters.setdefault(name, None)
        kinds.setdefault(name.rpartition(".")[0], OTHER)
    for target in contents.rows:
        parameters.setdefault(f"{target}.weight", None)
        kinds.setdefault(target, EMBEDDING)
    return PeftBase(parameters, kinds, tied=bool(contents.config.get("ensure_weight_tying")), complete=False)
