"""Common ground of the trainers that fuse LoRA into a model: one rank and one alpha, and the same modules in each layer.

torchtune, litgpt and Megatron have a few options that select the modules of every layer, so their adapters are sets of
pairs with one rank and one scale. Smaller ranks are padded with zeros, other scales are multiplied into `lora_B`, and layers
without a delta get zeros. These files do not record the alpha: it comes from the header that we write, from what the trainer
left next to the file, or from the caller; it is never guessed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapterhub_converters import dtypes, yaml_lines
from adapterhub_converters.adapter import Adapter, Delta, Loss, LowRank, Meta, TensorLoss, problems_beyond_deltas
from adapterhub_converters.architectures.architecture_lookup import Order, layer_of, path_in_layer
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.errors import FormatError, RefusedError
from adapterhub_converters.formats import file_alpha, source_config
from adapterhub_converters.formats.candidate import Candidate
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec

SETTINGS = "adapterhub.settings"
"""Our own key in the header's metadata, for the trainer's options that are needed to read the file."""
_LAYER = "model.layers"


# ---- The base


def known_base(base: BaseSpec | None, location: str, maker: str, classes: Iterable[str]) -> BaseSpec:
    """Return `base` if `maker`'s names for the modules of its class are known; raise RefusedError otherwise."""
    if base is None:
        problem = f"{maker}'s names of modules, and the order of their rows, depend on the base"
        raise RefusedError(location, problem, "Name its base model", code="base-required")
    if base.architecture not in classes:
        class_names = ", ".join(sorted(classes))
        raise RefusedError(
            location,
            f"{base.architecture} has no verified mapping to {maker}'s names",
            f"Known: {class_names}",
            code="unsupported-architecture",
        )
    return base


def positive_number(base: BaseSpec, key: str) -> int:
    """Return a positive number from the base's config; RefusedError if it has none."""
    value = base.config.get(key)
    if not json_file.is_integer(value) or not 0 < value < 1 << 31:
        problem = (
            f'its config has no "{key}"'
            if value is None
            else f'"{key}" in its config is {str(value)[:40]}, not a number above 0'
        )
        raise RefusedError(base.source, problem, "Name a base whose config has it")
    return value


def heads(base: BaseSpec) -> tuple[int, int, int]:
    """Return the number of query heads, the number of key heads, and the rows of one head."""
    queries = positive_number(base, "num_attention_heads")
    keys = positive_number(base, "num_key_value_heads") if base.config.get("num_key_value_heads") is not None else queries
    size = (
        positive_number(base, "head_dim")
        if base.config.get("head_dim") is not None
        else positive_number(base, "hidden_size") // queries
    )
    if not size or queries % keys:
        problem = f"{queries} attention heads of size {size} cannot be divided evenly into {keys} groups"
        raise RefusedError(base.source, problem, "Name a base with a valid config")
    return queries, keys, size


def shape(base: BaseSpec, kind: str) -> tuple[int, int]:
    """Return `(out, in)` of a kind of module (`self_attn.q_proj`, `lm_head`) according to the base's config."""
    hidden = positive_number(base, "hidden_size")
    if kind == "lm_head":
        return positive_number(base, "vocab_size"), hidden
    if kind.startswith("mlp."):
        width = positive_number(base, "intermediate_size")
        return (hidden, width) if kind == "mlp.down_proj" else (width, hidden)
    queries, keys, size = heads(base)
    if kind == "self_attn.o_proj":
        return hidden, queries * size
    return (queries if kind == "self_attn.q_proj" else keys) * size, hidden


def kind_of(target: str) -> str:
    """Return a module's kind: `self_attn.q_proj` for `model.layers.0.self_attn.q_proj`, its own name outside the layers."""
    return path_in_layer(target) or target


# ---- Writing


@dataclass(frozen=True, eq=False)
class Pair:
    """One delta in the file's layout: `lora_A` `(rank, in)`, `lora_B` `(out, rank)` with its rows in the file's order."""

    lora_A: np.ndarray
    lora_B: np.ndarray
    magnitude: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class FusedAdapter:
    """An adapter as pairs with one rank and one scale of `alpha / rank`.

    Attributes:
        pairs: Target to pair.
        rank: The rank of all pairs.
        alpha: The alpha of all pairs.
        losses: The loss report's lines.
        notes: The loss report's notes.
        lines: The records of how each pair was written, to recover the source.
        ulps: The corrections to the last places, for the lines that have them.
    """

    pairs: Mapping[str, Pair]
    rank: int
    alpha: float
    losses: tuple[TensorLoss, ...]
    notes: tuple[str, ...]
    lines: tuple[source_config.Line, ...]
    ulps: tuple[np.ndarray, ...]


def problems(adapter: Adapter, maker: str, kinds: Iterable[str], *, dora: bool, tied: bool) -> list[str]:
    """Return the reasons why `maker`'s format cannot express an adapter.

    Args:
        adapter: The adapter.
        maker: The trainer's name.
        kinds: The kinds of modules that can have LoRA.
        dora: Whether the format has DoRA, which is then on all modules or on none.
        tied: Whether the base ties its output layer to its embedding table, and the trainer has no LoRA on such a layer.
    """
    reasons = problems_beyond_deltas(adapter, f"{maker}'s adapters")
    if tied and "lm_head" in adapter.deltas:
        reasons.append(f"lm_head: the base ties it to the embedding table, and {maker} has no LoRA on tied layers")
    known_kinds = frozenset(kinds)
    any_dora = any(getattr(delta, "magnitude", None) is not None for delta in adapter.deltas.values())
    for target, delta in sorted(adapter.deltas.items()):
        reasons += [
            f"{target}: {reason}"
            for reason in _delta_problems(target, delta, maker, known_kinds, allows_dora=dora, all_dora=any_dora)
        ]
    return reasons


def _delta_problems(
    target: str, delta: Delta, maker: str, known_kinds: frozenset[str], *, allows_dora: bool, all_dora: bool
) -> Iterator[str]:
    if not isinstance(delta, LowRank):
        yield f"a delta of kind {type(delta).__name__} cannot be expressed in {maker}'s adapters"
        return
    kind = kind_of(target)
    if kind not in known_kinds or (kind != target) != (kind != "lm_head"):
        yield f"not a module that {maker} is known to have LoRA on"
    for name, array in (("lora_A", delta.lora_A), ("lora_B", delta.lora_B)):
        if dtypes.name_of(array.dtype) not in ("F32", "F16", "BF16"):
            yield f"{name} is {array.dtype}, in which {maker} does not train"
    if delta.bias is not None:
        yield f"a bias cannot be expressed in {maker}'s adapters"
    if delta.transposed_base:
        yield f"the base stores it transposed, and {maker} is not known to support such modules"
    if delta.magnitude is not None and not allows_dora:
        yield f"DoRA cannot be expressed in {maker}'s adapters"
    elif all_dora and allows_dora and delta.magnitude is None:
        yield f"{maker}'s adapters have DoRA on all modules or on none"


StemAndOrder = Callable[[str], tuple[str, Order]]
"""Target to the file's name of the module and the order of its rows."""


def fuse(
    adapter: Adapter, stem_and_order: StemAndOrder, reorder: Callable[[np.ndarray, Order], np.ndarray], *, whole: bool
) -> FusedAdapter:
    """Convert an adapter without `problems`; `whole` demands that the alpha be a whole number."""
    deltas = {t: d for t, d in sorted(adapter.deltas.items()) if isinstance(d, LowRank)}
    rank = max(delta.r for delta in deltas.values())
    plan = _plan_alpha({target: delta.scaling * rank for target, delta in deltas.items()}, whole=whole)
    pairs: dict[str, Pair] = {}
    losses: list[TensorLoss] = []
    lines: list[source_config.Line] = []
    ulps: list[np.ndarray] = []
    for target, delta in deltas.items():
        stem, order = stem_and_order(target)
        folded = file_alpha.fold(f"{target}.lora_B", delta.lora_B, plan.factors[target])
        factor_losses = (TensorLoss(f"{target}.lora_A", Loss.EXACT), folded.loss)
        losses += factor_losses if delta.r == rank else [file_alpha.padded_loss(line, rank) for line in factor_losses]
        if delta.magnitude is not None:
            losses.append(TensorLoss(f"{target}.magnitude", Loss.EXACT))
        ulps += [] if folded.ulps is None else [folded.ulps]
        block = source_config.Block(delta.r, len(delta.lora_B), 0, dtypes.name_of(delta.lora_A.dtype), rank)
        dtype = dtypes.name_of(delta.lora_B.dtype)
        lines.append(source_config.Line(stem, target, plan.factors[target], dtype, order, folded.ulps is not None, block))
        lora_A, lora_B = file_alpha.pad(delta.lora_A, rank, 0), file_alpha.pad(folded.lora_B, rank, 1)
        magnitude = None if delta.magnitude is None else reorder(delta.magnitude.reshape(-1), order)
        pairs[target] = Pair(lora_A, reorder(lora_B, order), magnitude)
    return FusedAdapter(pairs, rank, plan.common, tuple(losses), (*adapter.notes, *plan.notes), tuple(lines), tuple(ulps))


def _plan_alpha(alphas: Mapping[str, float], *, whole: bool) -> file_alpha.Plan:
    plan = file_alpha.plan(alphas, np.dtype(np.float64), "alpha") or file_alpha.Plan(0.0, dict.fromkeys(alphas, 1.0))
    if not whole or plan.common.is_integer():
        return plan
    # litgpt and Megatron read the alpha as an integer.
    common = float(max(1, round(plan.common)))
    factors = {target: alpha / common if alpha else file_alpha.ALMOST_NOTHING for target, alpha in alphas.items()}
    return file_alpha.Plan(
        common, factors, (*plan.notes, f"alpha {plan.common:g} is not a whole number: the file has {common:g}")
    )


def fill_missing_pairs(
    fused_adapter: FusedAdapter, base: BaseSpec, groups: Iterable[tuple[str, ...]], maker: str
) -> FusedAdapter:
    """Return a copy with zeros added: if any layer has one kind of a group, `maker` expects every layer to have all of them."""
    kinds = {kind_of(target) for target in fused_adapter.pairs}
    layers = positive_number(base, "num_hidden_layers")
    beyond_base = [target for target in fused_adapter.pairs if (layer_of(target) or 0) >= layers]
    if beyond_base:
        raise RefusedError(beyond_base[0], f"the base has {layers} layers")
    expected = [
        target
        for group in groups
        if kinds & set(group)
        for kind in group
        for target in (["lm_head"] if kind == "lm_head" else [f"{_LAYER}.{n}.{kind}" for n in range(layers)])
    ]
    missing = [target for target in expected if target not in fused_adapter.pairs]
    if not missing:
        return fused_adapter
    # A zero delta would not leave the layer unchanged if its magnitude were not exactly the base's norm.
    if any(pair.magnitude is not None for pair in fused_adapter.pairs.values()):
        reason = f"has no delta, but {maker} has DoRA on every module of a kind, and its magnitude would be the base's norm"
        raise RefusedError(missing[0], reason)
    sample = next(iter(fused_adapter.pairs.values()))
    zeros = {
        target: Pair(
            np.zeros((fused_adapter.rank, columns), sample.lora_A.dtype),
            np.zeros((rows, fused_adapter.rank), sample.lora_A.dtype),
        )
        for target in missing
        for rows, columns in [shape(base, kind_of(target))]
    }
    note = f"{len(missing)} modules without a delta get zeros, because {maker} has one on every module of a kind"
    return dataclasses.replace(fused_adapter, pairs={**fused_adapter.pairs, **zeros}, notes=(*fused_adapter.notes, note))


def write(
    path: Path, tensors: Mapping[str, np.ndarray], adapter: Adapter, fused_adapter: FusedAdapter, settings: Mapping[str, object]
) -> None:
    """Write the file, with the options that its trainer needs and the source's config in the header."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(tensors.items())}
    config = source_config.keys(
        adapter, fused_adapter.lines, source_config.payload_digest(contiguous, text), fused_adapter.ulps
    )
    safetensors_file.write(path, contiguous, {"format": "pt", SETTINGS: text, **config})


# ---- Reading


@dataclass(frozen=True, eq=False)
class TrainerFile:
    """The tensors and header of a file.

    Attributes:
        location: The file's path, for errors.
        tensors: The tensors by name.
        metadata: The header's metadata.
        settings: The trainer's options in it.
        rows_read: Tensor name to a mask of the rows that were read.
    """

    location: str
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]
    settings: Mapping[str, Any]
    rows_read: dict[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def has_source(self) -> bool:
        """Whether the source's config is in the header and belongs to these tensors."""
        text = self.metadata.get(SETTINGS, "")
        return source_config.matches_payload(
            self.metadata, source_config.payload_digest(dict(sorted(self.tensors.items())), text)
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """A note if the source's config was ignored."""
        return (source_config.IGNORED,) if source_config.has_source_config(self.metadata) and not self.has_source else ()

    def tensor(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Return rows of a matrix, or elements of a vector, and mark them as read."""
        if name not in self.tensors:
            raise FormatError(self.location, f"adapterhub.source.tensors names {name!r}, which is not in the file")
        array = self.tensors[name]
        # `restore_adapter` demands that rows which nothing reads be zeros.
        self.rows_read.setdefault(name, np.zeros(len(array), bool))[rows] = True
        return array[rows]


def open_file(candidate: Candidate) -> TrainerFile:
    """Return a file with its tensors read."""
    with candidate.open_safetensors() as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
        metadata = dict(file.header.metadata)
    return check_file(str(candidate.path), tensors, metadata)


def check_file(location: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> TrainerFile:
    """Return a file made of tensors that were read already; FormatError unless they are floats with one to three dimensions."""
    for name, array in tensors.items():
        if array.ndim not in (1, 2, 3) or 0 in array.shape or dtypes.name_of(array.dtype) not in dtypes.FLOATS:
            raise FormatError(location, f"tensor {name!r} is {array.dtype} {array.shape}, which is not a factor")
    settings = json_file.parse_object(metadata.get(SETTINGS, "{}"), f"{location}: {SETTINGS}")
    return TrainerFile(location, tensors, metadata, settings)


def check_pair(name: str, lora_A: np.ndarray, lora_B: np.ndarray, location: str) -> tuple[np.ndarray, np.ndarray]:
    """Return both factors after checking that they are a pair."""
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise FormatError(location, f"{name}: {lora_A.shape} and {lora_B.shape} are not a pair")
    return lora_A, lora_B


def restore_adapter(
    file: TrainerFile, read_pair: Callable[[source_config.Line], tuple[np.ndarray, np.ndarray]], *, alpha: float, tail: str
) -> Adapter:
    """Return the source's adapter.

    Args:
        file: The file, with the source's config.
        read_pair: A function that returns the pair of a line, with the file's rank and rows in the base's order.
        alpha: The file's alpha.
        tail: The suffix of the names of `lora_B`.
    """
    lines = source_config.parse_lines(file.metadata, file.location)

    def source_pair(line: source_config.Line) -> tuple[np.ndarray, np.ndarray]:
        if line.block is None:
            problem = f"adapterhub.source.tensors has no rank for {line.target!r}"
            raise FormatError(file.location, problem, source_config.CONVERT_AGAIN)
        lora_A, lora_B = read_pair(line)
        r = line.block.r
        if line.block.rank != len(lora_A) or r > len(lora_A) or lora_A[r:].tobytes().strip(b"\0"):
            raise FormatError(file.location, f"{line.target}: it is not a pair of rank {r} padded with zeros")
        if lora_B[:, r:].tobytes().strip(b"\0"):
            raise FormatError(file.location, f"{line.target}: it is not a pair of rank {r} padded with zeros")
        # A trainer that fuses modules may require one dtype for several.
        own_A = lora_A[:r].astype(dtypes.NUMPY[line.block.dtype_A], copy=False)
        return np.ascontiguousarray(own_A), np.ascontiguousarray(lora_B[:, :r])

    adapter = source_config.restore_adapter(file.metadata, lines, source_pair, lambda r: alpha / r, file.location)
    for name, array in file.tensors.items():
        unread_rows = array[~file.rows_read.get(name, np.zeros(len(array), bool))]
        if name.endswith(tail) and unread_rows.tobytes().strip(b"\0"):
            problem = f"adapterhub.source.tensors lacks rows of {name!r}, which have a delta"
            raise FormatError(file.location, problem, source_config.CONVERT_AGAIN)
    return adapter


def misplaced_error(file: TrainerFile, line: source_config.Line) -> FormatError:
    """Return the error for a line of the source's config that does not match the trainer's layout."""
    problem = (
        f"adapterhub.source.tensors has {line.target!r} as {line.stem[:80]!r} in the order {line.order}, which no such file has"
    )
    return FormatError(file.location, problem, source_config.CONVERT_AGAIN)


def resolve_alpha(file: TrainerFile, key: str, recorded: Mapping[str, float], alpha: float | None) -> float:
    """Return the alpha of a file.

    Args:
        file: The file.
        key: The name of the alpha in its settings.
        recorded: The options that the trainer left next to the file, with `alpha` if it is among them.
        alpha: The caller's alpha.

    Raises:
        RefusedError: No alpha is known, or the caller's differs from the recorded one.
        FormatError: The recorded alpha is not a number in range.
    """
    recorded_alphas = [value for value in (file.settings.get(key), recorded.get("alpha")) if value is not None]
    if not all(json_file.is_number(value) and abs(value) <= 2**40 for value in recorded_alphas):
        raise FormatError(file.location, f'"{key}" is {str(recorded_alphas[0])[:40]}, not a number in range')
    if recorded_alphas and alpha is not None and alpha != recorded_alphas[0]:
        problem = f"its recorded alpha is {recorded_alphas[0]:g}, not {alpha:g}"
        raise RefusedError(file.location, problem, "Leave out alpha", code="alpha-recorded")
    if not recorded_alphas and alpha is None:
        reason = "its alpha is not recorded anywhere, and the scale depends on it"
        raise RefusedError(file.location, reason, "Give the alpha it was trained with", code="alpha-required")
    return float(recorded_alphas[0]) if recorded_alphas else float(alpha or 0.0)


def check_rank(file: TrainerFile, target: str, r: int, recorded: float | None) -> None:
    """Raise FormatError if a pair's rank differs from the one the trainer recorded, as it scales by alpha / rank."""
    if recorded is not None and recorded != r:
        raise FormatError(file.location, f"{target}: rank {r} by its tensors, but {recorded:g} in the config next to the file")


def adapter_of(file: TrainerFile, deltas: Mapping[str, Delta], base: BaseSpec) -> Adapter:
    """Return the adapter of a file that a trainer wrote."""
    return Adapter(deltas, meta=Meta(base_model=base.repo, revision=base.revision), notes=file.notes)


def scalars(path: Path, section: str = "") -> dict[str, str]:
    """Return the `key: value` lines of a YAML file as text: the top level, or the first level under `section:`."""
    if not path.is_file():
        return {}
    values: dict[str, str] = {}
    inside, depth = not section, 0
    # Not a YAML parser: the trainers write these files, and flat scalars are all that is needed.
    for line in json_file.read_text(path).splitlines():
        inner = line.lstrip()
        pair = yaml_lines.key_of(inner)
        if not pair:
            continue
        indent, key, value = len(line) - len(inner), pair[0], yaml_lines.scalar(pair[1])
        if section and not indent:
            inside, depth = key == section, 0
        elif inside and (not section or indent == (depth := depth or indent)) and (section or not indent):
            values[key] = value
    return values


def numbers(texts: Mapping[str, str], **keys: str) -> dict[str, float]:
    """Return the finite numbers among `scalars`, under the names of the keyword arguments, whose values are the keys."""
    values: dict[str, float] = {}
    for name, key in keys.items():
        try:
            value = float(texts[key])
        except (KeyError, ValueError):
            continue
        if math.isfinite(value):
            values[name] = value
    return values
