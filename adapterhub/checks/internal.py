"""Check that an adapter is consistent: its tensors with each other, and its config with its tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft.keys import PREFIX
from adapterhub_converters.patterns import Patterns

from .contents import PART_NAMES, Contents, Part, Values
from .report import Problem
from .target_modules import chosen_layers, matches, within

_LARGE_SCALE = 64  # of the delta; trainers' defaults are 1 to 4
_LONGEST = 300  # characters of a config's value that are worth repeating


def internal_problems(contents: Contents) -> Iterator[Problem]:
    """Problems that headers and config show; no values are read."""
    yield from _names(contents)
    for target, parts in contents.pairs.items():
        if not _is_plain(parts):
            yield from _pair(contents.weights, target, parts)
    kinds = {(tensor.shape, tensor.dtype) for tensor in contents.infos()}
    usable = all(0 not in shape and dtype in dtypes.FLOATS for shape, dtype in kinds)
    for name, tensor in contents.tensors() if not usable else ():
        if 0 in tensor.shape:
            hint = "Save again with the weights gathered (stage3_gather_16bit_weights_on_model_save)"
            yield Problem("empty-tensor", contents.weights, name, f"shape {tensor.shape}", hint, got=str(tensor.shape))
        if tensor.dtype not in dtypes.FLOATS:
            hint = "Adapters are F32, BF16 or F16"
            yield Problem("not-floats", contents.weights, name, f"dtype {tensor.dtype}", hint, "F32, BF16 or F16", tensor.dtype)
    if contents.format == "peft":
        yield from _config(contents)


def _names(contents: Contents) -> Iterator[Problem]:
    file = contents.weights
    if contents.renamed:
        key, name = contents.renamed[0]
        what = f"{len(contents.renamed)} names that peft would skip; it would load this one as {name}"
        yield Problem("key-prefix", file, key, what, repairable=True)
    for key in contents.unknown:
        if key.startswith(PREFIX) or contents.pairs:
            yield Problem("unknown-tensor", file, key, "a tensor of unknown kind", "Remove it")
        else:
            hint = "Save it with peft's save_pretrained"
            yield Problem("key-prefix", file, key, "the name does not begin with base_model.model.", hint, repairable=True)


def _is_plain(parts: Part) -> bool:
    """True for two matrices of one rank and nothing else, as nearly every module has: one test for those of `_pair`."""
    if len(parts) != 2 or "A" not in parts or "B" not in parts:
        return False
    first, second = parts["A"].shape, parts["B"].shape
    return len(first) == len(second) == 2 and first[0] == second[1] != 0


def _pair(file: str, target: str, parts: Part) -> Iterator[Problem]:
    prefix = "embedding_" if any(part.startswith("embedding_") for part in parts) else ""
    first, second = parts.get(f"{prefix}A"), parts.get(f"{prefix}B")
    for half, other in ((f"{prefix}A", f"{prefix}B"), (f"{prefix}B", f"{prefix}A")):
        if half not in parts:
            what = f"{PART_NAMES[half]} is missing" + (f", {PART_NAMES[other]} is not" if other in parts else "")
            yield Problem("missing-half", file, f"{target}.{PART_NAMES[half]}", what, "Save the adapter again")
    for part, tensor in parts.items():
        if part in (f"{prefix}A", f"{prefix}B") and len(tensor.shape) != 2:
            what = f"shape {tensor.shape}, not a matrix"
            yield Problem("not-a-matrix", file, f"{target}.{PART_NAMES[part]}", what, "", "2 dimensions", str(tensor.shape))
    if first is None or second is None or len(first.shape) != 2 or len(second.shape) != 2 or 0 in first.shape:
        return
    if first.shape[0] != second.shape[1]:
        what = f"rank {first.shape[0]} in lora_A {first.shape}, rank {second.shape[1]} in lora_B {second.shape}"
        hint = "The two come from different adapters, or one is transposed"
        yield Problem("rank-differs", file, target, what, hint, str(first.shape[0]), str(second.shape[1]))
    for part in ("magnitude", "bias"):
        if part in parts and parts[part].shape != ((1, first.shape[1]) if prefix else (second.shape[0],)):
            what = f"shape {parts[part].shape}, but the module has {second.shape[0]} output features"
            wanted = f"({second.shape[0]},)"
            yield Problem("part-shape", file, f"{target}.{PART_NAMES[part]}", what, "", wanted, str(parts[part].shape))


def _config(contents: Contents) -> Iterator[Problem]:
    config, file = contents.config, peft.CONFIG
    try:
        peft.check_config(config, file)
    except AdapterhubError as error:
        yield Problem("not-understood", file, "", error.what, error.hint, cause=error)
        return
    for key in peft.unknown_keys(config):
        hint = "Remove it, or make sure that it changes nothing in the program that wrote it"
        yield Problem("unknown-key", file, key, peft.UNKNOWN_KEY, hint)
    try:
        yield from _ranks(contents)
        yield from _patterns(contents)
        yield from _untargeted(contents)
    except AdapterhubError as error:
        yield Problem("not-understood", file, "", error.what, error.hint, cause=error)
    yield from _flags(contents)
    yield from _whole_tensors(contents)
    yield from _token_rows(contents)
    yield from _unusual(contents)
    init = config.get("init_lora_weights")
    if peft.residual_init(init):
        what = f'init_lora_weights "{init}" changed the base; without the initial adapter the delta is wrong'
        hint = "Save with peft's path_initial_model_for_weight_conversion"
        yield Problem("initial-adapter", file, "init_lora_weights", what, hint)
    if contents.pairs and config.get("lora_alpha") == 0 and not config.get("alpha_pattern"):
        yield Problem("does-nothing", file, "lora_alpha", "is 0: the adapter changes nothing")


def _ranks(contents: Contents) -> Iterator[Problem]:
    """peft builds modules from the config, then loads tensors into them: the two must agree."""
    patterns: Mapping[str, int] = contents.config.get("rank_pattern") or {}
    matched = Patterns(patterns, peft.CONFIG)
    for target, rank in contents.ranks.items():
        keys = matched.matching(target) if patterns else []
        configured = patterns[keys[0]] if keys else contents.config.get("r", 8)
        if configured != rank:
            source = f'rank_pattern "{keys[0]}"' if keys else '"r"'
            hint = f'Set "r" to {rank}' if not patterns else f"Give {target} the rank {rank} in rank_pattern"
            what = f"rank {rank}, but {source} is {configured}"
            yield Problem("rank-config", contents.weights, target, what, hint, str(configured), str(rank), repairable=True)


def _patterns(contents: Contents) -> Iterator[Problem]:
    # AdaLoRA's rank_pattern is a mask by tensor name.
    for option in ("rank_pattern", "alpha_pattern") if contents.config["peft_type"] != "ADALORA" else ():
        patterns = contents.config.get(option)
        if not patterns:
            continue
        matched, used = Patterns(patterns, peft.CONFIG), set[str]()
        for target in contents.targets:
            keys = matched.matching(target)
            used.update(keys)
            if len({patterns[key] for key in keys}) > 1:
                what = f'"{keys[0]}" and "{keys[1]}" both match {target}; the first in the file applies: {patterns[keys[0]]}'
                hint = "Use whole paths: peft sorts patterns when it saves"
                yield Problem("pattern-overlap", peft.CONFIG, option, what, hint, repairable=option == "rank_pattern")
        for key in sorted(set(patterns) - used):
            yield Problem("pattern-unused", peft.CONFIG, option, f'"{key}" matches no module of the adapter')


def _untargeted(contents: Contents) -> Iterator[Problem]:
    """peft builds the modules that target_modules names, and silently skips the tensors of all others."""
    option, layers = contents.config.get("target_modules"), chosen_layers(contents.config)
    if not option or contents.config.get("target_parameters"):
        return
    names = contents.names("target_modules")
    known = frozenset(names)
    expected = f"target_modules {(option if isinstance(option, str) else ', '.join(names))[:_LONGEST]}"
    for target in contents.pairs:
        if not matches(option, known, target, layers):
            what = "has tensors, but target_modules does not name it: peft would skip them"
            yield Problem("not-targeted", contents.weights, target, what, "", expected, target, repairable=True)


def _flags(contents: Contents) -> Iterator[Problem]:
    linear = [parts for parts in contents.pairs.values() if "A" in parts or "B" in parts]
    counts = Counter(part for parts in linear for part in parts)
    # peft has one flag for all modules, takes a missing bias for zeros, and refuses biases with DoRA.
    all_dora, no_bias = counts["magnitude"] == len(linear), not counts["bias"]
    yield from _flag(contents, "magnitude", "use_dora", missing=("no-magnitude", False), extra=("magnitude-flag", all_dora))
    yield from _flag(contents, "bias", "lora_bias", missing=("no-bias", no_bias), extra=("bias-flag", not counts["magnitude"]))


def _flag(
    contents: Contents, part: str, option: str, *, missing: tuple[str, bool], extra: tuple[str, bool]
) -> Iterator[Problem]:
    """Modules without a part although the option is set, or with one although it is not; codes, and if they are repairable."""
    flag = bool(contents.config.get(option))
    code, repairable = missing if flag else extra
    what = f"missing, but {option} is true" if flag else f"present, but {option} is not true: peft would skip it"
    hint = "" if flag else f'Set "{option}" to true'
    for target, parts in contents.pairs.items():
        if flag != (part in parts) and ("A" in parts or "B" in parts):
            name = f"{target}.{PART_NAMES[part]}"
            yield Problem(code, contents.weights, name, what, hint, repairable=repairable)


def _whole_tensors(contents: Contents) -> Iterator[Problem]:
    saved, biases = frozenset(contents.names("modules_to_save")), contents.config.get("bias", "none") != "none"
    for name in contents.replaced:
        module, _, kind = name.rpartition(".")
        if not within(saved, module) and not (kind == "bias" and biases):
            what = "replaces the base's own tensor for every adapter; modules_to_save does not name it"
            yield Problem("overwrites-base", contents.weights, name, what, f'Add "{module}" to modules_to_save, or remove it')


def _unusual(contents: Contents) -> Iterator[Problem]:
    """Values that are valid, and rarely what was meant."""
    config, ranks = contents.config, contents.ranks.values()
    if ranks:
        least, alpha = min(ranks), config.get("lora_alpha", 8)
        scale = alpha / (math.sqrt(least) if config.get("use_rslora") else least)
        if scale > _LARGE_SCALE:
            what = f"{alpha:g} with rank {least} multiplies the delta by {scale:g}"
            yield Problem("scale-large", peft.CONFIG, "lora_alpha", what)
    name = config.get("base_model_name_or_path") or ""
    if name.startswith(("/", "./", "../", "~", "\\")) or name[1:3] in (":\\", ":/"):
        what = f"{name[:_LONGEST]} is a path, which others do not have"
        yield Problem("local-base-name", peft.CONFIG, "base_model_name_or_path", what, "Write the model's name on its hub")


def _token_rows(contents: Contents) -> Iterator[Problem]:
    for target, tensor in contents.rows.items():
        ids = contents.row_ids[target]
        if len(tensor.shape) != 2 or len(ids) != tensor.shape[0]:
            what = f"{len(ids)} token ids, but the rows of {target} have shape {tensor.shape}"
            rows = (f"{len(ids)} rows", str(tensor.shape))
            yield Problem("token-rows", peft.CONFIG, "trainable_token_indices", what, "", *rows)


# How to view a float as an unsigned integer, the mask of its sign, and the integer from which on it is infinite or NaN.
_INFINITE: dict[str, tuple[str, int, int]] = {
    "F64": ("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
}


def largest_bits(array: np.ndarray) -> tuple[int, int]:
    """The greatest magnitude in a flat piece of floats, as bits, and the bits at which infinity begins.

    Floats of one sign are ordered like their bits, so one masked maximum finds zeros, infinities and NaNs at the
    speed of memory and without a float operation.
    """
    dtype, mask, infinite = _INFINITE[dtypes.name_of(array.dtype)]
    bits = array.view(dtype)
    return int((bits & bits.dtype.type(mask)).max()), infinite


def value_problems(contents: Contents) -> Iterator[Problem]:
    """NaN and infinity in any tensor; an adapter whose every lora_B is zero."""
    outputs = {parts[part].name for parts in contents.pairs.values() for part in ("B", "embedding_B") if part in parts}
    zeros: Counter[bool] = Counter()
    wrong: dict[str, str] = {}
    for name, size, most, bad in _measured(contents):
        if bad:
            wrong[name] = f"{bad} of {size} are NaN or infinite"
        if name in outputs:
            zeros[most == 0] += 1
    if wrong:
        labels = {tensor.name: label for label, tensor in contents.tensors() if tensor.name in wrong}
        yield from (Problem("non-finite", contents.weights, labels.get(name, name), what) for name, what in wrong.items())
    if zeros[True] and not zeros[False] and not (contents.replaced or contents.rows or contents.others):
        what = f"all {zeros[True]} lora_B are zero: the adapter changes nothing"
        yield Problem("does-nothing", contents.weights, "", what, "It was saved before training")


def _measured(contents: Contents) -> Iterator[tuple[str, int, int, int]]:
    """Name, number of values, largest bits and number of non-finite values of each tensor of floats."""
    last = ("", 0, 0, 0)
    for values in contents.values():
        dtype = dtypes.name_of(values.array.dtype)
        if dtype not in _INFINITE:
            continue
        ends = [*values.starts[1:], len(values.array)]
        for name, start, end, most, bad in zip(values.names, values.starts, ends, *_largest_and_bad(values), strict=True):
            if name == last[0]:  # another piece of a large one
                last = (name, last[1] + end - start, max(last[2], most), last[3] + bad)
                continue
            if last[1]:
                yield last
            last = (name, end - start, most, bad)
    if last[1]:
        yield last


def _largest_and_bad(values: Values) -> tuple[list[int], list[int]]:
    """The largest bits and the number of non-finite values, of each tensor."""
    if len(values.names) == 1:
        most, infinite = largest_bits(values.array)
        return [most], [_count_non_finite(values.array) if most >= infinite else 0]
    dtype, mask, infinite = _INFINITE[dtypes.name_of(values.array.dtype)]
    bits = values.array.view(dtype)
    bits = bits & bits.dtype.type(mask)
    largest: list[int] = np.maximum.reduceat(bits, values.starts).tolist()
    if max(largest) < infinite:
        return largest, [0] * len(largest)
    return largest, np.add.reduceat((bits >= infinite).astype(np.int64), values.starts).tolist()


def _count_non_finite(array: np.ndarray) -> int:
    return int(array.size - np.count_nonzero(np.isfinite(array.astype(np.float64))))
