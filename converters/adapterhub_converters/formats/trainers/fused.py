"""What trainers that build LoRA into a model have in common: one rank and one alpha for all, the same modules in each layer.

torchtune, litgpt and Megatron take a few options and give each layer what these say. So an adapter of theirs is a table of
pairs of one rank under one scale. Where an adapter needs more, ranks are filled with zeros, other scales are multiplied into
`lora_B`, and layers without a delta get one of zero. None of these files says its alpha: it comes from the header that we
write, from what the trainer left beside the file, or from who asks; it is never guessed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Delta, Kept, Loss, LowRank, Meta, beside_deltas
from adapterhub_converters.architectures.names import Order, in_layer, layer_of
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.formats import file_alpha, source_config

SETTINGS = "adapterhub.settings"
"""Our key of the header's metadata: the options that the trainer needs to read the file, in its own words."""
ALPHA_HINT = "Pass --alpha N, the alpha it was trained with"
_LAYER = "model.layers"


# --- the base


def known_base(base: BaseSpec | None, where: str, maker: str, classes: Iterable[str]) -> BaseSpec:
    """`base`, where `maker`'s names for the modules of its class are known."""
    if base is None:
        raise RefusedError(
            where,
            f"what {maker} calls a module, and in which order its rows are, depends on the base",
            "Name the base model",
            code="base-required",
        )
    if base.architecture not in classes:
        known = ", ".join(sorted(classes))
        raise RefusedError(where, f"{base.architecture} has no verified mapping to {maker}'s names", f"Known: {known}")
    return base


def number(base: BaseSpec, key: str) -> int:
    """A count that the base's config has to say."""
    value = base.config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise RefusedError(base.where, f'its config has no "{key}"', "Name a base model that has it")
    return value


def heads(base: BaseSpec) -> tuple[int, int, int]:
    """How many query heads and how many key heads, and the rows of one."""
    queries, size = number(base, "num_attention_heads"), base.config.get("head_dim")
    keys = number(base, "num_key_value_heads") if base.config.get("num_key_value_heads") is not None else queries
    if size is None:
        size = number(base, "hidden_size") // queries
    if not isinstance(size, int) or size < 1 or queries % keys:
        raise RefusedError(base.where, f"{queries} heads of {size} are not shared out evenly to {keys} groups")
    return queries, keys, size


def shape(base: BaseSpec, kind: str) -> tuple[int, int]:
    """`(out, in)` of a kind of module (`self_attn.q_proj`, `lm_head`) by the base's config."""
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
    """`self_attn.q_proj` of `model.layers.0.self_attn.q_proj`; itself outside of the layers."""
    return in_layer(target) or target


# --- writing


@dataclass(frozen=True, eq=False)
class Pair:
    """One delta as a file has it: `lora_A` `(rank, in)`, `lora_B` `(out, rank)` in the order of the file's rows."""

    lora_A: np.ndarray
    lora_B: np.ndarray
    magnitude: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Uniform:
    """An adapter as pairs of one rank under one scale of `alpha / rank`, and how to have the source again."""

    pairs: Mapping[str, Pair]
    rank: int
    alpha: float
    kept: tuple[Kept, ...]
    notes: tuple[str, ...]
    lines: tuple[source_config.Line, ...]
    ulps: tuple[np.ndarray, ...]


def problems(adapter: Adapter, maker: str, kinds: Iterable[str], *, dora: bool, tied: bool) -> list[str]:
    """What `maker` cannot say: all but plain deltas, or all of them DoRA where it has that, on its kinds of module.

    `tied`: whether the base has its output layer in its embedding table, and `maker` then no LoRA there.
    """
    found = beside_deltas(adapter, f"{maker}'s adapters")
    if tied and "lm_head" in adapter.deltas:
        found.append(f"lm_head: the base ties it to the embedding table, and {maker} has no LoRA on such a layer")
    known = frozenset(kinds)
    any_dora = any(getattr(delta, "magnitude", None) is not None for delta in adapter.deltas.values())
    for target, delta in sorted(adapter.deltas.items()):
        found += [f"{target}: {reason}" for reason in _wrong(target, delta, maker, known, can=dora, all_dora=any_dora)]
    return found


def _wrong(target: str, delta: Delta, maker: str, known: frozenset[str], *, can: bool, all_dora: bool) -> Iterator[str]:
    if not isinstance(delta, LowRank):
        yield f"a delta of the kind {type(delta).__name__} cannot be said in {maker}'s adapters"
        return
    kind = kind_of(target)
    if kind not in known or (kind != target) != (kind != "lm_head"):
        yield f"no module that {maker} is known to have a LoRA on"
    for name, array in (("lora_A", delta.lora_A), ("lora_B", delta.lora_B)):
        if dtypes.name_of(array.dtype) not in ("F32", "F16", "BF16"):
            yield f"{name} is {array.dtype}, which {maker} does not train in"
    if delta.bias is not None:
        yield f"a bias cannot be said in {maker}'s adapters"
    if delta.transposed_base:
        yield f"the base stores it transposed, and {maker} is not known to have such a module"
    if delta.magnitude is not None and not can:
        yield f"DoRA cannot be said in {maker}'s adapters"
    elif all_dora and can and delta.magnitude is None:
        yield f"an adapter of {maker}'s is DoRA in all its modules or in none"


Named = Callable[[str], tuple[str, Order]]
"""What a file calls a module, and the order that it has its rows in."""


def uniform(adapter: Adapter, named: Named, reorder: Callable[[np.ndarray, Order], np.ndarray], *, whole: bool) -> Uniform:
    """An adapter without `problems` as pairs of one rank and one alpha; `whole` if that alpha has to be a whole number."""
    deltas = {t: d for t, d in sorted(adapter.deltas.items()) if isinstance(d, LowRank)}
    rank = max(delta.r for delta in deltas.values())
    plan = _plan({target: delta.scaling * rank for target, delta in deltas.items()}, whole=whole)
    pairs: dict[str, Pair] = {}
    kept: list[Kept] = []
    lines: list[source_config.Line] = []
    ulps: list[np.ndarray] = []
    for target, delta in deltas.items():
        stem, order = named(target)
        folded = file_alpha.folded(f"{target}.lora_B", delta.lora_B, plan.factors[target])
        own = (Kept(f"{target}.lora_A", Loss.EXACT), folded.kept)
        kept += own if delta.r == rank else [_filled_up(line, rank) for line in own]
        if delta.magnitude is not None:
            kept.append(Kept(f"{target}.magnitude", Loss.EXACT))
        ulps += [] if folded.ulps is None else [folded.ulps]
        block = source_config.Block(delta.r, len(delta.lora_B), 0, dtypes.name_of(delta.lora_A.dtype), rank)
        dtype = dtypes.name_of(delta.lora_B.dtype)
        lines.append(source_config.Line(stem, target, plan.factors[target], dtype, order, folded.ulps is not None, block))
        lora_A, lora_B = _filled(delta.lora_A, rank, 0), _filled(folded.lora_B, rank, 1)
        magnitude = None if delta.magnitude is None else reorder(delta.magnitude.reshape(-1), order)
        pairs[target] = Pair(lora_A, reorder(lora_B, order), magnitude)
    return Uniform(pairs, rank, plan.common, tuple(kept), (*adapter.notes, *plan.notes), tuple(lines), tuple(ulps))


def _plan(needed: Mapping[str, float], *, whole: bool) -> file_alpha.Plan:
    found = file_alpha.plan(needed, np.dtype(np.float64), "alpha") or file_alpha.Plan(0.0, dict.fromkeys(needed, 1.0))
    if not whole or found.common.is_integer():
        return found
    common = float(max(1, round(found.common)))
    factors = {target: wanted / common if wanted else file_alpha.ALMOST_NOTHING for target, wanted in needed.items()}
    return file_alpha.Plan(
        common, factors, (*found.notes, f"alpha {found.common:g} is no whole number: the file has {common:g}")
    )


def _filled(array: np.ndarray, rank: int, axis: int) -> np.ndarray:
    missing = rank - array.shape[axis]
    if not missing:
        return array
    more = [array.shape[0], array.shape[1]]
    more[axis] = missing
    return np.concatenate([array, np.zeros(more, array.dtype)], axis)


def _filled_up(line: Kept, rank: int) -> Kept:
    note = f"filled with zeros to rank {rank}, recoverable bit for bit" + (f"; {line.note}" if line.note else "")
    return Kept(line.name, max(line.loss, Loss.REWRITTEN), note, line.error)


def everywhere(made: Uniform, base: BaseSpec, groups: Iterable[tuple[str, ...]], maker: str) -> Uniform:
    """The same with a pair of zeros wherever `maker` has one: for each group of kinds of which any layer has one."""
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
        reason = f"has no delta, {maker} has DoRA on every module of a kind, and its magnitude would be the base's own norm"
        raise RefusedError(missing[0], reason)
    like = next(iter(made.pairs.values()))
    zeros = {
        target: Pair(np.zeros((made.rank, columns), like.lora_A.dtype), np.zeros((rows, made.rank), like.lora_A.dtype))
        for target in missing
        for rows, columns in [shape(base, kind_of(target))]
    }
    note = f"{len(missing)} modules without a delta get one of zero, because {maker} has one on every module of a kind"
    return dataclasses.replace(made, pairs={**made.pairs, **zeros}, notes=(*made.notes, note))


def write(
    path: Path, tensors: Mapping[str, np.ndarray], adapter: Adapter, made: Uniform, settings: Mapping[str, object]
) -> None:
    """The file, with the options that its trainer needs and the source's config in the header."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    whole = {name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())}
    ridden = source_config.keys(adapter, made.lines, source_config.payload_digest(whole, text), made.ulps)
    safetensors_file.write(path, whole, {"format": "pt", SETTINGS: text, **ridden})


# --- reading


@dataclass(frozen=True, eq=False)
class File:
    """The tensors of a file, what its header says, and which rows of which tensor were taken out of it."""

    where: str
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    settings: Mapping[str, Any]
    taken: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def ridden(self) -> bool:
        """Whether the source's config rides along, and belongs to these tensors."""
        text = self.metadata.get(SETTINGS, "")
        return source_config.belongs(self.metadata, source_config.payload_digest(dict(sorted(self.tensors.items())), text))

    @property
    def notes(self) -> tuple[str, ...]:
        """That what rides along was ignored, if it was."""
        return (source_config.IGNORED,) if source_config.there(self.metadata) and not self.ridden else ()

    def tensor(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Rows of a matrix, or numbers of a vector, noted as taken."""
        if name not in self.tensors:
            raise FormatError(self.where, f"the source's list of tensors names {name!r}, the file does not")
        array = self.tensors[name]
        self.taken.setdefault(name, np.zeros(len(array), bool))[rows] = True
        return array[rows]


def opened(path: Path) -> File:
    """The file at `path`; its tensors are floats, matrices or vectors."""
    with safetensors_file.SafetensorsFile(path) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
        metadata = dict(file.header.metadata)
    return file_of(str(path), tensors, metadata)


def file_of(where: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> File:
    """The same of tensors that were read already."""
    for name, array in tensors.items():
        if array.ndim not in (1, 2, 3) or 0 in array.shape or dtypes.name_of(array.dtype) not in dtypes.FLOATS:
            raise FormatError(where, f"tensor {name!r} is {array.dtype} {array.shape}, which no factor is")
    settings = json_file.parse_object(metadata.get(SETTINGS, "{}"), f"{where}: {SETTINGS}")
    return File(where, tensors, metadata, settings)


def names_in(path: Path) -> tuple[str, ...]:
    """The names of the tensors of a safetensors file; none of what isn't one."""
    if not path.is_file():
        return ()
    try:
        with safetensors_file.SafetensorsFile(path) as file:
            return tuple(file.tensors)
    except FormatError:
        return ()


def pair(name: str, lora_A: np.ndarray, lora_B: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    """The two, if they are the factors of one delta."""
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise FormatError(where, f"{name}: {lora_A.shape} and {lora_B.shape} are no pair")
    return lora_A, lora_B


def restored(
    file: File, padded: Callable[[source_config.Line], tuple[np.ndarray, np.ndarray]], *, alpha: float, tail: str
) -> Adapter:
    """The source's adapter; `padded` gives the pair of a line in the base's order, `tail` is how `lora_B`s are called."""
    lines = source_config.lines_of(file.metadata, file.where)

    def own(line: source_config.Line) -> tuple[np.ndarray, np.ndarray]:
        if line.block is None:
            raise FormatError(file.where, f"the source's list of tensors says no rank of {line.target!r}")
        lora_A, lora_B = padded(line)
        r = line.block.r
        if line.block.rank != len(lora_A) or r > len(lora_A) or lora_A[r:].tobytes().strip(b"\0"):
            raise FormatError(file.where, f"{line.target}: it was not of rank {r} and filled with zeros")
        if lora_B[:, r:].tobytes().strip(b"\0"):
            raise FormatError(file.where, f"{line.target}: it was not of rank {r} and filled with zeros")
        # A trainer that fuses modules may have needed one type for several.
        own_A = lora_A[:r].astype(dtypes.NUMPY[line.block.dtype_A], copy=False)
        return np.ascontiguousarray(own_A), np.ascontiguousarray(lora_B[:, :r])

    adapter = source_config.restored(file.metadata, lines, own, lambda r: alpha / r, file.where)
    for name, array in file.tensors.items():
        rest = array[~file.taken.get(name, np.zeros(len(array), bool))]
        if name.endswith(tail) and rest.tobytes().strip(b"\0"):
            raise FormatError(file.where, f"the source's list of tensors lacks {name!r}")
    return adapter


def with_magnitudes(adapter: Adapter, magnitudes: Mapping[str, np.ndarray]) -> Adapter:
    """The adapter whose deltas have these."""
    deltas = {
        target: dataclasses.replace(delta, magnitude=magnitudes[target])
        if target in magnitudes and isinstance(delta, LowRank)
        else delta
        for target, delta in adapter.deltas.items()
    }
    return dataclasses.replace(adapter, deltas=deltas)


def settled_alpha(file: File, key: str, beside: Mapping[str, float], alpha: float | None) -> float:
    """Alpha, of the header, of what lies beside the file, or as asked for; said twice it has to be the same."""
    said = [value for value in (file.settings.get(key), beside.get("alpha")) if value is not None]
    if not all(isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 2**40 for value in said):
        raise FormatError(file.where, f'"{key}" is {str(said[0])[:40]}, not a number that makes sense')
    if said and alpha is not None and alpha != said[0]:
        raise RefusedError(file.where, f"it says itself that its alpha is {said[0]:g}", "Leave out --alpha")
    if not said and alpha is None:
        raise RefusedError(file.where, "nothing says its alpha, and the scale depends on it", ALPHA_HINT)
    return float(said[0]) if said else float(alpha or 0.0)


def check_rank(file: File, target: str, r: int, said: float | None) -> None:
    """Refuse a pair of another rank than what lies beside the file says: the trainer scales by alpha / rank."""
    if said is not None and said != r:
        raise FormatError(file.where, f"{target}: rank {r} by its tensors, {said:g} by what lies beside the file")


def adapter_of(file: File, deltas: Mapping[str, Delta], base: BaseSpec) -> Adapter:
    """What was read of a file of a trainer's own."""
    return Adapter(deltas, meta=Meta(base_model=base.repo, revision=base.revision), notes=file.notes)


_SCALAR = re.compile(r"^(\s*)([A-Za-z_]\w*):\s*([^#\s][^#]*?)?\s*(?:#.*)?$")


def scalars(path: Path, section: str = "") -> dict[str, str]:
    """`key: value` lines of a YAML file as text: those at the margin, or the first level under `section:`."""
    if not path.is_file():
        return {}
    found: dict[str, str] = {}
    inside, depth = not section, 0
    for line in json_file.read_text(path).splitlines():
        match = _SCALAR.match(line)
        if not match:
            continue
        indent, key, value = len(match[1]), match[2], match[3] or ""
        if section and not indent:
            inside, depth = key == section, 0
        elif inside and (not section or indent == (depth := depth or indent)) and (section or not indent):
            found[key] = value
    return found


def numbers(found: Mapping[str, str], **keys: str) -> dict[str, float]:
    """Of `scalars` those that are finite numbers, under the names that `keys` gives them."""
    values: dict[str, float] = {}
    for name, key in keys.items():
        try:
            value = float(found[key])
        except (KeyError, ValueError):
            continue
        if math.isfinite(value):
            values[name] = value
    return values
