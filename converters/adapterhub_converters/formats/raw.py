"""A lone safetensors file with the state dict of a LoRA: peft's keys, perhaps with the name of the adapter in them.

Such a file (`…q_proj.lora_A.default.weight`) says no alpha, and the scale depends on it: it comes from the config that
rides in the header, from the `adapter_config.json` beside it, or from who asks. It is never guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adapterhub_converters.adapter import Adapter, Kept, Loss, LossReport, factored_out
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.containers import json_file, safetensors_file
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.errors import FormatError, RefusedError

from . import peft

CONFIG_KEY, METADATA_KEY = "adapterhub.config", "adapterhub.metadata"
"""Keys of the header's metadata: the text of a PEFT config, and the metadata that the PEFT file had."""
_PREFIX = "base_model.model."
# `.lora_A.default.weight`: in memory, peft has the adapter's name between; saving takes it out.
_NAMED = re.compile(r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight$|bias$)([^.]+)(\.weight|\.bias|)$")


def sniff(path: Path) -> bool:
    """Whether `path` is a safetensors file with keys of a LoRA, whatever it is called.

    A malformed file that is called .safetensors counts, for reading says why.
    """
    if not path.is_file():
        return False
    try:
        with SafetensorsFile(path) as file:
            lora = any(".lora_A." in name or ".lora_embedding_A" in name for name in file.tensors)
            return lora or CONFIG_KEY in file.header.metadata
    except FormatError:
        return path.suffix == ".safetensors"


def read(path: Path, *, base: BaseSpec | None = None, alpha: float | None = None, rslora: bool = False) -> Adapter:
    """The adapter in a lone file. `alpha`, and `rslora`, only where neither the file nor its folder has a config."""
    with SafetensorsFile(path) as file:
        tensors = {name: file.tensor(name) for name in file.tensors}
        metadata = dict(file.header.metadata)
    where = str(path)
    text = metadata.pop(CONFIG_KEY, None)
    beside = path.with_name(peft.CONFIG)
    if text is None and path.name == peft.WEIGHTS and peft.sniff(path.parent):
        text = json_file.read_text(beside)
    if text is not None:
        if alpha is not None or rslora:
            raise RefusedError(where, "it has a config that says its alpha", "Leave out --alpha and --rslora")
        return peft.parse(text, _plain(tensors, where)[0], _source_metadata(metadata, where), where=where, base=base)
    if alpha is None and peft.alpha_is_rank(metadata):
        return _of_alpha_rank(tensors, where)
    if alpha is None:
        reason = "nothing says its alpha, and the scale depends on it"
        raise RefusedError(where, reason, "Pass --alpha N, and --rslora if it was trained with it")
    state, notes = _plain(tensors, where)
    config = {"peft_type": "LORA", "lora_alpha": alpha, "use_rslora": rslora}
    adapter = peft.parse(json.dumps(config), state, {}, where=where)
    said = f"alpha {alpha:g}{' with rsLoRA' if rslora else ''} for all modules, as you said"
    return Adapter(adapter.deltas, adapter.replaced, adapter.rows, adapter.meta, None, (*adapter.notes, *notes, said))


def _of_alpha_rank(tensors: Mapping[str, np.ndarray], where: str) -> Adapter:
    """The adapter of a file whose every alpha is its rank."""
    state, notes = _plain(tensors, where)
    ranks = {
        m[1].removeprefix(_PREFIX): len(a) for key, a in state.items() if (m := re.fullmatch(r"(.+)\.lora_A\.weight", key))
    }
    patterns = {re.escape(target): rank for target, rank in ranks.items()}
    config = {"peft_type": "LORA", "rank_pattern": patterns, "alpha_pattern": patterns}
    adapter = peft.parse(json.dumps(config), state, {}, where=where)
    said = "alpha is the rank, as ai-toolkit always saves it"
    return Adapter(adapter.deltas, adapter.replaced, adapter.rows, adapter.meta, None, (*adapter.notes, *notes, said))


def _plain(tensors: Mapping[str, np.ndarray], where: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The tensors under the keys that peft saves, and what was changed for it."""
    names = {match[2] for key in tensors if (match := _NAMED.search(key))}
    if len(names) > 1:
        raise RefusedError(where, f"it holds {len(names)} adapters: {', '.join(sorted(names))[:80]}", "Save one of them")
    state: dict[str, np.ndarray] = {}
    for key, array in tensors.items():
        plain = _NAMED.sub(r"\1\3", key)
        plain = plain if plain.startswith(_PREFIX) or peft.classify(plain)[0] == "shared" else _PREFIX + plain
        if plain in state:
            raise FormatError(where, f"tensor {key!r} is there under two names")
        state[plain] = array
    notes = [f"{name!r} was the adapter's name in its keys" for name in names]
    if any(not key.startswith(_PREFIX) and peft.classify(key)[0] != "shared" for key in tensors):
        notes.append(f"keys without {_PREFIX} were given it")
    return state, tuple(notes)


def _source_metadata(metadata: dict[str, str], where: str) -> dict[str, str]:
    text = metadata.pop(METADATA_KEY, None)
    if text is None:
        return metadata
    source = json_file.parse_object(text, f"{where}: {METADATA_KEY}")
    if not all(isinstance(value, str) for value in source.values()):
        raise FormatError(where, f"{METADATA_KEY} is not a map of text to text")
    return source


def write(adapter: Adapter, path: Path, *, base: BaseSpec | None = None) -> LossReport:
    """Write the file `path`: what PEFT would hold, with its config in the header."""
    source = adapter.source if adapter.source and adapter.source.format == "peft" else None
    written = adapter if source else factored_out(adapter)
    names = source.names if source else {}
    tensors = {names.get(name, name): tensor for name, tensor in peft.state_dict(written).items()}
    metadata = {
        "format": "pt",
        CONFIG_KEY: source.config if source else peft.config_text(written),
        METADATA_KEY: json.dumps(dict(source.metadata) if source else {"format": "pt"}, separators=(",", ":")),
    }
    safetensors_file.write(path, tensors, metadata)
    return LossReport(tuple(Kept(name, Loss.EXACT) for name in sorted(tensors)), written.notes)
