"""Plan a merge into a Hugging Face folder: the edits of each tensor, and every reason to refuse.

Nothing is written before the plan is complete, so a merge that would be wrong costs no time and leaves no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import field
from functools import partial
from typing import Any

import numpy as np

from adapterhub.merging.adapter_checks import WeightedAdapters, check_adapter
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import (
    Adapter,
    Delta,
    LowRank,
    LowRankConv,
    LowRankEmbedding,
    Rows,
    StackedLowRank,
    TunedModule,
    refuse_conditions,
    with_factored_as_pairs,
)
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats.base_weights import plain_lora, without_copies
from adapterhub_converters.lazy_dataclass import dataclass

from .edits import (
    Add,
    AddConvolution,
    AddDora,
    AddLowRank,
    AddVector,
    ChangeBiasByTuner,
    ChangeByTuner,
    Edit,
    F32Array,
    Replace,
    SetRows,
    Within,
)
from .joined_edits import Join, join_edits
from .read_base import CONV1D, Folder, Weight
from .tensor_names import HEADS, StoredNames, TensorNames, TokenTables, absent_error, architecture_of, check_shape, expert_edits
from .tensor_types import Floats, kind

_CONV1D_NAMES = {"c_attn", "c_proj", "c_fc", "q_attn"}


def stored_transposed(model_type: str | None, target: str) -> bool:
    """Return whether models of this type store the weight of a module as `(in, out)`."""
    return model_type in CONV1D and target.rpartition(".")[2] in _CONV1D_NAMES


@dataclass(frozen=True)
class Plan:
    """The changes of a folder.

    Attributes:
        edits: By tensor name, in the order of the adapters.
        added: Tensors that the base lacks, each initially a copy of one that it has.
        shapes: The new shapes of tensors whose shape changes.
        config: The keys of config.json that change.
        notes: Decisions, one line each.
    """

    edits: Mapping[str, tuple[Edit, ...]]
    added: Mapping[str, Weight] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())


def plan(adapters: WeightedAdapters, folder: Folder) -> Plan:
    """Plan the merge of adapters, each times its weight, into a Hugging Face folder.

    Raises:
        RefusedError: The result would differ from base and adapters loaded together; names the module and the reason.
    """
    if not adapters:
        raise RefusedError(str(folder.path), "no adapter to merge")
    planner = _Planner(folder)
    for adapter, weight in adapters:
        # PiSSA changed the base's own weights before training; as plain LoRA the adapter fits the original ones.
        converted = plain_lora(adapter, folder.path) if adapter.meta.init == "pissa" else adapter
        check_adapter(converted, weight)
        planner.add(with_factored_as_pairs(_without_copies(converted, folder)), weight)
    return planner.plan()


def plan_joined(adapters: WeightedAdapters, folder: Folder, join: Join) -> Plan:
    """Plan the merge of adapters by a method that is not a sum; `join` knows the weights.

    Raises:
        RefusedError: As in `plan`; also for anything that is not a plain delta.
    """
    join.check([adapter for adapter, _ in adapters])
    plans = [plan([(adapter, 1.0)], folder) for adapter, _ in adapters]
    for adapter_plan in plans:
        for name in adapter_plan.shapes:
            raise RefusedError(name, "the vocabulary was resized, which only a sum of adapters can merge")
    return Plan(
        join_edits([adapter_plan.edits for adapter_plan in plans], join),
        added={name: weight for adapter_plan in plans for name, weight in adapter_plan.added.items()},
        config={key: value for adapter_plan in plans for key, value in adapter_plan.config.items()},
        notes=tuple(dict.fromkeys(note for adapter_plan in plans for note in adapter_plan.notes)),
    )


def _without_copies(adapter: Adapter, folder: Folder) -> Adapter:
    """Drop the adapter's copies of the base's tables, which must equal them; keep those of a resized vocabulary."""
    adapter = _without_wrappers(adapter)
    # A resized vocabulary changes the number of rows and nothing else.
    resized = {}
    for name, copy in adapter.copies.items():
        base_weight = folder.weights.get(name)
        if (
            base_weight
            and len(base_weight.shape) == 2
            and base_weight.shape[1:] == copy.shape[1:]
            and base_weight.shape[0] != copy.shape[0]
        ):
            resized[name] = copy
    # A copy cannot be compared with weights that are stored rounded.
    if folder.method and len(resized) < len(adapter.copies):
        reason = "the adapter contains a copy of the base's weight, and the base is quantized"
        raise RefusedError(next(iter(adapter.copies)), reason)
    same_size = {name: copy for name, copy in adapter.copies.items() if name not in resized}
    checked = without_copies(dataclasses.replace(adapter, copies=same_size), folder.path)
    return dataclasses.replace(checked, copies=resized) if resized else checked


def _without_wrappers(adapter: Adapter) -> Adapter:
    """Return the adapter without the duplicates that peft saves of a replaced table (`save_embedding_layers=True`).

    It saves the table itself and, under `modules_to_save`, the original.
    """
    infix = ".modules_to_save."
    duplicates = [
        name
        for name, values in adapter.replaced.items()
        if infix in name
        and (outer := adapter.replaced.get(name.replace(infix, "."))) is not None
        and np.array_equal(outer, values)
    ]
    replaced = {name: values for name, values in adapter.replaced.items() if name not in duplicates}
    copies = {name: copy for name, copy in adapter.copies.items() if name not in replaced}
    if len(replaced) == len(adapter.replaced) and len(copies) == len(adapter.copies):
        return adapter
    return dataclasses.replace(adapter, replaced=replaced, copies=copies, source=None)


_HEADS_OF = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
"""From PEFT's tasks to the suffix of model classes that have their head."""


class _Planner:
    """Collects the edits of a folder, adapter by adapter."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.tensors = folder.weights
        self.tables = TokenTables(folder)
        self._stored = StoredNames(folder)
        self.edits: dict[str, list[Edit]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.added: dict[str, Weight] = {}
        self.config: dict[str, Any] = {}
        self.notes: list[str] = []
        self._heads: dict[str, tuple[int, ...]] = {}
        self._replaced: set[str] = set()
        self._later: dict[str, list[Edit]] = {}
        self._spans: dict[str, list[tuple[int, int, bool]]] = {}
        self._architecture = architecture_of(folder)

    def plan(self) -> Plan:
        """Return the collected edits after checking them against each other."""
        self._check_vocabulary()
        edits = {name: tuple(edits) for name, edits in self.edits.items()}
        return Plan(edits, self.added, {**self.shapes, **self._heads}, self.config, tuple(dict.fromkeys(self.notes)))

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add all changes of one adapter."""
        # Copies, tuned and added tensors are merged below; every other conditional part is refused.
        refuse_conditions(dataclasses.replace(adapter, copies={}, tuned={}, added={}))
        adapter = self._add_head(adapter, weight)
        experts, modules = self._experts_and_modules(adapter)
        parameters = {**adapter.replaced, **adapter.copies, **adapter.added}
        named = dataclasses.replace(adapter, deltas=modules, replaced=parameters)
        names = TensorNames(self.folder, self._stored, named, self.tables.alias)
        self.notes += [*adapter.notes, *names.notes]
        self._replaced = {names.parameter(parameter) for parameter in adapter.replaced}
        for parameter, values in adapter.copies.items():
            self._resize(parameter, names.parameter(parameter), values)
        for target, delta in modules.items():
            if isinstance(delta, LowRank):
                self._add_low_rank(target, names.parameter(f"{target}.weight"), delta, weight, names)
            elif isinstance(delta, LowRankEmbedding):
                self._add_embedding(target, names.parameter(f"{target}.weight"), delta, weight)
            elif isinstance(delta, LowRankConv):
                self._add_convolution(target, names.parameter(f"{target}.weight"), delta, weight)
                self._add_bias(target, delta, weight, names)
            else:
                raise RefusedError(target, f"a delta of the kind {type(delta).__name__} cannot be merged into a base")
        for target, change in adapter.tuned.items():
            self._add_tuned(target, change, weight, names)
        for target, delta in experts.items():
            for expert_edit in expert_edits(self._stored, self._architecture, names.experts(target), delta, weight):
                self._add_edit(expert_edit.name, expert_edit.edit, target, expert_edit.rows)
        self._add_parameters(adapter, weight, names)
        # What the adapter adds to a bias that it replaces too was trained on top of the new bias (`bias` with `lora_bias`).
        for name, edits in self._later.items():
            self.edits[name] += edits
        self._later.clear()

    def _add_parameters(self, adapter: Adapter, weight: float, names: TensorNames) -> None:
        """Add the changes that do not belong to the weight of one module."""
        for parameter, values in adapter.added.items():
            name = names.parameter(parameter)
            self._check_shape(parameter, name, values.shape)
            self._add_edit(name, Add(values, weight), parameter)
        for parameter, values in adapter.replaced.items():
            self._replace(parameter, names.parameter(parameter), values, weight)
        rows_by_table: dict[str, Rows] = {}
        for target, rows in adapter.rows.items():
            name = names.parameter(f"{target}.weight")
            # peft saves the rows of tied tables once for each name.
            earlier = rows_by_table.setdefault(name, rows)
            if earlier is rows:
                self._set_rows(target, name, rows.ids, rows.values, weight)
            elif earlier.ids != rows.ids or not np.array_equal(earlier.values, rows.values):
                raise RefusedError(target, f"other rows than those of the base's {name}, to which it is tied")

    def _add_head(self, adapter: Adapter, weight: float) -> Adapter:
        """Add the head of a task that the base model's class lacks; return the adapter without it."""
        kind, base = _HEADS_OF.get(adapter.meta.task_type or ""), self.folder.spec.architecture
        new = {name: values for name, values in adapter.replaced.items() if name.startswith("score.")}
        if not kind or not base.endswith("ForCausalLM") or not new or any(name in self.tensors for name in new):
            return adapter
        for name, values in new.items():
            # The new tensor takes its file and dtype from a base tensor of the same number of dimensions.
            template = next((tensor for tensor in self.tensors.values() if len(tensor.shape) == values.ndim), None)
            if template is None or self.folder.method:
                raise absent_error(name.rpartition(".")[0], self.folder.spec.source)
            self.added[name] = dataclasses.replace(template, name=name)
            self._heads[name] = values.shape
            if weight != 1:
                raise RefusedError(name, f"a head of the adapter: weight {weight} has no meaning for it")
            self._add_edit(name, Replace(values), name, alone=True)
            self._note_rounding(name, values)
        labels = [f"LABEL_{number}" for number in range(len(new["score.weight"]))]
        self.config |= {
            "architectures": [base.removesuffix("ForCausalLM") + kind],
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
        }
        self.notes.append(f"the result is a {self.config['architectures'][0]}; transformers ignores its lm_head.weight")
        return dataclasses.replace(
            adapter, replaced={name: values for name, values in adapter.replaced.items() if name not in new}, source=None
        )

    def _experts_and_modules(self, adapter: Adapter) -> tuple[dict[str, Delta], dict[str, Delta]]:
        """Return the deltas of experts, which the base may store in another form than the adapter, and all others."""
        experts = {
            target: delta
            for target, delta in adapter.deltas.items()
            if isinstance(delta, StackedLowRank)
            or (f"{target}.weight" not in self.tensors and self._architecture and self._architecture.expert(target) is not None)
        }
        return experts, {target: delta for target, delta in adapter.deltas.items() if target not in experts}

    def _add_low_rank(self, target: str, name: str, delta: LowRank, weight: float, names: TensorNames) -> None:
        """Add a LoRA or DoRA delta of a linear layer."""
        transposed = self._is_transposed(target, name, delta)
        name = self._tensor_to_change(name, target)
        scale = delta.scaling * weight
        if delta.magnitude is None:
            self._add_edit(name, AddLowRank(delta, scale, transposed), target)
        else:
            self._add_dora(target, name, AddDora(delta, scale, transposed, delta.magnitude), weight)
        self._add_bias(target, delta, weight, names)

    def _add_bias(self, target: str, delta: LowRank | LowRankConv, weight: float, names: TensorNames) -> None:
        """Add the delta of a bias (`lora_bias`), if there is one."""
        if delta.bias is not None:
            bias = names.parameter(f"{target}.bias", reason="the adapter adds to a bias (lora_bias) and the base has none")
            self._check_shape(target, bias, delta.bias.shape)
            edit = AddVector(delta.bias, delta.scaling * weight)
            if bias in self._replaced:
                self._later.setdefault(bias, []).append(edit)
            else:
                self._add_edit(bias, edit, target)

    def _add_embedding(self, target: str, name: str, delta: LowRankEmbedding, weight: float) -> None:
        """Add the delta of an embedding table."""
        self._check_shape(target, name, delta.shape)
        name = self._tensor_to_change(name, target)
        scale = delta.scaling * weight
        if delta.magnitude is None:
            self._add_edit(name, AddLowRank(delta, scale, transposed=False), target)
        else:
            # peft takes the norms of a table down its columns (`DoraEmbeddingLayer`, fan_in_fan_out).
            self._add_dora(target, name, AddDora(delta, scale, transposed=True, magnitude=delta.magnitude), weight)

    def _add_tuned(self, target: str, change: TunedModule, weight: float, names: TensorNames) -> None:
        """Add the change by a tuner other than LoRA: the pair of factors that it equals, or a function of the whole weight."""
        name = self._tensor_to_change(names.parameter(f"{target}.weight"), target)
        shape = self.shapes.get(name, self._weight(name).shape)
        if not change.fits(shape):
            parts = ", ".join(f"{part} {tensor.shape}" for part, tensor in change.parts())
            raise RefusedError(target, f"{parts} of {change.tuner.method} do not fit the base's {name} {shape}")
        # The tuner computes on `(out, in)`, in whichever order the base stores the weight.
        rows, columns = shape[::-1] if change.transposed_base else shape
        # Tuners such as VeRA equal a pair of factors, which adds up like LoRA.
        if (pair := change.pair((rows, columns))) is not None:
            self._add_edit(name, AddLowRank(pair, pair.scaling * weight, change.transposed_base), target)
            return
        if weight != 1:
            raise RefusedError(target, f"{change.tuner.method} is not a sum: it can be merged alone and with weight 1 only")
        changed_weight = change.changed_weight
        if changed_weight is None:
            raise RefusedError(target, f"{change.tuner.method} changes no weight, so that it cannot be merged")
        self._add_edit(name, ChangeByTuner(changed_weight, change.transposed_base), target, alone=True)
        bias = name.removesuffix(".weight") + ".bias"
        if bias in self.tensors and change.fits_bias:
            self._add_edit(bias, ChangeByTuner(changed_weight), target, alone=True)
        elif bias in self.tensors and (changed_bias := change.changed_bias):
            self._add_edit(bias, ChangeBiasByTuner(changed_bias, partial(self._read_weight, name)), target, alone=True)

    def _read_weight(self, name: str) -> F32Array:
        """Return the base's own numbers of a tensor, seen as a matrix."""
        weight = self.tensors[name]
        numbers = np.empty((weight.rows, weight.columns), np.float32)
        weight.source().read(self.folder.opened, 0, weight.rows, numbers, lambda _, size: np.empty(size, np.uint8))
        return numbers

    def _add_convolution(self, target: str, name: str, delta: LowRankConv, weight: float) -> None:
        """Add the delta of a convolution."""
        self._check_shape(target, name, delta.shape)
        edit = AddConvolution(delta, delta.scaling * weight)
        if delta.magnitude is None:
            self._add_edit(name, edit, target)
        else:
            self._add_dora(target, name, edit, weight)

    def _add_dora(self, target: str, name: str, edit: AddDora | AddConvolution, weight: float) -> None:
        """Add a DoRA edit, which rescales the weight and so cannot be combined with other edits."""
        features = edit.delta.lora_B.shape[0]
        magnitude = edit.magnitude if isinstance(edit, AddDora) else edit.delta.magnitude
        if magnitude is not None and magnitude.size != features:
            raise RefusedError(target, f"a DoRA magnitude of {magnitude.size} numbers for {features} outputs")
        if weight != 1:
            raise RefusedError(target, "DoRA is not a sum: it can be merged alone and with weight 1 only")
        self._add_edit(name, edit, target, alone=True)

    def _resize(self, parameter: str, name: str, values: np.ndarray) -> None:
        """Replace a table by that of a resized vocabulary, to which the adapter's delta is then added."""
        name = self._tensor_to_change(name, parameter)
        self.shapes[name] = values.shape
        # First in line: the delta was trained on the resized table.
        self.edits.setdefault(name, []).insert(0, Replace(values))
        self.notes.append(f"{name}: {values.shape[0]} rows as in training, {self._weight(name).shape[0]} in the base")

    def _replace(self, parameter: str, name: str, values: np.ndarray, weight: float) -> None:
        """Replace a whole tensor by the adapter's; a token table may change its number of rows."""
        table = self.tables.is_table(name)
        if table and values.ndim == 2 and values.shape[1:] == self.tensors[name].shape[1:]:
            if values.shape != self.tensors[name].shape:
                self.notes.append(f"{name}: {values.shape[0]} rows as in training, {self.tensors[name].shape[0]} in the base")
        else:
            self._check_shape(parameter, name, values.shape)
        name = self._tensor_to_change(name, parameter)
        if values.shape != self._weight(name).shape:
            self.shapes[name] = values.shape
        if weight != 1:
            raise RefusedError(parameter, f"replaced as a whole by the adapter: weight {weight} has no meaning for it")
        self._add_edit(name, Replace(values), parameter, alone=True)
        self._note_rounding(name, values)

    def _set_rows(self, target: str, name: str, ids: tuple[int, ...], values: np.ndarray, weight: float) -> None:
        """Replace rows of a table (`trainable_token_indices`)."""
        shape = self.tensors[name].shape
        if len(shape) != 2 or values.shape[1:] != shape[1:] or not all(0 <= row < shape[0] for row in ids):
            raise RefusedError(target, f"rows {values.shape} up to {max(ids, default=0)} do not fit the base's {name} {shape}")
        if weight != 1:
            raise RefusedError(target, f"rows replaced by the adapter: weight {weight} has no meaning for them")
        self._add_edit(name, SetRows(ids, values), target, alone=True)
        self._note_rounding(name, values)

    def _note_rounding(self, name: str, values: np.ndarray) -> None:
        """Note that replaced values lose precision in the base's dtype."""
        dtype = dtypes.NUMPY[self._weight(name).dtype]
        if dtype.itemsize < values.dtype.itemsize or (dtype != values.dtype and dtype.itemsize == 2):
            self.notes.append(f"{name}: replaced values are rounded from {values.dtype} to the base's {dtype}")

    def _weight(self, name: str) -> Weight:
        """Return a tensor of the base, or one that the merge adds."""
        return self.tensors[name] if name in self.tensors else self.added[name]

    def _add_edit(
        self, name: str, edit: Edit, target: str, rows: tuple[int, int] | None = None, *, alone: bool = False
    ) -> None:
        """Add an edit of `rows` (first, count) of a tensor seen as a matrix, or of all of it.

        Args:
            alone: The edit cannot be combined with another edit of the same rows.
        """
        weight = self._weight(name)
        if not isinstance(kind(weight.dtype), Floats):
            reason = f"the base's {name} is {weight.dtype}, not bfloat16, float16 or float32"
            raise RefusedError(target, reason, "Dequantize it first")
        first, count = rows or (0, weight.rows)
        spans = self._spans.setdefault(name, [])
        for start, stop, span_alone in spans:
            if start < first + count and first < stop and (alone or span_alone):
                raise RefusedError(target, "one adapter replaces or rescales it and another changes it too")
        spans.append((first, first + count, alone))
        self.edits.setdefault(name, []).append(edit if rows is None else Within(edit, first, count))

    def _check_shape(self, target: str, name: str, shape: tuple[int, ...]) -> None:
        """Refuse an edit whose shape differs from the tensor's, resized or not."""
        check_shape(target, name, shape, self.shapes.get(name, self._weight(name).shape))

    def _tensor_to_change(self, name: str, target: str) -> str:
        """Return the tensor to change for an embedding table or output layer; untie tied ones."""
        if not self.tables.tied or not self.tables.is_table(name):
            return name
        head = target.endswith(HEADS) or f"{target}.weight".endswith(HEADS)
        if self.tables.head is None:
            if not self.tables.can_untie(self._architecture):
                reason = f"the base's embedding and output layer are one tensor ({name})"
                raise RefusedError(
                    target,
                    f"{reason}; merged, the change would act in both places",
                    "Untie them in the base first (tie_word_embeddings: false, and a separate lm_head.weight)",
                )
            # The new head starts as the table it was tied to; edits of either then stay separate.
            table = self.tensors[self.tables.table or name]
            self.added["lm_head.weight"] = dataclasses.replace(table, name="lm_head.weight")
            self.tables.head = "lm_head.weight"
        if "tie_word_embeddings" not in self.config:
            self.config["tie_word_embeddings"] = False
            self.notes.append("the embedding table and the output layer were tied and are now separate (tie_word_embeddings)")
        return self.tables.head if head else name

    def _check_vocabulary(self) -> None:
        """Refuse tables of a resized vocabulary that disagree on its size, and record the size for config.json."""
        # No table was resized, so the base's own sizes stand.
        if not self.shapes:
            return
        rows = {name: shape[0] for name, shape in self.shapes.items()}
        for name in (*self.tensors, *self.added):
            if self.tables.is_table(name) and name not in rows:
                rows[name] = self._weight(name).shape[0]
        if len(set(rows.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in rows.items())
            raise RefusedError(next(iter(self.shapes)), f"the vocabulary was resized, and its tables do not agree: {counts}")
        self.config["vocab_size"] = next(iter(rows.values()))

    def _is_transposed(self, target: str, name: str, delta: LowRank) -> bool:
        """Return whether the base stores this weight as `(in, out)`.

        The shape decides; for a square matrix, the class of the model does.
        """
        shape = self.shapes.get(name, self._weight(name).shape)
        model = self.folder.spec.model_type or "this model"
        known_transposed = stored_transposed(self.folder.spec.model_type, target)
        if known_transposed or (delta.transposed_base and shape == delta.shape[::-1] != delta.shape):
            self._check_shape(target, name, delta.shape[::-1])
            return True
        self._check_shape(target, name, delta.shape)
        if delta.transposed_base and shape[0] == shape[1]:
            raise RefusedError(
                target,
                f"square, and fan_in_fan_out is set, but {model} is not known to store it transposed",
                "Set fan_in_fan_out to false in adapter_config.json if it does not",
            )
        return False
