"""Parsing of `adapter_config.json`: which of its keys change the mathematics, and what they mean.

Follows peft 0.21.2 (`tuners/*/config.py`). A key of peft's that changes the computation and is not modeled here is refused by
name; keys that are null, false or empty change nothing and pass. A key that peft does not have is ignored with a note, as peft
itself ignores it (`PeftConfigMixin.from_peft_type`, which warns).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from adapterhub_converters.adapter import TUNERS, Meta
from adapterhub_converters.adapter_files import ADAPTER_CONFIG, PEFT_INDEX, PEFT_WEIGHTS
from adapterhub_converters.containers.json_file import is_integer, is_number
from adapterhub_converters.errors import FormatError, NotUnderstoodError, refused_error
from adapterhub_converters.peft_patterns import Patterns

CONFIG, WEIGHTS, INDEX = ADAPTER_CONFIG, PEFT_WEIGHTS, PEFT_INDEX

# Keys that never change the delta: bookkeeping, or already determined by the tensors.
INERT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_dropout",
    "megatron_core", "megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "runtime_config", "bias", "lora_bias", "use_dora",
}  # fmt: skip
# Keys read here.
READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out",
    "init_lora_weights", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "layer_replication",
    "use_qalora", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# Further keys of the other kinds of adapter, which are read or do not change a trained delta.
_LYCORIS = {
    "alpha", "rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d", "decompose_both", "decompose_factor",
    "rank_dropout_scale",
}  # fmt: skip
KINDS = {
    "LORA": set[str](),
    "ADALORA": {
        "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    },
    "LOHA": _LYCORIS,
    "LOKR": _LYCORIS,
    "VERA": {"save_projection", "projection_prng_key", "vera_dropout", "d_initial", "init_weights"},
    **{name: {*tuner.numbers, *tuner.ignored_keys} for name, tuner in TUNERS.items()},
}  # fmt: skip
# Keys of peft's LoRA that change what is computed and are not modeled here.
_UNSUPPORTED = {"arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"}
UNKNOWN_KEY = "is not a key of peft 0.21.2, which ignores it with a warning"
REASONS = {
    "POLY": "it mixes several LoRA adapters by task, which no weight can express",
    "LILY": "it mixes several LoRA adapters anew for each input, and peft cannot merge it either",
    "ADAPTION_PROMPT": "it adds attention to learned tokens, which no weight can express",
    "MULTITASK_PROMPT_TUNING": "it adds tokens to the input by task, which no weight can express",
    "CPT": "it adds tokens to the input, which no weight can express",
    "CARTRIDGE": "it adds keys and values to the cache, which no weight can express",
    "SHADOW": "its change follows from each input, which no weight can express",
    "PSOFT": "its change acts on singular vectors of the base that peft does not save, and whose signs differ between machines",
    "ADAMSS": "which rows it changes follows from a clustering of the base's singular vectors that peft does not save",
}
# Inits that leave the base as it is (peft, `LoraConfig.init_lora_weights`); of two of them peft refuses any other case.
_BASE_PRESERVING_INITS = {"", "gaussian", "orthogonal", "eva", "mica"}


def check(config: Mapping[str, Any], location: str) -> None:
    """Check that a config contains only what is modeled here, with values of the right types.

    Raises:
        NotUnderstoodError: It asks for other mathematics.
        FormatError: A value is malformed.
    """
    peft_type = config.get("peft_type")
    # A known kind in lower case is a mistake in the file; any other kind may be one of a newer peft.
    if not isinstance(peft_type, str) or (peft_type not in KINDS and peft_type.upper() in KINDS):
        hint = f'Write "{peft_type.upper()}"' if isinstance(peft_type, str) else ""
        raise FormatError(location, f'"peft_type" is {json.dumps(peft_type)[:40]}, which peft does not have', hint)
    if peft_type not in KINDS:
        reason = f": {REASONS[peft_type]}" if peft_type in REASONS else ""
        raise NotUnderstoodError(location, f"peft_type {peft_type[:40]!r} is not supported{reason}")
    _check_values(config, peft_type, location)
    reasons = [
        f"{key} = {json.dumps(value)[:80]}: changes what the adapter computes and is not supported"
        for key in sorted(set(config) & _UNSUPPORTED)
        if _is_set(value := config[key])
    ]
    if reasons:
        raise refused_error(location, reasons, "", NotUnderstoodError)


def _check_values(config: Mapping[str, Any], kind: str, location: str) -> None:
    """Raise FormatError if a value has the wrong type."""
    _check_numbers(config, kind, location)
    for key, kinds in _TYPES.items():
        if not isinstance(config.get(key), kinds):
            raise FormatError(location, f'"{key}" is {json.dumps(config[key])[:40]}, which has the wrong type')
    tokens, ranges = config.get("alora_invocation_tokens") or [], config.get("layer_replication") or []
    if not isinstance(tokens, list) or not all(_is_count(token) for token in tokens):
        raise FormatError(location, '"alora_invocation_tokens" is not a list of token ids')
    if not isinstance(ranges, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(_is_count(number) for number in pair) for pair in ranges
    ):
        raise FormatError(location, '"layer_replication" is not a list of ranges of layers')


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the keys that peft does not have for this kind of adapter and ignores, unless they are null, false or empty."""
    known_keys = INERT | READ | KINDS.get(str(config.get("peft_type")), set()) | _UNSUPPORTED
    return [key for key in sorted(set(config) - known_keys) if _is_set(config[key])]


def _is_set(value: object) -> bool:
    return value not in (None, False, 0, "", [], {})


def _check_numbers(config: Mapping[str, Any], kind: str, location: str) -> None:
    numbers = {
        "r": config.get("r", 8),
        "lora_alpha": config.get("lora_alpha", 8),
        "alpha": config.get("alpha", 8),
        "lora_dropout": config.get("lora_dropout") or 0,
        "qalora_group_size": config.get("qalora_group_size") or 16,
    }
    for key, value in numbers.items():
        # Some tuners have no rank or no alpha by default; all their numbers are checked by their own rows.
        if not _is_number(value) and not (value is None and kind in TUNERS):
            raise FormatError(location, f'"{key}" is {json.dumps(value)[:40]}, not a number in range')
    for key in ("rank_pattern", "alpha_pattern") if kind != "ADALORA" else ():
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(map(_is_number, value.values())):
            raise FormatError(location, f'"{key}" is not a map of patterns to numbers')


# The types of keys that are read; each may be null or absent.
_TEXT, _FLAG = str | None, bool | None
_TYPES = {
    "base_model_name_or_path": _TEXT, "revision": _TEXT, "task_type": _TEXT, "use_rslora": _FLAG, "use_qalora": _FLAG,
    "fan_in_fan_out": _FLAG, "init_lora_weights": bool | str | None, "ensure_weight_tying": _FLAG,
    "save_projection": _FLAG,
}  # fmt: skip


def _is_number(value: object) -> bool:
    # Far beyond any real rank or alpha, yet small enough for every product to stay finite.
    return is_number(value) and abs(value) <= 2**40


def _is_count(value: object) -> bool:
    return is_integer(value) and 0 <= value < 2**31


class Scales:
    """Rank and alpha of a module as peft resolves them: the first pattern in the file that matches wins.

    Attributes:
        rslora: Whether the scale is alpha / sqrt(r).
        has_patterns: Whether modules may differ in rank or alpha.
        notes: Remarks for the user about the config; filled while modules are resolved.
    """

    def __init__(self, config: Mapping[str, Any], location: str) -> None:
        lycoris = config["peft_type"] in ("LOHA", "LOKR")
        # peft's own defaults (`LoraConfig`, `VeraConfig`).
        self._defaults = {
            "r": config.get("r", 256 if config["peft_type"] == "VERA" else 8),
            "alpha": config.get("alpha" if lycoris else "lora_alpha", 8),
        }
        # AdaLoRA's rank_pattern has another form: masks of the singular values that were kept.
        patterned = config["peft_type"] != "ADALORA"
        self._patterns: dict[str, dict[str, float]] = {
            "r": (config.get("rank_pattern") or {}) if patterned else {},
            "alpha": (config.get("alpha_pattern") or {}) if patterned else {},
        }
        self.has_patterns = any(self._patterns.values())
        self._matchers = {quantity: Patterns(patterns, location) for quantity, patterns in self._patterns.items()}
        self.rslora = bool(config.get("use_rslora"))
        self.notes: list[str] = []
        self._used: set[tuple[str, str]] = set()

    def alpha(self, target: str) -> float:
        """Return the alpha of a module."""
        return float(self._resolve("alpha", target))

    def rank(self, target: str) -> int:
        """Return the rank of a module according to the config; if the tensors have another rank, theirs counts."""
        return int(self._resolve("r", target))

    def check_rank(self, target: str, r: int) -> None:
        """Add a note if the config gives a module another rank than its tensors have."""
        configured = self._resolve("r", target)
        if configured != r:
            self.notes.append(f"{target}: rank {r} by its tensors, {configured:g} by the config: peft would refuse to load it")

    def unused_patterns(self) -> Iterator[str]:
        """Yield a note for each pattern that matched no module."""
        for quantity, option in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
            for key in self._patterns[quantity]:
                if (quantity, key) not in self._used:
                    yield f'{option} "{key}" matches no module of the adapter'

    def _resolve(self, quantity: str, target: str) -> float:
        patterns = self._patterns[quantity]
        if not patterns:
            return float(self._defaults[quantity])
        keys = self._matchers[quantity].matching(target)
        if not keys:
            return float(self._defaults[quantity])
        self._used.update((quantity, key) for key in keys)
        if len({patterns[key] for key in keys}) > 1:
            option = "rank_pattern" if quantity == "r" else "alpha_pattern"
            note = (
                f'{target}: {option} "{keys[0]}" and "{keys[1]}" both match and differ; the first in the file wins, '
                "and peft does not preserve their order when it saves"
            )
            if note not in self.notes:
                self.notes.append(note)
        return patterns[keys[0]]


def meta(config: Mapping[str, Any]) -> Meta:
    """Return the `Meta` of an adapter, from a checked config."""
    init = config.get("init_lora_weights", True)
    return Meta(
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision") or None,
        task_type=config.get("task_type") or None,
        dropout=float(config.get("lora_dropout") or 0.0),
        init=str(init) if residual_init(init) else "default",
        invocation=tuple(config.get("alora_invocation_tokens") or ()),
        layers=tuple((first, last) for first, last in config.get("layer_replication") or ()),
        ties=bool(config.get("ensure_weight_tying")),
        dora=bool(config.get("use_dora")),
    )


def residual_init(init: object) -> bool:
    """Return whether an `init_lora_weights` moves part of the base into the factors, so that the initial factors matter."""
    return init.lower() not in _BASE_PRESERVING_INITS if isinstance(init, str) else not (isinstance(init, bool) or init is None)
