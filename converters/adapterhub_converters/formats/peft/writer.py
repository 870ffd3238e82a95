"""An `Adapter` to a PEFT folder. What was read from one is written back with the bytes it had."""

from __future__ import annotations

from pathlib import Path

from adapterhub_converters.adapter import Adapter, Kept, Loss, LossReport, factored_out
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file, safetensors_file

from .config import CONFIG
from .config import text as config_text
from .keys import classify, state_dict
from .reader import WEIGHTS


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write a PEFT folder into the existing, empty folder `path`: the source's own bytes where they came from PEFT."""
    own = adapter.source if adapter.source and adapter.source.format == "peft" else None
    written = adapter if own else factored_out(adapter)
    tensors = state_dict(written)
    if own:
        tensors = {own.names.get(name, name): tensor for name, tensor in tensors.items()}
    safetensors_file.write(path / WEIGHTS, tensors, own.metadata if own else {"format": "pt", **adapter.meta.header})
    json_file.write_text(path / CONFIG, own.config if own else config_text(written))
    changed = {target for target, delta in adapter.deltas.items() if written.deltas[target] is not delta}
    kept = [
        Kept(name, Loss.ROUNDED, "factors are products, rounded once in float32")
        if _target_of(name) in changed
        else Kept(name, Loss.EXACT)
        for name in sorted(tensors)
    ]
    return LossReport(tuple(kept), written.notes)


def _target_of(key: str) -> str:
    return classify(key)[1]
