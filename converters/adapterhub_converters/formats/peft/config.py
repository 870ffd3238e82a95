"""`adapter_config.json`: which of its keys change the mathematics, what they say, and one that peft reads to the same function.

Follows peft 0.21 (`tuners/*/config.py`): a key that changes what is computed and is not modeled here is refused by
name; keys that are null, false or empty change nothing and pass.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from adapterhub_converters.adapter import Adapter, LowRank, LowRankConv, LowRankEmbedding, Meta, StackedLowRank
from adapterhub_converters.adapter_files import ADAPTER_CONFIG
from adapterhub_converters.errors import FormatError, RefusedError, refused
from adapterhub_converters.patterns import Patterns

from . import experts

CONFIG = ADAPTER_CONFIG

# Keys whose every value leaves the delta alone: bookkeeping, or already settled by the tensors.
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
# What the other kinds of adapter say beside that, and read or not, leaves a trained delta alone.
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
}  # fmt: skip
_REASONS = {
    "IA3": "it multiplies activations, which no low-rank delta does",
    "OFT": "it rotates the base's weight, which no low-rank delta does",
    "BOFT": "it rotates the base's weight, which no low-rank delta does",
}
# Inits that leave the base as it is (peft, `LoraConfig.init_lora_weights`).
_PLAIN_INITS = {"gaussian", "orthogonal", "eva", "mica"}
# What PEFT adds to modules_to_save by itself for a task (`peft_model.py`).
_TASK_MODULES = {
    "SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",),
}  # fmt: skip


def check(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config that asks for mathematics not modeled here, or whose numbers make no sense."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        reason = _REASONS.get(kind) if isinstance(kind, str) else None
        known = ", ".join(KINDS)
        raise RefusedError(where, f"peft_type {kind!r} is not read yet{f': {reason}' if reason else ''}, only {known}")
    reasons = [
        f"{key} = {json.dumps(value)[:80]}: changes what the adapter computes and is not read yet"
        for key in sorted(set(config) - INERT - READ - KINDS[kind])
        if (value := config[key]) not in (None, False, 0, "", [], {})
    ]
    if reasons:
        raise refused(where, reasons)
    _check_numbers(config, kind, where)
    for key, kinds in _TYPES.items():
        if not isinstance(config.get(key), kinds):
            raise FormatError(where, f'"{key}" is {json.dumps(config[key])[:40]}, not what it should be')
    tokens, ranges = config.get("alora_invocation_tokens") or [], config.get("layer_replication") or []
    if not isinstance(tokens, list) or not all(_is_count(token) for token in tokens):
        raise FormatError(where, '"alora_invocation_tokens" is not a list of token ids')
    if not isinstance(ranges, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(_is_count(number) for number in pair) for pair in ranges
    ):
        raise FormatError(where, '"layer_replication" is not a list of ranges of layers')


def _check_numbers(config: Mapping[str, Any], kind: str, where: str) -> None:
    numbers = {
        "r": config.get("r", 8),
        "lora_alpha": config.get("lora_alpha", 8),
        "alpha": config.get("alpha", 8),
        "lora_dropout": config.get("lora_dropout") or 0,
        "qalora_group_size": config.get("qalora_group_size") or 16,
    }
    for key, value in numbers.items():
        if not _is_number(value):
            raise FormatError(where, f'"{key}" is {json.dumps(value)[:40]}, not a number that makes sense')
    for key in ("rank_pattern", "alpha_pattern") if kind != "ADALORA" else ():
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(map(_is_number, value.values())):
            raise FormatError(where, f'"{key}" is not a map of patterns to numbers')


# What keys that are read may be; any may be null or absent.
_TEXT, _SWITCH = str | None, bool | None
_TYPES = {
    "base_model_name_or_path": _TEXT, "revision": _TEXT, "task_type": _TEXT, "use_rslora": _SWITCH, "use_qalora": _SWITCH,
    "fan_in_fan_out": _SWITCH, "init_lora_weights": bool | str | None, "ensure_weight_tying": _SWITCH,
    "save_projection": _SWITCH,
}  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 2**40


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


class Scales:
    """Rank and alpha of a module as peft resolves them: the first pattern of the file that matches wins."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        lycoris = config["peft_type"] in ("LOHA", "LOKR")
        self._plain = {
            "r": config.get("r", 256 if config["peft_type"] == "VERA" else 8),
            "alpha": config.get("alpha" if lycoris else "lora_alpha", 8),
        }
        patterned = config["peft_type"] != "ADALORA"
        self._patterns: dict[str, dict[str, float]] = {
            "r": (config.get("rank_pattern") or {}) if patterned else {},
            "alpha": (config.get("alpha_pattern") or {}) if patterned else {},
        }
        self._matched = {what: Patterns(patterns, where) for what, patterns in self._patterns.items()}
        self.rslora = bool(config.get("use_rslora"))
        self.notes: list[str] = []
        self._used: set[tuple[str, str]] = set()

    def alpha(self, target: str) -> float:
        """The alpha of a module."""
        return float(self._resolved("alpha", target))

    def rank(self, target: str) -> int:
        """What the config says of a module's rank; where the tensors say another, they are right."""
        return int(self._resolved("r", target))

    def check_rank(self, target: str, r: int) -> None:
        """Note a config that gives a module another rank than its tensors have."""
        said = self._resolved("r", target)
        if said != r:
            self.notes.append(f"{target}: rank {r} by its tensors, {said} by the config: peft would refuse to load it")

    def unused(self) -> Iterator[str]:
        """The patterns that matched nothing that was asked for."""
        for what, option in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
            for key in self._patterns[what]:
                if (what, key) not in self._used:
                    yield f'{option} "{key}" matches no module of the adapter'

    def _resolved(self, what: str, target: str) -> float:
        patterns = self._patterns[what]
        keys = self._matched[what].matching(target)
        if not keys:
            return float(self._plain[what])
        self._used.update((what, key) for key in keys)
        if len({patterns[key] for key in keys}) > 1:
            option = "rank_pattern" if what == "r" else "alpha_pattern"
            note = (
                f'{target}: {option} "{keys[0]}" and "{keys[1]}" both match and differ; the first of the file wins, '
                "and peft loses their order when it saves"
            )
            if note not in self.notes:
                self.notes.append(note)
        return patterns[keys[0]]


def meta(config: Mapping[str, Any]) -> Meta:
    """What a checked config says of an adapter beside its tensors."""
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
    """Whether an `init_lora_weights` took part of the base into the factors, so that the delta needs the initial ones."""
    return not (isinstance(init, bool) or init is None or (isinstance(init, str) and init in _PLAIN_INITS))


def text(adapter: Adapter) -> str:
    """An `adapter_config.json` that peft reads back to the same function, laid out as peft lays it out.

    Targets are full paths and patterns are whole, escaped paths, so that neither a deeper base nor the order of
    keys, which peft loses when it saves, can change which module gets which rank and alpha.
    """
    deltas = adapter.deltas
    for target, delta in deltas.items():
        if not isinstance(delta, LowRank | LowRankEmbedding | LowRankConv | StackedLowRank):
            raise RefusedError(target, f"a delta of the kind {type(delta).__name__} is no LoRA (factored_out makes it one)")
    rslora = {delta.rslora for delta in deltas.values()}
    if len(rslora) > 1:
        raise RefusedError("peft", "some modules scale by rsLoRA and some do not; PEFT has one switch for all")
    transposed = {delta.transposed_base for delta in deltas.values() if isinstance(delta, LowRank)}
    if len(transposed) > 1:
        raise RefusedError("peft", "some bases are stored transposed and some are not; PEFT has one switch for all")
    with_dora = [getattr(delta, "magnitude", None) is not None for delta in deltas.values()]
    if any(with_dora) and not all(with_dora) and not adapter.meta.dora:
        bare = list(deltas)[with_dora.index(False)]
        raise RefusedError(bare, "has no DoRA magnitude and others have one; PEFT has one switch for all")
    r = _most_common(delta.r for delta in deltas.values())
    alpha = _most_common(delta.alpha for delta in deltas.values())
    stacks = sorted(target for target, delta in deltas.items() if isinstance(delta, StackedLowRank))
    config = {
        "alpha_pattern": {_exactly(t): _number(d.alpha) for t, d in deltas.items() if d.alpha != alpha},
        "base_model_name_or_path": adapter.meta.base_model,
        "bias": _bias(adapter),
        "fan_in_fan_out": transposed == {True},
        "inference_mode": True,
        "init_lora_weights": True if adapter.meta.init == "default" else adapter.meta.init,
        "lora_alpha": _number(alpha),
        "lora_bias": any(getattr(delta, "bias", None) is not None for delta in deltas.values()),
        # peft refuses dropout beside target_parameters; it plays no part once training is over.
        "lora_dropout": 0.0 if stacks else adapter.meta.dropout,
        "modules_to_save": saved_modules(adapter) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {_exactly(target): delta.r for target, delta in deltas.items() if delta.r != r},
        "revision": adapter.meta.revision,
        "target_modules": sorted(set(deltas) - set(stacks)),
        "task_type": adapter.meta.task_type,
        "trainable_token_indices": {target: list(rows.ids) for target, rows in adapter.rows.items()} or None,
        "use_dora": adapter.meta.dora or any(with_dora),
        "use_rslora": rslora == {True},
    }
    if stacks:
        config |= {"target_parameters": stacks, "peft_version": experts.WRITTEN}
    if adapter.meta.invocation:
        config["alora_invocation_tokens"] = list(adapter.meta.invocation)
    if adapter.meta.layers:
        config["layer_replication"] = [list(pair) for pair in adapter.meta.layers]
    if adapter.meta.ties:
        config["ensure_weight_tying"] = True
    return json.dumps(config, indent=2, sort_keys=True)


def saved_modules(adapter: Adapter) -> list[str]:
    """`modules_to_save`: the modules replaced as a whole, and not those of which only a bias was trained."""
    heads = _TASK_MODULES.get(adapter.meta.task_type or "", ())
    found = set()
    for name in adapter.replaced:
        module, _, kind = name.rpartition(".")
        parts = module.split(".")
        head = next((index for index, part in enumerate(parts) if part in heads), None)
        if head is not None:
            found.add(".".join(parts[: head + 1]))
        elif kind != "bias" or f"{module}.weight" in adapter.replaced:
            found.add(module)
    return sorted(found)


def _bias(adapter: Adapter) -> str:
    saved = saved_modules(adapter)
    trained = [
        name.removesuffix(".bias")
        for name in adapter.replaced
        if name.endswith(".bias") and not any(f"{name}.".startswith(f"{module}.") for module in saved)
    ]
    return "none" if not trained else "lora_only" if all(module in adapter.deltas for module in trained) else "all"


def _most_common(values: Iterable[Any]) -> Any:
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value)) if counts else 8


def _exactly(target: str) -> str:
    # peft matches `(.*\.)?(KEY)$` against the path; ^ inside would pin nothing more, the path is whole already.
    return re.escape(target)


def _number(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha
