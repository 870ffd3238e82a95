"""The modules and parameters that peft adapts, from the options of a config as peft completes them for a base.

peft 0.21.2: `tuners/lora/config.py`, `tuners/tuners_utils.py` (`check_target_module_exists`), `tuners/lora/model.py`, and
`utils/transformers_weight_conversion.py`, which names the stacks of experts in place of the experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft.earlier_versions import MAPPED
from adapterhub_converters.peft_patterns import Patterns, escape, fullmatch

from .peft_base import LINEAR, PeftBase
from .target_modules import HEAD_TASKS, chosen_layers, ends_in, is_within, last_of, matches

# The modules that peft adapts where `target_modules` is null, by model type (peft/utils/constants.py,
# TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING); a test compares.
_QV = ("q_proj", "v_proj")
DEFAULT_TARGETS: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(
        ("bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama", "llama4", "mistral", "mixtral", "opt", "qwen2",
         "qwen3", "stablelm"),
        _QV,
    ),
    **dict.fromkeys(("bert", "electra", "layoutlm", "roberta", "xlm-roberta"), ("query", "value")),
    **dict.fromkeys(("RefinedWeb", "RefinedWebModel", "bloom", "chatglm", "falcon", "gpt_neox"), ("query_key_value",)),
    **dict.fromkeys(("mt5", "t5"), ("q", "v")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "blip-2": ("q", "v", "q_proj", "v_proj"), "btlm": ("c_proj", "c_attn"), "codegen": ("qkv_proj",), "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"), "gemma4": r".*language_model\..*\.(q_proj|v_proj)", "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"), "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"), "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}  # fmt: skip
_HEADS = ("classifier", "score")  # that peft saves for a task with a head
_TABLES = ("embed_tokens", "lm_head")  # peft/utils/constants.py, EMBEDDING_LAYER_NAMES


class RefusalError(Exception):
    """An error that peft raises."""


# The types of options that peft uses as they are; each may be null or absent. Those of names are names or a list of them.
_NAMES = ("target_modules", "exclude_modules", "modules_to_save")
_TYPES: dict[str, Any] = {
    **dict.fromkeys(_NAMES, str | list | None),
    **dict.fromkeys(("eva_config", "loftq_config", "corda_config", "lora_ga_config"), dict | None),
    "trainable_token_indices": list | dict | None,
    "bias": str | None,
}


def check_config(config: Mapping[str, Any]) -> None:
    """Raise for a value or a combination of options with which `LoraConfig`, or what reads it, fails."""
    _check_types(config)
    targets = config.get("target_modules")
    for key in ("layers_to_transform", "layers_pattern"):
        if isinstance(targets, str) and config.get(key) is not None:
            raise RefusalError(f"`{key}` cannot be used when `target_modules` is a str.")
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        raise RefusalError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")
    if config.get("lora_bias") and config.get("use_dora"):
        raise RefusalError("The argument lora_bias=True is not supported for DoRA")


def _check_types(config: Mapping[str, Any]) -> None:
    for key, types in _TYPES.items():
        value = config.get(key)
        if not isinstance(value, types) or (key in _NAMES and isinstance(value, list) and not _are(str, value)):
            raise RefusalError(f"`{key}` is {json.dumps(value)[:40]}, which has the wrong type.")
    patterns = config.get("rank_pattern")
    ranks = [config.get("r"), *(patterns.values() if isinstance(patterns, dict) else ())]
    for rank in ranks:
        if rank is not None and type(rank) is not int:
            raise RefusalError(f"A rank is {json.dumps(rank)[:40]}, and torch takes whole numbers only.")


def _are(kind: type, values: Iterable[object]) -> bool:
    return all(isinstance(value, kind) for value in values)


class Targets:
    """The options of a config that choose modules, as peft has them once it has completed them for a base."""

    def __init__(self, config: Mapping[str, Any], base: PeftBase) -> None:
        self.config, self._base = config, base
        self.modules: frozenset[str] | str | None = _names_or_pattern(config.get("target_modules"))
        self.parameters = frozenset(names_of(config.get("target_parameters")))
        self.excluded = _names_or_pattern(config.get("exclude_modules"))
        self.saved: list[str] = names_of(config.get("modules_to_save"))
        if config.get("task_type") in HEAD_TASKS:
            heads = ("qa_outputs",) if config["task_type"] == "QUESTION_ANS" else _HEADS
            self.saved += [head for head in heads if head not in self.saved]
        self.layers = chosen_layers(config)
        patterns = config.get("rank_pattern")
        self._patterns: dict[str, float] = dict(patterns) if isinstance(patterns, dict) else {}
        self.tied_targets: frozenset[str] = frozenset()
        self.tied_saved: frozenset[str] = frozenset()
        self._saved_names = frozenset(self.saved)
        self._stack_experts()
        self._tie()
        self._saved_names = frozenset(self.saved)
        self._default()
        if isinstance(self.modules, str) and self.modules.lower() == "all-linear":
            self.modules = self._linear()
        self._ranks = Patterns(self._patterns, peft.CONFIG)

    def rank(self, name: str) -> int:
        """Return the rank of a module or parameter: that of the first pattern that matches."""
        keys = self._ranks.matching(name) if self._patterns else []
        r = self._patterns[keys[0]] if keys else self.config.get("r", 8)
        if r <= 0:
            raise RefusalError(f"`r` should be a positive integer value but the value passed is {r}")
        return int(r)

    def excludes(self, module: str) -> bool:
        """Return whether peft leaves a module out, because of `exclude_modules` or `modules_to_save`."""
        if self.excluded and _is_named(self.excluded, module, "exclude_modules"):
            return True
        return bool(self._saved_names) and is_within(self._saved_names, module)

    def included(self, modules: Iterable[str]) -> list[str]:
        """Return those of `modules` that peft takes for one of `target_modules`."""
        names = self.modules
        is_plain = not (self.excluded or self._saved_names) and self.layers is None
        if is_plain and isinstance(names, frozenset) and not any("." in name for name in names):
            return [module for module in modules if last_of(module) in names]
        return [module for module in modules if self.includes(module)]

    def includes(self, module: str) -> bool:
        """Return whether peft takes a module for one of `target_modules`."""
        if self.modules is None or ((self.excluded or self._saved_names) and self.excludes(module)):
            return False
        if isinstance(self.modules, str):
            return fullmatch(self.modules, module, f"{peft.CONFIG}: target_modules")
        if module in self.modules:
            return True
        return ends_in(self.modules, module) and (self.layers is None or self._layer(module) in self.layers)

    def _layer(self, module: str) -> int | None:
        """Return the layer that peft finds in a module's path: behind `layers_pattern`, or the first number inside of it."""
        parts = module.split(".")
        patterns: list[str | None] = [*names_of(self.config.get("layers_pattern"))]
        for pattern in patterns or [None]:
            for at in range(1, len(parts) - 1):
                # Without a pattern a list of layers must itself be inside of something.
                is_list = at > 1 if pattern is None else _is_list(pattern, parts[:at])
                if is_list and parts[at].isdecimal():
                    return int(parts[at])
        return None

    def _linear(self) -> frozenset[str]:
        return frozenset(module for module, kind in self._base.kinds.items() if kind == LINEAR and module != self._base.output)

    def _stack_experts(self) -> None:
        """Exchange the names of experts one by one for their stacks (`utils/transformers_weight_conversion.py`)."""
        names = MAPPED.get(self._base.model_type)
        if names is None:
            return
        gate, up, down = names
        stack_of = {"gate": "gate.weight", gate: "gate_up_proj", up: "gate_up_proj", down: "down_proj"}
        if isinstance(self.modules, str):
            resolved = self._resolve(self.modules, stack_of)
            if not resolved:
                return
            self.modules = resolved
        fused, remaining, parameters = set[str](), set[str](), set(self.parameters)
        for target in self.modules or ():
            last = last_of(target)
            if last in stack_of:
                parameters.add(stack_of[last])
                fused |= {last} & {gate, up}
            else:
                remaining.add(target)
        if len(fused) == 1:
            other_half = gate if up in fused else up
            problem = f"Cannot convert PEFT target(s) {fused.pop()} without also targeting {other_half}"
            raise RefusalError(f"{problem} because they are fused into gate_up_proj.")
        if fused:
            self._patterns[rf".*\.{escape('gate_up_proj')}"] = 2 * self.config.get("r", 8)
        self.parameters, self.modules = frozenset(parameters), frozenset(remaining)

    def _resolve(self, pattern: str, stack_of: Mapping[str, str]) -> frozenset[str]:
        """Return the last names of what a pattern names, the experts among them."""
        if pattern.lower() == "all-linear":
            return frozenset({*map(last_of, self._linear()), *stack_of})
        names = [*self._base.modules, *self._base.parameters]
        resolved = {last_of(name) for name in names if self.includes(name)}
        for name, stack in stack_of.items():
            owners = [parameter.rpartition(".")[0] for parameter in self._base.parameters if last_of(parameter) == stack]
            if any(self.includes(f"{owner}.{name}") for owner in owners):
                resolved.add(name)
        return frozenset(resolved)

    def _tie(self) -> None:
        """Exchange the tied output layer for the table, if the two are to stay tied (`LoraModel._add_targets_to_tie`)."""
        base = self._base
        if not (self.config.get("ensure_weight_tying") and base.tied and base.output and base.embedding):
            return
        tied = frozenset({base.output})
        if any(last_of(name) in _TABLES for name in self.saved):
            self.tied_saved = tied
            self.saved += [base.embedding] * (base.embedding not in self.saved)
            self._drop_saved(base.output)
        elif isinstance(self.modules, str) and any(fullmatch(self.modules, name, peft.CONFIG) for name in _TABLES):
            self.tied_targets, self.modules = tied, f"(?:{self.modules}|^{escape(base.embedding)}$)"
        elif not isinstance(self.modules, str) and any(last_of(name) in _TABLES for name in self.modules or ()):
            named = {*(self.modules or ()), base.embedding}
            self.tied_targets = tied
            self.modules = frozenset(name for name in named if not is_within({name}, base.output))

    def _drop_saved(self, output: str) -> None:
        for name in self.saved:
            if is_within({name}, output):
                self.saved.remove(name)
                return

    def _default(self) -> None:
        """Take peft's own choice for the model type where the config has none."""
        if self.modules is not None:
            return
        default = DEFAULT_TARGETS.get(self._base.model_type)
        if default is None and not self.parameters:
            raise RefusalError("Please specify `target_modules` or `target_parameters`in `peft_config`")
        self.modules = default if default is None or isinstance(default, str) else frozenset(default)


def names_of(option: object) -> list[str]:
    """Return the names in an option that is a list of names, or one name; values of other types are left out."""
    if isinstance(option, str):
        return [option] if option else []
    return [name for name in option if isinstance(name, str)] if isinstance(option, list) else []


def _names_or_pattern(option: object) -> frozenset[str] | str | None:
    if isinstance(option, list):
        return frozenset(names_of(option))
    return option if isinstance(option, str) else None


def _is_named(option: frozenset[str] | str, module: str, label: str) -> bool:
    if isinstance(option, str):
        return fullmatch(option, module, f"{peft.CONFIG}: {label}")
    return matches(None, option, module, None)


def _is_list(pattern: str, parts: Sequence[str]) -> bool:
    """Return whether the path `parts` ends in a list of layers named by `layers_pattern`."""
    return any(fullmatch(pattern, ".".join(parts[at:]), f"{peft.CONFIG}: layers_pattern") for at in range(len(parts)))
