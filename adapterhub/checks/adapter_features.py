"""Features of an adapter that rules of runtimes name, each with the text that it is explained by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adapterhub_converters.adapter import Factored, StackedLowRank
from adapterhub_converters.bases import canonical_names
from adapterhub_converters.errors import AdapterhubError, RefusedError
from adapterhub_converters.formats import peft

from .base_fit import is_conv1d
from .contents import Contents
from .served_models import served_features

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

# Encoders, and models with an encoder and a decoder.
_ENCODERS = {
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "albert", "mpnet", "distilbert", "deberta", "deberta-v2", "esm",
    "modernbert", "t5", "mt5", "bart", "mbart", "pegasus", "marian", "whisper", "wav2vec2", "hubert", "wavlm", "vit", "deit",
    "beit", "dinov2", "clip", "siglip",
}  # fmt: skip
_CLASSIFIERS = {"classifier", "score"}  # the whole modules that vLLM takes
_MLA = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")


def features_of(contents: Contents, base: BaseSpec | None, *, values: bool) -> Iterator[tuple[str, str]]:
    """Yield the features that rules of runtimes may name, each with the text that it is explained by."""
    if contents.is_whole:
        return
    config = contents.config
    for part, feature in (("magnitude", "dora"), ("bias", "lora-bias")):
        if any(part in parts for parts, _ in contents.distinct_parts):
            yield feature, ""
    if (config.get("bias") or "none") != "none":
        yield "bias", ""
    if set(contents.names("modules_to_save")) - _CLASSIFIERS:
        yield "config-modules-to-save", ""
    for name in contents.replaced:
        yield ("bias" if name.endswith(".bias") else "norms" if "norm" in name else "modules-to-save"), name
    yield from _table_features(contents, base, values=values)
    yield from _kind_features(contents)
    yield from _init_features(contents, base)
    if any(target.rpartition(".")[2] in _MLA for target in contents.pairs):
        yield "mla", ""
    yield from _scale_features(contents)
    yield from _fusion_features(contents, base)
    yield from served_features(contents, base)
    if base is not None:
        yield from _base_features(contents, base)


def _table_features(contents: Contents, base: BaseSpec | None, *, values: bool) -> Iterator[tuple[str, str]]:
    """Yield features of replaced rows and copies of the base's tables."""
    if contents.rows:
        yield "rows", ""
        if not _has_weights(base) or base is None or base.tied or any(target in contents.pairs for target in contents.rows):
            yield "rows-unsettled", ""  # else the conversion writes the difference to the base's rows
    if contents.copies and not (values and _are_equal_to_base(contents, base)):
        yield "copies-unsettled", ""


def _init_features(contents: Contents, base: BaseSpec | None) -> Iterator[tuple[str, str]]:
    """Yield features of an initialization that changed the base."""
    if peft.residual_init(contents.config.get("init_lora_weights")):
        init = str(contents.config.get("init_lora_weights"))
        if init != "lora_ga":
            yield "init", init
        # Decompositions with a reproducible result; peft takes OLoRA's name in any case.
        is_exact = init == "pissa" or init.lower() == "olora"
        yield ("init-exact" if is_exact else "init-lost" if init == "lora_ga" else "init-random"), init
        if init != "pissa" or not _has_weights(base):  # else the conversion computes it
            yield "init-unsettled", init


def _has_weights(base: BaseSpec | None) -> bool:
    """Return whether a conversion can read the numbers of the base."""
    return base is not None and base.folder is not None


def _are_equal_to_base(contents: Contents, base: BaseSpec | None) -> bool:
    """Return whether every copy of a base weight equals it, as a conversion verifies."""
    if base is None or base.folder is None or contents.format != "peft":
        return False
    from adapterhub_converters.formats import base_weights  # of a folder with the base's weights

    try:
        base_weights.without_copies(peft.read(contents.path, base=base, mapped=True), base.folder)
    except AdapterhubError:
        return False
    return True


def _kind_features(contents: Contents) -> Iterator[tuple[str, str]]:
    """Yield features of adapters and deltas that are more than pairs of matrices."""
    if contents.is_tuned:
        yield "other-kind", str(contents.config["peft_type"])
        yield "kind-unsettled", str(contents.config["peft_type"])
        return
    for delta in contents.other_deltas.values():
        if isinstance(delta, StackedLowRank):
            yield "experts", ""
            continue
        yield "other-kind", type(delta).__name__
        if not (isinstance(delta, Factored) and delta.is_low_rank):  # else the conversion writes the pair it equals
            yield "kind-unsettled", type(delta).__name__
    if contents.config.get("layer_replication"):
        yield "condition", "layer_replication"
    if contents.config.get("alora_invocation_tokens") or (contents.adapter and contents.adapter.meta.invocation):
        yield "alora", ""


def _scale_features(contents: Contents) -> Iterator[tuple[str, str]]:
    """Yield features of ranks and scales."""
    ranks = set(contents.ranks.values())
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
    if isinstance(patterns, dict) and patterns:
        matching = contents.matching("alpha_pattern")
        if any(patterns[keys[0]] != alpha for target, keys in matching.items() if target in contents.pairs):
            yield "alpha-pattern", ""


def _fusion_features(contents: Contents, base: BaseSpec | None) -> Iterator[tuple[str, str]]:
    """Yield features for programs that fuse projections of one input, and that read `target_modules` themselves."""
    targets = contents.config.get("target_modules")
    if isinstance(targets, str) and targets not in ("all", "all-linear"):
        yield "target-pattern", ""
    layers: dict[str, set[str]] = {}
    for target in contents.pairs:
        parent, _, name = target.rpartition(".")
        layers.setdefault(parent, set()).add(name)
    # A module, and one that runtimes fuse it with.
    pairs = (("q_proj", "v_proj"), ("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj"))
    for parent, inside in layers.items():
        for name, needed in pairs:
            if name not in inside or needed in inside:
                continue
            if needed == "gate_proj" and (base is None or base.tensor(f"{parent}.gate_proj.weight") is None):
                continue  # an MLP without a gate has nothing to fuse
            yield ("q-without-v" if name == "q_proj" else "part-of-fused"), f"{parent} has {name} without {needed}"


def _base_features(contents: Contents, base: BaseSpec) -> Iterator[tuple[str, str]]:
    """Yield features that depend on the base."""
    if is_conv1d(base):
        yield "conv1d", ""
    if base.model_type in _ENCODERS:
        yield "encoder", base.model_type
    yield from _old_name_features(contents, base)
    if contents.format != "gguf":
        yield from _llama_cpp_features(contents, base)
    if contents.format != "mlx":
        yield from _mlx_features(contents, base)
    if base.tied:
        for target, parts in contents.pairs.items():
            if "embedding_A" in parts:
                yield "tied-embedding", ""
            elif target.rpartition(".")[2] == "lm_head":
                yield "tied-lm-head", ""


def _mlx_features(contents: Contents, base: BaseSpec) -> Iterator[tuple[str, str]]:
    from adapterhub_converters.formats.mlx import module_names  # late, like readers

    if refused := module_names.unsupported_reason((*contents.pairs, *contents.other_deltas), base):
        yield "not-in-mlx", refused


def _old_name_features(contents: Contents, base: BaseSpec) -> Iterator[tuple[str, str]]:
    """Yield modules under names that the model in memory does not have (see `bases.canonical_names`)."""
    kind = base.model_type
    old = next((target for target in contents.pairs if base.renaming.module(target) != target), None)
    if old and kind in canonical_names.PEFT_REFUSES_OLD_NAMES:
        yield "old-targets", old


def _llama_cpp_features(contents: Contents, base: BaseSpec) -> Iterator[tuple[str, str]]:
    """Yield the first thing that has no verified name in llama.cpp: the architecture, or a module of it."""
    try:
        architecture = base.llama_cpp_architecture()
    except RefusedError:
        yield "unmapped", base.architecture or "a base whose config has no architectures"
        return
    stacked = (target for target, delta in contents.other_deltas.items() if isinstance(delta, StackedLowRank))
    for target in (*contents.pairs, *stacked):
        if architecture.stem(target) is None:
            yield "unmapped", target
            return
