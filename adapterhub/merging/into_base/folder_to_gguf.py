"""Write a Hugging Face folder, merged or unchanged, as the GGUF file that llama.cpp's own conversion would make of it.

Each tensor is made of those that a merge into a folder would write (`write_folder`), arranged as in llama.cpp
(`formats.gguf_model.arrangement`), and rounded to its type there. Rows are read a few at a time; only a matrix that has to be
transposed is held as a whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.architectures.architecture import Architecture
from adapterhub_converters.containers import gguf_output, gguf_types, json_file
from adapterhub_converters.containers.gguf_types import MetadataValue
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats.gguf_model.arrangement import ArrangedTensor, SourcePart, arrange, negative_exp, rope_tensors
from adapterhub_converters.formats.gguf_model.metadata import file_type_keys, general, hyperparameters
from adapterhub_converters.formats.gguf_model.model_checks import check_complete, check_computed
from adapterhub_converters.formats.gguf_model.model_config import complete_config
from adapterhub_converters.formats.gguf_model.special_tokens import read_tokenizer
from adapterhub_converters.formats.gguf_model.vocabulary import vocabulary
from adapterhub_converters.lazy_dataclass import dataclass

from .importance import Importance
from .k_quants import WEIGHTED
from .merge_options import DTYPES, REQUANTIZE, Options
from .mixtures import MIXTURES, TABLES, mixture_types
from .output_files import Copy, EditedTensor, LiteralBytes, OutFile, OutputWriter, Part, PreparedTensor, UnfitError, unfit_error
from .read_base import Folder, Weight
from .tensor_files import Buffer, OpenFiles, StoredRows, TensorSource, new_buffer
from .tensor_types import Blocks, Kind, fitting, floats, writable
from .write_folder import FolderContents
from .write_gguf import LINEAGE, NEVER_QUANTIZED, prompt_keys

F32Array = NDArray[np.float32]


@dataclass(frozen=True)
class Model:
    """A GGUF model to write.

    Attributes:
        metadata: Its keys.
        tensors: In the order of the file.
        changed: The folder's tensors that adapters change, in the type that each gets, for the loss estimate.
        notes: Decisions, one line each.
    """

    metadata: Mapping[str, MetadataValue]
    tensors: Sequence[_Tensor]
    changed: Sequence[EditedTensor]
    notes: tuple[str, ...]

    def files(self, out: Path) -> tuple[OutFile, ...]:
        """Return the one output file."""
        order = [(tensor.plan.name, tensor.kind.name, tensor.plan.shape) for tensor in self.tensors]
        head = gguf_output.header_bytes(self.metadata, order)
        parts: list[Part] = [LiteralBytes(head, 0)]
        at = len(head)
        for tensor in self.tensors:
            parts += tensor.parts(at)
            at += tensor.size
            if padding := -at % gguf_types.ALIGNMENT:
                parts.append(LiteralBytes(bytes(padding), at))
                at += padding
        return (OutFile(out.name, parts),)


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor of the output, and the pieces of the folder's tensors that it consists of."""

    plan: ArrangedTensor
    kind: Kind
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return self.plan.rows * self.kind.row_size(self.plan.columns)

    def parts(self, at: int) -> list[Part]:
        """Return the parts that write the tensor from byte `at` on: copies of its pieces, if their bytes do not change."""
        plan = self.plan
        if plan.constant is not None:
            return [LiteralBytes(plan.constant.tobytes(), at)]
        copies = [_copy_of(piece, self.kind) for piece in self.pieces]
        if not plan.shift and not plan.decay and all(copies):
            copied_parts: list[Part] = []
            for copy in copies:
                if copy:
                    copied_parts.append(replace(copy, at=at))
                    at += copy.size
            return copied_parts
        source = LaidOut(self.pieces, plan.rows, plan.columns, plan.shift, plan.decay)
        return [EditedTensor(plan.name, source, self.kind, at, ())]


def _copy_of(piece: Piece, target: Kind) -> Copy | None:
    """Return a copy of the piece's bytes in the base's file; None if they change."""
    part, source = piece.part, piece.source
    # Rows in the base's order and whole columns: the bytes can be copied as they are.
    straight = not part.transposed and part.picks is None and part.columns is None
    if not straight or not isinstance(source, StoredRows) or source.kind.name != target.name:
        return None
    width = target.row_size(source.columns)
    return Copy(source.path, source.offset + part.first * width, part.height * width, 0, part.height * width)


def gguf_model(folder: Folder, contents: FolderContents, options: Options) -> Model:
    """Plan the GGUF model of a folder with edits.

    Raises:
        RefusedError: llama.cpp cannot represent the result exactly; names what it cannot represent.
    """
    folder_name = str(folder.path)
    if contents.shapes:
        name = next(iter(contents.shapes))
        if name in contents.added:
            raise RefusedError(name, "a GGUF has no head of this task", "Merge into a folder")
        hint = "Merge into a folder, add the tokenizer there, and convert that"
        raise RefusedError(name, "the adapter resizes the vocabulary, and a GGUF contains the tokenizer", hint)
    architecture = architecture_lookup.by_class(folder.spec.architecture, folder_name, folder=True)
    config = complete_config(folder.config, folder_name)
    weights = {**folder.weights, **contents.added}
    plan = arrange(architecture, {name: weight.shape for name, weight in weights.items()}, config)
    # A tower that the text model lacks, such as a vision encoder, cannot take a change silently.
    if lost_name := next((name for name, edits in contents.edits.items() if edits and name not in plan.sources), None):
        raise RefusedError(lost_name, "the adapter changes it, but a GGUF of the text model does not contain it")
    check_complete(architecture, {tensor.name: tensor.shape for tensor in plan.tensors}, config)
    numbers = hyperparameters(architecture, config)
    rope_notes = check_computed(config)
    computed, rope_keys = rope_tensors(architecture.gguf, config)
    rows = next((tensor.shape[0] for tensor in plan.tensors if tensor.name == "token_embd.weight"), 0)
    if rows != config.count("vocab_size"):
        sizes = f"vocab_size is {config.get('vocab_size')}, and there are {rows} rows of embeddings"
        raise RefusedError(folder_name, f"config.json: {sizes}")
    tokens, notes = vocabulary(architecture, read_tokenizer(folder.path, folder.config), rows)
    main_type = _main_type(folder, options)
    sources = {name: _source(weight, contents, folder, options) for name, weight in weights.items()}
    planned = (*computed, *plan.tensors)
    shapes = {tensor.name: tensor.shape for tensor in planned}
    types = {tensor.name: _type(tensor, main_type) for tensor in planned}
    if options.requantize in MIXTURES:
        types |= mixture_types(options.requantize, architecture.gguf, shapes, numbers)
    tensors = [_tensor(tensor, types[tensor.name], options, sources) for tensor in planned]
    metadata = _general(folder, architecture, shapes)
    metadata |= {f"{architecture.gguf}.{key}": value for key, value in (numbers | rope_keys).items()}
    metadata |= {key: _number_array([sources[name] for name in parts], folder) for key, parts in plan.numbers.items()}
    metadata |= file_type_keys(options.requantize if options.requantize in MIXTURES else main_type) | tokens
    if options.importance:
        metadata |= options.importance.metadata()
        notes = (*_importance_notes(tensors, options.importance), *notes)
    metadata |= prompt_keys(options)
    if options.lineage:
        metadata[LINEAGE] = gguf_types.string_value(json.dumps(options.lineage, sort_keys=True))
    changed = _changed_tensors(tensors, contents)
    if folder.method:
        notes = (f"the base's weights were quantized ({folder.method}) and are dequantized", *notes)
    return Model(metadata, tensors, changed, (*dict.fromkeys(plan.notes), *rope_notes, *notes))


def _general(folder: Folder, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, MetadataValue]:
    """Return the `general.*` keys of a folder."""
    path = folder.path / "generation_config.json"
    generation = json_file.read_object(path) if path.is_file() else {}
    name = (folder.spec.repo or "").rpartition("/")[2] or folder.path.resolve().name
    return general(architecture.gguf, name, shapes, generation)


def _number_array(sources: Sequence[TensorSource], folder: Folder) -> MetadataValue:
    """Return an array of the numbers of tensors that have one element each."""
    out = np.empty((len(sources), 1), np.float32)
    for at, source in enumerate(sources):
        source.read(folder.opened, 0, 1, out[at : at + 1], new_buffer)
    return MetadataValue("[FLOAT32]", out[:, 0].tolist())


def _main_type(folder: Folder, options: Options) -> str:
    """Return the type of most matrices: the requested one, else the base's most common by elements."""
    if options.requantize:
        return MIXTURES[options.requantize] if options.requantize in MIXTURES else REQUANTIZE[options.requantize]
    if options.dtype:
        return DTYPES[options.dtype]
    sizes = Counter[str]()
    for weight in folder.weights.values():
        sizes[weight.dtype] += weight.rows * weight.columns
    return sizes.most_common(1)[0][0]


def _source(weight: Weight, contents: FolderContents, folder: Folder, options: Options) -> TensorSource:
    """Return the numbers of a tensor of the merged folder, rounded once to the result's type if that is not the base's."""
    edits = contents.edits.get(weight.name, ())
    unchanged = contents.sources.get(weight.name) or weight.source()
    if not edits:
        return unchanged
    # With a new type the sum stays in float32 here and is rounded once, when it is written.
    new_type = bool(options.dtype or options.requantize or folder.method)
    wide = floats("F32" if new_type else weight.dtype, weight.name)
    return MergedSource(EditedTensor(weight.name, unchanged, wide, 0, edits, stepwise=not new_type))


def _tensor(plan: ArrangedTensor, type_name: str, options: Options, sources: Mapping[str, TensorSource]) -> _Tensor:
    """Return a tensor of the output with its type and pieces."""
    pieces = tuple(Piece(part, sources[part.source]) for part in plan.parts)
    kind = writable(type_name, plan.columns, plan.name)
    if options.importance and isinstance(kind, Blocks) and kind.name in WEIGHTED:
        kind = _by_importance(plan, kind, options.importance)
    return _Tensor(plan, kind, pieces)


def _by_importance(plan: ArrangedTensor, kind: Blocks, importance: Importance) -> Blocks:
    """Return the type with the importance of a tensor's columns, if the matrix has the tensor."""
    values, experts = importance.values.get(plan.name), plan.shape[0] if len(plan.shape) > 2 else 1
    if values is None:
        return kind
    if values.size != experts * plan.columns:
        if plan.name in TABLES:  # the rows of a token table are looked up, not multiplied
            return kind
        reason = f"{values.size} numbers for {plan.name}, which has {experts * plan.columns} columns"
        raise RefusedError(importance.where, reason, "Is this the matrix of another model?")
    return replace(kind, importance=values.reshape(experts, plan.columns), rows_per_expert=plan.rows // experts)


def _importance_notes(tensors: Sequence[_Tensor], importance: Importance) -> tuple[str, ...]:
    """Return a note if the importance matrix lacks tensors that are quantized."""
    kinds = {tensor.plan.name: tensor.kind for tensor in tensors}
    lacking = [name for name, kind in kinds.items() if kind.name in WEIGHTED and name not in importance.values]
    lacking = [name for name in lacking if name not in (*TABLES, "output.weight")]
    if not any(isinstance(kind, Blocks) and kind.importance is not None for kind in kinds.values()):
        raise RefusedError(importance.where, "an importance matrix of no tensor that is quantized", "Choose a K-quant")
    return (f"{len(lacking)} tensors are not in the importance matrix: {lacking[0]}",) if lacking else ()


def _type(plan: ArrangedTensor, main_type: str) -> str:
    """Return the type of a tensor as llama.cpp decides it (conversion/base.py, `prepare_tensors`)."""
    if len(plan.shape) < 2 or plan.name.endswith(NEVER_QUANTIZED) or not plan.name.endswith(".weight"):
        return "F32"
    return fitting(main_type, plan.columns)


def _changed_tensors(tensors: Sequence[_Tensor], contents: FolderContents) -> list[EditedTensor]:
    """Return each changed tensor of the folder in its new type, for the loss estimate; the order of rows is irrelevant."""
    changed: dict[str, EditedTensor] = {}
    for tensor in tensors:
        for piece in tensor.pieces:
            edited = piece.source.edited if isinstance(piece.source, MergedSource) else None
            if edited and contents.edits.get(edited.name) and edited.name not in changed:
                fits = edited.source.columns % gguf_types.TYPES[tensor.kind.name][1] == 0
                target = tensor.kind if fits else floats("F16", edited.name)
                stepwise = edited.stepwise and target.name == edited.kind.name
                changed[edited.name] = replace(edited, kind=target, stepwise=stepwise)
    return list(changed.values())


@dataclass(frozen=True, eq=False)
class MergedSource:
    """A tensor of the folder with its edits applied, rounded to `edited.kind`."""

    edited: EditedTensor

    @property
    def rows(self) -> int:
        """The number of rows of the tensor."""
        return self.edited.source.rows

    @property
    def columns(self) -> int:
        """The numbers in a row."""
        return self.edited.source.columns

    def read(self, opened: OpenFiles, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Read rows as in the merged folder; RefusedError for a number that its type cannot hold."""
        # An even number of rows, as in a merge into a folder (`product`).
        first, last = start // 2 * 2, min(self.rows, stop + stop % 2)
        np.copyto(out, self._merged_rows(opened, first, last, buffer)[start - first : stop - first])

    def _merged_rows(self, opened: OpenFiles, start: int, stop: int, buffer: Buffer) -> F32Array:
        """Return rows `start` to `stop` with the edits applied, in this thread's buffers."""
        edited, count = self.edited, (stop - start) * self.columns

        def load() -> PreparedTensor:
            ready = edited.prepare()
            OutputWriter(None, 0).look(ready, opened)
            return ready

        ready: PreparedTensor = opened.cached(f"ready {edited.name}", load)
        wide = buffer("merged", 4 * count).view(np.float32).reshape(stop - start, self.columns)
        width = edited.kind.row_size(self.columns)
        raw = buffer("merged raw", (stop - start) * width).reshape(stop - start, width)
        edited.source.read(opened, start, stop, wide, buffer)
        try:
            ready.change(wide, raw, start, buffer("merged scratch", 4 * (count + self.columns)).view(np.float32))
        except UnfitError as unfit:
            # The edits overwrote the rows: read the base's again to tell whose fault it is.
            edited.source.read(opened, start, stop, wide, buffer)
            raise unfit_error(edited, wide) from unfit
        edited.kind.decode(raw, wide)
        return wide


@dataclass(frozen=True, eq=False)
class Piece:
    """A part of a tensor of the output, and the source of its numbers."""

    part: SourcePart
    source: TensorSource

    @property
    def rows(self) -> int:
        """The number of rows of the result."""
        if self.part.picks is not None:
            return len(self.part.picks)
        return self.source.columns if self.part.transposed else self.part.height

    def read(self, opened: OpenFiles, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Read rows `start` to `stop` of the part."""
        if self.part.transposed:
            self._read_transposed(opened, start, stop, out, buffer)
        elif self.part.picks is not None:
            self._read_picked(opened, self.part.picks[start:stop], out, buffer)
        else:
            self._read_straight(opened, self.part.first + start, self.part.first + stop, out, buffer)

    def _read_straight(self, opened: OpenFiles, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        if self.part.columns is None:
            self.source.read(opened, start, stop, out, buffer)
            return
        rows = np.empty((stop - start, self.source.columns), np.float32)
        self.source.read(opened, start, stop, rows, buffer)
        np.copyto(out, rows[:, self.part.columns])

    def _read_picked(self, opened: OpenFiles, picks: NDArray[np.int64], out: F32Array, buffer: Buffer) -> None:
        """Read rows in any order; rows that follow one another in the file are read together."""
        # Sorted, so that neighboring rows are one read each.
        order = np.argsort(picks, kind="stable")
        for run in np.split(order, np.flatnonzero(np.diff(picks[order]) != 1) + 1):
            first, count = int(picks[run[0]]), len(run)
            rows = buffer("picked", 4 * count * self.source.columns).view(np.float32).reshape(count, self.source.columns)
            self.source.read(opened, self.part.first + first, self.part.first + first + count, rows, buffer)
            out[run] = rows

    def _read_transposed(self, opened: OpenFiles, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Read rows of the transpose from the whole source, which is cached."""

        def load() -> F32Array:
            slab = np.empty((self.part.height, self.source.columns), np.float32)
            self.source.read(opened, self.part.first, self.part.first + self.part.height, slab, buffer)
            return slab

        slab = opened.cached(f"turned {self.part.source} {self.part.first}", load)
        picks = self.part.picks
        np.copyto(out, (slab[:, start:stop] if picks is None else slab[:, picks[start:stop]]).T)


@dataclass(frozen=True, eq=False)
class LaidOut:
    """Pieces stacked from top to bottom, with `shift` added to every number, or -exp of every number with `decay`."""

    pieces: Sequence[Piece]
    rows: int
    columns: int
    shift: float = 0.0
    decay: bool = False

    def read(self, opened: OpenFiles, start: int, stop: int, out: F32Array, buffer: Buffer) -> None:
        """Read rows `start` to `stop` of the stack."""
        at = 0
        for piece in self.pieces:
            begin, end = max(start, at), min(stop, at + piece.rows)
            if begin < end:
                piece.read(opened, begin - at, end - at, out[begin - start : end - start], buffer)
            at += piece.rows
        if self.shift:
            out += np.float32(self.shift)
        if self.decay:
            np.copyto(out, negative_exp(out))
