"""Reader of a base in GGUF: one file, or all parts of a split file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters import safe_regex
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.containers import gguf_file
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError

from . import canonical_names
from .base_spec import BaseSpec, complete_config, text_digest
from .canonical_names import BaseTensor
from .model_files import Files, LocalFiles, RangedFile

# Keys in GGUF, after `{architecture}.`, to those of config.json (gguf-py, `constants.py`, `Keys`).
_CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "layer_norm_eps",
    "attention.sliding_window": "sliding_window",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "ssm.state_size": "linear_key_head_dim",
}
# Tensors that llama.cpp derives from a config; no Hugging Face model contains them.
_DERIVED_TENSORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}


# Names of parts as llama-gguf-split writes them (llama.cpp, `llama_split_path`).
_PART_NAME = safe_regex.Pattern(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


def read(files: Files, name: str) -> BaseSpec:
    """Read the base in a GGUF file, or in all parts of a split file if `name` is one of them."""
    parts = files.map_items(lambda part: _read_part(files, part), _part_names(files, name))
    header, label = parts[0][1], files.label(name)
    metadata = header.metadata
    gguf_tensors = _merge_parts(parts)
    # Architectures with and without experts share a name in GGUF.
    experts = any("_exps." in name for name in gguf_tensors)
    name_in_gguf = header.text("general.architecture")
    sections = f"{name_in_gguf}.rope.dimension_sections" in metadata
    architecture = architecture_lookup.by_gguf(name_in_gguf, label, experts=experts, sections=sections)
    stored = {
        name: BaseTensor(tensor.shape, tensor.type_name)
        for name, tensor in gguf_tensors.items()
        if name not in _DERIVED_TENSORS
    }
    config = _gguf_config(header, architecture, label)
    tensors = canonical_names.rename_gguf(architecture, stored, config)
    embedding = next(
        (tensors[f"{name}.weight"] for name in architecture_lookup.EMBEDDINGS if f"{name}.weight" in tensors), None
    )
    if embedding and len(embedding.shape) == 2:
        # Some files lack the key; the table of embeddings shows the number.
        config.setdefault("vocab_size", embedding.shape[0])
    tied = bool(tensors) and "lm_head.weight" not in tensors
    class_name, model_type = next(iter((architecture.classes or architecture.wrapped).items()))
    return BaseSpec(
        source=label,
        kind="gguf",
        architecture=class_name,
        model_type=model_type,
        config=config | {"tie_word_embeddings": tied},
        tensors=tensors,
        stored=stored,
        tied=tied,
        quantization=_dominant_type(gguf_tensors),
        chat_template_digest=text_digest(metadata.get("tokenizer.chat_template")),
        repo=_gguf_repo(header),
        size=sum(ranged.size for ranged, _ in parts),
        notes=tuple(files.notes),
    )


def part_paths(path: Path) -> list[Path]:
    """Return all files of the local model that contains the file `path`."""
    return [path.parent / name for name in _part_names(LocalFiles(path.parent), path.name)]


_PartHeader = tuple[RangedFile, gguf_file.GGUFHeader]


def _part_names(files: Files, name: str) -> list[str]:
    """Return the names of all parts of a model that `name` is a part of."""
    part_match = _PART_NAME.fullmatch(name)
    if part_match is None:
        return [name]
    count = int(part_match["count"])
    if not 1 <= int(part_match["part"]) <= count:
        raise FormatError(files.label(name), "its name has a part number that is out of range")
    return [f"{part_match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def _read_part(files: Files, name: str) -> _PartHeader:
    """Read the header of one part."""
    ranged = files.open_ranged(name)
    part_match = _PART_NAME.fullmatch(name)
    if ranged is None:
        problem = f"no such file: one of {int(part_match['count'])} parts of a model" if part_match else "no such file"
        hint = "Download it: all parts are read together" if part_match else ""
        raise NotFoundError(files.label(name), problem, hint, code="no-such-file")
    header = gguf_file.read_header(ranged.read_at, ranged.size, ranged.location)
    if "general.type" in header.metadata and header.text("general.type") != "model":
        raise FormatError(
            ranged.location, f"not a base model: its general.type is {header.text('general.type')[:40]!r}", code="not-a-base"
        )
    _check_part(header, part_match, ranged.location)
    return ranged, header


def _check_part(header: gguf_file.GGUFHeader, part_match: safe_regex.Match | None, location: str) -> None:
    """Check that header and name agree on the part's number and the number of parts."""
    in_header = (_header_number(header, "split.no", 0, location), _header_number(header, "split.count", 1, location))
    in_name = (int(part_match["part"]) - 1, int(part_match["count"])) if part_match else (0, 1)
    # A single file may state a count of 0 or 1.
    if in_header == in_name or (in_header[1] in (0, 1) and in_name[1] == 1):
        return
    description = f"part {in_header[0]} (from 0) of {in_header[1]}"
    hint = "Name parts as llama-gguf-split does: NAME-00001-of-00003.gguf"
    if not part_match:
        raise RefusedError(location, f"{description} of a model, and its name has no part number", hint)
    raise FormatError(location, f"its header describes {description}, its name another", hint)


def _header_number(header: gguf_file.GGUFHeader, key: str, default: int, location: str) -> int:
    value = header.metadata.get(key, default)
    if not isinstance(value, int):  # an array could not be compared with a number
        raise FormatError(location, f"{key} is a {header.kinds[key]}, not a number")
    return value


def _merge_parts(parts: Sequence[_PartHeader]) -> dict[str, gguf_file.GGUFTensor]:
    """Return the tensors of all parts.

    Raises:
        FormatError: The parts do not belong to one model.
    """
    tensors: dict[str, gguf_file.GGUFTensor] = {}
    for ranged, header in parts:
        duplicate = next((name for name in header.tensors if name in tensors), None)
        if duplicate is not None:
            problem = f"tensor {duplicate!r} is also in an earlier part, so that the parts are not those of one model"
            raise FormatError(ranged.location, problem, "Download all of them again")
        tensors |= header.tensors
    first_file, header = parts[0]
    # Read the total from the first part.
    count = _header_number(header, "split.tensors.count", len(tensors), first_file.location)
    if len(parts) > 1 and count != len(tensors):
        raise FormatError(first_file.location, f"its header counts {count} tensors in all, the parts have {len(tensors)}")
    return tensors


def _gguf_config(header: gguf_file.GGUFHeader, architecture: architecture_lookup.Architecture, location: str) -> dict[str, Any]:
    """Return the numbers in the metadata under their names in config.json."""
    config: dict[str, Any] = {}
    arch = architecture.gguf
    for key, name in _CONFIG_KEYS.items():
        value = header.metadata.get(f"{arch}.{key}")
        if isinstance(value, float) and not math.isfinite(value):
            raise FormatError(location, f"{arch}.{key} is {value}")
        if header.kinds.get(f"{arch}.{key}") == "FLOAT32":
            config[name] = float(str(np.float32(value)))  # so that the float32 nearest to 1e-05 reads as 1e-05
        elif isinstance(value, int | float):
            config[name] = value
    # In a hybrid, each layer has a number of its own, which is 0 without attention.
    counts = header.metadata.get(f"{arch}.attention.head_count_kv")
    if isinstance(counts, list | np.ndarray):
        distinct = {int(count) for count in counts if isinstance(count, int | np.integer) and count}
        # 0 is no number of heads: what depends on it is refused if the layers differ.
        config["num_key_value_heads"] = distinct.pop() if len(distinct) == 1 else 0
    # The number of groups, which Hugging Face's config has only for the new architecture.
    if arch == "falcon" and "num_key_value_heads" in config:
        config |= {"new_decoder_architecture": True, "num_kv_heads": config["num_key_value_heads"]}
    inner_size = header.metadata.get(f"{arch}.ssm.inner_size")
    if isinstance(inner_size, int) and isinstance(heads := config.get("linear_num_value_heads"), int) and heads > 0:
        config["linear_value_head_dim"] = inner_size // heads
    config = complete_config(config)
    rotated, size = header.metadata.get(f"{arch}.rope.dimension_count"), config.get("head_dim")
    if architecture.unpaired and isinstance(rotated, int) and isinstance(size, int) and size > 0:
        config["rope_parameters"] = {"mrope_section": [], "partial_rotary_factor": rotated / size}
    return config


def _dominant_type(tensors: Mapping[str, gguf_file.GGUFTensor]) -> str | None:
    """Return the type with the most bytes; None if it is a float."""
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[tensor.type_name] = sizes.get(tensor.type_name, 0) + tensor.size
    dominant = max(sizes, key=lambda name: sizes[name], default="F32")
    return None if dominant in ("F64", "F32", "F16", "BF16") else dominant.lower()


def _gguf_repo(header: gguf_file.GGUFHeader) -> str | None:
    """Return the model's name on the Hugging Face Hub, from the metadata."""
    hub = "https://huggingface.co/"
    for url in (header.text("general.source.repo_url"), header.text("general.repo_url")):
        if url.startswith(hub):
            return url.removeprefix(hub).strip("/") or None
    return None
