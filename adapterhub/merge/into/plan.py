"""Which tensor of a Hugging Face folder gets which edits, or why none may: every refusal of such bases is here.

Nothing is written before the whole plan stands, so a merge that would be wrong costs no time and leaves no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub.merge.checks import Weighted, check_adapter
from adapterhub_converters import dtypes, names
from adapterhub_converters.adapter import (
    Adapter,
    Delta,
    LowRank,
    LowRankEmbedding,
    StackedLowRank,
    factored_out,
    refuse_conditions,
)
from adapterhub_converters.architecture import Architecture
from adapterhub_converters.base_weights import plain_lora, without_copies
from adapterhub_converters.errors import RefusedError

from .edits import AddDora, AddLowRank, AddVector, Edit, Replace, SetRows, Within
from .hf_base import CONV1D, Folder, Weight, read_folder
from .rounding import computable
from .sources import Opened

__all__ = ["Plan", "Weighted", "plan", "stored_transposed"]

_CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}
_HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_OTHER = "Is this the model the adapter was trained on?"
_HEADS = ("lm_head.weight", "embed_out.weight")


def stored_transposed(model_type: str | None, target: str) -> bool:
    """Whether a model of this type is known to store the weight of a module `(in, out)`."""
    return model_type in CONV1D and target.rpartition(".")[2] in _CONV1D_NAMES


@dataclass(frozen=True)
class Plan:
    """`edits` by tensor name, in the order of the adapters.

    `added` are tensors that the base lacks, each at first a copy of one it has; `shapes` those that get another shape;
    `config` the keys of config.json that change; `notes` say what was decided, one line each.
    """

    edits: Mapping[str, tuple[Edit, ...]]
    added: Mapping[str, Weight] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())


def plan(adapters: Weighted, base: Path | Folder) -> Plan:
    """The edits that merge the adapters into a Hugging Face folder, given its path or read already.

    Raises:
        RefusedError: The result would differ from base and adapters loaded together; says which module and why.
    """
    folder = base if isinstance(base, Folder) else read_folder(base)
    if not adapters:
        raise RefusedError(str(folder.path), "no adapter to merge")
    planner = _Planner(folder)
    for adapter, weight in adapters:
        settled = plain_lora(adapter, folder.path) if adapter.meta.init == "pissa" else adapter
        check_adapter(settled, weight)
        planner.add(factored_out(_without_copies(settled, folder)), weight)
    return planner.plan()


def _without_copies(adapter: Adapter, folder: Folder) -> Adapter:
    """Copies of the base's tables must be the base's; those of a resized vocabulary take their place."""
    adapter = _without_wrappers(adapter)
    resized = {}
    for name, copy in adapter.copies.items():
        own = folder.weights.get(name)
        if own and len(own.shape) == 2 and own.shape[1:] == copy.shape[1:] and own.shape[0] != copy.shape[0]:
            resized[name] = copy
    if folder.method and len(resized) < len(adapter.copies):
        raise RefusedError(next(iter(adapter.copies)), "a copy of the base's weight rides along, and the base is quantised")
    rest = {name: copy for name, copy in adapter.copies.items() if name not in resized}
    kept = without_copies(dataclasses.replace(adapter, copies=rest), folder.path)
    return dataclasses.replace(kept, copies=resized) if resized else kept


def _without_wrappers(adapter: Adapter) -> Adapter:
    """Without what peft saves twice of a replaced table (`save_embedding_layers=True`): itself, and what it replaced."""
    infix = ".modules_to_save."
    twice = [
        name
        for name, values in adapter.replaced.items()
        if infix in name
        and (same := adapter.replaced.get(name.replace(infix, "."))) is not None
        and np.array_equal(same, values)
    ]
    replaced = {name: values for name, values in adapter.replaced.items() if name not in twice}
    copies = {name: copy for name, copy in adapter.copies.items() if name not in replaced}
    if len(replaced) == len(adapter.replaced) and len(copies) == len(adapter.copies):
        return adapter
    return dataclasses.replace(adapter, replaced=replaced, copies=copies, source=None)


class _Planner:
    """Gathers edits adapter by adapter, and knows the base."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.tensors = folder.weights
        self.tied = _Tied(folder)
        self.edits: dict[str, list[Edit]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.added: dict[str, Weight] = {}
        self.config: dict[str, Any] = {}
        self.notes: list[str] = []
        self._spans: dict[str, list[tuple[int, int, bool]]] = {}
        self._architecture = _architecture(folder)

    def plan(self) -> Plan:
        """What came together, once it is known to fit together."""
        self._check_vocabulary()
        edits = {name: tuple(edits) for name, edits in self.edits.items()}
        return Plan(edits, self.added, self.shapes, self.config, tuple(dict.fromkeys(self.notes)))

    def add(self, adapter: Adapter, weight: float) -> None:
        """Everything one adapter does."""
        refuse_conditions(dataclasses.replace(adapter, copies={}))
        experts, others = self._apart(adapter)
        whole = {**adapter.replaced, **adapter.copies}
        found = _Names(self.folder, dataclasses.replace(adapter, deltas=others, replaced=whole), self.tied.alias)
        self.notes += [*adapter.notes, *found.notes]
        for parameter, values in adapter.copies.items():
            self._resize(parameter, found.parameter(parameter), values)
        for target, delta in others.items():
            if isinstance(delta, LowRank):
                self._low_rank(target, found.parameter(f"{target}.weight"), delta, weight, found)
            elif isinstance(delta, LowRankEmbedding):
                self._embedding(target, found.parameter(f"{target}.weight"), delta, weight)
            else:
                raise RefusedError(target, f"a delta of the kind {type(delta).__name__} cannot be merged into a base")
        for target, delta in experts.items():
            self._expert(target, delta, weight)
        for parameter, values in adapter.replaced.items():
            self._replace(parameter, found.parameter(parameter), values, weight)
        for target, rows in adapter.rows.items():
            self._rows(target, found.parameter(f"{target}.weight"), rows.ids, rows.values, weight)

    def _apart(self, adapter: Adapter) -> tuple[dict[str, Delta], dict[str, Delta]]:
        """Deltas of experts that the base may store otherwise than the adapter has them, and all others."""
        experts = {
            target: delta
            for target, delta in adapter.deltas.items()
            if isinstance(delta, StackedLowRank)
            or (f"{target}.weight" not in self.tensors and self._architecture and self._architecture.expert(target) is not None)
        }
        return experts, {target: delta for target, delta in adapter.deltas.items() if target not in experts}

    def _low_rank(self, target: str, name: str, delta: LowRank, weight: float, found: _Names) -> None:
        transposed = self._transposed(target, name, delta)
        name = self._untied(name, target)
        scale = delta.scaling * weight
        if delta.magnitude is None:
            self._put(name, AddLowRank(delta, scale, transposed), target)
        else:
            self._dora(target, name, AddDora(delta, scale, transposed, delta.magnitude), weight)
        if delta.bias is not None:
            bias = found.parameter(f"{target}.bias", why="the adapter adds to a bias (lora_bias) and the base has none")
            self._expect(target, bias, delta.bias.shape)
            self._put(bias, AddVector(delta.bias, scale), target)

    def _embedding(self, target: str, name: str, delta: LowRankEmbedding, weight: float) -> None:
        self._expect(target, name, delta.shape)
        name = self._untied(name, target)
        scale = delta.scaling * weight
        if delta.magnitude is None:
            self._put(name, AddLowRank(delta, scale, transposed=False), target)
        else:
            # peft takes the norms of a table down its columns (`DoraEmbeddingLayer`, fan_in_fan_out).
            self._dora(target, name, AddDora(delta, scale, transposed=True, magnitude=delta.magnitude), weight)

    def _dora(self, target: str, name: str, edit: AddDora, weight: float) -> None:
        features = edit.delta.lora_B.shape[0]
        if edit.magnitude.size != features:
            raise RefusedError(target, f"a DoRA magnitude of {edit.magnitude.size} numbers for {features} outputs")
        if weight != 1:
            raise RefusedError(target, "DoRA is no sum: it can be merged alone and with weight 1 only")
        self._put(name, edit, target, alone=True)

    def _expert(self, target: str, delta: Delta, weight: float) -> None:
        """A delta of one expert or of all, on a base that has a tensor for each or one for all."""
        if not isinstance(delta, LowRank | StackedLowRank) or not delta.plain:
            raise RefusedError(target, f"a {type(delta).__name__} with more than its factors, on experts, cannot be merged")
        scale = delta.scaling * weight
        if isinstance(delta, StackedLowRank):
            own = self.tensors.get(target)
            if own:
                self._stack(target, own, delta, scale)
            else:
                self._listed(target, delta, scale)
        else:
            self._one_of_stack(target, delta, scale)

    def _stack(self, target: str, own: Weight, delta: StackedLowRank, scale: float) -> None:
        experts, out, into = delta.shape
        straight, across = (experts, out, into), (experts, into, out)
        transposed = delta.transposed_base
        if transposed is None:
            if straight == across:
                raise RefusedError(target, "square, and nothing says whether the base stores it (in, out) or (out, in)")
            transposed = own.shape == across
        self._expect(target, target, across if transposed else straight)
        rows = own.shape[1]
        for number in range(experts):
            piece = LowRank(delta.lora_A[number], delta.lora_B[number], delta.alpha)
            self._put(target, AddLowRank(piece, scale, transposed), target, (number * rows, rows))

    def _listed(self, target: str, delta: StackedLowRank, scale: float) -> None:
        """All experts of a parameter, on a base that lists them one by one."""
        known = self._architecture
        if known is None or not known.listed or not known.is_stacked(target):
            raise self._absent(target)
        stems, (experts, out, _) = known.stems(target), delta.shape
        count = out // len(stems)
        interleaved = bool(known.experts and known.experts.interleaved)
        for expert in range(experts):
            for number, stem in enumerate(stems):
                rows = slice(number, None, len(stems)) if interleaved else slice(number * count, (number + 1) * count)
                name = f"{known.listed_module(stem, expert)}.weight"
                if name not in self.tensors:
                    raise RefusedError(target, f"{experts} experts, and the base has no {name}")
                piece = LowRank(delta.lora_A[expert], delta.lora_B[expert][rows], delta.alpha)
                self._expect(target, name, piece.shape)
                self._put(name, AddLowRank(piece, scale, transposed=False), target)
        last = f"{known.listed_module(stems[0], experts)}.weight"
        if last in self.tensors:
            raise RefusedError(target, f"{experts} experts, and the base has more: {last}")

    def _one_of_stack(self, target: str, delta: LowRank, scale: float) -> None:
        """One expert, on a base that has one tensor for all."""
        known = self._architecture
        stem, expert = (known.stem(target), known.expert(target)) if known else (None, None)
        parameter = known.stacked_module(stem) if known and stem else None
        own = self.tensors.get(parameter or "")
        if known is None or own is None or parameter is None or expert is None or stem is None:
            raise self._absent(target)
        stems = known.stems(parameter)
        turned = bool(known.experts and (known.experts.transposed or known.experts.interleaved))
        count = own.shape[1] // len(stems)
        if turned or len(own.shape) != 3 or expert >= own.shape[0] or delta.shape != (count, own.shape[2]):
            raise RefusedError(target, f"changes a weight of shape {delta.shape}, the base's {parameter} is {own.shape}")
        first = expert * own.shape[1] + stems.index(stem) * count
        self._put(parameter, AddLowRank(delta, scale, transposed=False), target, (first, count))

    def _absent(self, target: str) -> RefusedError:
        return RefusedError(target, f"not in the base {self.folder.spec.where}", _OTHER)

    def _resize(self, parameter: str, name: str, values: np.ndarray) -> None:
        """A table of a resized vocabulary in place of the base's; the adapter's delta comes on top of it."""
        name = self._untied(name, parameter)
        self.shapes[name] = values.shape
        self.edits.setdefault(name, []).insert(0, Replace(values))
        self.notes.append(f"{name}: {values.shape[0]} rows as in training, {self._weight(name).shape[0]} in the base")

    def _replace(self, parameter: str, name: str, values: np.ndarray, weight: float) -> None:
        table = self.tied.is_table(name)
        if table and values.ndim == 2 and values.shape[1:] == self.tensors[name].shape[1:]:
            if values.shape != self.tensors[name].shape:
                self.notes.append(f"{name}: {values.shape[0]} rows as in training, {self.tensors[name].shape[0]} in the base")
        else:
            self._expect(parameter, name, values.shape)
        name = self._untied(name, parameter)
        if values.shape != self._weight(name).shape:
            self.shapes[name] = values.shape
        if weight != 1:
            raise RefusedError(parameter, f"replaced as a whole by the adapter: weight {weight} has no meaning for it")
        self._put(name, Replace(values), parameter, alone=True)
        self._note_rounding(name, values)

    def _rows(self, target: str, name: str, ids: tuple[int, ...], values: np.ndarray, weight: float) -> None:
        shape = self.tensors[name].shape
        if len(shape) != 2 or values.shape[1:] != shape[1:] or not all(0 <= row < shape[0] for row in ids):
            raise RefusedError(target, f"rows {values.shape} up to {max(ids, default=0)} do not fit the base's {name} {shape}")
        if weight != 1:
            raise RefusedError(target, f"rows replaced by the adapter: weight {weight} has no meaning for them")
        self._put(name, SetRows(ids, values), target, alone=True)
        self._note_rounding(name, values)

    def _note_rounding(self, name: str, values: np.ndarray) -> None:
        dtype = dtypes.NUMPY[self._weight(name).dtype]
        if dtype.itemsize < values.dtype.itemsize or (dtype != values.dtype and dtype.itemsize == 2):
            self.notes.append(f"{name}: replaced values are rounded from {values.dtype} to the base's {dtype}")

    def _weight(self, name: str) -> Weight:
        return self.tensors[name] if name in self.tensors else self.added[name]

    def _put(self, name: str, edit: Edit, target: str, rows: tuple[int, int] | None = None, *, alone: bool = False) -> None:
        """Add an edit of `rows` (first, count) of a tensor seen as a matrix, or of all."""
        own = self._weight(name)
        if not computable(dtypes.NUMPY.get(own.dtype)):
            what = f"the base's {name} is {own.dtype}, not bfloat16, float16 or float32"
            raise RefusedError(target, what, "Dequantise it first")
        first, count = rows or (0, own.rows)
        spans = self._spans.setdefault(name, [])
        for start, stop, other in spans:
            if start < first + count and first < stop and (alone or other):
                raise RefusedError(target, "one adapter replaces or rescales it and another changes it too")
        spans.append((first, first + count, alone))
        self.edits.setdefault(name, []).append(edit if rows is None else Within(edit, first, count))

    def _expect(self, target: str, name: str, shape: tuple[int, ...]) -> None:
        have = self.shapes.get(name, self._weight(name).shape)
        if tuple(shape) != have:
            hint = "The adapter was trained after the vocabulary was resized" if have[1:] == tuple(shape)[1:] else ""
            raise RefusedError(target, f"changes a weight of shape {tuple(shape)}, the base's {name} is {have}", hint)

    def _untied(self, name: str, target: str) -> str:
        """The tensor that a change of the table or of the output layer goes to: where they are one they become two."""
        if not self.tied.tied or not self.tied.is_table(name):
            return name
        head = target.endswith(_HEADS) or f"{target}.weight".endswith(_HEADS)
        if self.tied.head is None:
            if not self.tied.can_be_two(self._architecture):
                what = f"the base's embedding and output layer are one tensor ({name})"
                raise RefusedError(
                    target,
                    f"{what}; merged, the change would act in both places",
                    "Untie them in the base first (tie_word_embeddings: false, with an lm_head.weight of its own)",
                )
            table = self.tensors[self.tied.table or name]
            self.added["lm_head.weight"] = dataclasses.replace(table, name="lm_head.weight")
            self.tied.head = "lm_head.weight"
        if "tie_word_embeddings" not in self.config:
            self.config["tie_word_embeddings"] = False
            self.notes.append("the embedding table and the output layer were one and are two now (tie_word_embeddings)")
        return self.tied.head if head else name

    def _check_vocabulary(self) -> None:
        """Tables of a resized vocabulary must all have as many rows, which config.json then says."""
        if not self.shapes:
            return
        rows = {name: shape[0] for name, shape in self.shapes.items()}
        for name in (*self.tensors, *self.added):
            if self.tied.is_table(name) and name not in rows:
                rows[name] = self._weight(name).shape[0]
        if len(set(rows.values())) > 1:
            said = ", ".join(f"{name} {count}" for name, count in rows.items())
            raise RefusedError(next(iter(self.shapes)), f"the vocabulary was resized, and its tables do not agree: {said}")
        self.config["vocab_size"] = next(iter(rows.values()))

    def _transposed(self, target: str, name: str, delta: LowRank) -> bool:
        """Whether the base stores this weight `(in, out)`. Shapes decide; for a square one, what transformers builds."""
        have = self.shapes.get(name, self._weight(name).shape)
        model = self.folder.spec.model_type or "this model"
        known = stored_transposed(self.folder.spec.model_type, target)
        if known or (delta.transposed_base and have == delta.shape[::-1] != delta.shape):
            self._expect(target, name, delta.shape[::-1])
            return True
        self._expect(target, name, delta.shape)
        if delta.transposed_base and have[0] == have[1]:
            raise RefusedError(
                target,
                f"square, and fan_in_fan_out is set, but {model} isn't known to store it transposed",
                "Set fan_in_fan_out to false in adapter_config.json if it does not",
            )
        return False


def _architecture(folder: Folder) -> Architecture | None:
    try:
        return names.by_class(folder.spec.architecture, folder.spec.where)
    except RefusedError:
        return None


class _Names:
    """From an adapter's names to the base's: the same, or one leading component more or less, the same for all.

    `GPT2LMHeadModel` calls its blocks `transformer.h…`, and its published checkpoint `h…`; transformers adds what is
    missing when it loads (`base_model_prefix`), and so the adapter has it.
    """

    def __init__(self, folder: Folder, adapter: Adapter, alias: Mapping[str, str]) -> None:
        tensors = folder.weights
        self._tensors = tensors
        self._where = folder.spec.where
        self._alias = alias
        stems = {f"{target}.weight" for target in (*adapter.deltas, *adapter.rows)} | set(adapter.replaced)
        missing = sorted(stem for stem in stems if stem not in tensors and stem not in alias)
        self._rename = self._dialect(missing) if missing else {}
        self.notes = sorted({f"{old}… in the adapter is {new}… in the base" for old, new in self._prefixes(self._rename)})

    def _dialect(self, missing: list[str]) -> dict[str, str]:
        first = missing[0]
        heads = {first.partition(".")[0] + "."}
        added = {name.removesuffix(first) for name in self._tensors if name.endswith("." + first)}
        ways = [{name: name.partition(".")[2] for name in missing}] if all(n.startswith(tuple(heads)) for n in missing) else []
        ways += [{name: prefix + name for name in missing} for prefix in sorted(added)]
        fitting = [way for way in ways if all(new in self._tensors for new in way.values())]
        if len(fitting) > 1:
            raise RefusedError(first, f"could be {' or '.join(way[first] for way in fitting)} in the base {self._where}")
        if not fitting:
            raise RefusedError(first, f"not in the base {self._where}", _OTHER)
        return fitting[0]

    @staticmethod
    def _prefixes(rename: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        for old, new in rename.items():
            longer = max(old, new, key=len)
            prefix = longer[: len(longer) - min(len(old), len(new))]
            yield (prefix, "") if len(old) > len(new) else ("", prefix)

    def parameter(self, name: str, *, why: str = "not in the base") -> str:
        """The base's name of a parameter."""
        if name in self._tensors:
            return name
        if name in self._alias:
            return self._alias[name]
        stem = name.rpartition(".")[0] + ".weight"
        new = self._rename.get(name) or self._rename.get(stem, stem).rpartition(".")[0] + "." + name.rpartition(".")[2]
        if new not in self._tensors:
            raise RefusedError(name.rpartition(".")[0], why)
        return new


class _Tied:
    """Whether the output layer is the embedding table, so that changing one would change the other.

    Attributes:
        tied: Whether they are one.
        head: The tensor of the output layer, where it has one.
        stored: Whether the base has such a tensor.
        table: The tensor of the embedding table, where its name is known.
    """

    def __init__(self, folder: Folder) -> None:
        spec, self._weights = folder.spec, folder.weights
        self._vocabulary = spec.config.get("vocab_size")
        self.head = next((name for name in self._weights if name.endswith(_HEADS)), None)
        self.stored = self.head is not None
        self.table = next((f"{name}.weight" for name in names.EMBEDDINGS if f"{name}.weight" in self._weights), None)
        self.tied = spec.tied or (self.head is None and spec.architecture.endswith(_HEADED))
        if self.head and "tie_word_embeddings" not in spec.config:
            # Silent and both stored: transformers goes by the class's default; equal bytes settle it.
            self.tied = self._same_bytes(self._weights[self.head])

    @property
    def alias(self) -> dict[str, str]:
        """What a base that has no tensor of the output layer has in its place."""
        return {"lm_head.weight": self.table} if self.tied and not self.stored and self.table else {}

    def can_be_two(self, known: Architecture | None) -> bool:
        """Whether transformers loads an output layer of its own for this class, under a name that is known."""
        return known is not None and self.table is not None and "lm_head" in known.top

    def _same_bytes(self, head: Weight) -> bool:
        tables = [one for one in self._weights.values() if one.shape == head.shape and one.name != head.name]
        with Opened() as opened:
            return any(_equal(opened, head, other) for other in tables)

    def is_table(self, name: str) -> bool:
        """Whether a tensor has a row for each token."""
        if name == self.head:
            return True
        own = self._weights.get(name)
        in_a_layer = any(part.isdigit() for part in name.split("."))
        return own is not None and len(own.shape) == 2 and own.shape[0] == self._vocabulary and not in_a_layer


def _equal(opened: Opened, one: Weight, two: Weight) -> bool:
    if one.size != two.size or not one.size:
        return False
    pieces = np.empty((2, 1 << 20), np.uint8)
    for start in range(0, one.size, 1 << 20):
        count = min(1 << 20, one.size - start)
        for piece, weight in zip(pieces, (one, two), strict=True):
            opened.read(weight.path, piece[:count], weight.offset + start)
        if not np.array_equal(pieces[0, :count], pieces[1, :count]):
            return False
    return True
