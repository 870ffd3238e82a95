"""Whether an adapter agrees with itself: its tensors with each other, its config with its tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft
from adapterhub_converters.patterns import Patterns

from .contents import PART_NAMES, Contents, Part, Values
from .report import Problem
from .target_modules import chosen_layers, matches

_PREFIX = "base_model.model."
_FIX = "`adapterhub fix` does it"
_LONGEST = 300  # characters of what a config says that are worth repeating


def internal_problems(contents: Contents) -> Iterator[Problem]:
    """All that headers and config show; no values are read."""
    yield from _names(contents)
    for target, parts in contents.pairs.items():
        yield from _pair(contents.weights, target, parts)
    for name, tensor in contents.tensors():
        if 0 in tensor.shape:
            hint = "Save again with the weights gathered (stage3_gather_16bit_weights_on_model_save)"
            yield Problem("empty-tensor", contents.weights, name, f"shape {tensor.shape}", hint, got=str(tensor.shape))
        if tensor.dtype not in dtypes.FLOATS:
            hint = "Adapters are F32, BF16 or F16"
            yield Problem("not-floats", contents.weights, name, f"dtype {tensor.dtype}", hint, "F32, BF16 or F16", tensor.dtype)
    if contents.format == "peft":
        yield from _config(contents)


def _names(contents: Contents) -> Iterator[Problem]:
    if contents.renamed:
        key, name = contents.renamed[0]
        what = f"{len(contents.renamed)} names that peft would skip; it would call this one {name}"
        yield Problem("key-prefix", contents.weights, key, what, _FIX)
    for key in contents.unknown:
        if key.startswith(_PREFIX) or contents.pairs:
            yield Problem(
                "unknown-tensor",
                contents.weights,
                key,
                "of no kind that is known here",
                "Remove it, or name the tool that wrote it",
            )
        else:
            yield Problem(
                "key-prefix",
                contents.weights,
                key,
                f"no {_PREFIX} before the name",
                f"Save it with peft's save_pretrained, or {_FIX}",
            )


def _pair(file: str, target: str, parts: Part) -> Iterator[Problem]:
    prefix = "embedding_" if any(part.startswith("embedding_") for part in parts) else ""
    first, second = parts.get(f"{prefix}A"), parts.get(f"{prefix}B")
    for half, other in ((f"{prefix}A", f"{prefix}B"), (f"{prefix}B", f"{prefix}A")):
        if half not in parts:
            what = f"{PART_NAMES[half]} is missing" + (f"; {PART_NAMES[other]} is there" if other in parts else "")
            yield Problem("missing-half", file, f"{target}.{PART_NAMES[half]}", what, "Save the adapter again")
    for part, tensor in parts.items():
        if part in (f"{prefix}A", f"{prefix}B") and len(tensor.shape) != 2:
            what = f"shape {tensor.shape} is not a matrix's"
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
        yield Problem("not-understood", file, "", error.what, error.hint)
        return
    try:
        yield from _ranks(contents)
        yield from _patterns(contents)
        yield from _untargeted(contents)
    except AdapterhubError as error:
        yield Problem("not-understood", file, "", error.what, error.hint)
    yield from _flags(contents)
    yield from _whole_tensors(contents)
    yield from _token_rows(contents)
    init = config.get("init_lora_weights")
    if peft.residual_init(init):
        what = f'init_lora_weights "{init}" changed the base; without the initial adapter the delta is another one'
        hint = "Save with peft's path_initial_model_for_weight_conversion"
        yield Problem("initial-adapter", file, "init_lora_weights", what, hint)
    if contents.pairs and config.get("lora_alpha") == 0 and not config.get("alpha_pattern"):
        yield Problem("does-nothing", file, "lora_alpha", "is 0: the adapter changes nothing")


def _ranks(contents: Contents) -> Iterator[Problem]:
    """Peft builds modules from the config, then loads tensors into them: the two must agree."""
    patterns: Mapping[str, int] = contents.config.get("rank_pattern") or {}
    matched = Patterns(patterns, peft.CONFIG)
    for target, rank in contents.ranks.items():
        keys = matched.matching(target) if patterns else []
        said = patterns[keys[0]] if keys else contents.config.get("r", 8)
        if said != rank:
            source = f'rank_pattern "{keys[0]}"' if keys else '"r"'
            hint = f'Set "r" to {rank}' if not patterns else f"Give {target} the rank {rank} in rank_pattern"
            what = f"rank {rank}, but {source} is {said}"
            yield Problem("rank-config", contents.weights, target, what, f"{hint}; {_FIX}", str(said), str(rank))


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
                what = f'"{keys[0]}" and "{keys[1]}" both match {target}; the first of the file wins: {patterns[keys[0]]}'
                ours = _FIX if option == "rank_pattern" else "`adapterhub fix` proposes them"
                hint = f"peft sorts patterns when it saves; use whole paths; {ours}"
                yield Problem("pattern-overlap", peft.CONFIG, option, what, hint)
        for key in sorted(set(patterns) - used):
            yield Problem("pattern-unused", peft.CONFIG, option, f'"{key}" matches no module of the adapter')


def _untargeted(contents: Contents) -> Iterator[Problem]:
    """Peft builds the modules that target_modules names, and skips the tensors of all others without a word."""
    option, layers = contents.config.get("target_modules"), chosen_layers(contents.config)
    if not option or contents.config.get("target_parameters"):
        return
    names = contents.names("target_modules")
    known, said = frozenset(names), (option if isinstance(option, str) else ", ".join(names))[:_LONGEST]
    for target in contents.pairs:
        if not matches(option, known, target, layers):
            what = "has tensors, but target_modules does not name it: peft would skip them"
            yield Problem("not-targeted", contents.weights, target, what, _FIX, f"target_modules {said}", target)


def _flags(contents: Contents) -> Iterator[Problem]:
    config, file = contents.config, contents.weights
    linear = {target: parts for target, parts in contents.pairs.items() if "A" in parts or "B" in parts}
    for target, parts in linear.items():
        for part, option, missing, present in (
            ("magnitude", "use_dora", "no-magnitude", "magnitude-flag"),
            ("bias", "lora_bias", "no-bias", "bias-flag"),
        ):
            if config.get(option) and part not in parts:
                alone = option == "lora_bias" and not any(part in others for others in linear.values())
                what = f"not there, but {option} is true"
                yield Problem(missing, file, f"{target}.{PART_NAMES[part]}", what, _FIX if alone else "")
            if part in parts and not config.get(option):
                what = f"there, but {option} is not true: peft would skip it"
                yield Problem(
                    present, file, f"{target}.{PART_NAMES[part]}", what, f'Set "{option}" to true{_if_mendable(option, linear)}'
                )


def _if_mendable(option: str, linear: Mapping[str, Part]) -> str:
    """peft has the flag for all modules, takes a missing bias for zeros, and refuses biases beside DoRA."""
    magnitudes = sum("magnitude" in parts for parts in linear.values())
    mendable = magnitudes == len(linear) if option == "use_dora" else not magnitudes
    return f"; {_FIX}" if mendable else ""


def _whole_tensors(contents: Contents) -> Iterator[Problem]:
    saved = contents.names("modules_to_save")
    for name in contents.replaced:
        module, _, kind = name.rpartition(".")
        named = any(f".{item}." in f".{module}." for item in saved)
        if not named and not (kind == "bias" and contents.config.get("bias", "none") != "none"):
            what = "loaded over the base's own, for every adapter; modules_to_save does not name it"
            yield Problem("overwrites-base", contents.weights, name, what, f'Add "{module}" to modules_to_save, or drop it')


def _token_rows(contents: Contents) -> Iterator[Problem]:
    for target, tensor in contents.rows.items():
        ids = contents.row_ids[target]
        if len(tensor.shape) != 2 or len(ids) != tensor.shape[0]:
            what = f"{len(ids)} token ids, but the rows of {target} have shape {tensor.shape}"
            rows = (f"{len(ids)} rows", str(tensor.shape))
            yield Problem("token-rows", peft.CONFIG, "trainable_token_indices", what, "", *rows)


# Of the bits of a float without its sign, as an unsigned integer: everything from here on is infinite or NaN.
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
        for name, start, end, most in zip(values.names, values.starts, ends, _largest_each(values), strict=True):
            bad = _count_non_finite(values.array[start:end]) if most >= _INFINITE[dtype][2] else 0
            if name == last[0]:  # another piece of a large one
                last = (name, last[1] + end - start, max(last[2], most), last[3] + bad)
                continue
            if last[1]:
                yield last
            last = (name, end - start, most, bad)
    if last[1]:
        yield last


def _largest_each(values: Values) -> list[int]:
    if len(values.names) == 1:
        return [largest_bits(values.array)[0]]
    dtype, mask, _ = _INFINITE[dtypes.name_of(values.array.dtype)]
    bits = values.array.view(dtype)
    found: list[int] = np.maximum.reduceat(bits & bits.dtype.type(mask), values.starts).tolist()
    return found


def _count_non_finite(array: np.ndarray) -> int:
    return int(array.size - np.count_nonzero(np.isfinite(array.astype(np.float64))))
