"""A PEFT source's config in the header of a file that has its tensors under other names, so that the way back is exact.

It belongs to a payload by its digest, as that of the other formats does (`rider`); what it says is checked against
what the file says itself.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping

import numpy as np

from adapterhub_converters.adapter import Adapter, Delta, LowRank, Source
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import FormatError
from adapterhub_converters.formats import peft, source_config

from . import pipeline

_TARGETS = "adapterhub.source.targets"


def keys(adapter: Adapter, names: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    """The metadata of a file with `tensors`; `names` are the source's targets by the file's. None but PEFT's has any.

    A folder that we wrote from such a file is written again from it, and needs none.
    """
    source = adapter.source
    if source is None or source.format != "peft":
        return {}
    if pipeline.HEADER_KEY in source.metadata and source.config == peft.config_text(adapter):
        return {}
    targets = {ours: [own, adapter.deltas[own].r] for ours, own in sorted(names.items())}
    found = source_config.keys(adapter, [], source_config.payload_digest(dict(sorted(tensors.items()))))
    return {**found, _TARGETS: json.dumps(targets, separators=(",", ":"))}


def restored(adapter: Adapter, metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray], where: str) -> Adapter:
    """The source's own adapter, if its config is here and belongs to these tensors; else what the file says."""
    if not source_config.there(metadata):
        return adapter
    if _TARGETS not in metadata or not source_config.belongs(
        metadata, source_config.payload_digest(dict(sorted(tensors.items())))
    ):
        return dataclasses.replace(adapter, notes=(*adapter.notes, source_config.IGNORED))
    deltas: dict[str, Delta] = {}
    for ours, row in json_file.parse_object(metadata[_TARGETS], f"{where}: {_TARGETS}").items():
        match row:
            case [str(own), int(r)] if ours in adapter.deltas and 0 < r <= adapter.deltas[ours].r and own not in deltas:
                deltas[own] = _of_rank(adapter.deltas[ours], r)
            case _:
                raise FormatError(where, f"the source's list of targets has the malformed line {ours[:60]!r}: {str(row)[:60]}")
    rows = json_file.parse_object(metadata[_TARGETS], f"{where}: {_TARGETS}")
    if lacking := [
        ours for ours, delta in adapter.deltas.items() if ours not in rows and any(np.any(t) for _, t in delta.parts())
    ]:
        raise FormatError(where, f"the source's list of targets lacks {lacking[0]!r}")
    text, header = str(metadata.get("adapterhub.source.config", "")), _map(metadata, "metadata", where)
    named = peft.state_dict(Adapter(deltas, source=Source("peft", text, header)))
    own_names = _map(metadata, "names", where)
    state = {own_names.get(name, name): tensor for name, tensor in named.items()}
    if len(state) < len(named):
        raise FormatError(where, "the source's config gives two tensors one name")
    found = peft.parse(text, state, header, where=where)
    if set(found.deltas) != set(deltas):
        raise FormatError(where, "the source's config gives the tensors other names")
    for own, delta in found.deltas.items():
        if not math.isclose(delta.scaling, deltas[own].scaling, rel_tol=1e-6, abs_tol=0.0 if delta.scaling else 1e-25):
            raise FormatError(
                where, f"{own}: the file scales by {deltas[own].scaling:g}, the source's config by {delta.scaling:g}"
            )
    return found


def _of_rank(delta: Delta, r: int) -> Delta:
    """The first `r` of a pair that was filled up with zeros."""
    if not isinstance(delta, LowRank) or r == delta.r:
        return delta
    if np.any(delta.lora_A[r:]) or np.any(delta.lora_B[:, r:]):
        return delta
    lora_A, lora_B = np.ascontiguousarray(delta.lora_A[:r]), np.ascontiguousarray(delta.lora_B[:, :r])
    return dataclasses.replace(delta, lora_A=lora_A, lora_B=lora_B, alpha=delta.alpha * r / delta.r)


def _map(metadata: Mapping[str, str], key: str, where: str) -> dict[str, str]:
    found = json_file.parse_object(metadata.get(f"adapterhub.source.{key}", "{}"), f"{where}: adapterhub.source.{key}")
    if not all(isinstance(value, str) for value in found.values()):
        raise FormatError(where, f"the source's {key} are not a map of text to text")
    return found
