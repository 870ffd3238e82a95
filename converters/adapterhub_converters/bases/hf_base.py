"""Reader of a base in Hugging Face's layout: a `config.json`, and safetensors files next to it.

A pipeline of image models, a folder with a `model_index.json` and a folder for each model, is one base. The names of its
tensors begin with that of their model, as in diffusers: `unet.down_blocks.0.…`.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import numpy as np

from adapterhub_converters import safe_regex
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.containers import json_file, safetensors_header
from adapterhub_converters.containers.safetensors_file import SafetensorsFile
from adapterhub_converters.containers.safetensors_header import MAX_HEADER, MAX_TENSORS, TensorInfo
from adapterhub_converters.errors import FormatError, NotFoundError
from adapterhub_converters.lazy_dataclass import dataclass

from . import canonical_names
from .base_spec import BaseSpec, complete_config, text_digest
from .canonical_names import BaseTensor
from .config_shapes import shapes_from_config
from .model_files import Files, LocalFiles, RangedFile, read_object
from .quantized_shapes import logical_shapes, parameter_name, quantization_settings, small_tensors

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DIFFUSERS = "diffusion_pytorch_model.safetensors"  # the weights of a diffusers model

# The keys that change what models of equal shapes compute (rope, norms, heads).
_NUMERIC_KEYS = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps",
    "layer_norm_eps", "layer_norm_epsilon", "hidden_act", "hidden_activation", "tie_word_embeddings",
    "num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "sliding_window", "attention_bias",
    "mlp_bias", "num_kv_heads", "multi_query", "new_decoder_architecture",
    "alibi", "parallel_attn", "moe_num_experts",
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
)  # fmt: skip
# Names of parts as save_pretrained writes them.
_PART_NAME = safe_regex.Pattern(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.safetensors")
_MAX_PARTS = 10_000


def read_hf(folder: Path) -> BaseSpec:
    """Read the base in a Hugging Face folder: `config.json`, and the headers of its safetensors files, if any."""
    return read(LocalFiles(folder))


def read(files: Files, name: str = "") -> BaseSpec:
    """Read the base with the weights in `name`: a safetensors file, one of several parts, or their index.

    Without a `name`, the weights are the files of the usual names, if any, and a `config.json` is required.
    """
    document = read_object(files, CONFIG)
    if document is None and not name:
        raise NotFoundError(files.label(CONFIG), "no such file", code="no-such-file")
    config = document or {}
    quantized = quantization_settings(config)
    # The numbers of a vision model's text model are in a section; the top level wins.
    text_section = _text_section(config)
    merged = complete_config({**text_section, **config})
    weights = _read_weights(files, name, quantized)
    if document is None:
        weights.notes.append("there is no config.json next to it, so its architecture and numbers are unknown")
        _refuse_adapter(files.label(name), weights.tensors)
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        architectures = [config.get("_class_name") or ""]  # diffusers' key
    tokenizer, template = files.sha256("tokenizer.json"), _chat_template_digest(files)
    return BaseSpec(
        source=files.label(name),
        kind="hf",
        architecture=str(architectures[0]),
        model_type=str(config.get("model_type", "")),
        text_type=kind if isinstance(kind := text_section.get("model_type"), str) else None,
        config={key: merged[key] for key in _NUMERIC_KEYS if merged.get(key) is not None},
        tensors=weights.tensors,
        names=weights.names,
        tied=_is_tied(merged, weights.tensors or weights.names),
        quantization=_quantization_type(quantized) if quantized else None,
        packed=weights.packed,
        derived={} if weights.tensors or weights.packed else _derived_tensors(merged, str(architectures[0])),
        tokenizer_digest=tokenizer,
        chat_template_digest=template,
        repo=repo if isinstance(repo := config.get("_name_or_path"), str) and repo else None,
        size=weights.size,
        folder=files.local if document is not None and _has_usual_names(files, name, weights) else None,
        notes=(*weights.notes, *files.notes),
    )


def _section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a section of a config; empty if it is absent or not an object."""
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _text_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the text model in a vision or audio model, which an omni model has within that of its thinker."""
    return _section(config, "text_config") or _section(_section(config, "thinker_config"), "text_config")


@dataclass(frozen=True)
class _Weights:
    """The weights by their headers.

    `names` is set if there is only an index; `packed` has a reason for each unknown shape.
    """

    tensors: Mapping[str, BaseTensor]
    packed: Mapping[str, str]
    names: frozenset[str]
    size: int
    notes: list[str]


def _read_weights(files: Files, name: str, quantized: Mapping[str, Any]) -> _Weights:
    """Read the headers of the weights, and the few small tensors that describe packed weights."""
    shards, index = _shards(files, name)
    limit = _HeaderBudget()
    headers = files.map_items(lambda shard: limit.count(_read_header(files, shard)), shards)
    missing = [shard for shard, header in zip(shards, headers, strict=True) if header is None]
    # An index alone still shows which parameters there are.
    if missing and index is not None and len(missing) == len(shards):
        parameter_names = frozenset(
            name_of_parameter
            for stored in index
            if (name_of_parameter := parameter_name(stored)) and not name_of_parameter.endswith(_BUFFER)
        )
        note = f"all {len(shards)} files in the index are missing: names are known, shapes are not"
        return _Weights({}, {}, parameter_names, 0, [note])
    if missing:
        missing_count = f": {len(missing)} of {len(shards)} files are missing" if len(shards) > 1 else ""
        raise NotFoundError(
            files.label(missing[0]),
            f"no such file{missing_count}",
            "Download it, or name the index alone" if index else "",
            code="no-such-file",
        )
    present_headers = [header for header in headers if header is not None]
    infos = _merge_headers(present_headers)
    small_entries = [(present_headers[number][0], info) for name in small_tensors(infos) for number, info in [infos[name]]]
    texts = files.map_items(lambda item: item[0].read_at(item[1].offset, item[1].size), small_entries)
    bytes_by_name = {info.name: text for (_, info), text in zip(small_entries, texts, strict=True)}
    shapes, packed = logical_shapes(
        {name: info for name, (_, info) in infos.items()}, quantized, bytes_by_name.__getitem__, files.label(name)
    )
    # Old checkpoints contain this buffer, which is not a weight.
    tensors = {name: BaseTensor(*tensor) for name, tensor in shapes.items() if not name.endswith(_BUFFER)}
    return _Weights(tensors, packed, frozenset(), sum(ranged.size for ranged, _ in present_headers), _index_notes(index, infos))


_BUFFER = ".rotary_emb.inv_freq"
_Header = tuple[RangedFile, safetensors_header.SafetensorsHeader]


class _HeaderBudget:
    """The limits for one header, applied to all files of a model together, which are read concurrently and all kept."""

    def __init__(self) -> None:
        self._tensors = self._bytes = 0
        self._lock = threading.Lock()

    def count(self, header_read: _Header | None) -> _Header | None:
        """Count a header and return it; FormatError for every header once there are too many."""
        if header_read is not None:
            ranged, header = header_read
            # Several headers are read at the same time.
            with self._lock:
                self._tensors += len(header.tensors)
                self._bytes += header.data_start
                if self._tensors > MAX_TENSORS or self._bytes > MAX_HEADER:
                    problem = f"its files have more than {MAX_TENSORS} tensors, or {MAX_HEADER} bytes of headers, together"
                    raise FormatError(ranged.location, problem)
        return header_read


def _read_header(files: Files, shard: str) -> _Header | None:
    ranged = files.open_ranged(shard)
    return None if ranged is None else (ranged, safetensors_header.read_header(ranged.read_at, ranged.size, ranged.location))


def _merge_headers(headers: Sequence[_Header]) -> dict[str, tuple[int, TensorInfo]]:
    """Return every tensor by name, with the number of its file.

    Raises:
        FormatError: Two files have tensors of the same name that differ in dtype or shape.
    """
    infos: dict[str, tuple[int, TensorInfo]] = {}
    for number, (ranged, header) in enumerate(headers):
        for name, info in header.tensors.items():
            _, earlier = infos.setdefault(name, (number, info))
            if (earlier.dtype, earlier.shape) != (info.dtype, info.shape):
                problem = f"tensor {name!r} is {info.dtype} {info.shape}, in another file {earlier.dtype} {earlier.shape}"
                raise FormatError(ranged.location, problem)
    return infos


def _index_notes(index: Collection[str] | None, infos: Collection[str]) -> list[str]:
    """Return a note if the index lists tensors that its files do not contain."""
    absent = [name for name in index or () if name not in infos]
    return [f"the index lists {len(absent)} tensors that its files do not contain: {absent[0]}"] if absent else []


def _shards(files: Files, name: str) -> tuple[list[str], dict[str, str] | None]:
    """Return the names of the safetensors files, and the index's map from tensor to file, if there is an index."""
    if name.endswith(".json") or not name:
        index = read_object(files, name or INDEX)
        if index is not None:
            weight_map = _weight_map(index, files.label(name or INDEX))
            return list(dict.fromkeys(weight_map.values())), weight_map
        if name:
            raise NotFoundError(files.label(name), "no such file", code="no-such-file")
        # Models of transformers and of diffusers name their weights differently.
        names_present = [
            single for single in (SINGLE, _DIFFUSERS, f"{_DIFFUSERS}.index.json") if files.open_ranged(single) is not None
        ]
        return _shards(files, names_present[0]) if names_present and names_present[0] != SINGLE else (names_present, None)
    part_match = _PART_NAME.fullmatch(name)
    if part_match is None:
        return [name], None
    count = int(part_match["count"])
    if not 1 <= int(part_match["part"]) <= count <= _MAX_PARTS:
        raise FormatError(files.label(name), "its name has a part number that is out of range")
    return [f"{part_match['stem']}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)], None


def _weight_map(index: Mapping[str, Any], location: str) -> dict[str, str]:
    """Return the map in an index from tensor to file, whose names must be plain."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError(location, "weight_map is not a map of tensor names to file names")
    shards = set(weight_map.values())
    if len(shards) > _MAX_PARTS:
        raise FormatError(
            location, f"weight_map names {len(shards):,} files, and no model is read from more than {_MAX_PARTS:,}"
        )
    # The names come from a file: none may lead out of the folder.
    for name in shards:
        if Path(name).name != name or not name.isprintable() or "\\" in name or name in ("", ".", ".."):
            raise FormatError(location, f"shard name {name[:80]!r} is not a plain file name")
    return weight_map


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder, in the order of its index; names in the index cannot leave the folder."""
    for single in (SINGLE, _DIFFUSERS):
        index = folder / f"{single}.index.json"
        if index.exists():
            weight_map = _weight_map(json_file.read_object(index), str(index))
            return [folder / name for name in dict.fromkeys(weight_map.values())]
        if (folder / single).exists():
            return [folder / single]
    return []


def _has_usual_names(files: Files, name: str, weights: _Weights) -> bool:
    """Return whether these are the weights with the folder's usual names, which any other reader of the folder would read."""
    if files.local is None or not weights.tensors:
        return False
    return name in ("", INDEX) or (name == SINGLE and not (files.local / INDEX).exists())


def _refuse_adapter(location: str, tensors: Collection[str]) -> None:
    """Raise a FormatError for the tensors of an adapter."""
    if any(".lora_A." in name or name.endswith(".lora_a") for name in tensors):
        raise FormatError(location, "not a base model: it contains an adapter's tensors", code="not-a-base")


def _derived_tensors(config: Mapping[str, Any], architecture: str) -> dict[str, BaseTensor]:
    """Return the linear modules and tables that a config implies."""
    return {name: BaseTensor(shape, "") for name, shape in shapes_from_config(config, architecture).items()}


def _is_tied(config: Mapping[str, Any], tensors: Collection[str]) -> bool:
    # transformers ties by default if the config does not set it, but only the stored weights decide.
    """Return whether the output layer is the embedding table."""
    if (
        tensors
        and not any(name.endswith(("lm_head.weight", "embed_out.weight")) for name in tensors)
        and any(f"{name}.weight" in tensors for name in architecture_lookup.EMBEDDINGS)
    ):
        return True
    return bool(config.get("tie_word_embeddings", not tensors))


def _quantization_type(config: Mapping[str, Any]) -> str:
    """Return the type of quantization that a config names."""
    method = str(config.get("quant_method") or ("mlx" if "group_size" in config else "unknown"))
    return str(config.get("bnb_4bit_quant_type", method)) if config.get("load_in_4bit") else method


def _chat_template_digest(files: Files) -> str | None:
    """Return the digest of the exact template: one that differs only by a newline tokenizes differently."""
    template_file_digest = files.sha256("chat_template.jinja")
    return template_file_digest or text_digest((read_object(files, "tokenizer_config.json") or {}).get("chat_template"))


# ---- The values of the weights


class ModelWeights:
    """The tensors of a model folder by name, read on demand; empty without safetensors files. A context manager."""

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self._files: dict[str, SafetensorsFile] = {}
        self._stack = ExitStack()
        try:
            for path in weight_files(folder):
                file = self._stack.enter_context(SafetensorsFile(path))
                # Every file stays open, so that tensors can be read in any order.
                self._files.update(dict.fromkeys(file.tensors, file))
        except BaseException:
            self._stack.close()
            raise

    @property
    def names(self) -> set[str]:
        """The names of all tensors."""
        return set(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def info(self, name: str) -> TensorInfo:
        """Return dtype, shape, and position of an existing tensor."""
        return self._files[name].tensors[name]

    def read_tensor(self, name: str) -> np.ndarray:
        """Read an existing tensor in its own dtype."""
        return self._files[name].tensor(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


# ---- Pipelines of image models


PIPELINE_INDEX = "model_index.json"


def read_pipeline(folder: Path) -> BaseSpec:
    """Read the base in a pipeline's folder, from the headers of all its models."""
    name = json_file.read_object(folder / PIPELINE_INDEX).get("_class_name")
    models = {part: read_hf(folder / part) for part in canonical_names.PIPELINE_PARTS if (folder / part / CONFIG).is_file()}
    if not models:
        problem = f"the pipeline has none of the models that adapters change: {', '.join(canonical_names.PIPELINE_PARTS)}"
        raise NotFoundError(str(folder), problem, f"Download their folders, each with its {CONFIG}", code="not-a-base")
    return BaseSpec(
        source=str(folder),
        kind="hf",
        architecture=name if isinstance(name, str) and name.endswith("Pipeline") else "DiffusionPipeline",
        model_type="",
        config={},
        tensors={
            f"{_name_prefix(part, model)}{name}": t for part, model in models.items() for name, t in model.tensors.items()
        },
        size=sum(model.size for model in models.values()),
        notes=tuple(f"{part}: {note}" for part, model in models.items() for note in model.notes),
    )


def _name_prefix(part: str, model: BaseSpec) -> str:
    """Return the prefix of a model's names; transformers 5 saves CLIP's text encoder without its checkpoints' `text_model.`."""
    lacks_prefix = model.architecture == "CLIPTextModel" and not any(name.startswith("text_model.") for name in model.tensors)
    return f"{part}.text_model." if lacks_prefix else f"{part}."
