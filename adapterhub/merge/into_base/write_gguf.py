"""A GGUF model written again with some of its tensors changed: the same metadata, the same order, the rest copied."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapterhub_converters.containers import gguf_file
from adapterhub_converters.containers.gguf_file import Value
from adapterhub_converters.errors import RefusedError

from .options import DTYPES, REQUANTIZE, Options
from .output_files import Copy, Made, OutFile, Part, Text
from .plan_gguf import HEAD, TABLE, GGUFPlan, Placed
from .tensor_io import Kind, Stored, kind, writable

# llama.cpp, include/llama.h, `llama_ftype`: what a file is mostly made of.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
# Read by llama.cpp in float32 whatever the rest is in (src/llama-quant.cpp, `tensor_allows_quantization`).
NEVER_QUANTIZED = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "position_embd.weight", "_norm.weight", "ssm_conv1d")
LINEAGE = "adapterhub.merged"
_SPLIT = ("split.no", "split.count", "split.tensors.count")


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the output: where its numbers come from and what they become."""

    name: str
    placed: Placed
    kind: str
    made: Made | None

    @property
    def size(self) -> int:
        return self.made.size if self.made else self.placed.info.size


def gguf_files(plan: GGUFPlan, out: Path, options: Options) -> tuple[OutFile, ...]:
    """The file `out`, or the parts of a model in the folder `out` when there is a size for them."""
    tensors = [_tensor(plan, name, placed, options) for name, placed in _all(plan)]
    groups = list(_groups(tensors, options.shard_size)) if options.shard_size else [tensors]
    metadata = {key: Value(plan.base.header.kinds[key], value) for key, value in plan.base.header.metadata.items()}
    metadata = {key: value for key, value in metadata.items() if key not in _SPLIT} | _said(plan, tensors, options)
    if not options.shard_size:
        return (OutFile(out.name, _parts(metadata, tensors, plan.base.header.alignment)),)
    files = []
    for number, group in enumerate(groups):
        split = {
            "split.no": Value("UINT16", number),
            "split.count": Value("UINT16", len(groups)),
            "split.tensors.count": Value("INT32", len(tensors)),
        }
        # As llama-gguf-split has it: all is said in the first part.
        head = {**metadata, **split} if number == 0 else _only(metadata) | split
        name = f"{out.name}-{number + 1:05}-of-{len(groups):05}.gguf"
        files.append(OutFile(name, _parts(head, group, plan.base.header.alignment)))
    return tuple(files)


def _only(metadata: Mapping[str, Value]) -> dict[str, Value]:
    return {key: value for key, value in metadata.items() if key in ("general.architecture", "general.alignment")}


def _all(plan: GGUFPlan) -> Iterator[tuple[str, Placed]]:
    yield from plan.base.tensors.items()
    if f"{HEAD}.weight" in plan.edits and f"{HEAD}.weight" not in plan.base.tensors:
        yield f"{HEAD}.weight", plan.base.tensors[f"{TABLE}.weight"]


def _tensor(plan: GGUFPlan, name: str, placed: Placed, options: Options) -> _Tensor:
    edits = tuple(plan.edits.get(name, ()))
    target = _target(name, placed, options, changed=bool(edits))
    if not edits and target == placed.info.type_name:
        return _Tensor(name, placed, target, None)
    source = kind(placed.info.type_name)
    where = next(iter(plan.targets.get(name, ())), name)
    if source is None:
        raise RefusedError(where, f"the base's {name} is {placed.info.type_name}, which holds no weights to compute with")
    stored = Stored(placed.path, placed.info.offset, placed.rows, placed.columns, source)
    return _Tensor(name, placed, target, Made(name, stored, _writable(target, placed, name), 0, edits))


def _writable(target: str, placed: Placed, name: str) -> Kind:
    return writable(target, placed.columns, name)


def _target(name: str, placed: Placed, options: Options, *, changed: bool) -> str:
    """The type a tensor gets: its own, unless the options say otherwise for such a one."""
    own = placed.info.type_name
    matrix = len(placed.info.shape) > 1 and not name.endswith(NEVER_QUANTIZED)
    stored = kind(own)
    if not matrix or stored is None:
        return own
    if options.requantize and (changed or not stored.quantized):
        block = gguf_file.TYPES[REQUANTIZE[options.requantize]][1]
        return REQUANTIZE[options.requantize] if placed.columns % block == 0 else "F16"
    if options.dtype and (changed or not stored.quantized):
        return DTYPES[options.dtype]
    return own


def _said(plan: GGUFPlan, tensors: list[_Tensor], options: Options) -> dict[str, Value]:
    """What the metadata says otherwise than the base's."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.kind] = sizes.get(tensor.kind, 0) + tensor.size
    most = max(sizes, key=lambda name: sizes[name], default="F32")
    changed = any(tensor.kind != tensor.placed.info.type_name for tensor in tensors)
    said: dict[str, Value] = {}
    if changed and most in _FILE_TYPES:
        said["general.file_type"] = Value("UINT32", _FILE_TYPES[most])
    if changed and options.requantize:
        said["general.quantization_version"] = Value("UINT32", 2)  # ggml.h, GGML_QNT_VERSION
    if options.lineage:
        said[LINEAGE] = gguf_file.string(json.dumps(options.lineage, sort_keys=True))
    return said


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


def _parts(metadata: Mapping[str, Value], tensors: list[_Tensor], alignment: int) -> list[Part]:
    head = gguf_file.header_bytes(metadata, ((one.name, one.kind, one.placed.info.shape) for one in tensors), alignment)
    parts: list[Part] = [Text(head, 0)]
    at = len(head)
    for tensor in tensors:
        if tensor.made:
            made = tensor.made
            parts.append(Made(made.name, made.source, made.kind, at, made.edits))
        else:
            info = tensor.placed.info
            parts.append(Copy(tensor.placed.path, info.offset, info.size, at, info.size))
        at += tensor.size
        padding = -at % alignment
        if padding:
            parts.append(Text(bytes(padding), at))
        at += padding
    return parts
