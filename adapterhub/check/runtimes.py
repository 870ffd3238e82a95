"""What each runtime makes of an adapter: its features, looked up in `adapterhub_converters.runtimes`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from adapterhub_converters.adapter import Factored, StackedLowRank
from adapterhub_converters.architectures import names
from adapterhub_converters.bases import BaseSpec, renames
from adapterhub_converters.errors import AdapterhubError, RefusedError
from adapterhub_converters.formats import base_weights, peft
from adapterhub_converters.formats.image import naming
from adapterhub_converters.patterns import Patterns
from adapterhub_converters.runtimes import APPLIED, RUNTIMES, VERDICTS, VLLM_WITHOUT_LORA, Rule, Runtime

from . import internal, shapes
from .contents import Contents
from .report import ERROR, Problem, Verdict

# What a problem of this code is to a runtime.
_FROM_PROBLEM = {
    "shape-mismatch": "shape", "vocab-differs": "shape", "row-outside": "shape",
    "no-such-module": "no-module", "other-prefix": "no-module", "base-shallower": "no-module",
    "base-deeper": "deeper", "uncovered-module": "deeper",
    "rank-config": "rank-config", "magnitude-flag": "magnitude-flag", "no-magnitude": "no-magnitude", "bias-flag": "bias-flag",
}  # fmt: skip
# Problems that every runtime stumbles over: nothing is loaded.
_FATAL = {
    "malformed", "missing-file", "pickle", "not-understood", "key-prefix", "unknown-tensor", "missing-half", "not-a-matrix",
    "needs-base", "does-not-fit", "empty-tensor", "rank-differs", "part-shape", "token-rows", "not-floats",
}  # fmt: skip
# Problems after which the numbers are wrong wherever they are loaded.
_WRONG = {"non-finite", "files-changed", "base-differs", "numerics-differ"}
# Models that read a whole text or image before they answer, or write from one they read.
_ENCODERS = {
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "albert", "mpnet", "distilbert", "deberta", "deberta-v2", "esm",
    "modernbert", "t5", "mt5", "bart", "mbart", "pegasus", "marian", "whisper", "wav2vec2", "hubert", "wavlm", "vit", "deit",
    "beit", "dinov2", "clip", "siglip",
}  # fmt: skip
_EXACT = ("pissa", "olora")  # decompositions that come out the same again
_MLA = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")


def verdicts(
    contents: Contents | None, base: BaseSpec | None, problems: Iterable[Problem], *, values: bool = True
) -> dict[str, Verdict]:
    """A verdict for every runtime there are rules for; `values`: whether the numbers of tensors may be looked at."""
    problems = list(problems)
    understood = not any(problem.code == "not-understood" for problem in problems)
    features = dict(_features(contents, base, values=values)) if contents and understood else {}
    features.update({_FROM_PROBLEM[p.code]: p.what for p in problems if p.code in _FROM_PROBLEM})
    # What only some stumble over: the others take the tensors that are there.
    features.update({p.code: p.what for p in problems if p.code == "not-targeted"})
    return {name: _verdict(runtime, contents, features, problems) for name, runtime in RUNTIMES.items()}


def _verdict(runtime: Runtime, contents: Contents | None, features: Mapping[str, str], problems: list[Problem]) -> Verdict:
    found: list[tuple[str, str]] = [("refused", f"{p.code}: {p.what}") for p in problems if p.code in _FATAL]
    found += [("wrong", f"{p.code}: {p.what}") for p in problems if p.code in _WRONG]
    found += [("refused", reason) for reason in _of_image_models(runtime, contents)]
    for rule in runtime.rules:
        if rule.feature in features:
            found.append((rule.verdict, _said(rule, features[rule.feature])))
    unexplained = [p for p in problems if p.severity == ERROR and p.code in _FROM_PROBLEM]
    known = {rule.feature for rule in runtime.rules}
    found += [("wrong", f"{p.code}: {p.what}") for p in unexplained if _FROM_PROBLEM[p.code] not in known]
    worst = max((verdict for verdict, _ in found), key=VERDICTS.index, default=APPLIED)
    convert = None
    if contents is not None and contents.format != runtime.reads:
        convert = runtime.reads
    reasons = dict.fromkeys(text for verdict, text in sorted(found, key=lambda item: -VERDICTS.index(item[0])))
    return Verdict(runtime.name, runtime.version, worst, tuple(reasons)[:5], convert if worst == APPLIED else None)


def _of_image_models(runtime: Runtime, contents: Contents | None) -> Iterator[str]:
    """Why a runtime of language models takes no adapter of image models; peft takes one of one model."""
    if contents is None or not naming.of_images(contents.targets):
        return
    parts = contents.adapter.meta.parts if contents.adapter else ()
    if len(parts) > 1:
        yield f"it acts on {' and '.join(parts)}, and {runtime.name} has one model; diffusers and ComfyUI read it"
    elif runtime.name != "peft":
        yield "an adapter of an image model; diffusers and ComfyUI read it"


def _said(rule: Rule, about: str) -> str:
    return re.sub(r"\{\w+\}", lambda _: about, rule.says)


def _features(contents: Contents, base: BaseSpec | None, *, values: bool) -> Iterator[tuple[str, str]]:
    config = contents.config
    for part, feature in (("magnitude", "dora"), ("bias", "lora-bias")):
        if any(part in parts for parts in contents.pairs.values()):
            yield feature, ""
    if (config.get("bias") or "none") != "none":
        yield "bias", ""
    for name in contents.replaced:
        yield ("bias" if name.endswith(".bias") else "norms" if "norm" in name else "modules-to-save"), name
    yield from _tables(contents, base, values=values)
    yield from _beyond_pairs(contents)
    yield from _init(contents, base)
    if any(target.rpartition(".")[2] in _MLA for target in contents.pairs):
        yield "mla", ""
    yield from _scales(contents)
    if base is not None:
        yield from _on_base(contents, base)


def _tables(contents: Contents, base: BaseSpec | None, *, values: bool) -> Iterator[tuple[str, str]]:
    if contents.rows:
        yield "rows", ""
        if not _has_weights(base) or base is None or base.tied or any(target in contents.pairs for target in contents.rows):
            yield "rows-unsettled", ""  # else the conversion writes the difference to the base's rows
    if contents.copies and not (values and _are_the_bases(contents, base)):
        yield "copies-unsettled", ""


def _init(contents: Contents, base: BaseSpec | None) -> Iterator[tuple[str, str]]:
    """What an init that changed the base is to whoever loads the adapter."""
    if peft.residual_init(contents.config.get("init_lora_weights")):
        init = str(contents.config.get("init_lora_weights"))
        yield "init", init
        yield ("init-exact" if init in _EXACT else "init-random"), init
        if init != "pissa" or not _has_weights(base):  # else the conversion computes it
            yield "init-unsettled", init


def _has_weights(base: BaseSpec | None) -> bool:
    """Whether a conversion can look at the base's numbers."""
    return base is not None and base.folder is not None


def _are_the_bases(contents: Contents, base: BaseSpec | None) -> bool:
    """Whether every copy that rides along is the base's own, as a conversion makes sure."""
    if base is None or base.folder is None or contents.format != "peft":
        return False
    try:
        base_weights.without_copies(peft.read(contents.path, base=base, mapped=True), base.folder)
    except AdapterhubError:
        return False
    return True


def _beyond_pairs(contents: Contents) -> Iterator[tuple[str, str]]:
    for delta in contents.others.values():
        yield ("experts" if isinstance(delta, StackedLowRank) else "other-kind"), type(delta).__name__
        if not (isinstance(delta, Factored) and delta.is_low_rank):  # else the conversion writes the pair it equals
            yield "kind-unsettled", type(delta).__name__
    for option in ("alora_invocation_tokens", "layer_replication"):
        if contents.config.get(option):
            yield "condition", option
    if contents.config.get("alora_invocation_tokens"):
        yield "alora", ""


def _scales(contents: Contents) -> Iterator[tuple[str, str]]:
    ranks = set(internal.ranks(contents).values())
    if ranks and max(ranks) > 16:
        yield "rank-over-16", str(max(ranks))
    if len(ranks) > 1:
        yield "rank-pattern", ""
    if contents.adapter is not None:
        deltas = contents.adapter.deltas.values()
        if any(delta.rslora for delta in deltas):
            yield "rslora", ""
        if len({delta.alpha for delta in deltas}) > 1:
            yield "alpha-pattern", ""
        return
    if contents.config.get("use_rslora"):
        yield "rslora", ""
    patterns, alpha = contents.config.get("alpha_pattern"), contents.config.get("lora_alpha", 8)
    if isinstance(patterns, dict):
        matched = Patterns(patterns, peft.CONFIG)
        for target in contents.pairs:
            keys = matched.matching(target)
            if keys and patterns[keys[0]] != alpha:
                yield "alpha-pattern", ""
                return


def _on_base(contents: Contents, base: BaseSpec) -> Iterator[tuple[str, str]]:
    if shapes.conv1d(base):
        yield "conv1d", ""
    if base.model_type in _ENCODERS:
        yield "encoder", base.model_type
    if base.model_type in VLLM_WITHOUT_LORA:
        yield "vllm-without-lora", base.architecture
    yield from _old_names(contents, base)
    if contents.format != "gguf":
        yield from _unmapped(contents, base)
    if base.tied:
        for target, parts in contents.pairs.items():
            if "embedding_A" in parts:
                yield "tied-embedding", ""
            elif target.rpartition(".")[2] == "lm_head":
                yield "tied-lm-head", ""


def _old_names(contents: Contents, base: BaseSpec) -> Iterator[tuple[str, str]]:
    """Modules under names that the model in memory does not have (see `base.renames`)."""
    kind = base.model_type
    old = next((target for target in contents.pairs if renames.in_memory(target, kind) != target), None)
    if old and kind in renames.SKIPPED:
        yield "old-names", old
    elif old and kind in renames.REFUSED:
        yield "old-targets", old


def _unmapped(contents: Contents, base: BaseSpec) -> Iterator[tuple[str, str]]:
    """The first thing that has no verified name in llama.cpp: the architecture, or a module of it."""
    try:
        architecture = names.by_class(base.architecture, base.where)
    except RefusedError:
        yield "unmapped", base.architecture or "an unnamed architecture"
        return
    for target in contents.pairs:
        if architecture.stem(target) is None:
            yield "unmapped", target
            return
