"""Plan a merge into a GGUF model: the edits of each tensor, in llama.cpp's names and orders, and every reason to refuse.

A Hugging Face module may be some rows of a tensor (fused q, k and v), an expert of it (stacked experts) or several tensors, and
its rows may be in another order there (`architectures`, `formats.gguf.tensor_layout`). Its edit is moved accordingly.
"""

from __future__ import annotations

from dataclasses import field

import numpy as np

from adapterhub.merging.adapter_checks import WeightedAdapters, check_adapter
from adapterhub_converters.adapter import (
    Adapter,
    LowRank,
    LowRankEmbedding,
    Rows,
    StackedLowRank,
    factor_pairs,
    with_factored_as_pairs,
)
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats.gguf import adapter_checks
from adapterhub_converters.formats.gguf.tensor_layout import ALL_EXPERTS, Size, arrange, size_of
from adapterhub_converters.lazy_dataclass import dataclass

from .edits import AddDora, AddLowRank, AddVector, Edit, Replace, SetRows, Within
from .joined_edits import Join, join_edits
from .read_base import GGUFBase, TensorInFile

TABLE, HEAD = "token_embd", "output"


@dataclass
class GGUFPlan:
    """The changes of a GGUF model.

    Attributes:
        edits: By tensor name, in the order of the adapters.
        targets: From tensor name to the modules that change it.
        untied: Whether the output layer gets a tensor of its own, initially a copy of the embedding table.
        notes: Decisions, one line each.
    """

    base: GGUFBase
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    targets: dict[str, list[str]] = field(default_factory=dict)
    untied: bool = False
    notes: list[str] = field(default_factory=list)


def plan_gguf(adapters: WeightedAdapters, base: GGUFBase) -> GGUFPlan:
    """Plan the merge of adapters, each times its weight, into a GGUF model.

    Raises:
        RefusedError: The result would differ from base and adapters loaded together; names the module and the reason.
    """
    if not adapters:
        raise RefusedError(str(base.path), "no adapter to merge")
    planner = _Planner(base)
    for adapter, weight in adapters:
        check_adapter(adapter, weight)
        # A folder's own weights can be compared with such copies; those of a GGUF may be rounded.
        if adapter.copies:
            reason = "the adapter contains a copy of the base's weight"
            raise RefusedError(next(iter(adapter.copies)), reason, "Save it again with save_embedding_layers=False")
        planner.add(with_factored_as_pairs(adapter), weight)
    planner.untie()
    planner.plan.notes = list(dict.fromkeys(planner.plan.notes))
    return planner.plan


def plan_gguf_joined(adapters: WeightedAdapters, base: GGUFBase, join: Join) -> GGUFPlan:
    """Plan the merge of adapters by a method that is not a sum; `join` knows the weights.

    Raises:
        RefusedError: As in `plan_gguf`.
    """
    join.check([adapter for adapter, _ in adapters])
    plans = [plan_gguf([(adapter, 1.0)], base) for adapter, _ in adapters]
    edits = join_edits([adapter_plan.edits for adapter_plan in plans], join)
    targets = {
        name: list(dict.fromkeys(target for adapter_plan in plans for target in adapter_plan.targets.get(name, ())))
        for name in edits
    }
    notes = list(dict.fromkeys(note for adapter_plan in plans for note in adapter_plan.notes))
    untied = any(adapter_plan.untied for adapter_plan in plans)
    return GGUFPlan(base, {name: list(tensor_edits) for name, tensor_edits in edits.items()}, targets, untied, notes)


class _Planner:
    """Collects the edits of a GGUF model, adapter by adapter."""

    def __init__(self, base: GGUFBase) -> None:
        self.plan = GGUFPlan(base)
        self._base = base
        self._spec = base.spec
        self._architecture = architecture_lookup.by_class(base.spec.architecture, base.spec.source, whole=True)
        self._rows = adapter_checks.base_rows(base.spec)
        self._experts = adapter_checks.expert_count(base.spec, self._architecture)
        self._spans: dict[str, list[tuple[int, int, bool]]] = {}
        self._tied = HEAD + ".weight" not in base.tensors

    def add(self, adapter: Adapter, weight: float) -> None:
        """Add all changes of one adapter."""
        self.plan.notes += adapter.notes
        for target, delta in factor_pairs(adapter).items():
            if isinstance(delta, LowRankEmbedding):
                self._add_embedding(target, delta, weight)
            elif isinstance(delta, StackedLowRank):
                self._add_stacked(target, delta, weight)
            else:
                self._add_low_rank(target, delta, weight)
        for parameter, values in adapter.replaced.items():
            self._replace(parameter, values, weight)
        for target, rows in adapter.rows.items():
            self._set_rows(target, rows, weight)

    def untie(self) -> None:
        """Give a tied model a separate output layer if table and output are to differ."""
        if not (self._tied and self.plan.untied):
            return
        if not self._architecture.head:
            reason = f"llama.cpp's {self._architecture.gguf} has no output layer but the embedding table"
            raise RefusedError(TABLE, f"{reason}: merged, a change of one would act in both places")
        self.plan.edits.setdefault(f"{HEAD}.weight", [])
        self.plan.notes.append("the embedding table and the output layer were one tensor and are now two (output.weight)")

    def _parts(self, target: str, size: Size) -> list[tuple[str, int | None, int, slice]]:
        """Return the tensors of a module: name, expert, first row there, and the rows of the delta that belong there."""
        if vector_tensor := self._vector_tensor(target):
            return [(vector_tensor, None, 0, slice(None))]
        if not self._architecture.stem(target):
            raise RefusedError(target, f"not a module that llama.cpp's {self._architecture.gguf!r} has as a tensor of its own")
        layout = arrange(self._architecture, {target: size}, self._experts, self._rows, self._spec.source)
        places = []
        for part in layout.parts[target]:
            rows = slice(part.start, part.start + part.step * part.count, part.step)
            places.append((f"{part.stem}.weight", part.expert, part.row, rows))
        return places

    def _vector_tensor(self, target: str) -> str | None:
        """Return the tensor of a module that takes no LoRA in llama.cpp, since a matrix of one row is a vector there."""
        layer, path = architecture_lookup.layer_of(target), target.split(".", 3)[-1]
        stem = self._architecture.aside.get(f"{path}.weight") if layer is not None else None
        return f"blk.{layer}.{stem}" if stem else None

    def _order(self, target: str, rows: int) -> architecture_lookup.Order:
        """Return the order of a module's rows in llama.cpp; RefusedError if the rows do not make whole heads."""
        order = self._architecture.order(target, self._spec.config, self._spec.source)
        if not architecture_lookup.order_fits(order, rows):
            raise RefusedError(target, f"{rows} rows are not those of {order} heads")
        return order

    def _add_low_rank(self, target: str, delta: LowRank, weight: float) -> None:
        """Add a LoRA or DoRA delta to each tensor that has rows of the module."""
        scale, order = delta.scaling * weight, self._order(target, delta.shape[0])
        # llama.cpp uses the embedding table as the output layer; a change of one alone needs two tensors.
        if target == "lm_head" and self._tied:
            self.plan.untied = True
        vector_tensor = self._vector_tensor(target) or ""
        if vector_tensor.endswith(".attn_kv_b.weight") and vector_tensor not in self._base.tensors:
            self._add_latent(target, vector_tensor.removesuffix("kv_b.weight"), delta, weight)
            return
        for name, expert, row, rows in self._parts(target, size_of(delta)):
            lora_B = architecture_lookup.permute_rows(delta.lora_B, order)[rows]
            piece = LowRank(delta.lora_A, lora_B, delta.alpha)
            first, tensor_name = self._place(target, name, expert, row, piece.shape)
            if delta.magnitude is None:
                self._add_edit(target, tensor_name, first, len(lora_B), AddLowRank(piece, scale, transposed=False))
                continue
            if delta.magnitude.size != delta.shape[0]:
                raise RefusedError(target, f"a DoRA magnitude of {delta.magnitude.size} numbers for {delta.shape[0]} outputs")
            if weight != 1:
                raise RefusedError(target, "DoRA is not a sum: it can be merged alone and with weight 1 only")
            magnitude = architecture_lookup.permute_rows(delta.magnitude.reshape(-1), order)[rows]
            edit = AddDora(piece, scale, transposed=False, magnitude=magnitude)
            self._add_edit(target, tensor_name, first, len(lora_B), edit, alone=True)
        if delta.bias is not None:
            self._add_bias(target, architecture_lookup.permute_rows(delta.bias, order), scale)

    def _add_latent(self, target: str, prefix: str, delta: LowRank, weight: float) -> None:
        """Add a delta of DeepSeek's kv_b_proj, whose rows are the keys and values of each head.

        llama.cpp stores the keys of each head transposed in `k_b`, and the values in `v_b` (conversion/deepseek.py).
        """
        keys, values = (self._base.tensors.get(f"{prefix}{part}_b.weight") for part in "kv")
        if not keys or not values or not delta.plain or len(keys.info.shape) != 3 or len(values.info.shape) != 3:
            raise RefusedError(target, f"the base has no {prefix}kv_b, or the adapter does more than add to it")
        (heads, _, width), rows_per_head = keys.info.shape, keys.info.shape[2] + values.info.shape[1]
        if delta.shape[0] != heads * rows_per_head:
            raise RefusedError(target, f"{delta.shape[0]} rows are not those of {heads} heads of {rows_per_head}")
        scale = delta.scaling * weight
        for head in range(heads):
            rows = delta.lora_B[head * rows_per_head : (head + 1) * rows_per_head]
            key_piece = LowRank(np.ascontiguousarray(rows[:width].T), np.ascontiguousarray(delta.lora_A.T), delta.alpha)
            for piece, name in (
                (key_piece, keys.info.name),
                (LowRank(delta.lora_A, rows[width:], delta.alpha), values.info.name),
            ):
                first, tensor_name = self._place(target, name, head, 0, piece.shape)
                self._add_edit(target, tensor_name, first, piece.shape[0], AddLowRank(piece, scale, transposed=False))

    def _add_bias(self, target: str, values: np.ndarray, scale: float) -> None:
        """Add the delta of a bias (`lora_bias`)."""
        name = f"{self._architecture.stem(target)}.bias"
        if name not in self._base.tensors:
            raise RefusedError(target, f"the adapter adds to a bias (lora_bias) and the base has no {name}")
        self._check_shape(target, name, values.shape)
        self._add_edit(target, name, 0, 1, AddVector(values, scale, row=True))

    def _add_stacked(self, target: str, delta: StackedLowRank, weight: float) -> None:
        """Add a delta of all experts of a module."""
        scale, experts = delta.scaling * weight, delta.shape[0]
        for name, expert, row, rows in self._parts(target, size_of(delta)):
            tensor = self._base_tensor(name)
            if tensor is None:
                raise RefusedError(target, f"the base has no {name} ({self._spec.source})")
            if expert != ALL_EXPERTS or len(tensor.info.shape) != 3 or tensor.info.shape[0] != experts:
                raise RefusedError(target, f"{experts} experts, not as many as the base's {name} has")
            # A stack is one tensor with a range of rows for each expert.
            for number in range(experts):
                piece = LowRank(delta.lora_A[number], delta.lora_B[number][rows], delta.alpha)
                first, _ = self._place(target, name, number, row, piece.shape)
                self._add_edit(target, name, first, piece.shape[0], AddLowRank(piece, scale, transposed=False))

    def _add_embedding(self, target: str, delta: LowRankEmbedding, weight: float) -> None:
        """Add the delta of an embedding table or output layer."""
        name = self._table(target)
        self._check_shape(target, name, delta.shape)
        if self._tied:
            self.plan.untied = True
        self._add_edit(target, name, 0, delta.shape[0], AddLowRank(delta, delta.scaling * weight, transposed=False))

    def _table(self, target: str) -> str:
        """Return the tensor of the embedding table or the output layer."""
        name = f"{self._architecture.stem(target) or HEAD * (target == 'lm_head')}.weight"
        if name not in (f"{TABLE}.weight", f"{HEAD}.weight"):
            raise RefusedError(target, "not the table of embeddings or the output layer")
        return name

    def _replace(self, parameter: str, values: np.ndarray, weight: float) -> None:
        """Replace a whole tensor by the adapter's."""
        module, _, part = parameter.rpartition(".")
        stem = self._architecture.stem(module)
        if stem is None or self._architecture.is_stacked(module) or self._architecture.is_stacked(parameter):
            raise RefusedError(parameter, f"replaced by the adapter, and no tensor of llama.cpp's {self._architecture.gguf!r}")
        if weight != 1:
            raise RefusedError(parameter, f"replaced as a whole by the adapter: weight {weight} has no meaning for it")
        name = f"{stem}.{part}"
        if stem in (TABLE, HEAD) and self._tied:
            self.plan.untied = True
        # GPT-2 stores `(in, out)`; GGUF always stores `(out, in)`.
        if self._architecture.transposed and values.ndim == 2 and architecture_lookup.layer_of(module) is not None:
            values = values.T
        if shift := self._architecture.shift(parameter):
            values = values.astype(np.float32) + np.float32(shift)
        values = architecture_lookup.permute_rows(values, self._order(module, len(values)))
        self._check_shape(parameter, name, values.shape)
        matrix = values.reshape(1, -1) if values.ndim < 2 else values
        self._add_edit(parameter, name, 0, len(matrix), Replace(matrix), alone=True)

    def _set_rows(self, target: str, rows: Rows, weight: float) -> None:
        """Replace rows of a table (`trainable_token_indices`)."""
        name = self._table(target)
        if self._tied and name == f"{HEAD}.weight":
            name = f"{TABLE}.weight"  # peft replaces them in both places
        tensor = self._base_tensor(name)
        shape = tensor.info.shape if tensor else ()
        if len(shape) != 2 or rows.values.shape[1:] != shape[1:] or not all(0 <= row < shape[0] for row in rows.ids):
            raise RefusedError(target, f"rows {rows.values.shape} up to {max(rows.ids, default=0)} do not fit {name} {shape}")
        if weight != 1:
            raise RefusedError(target, f"rows replaced by the adapter: weight {weight} has no meaning for them")
        self._add_edit(target, name, 0, shape[0], SetRows(rows.ids, rows.values), alone=True)

    def _place(self, target: str, name: str, expert: int | None, row: int, shape: tuple[int, int]) -> tuple[int, str]:
        """Return the first row in the tensor seen as a matrix, and the tensor's name.

        Raises:
            RefusedError: The delta does not fit there.
        """
        tensor = self._base_tensor(name)
        if tensor is None:
            raise RefusedError(target, f"the base has no {name} ({self._spec.source})", self._fused_hint(target))
        stored_shape = tensor.info.shape
        if expert is not None and (len(stored_shape) != 3 or not 0 <= expert < stored_shape[0]):
            raise RefusedError(target, f"expert {expert} is not in the base's {name} {stored_shape}")
        rows_per_expert = stored_shape[-2] if len(stored_shape) > 1 else 1
        if (
            not stored_shape
            or stored_shape[-1] != shape[1]
            or row + shape[0] > rows_per_expert
            or (expert is None and len(stored_shape) == 3)
        ):
            raise RefusedError(target, f"changes a weight of shape {shape}, the base's {name} is {stored_shape}")
        return (expert or 0) * rows_per_expert + row, name

    def _base_tensor(self, name: str) -> TensorInFile | None:
        """Return a tensor of the base; for an output layer that the base lacks, the embedding table that it starts as."""
        tensor = self._base.tensors.get(name)
        if tensor is None and name == f"{HEAD}.weight":  # it gets a copy of the table
            return self._base.tensors.get(f"{TABLE}.weight")
        return tensor

    def _fused_hint(self, target: str) -> str:
        """Return a hint that names the attention tensors of the module's layer."""
        layer = architecture_lookup.layer_of(target)
        attention_tensors = sorted(name for name in self._base.tensors if name.startswith(f"blk.{layer}.attn_"))
        return (
            f"It has {', '.join(attention_tensors)}" if attention_tensors else "Is this the model the adapter was trained on?"
        )

    def _check_shape(self, target: str, name: str, shape: tuple[int, ...]) -> None:
        """Refuse an edit whose shape differs from the tensor's."""
        tensor = self._base_tensor(name)
        if tensor is None:
            raise RefusedError(target, f"the base has no {name} ({self._spec.source})")
        if tensor.info.shape != tuple(shape):
            reason = f"changes a weight of shape {tuple(shape)}, the base's {name} is {tensor.info.shape}"
            resized = tensor.info.shape[1:] == tuple(shape)[1:] and name.partition(".")[0] in (TABLE, HEAD)
            hint = "The vocabulary was resized, unlike the GGUF's tokenizer: merge into the folder" if resized else ""
            raise RefusedError(target, reason, hint)

    def _add_edit(self, target: str, name: str, first: int, count: int, edit: Edit, *, alone: bool = False) -> None:
        """Add an edit of `count` rows from `first` on; `alone` if it cannot be combined with another edit of the same rows."""
        spans = self._spans.setdefault(name, [])
        for start, stop, span_alone in spans:
            if start < first + count and first < stop and (alone or span_alone):
                raise RefusedError(target, "one adapter replaces or rescales it and another changes it too")
        spans.append((first, first + count, alone))
        tensor = self._base_tensor(name)
        all_rows = tensor is not None and first == 0 and count == tensor.rows
        self.plan.edits.setdefault(name, []).append(edit if all_rows else Within(edit, first, count))
        self.plan.targets.setdefault(name, []).append(target)
