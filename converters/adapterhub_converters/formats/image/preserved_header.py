"""What the header of a file preserves of an adapter's source: its header, its names, and its PEFT config.

A PEFT source's config is stored in the header of a file that has its tensors under other names, so that the way back
is exact. As in the other formats (`source_config`), it belongs to a payload by its digest, and is checked against what
the file computes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from adapterhub_converters.adapter import Adapter, Delta, LowRank, Source, problems_beyond_deltas
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.formats import peft, source_config

HEADER_KEY, NAMES_KEY = "adapterhub.header", "adapterhub.names"
"""Keys of a header's metadata: the source's own header, and the table of its names."""


def problems(adapter: Adapter, format_name: str, problem_of: Callable[[Delta], str]) -> Iterator[str]:
    """Yield the reasons why a format of image models cannot express an adapter.

    Args:
        adapter: The adapter.
        format_name: `kohya's format` or the like.
        problem_of: A function that returns why the format cannot express a delta; empty if it can.
    """
    yield from problems_beyond_deltas(adapter, format_name)
    for target, delta in sorted(adapter.deltas.items()):
        if problem := problem_of(delta):
            yield f"{target}: {problem}"
        elif isinstance(delta, LowRank) and delta.transposed_base:
            yield f"{target}: its weight is stored transposed, which image models do not do"


def entries(adapter: Adapter) -> dict[str, str]:
    """Return the entries of the source's header that an adapter preserves."""
    header = adapter.source.metadata if adapter.source else adapter.meta.header
    return {key: header[key] for key in (HEADER_KEY, NAMES_KEY) if key in header}


def carried_header(metadata: Mapping[str, str], names: str = "") -> dict[str, str]:
    """Return the entries to preserve from a file's header, and the table of its names."""
    foreign = {key: text for key, text in metadata.items() if not key.startswith("adapterhub.")}
    names = names or metadata.get(NAMES_KEY, "")
    return {HEADER_KEY: json.dumps(foreign, separators=(",", ":"))} | ({NAMES_KEY: names} if names else {})


def source_header(adapter: Adapter, location: str) -> dict[str, str]:
    """Return the source's own header, as it was; empty if there is none."""
    text = entries(adapter).get(HEADER_KEY)
    return {} if text is None else {str(key): str(value) for key, value in json_file.parse_object(text, location).items()}


# ---- The source's config


_TARGETS = "adapterhub.source.targets"


def source_keys(adapter: Adapter, names: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the metadata for a file with `tensors`, if the source is PEFT; `names` maps the file's targets to the source's.

    It is empty for a PEFT folder that was itself written from such a file: the folder alone suffices to write the file again.
    """
    source = adapter.source
    if source is None or source.format != "peft":
        return {}
    # Nothing of this folder's config would be lost: it is what `peft` writes for the adapter.
    if HEADER_KEY in source.metadata and source.config == peft.config_text(adapter):
        return {}
    targets = {ours: [source_target, adapter.deltas[source_target].r] for ours, source_target in sorted(names.items())}
    metadata = source_config.keys(adapter, [], source_config.payload_digest(dict(sorted(tensors.items()))))
    return {**metadata, _TARGETS: json.dumps(targets, separators=(",", ":"))}


def with_source(adapter: Adapter, metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray], location: str) -> Adapter:
    """Return the source's own adapter if its config is in the file and belongs to these tensors; else `adapter`."""
    if not source_config.has_source_config(metadata):
        return adapter
    # Another program has changed the tensors since: the config no longer describes them.
    if _TARGETS not in metadata or not source_config.matches_payload(
        metadata, source_config.payload_digest(dict(sorted(tensors.items())))
    ):
        return dataclasses.replace(adapter, notes=(*adapter.notes, source_config.IGNORED))
    deltas: dict[str, Delta] = {}
    rows = json_file.parse_object(metadata[_TARGETS], f"{location}: {_TARGETS}")
    for ours, row in rows.items():
        match row:
            case [str(source_target), int(r)] if (
                ours in adapter.deltas and 0 < r <= adapter.deltas[ours].r and source_target not in deltas
            ):
                deltas[source_target] = _without_padding(adapter.deltas[ours], r)
            case _:
                problem = f"adapterhub.source.targets has the malformed line {ours[:60]!r}: {str(row)[:60]}"
                raise FormatError(location, problem, source_config.CONVERT_AGAIN)
    if lacking := [
        ours for ours, delta in adapter.deltas.items() if ours not in rows and any(np.any(t) for _, t in delta.parts())
    ]:
        raise FormatError(
            location, f"adapterhub.source.targets lacks {lacking[0]!r}, which has a delta", source_config.CONVERT_AGAIN
        )
    text, header = str(metadata.get("adapterhub.source.config", "")), _text_map(metadata, "metadata", location)
    peft_tensors = peft.state_dict(Adapter(deltas, source=Source("peft", text, header)))
    file_names = _text_map(metadata, "names", location)
    state = {file_names.get(name, name): tensor for name, tensor in peft_tensors.items()}
    if len(state) < len(peft_tensors):
        raise FormatError(location, "the source's config gives two tensors one name")
    source_adapter = peft.parse(text, state, header, location=location)
    if set(source_adapter.deltas) != set(deltas):
        raise FormatError(location, "the source's config gives the tensors other names")
    for source_target, delta in source_adapter.deltas.items():
        if not math.isclose(
            delta.scaling, deltas[source_target].scaling, rel_tol=1e-6, abs_tol=0.0 if delta.scaling else 1e-25
        ):
            raise FormatError(
                location,
                f"{source_target}: the scale is {deltas[source_target].scaling:g} in the file "
                f"and {delta.scaling:g} in the source's config",
            )
    return source_adapter


def _without_padding(delta: Delta, r: int) -> Delta:
    """Return the pair with rank `r`, without the zeros that it was padded with."""
    if not isinstance(delta, LowRank) or r == delta.r:
        return delta
    if np.any(delta.lora_A[r:]) or np.any(delta.lora_B[:, r:]):
        return delta
    lora_A, lora_B = np.ascontiguousarray(delta.lora_A[:r]), np.ascontiguousarray(delta.lora_B[:, :r])
    return dataclasses.replace(delta, lora_A=lora_A, lora_B=lora_B, alpha=delta.alpha * r / delta.r)


def _text_map(metadata: Mapping[str, str], key: str, location: str) -> dict[str, str]:
    entries = json_file.parse_object(metadata.get(f"adapterhub.source.{key}", "{}"), f"{location}: adapterhub.source.{key}")
    if not all(isinstance(value, str) for value in entries.values()):
        raise FormatError(location, f"adapterhub.source.{key} is not a map of text to text")
    return entries
