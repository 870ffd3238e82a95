"""`adapter_config.json`: made to say what the tensors say."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from adapterhub.check.target_modules import chosen_layers, matches
from adapterhub.manifest import describe
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft import quirks
from adapterhub_converters.patterns import Patterns

from .draft import Draft

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]

# What peft 0.21 writes for LoRA beside the keys that the reader knows (`tuners/lora/config.py`); a test compares.
_WRITTEN = {"arrow_config", "kasa_config", "monteclora_config", "use_bdlora", "velora_config"}
_LORA_PARTS = {"A", "B", "embedding_A", "embedding_B", "magnitude", "bias"}
_REPO = re.compile(r"[\w.-]+/[\w.-]+")


def repair_config(state: Draft, base: BaseSpec | None) -> None:
    """Everything that a config can have wrong about its tensors, and two things it should not lack."""
    pairs = state.pairs()
    quirks.refuse(state.config, pairs, str(state.folder or "the file"))
    _kind(state, pairs)
    _unknown_keys(state)
    _base_name(state, base)
    if state.config.get("peft_type") == "LORA" and pairs:
        _targets(state, pairs)
        _ranks(state, pairs)
        _alphas(state, pairs)
        _biases(state, pairs)
        _magnitudes(state, pairs)


def _kind(state: Draft, pairs: Shapes) -> None:
    if state.config.get("peft_type"):
        return
    parts = {part for found in pairs.values() for part in found}
    unknown = [name for name in state.names if peft.classify(name)[0] == "unknown"]
    if parts and parts <= _LORA_PARTS and not unknown:
        state.config["peft_type"] = "LORA"
        state.mended("peft-type", '"peft_type" is "LORA", as all its tensors are')
    else:
        what = f'"peft_type" is missing, and the tensors are not plain LoRA\'s: {", ".join(sorted(parts) or unknown[:3])}'
        state.proposed("peft-type", what, f'Set "peft_type" in {peft.CONFIG}')


def _unknown_keys(state: Draft) -> None:
    if state.config.get("peft_type") != "LORA":
        return
    unknown = sorted(set(state.config) - peft.INERT - peft.READ - _WRITTEN)
    empty = [key for key in unknown if not state.config[key] and not _is_number(state.config[key])]
    for key in empty:
        del state.config[key]
    if empty:
        state.mended("unknown-key", f"keys of a newer peft that say nothing are dropped: {', '.join(empty)}")
    for key in sorted(set(unknown) - set(empty)):
        what = f"{key} = {json.dumps(state.config[key])[:60]} is not known here and may change what is computed"
        state.proposed("unknown-key", what, f'Remove "{key}" if the peft that wrote it says it changes nothing')


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _base_name(state: Draft, base: BaseSpec | None) -> None:
    if state.config.get("base_model_name_or_path"):
        return
    said = {"--base": base.repo if base else None, describe.NAME: _pinned(state)}
    found = {where: repo for where, repo in said.items() if repo and _REPO.fullmatch(repo)}
    if len(set(found.values())) == 1:
        where, repo = next(iter(found.items()))
        state.config["base_model_name_or_path"] = repo
        state.mended("no-base-name", f'"base_model_name_or_path" is "{repo}", from {where}')
        return
    what = "the base is not named" + (f", and {' and '.join(f'{w} says {r}' for w, r in found.items())}" if found else "")
    state.proposed("no-base-name", what, f'Set "base_model_name_or_path" in {peft.CONFIG} to the base\'s repository')


def _pinned(state: Draft) -> str | None:
    if state.folder is None or not (state.folder / describe.NAME).is_file():
        return None
    try:
        known = describe.read_facts(state.folder)
    except AdapterhubError:
        return None
    repo = known["base"].get("repo") if known else None
    return repo if isinstance(repo, str) else None


def _targets(state: Draft, pairs: Shapes) -> None:
    """PEFT builds the modules that `target_modules` names and skips the tensors of all others."""
    if state.config.get("target_parameters"):
        return
    option = state.config.get("target_modules")
    names = {item for item in option if isinstance(item, str)} if isinstance(option, list) else set()
    layers = chosen_layers(state.config)
    missing = [target for target in pairs if not option or not matches(option, names, target, layers)]
    if not missing:
        return
    state.config["target_modules"] = sorted(pairs)
    for key in ("layers_to_transform", "layers_pattern"):
        if state.config.get(key) is not None:
            state.config[key] = None  # whole paths say it; peft refuses a pattern beside a regular expression
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    said = f"did not name {missing[0]}{more}" if option else "was missing"
    state.mended("not-targeted", f'"target_modules" {said}: it has the {len(pairs)} modules that have tensors')


def _ranks(state: Draft, pairs: Shapes) -> None:
    """The tensors are right: peft refuses to load them into modules of another rank."""
    if state.config.get("target_parameters"):  # there the rank in the config alone says how many experts there are
        return
    ranks = {t: shapes[a][0] for t, shapes in pairs.items() for a in ("A", "embedding_A") if shapes.get(a)}
    patterns, r = _numbers(state.config, "rank_pattern"), state.config.get("r", 8)
    if patterns is None or not ranks:
        return
    r = r if _is_number(r) else 0
    matched, used = Patterns(patterns, peft.CONFIG), set[str]()
    wrong = overlap = 0
    for target, rank in ranks.items():
        found = matched.matching(target)
        used.update(found)
        wrong += (patterns[found[0]] if found else r) != rank
        overlap += len({patterns[key] for key in found}) > 1
    if not (wrong or overlap or set(patterns) - used):
        return
    counts = Counter(ranks.values())
    common = r if counts.get(r) else max(counts, key=lambda rank: (counts[rank], rank))
    explicit = {re.escape(target): rank for target, rank in ranks.items() if rank != common}
    ours = Patterns(explicit, peft.CONFIG)
    if any(len(ours.matching(target)) > (rank != common) for target, rank in ranks.items()):
        state.proposed("rank-config", "two modules' paths end alike, so no pattern tells them apart", "Save it again with peft")
        return
    state.config |= {"r": common, "rank_pattern": explicit}
    code = "rank-config" if wrong else "pattern-overlap" if overlap else "pattern-unused"
    also = f", {len(explicit)} modules by whole paths in rank_pattern" if explicit else ""
    state.mended(code, f'ranks are those of the tensors: "r" is {common}{also}')


def _numbers(config: Mapping[str, Any], option: str) -> dict[str, float] | None:
    """A map of patterns; None where it is something else, which `validate` says and no tensor mends."""
    patterns = config.get(option) or {}
    return patterns if isinstance(patterns, dict) and all(map(_is_number, patterns.values())) else None


def _alphas(state: Draft, pairs: Shapes) -> None:
    """Tensors don't say their alpha, so that nothing but an edit by who knows it can mend a doubtful one."""
    patterns = _numbers(state.config, "alpha_pattern")
    if patterns is None:
        return
    matched = Patterns(patterns, peft.CONFIG)
    matches = {target: matched.matching(target) for target in pairs}
    if any(len({patterns[key] for key in keys}) > 1 for keys in matches.values()):
        explicit = {re.escape(target): patterns[keys[0]] for target, keys in matches.items() if keys}
        first = next(keys for keys in matches.values() if len({patterns[key] for key in keys}) > 1)
        what = f'alpha_pattern: "{first[0]}" and "{first[1]}" overlap, and peft loses their order when it saves'
        state.proposed("pattern-overlap", what, f'If the first was meant, set "alpha_pattern" to {json.dumps(explicit)}')
    for key in sorted(set(patterns) - {key for keys in matches.values() for key in keys}):
        state.proposed("pattern-unused", f'alpha_pattern "{key}" matches no module', "Correct it, or remove it")


def _biases(state: Draft, pairs: Shapes) -> None:
    having = [target for target, parts in pairs.items() if "bias" in parts]
    flag = bool(state.config.get("lora_bias"))
    if flag == bool(having):
        return
    if not having:
        state.config["lora_bias"] = False
        state.mended("no-bias", '"lora_bias" is false: no module has one, and peft would add zeros')
        return
    why = _why_no_bias(state.config, pairs)
    if why:
        what = f"{len(having)} modules have lora_B.bias, and peft refuses lora_bias {why}"
        state.proposed("bias-flag", what, "Save it again with peft, or fuse it into the base with `adapterhub merge --into`")
        return
    state.config["lora_bias"] = True
    state.mended("bias-flag", f'"lora_bias" is true: {len(having)} modules have one, which peft would skip')


def _why_no_bias(config: Mapping[str, Any], pairs: Shapes) -> str:
    init = config.get("init_lora_weights", True)
    if init not in (True, False):
        return f"with init_lora_weights {init!r}"
    if config.get("use_dora") or any("magnitude" in parts for parts in pairs.values()):
        return "with DoRA"
    return "on an embedding" if any("embedding_A" in parts for parts in pairs.values()) else ""


def _magnitudes(state: Draft, pairs: Shapes) -> None:
    having = [target for target, parts in pairs.items() if "magnitude" in parts]
    flag = bool(state.config.get("use_dora"))
    if flag and len(having) < len(pairs):
        what = f"use_dora is true, and {len(pairs) - len(having)} of {len(pairs)} modules have no magnitude"
        state.proposed(
            "no-magnitude", what, "Save it again with peft" if having else 'Set "use_dora" to false if it is no DoRA'
        )
    elif having and not flag and len(having) < len(pairs):
        what = f"{len(having)} of {len(pairs)} modules have magnitudes, and use_dora is for all"
        state.proposed("magnitude-flag", what, "Save it again with peft")
    elif having and not flag:
        state.config["use_dora"] = True
        state.mended("magnitude-flag", '"use_dora" is true: every module has a magnitude, which peft would skip')
