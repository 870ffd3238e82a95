"""A Hugging Face folder, merged or as it is, written as a GGUF that is llama.cpp's own conversion of it.

Every tensor is made of those that a merge into a folder would write (`hf_out`), laid out as llama.cpp has them
(`to_gguf`, `laid_out`), and is rounded to its type there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapterhub_converters import names
from adapterhub_converters.architecture import Architecture
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.files import gguf_file, json_file
from adapterhub_converters.files.gguf_file import Value
from adapterhub_converters.to_gguf import general
from adapterhub_converters.to_gguf.arrangement import Arranged, arranged
from adapterhub_converters.to_gguf.complete import check_complete
from adapterhub_converters.to_gguf.computed import check_computed
from adapterhub_converters.to_gguf.configured import configured
from adapterhub_converters.to_gguf.hyperparameters import hyperparameters
from adapterhub_converters.to_gguf.rope_tensors import rope_tensors
from adapterhub_converters.to_gguf.special_tokens import read_tokenizer
from adapterhub_converters.to_gguf.vocabulary import vocabulary

from .gguf_out import LINEAGE, NEVER_QUANTISED
from .hf_base import Folder, Weight
from .hf_out import Written
from .laid_out import LaidOut, Merged, Piece
from .options import DTYPES, REQUANTISE, Options
from .parts import Copy, Made, OutFile, Part, Text
from .sources import Source, Stored
from .stored import Kind, kind, writable


@dataclass(frozen=True)
class Model:
    """What is to be written: `metadata`, tensors in their order, and `changed`, the folder's tensors that adapters change as
    they are measured: in the type that they get."""

    metadata: Mapping[str, Value]
    tensors: Sequence[_Tensor]
    changed: Sequence[Made]
    notes: tuple[str, ...]

    def files(self, out: Path) -> tuple[OutFile, ...]:
        """The one file."""
        order = [(one.plan.name, one.kind.name, one.plan.shape) for one in self.tensors]
        head = gguf_file.header_bytes(self.metadata, order)
        parts: list[Part] = [Text(head, 0)]
        at = len(head)
        for tensor in self.tensors:
            parts += tensor.parts(at)
            at += tensor.size
            if padding := -at % gguf_file.ALIGNMENT:
                parts.append(Text(bytes(padding), at))
                at += padding
        return (OutFile(out.name, parts),)


@dataclass(frozen=True, eq=False)
class _Tensor:
    plan: Arranged
    kind: Kind
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return self.plan.rows * self.kind.row_size(self.plan.columns)

    def parts(self, at: int) -> list[Part]:
        """What is written from byte `at` on: as many ranges as it has pieces, where these are as they will be."""
        plan = self.plan
        if plan.constant is not None:
            return [Text(plan.constant.tobytes(), at)]
        copies = [_copied(piece, self.kind) for piece in self.pieces]
        if not plan.shift and all(copies):
            made: list[Part] = []
            for copy in copies:
                if copy:
                    made.append(replace(copy, at=at))
                    at += copy.size
            return made
        source = LaidOut(self.pieces, plan.rows, plan.columns, plan.shift)
        return [Made(plan.name, source, self.kind, at, ())]


def _copied(piece: Piece, target: Kind) -> Copy | None:
    """The bytes of a piece in the base's file, when nothing is to be done to them."""
    part, source = piece.part, piece.source
    straight = not part.transposed and part.picks is None and part.columns is None
    if not straight or not isinstance(source, Stored) or source.kind.name != target.name:
        return None
    width = target.row_size(source.columns)
    return Copy(source.path, source.offset + part.first * width, part.height * width, 0, part.height * width)


def gguf_model(folder: Folder, what: Written, options: Options) -> Model:
    """The GGUF of a folder with edits; RefusedError names what llama.cpp could not have as it is here."""
    where = str(folder.path)
    if what.shapes:
        name = next(iter(what.shapes))
        hint = "Merge into a folder, put the tokenizer there, and convert that"
        raise RefusedError(name, "the adapter resizes the vocabulary, and a GGUF has the tokenizer in it", hint)
    architecture = names.by_class(folder.spec.architecture, where)
    config = configured(folder.config, where)
    weights = {**folder.weights, **what.added}
    plan = arranged(architecture, {name: one.shape for name, one in weights.items()}, config)
    check_complete(architecture, {one.name: one.shape for one in plan.tensors}, config)
    numbers = hyperparameters(architecture, config)
    otherwise = check_computed(config)
    computed, more = rope_tensors(architecture.gguf, config)
    rows = next((one.shape[0] for one in plan.tensors if one.name == "token_embd.weight"), 0)
    if rows != config.count("vocab_size"):
        raise RefusedError(
            where, f"config.json: vocab_size is {config.get('vocab_size')}, and there are {rows} rows of embeddings"
        )
    tokens, said = vocabulary(architecture, read_tokenizer(folder.path, folder.config), rows)
    wanted = _wanted(folder, options)
    sources = {name: _source(weight, what, folder, options) for name, weight in weights.items()}
    tensors = [_tensor(one, wanted, options, sources) for one in (*computed, *plan.tensors)]
    shapes = {one.plan.name: one.plan.shape for one in tensors}
    metadata = _general(folder, architecture, shapes)
    metadata |= {f"{architecture.gguf}.{key}": value for key, value in (numbers | more).items()}
    metadata |= general.stored(wanted) | tokens
    if options.lineage:
        metadata[LINEAGE] = gguf_file.string(json.dumps(options.lineage, sort_keys=True))
    changed = _changed(tensors, what)
    if folder.method:
        said = (f"the base's weights were quantised ({folder.method}): here they are the floats that they stand for", *said)
    return Model(metadata, tensors, changed, (*dict.fromkeys(plan.notes), *otherwise, *said))


def _general(folder: Folder, architecture: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Value]:
    path = folder.path / "generation_config.json"
    generation = json_file.read_object(path) if path.is_file() else {}
    name = (folder.spec.repo or "").rpartition("/")[2] or folder.path.resolve().name
    return general.general(architecture.gguf, name, shapes, generation)


def _wanted(folder: Folder, options: Options) -> str:
    """The type of most matrices."""
    if options.requantise:
        return REQUANTISE[options.requantise]
    if options.dtype:
        return DTYPES[options.dtype]
    sizes = Counter[str]()
    for weight in folder.weights.values():
        sizes[weight.dtype] += weight.rows * weight.columns
    return sizes.most_common(1)[0][0]


def _source(weight: Weight, what: Written, folder: Folder, options: Options) -> Source:
    """The numbers of a tensor of the merged folder. Where the result is in another type than the base, the sum isn't rounded
    before it is rounded to that."""
    edits = what.edits.get(weight.name, ())
    own = what.sources.get(weight.name) or weight.source()
    if not edits:
        return own
    anew = bool(options.dtype or options.requantise or folder.method)
    form = kind("F32" if anew else weight.dtype)
    if form is None:
        raise RefusedError(weight.name, f"is {weight.dtype}, not bfloat16, float16 or float32", "Dequantise it first")
    return Merged(Made(weight.name, own, form, 0, edits, stepwise=not anew))


def _tensor(plan: Arranged, wanted: str, options: Options, sources: Mapping[str, Source]) -> _Tensor:
    pieces = tuple(Piece(part, sources[part.source]) for part in plan.parts)
    return _Tensor(plan, writable(_type(plan, wanted), plan.columns, plan.name), pieces)


def _type(plan: Arranged, wanted: str) -> str:
    """As llama.cpp decides it (conversion/base.py, `prepare_tensors`)."""
    if len(plan.shape) < 2 or plan.name.endswith(NEVER_QUANTISED) or not plan.name.endswith(".weight"):
        return "F32"
    block = gguf_file.TYPES[wanted][1]
    return wanted if plan.columns % block == 0 else "F16"


def _changed(tensors: Sequence[_Tensor], what: Written) -> list[Made]:
    """Each changed tensor of the folder in the type that it gets, for measuring: the order of rows doesn't matter there."""
    found: dict[str, Made] = {}
    for tensor in tensors:
        for piece in tensor.pieces:
            made = piece.source.made if isinstance(piece.source, Merged) else None
            if made and what.edits.get(made.name) and made.name not in found:
                fits = made.source.columns % gguf_file.TYPES[tensor.kind.name][1] == 0
                form = tensor.kind if fits else kind("F16")
                stepwise = made.stepwise and form is not None and form.name == made.kind.name
                found[made.name] = replace(made, kind=form or made.kind, stepwise=stepwise)
    return list(found.values())
