"""Adapters drawn by a seed on tiny bases, and what peft itself builds, loads and skips of them."""

from __future__ import annotations

import copy
import json
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.checks.peft_base import PeftBase, base_in_memory
from adapterhub.checks.peft_load import SIZE_MISMATCH, Loader, PeftLoad, peft_loads
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft.tensor_keys import PREFIX

from . import tiny

BASES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"tie_word_embeddings": True},
    "GPT2LMHeadModel": {},
    "Gemma3ForCausalLM": {},
    "PhiForCausalLM": {},
    "MixtralForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "Qwen2MoeForCausalLM": {},
    "GptOssForCausalLM": {},
    "Gemma3ForConditionalGeneration": {},
    "Qwen2VLForConditionalGeneration": {},
}
"""The classes of the bases, with their sizes: dense, tied, transposed, with experts, with vision."""
_FIRST_MARK = 1000.0  # no weight of a base is as large
# Peft's words in an error, by which a refusal is told from another.
WORDS = (
    "size mismatch", "not found in the base model", "All modules were excluded", "No modules were targeted",
    "No `target_modules` passed", "Please specify `target_modules`", "base_model.model.", "cannot be applied to",
    "Cannot convert PEFT target", "cannot be used when", "must also be specified", "positive integer", "already marked",
    "lora_bias=True is not supported", "is not supported",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A tiny model, and what its files say of it."""

    model: Any
    spec: PeftBase
    linear: tuple[str, ...]
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Draw:
    """An adapter: its config, and the shapes of its tensors."""

    base: str
    config: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Outcome:
    """What happens to an adapter: the word for an error, or what is built with which rank, loaded, and missing."""

    refusal: str
    built: Mapping[str, int]
    loaded: frozenset[str]
    missing: frozenset[str]


def bases(folder: Path, names: Iterable[str] = BASES) -> dict[str, Base]:
    """Return bases, saved in `folder` and read again from their headers."""
    import torch

    result: dict[str, Base] = {}
    for name in names:
        model = tiny.model(name, **BASES[name])
        model.save_pretrained(folder / name)
        linear = tuple(n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear) or _is_conv1d(module))
        parameters = tuple(n for n, parameter in model.named_parameters() if parameter.ndim == 3)
        result[name] = Base(model, base_in_memory(read_base(folder / name)), linear, parameters)
    return result


def _is_conv1d(module: Any) -> bool:
    return type(module).__name__ == "Conv1D"


# ---- Drawing


def draws(seed: int, count: int, bases_by_name: Mapping[str, Base]) -> Iterator[Draw]:
    """Yield adapters as peft saves them, of which config and tensors were then changed."""
    generator = random.Random(seed)
    names = list(bases_by_name)
    for number in range(count):
        name = names[number % len(names)]
        while True:
            drawn = _draw(generator, name, bases_by_name[name])
            if drawn is not None:
                yield drawn
                break


def _draw(generator: random.Random, name: str, base: Base) -> Draw | None:
    """Return an adapter; None if peft cannot even build it."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    config = _config(generator, base)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = get_peft_model(copy.deepcopy(base.model), LoraConfig(**config), low_cpu_mem_usage=True)
            state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        except (ValueError, TypeError, RuntimeError, KeyError):
            return None
    saved = json.loads(json.dumps({**config, "peft_type": "LORA", "base_model_name_or_path": None}))
    tensors = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for _ in range(generator.choice((0, 1, 1, 2))):
        generator.choice(_CONFIG_CHANGES)(generator, saved, base)
    for _ in range(generator.choice((0, 0, 1, 2))):
        generator.choice(_TENSOR_CHANGES)(generator, tensors, base)
    return Draw(name, saved, tensors)


def _leaves(base: Base) -> list[str]:
    return sorted({module.rpartition(".")[2] for module in base.linear})


def _config(generator: random.Random, base: Base) -> dict[str, Any]:
    leaves = _leaves(base)
    chosen = generator.sample(leaves, generator.randint(1, min(4, len(leaves))))
    config: dict[str, Any] = {"r": generator.choice((2, 4)), "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    config["target_modules"] = generator.choice(
        (
            chosen,
            chosen,
            chosen,
            "all-linear",
            rf".*\.({'|'.join(chosen)})",
            generator.sample(base.linear, min(3, len(base.linear))),
        )
    )
    if generator.random() < 0.2 and isinstance(config["target_modules"], list):
        config["target_modules"] = [*config["target_modules"], generator.choice(("embed_tokens", "wte", "lm_head"))]
    if base.parameters and generator.random() < 0.5:
        config["target_parameters"] = sorted({".".join(name.split(".")[-2:]) for name in base.parameters})
    if generator.random() < 0.3:
        config["rank_pattern"] = {generator.choice(leaves): 3, generator.choice((r"layers\.0\..*", r".*1.*proj")): 5}
    for key in ("use_dora", "lora_bias"):
        if generator.random() < 0.1:
            config[key] = True
    if generator.random() < 0.15:
        config["modules_to_save"] = [generator.choice(("lm_head", "embed_tokens", "norm", "wte", "ln_f"))]
    if generator.random() < 0.15:
        config["trainable_token_indices"] = [1, 5, 7]
    if generator.random() < 0.15:
        config["layers_to_transform"] = generator.choice(([0], [1], 1, []))
        config["layers_pattern"] = generator.choice((None, "layers", "h", ["blocks", "layers"]))
    if generator.random() < 0.15:
        config["exclude_modules"] = generator.choice(
            (["lm_head"], [leaves[0]], r".*layers\.1\..*", [generator.choice(base.linear)])
        )
    return {key: value for key, value in config.items() if value is not None}


def _no_targets(generator: random.Random, config: dict[str, Any], base: Base) -> None:
    if generator.random() < 0.5:
        config["target_modules"] = None
    else:
        config.pop("target_modules", None)


def _other_targets(generator: random.Random, config: dict[str, Any], base: Base) -> None:
    leaves = _leaves(base)
    config["target_modules"] = generator.choice(
        (generator.sample(leaves, 1), generator.sample(leaves, min(3, len(leaves))), [], ["nothing"], "all-linear",
         "ALL-LINEAR", ["embed_tokens"], ["norm"], ["self_attn"], r"model\..*q_proj", ["proj"], [generator.choice(base.linear)])
    )  # fmt: skip


def _excluded(generator: random.Random, config: dict[str, Any], base: Base) -> None:
    leaves = _leaves(base)
    config["exclude_modules"] = generator.choice(
        ([generator.choice(leaves)], leaves, r".*layers\.0\..*", ".*", [generator.choice(base.linear)], [], r".*\.visual\..*")
    )


def _other_ranks(generator: random.Random, config: dict[str, Any], base: Base) -> None:
    if generator.random() < 0.4:
        config["r"] = generator.choice((2, 4, 8))
    else:
        config["rank_pattern"] = {generator.choice((*_leaves(base), "nothing", ".*experts.*", r"layers\.\d+\.mlp.*")): 6}


def _other_layers(generator: random.Random, config: dict[str, Any], base: Base) -> None:
    config["layers_to_transform"] = generator.choice(([0], [0, 1], 0, [5], [], None))
    config["layers_pattern"] = generator.choice((None, "layers", "h", ["h", "layers"], "blocks", []))


def _flags(generator: random.Random, config: dict[str, Any], base: Base) -> None:
    key = generator.choice(("use_dora", "lora_bias", "ensure_weight_tying"))
    config[key] = not config.get(key)


def _saved_modules(generator: random.Random, config: dict[str, Any], base: Base) -> None:
    config["modules_to_save"] = generator.choice(
        (
            ["lm_head"],
            ["embed_tokens"],
            ["head"],
            ["score"],
            ["norm"],
            [generator.choice(base.linear)],
            ["wte", "lm_head"],
            [],
            None,
        )
    )


def _tokens(generator: random.Random, config: dict[str, Any], base: Base) -> None:
    config["trainable_token_indices"] = generator.choice(([1, 5], {"embed_tokens": [3]}, {"wte": [2]}, {"nothing": [2]}, None))


def _parameters(generator: random.Random, config: dict[str, Any], base: Base) -> None:
    names = [*base.parameters, f"{generator.choice(base.linear)}.weight", "experts.nothing"]
    name = generator.choice(names)
    config["target_parameters"] = generator.choice(([name], [".".join(name.split(".")[-2:])], [name.rpartition(".")[2]], []))


_CONFIG_CHANGES = (
    _no_targets, _no_targets, _other_targets, _other_targets, _excluded, _excluded, _other_ranks, _other_layers, _flags,
    _saved_modules, _tokens, _parameters,
)  # fmt: skip

_Tensors = dict[str, tuple[int, ...]]


def _drop_some(generator: random.Random, tensors: _Tensors, base: Base) -> None:
    for name in generator.sample(sorted(tensors), min(len(tensors), generator.randint(1, 4))):
        del tensors[name]


def _drop_tables(generator: random.Random, tensors: _Tensors, base: Base) -> None:
    for name in [name for name in tensors if ".lora_" not in name or "embed" in name]:
        del tensors[name]


def _with_adapter_name(generator: random.Random, tensors: _Tensors, base: Base) -> None:
    inside = generator.choice(("default", "default", "sql"))
    only_lora = generator.random() < 0.7
    for name in list(tensors):
        if only_lora and ".lora_" not in name:
            continue
        module, _, leaf = name.rpartition(".")
        new = f"{name}.{inside}" if leaf.startswith("lora_") else f"{module}.{inside}.{leaf}"
        tensors[new] = tensors.pop(name)


def _other_prefix(generator: random.Random, tensors: _Tensors, base: Base) -> None:
    old, new = generator.choice(
        (("base_model.model.", ""), ("base_model.model.", "base_model.model.base_model.model."),
         ("base_model.model.", "module."), (".layers.", ".blocks."), ("base_model.model.model.", "base_model.model."),
         (".self_attn.", ".self_attn._orig_mod."))
    )  # fmt: skip
    for name in list(tensors):
        tensors[name.replace(old, new, 1)] = tensors.pop(name)


def _extra(generator: random.Random, tensors: _Tensors, base: Base) -> None:
    module = generator.choice(base.linear)
    weight = dict(base.model.named_parameters())
    kind = generator.randrange(5)
    if kind == 0:
        tensors["base_model.model.something.unknown"] = (3,)
    elif kind == 1:
        shape = base.model.get_submodule(module).weight.shape
        tensors.setdefault(f"base_model.model.{module}.lora_A.weight", (4, shape[-1]))
        tensors.setdefault(f"base_model.model.{module}.lora_B.weight", (shape[0], 4))
    elif kind == 2:
        name = generator.choice(list(weight))
        tensors[f"base_model.model.{name}"] = tuple(weight[name].shape)
    elif kind == 3:
        tensors[f"base_model.model.{module}.base_layer.weight"] = tuple(base.model.get_submodule(module).weight.shape)
    else:
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = (4, 64)


def _other_shape(generator: random.Random, tensors: _Tensors, base: Base) -> None:
    name = generator.choice(sorted(tensors)) if tensors else ""
    if name:
        tensors[name] = (tensors[name][0] + 1, *tensors[name][1:])


_TENSOR_CHANGES = (_drop_some, _drop_tables, _with_adapter_name, _other_prefix, _extra, _extra, _other_shape)


# ---- What happens to it


def expected(draw: Draw, base: Base, loader: Loader = "peft") -> Outcome:
    """Return what `peft_loads` says."""
    load = peft_loads(draw.config, draw.tensors, base.spec, [loader])[loader]
    return _outcome(load)


def _outcome(load: PeftLoad) -> Outcome:
    if load.refusal:
        return Outcome(_word(load.refusal), {}, frozenset(), frozenset())
    missing = frozenset(name for name in load.missing if ".lora_" in name)
    return Outcome("", load.built, frozenset(load.loaded), missing)


def _word(text: str) -> str:
    # Of several parameters that cannot be wrapped peft names the first in the order of the modules, which headers do not have.
    if any(words in text for words in ("Trying to wrap", "dimensional Parameter", "ParamWrapper")):
        return "ParamWrapper"
    if "`ignore_mismatched_sizes`" in text:  # as transformers has it
        return SIZE_MISMATCH
    return next((word for word in WORDS if word in text), text[:200])


def observed(draw: Draw, base: Base, folder: Path, loader: Loader = "peft") -> Outcome:
    """Return what peft does: every tensor has a number of its own, which is looked for in the model that peft returns.

    The same is returned of transformers' `load_adapter`, which builds with peft and loads by itself.
    """
    from peft import PeftModel

    folder.mkdir(parents=True, exist_ok=True)
    marks = {name: _FIRST_MARK + number for number, name in enumerate(draw.tensors)}
    (folder / peft.CONFIG).write_text(json.dumps(draw.config))
    arrays = {name: np.full(shape, marks[name], np.float32) for name, shape in draw.tensors.items()}
    safetensors_file.write(folder / peft.WEIGHTS, arrays, {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = copy.deepcopy(base.model)
            if loader == "peft":
                model = PeftModel.from_pretrained(model, folder)
            else:
                model.load_adapter(str(folder))
        except (ValueError, TypeError, RuntimeError, KeyError) as error:
            return Outcome(_word(str(error)), {}, frozenset(), frozenset())
    return _in_model(model, marks)


def _in_model(model: Any, marks: Mapping[str, float]) -> Outcome:
    import torch
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    built: dict[str, int] = {}
    for name, module in (model.get_base_model() if hasattr(model, "get_base_model") else model).named_modules():
        if isinstance(module, LoraLayer):
            plain = name.replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            built[f"{plain}.{parameter}" if parameter else plain] = module.r["default"]
    values = set[float]()
    for tensor in model.state_dict().values():
        if _is_marked(tensor):
            values.update(torch.unique(tensor).tolist())
    loaded = frozenset(name for name, mark in marks.items() if mark in values)
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing = frozenset(
        PREFIX + name.removeprefix(PREFIX)
        for name, tensor in saved.items()
        if ".lora_" in name and not (tensor.numel() and float(tensor.max()) >= _FIRST_MARK)
    )
    return Outcome("", built, loaded, missing)


def _is_marked(tensor: Any) -> bool:
    return bool(tensor.numel()) and float(tensor.max()) >= _FIRST_MARK


def disagreements(
    seed: int, count: int, folder: Path, names: Iterable[str] = BASES, loader: Loader = "peft"
) -> list[tuple[Draw, Outcome, Outcome]]:
    """Return the drawn adapters of which `peft_loads` and the loader differ, with what either of them says."""
    bases_by_name = bases(folder / "bases", names)
    differing = []
    for drawn in draws(seed, count, bases_by_name):
        ours, theirs = (
            expected(drawn, bases_by_name[drawn.base], loader),
            observed(drawn, bases_by_name[drawn.base], folder / "adapter", loader),
        )
        if ours != theirs:
            differing.append((drawn, ours, theirs))
    return differing
