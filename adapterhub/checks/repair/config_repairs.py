"""Repair `adapter_config.json`, so that it agrees with the tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from adapterhub.checks.peft_base import EMBEDDING, LINEAR, PeftBase
from adapterhub.checks.peft_targets import RefusalError, Targets, check_config
from adapterhub.manifest import card as cards
from adapterhub.manifest import declarations
from adapterhub.manifest.base_name import base_name
from adapterhub.manifest.document import AdapterManifest
from adapterhub_converters.adapter_files import ADAPTER_JSON, ADAPTER_TOML
from adapterhub_converters.containers.json_file import is_number
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft import quirks, target_parameters
from adapterhub_converters.peft_patterns import Patterns, escape

from .draft import Draft

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]

# Keys that peft 0.21 writes for LoRA and the reader does not know (`tuners/lora/config.py`); a test compares.
_WRITTEN = {"arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"}
_LORA_PARTS = {"A", "B", "embedding_A", "embedding_B", "magnitude", "bias"}


def repair_config(draft: Draft, base: BaseSpec | None) -> None:
    """Repair every disagreement of the config with the tensors, and two keys that it should not lack."""
    pairs = draft.pairs()
    quirks.refuse_torchtune_dora(draft.config, pairs, draft.source_name)
    _repair_kind(draft, pairs)
    _repair_unknown_keys(draft)
    _repair_base_name(draft, base)
    if draft.config.get("peft_type") == "LORA" and pairs:
        _repair_targets(draft, pairs)
        _repair_ranks(draft, pairs)
        _propose_alphas(draft, pairs)
        _repair_biases(draft, pairs)
        _repair_magnitudes(draft, pairs)


def _repair_kind(draft: Draft, pairs: Shapes) -> None:
    """Set a missing `peft_type` if all tensors are plain LoRA."""
    if draft.config.get("peft_type"):
        return
    parts = {part for parts in pairs.values() for part in parts}
    unknown = [name for name in draft.names if peft.classify(name)[0] == "unknown"]
    if parts and parts <= _LORA_PARTS and not unknown:
        draft.config["peft_type"] = "LORA"
        draft.record("peft-type", '"peft_type" is "LORA", as all its tensors are')
    else:
        message = f'"peft_type" is missing, and the tensors are not plain LoRA: {", ".join(sorted(parts) or unknown[:3])}'
        draft.propose("peft-type", message, f'Set "peft_type" in {peft.CONFIG}')


def _repair_unknown_keys(draft: Draft) -> None:
    """Drop unknown keys without a value; propose to remove the others."""
    if draft.config.get("peft_type") != "LORA":
        return
    unknown = sorted(set(draft.config) - peft.INERT - peft.READ - _WRITTEN)
    empty = [key for key in unknown if not draft.config[key] and not is_number(draft.config[key])]
    for key in empty:
        del draft.config[key]
    if empty:
        draft.record("unknown-key", f"keys of a newer peft without a value are dropped: {', '.join(empty)}")
    for key in sorted(set(unknown) - set(empty)):
        message = f"{key} = {json.dumps(draft.config[key])[:60]} is unknown and may change what is computed"
        draft.propose("unknown-key", message, f'Remove "{key}" if it changes nothing in the peft that wrote it')


def _repair_base_name(draft: Draft, base: BaseSpec | None) -> None:
    """Set a missing name of the base if what names it does not contradict itself."""
    if draft.config.get("base_model_name_or_path"):
        return
    card = cards.base_repo(cards.read(draft.folder)) if draft.folder else None
    named = {
        ADAPTER_TOML: _declared_repo(draft),
        ADAPTER_JSON: _manifest_repo(draft),
        "its card": card,
        "the base model": base.repo if base else None,
    }
    repos = {source: repo for source, name in named.items() if (repo := base_name(declared=name)) and "/" in repo}
    if len(set(repos.values())) == 1:
        source, repo = next(iter(repos.items()))
        draft.config["base_model_name_or_path"] = repo
        draft.record("no-base-name", f'"base_model_name_or_path" is "{repo}", from {source}')
        return
    conflict = " but ".join(f"{source} names {repo}" for source, repo in repos.items())
    message = "the base is not named" + (f"; {conflict}" if conflict else "")
    draft.propose("no-base-name", message, f'Set "base_model_name_or_path" in {peft.CONFIG} to the base\'s repository')


def _declared_repo(draft: Draft) -> object:
    """Return what adapter.toml declares as the repository of the base."""
    declared: object = None
    if draft.folder is not None:
        with suppress(AdapterhubError):
            declared = declarations.read_declared(draft.folder).get("base")
    return declared.get("repo") if isinstance(declared, Mapping) else None


def _manifest_repo(draft: Draft) -> str | None:
    """Return the repository of the base in adapter.json."""
    if draft.folder is None:
        return None
    try:
        manifest = AdapterManifest.read(draft.folder)
    except AdapterhubError:
        return None
    return manifest.base.repo if manifest else None


def _repair_targets(draft: Draft, pairs: Shapes) -> None:
    """List all modules in `target_modules`: PEFT builds the modules that it names and skips the tensors of all others."""
    wrappers = target_parameters.parameter_targets(draft.config, pairs, draft.source_name)
    modules = {
        target: EMBEDDING if "embedding_A" in parts else LINEAR for target, parts in pairs.items() if target not in wrappers
    }
    missing = _untargeted(draft.config, modules)
    if not missing:
        return
    option = draft.config.get("target_modules")
    # Whole paths need no layers, of which peft refuses a pattern with a regular expression.
    freed = {
        key: None for key in ("layers_to_transform", "layers_pattern", "exclude_modules") if draft.config.get(key) is not None
    }
    repaired = {**draft.config, "target_modules": sorted(modules), **freed}
    if saved := _untargeted(repaired, modules):
        message = f"{saved[0]} has a delta, but modules_to_save saves it as a whole: peft does not adapt it"
        draft.propose("not-targeted", message, "Take it out of modules_to_save, or save the adapter again")
        return
    draft.config |= repaired
    if option is None:
        draft.record("no-targets", f'"target_modules" was missing: it now lists the {len(modules)} modules that have tensors')
        return
    others_text = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    message = (
        f'"target_modules" did not name {missing[0]}{others_text}: it now lists the {len(modules)} modules that have tensors'
    )
    draft.record("not-targeted", message)


def _untargeted(config: Mapping[str, Any], modules: Mapping[str, str]) -> list[str]:
    """Return the modules, given with their kinds, that peft would not adapt with this config."""
    tied = bool(config.get("ensure_weight_tying"))
    base = PeftBase({f"{module}.weight": None for module in modules}, modules, tied=tied, complete=False)
    try:
        check_config(config)
        targets = Targets(config, base)
    except RefusalError:
        return list(modules)
    return [module for module in modules if not targets.includes(module) and module not in targets.tied_targets]


def _repair_ranks(draft: Draft, pairs: Shapes) -> None:
    """Take ranks from the tensors: peft refuses to load them into modules of another rank."""
    if draft.config.get("target_parameters"):  # only the rank in the config tells the number of experts
        return
    ranks = {t: shapes[a][0] for t, shapes in pairs.items() for a in ("A", "embedding_A") if shapes.get(a)}
    patterns, r = _numbers(draft.config, "rank_pattern"), draft.config.get("r", 8)
    if patterns is None or not ranks:
        return
    r = r if is_number(r) else 0
    matched, used = Patterns(patterns, peft.CONFIG), set[str]()
    wrong = overlap = 0
    for target, rank in ranks.items():
        keys = matched.matching(target)
        used.update(keys)
        wrong += (patterns[keys[0]] if keys else r) != rank
        overlap += len({patterns[key] for key in keys}) > 1
    if not (wrong or overlap or set(patterns) - used):
        return
    counts = Counter[float](ranks.values())
    # Keep the config's rank if any module has it, else take the most frequent one.
    common = r if counts.get(r) else max(counts, key=lambda rank: (counts[rank], rank))
    # Whole paths, escaped: they match one module each and so cannot overlap.
    explicit = {escape(target): rank for target, rank in ranks.items() if rank != common}
    explicit_patterns = Patterns(explicit, peft.CONFIG)
    if any(len(explicit_patterns.matching(target)) > (rank != common) for target, rank in ranks.items()):
        draft.propose(
            "rank-config", "the paths of two modules end alike, so no pattern can distinguish them", "Save it again with peft"
        )
        return
    draft.config["r"] = common
    if explicit or "rank_pattern" in draft.config:
        draft.config["rank_pattern"] = explicit
    code = "rank-config" if wrong else "pattern-overlap" if overlap else "pattern-unused"
    also = f", {len(explicit)} modules by whole paths in rank_pattern" if explicit else ""
    draft.record(code, f'ranks are taken from the tensors: "r" is {common}{also}')


def _numbers(config: Mapping[str, Any], option: str) -> dict[str, float] | None:
    """Return a map of patterns; None for any other value, which a check reports and no tensor can repair."""
    patterns = config.get(option) or {}
    return patterns if isinstance(patterns, dict) and all(map(is_number, patterns.values())) else None


def _propose_alphas(draft: Draft, pairs: Shapes) -> None:
    """Propose how to fix doubtful patterns: tensors do not contain their alpha, so only the author knows it."""
    patterns = _numbers(draft.config, "alpha_pattern")
    if patterns is None:
        return
    matched = Patterns(patterns, peft.CONFIG)
    matches = {target: matched.matching(target) for target in pairs}
    if any(len({patterns[key] for key in keys}) > 1 for keys in matches.values()):
        explicit = {escape(target): patterns[keys[0]] for target, keys in matches.items() if keys}
        first = next(keys for keys in matches.values() if len({patterns[key] for key in keys}) > 1)
        message = f'alpha_pattern: "{first[0]}" and "{first[1]}" overlap, and peft loses their order when it saves'
        draft.propose("pattern-overlap", message, f'If the first was meant, set "alpha_pattern" to {json.dumps(explicit)}')
    for key in sorted(set(patterns) - {key for keys in matches.values() for key in keys}):
        draft.propose("pattern-unused", f'alpha_pattern "{key}" matches no module', "Correct it, or remove it")


def _repair_biases(draft: Draft, pairs: Shapes) -> None:
    """Make `lora_bias` agree with the tensors."""
    with_bias = [target for target, parts in pairs.items() if "bias" in parts]
    flag = bool(draft.config.get("lora_bias"))
    if flag == bool(with_bias):
        return
    if not with_bias:
        draft.config["lora_bias"] = False
        draft.record("no-bias", '"lora_bias" is false: no module has one, and peft would add zeros')
        return
    obstacle = _bias_obstacle(draft.config, pairs)
    if obstacle:
        message = f"{len(with_bias)} modules have lora_B.bias, and peft refuses lora_bias {obstacle}"
        draft.propose("bias-flag", message, "Save it again with peft, or merge it into the base")
        return
    draft.config["lora_bias"] = True
    draft.record("bias-flag", f'"lora_bias" is true: {len(with_bias)} modules have one, which peft would skip')


def _bias_obstacle(config: Mapping[str, Any], pairs: Shapes) -> str:
    """Return why peft refuses `lora_bias` here; empty if it does not."""
    init = config.get("init_lora_weights", True)
    if init not in (True, False):
        return f"with init_lora_weights {init!r}"
    if config.get("use_dora") or any("magnitude" in parts for parts in pairs.values()):
        return "with DoRA"
    return "on an embedding" if any("embedding_A" in parts for parts in pairs.values()) else ""


def _repair_magnitudes(draft: Draft, pairs: Shapes) -> None:
    """Make `use_dora` agree with the tensors."""
    with_magnitude = [target for target, parts in pairs.items() if "magnitude" in parts]
    flag = bool(draft.config.get("use_dora"))
    if flag and len(with_magnitude) < len(pairs):
        message = f"use_dora is true, and {len(pairs) - len(with_magnitude)} of {len(pairs)} modules have no magnitude"
        draft.propose(
            "no-magnitude",
            message,
            "Save it again with peft" if with_magnitude else 'Set "use_dora" to false if it is not DoRA',
        )
    elif with_magnitude and not flag and len(with_magnitude) < len(pairs):
        message = f"{len(with_magnitude)} of {len(pairs)} modules have magnitudes, and use_dora applies to all"
        draft.propose("magnitude-flag", message, "Save it again with peft")
    elif with_magnitude and not flag:
        draft.config["use_dora"] = True
        draft.record("magnitude-flag", '"use_dora" is true: every module has a magnitude, which peft would skip')
