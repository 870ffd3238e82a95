"""Parsing of a PEFT folder, or of a config and tensors from elsewhere, into an `Adapter`.

Follows peft 0.21's computation (`tuners/lora`): the rank is that of the tensors; the scale comes from `lora_alpha`,
`alpha_pattern` and `use_rslora`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, Source, tuner_of
from adapterhub_converters.adapter_files import adapters_below, pickled_weights
from adapterhub_converters.containers import json_file, safetensors_file, safetensors_header
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError, refused_error
from adapterhub_converters.formats.candidate import Candidate
from adapterhub_converters.lazy_imports import np

from . import quirks, tuner_tensors
from .adapter_config import CONFIG, INDEX, UNKNOWN_KEY, WEIGHTS, Scales, unknown_keys
from .adapter_config import check as check_config
from .adapter_config import meta as meta_of
from .module_deltas import DeltaReader, trainable_rows
from .stacks import stack_transposed_experts
from .tensor_keys import PREFIX, TensorId, classify, identify_all, tensor_names
from .tinker_names import is_archive

if TYPE_CHECKING:
    from adapterhub_converters.bases import BaseSpec


def sniff(candidate: Candidate) -> bool:
    """Return whether it is a folder with a PEFT adapter.

    mlx-lm uses the same file name for its config, but only PEFT's has a `peft_type`. An archive of Tinker has one, too.
    """
    config = candidate.config
    return has_peft_type(config) and not is_archive(config, lambda: candidate.file(WEIGHTS).tensors)


def has_peft_type(config: str) -> bool:
    """Return whether the text of an `adapter_config.json` is that of PEFT."""
    return '"peft_type"' in config


def nested_adapter_hint(path: Path) -> str:
    """Return a hint that names the only folder in `path` with a PEFT adapter, as trainers and hubs nest them; else empty."""
    nested_folders = adapters_below(path) if path.is_dir() else []
    return f"Did you mean {nested_folders[0]}?" if len(nested_folders) == 1 else ""


def read(path: Path | Candidate, *, base: BaseSpec | None = None, mapped: bool = False) -> Adapter:
    """Return the adapter in a PEFT folder.

    Args:
        path: The folder.
        base: The base model; needed only for experts that a peft before 0.19 saved, and for VeRA's widths.
        mapped: Whether tensors may be views of the files (`SafetensorsFile.mapped`) instead of being loaded into memory.
    """
    candidate = Candidate.of(path)
    path = candidate.path
    text = candidate.config or _config(path)
    with contextlib.ExitStack() as stack:
        files = (stack.enter_context(candidate.file(file.name).open_safetensors()) for file in weight_files(path))
        return parse_files(text, files, location=str(path), base=base, mapped=mapped)


def parse_files(
    text: str,
    files: Iterable[safetensors_file.SafetensorsFile],
    *,
    location: str,
    base: BaseSpec | None = None,
    mapped: bool = False,
) -> Adapter:
    """Do the same as `read`, from the config's text and the files with the weights, which the caller has opened."""
    tensors: dict[str, np.ndarray] = {}
    metadata: Mapping[str, str] = {}
    for file in files:
        tensors.update(file.arrays(as_views=mapped))
        metadata = file.header.metadata
    adapter = parse(text, tensors, metadata, location=location, base=base)
    return dataclasses.replace(adapter, notes=(*adapter.notes, *quirks.missing_magnitudes(adapter)))


def read_shapes(path: Path | Candidate) -> Adapter:
    """Return the adapter from headers alone: every tensor has its shape and dtype, and zeros that take no memory."""
    candidate = Candidate.of(path)
    path = candidate.path
    text, headers = candidate.config or _config(path), {}
    for file_path in weight_files(path):
        with safetensors_file.SafetensorsFile(file_path) as file:
            headers[file_path] = file.header
    return parse_shapes(text, headers, location=str(path))


def parse_shapes(
    text: str, headers: Mapping[Path, safetensors_header.SafetensorsHeader], *, location: str, base: BaseSpec | None = None
) -> Adapter:
    """Do the same as `read_shapes`, from the config's text and the header of every weights file, which the caller has read."""
    tensors: dict[str, np.ndarray] = {}
    metadata: Mapping[str, str] = {}
    for path, header in headers.items():
        zeros_by_kind: dict[safetensors_header.TensorKind, Any] = {}
        for kind in dict.fromkeys(header.kinds):
            if kind.dtype not in dtypes.NUMPY:
                name = header.names[header.kinds.index(kind)]
                raise FormatError(str(path), f"tensor {name!r}: {kind.dtype} is not supported in computations")
            zeros_by_kind[kind] = dtypes.LateZeros(kind.dtype, kind.shape)
        tensors.update(zip(header.names, map(zeros_by_kind.__getitem__, header.kinds), strict=True))
        metadata = header.metadata
    return parse(text, tensors, metadata, location=location, base=base)


def _config(path: Path) -> str:
    if not (path / CONFIG).is_file():
        raise NotFoundError(
            str(path), f"not a PEFT adapter: there is no {CONFIG}", nested_adapter_hint(path), code="no-adapter"
        )
    return json_file.read_text(path / CONFIG)


def weight_files(path: Path) -> list[Path]:
    """Return the files with an adapter's weights: one file, or the shards of an index, whose names must be plain."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        if path.is_dir() and (pickles := pickled_weights(item.name for item in path.iterdir())):
            problem = "a pickle can run code when it is loaded"
            raise RefusedError(
                str(path / pickles[0]), problem, "Save the adapter again with safe_serialization=True", code="pickle"
            )
        raise NotFoundError(str(path), f"not a PEFT adapter: there is no {WEIGHTS}", code="no-adapter")
    weight_map = json_file.read_object(path / INDEX).get("weight_map")
    shards = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    for name in shards:
        # The index is untrusted: a shard's name must not lead out of the folder.
        if Path(name).name != name or not name.isprintable() or name in ("", ".", "..") or "\\" in name:
            raise FormatError(str(path / INDEX), f"shard name {name[:80]!r} is not a plain file name")
        if not (path / name).is_file():
            raise NotFoundError(str(path / name), "no such file, but the index names it", code="no-such-file")
    if not shards:
        raise FormatError(str(path / INDEX), "weight_map is not a map of tensor names to file names")
    return [path / name for name in shards]


def parse(
    text: str,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    location: str,
    base: BaseSpec | None = None,
    swapped_stacks: frozenset[str] | None = None,
) -> Adapter:
    """Return the adapter made of a config and the tensors of its weights file.

    Args:
        text: The config.
        tensors: The tensors by their names in the file.
        metadata: The metadata of the file's header.
        location: The adapter's path, for errors.
        base: As for `read`.
        swapped_stacks: The stacks whose two factors are swapped (module `target_parameters`), if that is known already.

    Raises:
        RefusedError: Some parts are not supported; one error lists all of them.
        FormatError: It is malformed.
    """
    config = json_file.parse_object(text, f"{location}/{CONFIG}")
    if tuner_of(config.get("peft_type")):
        check_config(config, f"{location}/{CONFIG}")
        return tuner_tensors.parse(config, tensors, location)
    files, tensor_ids, notes = identify_all(tensors, f"{location}/{WEIGHTS}")
    files, linear_notes = quirks.without_linear(files, base)
    if linear_notes:
        # The keys have changed, and with them what they denote.
        tensor_ids = list(map(classify, files))
    parts = _check_and_sort(config, zip(files, tensor_ids, tensors.values(), strict=True), location)
    quirks.refuse_torchtune_dora(config, parts.pairs, f"{location}/{WEIGHTS}")
    notes += [f"{CONFIG}: {key}: {UNKNOWN_KEY}" for key in unknown_keys(config)]
    notes += [*linear_notes, *quirks.reading_notes(config, parts.pairs, base)]
    scales = Scales(config, f"{location}/{CONFIG}")
    reader = DeltaReader(config, scales, f"{location}/{WEIGHTS}", base, swapped_stacks)
    deltas = reader.read_all(parts.pairs, parts.shared)
    if parts.copies:
        notes.append(f"contains copies of the base's weights: {', '.join(sorted(parts.copies))}")
    adapter = Adapter(
        deltas=deltas,
        replaced=parts.replaced,
        rows={target: trainable_rows(target, values, config, location) for target, values in parts.rows.items()},
        meta=meta_of(config),
        notes=(*notes, *scales.notes, *scales.unused_patterns()),
        copies=parts.copies,
    )
    # Tinker writes the experts of gpt-oss one by one for vLLM, where transformers has always had stacks.
    if (stacked := stack_transposed_experts(adapter, base)) is not adapter:
        return stacked
    names = _deviating_names(adapter, files, lambda: reader.with_stack_targets(dict(zip(tensor_ids, files, strict=True))))
    return dataclasses.replace(adapter, source=Source("peft", text, dict(metadata), names, frozenset(reader.swapped)))


def _deviating_names(
    adapter: Adapter, files: Mapping[str, str], origin: Callable[[], Mapping[TensorId, str]]
) -> dict[str, str]:
    """Map peft's names to the names in the file, for tensors that peft would save under another name.

    `origin` makes the map of each tensor to its key in `files`, which most adapters do not need.
    """
    saved_names = {tensor_id: name for tensor_id, name in tensor_names(adapter) if files.get(name) != name}
    keys = origin() if saved_names else {}
    return {name: key for tensor_id, name in saved_names.items() if (key := files[keys[tensor_id]]) != name}


class _TensorsByKind:
    def __init__(self) -> None:
        self.pairs: dict[str, dict[str, np.ndarray]] = {}
        self.replaced: dict[str, np.ndarray] = {}
        self.rows: dict[str, np.ndarray] = {}
        self.copies: dict[str, np.ndarray] = {}
        self.shared: dict[str, np.ndarray] = {}


Tensors = Iterable[tuple[str, TensorId, "np.ndarray"]]
"""peft's name of each tensor, its identity, and its values."""


def _check_and_sort(config: Mapping[str, Any], tensors: Tensors, location: str) -> _TensorsByKind:
    """Return the tensors by kind; one error lists all unsupported keys of the config and all unsupported tensors."""
    first_error: RefusedError | None = None
    try:
        check_config(config, f"{location}/{CONFIG}")
    except RefusedError as error:
        first_error = error
    try:
        parts = _sort_by_kind(tensors, f"{location}/{WEIGHTS}")
    except RefusedError as error:
        if first_error is None:
            raise
        reasons = [*(first_error.items or (first_error.what,)), *(error.items or (error.what,))]
        raise refused_error(first_error.where, reasons, first_error.hint, type(first_error)) from error
    if first_error is not None:
        raise first_error
    return parts


def _sort_by_kind(tensors: Tensors, location: str) -> _TensorsByKind:
    parts, reasons = _TensorsByKind(), []
    singles = {"rows": parts.rows, "replaced": parts.replaced, "copy": parts.copies, "shared": parts.shared}
    for key, (kind, name, part), tensor in tensors:
        single = singles.get(kind)
        if kind == "pair":
            parts.pairs.setdefault(name, {})[part] = tensor
        elif single is not None:
            if name in single:
                raise RefusedError(location, f"there are two tensors for {name}; {key!r} is one of them")
            single[name] = tensor
        elif not key.startswith(PREFIX):
            reasons.append(f"tensor {key!r}: its name does not begin with {PREFIX}")
        else:
            reasons.append(f"tensor {key!r}: this kind of tensor is not supported")
    if reasons:
        raise refused_error(location, reasons)
    return parts
