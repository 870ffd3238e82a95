"""Check that an adapter is consistent: its tensors with each other, and its config with its tensors."""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Meta, StackedLowRank, layers_of_classifier
from adapterhub_converters.containers.safetensors_header import TensorKind
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft.tensor_keys import PREFIX
from adapterhub_converters.lazy_imports import np

from .contents import PART_NAMES, Contents, Parts, Values
from .report import Problem, RepeatedProblem
from .target_modules import is_within

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

_LARGE_SCALE = 64  # of the delta; trainers' defaults are 1 to 4
_MAX_SHOWN = 300  # characters of a config's value that are worth repeating


def internal_problems(contents: Contents) -> Iterator[Problem | RepeatedProblem]:
    """Yield the problems that headers and config show; no values are read."""
    if contents.unread is not None:
        message = f"cannot check: {contents.unread.reason}"
        yield Problem("not-understood", "" if contents.unread.format == "gguf" else contents.weights, "", message)
    if not contents.ordered:
        message = "llama.cpp permutes the rows of q and k by the number of heads, which this file does not have"
        yield Problem("order-unknown", contents.weights, "", message, "Name its base model")
    yield from _names(contents)
    if contents.adapter is not None and (contents.adapter.meta.family or contents.adapter.meta.program):
        yield Problem("image-model", contents.weights, "", _image_model(contents.adapter.meta))
    # Modules of equal shapes share one mapping, so each is checked once, however many modules there are.
    faults = {id(parts): list(_pair(contents.weights, parts)) for parts, _ in contents.distinct_parts}
    if any(faults.values()):
        yield from _repeat_by_code((target, faults[id(parts)]) for target, parts in contents.pairs.items())
    floats = contents.unread is None and not contents.is_tuned  # others may well have integers, which their reader checks
    # Each kind of tensor is checked once and its problems repeated by name.
    wrong = {kind: list(_kind(contents.weights, kind, floats=floats)) for kind in contents.kinds()}
    if any(wrong.values()):
        yield from _repeat_by_code((name, wrong[kind]) for name, kind in contents.tensors())
    if contents.format == "peft" and contents.unread is None:
        yield from _config(contents)
        if contents.config.get("peft_type") == "XLORA":
            yield from _classifier(contents)


def _classifier(contents: Contents) -> Iterator[Problem]:
    """Yield the problems of X-LoRA's classifier: peft 0.21 saves none of its layers whose number is the name of an adapter."""
    layers, layerwise = layers_of_classifier(contents.config), bool(contents.config.get("layerwise_scalings"))
    if not layers:
        yield Problem("classifier", peft.CONFIG, "", "the config does not have the sizes of the classifier")
    for place, (outputs, inputs) in layers.items():
        name = f"internal_xlora_classifier.layers.{place}"
        change = contents.tuned.get(name)
        shapes = {part: tensor.shape for part, tensor in change.parts()} if change else {}
        weight, bias = shapes.get("weight", ()), shapes.get("bias", ())
        rows = weight[0] if layerwise and place == max(layers) and len(weight) == 2 and not weight[0] % outputs else outputs
        if not change:
            hint = "Save it again with every layer of the classifier: this is a defect of peft 0.21"
            yield Problem("classifier", contents.weights, name, "is missing: peft would draw it at random", hint)
        elif (weight, bias) != ((rows, inputs), (rows,)):
            message = f"weight {weight} and bias {bias}, by the config {(outputs, inputs)}"
            yield Problem("classifier", contents.weights, name, message, "", str((outputs, inputs)), str(weight))
    unexpected = set(contents.tuned) - {f"internal_xlora_classifier.layers.{place}" for place in layers}
    for name in sorted(unexpected) if layers else ():
        yield Problem("unknown-tensor", contents.weights, name, "a layer that the classifier of the config does not have")


def earlier_problems(contents: Contents, base: BaseSpec | None) -> Iterator[Problem]:
    """Yield the problem of experts that an earlier peft saved; its `got` is the verdict of today's peft."""
    if contents.format != "peft" or contents.unread is not None or contents.config.get("peft_type") != "LORA":
        return
    # Only adapters with experts can have this problem.
    if not any(isinstance(delta, StackedLowRank) for delta in contents.other_deltas.values()) and (
        base is None or not any(peft.expert_place(target) for target in contents.pairs)
    ):
        return
    headers = {path: file.header for path, file in contents.files.items()}
    with contextlib.suppress(AdapterhubError):  # which other checks report
        adapter = peft.parse_shapes(contents.config_text, headers, location=str(contents.path), base=base)
        if outdated := peft.layout_problem(adapter, base):
            yield Problem("old-experts", contents.weights, "", outdated.reason, got=outdated.verdict, repairable=True)


def _image_model(meta: Meta) -> str:
    """Return a description of the image models that an adapter is for."""
    model = meta.family or "image models of a family that neither its names nor its header tell"
    return f"an adapter of {model}{f', saved by {meta.program}' if meta.program else ''}"


def _names(contents: Contents) -> Iterator[Problem | RepeatedProblem]:
    """Yield the names of tensors that peft would skip or that are of unknown kind."""
    file = contents.weights
    if contents.renamed:
        key, name = contents.renamed[0]
        message = f"{len(contents.renamed)} names that peft would skip; it would load this one as {name}"
        yield Problem("key-prefix", file, key, message, repairable=True)
    prefixed = [key for key in contents.unknown if key.startswith(PREFIX) or contents.pairs]
    unknown = Problem("unknown-tensor", file, "", "a tensor of unknown kind", "Remove it")
    yield RepeatedProblem("unknown-tensor", prefixed, lambda key: unknown._replace(name=key))
    if not contents.pairs:
        hint = "Save it with peft's save_pretrained"
        bare = Problem("key-prefix", file, "", "the name does not begin with base_model.model.", hint, repairable=True)
        others = [key for key in contents.unknown if not key.startswith(PREFIX)]
        yield RepeatedProblem("key-prefix", others, lambda key: bare._replace(name=key))


def _repeat_by_code(named: Iterable[tuple[str, Sequence[Problem]]]) -> Iterator[RepeatedProblem]:
    """Repeat problems for modules or tensors, given each name and the problems of its kind, to which it is prepended."""
    by_code: dict[str, list[tuple[str, Problem]]] = defaultdict(list)
    for name, faults in named:
        for fault in faults:
            by_code[fault.code].append((name, fault))
    for code, problems in by_code.items():
        yield RepeatedProblem(code, problems, lambda item: item[1]._replace(name=item[0] + item[1].name))


def _kind(file: str, kind: TensorKind, *, floats: bool) -> Iterator[Problem]:
    """Yield the problems of all tensors of a kind, without their names."""
    if 0 in kind.shape:
        hint = "Save again with the weights gathered (stage3_gather_16bit_weights_on_model_save)"
        yield Problem("empty-tensor", file, "", f"shape {kind.shape}", hint, got=str(kind.shape))
    if floats and kind.dtype not in dtypes.FLOATS:
        hint = "Adapters are F32, BF16 or F16"
        yield Problem("not-floats", file, "", f"dtype {kind.dtype}", hint, "F32, BF16 or F16", kind.dtype)


def _pair(file: str, parts: Parts) -> Iterator[Problem]:
    """Yield the problems of a module by the names and shapes of its parts; the problems' names lack that of the module."""
    # peft names the halves of an embedding's pair `lora_embedding_A` and `lora_embedding_B`.
    prefix = "embedding_" if any(part.startswith("embedding_") for part in parts) else ""
    first, second = parts.get(f"{prefix}A"), parts.get(f"{prefix}B")
    for half, other_half in ((f"{prefix}A", f"{prefix}B"), (f"{prefix}B", f"{prefix}A")):
        if half not in parts:
            message = f"{PART_NAMES[half]} is missing" + (f", {PART_NAMES[other_half]} is not" if other_half in parts else "")
            yield Problem("missing-half", file, f".{PART_NAMES[half]}", message, "Save the adapter again")
    for part, tensor in parts.items():
        if part in (f"{prefix}A", f"{prefix}B") and len(tensor.shape) != 2:
            message = f"shape {tensor.shape}, not a matrix"
            yield Problem("not-a-matrix", file, f".{PART_NAMES[part]}", message, "", "2 dimensions", str(tensor.shape))
    # The checks below compare the halves, so both must be matrices.
    if first is None or second is None or len(first.shape) != 2 or len(second.shape) != 2 or 0 in first.shape:
        return
    if first.shape[0] != second.shape[1]:
        message = f"rank {first.shape[0]} in lora_A {first.shape}, rank {second.shape[1]} in lora_B {second.shape}"
        hint = "The two come from different adapters, or one is transposed"
        yield Problem("rank-differs", file, "", message, hint, str(first.shape[0]), str(second.shape[1]))
    for part in ("magnitude", "bias"):
        if part in parts and parts[part].shape != (second.shape[0],):
            message = f"shape {parts[part].shape}, but the module has {second.shape[0]} output features"
            expected = f"({second.shape[0]},)"
            yield Problem("part-shape", file, f".{PART_NAMES[part]}", message, "", expected, str(parts[part].shape))


def _config(contents: Contents) -> Iterator[Problem | RepeatedProblem]:
    """Yield the problems of PEFT's config, alone and with the tensors."""
    config, file = contents.config, peft.CONFIG
    try:
        peft.check_config(config, file)
    except AdapterhubError as error:
        yield Problem("unsupported", file, "", error.what, error.hint, cause=error)
        return
    for key in peft.unknown_keys(config):
        hint = "Remove it, or make sure that it changes nothing in the program that wrote it"
        yield Problem("unknown-key", file, key, peft.UNKNOWN_KEY, hint)
    try:
        yield from _ranks(contents)
        yield from _patterns(contents)
    except AdapterhubError as error:
        yield Problem("unsupported", file, "", error.what, error.hint, cause=error)
    yield from _flags(contents)
    if config["peft_type"] != "LN_TUNING":
        yield from _whole_tensors(contents)
    yield from _token_rows(contents)
    yield from _unusual(contents)
    init = config.get("init_lora_weights")
    if peft.residual_init(init):
        message = f'init_lora_weights "{init}" changed the base; without the initial adapter the delta is wrong'
        hint = "Save with peft's path_initial_model_for_weight_conversion"
        yield Problem("initial-adapter", file, "init_lora_weights", message, hint)
    if contents.pairs and config.get("lora_alpha") == 0 and not config.get("alpha_pattern"):
        yield Problem("does-nothing", file, "lora_alpha", "is 0: the adapter changes nothing")


def _ranks(contents: Contents) -> Iterator[Problem]:
    """Yield ranks on which config and tensors disagree: peft builds modules from the config, then loads tensors into them."""
    patterns: Mapping[str, int] = contents.config.get("rank_pattern") or {}
    matching = contents.matching("rank_pattern")
    if not matching and set(contents.ranks.values()) <= {contents.config.get("r", 8)}:
        return
    for target, rank in contents.ranks.items():
        keys = matching.get(target)
        configured = patterns[keys[0]] if keys else contents.config.get("r", 8)
        if configured != rank:
            source = f'rank_pattern "{keys[0]}"' if keys else '"r"'
            hint = f'Set "r" to {rank}' if not patterns else f"Give {target} the rank {rank} in rank_pattern"
            message = f"rank {rank}, but {source} is {configured}"
            yield Problem("rank-config", contents.weights, target, message, hint, str(configured), str(rank), repairable=True)


def _patterns(contents: Contents) -> Iterator[Problem]:
    """Yield patterns that overlap with different values, or match no module."""
    for option in ("rank_pattern", "alpha_pattern"):
        patterns, used = contents.config.get(option) or {}, set[str]()
        for target, keys in contents.matching(option).items():
            used.update(keys)
            if len(keys) > 1 and len({patterns[key] for key in keys}) > 1:
                message = f'"{keys[0]}" and "{keys[1]}" both match {target}; the first in the file applies: {patterns[keys[0]]}'
                hint = "Use whole paths: peft sorts patterns when it saves"
                yield Problem("pattern-overlap", peft.CONFIG, option, message, hint, repairable=option == "rank_pattern")
        for key in sorted(set(patterns) - used):
            yield Problem("pattern-unused", peft.CONFIG, option, f'"{key}" matches no module of the adapter')


def _flags(contents: Contents) -> Iterator[Problem]:
    """Yield disagreements of `use_dora` and `lora_bias` with the tensors."""
    counts = Counter[str]()
    for parts, count in contents.distinct_parts:
        if "A" in parts or "B" in parts:
            counts.update(dict.fromkeys((*parts, "any"), count))
    # peft has one flag for all modules, takes a missing bias for zeros, and refuses biases with DoRA.
    all_dora, no_bias = counts["magnitude"] == counts["any"], not counts["bias"]
    yield from _flag(contents, "magnitude", "use_dora", missing=("no-magnitude", False), extra=("magnitude-flag", all_dora))
    yield from _flag(contents, "bias", "lora_bias", missing=("no-bias", no_bias), extra=("bias-flag", not counts["magnitude"]))


def _flag(
    contents: Contents, part: str, option: str, *, missing: tuple[str, bool], extra: tuple[str, bool]
) -> Iterator[Problem]:
    """Yield modules without a part although the option is set, or with one although it is not.

    Args:
        missing: The code for a missing part, and whether that is repairable.
        extra: The same for a part that the option does not announce.
    """
    flag = bool(contents.config.get(option))
    code, repairable = missing if flag else extra
    message = f"missing, but {option} is true" if flag else f"present, but {option} is not true: peft would skip it"
    hint = "" if flag else f'Set "{option}" to true'
    for target, parts in contents.pairs.items():
        if flag != (part in parts) and ("A" in parts or "B" in parts):
            name = f"{target}.{PART_NAMES[part]}"
            yield Problem(code, contents.weights, name, message, hint, repairable=repairable)


def _whole_tensors(contents: Contents) -> Iterator[RepeatedProblem]:
    """Yield whole tensors whose modules `modules_to_save` does not name."""
    saved, biases = frozenset(contents.names("modules_to_save")), contents.config.get("bias", "none") != "none"
    split = ((name, *name.rpartition(".")) for name in contents.replaced)
    wrong = [name for name, module, _, kind in split if not is_within(saved, module) and not (kind == "bias" and biases)]

    def problem(name: str) -> Problem:
        message = "replaces the base's own tensor for every adapter; modules_to_save does not name it"
        hint = f'Add "{name.rpartition(".")[0]}" to modules_to_save, or remove it'
        return Problem("overwrites-base", contents.weights, name, message, hint)

    yield RepeatedProblem("overwrites-base", wrong, problem)


def _unusual(contents: Contents) -> Iterator[Problem]:
    """Yield values that are valid but rarely intended."""
    config, ranks = contents.config, contents.ranks.values()
    if ranks:
        least, alpha = min(ranks), config.get("lora_alpha", 8)
        # The module of the least rank has the largest scale.
        scale = alpha / (math.sqrt(least) if config.get("use_rslora") else least)
        if scale > _LARGE_SCALE:
            message = f"{alpha:g} with rank {least} multiplies the delta by {scale:g}"
            yield Problem("scale-large", peft.CONFIG, "lora_alpha", message)
    name = config.get("base_model_name_or_path") or ""
    if name.startswith(("/", "./", "../", "~", "\\")) or name[1:3] in (":\\", ":/"):
        message = f"{name[:_MAX_SHOWN]} is a path, which others do not have"
        yield Problem("local-base-name", peft.CONFIG, "base_model_name_or_path", message, "Write the model's name on its hub")


def _token_rows(contents: Contents) -> Iterator[RepeatedProblem]:
    """Yield tables whose saved rows do not match `trainable_token_indices` in number."""

    def problem(target: str) -> Problem:
        count, shape = len(contents.row_ids[target]), contents.rows[target].shape
        message = f"{count} token ids, but the rows of {target} have shape {shape}"
        return Problem("token-rows", peft.CONFIG, "trainable_token_indices", message, "", f"{count} rows", str(shape))

    shapes = ((target, len(contents.row_ids[target]), kind.shape) for target, kind in contents.rows.items())
    wrong = [target for target, count, shape in shapes if len(shape) != 2 or count != shape[0]]
    yield RepeatedProblem("token-rows", wrong, problem)


# How to view a float as an unsigned integer, the mask of its sign, and the integer from which on it is infinite or NaN.
_INFINITE: dict[str, tuple[str, int, int]] = {
    "F64": ("<u8", 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7FFF_FFFF, 0x7F80_0000),
    "F16": ("<u2", 0x7FFF, 0x7C00),
    "BF16": ("<u2", 0x7FFF, 0x7F80),
}
# The highest bytes of infinities, NaNs and the largest numbers, of either sign.
_HIGHEST_BYTES = dict.fromkeys(_INFINITE, b"\x7f\xff") | {"F16": bytes([*range(0x7C, 0x80), *range(0xFC, 0x100)])}
_MAX_BYTEWISE = 8 << 20  # bytes; these are searched in a quarter of the time that the import of numpy takes


def largest_bits(array: np.ndarray) -> tuple[int, int]:
    """Return the greatest magnitude in a flat piece of floats, as bits, and the bits at which infinity begins.

    Floats of one sign are ordered like their bits, so two maxima find zeros, infinities and NaNs at the speed of the cache,
    without a float operation or a copy: the signed one is that of the positive numbers, the unsigned one that of the negative.
    """
    dtype, mask, infinite = _INFINITE[dtypes.name_of(array.dtype)]
    bits = array.view(dtype)
    return max(int(bits.view(f"<i{bits.itemsize}").max()), int(bits.max()) & mask), infinite


def value_problems(contents: Contents) -> Iterator[Problem | RepeatedProblem]:
    """Yield tensors with NaN or infinity, and an adapter whose every lora_B is zero."""
    zeros, has_outputs = list[str](), any("B" in parts or "embedding_B" in parts for parts, _ in contents.distinct_parts)
    # Whole tensors, rows and other deltas change something, whatever lora_B holds.
    changes = not has_outputs or bool(contents.replaced or contents.rows or contents.other_deltas)
    wrong: dict[str, tuple[int, int]] = {}
    for name, size, largest, non_finite in _tensor_extremes(contents):
        if non_finite:
            wrong[name] = non_finite, size
        if not changes and largest == 0:
            zeros.append(name)
        elif not changes:
            changes = _is_output(contents, name)

    def problem(name: str) -> Problem:
        message = "{} of {} are NaN or infinite".format(*wrong[name])
        return Problem("non-finite", contents.weights, contents.label(name), message)

    yield RepeatedProblem("non-finite", list(wrong), problem)
    if not changes and (count := sum(_is_output(contents, name) for name in zeros)):
        message = f"all {count} lora_B are zero: the adapter changes nothing"
        yield Problem("does-nothing", contents.weights, "", message, "It was saved before training")


def _is_output(contents: Contents, name: str) -> bool:
    """Return whether a tensor is the half of a pair that starts at zero."""
    return "_B" in name and contents.label(name).endswith((".lora_B", ".lora_embedding_B"))


def _tensor_extremes(contents: Contents) -> Iterator[tuple[str, int, int, int]]:
    """Yield name, number of values, largest bits and number of non-finite values of each tensor of floats."""
    last = ("", 0, 0, 0)
    size = sum(kind.size * count for kind, count in contents.kinds().items())
    is_small = contents.adapter is None and size <= _MAX_BYTEWISE
    for values in contents.values():
        if values.dtype not in _INFINITE:
            continue
        ordinary = _largest_of_ordinary(values) if is_small else None
        extremes = _largest_and_bad(values) if ordinary is None else (ordinary, [0] * len(ordinary))
        rows = zip(values.names, values.starts, values.ends, *extremes, strict=True)
        for name, start, end, largest, non_finite in rows:
            if name == last[0]:  # another piece of a large one
                last = (name, last[1] + end - start, max(last[2], largest), last[3] + non_finite)
                continue
            if last[1]:
                yield last
            last = (name, end - start, largest, non_finite)
    if last[1]:
        yield last


def _largest_of_ordinary(values: Values) -> list[int] | None:
    """Return 0 for each tensor of zeros and 1 for each other one, by its bytes alone, without an import of numpy.

    None if a number may be infinite or NaN, or a zero negative, which in a trained adapter none is.
    """
    width = dtypes.BITS[values.dtype] // 8
    highest_bytes = bytes(values.data[width - 1 :: width])
    if len(highest_bytes.translate(None, _HIGHEST_BYTES[values.dtype])) < len(highest_bytes):
        return None
    largest = []
    for start, end in zip(values.starts, values.ends, strict=True):
        data = bytes(values.data[start * width : end * width])
        is_zero = not data.strip(b"\0\x80")
        if is_zero and b"\x80" in data:
            return None
        largest.append(int(not is_zero))
    return largest


def _largest_and_bad(values: Values) -> tuple[list[int], list[int]]:
    """Return the largest bits and the number of non-finite values of each tensor."""
    if len(values.names) == 1:
        array = values.array[values.starts[0] : values.ends[0]]
        most, infinite = largest_bits(array)
        return [most], [_count_non_finite(array) if most >= infinite else 0]
    dtype, mask, infinite = _INFINITE[values.dtype]
    bits = values.array.view(dtype)
    bits = bits & bits.dtype.type(mask)
    bounds = np.column_stack((values.starts, values.ends)).ravel()
    # `reduceat` does not take an index past the end, and implies it.
    if bounds[-1] == bits.size:
        bounds = bounds[:-1]
    # Every second segment lies between two tensors and belongs to another dtype.
    largest: list[int] = np.maximum.reduceat(bits, bounds)[::2].tolist()
    if max(largest) < infinite:
        return largest, [0] * len(largest)
    return largest, np.add.reduceat((bits >= infinite).astype(np.int64), bounds)[::2].tolist()


def _count_non_finite(array: np.ndarray) -> int:
    return int(array.size - np.count_nonzero(np.isfinite(array.astype(np.float64))))
