"""The common part of trainers that fuse LoRA into a model: one rank and one alpha, and the same modules in each layer.

torchtune, litgpt and Megatron have a few options that select the modules of every layer, so an adapter of theirs is a
set of pairs of one rank and one scale. Smaller ranks are padded with zeros, other scales multiplied into `lora_B`,
and layers without a delta get zeros. These files do not record the alpha: it comes from the header that we write,
from what the trainer left next to the file, or from the caller; it is never guessed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters import dtypes, yaml_lines
from adapterhub_converters.adapter import Adapter, Delta, Loss, LowRank, Meta, TensorLoss, beyond_deltas
from adapterhub_converters.architectures.names import Order, in_layer, layer_of
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.formats import file_alpha, source_config

SETTINGS = "adapterhub.settings"
"""Our key of the header's metadata: the trainer's own options that are needed to read the file."""
_LAYER = "model.layers"


# ---- The base


def known_base(base: BaseSpec | None, where: str, maker: str, classes: Iterable[str]) -> BaseSpec:
    """Return `base`, if `maker`'s names for the modules of its class are known; else RefusedError."""
    if base is None:
        what = f"{maker}'s names of modules, and the order of their rows, depend on the base"
        raise RefusedError(where, what, "Name its base model", code="base-required")
    if base.architecture not in classes:
        known = ", ".join(sorted(classes))
        raise RefusedError(
            where,
            f"{base.architecture} has no verified mapping to {maker}'s names",
            f"Known: {known}",
            code="unsupported-architecture",
        )
    return base


def number(base: BaseSpec, key: str) -> int:
    """Return a positive number in the base's config; RefusedError without one."""
    value = base.config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        what = (
            f'its config has no "{key}"'
            if value is None
            else f'"{key}" in its config is {str(value)[:40]}, not a number above 0'
        )
        raise RefusedError(base.where, what, "Name a base whose config has it")
    return value


def heads(base: BaseSpec) -> tuple[int, int, int]:
    """Return the numbers of query heads and of key heads, and the rows of one head."""
    queries = number(base, "num_attention_heads")
    keys = number(base, "num_key_value_heads") if base.config.get("num_key_value_heads") is not None else queries
    size = number(base, "head_dim") if base.config.get("head_dim") is not None else number(base, "hidden_size") // queries
    if not size or queries % keys:
        what = f"{queries} attention heads of size {size} cannot be divided evenly into {keys} groups"
        raise RefusedError(base.where, what, "Name a base with a valid config")
    return queries, keys, size


def shape(base: BaseSpec, kind: str) -> tuple[int, int]:
    """Return `(out, in)` of a kind of module (`self_attn.q_proj`, `lm_head`), by the base's config."""
    hidden = number(base, "hidden_size")
    if kind == "lm_head":
        return number(base, "vocab_size"), hidden
    if kind.startswith("mlp."):
        wide = number(base, "intermediate_size")
        return (hidden, wide) if kind == "mlp.down_proj" else (wide, hidden)
    queries, keys, size = heads(base)
    if kind == "self_attn.o_proj":
        return hidden, queries * size
    return (queries if kind == "self_attn.q_proj" else keys) * size, hidden


def kind_of(target: str) -> str:
    """Return the kind of a module: `self_attn.q_proj` for `model.layers.0.self_attn.q_proj`; outside the layers its own name."""
    return in_layer(target) or target


# ---- Writing


@dataclass(frozen=True, eq=False)
class Pair:
    """One delta in the file's layout: `lora_A` `(rank, in)`, `lora_B` `(out, rank)` with its rows in the file's order."""

    lora_A: np.ndarray
    lora_B: np.ndarray
    magnitude: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class FusedAdapter:
    """An adapter as pairs of one rank and one scale of `alpha / rank`.

    Attributes:
        pairs: Target to pair.
        rank: The rank of all pairs.
        alpha: The alpha of all pairs.
        losses: The loss report's lines.
        notes: Its notes.
        lines: How each pair was written, to recover the source.
        ulps: The last places of the lines that have them.
    """

    pairs: Mapping[str, Pair]
    rank: int
    alpha: float
    losses: tuple[TensorLoss, ...]
    notes: tuple[str, ...]
    lines: tuple[source_config.Line, ...]
    ulps: tuple[np.ndarray, ...]


def problems(adapter: Adapter, maker: str, kinds: Iterable[str], *, dora: bool, tied: bool) -> list[str]:
    """Reasons why `maker`'s format cannot express an adapter.

    Args:
        adapter: The adapter.
        maker: The trainer's name.
        kinds: The kinds of modules that can have LoRA.
        dora: Whether the format has DoRA, which is then on all modules or on none.
        tied: Whether the base ties its output layer to its embedding table, and the trainer has no LoRA on such a layer.
    """
    found = beyond_deltas(adapter, f"{maker}'s adapters")
    if tied and "lm_head" in adapter.deltas:
        found.append(f"lm_head: the base ties it to the embedding table, and {maker} has no LoRA on tied layers")
    known = frozenset(kinds)
    any_dora = any(getattr(delta, "magnitude", None) is not None for delta in adapter.deltas.values())
    for target, delta in sorted(adapter.deltas.items()):
        found += [f"{target}: {reason}" for reason in _wrong(target, delta, maker, known, can=dora, all_dora=any_dora)]
    return found


def _wrong(target: str, delta: Delta, maker: str, known: frozenset[str], *, can: bool, all_dora: bool) -> Iterator[str]:
    if not isinstance(delta, LowRank):
        yield f"a delta of kind {type(delta).__name__} cannot be expressed in {maker}'s adapters"
        return
    kind = kind_of(target)
    if kind not in known or (kind != target) != (kind != "lm_head"):
        yield f"not a module that {maker} is known to have LoRA on"
    for name, array in (("lora_A", delta.lora_A), ("lora_B", delta.lora_B)):
        if dtypes.name_of(array.dtype) not in ("F32", "F16", "BF16"):
            yield f"{name} is {array.dtype}, in which {maker} does not train"
    if delta.bias is not None:
        yield f"a bias cannot be expressed in {maker}'s adapters"
    if delta.transposed_base:
        yield f"the base stores it transposed, and {maker} is not known to support such modules"
    if delta.magnitude is not None and not can:
        yield f"DoRA cannot be expressed in {maker}'s adapters"
    elif all_dora and can and delta.magnitude is None:
        yield f"{maker}'s adapters have DoRA on all modules or on none"


Named = Callable[[str], tuple[str, Order]]
"""Target to the file's name of the module and the order of its rows."""


def fuse(adapter: Adapter, named: Named, reorder: Callable[[np.ndarray, Order], np.ndarray], *, whole: bool) -> FusedAdapter:
    """Convert an adapter without `problems`; `whole` if the alpha has to be a whole number."""
    deltas = {t: d for t, d in sorted(adapter.deltas.items()) if isinstance(d, LowRank)}
    rank = max(delta.r for delta in deltas.values())
    plan = _plan({target: delta.scaling * rank for target, delta in deltas.items()}, whole=whole)
    pairs: dict[str, Pair] = {}
    losses: list[TensorLoss] = []
    lines: list[source_config.Line] = []
    ulps: list[np.ndarray] = []
    for target, delta in deltas.items():
        stem, order = named(target)
        folded = file_alpha.folded(f"{target}.lora_B", delta.lora_B, plan.factors[target])
        own = (TensorLoss(f"{target}.lora_A", Loss.EXACT), folded.loss)
        losses += own if delta.r == rank else [file_alpha.padded_line(line, rank) for line in own]
        if delta.magnitude is not None:
            losses.append(TensorLoss(f"{target}.magnitude", Loss.EXACT))
        ulps += [] if folded.ulps is None else [folded.ulps]
        block = source_config.Block(delta.r, len(delta.lora_B), 0, dtypes.name_of(delta.lora_A.dtype), rank)
        dtype = dtypes.name_of(delta.lora_B.dtype)
        lines.append(source_config.Line(stem, target, plan.factors[target], dtype, order, folded.ulps is not None, block))
        lora_A, lora_B = file_alpha.padded(delta.lora_A, rank, 0), file_alpha.padded(folded.lora_B, rank, 1)
        magnitude = None if delta.magnitude is None else reorder(delta.magnitude.reshape(-1), order)
        pairs[target] = Pair(lora_A, reorder(lora_B, order), magnitude)
    return FusedAdapter(pairs, rank, plan.common, tuple(losses), (*adapter.notes, *plan.notes), tuple(lines), tuple(ulps))


def _plan(needed: Mapping[str, float], *, whole: bool) -> file_alpha.Plan:
    found = file_alpha.plan(needed, np.dtype(np.float64), "alpha") or file_alpha.Plan(0.0, dict.fromkeys(needed, 1.0))
    if not whole or found.common.is_integer():
        return found
    common = float(max(1, round(found.common)))
    factors = {target: wanted / common if wanted else file_alpha.ALMOST_NOTHING for target, wanted in needed.items()}
    return file_alpha.Plan(
        common, factors, (*found.notes, f"alpha {found.common:g} is not a whole number: the file has {common:g}")
    )


def everywhere(made: FusedAdapter, base: BaseSpec, groups: Iterable[tuple[str, ...]], maker: str) -> FusedAdapter:
    """Return a copy with zeros wherever `maker` has a pair: if any layer has one of a group of kinds, every layer has all."""
    kinds = {kind_of(target) for target in made.pairs}
    layers = number(base, "num_hidden_layers")
    deep = [target for target in made.pairs if (layer_of(target) or 0) >= layers]
    if deep:
        raise RefusedError(deep[0], f"the base has {layers} layers")
    wanted = [
        target
        for group in groups
        if kinds & set(group)
        for kind in group
        for target in (["lm_head"] if kind == "lm_head" else [f"{_LAYER}.{n}.{kind}" for n in range(layers)])
    ]
    missing = [target for target in wanted if target not in made.pairs]
    if not missing:
        return made
    if any(pair.magnitude is not None for pair in made.pairs.values()):
        reason = f"has no delta, but {maker} has DoRA on every module of a kind, and its magnitude would be the base's norm"
        raise RefusedError(missing[0], reason)
    like = next(iter(made.pairs.values()))
    zeros = {
        target: Pair(np.zeros((made.rank, columns), like.lora_A.dtype), np.zeros((rows, made.rank), like.lora_A.dtype))
        for target in missing
        for rows, columns in [shape(base, kind_of(target))]
    }
    note = f"{len(missing)} modules without a delta get zeros, because {maker} has one on every module of a kind"
    return dataclasses.replace(made, pairs={**made.pairs, **zeros}, notes=(*made.notes, note))


def write(
    path: Path, tensors: Mapping[str, np.ndarray], adapter: Adapter, made: FusedAdapter, settings: Mapping[str, object]
) -> None:
    """Write the file, with the options that its trainer needs and the source's config in the header."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    whole = {name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())}
    config = source_config.keys(adapter, made.lines, source_config.payload_digest(whole, text), made.ulps)
    safetensors_file.write(path, whole, {"format": "pt", SETTINGS: text, **config})


# ---- Reading


@dataclass(frozen=True, eq=False)
class File:
    """A file's tensors and header.

    Attributes:
        where: Its path, for errors.
        tensors: By name.
        metadata: That of the header.
        settings: The trainer's options in it.
        taken: Tensor to a mask of the rows that were read.
    """

    where: str
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    settings: Mapping[str, Any]
    taken: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def has_source(self) -> bool:
        """Whether the source's config is in the header and belongs to these tensors."""
        text = self.metadata.get(SETTINGS, "")
        return source_config.belongs(self.metadata, source_config.payload_digest(dict(sorted(self.tensors.items())), text))

    @property
    def notes(self) -> tuple[str, ...]:
        """A note if the source's config was ignored."""
        return (source_config.IGNORED,) if source_config.is_there(self.metadata) and not self.has_source else ()

    def tensor(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Rows of a matrix, or elements of a vector, which are recorded as taken."""
        if name not in self.tensors:
            raise FormatError(self.where, f"adapterhub.source.tensors names {name!r}, which is not in the file")
        array = self.tensors[name]
        self.taken.setdefault(name, np.zeros(len(array), bool))[rows] = True
        return array[rows]


def opened(path: Path) -> File:
    """Return the file at `path`."""
    with safetensors_file.SafetensorsFile(path) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
        metadata = dict(file.header.metadata)
    return file_of(str(path), tensors, metadata)


def file_of(where: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> File:
    """Return a file of tensors that were read already; FormatError unless they are floats of one to three dimensions."""
    for name, array in tensors.items():
        if array.ndim not in (1, 2, 3) or 0 in array.shape or dtypes.name_of(array.dtype) not in dtypes.FLOATS:
            raise FormatError(where, f"tensor {name!r} is {array.dtype} {array.shape}, which is not a factor")
    settings = json_file.parse_object(metadata.get(SETTINGS, "{}"), f"{where}: {SETTINGS}")
    return File(where, tensors, metadata, settings)


def pair(name: str, lora_A: np.ndarray, lora_B: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Both factors, checked to be a pair."""
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise FormatError(where, f"{name}: {lora_A.shape} and {lora_B.shape} are not a pair")
    return lora_A, lora_B


def restored(
    file: File, padded: Callable[[source_config.Line], tuple[np.ndarray, np.ndarray]], *, alpha: float, tail: str
) -> Adapter:
    """Return the source's adapter.

    Args:
        file: The file, with the source's config.
        padded: A line to its pair of the file's rank, with rows in the base's order.
        alpha: The file's alpha.
        tail: The suffix of the names of `lora_B`.
    """
    lines = source_config.lines_of(file.metadata, file.where)

    def own(line: source_config.Line) -> tuple[np.ndarray, np.ndarray]:
        if line.block is None:
            what = f"adapterhub.source.tensors has no rank for {line.target!r}"
            raise FormatError(file.where, what, source_config.AGAIN)
        lora_A, lora_B = padded(line)
        r = line.block.r
        if line.block.rank != len(lora_A) or r > len(lora_A) or lora_A[r:].tobytes().strip(b"\0"):
            raise FormatError(file.where, f"{line.target}: it is not a pair of rank {r} padded with zeros")
        if lora_B[:, r:].tobytes().strip(b"\0"):
            raise FormatError(file.where, f"{line.target}: it is not a pair of rank {r} padded with zeros")
        # A trainer that fuses modules may require one dtype for several.
        own_A = lora_A[:r].astype(dtypes.NUMPY[line.block.dtype_A], copy=False)
        return np.ascontiguousarray(own_A), np.ascontiguousarray(lora_B[:, :r])

    adapter = source_config.restored(file.metadata, lines, own, lambda r: alpha / r, file.where)
    for name, array in file.tensors.items():
        rest = array[~file.taken.get(name, np.zeros(len(array), bool))]
        if name.endswith(tail) and rest.tobytes().strip(b"\0"):
            what = f"adapterhub.source.tensors lacks rows of {name!r}, which have a delta"
            raise FormatError(file.where, what, source_config.AGAIN)
    return adapter


def misplaced(file: File, line: source_config.Line) -> FormatError:
    """Return the error for a line of the source's config that is not of the trainer's layout."""
    what = (
        f"adapterhub.source.tensors has {line.target!r} as {line.stem[:80]!r} in the order {line.order}, which no such file has"
    )
    return FormatError(file.where, what, source_config.AGAIN)


def settled_alpha(file: File, key: str, recorded: Mapping[str, float], alpha: float | None) -> float:
    """Return the alpha of a file.

    Args:
        file: The file.
        key: The name of the alpha in its settings.
        recorded: The `alpha` that the trainer left next to the file, if it did.
        alpha: The caller's.

    Raises:
        RefusedError: There is none, or the caller's differs from the recorded one.
        FormatError: The recorded one is not a number in range.
    """
    found = [value for value in (file.settings.get(key), recorded.get("alpha")) if value is not None]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 2**40 for value in found):
        raise FormatError(file.where, f'"{key}" is {str(found[0])[:40]}, not a number in range')
    if found and alpha is not None and alpha != found[0]:
        what = f"its recorded alpha is {found[0]:g}, not {alpha:g}"
        raise RefusedError(file.where, what, "Leave out alpha", code="alpha-recorded")
    if not found and alpha is None:
        reason = "its alpha is not recorded anywhere, and the scale depends on it"
        raise RefusedError(file.where, reason, "Give the alpha it was trained with", code="alpha-required")
    return float(found[0]) if found else float(alpha or 0.0)


def check_rank(file: File, target: str, r: int, recorded: float | None) -> None:
    """FormatError for a pair of another rank than the trainer recorded next to the file: it scales by alpha / rank."""
    if recorded is not None and recorded != r:
        raise FormatError(file.where, f"{target}: rank {r} by its tensors, but {recorded:g} in the config next to the file")


def adapter_of(file: File, deltas: Mapping[str, Delta], base: BaseSpec) -> Adapter:
    """Return the adapter of a file that a trainer wrote."""
    return Adapter(deltas, meta=Meta(base_model=base.repo, revision=base.revision), notes=file.notes)


def scalars(path: Path, section: str = "") -> dict[str, str]:
    """Return the `key: value` lines of a YAML file as text: the top level, or the first level under `section:`."""
    if not path.is_file():
        return {}
    found: dict[str, str] = {}
    inside, depth = not section, 0
    for line in json_file.read_text(path).splitlines():
        inner = line.lstrip()
        pair = yaml_lines.key_of(inner)
        if not pair:
            continue
        indent, key, value = len(line) - len(inner), pair[0], yaml_lines.scalar(pair[1])
        if section and not indent:
            inside, depth = key == section, 0
        elif inside and (not section or indent == (depth := depth or indent)) and (section or not indent):
            found[key] = value
    return found


def numbers(found: Mapping[str, str], **keys: str) -> dict[str, float]:
    """Return the finite numbers among `scalars`, under the names of the keyword arguments, whose values are the keys."""
    values: dict[str, float] = {}
    for name, key in keys.items():
        try:
            value = float(found[key])
        except (KeyError, ValueError):
            continue
        if math.isfinite(value):
            values[name] = value
    return values
