"""What peft would do with an adapter on a base: what it builds from the config, which tensors it loads, which it skips.

peft builds modules from the config alone, then loads the tensors by name, and says nothing about a tensor without a place
(peft 0.21.2, `tuners/tuners_utils.py`, `inject_adapter`; `utils/save_and_load.py`, `set_peft_model_state_dict`). This follows
it step by step; `tests/peers/checks/test_peft_load.py` compares the result with peft's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, NamedTuple

from adapterhub_converters.bases import canonical_names, names_in_memory
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft import target_parameters
from adapterhub_converters.formats.peft.earlier_versions import MAPPED
from adapterhub_converters.formats.peft.stacks import STACKING
from adapterhub_converters.formats.peft.tensor_keys import PREFIX, USUAL_NAME
from adapterhub_converters.lazy_dataclass import dataclass

from .peft_base import CONVOLUTION, EMBEDDING, LINEAR, OTHER, PeftBase, Shape
from .peft_init import check_init
from .peft_targets import RefusalError, Targets, check_config, names_of
from .target_modules import EMBEDDINGS, OUTPUTS, last_of, matches

# Model types with other names in files, or with stacks of experts, of which transformers converts no adapter by the type.
_NOT_CONVERTED = (
    canonical_names.PEFT_SKIPS_OLD_NAMES
    | canonical_names.PEFT_REFUSES_OLD_NAMES
    | {"gemma4", "gemma4_text", "glm4v_moe_text", "gpt_neox", "qwen3_5_moe", "qwen3_vl_moe_text"}
)
SIZE_MISMATCH = "size mismatch"
"""How the refusal of a tensor of another shape begins."""
KEY_ERROR = "KeyError "
"""How the refusal of an adapter without a tensor that its config names begins."""
NOT_FOUND = "not found in the base model"
"""What the refusal of a config that names no module of the base has in it."""
Loader = Literal["peft", "transformers"]
LOADERS: tuple[Loader, Loader] = ("peft", "transformers")
_DUMMY = "dummy-target-modules"
_MAX_TABLES = 100  # each is looked for among all modules


@dataclass(frozen=True)
class PeftLoad:
    """What peft does with an adapter.

    Attributes:
        built: From module, or parameter of `target_parameters`, that gets a LoRA to its rank.
        loaded: The tensors of the file that are loaded.
        skipped: Those that peft skips silently.
        missing: The tensors, as peft names them, of what is built that the file does not have.
        refusal: The error with which peft refuses the adapter, in its words; empty if it loads it.
    """

    built: Mapping[str, int] = field(default_factory=dict)
    loaded: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    refusal: str = ""


def peft_loads(
    config: Mapping[str, Any], tensors: Mapping[str, Shape], base: PeftBase, loaders: Sequence[Loader] = LOADERS
) -> dict[Loader, PeftLoad]:
    """Return what peft builds of a LoRA adapter, and what each loader loads and skips, or why it is refused.

    Args:
        config: The adapter's config, which `formats.peft.check_config` accepts.
        tensors: Name, as in the file, and shape of each tensor.
        loaders: The programs that load the tensors into what peft builds: peft, or transformers by `load_adapter`.

    Raises:
        FormatError, RefusedError: A pattern of the config cannot be matched.
    """
    try:
        check_config(config)
        targets = Targets(config, base)
        layers = _build(targets, base)
    except RefusalError as error:
        return dict.fromkeys(loaders, PeftLoad(refusal=str(error)))
    built = {layer.name: layer.r for layer in layers}
    loads: dict[Loader, PeftLoad] = {}
    for loader in loaders:
        try:
            places = _Places(targets, base, layers, loader)
            names = _names_in_memory(tensors, base, loader)
            places.take_saved(names)
            loads[loader] = PeftLoad(built, *places.load(names))
        except RefusalError as error:
            loads[loader] = PeftLoad(built, refusal=str(error))
    return loads


# ---- What peft builds


class _Layer(NamedTuple):
    """A LoRA that peft builds: a tuple, since there may be a million.

    Attributes:
        name: The module, or the parameter.
        wrapper: What it is called in the model: the module, with a `.base_layer` for each parameter around it.
        tensors: From the end of a tensor's name to its shape.
    """

    name: str
    wrapper: str
    r: int
    tensors: Mapping[str, Shape]


def _build(targets: Targets, base: PeftBase) -> list[_Layer]:
    """Return the layers that peft builds."""
    if targets.modules == frozenset({_DUMMY}) or targets.modules == _DUMMY:
        return []
    tied = [module for module in base.modules if module in targets.tied_targets] if targets.tied_targets else []
    shared: _SharedTensors = {}
    included = [module for module in targets.included(base.modules) if module not in targets.tied_targets]
    layers = [_module_layer(targets, base, module, shared) for module in included]
    adapted = {layer.name for layer in layers}
    parameters = list(_parameter_layers(targets, base, adapted)) if targets.parameters else []
    layers += [*parameters, *(_module_layer(targets, base, module, shared) for module in tied)]
    if parameters:
        layers = _inside_wrappers(layers)
    if not layers and base.complete:
        raise RefusalError(_nothing_built(targets, base))
    return layers


def _nothing_built(targets: Targets, base: PeftBase) -> str:
    """Return peft's words where no module and no parameter is targeted."""
    excluded = sum(targets.excludes(module) for module in base.modules)
    if excluded == len(base.modules):
        return "All modules were excluded."
    if excluded:
        return "No modules were targeted for adaptation."
    if not targets.modules:
        return "No `target_modules` passed but also no `target_parameters` found."
    named = targets.modules if isinstance(targets.modules, str) else ", ".join(sorted(targets.modules))
    return f"Target modules {named[:300]} {NOT_FOUND}."


def _module_layer(targets: Targets, base: PeftBase, module: str, shared: _SharedTensors) -> _Layer:
    """Return the LoRA of a module, whose tensors are those of any other of its kind, shape and rank."""
    kind, weight, r = base.kinds.get(module, OTHER), base.parameters.get(f"{module}.weight"), targets.rank(module)
    if kind == OTHER:
        raise RefusalError(f"Target module {module} is not supported.")
    if base.transposed and kind == LINEAR and weight and last_of(module) not in OUTPUTS:
        weight = (weight[1], weight[0], *weight[2:])
    key = kind, weight, r
    if key not in shared:
        shared[key] = _module_tensors(targets.config, kind, weight, r)
    return _Layer(module, module, r, shared[key])


_SharedTensors = dict[tuple[str, Shape, int], Mapping[str, Shape]]
"""The tensors of the LoRA on a module, by its kind, shape and rank."""


def _module_tensors(config: Mapping[str, Any], kind: str, weight: Shape, r: int) -> dict[str, Shape]:
    check_init(config, kind, r)
    dora, bias = bool(config.get("use_dora")), bool(config.get("lora_bias"))
    if bias and kind == EMBEDDING:
        raise RefusalError("lora_bias=True is not supported for Embedding")
    rows, columns = (weight[0], weight[1]) if weight else (None, None)
    tensors: dict[str, Shape]
    if kind == EMBEDDING:
        tensors = {".lora_embedding_A": _shape(r, rows), ".lora_embedding_B": _shape(columns, r)}
        magnitude = _shape(columns)
    elif kind == CONVOLUTION:
        inner = weight[2:] if weight else None
        tensors = {
            ".lora_A.weight": None if inner is None else (r, columns or 0, *inner),
            ".lora_B.weight": None if inner is None else (rows or 0, r, *(1 for _ in inner)),
        }
        magnitude = None if inner is None else (1, rows or 0, *(1 for _ in inner))
    else:
        tensors = {".lora_A.weight": _shape(r, columns), ".lora_B.weight": _shape(rows, r)}
        magnitude = _shape(rows)
    if bias:
        tensors[".lora_B.bias"] = _shape(rows)
    if dora:
        tensors[".lora_magnitude_vector"] = magnitude
    return tensors


def _shape(*sizes: int | None) -> Shape:
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def _parameter_layers(targets: Targets, base: PeftBase, adapted: set[str]) -> Iterable[_Layer]:
    """Yield the wrappers of `target_parameters`: of the parameters of one module the first is innermost."""
    named_leaves = {
        module: [leaf for leaf in leaves if matches(None, targets.parameters, f"{module}.{leaf}", None)]
        for module, leaves in base.own_parameters.items()
    }
    for module, named in named_leaves.items():
        if named and module in adapted:
            raise RefusalError(f"Trying to wrap an `nn.Parameter` of layer '{module}', which is not a valid target.")
        if named and not module:
            raise RefusalError("Targeting an nn.Parameter on the top-level module is not supported")
    for module, named in named_leaves.items():
        named.sort(key=lambda leaf: target_parameters.ORDER.index(leaf) if leaf in target_parameters.ORDER else 99)
        for depth, leaf in enumerate(named):
            name = f"{module}.{leaf}"
            wrapper = module + ".base_layer" * (len(named) - 1 - depth)
            yield _parameter_layer(targets, base, name, wrapper, adapted)


def _inside_wrappers(layers: Sequence[_Layer]) -> list[_Layer]:
    """Return the layers with the names that they have if a module around them is wrapped for one of its own parameters."""
    depths: dict[str, int] = {}
    for layer in layers:
        if layer.name != layer.wrapper.partition(".base_layer")[0]:
            module = layer.name.rpartition(".")[0]
            depths[module] = depths.get(module, 0) + 1
    return [layer._replace(wrapper=_inside(layer.wrapper, depths)) for layer in layers]


def _inside(wrapper: str, depths: Mapping[str, int]) -> str:
    for at, character in enumerate(wrapper):
        if character == "." and (depth := depths.get(wrapper[:at])) and not wrapper.startswith(".base_layer", at):
            return wrapper[:at] + ".base_layer" * depth + wrapper[at:]
    return wrapper


def _parameter_layer(targets: Targets, base: PeftBase, name: str, wrapper: str, adapted: set[str]) -> _Layer:
    config, r, shape = targets.config, targets.rank(name), base.parameters[name]
    # A module that stores (in, out) has set `fan_in_fan_out` by then.
    transposed = base.transposed and any(base.kinds.get(module) == LINEAR and module != base.output for module in adapted)
    for option in ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora"):
        if config.get(option) or (option == "fan_in_fan_out" and transposed):
            raise RefusalError(f"lora.ParamWrapper does not work with {option}")
    check_init(config, LINEAR, r)
    if shape is None:
        return _Layer(name, wrapper, r, {".lora_A.weight": None, ".lora_B.weight": None})
    if len(shape) not in (2, 3):
        raise RefusalError(f"lora.ParamWrapper was initialized with {len(shape)} dimensional Parameter")
    experts = shape[0] if len(shape) == 3 else 1
    rows, columns = (shape[2], shape[1]) if len(shape) == 3 and base.has_flagged_stacks else (shape[-2], shape[-1])
    return _Layer(name, wrapper, r, {".lora_A.weight": (r * experts, columns), ".lora_B.weight": (rows, r * experts)})


# ---- What peft loads


class _Places:
    """The tensors of the model that peft has built, and what of the file is loaded into them."""

    def __init__(self, targets: Targets, base: PeftBase, layers: Sequence[_Layer], loader: Loader) -> None:
        self._targets, self._base, self._loader = targets, base, loader
        self._adapted = {layer.wrapper.replace(".base_layer", "") for layer in layers}
        self._with_parameters = self._adapted - {layer.name for layer in layers}
        # The LoRA of a tied output layer is that of the table, transposed.
        self._twins: dict[str, str] = {}
        for output in targets.tied_targets if base.embedding in self._adapted else ():
            for half, twin in (("A.weight", "embedding_B"), ("B.weight", "embedding_A")):
                self._twins[f"{PREFIX}{output}.lora_{half}"] = f"{PREFIX}{base.embedding}.lora_{twin}"
        # From the name that peft saves to the shape.
        self._expected: dict[str, Shape] = {
            f"{PREFIX}{layer.wrapper}{end}": shape for layer in layers for end, shape in layer.tensors.items()
        }
        self._saved, self._rows = self._wrapped_modules(), self._token_tables()

    def _wrapped_modules(self) -> list[str]:
        """Return the modules that `modules_to_save` wraps: those whose path ends in a name, wherever the name begins."""
        saved = tuple(name for name in self._targets.saved if name)
        wrapped: dict[str, None] = {}
        for module in self._base.modules if saved else ():
            if module.endswith(saved) and module not in self._targets.tied_saved:
                if module in self._adapted:
                    raise RefusalError(f"modules_to_save cannot be applied to {module}, which has a LoRA")
                if module.rpartition(".")[0] in self._with_parameters:
                    raise RefusalError(f"You are trying to target {module}, a module that is a child of ParamWrapper.")
                if not _wrapper_of(module, wrapped):
                    wrapped[module] = None
        if not self._base.complete:  # every language model has these two
            for name in names_of(self._targets.config.get("modules_to_save")):
                if last_of(name) in (*EMBEDDINGS, *OUTPUTS) and not any(module.endswith(name) for module in wrapped):
                    self._check_saved(f"{PREFIX}…{name}.weight", {})
        return list(wrapped)

    def _token_tables(self) -> dict[str, list[int]]:
        """Return the tables of `trainable_token_indices`, with their ids; a tied output layer has no rows of its own."""
        indices, base = self._targets.config.get("trainable_token_indices"), self._base
        if not isinstance(indices, list | dict):
            return {}
        by_name = indices if isinstance(indices, dict) else {base.embedding or "embed_tokens": indices}
        if len(by_name) > _MAX_TABLES:
            raise RefusedError(peft.CONFIG, f"trainable_token_indices names {len(by_name)} tables")
        tables: dict[str, list[int]] = {}
        for name, ids in by_name.items():
            if name in names_of(self._targets.config.get("modules_to_save")):
                raise RefusalError("The embedding layer is already marked to be trained fully")
            matching = [module for module in base.modules if module.endswith(name)]
            if not matching and base.complete:
                raise RefusalError(f"Target modules {{{name!r}}} {NOT_FOUND}.")
            if matching and self._is_tied_output(matching[0], by_name):
                continue
            if any(module in self._adapted for module in matching):
                raise RefusalError(f"training wrapper cannot be applied to {name}, which has a LoRA")
            tables |= dict.fromkeys(matching or [name], ids)
        return tables

    def _is_tied_output(self, module: str, by_name: Mapping[str, list[int]]) -> bool:
        """Return whether a table is the output layer, tied to the input's with the same ids."""
        if not self._base.tied or last_of(module) not in OUTPUTS or len(by_name) < 2:
            return False
        return all(ids == by_name.get(last_of(module), ids) for ids in by_name.values())

    def take_saved(self, names: Mapping[str, _Tensors]) -> None:
        """Exchange the names of whole modules and token rows for those in the model, all of which the file must have."""
        saved = dict.fromkeys(self._saved)
        for parameter in self._base.parameters if saved else ():
            module = _wrapper_of(parameter, saved)
            if not module:
                continue
            # The rows of a table, and of the output layer tied to it, are wrapped inside.
            is_tied = self._base.tied and module == self._base.output and self._base.embedding in self._rows
            has_rows = is_tied or module in self._rows
            name = f"{PREFIX}{module}.token_adapter.base_layer.weight" if has_rows else f"{PREFIX}{parameter}"
            self._check_saved(name, names)
            self._expected[name] = self._base.parameters[parameter]
        for table, ids in self._rows.items():
            name = f"{PREFIX}{table}.token_adapter.trainable_tokens_delta"
            self._check_saved(name, names)
            weight = self._base.parameters.get(f"{table}.weight")
            self._expected[name] = (len(ids), weight[1]) if weight and len(weight) == 2 else None

    def _check_saved(self, name: str, names: Mapping[str, _Tensors]) -> None:
        if name not in names and self._loader == "peft":
            raise RefusalError(f"{KEY_ERROR}'{name}'")

    def load(self, names: Mapping[str, _Tensors]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Return the tensors that are loaded and skipped, as the file names them, and those that the file lacks."""
        loaded: list[str] = []
        skipped: list[str] = []
        filled = set[str]()
        for name, (file_names, shape) in names.items():
            place = self._place(name) if self._loader == "peft" else self._place_by_transformers(name)
            if place is None:
                skipped += file_names
                continue
            expected = self._expected[place] if place in self._expected else self._base.parameters.get(place)
            if expected is not None and shape is not None and expected != shape:
                raise RefusalError(f"{SIZE_MISMATCH} for {name.removeprefix(PREFIX)}: shape {shape}, the model's is {expected}")
            loaded += file_names
            filled.add(place)
        for first, second in self._twins.items():
            if first in filled or second in filled:
                filled |= {first, second}
        return tuple(loaded), tuple(skipped), tuple(name for name in self._expected if name not in filled)

    def _place_by_transformers(self, name: str) -> str | None:
        """Return the same of transformers' loader, which also finds names that lack the base model's prefix, or have it twice.

        A magnitude's name in the model ends in the adapter's, and it is not found (`core_model_loading.rename_source_key`); nor
        is a table that is wrapped for its rows. The names of rows are looked for as they are.
        """
        inner, prefix = name.removeprefix(PREFIX), f"{self._base.prefix}."
        if name.endswith(".lora_magnitude_vector") or inner.removesuffix(".weight") in self._rows:
            return None
        if ".token_adapter." in name:
            return self._place(name)
        names = (name, f"{PREFIX}{inner.removeprefix(prefix)}", f"{PREFIX}{prefix}{inner}")
        return next((place for candidate in names if (place := self._place(candidate))), None)

    def _place(self, name: str) -> str | None:
        """Return what a tensor of the file is loaded into: one that peft built, or a parameter of the base; None if none."""
        if name in self._expected:
            return name
        if self._loader == "peft" and (plain := _without_adapter_name(name)) in self._expected and plain != name:
            # Only LoRA's own tensors have the same name with the adapter's in it.
            return plain if ".lora_" in plain else None
        if not name.startswith(PREFIX):
            return None
        parameter = name.removeprefix(PREFIX)
        module, _, leaf = parameter.rpartition(".")
        inner = module.removesuffix(".base_layer")
        # A wrapped module's own parameters are behind `.base_layer`, those of all others where they are in the base.
        if (module != inner) == (inner in self._adapted) and f"{inner}.{leaf}" in self._base.parameters:
            return f"{inner}.{leaf}"
        return None


def _wrapper_of(path: str, wrapped: Mapping[str, None]) -> str:
    """Return the wrapped module that a path is inside of; empty if it is in none."""
    return next((path[:at] for at, character in enumerate(path) if character == "." and path[:at] in wrapped), "")


def _without_adapter_name(name: str) -> str:
    """Return the name that peft saves for a tensor that has the usual name of an adapter inside, or a magnitude's `.weight`."""
    if name.endswith(f".lora_magnitude_vector.{USUAL_NAME}"):  # whose name goes on behind it
        return name
    plain = _without_last_name(name)
    return plain.removesuffix(".weight") if plain.endswith(".lora_magnitude_vector.weight") else plain


_Tensors = tuple[Sequence[str], Shape]
"""The tensors of a file that make one tensor for peft, by name, and the shape of that."""


def _without_last_name(name: str) -> str:
    end = f".{USUAL_NAME}"
    if name.endswith(end):
        return name.removesuffix(end)
    rest, dot, leaf = name.rpartition(".")
    return f"{rest.removesuffix(end)}{dot}{leaf}"


def _names_in_memory(tensors: Mapping[str, Shape], base: PeftBase, loader: Loader) -> dict[str, _Tensors]:
    """Return the tensors by the names that peft gives them, following transformers' renaming, with the file's names."""
    kind = base.model_type
    renaming = names_in_memory.renaming(kind)
    by_transformers = loader == "transformers"
    is_converted = (by_transformers or kind not in _NOT_CONVERTED) and (kind in STACKING or bool(renaming.rules))
    names: dict[str, _Tensors] = {}
    experts: dict[str, list[tuple[str, Shape]]] = {}
    for file_name, shape in tensors.items():
        name = _with_one_prefix(file_name) if by_transformers else file_name
        if is_converted and (by_transformers or ".lora_" in name):
            # The renaming inserts the adapter's name, and removes one in the end.
            plain = name if by_transformers else _without_last_name(name)
            name = PREFIX + renaming(plain.removeprefix(PREFIX))
            if stack := _stack_of(name, kind):
                experts.setdefault(stack, []).append((file_name, shape))
                continue
        names[name] = (file_name,), shape
    for stack, halves in experts.items():
        names[stack] = [file_name for file_name, _ in halves], _stacked_shape(stack, halves)
    return names


def _with_one_prefix(name: str) -> str:
    """Return a name with the prefix that transformers removes, wherever it is (peft, `build_peft_weight_mapping`)."""
    return PREFIX + name.replace(f"{PREFIX}model.", "model.", 1).replace(PREFIX, "", 1)


def _stack_of(name: str, kind: str) -> str | None:
    """Return the name of the stack into which peft puts a factor of an expert; None for any other tensor."""
    module, _, half = name.removesuffix(".weight").rpartition(".")
    place = peft.expert_place(module)
    gate, up, down = MAPPED.get(kind, ("gate_proj", "up_proj", "down_proj"))
    if kind not in STACKING or place is None or half not in ("lora_A", "lora_B") or place[2] not in (gate, up, down):
        return None
    return f"{place[0]}{'' if place[2] == down else '.base_layer'}.{half}.weight"


def _stacked_shape(stack: str, halves: Sequence[tuple[str, Shape]]) -> Shape:
    """Return the shape of a stack of factors: ranks add up, as do the outputs of gate and up."""
    shapes = [(shape[0], shape[1]) for _, shape in halves if shape is not None and len(shape) == 2]
    if len(shapes) < len(halves):
        return None
    if stack.endswith(".lora_A.weight"):
        return sum(shape[0] for shape in shapes), shapes[0][1]
    outputs = {last_of(name.partition(".lora_")[0]): shape[0] for (name, _), shape in zip(halves, shapes, strict=True)}
    return sum(outputs.values()), sum(shape[1] for shape in shapes)
