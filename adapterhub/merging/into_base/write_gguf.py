"""The files of a merged GGUF model: the base's metadata and order, some tensors changed, all others copied."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from adapterhub_converters.containers import gguf_output, gguf_types
from adapterhub_converters.containers.gguf_types import FILE_TYPES, MetadataValue
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .merge_options import DTYPES, REQUANTIZE, Options
from .output_files import Copy, EditedTensor, LiteralBytes, OutFile, Part
from .plan_gguf import HEAD, TABLE, GGUFPlan
from .read_base import TensorInFile
from .tensor_files import StoredRows
from .tensor_types import fitting, kind, writable

# Read by llama.cpp in float32, whatever the type of the others (src/llama-quant.cpp, `tensor_allows_quantization`).
NEVER_QUANTIZED = (
    "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight", "_norm.weight", "ssm_conv1d.weight",
    "shortconv.conv.weight",
)  # fmt: skip
LINEAGE = "adapterhub.merged"
CHAT_TEMPLATE = "tokenizer.chat_template"
_END_OF_TURN = "tokenizer.ggml.eot_token_id"
_SPLIT = ("split.no", "split.count", "split.tensors.count")
_IN_EVERY_PART = ("general.architecture", "general.alignment")


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the output: its place in the base, its type, and its edits if it is not copied."""

    name: str
    stored: TensorInFile
    kind: str
    edited: EditedTensor | None

    @property
    def size(self) -> int:
        return self.edited.size if self.edited else self.stored.info.size


def gguf_files(plan: GGUFPlan, out: Path, options: Options) -> tuple[OutFile, ...]:
    """Return the file `out`, or with a shard size the parts of a model in the folder `out`."""
    tensors = [_tensor(plan, name, placed, options) for name, placed in _output_tensors(plan)]
    groups = list(_groups(tensors, options.shard_size)) if options.shard_size else [tensors]
    metadata = {key: MetadataValue(plan.base.header.kinds[key], value) for key, value in plan.base.header.metadata.items()}
    # The base may itself be a split model, whose part numbers do not hold for the output.
    metadata = {key: value for key, value in metadata.items() if key not in _SPLIT} | _changed_metadata(plan, tensors, options)
    if not options.shard_size:
        return (OutFile(out.name, _parts(metadata, tensors, plan.base.header.alignment)),)
    files = []
    for number, group in enumerate(groups):
        split = {
            "split.no": MetadataValue("UINT16", number),
            "split.count": MetadataValue("UINT16", len(groups)),
            "split.tensors.count": MetadataValue("INT32", len(tensors)),
        }
        # As llama-gguf-split does: the first part has all metadata.
        first = {key: value for key, value in metadata.items() if number == 0 or key in _IN_EVERY_PART}
        name = f"{out.name}-{number + 1:05}-of-{len(groups):05}.gguf"
        files.append(OutFile(name, _parts({**first, **split}, group, plan.base.header.alignment)))
    return tuple(files)


def _output_tensors(plan: GGUFPlan) -> Iterator[tuple[str, TensorInFile]]:
    """Yield the tensors of the output with their places in the base; a new output layer starts as the embedding table."""
    yield from plan.base.tensors.items()
    if f"{HEAD}.weight" in plan.edits and f"{HEAD}.weight" not in plan.base.tensors:
        yield f"{HEAD}.weight", plan.base.tensors[f"{TABLE}.weight"]


def _tensor(plan: GGUFPlan, name: str, placed: TensorInFile, options: Options) -> _Tensor:
    edits = tuple(plan.edits.get(name, ()))
    target = _output_type(name, placed, options, changed=bool(edits))
    if not edits and target == placed.info.type_name:
        return _Tensor(name, placed, target, None)
    source = kind(placed.info.type_name)
    module = next(iter(plan.targets.get(name, ())), name)
    if source is None:
        raise RefusedError(module, f"the base's {name} is {placed.info.type_name}, which holds no weights to compute with")
    stored = StoredRows(placed.path, placed.info.offset, placed.rows, placed.columns, source)
    return _Tensor(name, placed, target, EditedTensor(name, stored, writable(target, placed.columns, name), 0, edits))


def _output_type(name: str, placed: TensorInFile, options: Options, *, changed: bool) -> str:
    """Return the type of a tensor in the output: its own, unless the options set another for such tensors."""
    type_name = placed.info.type_name
    matrix = len(placed.info.shape) > 1 and not name.endswith(NEVER_QUANTIZED)
    stored = kind(type_name)
    if not matrix or stored is None:
        return type_name
    if options.requantize and (changed or not stored.is_quantized):
        return fitting(REQUANTIZE[options.requantize], placed.columns)
    if options.dtype and (changed or not stored.is_quantized):
        return DTYPES[options.dtype]
    return type_name


def _changed_metadata(plan: GGUFPlan, tensors: list[_Tensor], options: Options) -> dict[str, MetadataValue]:
    """Return the keys whose values differ from the base's."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.kind] = sizes.get(tensor.kind, 0) + tensor.size
    largest_type = max(sizes, key=lambda name: sizes[name], default="F32")
    changed = any(tensor.kind != tensor.stored.info.type_name for tensor in tensors)
    changes: dict[str, MetadataValue] = {}
    if changed and largest_type in FILE_TYPES:
        changes["general.file_type"] = MetadataValue("UINT32", FILE_TYPES[largest_type])
    if changed and options.requantize:
        changes["general.quantization_version"] = MetadataValue("UINT32", 2)  # ggml.h, GGML_QNT_VERSION
    changes |= prompt_keys(options)
    if options.lineage:
        changes[LINEAGE] = gguf_types.string_value(json.dumps(options.lineage, sort_keys=True))
    return changes


def prompt_keys(options: Options) -> dict[str, MetadataValue]:
    """Return the keys that say how the merged model is asked, and where its answers end, besides those of its base."""
    keys = {}
    if options.chat_template is not None:
        keys[CHAT_TEMPLATE] = gguf_types.string_value(options.chat_template)
    if options.end_token is not None:
        keys[_END_OF_TURN] = gguf_types.u32_value(options.end_token)
    return keys


def _groups(tensors: list[_Tensor], shard_size: int) -> Iterator[list[_Tensor]]:
    group: list[_Tensor] = []
    size = 0
    for tensor in tensors:
        if group and size + tensor.size > shard_size:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += tensor.size
    yield group


def _parts(metadata: Mapping[str, MetadataValue], tensors: list[_Tensor], alignment: int) -> list[Part]:
    """Return the header and the tensors, each aligned."""
    head = gguf_output.header_bytes(
        metadata, ((tensor.name, tensor.kind, tensor.stored.info.shape) for tensor in tensors), alignment
    )
    parts: list[Part] = [LiteralBytes(head, 0)]
    at = len(head)
    for tensor in tensors:
        if tensor.edited:
            edited = tensor.edited
            parts.append(EditedTensor(edited.name, edited.source, edited.kind, at, edited.edits))
        else:
            info = tensor.stored.info
            parts.append(Copy(tensor.stored.path, info.offset, info.size, at, info.size))
        at += tensor.size
        # GGUF requires every tensor to begin at a multiple of the alignment.
        padding = -at % alignment
        if padding:
            parts.append(LiteralBytes(bytes(padding), at))
        at += padding
    return parts
