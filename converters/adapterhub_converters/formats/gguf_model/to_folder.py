"""Dequantization of a GGUF base model to a Hugging Face folder, so that it can be trained and merged.

All numbers come from the file's metadata; anything unknown is refused by name rather than guessed. The tokenizer is
written from the file's own tokens and merges with llama.cpp's splitting rules (`src/llama-vocab.cpp`,
`llm_tokenizer_bpe`), so that training uses the ids that llama.cpp will use. llama.cpp's converter permutes the rows of
q and k for its rotary embedding (`conversion/llama.py`, `permute`); here the permutation is undone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters import dtypes
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.containers import atomic, json_file, safetensors_file, safetensors_header
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .special_tokens import CONTROL, USER_DEFINED, id_key

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json
_ARRAYS = (list, np.ndarray)
_TOKENS = "tokenizer.ggml.tokens"


@dataclass(frozen=True)
class GGUFBase:
    """An open GGUF file with a model of the llama architecture."""

    where: str
    file: GGUFFile

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's key-value pairs."""
        return self.file.header.metadata

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name to its shape in numpy order."""
        return {name: tensor.shape for name, tensor in self.file.tensors.items()}

    def single(self, key: str, default: Any = None) -> Any:
        """Return a value by its full key, or `default` if it is missing; RefusedError for an array."""
        value = self.metadata.get(key, default)
        if isinstance(value, _ARRAYS):
            raise RefusedError(self.where, f"{key} is an array, not one value")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number above 0 under the architecture's prefix, else the default; RefusedError if it is neither."""
        name = f"{self.metadata['general.architecture']}.{key}"
        value = self.single(name, default)
        if value is None:
            raise RefusedError(self.where, f"the key {name} is missing, which the model's config needs")
        if not json_file.is_number(value) or not 0 < value < math.inf:
            raise RefusedError(self.where, f"{name} is {str(value)[:40]!r}, not a number above 0")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Do the same as `number`, for a whole number."""
        value = self.number(key, default)
        if not isinstance(value, int):
            raise RefusedError(self.where, f"llama.{key} is {value}, not a whole number")
        return value

    def array(self, key: str, kind: type) -> list[Any]:
        """Return an array of texts or of whole numbers by its full key; RefusedError if it is missing or of another kind."""
        value = self.metadata.get(key)
        items = value.tolist() if isinstance(value, np.ndarray) else value
        if not isinstance(items, list) or not all(type(item) is kind for item in items):
            description = "texts" if kind is str else "whole numbers"
            raise RefusedError(self.where, f"the key {key} is missing, or no array of {description}, which the tokenizer needs")
        return items

    def token_id(self, kind: str) -> int | None:
        """Return the id of a special token such as `bos`; None if it is not set, RefusedError if no token has that id."""
        key = id_key(kind)
        value = self.metadata.get(key)
        if value is not None and (not isinstance(value, int) or not 0 <= value < len(self.array(_TOKENS, str))):
            raise RefusedError(self.where, f"{key} is {str(value)[:40]}, and no token has that id")
        return value


def to_hf(gguf: Path, out: Path, *, replace: bool = False) -> None:
    """Write the base in `gguf` as the folder `out`: config, weights in bf16, tokenizer and chat template.

    `out` appears complete or not at all. It must not exist or must be empty, unless it is a model to `replace`. Memory is
    bounded by one tensor in float32.

    Raises:
        RefusedError: The architecture, a tensor, or the pre-tokenizer is not supported.
    """
    # Checked before the work begins, which may take minutes.
    atomic.check_free(out, replace=replace)
    with GGUFFile(gguf) as file:
        _write(GGUFBase(str(gguf), file), out, replace=replace)


def documents(base: GGUFBase) -> dict[str, str]:
    """Return name and text of the files in a Hugging Face folder other than the weights."""
    return {
        "config.json": _json(config(base)),
        "generation_config.json": _json(_generation_config(base)),
        **tokenizer_files(base),
    }


def _write(base: GGUFBase, out: Path, *, replace: bool) -> None:
    texts = documents(base)
    with atomic.pending_output(out, replace=replace) as folder:
        for name, text in texts.items():
            json_file.write_text(folder / name, text)
        _write_weights(base, folder / "model.safetensors")


def tokenizer_files(base: GGUFBase) -> dict[str, str]:
    """Return name and text of the tokenizer's files, including the chat template."""
    texts = {
        "tokenizer.json": json.dumps(tokenizer(base), ensure_ascii=False),
        "tokenizer_config.json": _json(_tokenizer_config(base)),
    }
    template = base.single("tokenizer.chat_template")
    return texts | ({"chat_template.jinja": str(template)} if template else {})


def config(base: GGUFBase) -> dict[str, Any]:
    """Return the `config.json` of a Llama, with every number taken from the file's metadata."""
    architecture = base.single("general.architecture")
    if architecture != "llama":
        raise RefusedError(
            base.where, f"architecture {architecture!r} cannot be converted to a Hugging Face model yet, only llama"
        )
    for key in ("rope.scaling.type", "expert_count", "attention.sliding_window", "attention.scale", "logit_scale"):
        value = base.single(f"llama.{key}")
        if value not in (None, 0, "none"):
            raise RefusedError(base.where, f"llama.{key} = {value} changes what the model computes and is not supported yet")
    if any(isinstance(base.metadata.get(f"llama.attention.head_count{kind}"), _ARRAYS) for kind in ("", "_kv")):
        raise RefusedError(
            base.where, "its layers differ in their number of heads, which a Hugging Face llama does not support"
        )
    heads, hidden = base.count("attention.head_count"), base.count("embedding_length")
    kv_heads, head_dim = base.count("attention.head_count_kv", heads), base.count("attention.key_length", hidden // heads)
    if base.single("llama.rope.dimension_count", head_dim) != head_dim:
        raise RefusedError(base.where, "llama.rope.dimension_count is not the size of a head: a partial rotary embedding")
    if len(base.shapes.get("token_embd.weight", ())) != 2:
        raise RefusedError(base.where, "there is no token_embd.weight with a row for every token")
    ids = {name: base.token_id(name.partition("_")[0]) for name in _IDS}
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": base.count("feed_forward_length"),
        "max_position_embeddings": base.count("context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": base.count("block_count"),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": _shortest(base.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(base.number("rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in base.shapes,
        "vocab_size": int(base.shapes["token_embd.weight"][0]),
        **{name: value for name, value in ids.items() if value is not None},
    }


def _shortest(value: float) -> float:
    # GGUF stores float32: 9.999999747378752e-06 was 1e-05 in the model's own config.
    return float(str(np.float32(value)))


def _generation_config(base: GGUFBase) -> dict[str, Any]:
    return {name: value for name, value in config(base).items() if name in _IDS}


class GGUFWeights:
    """The tensors of a model under their Hugging Face names, each dequantized and reordered on demand."""

    def __init__(self, base: GGUFBase) -> None:
        self._base, self._numbers = base, config(base)
        self._architecture = architecture_lookup.by_gguf("llama", base.where)
        self._sources: dict[str, str] = {}
        for name in base.shapes:
            stem, _, kind = name.rpartition(".")
            module = self._architecture.module(stem)
            if module is None or kind != "weight":
                raise RefusedError(base.where, f"tensor {name[:80]!r} is not a supported tensor of a llama")
            self._sources[f"{module}.weight"] = name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape, in the file's order."""
        return {name: self._base.shapes[source] for name, source in self._sources.items()}

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor as float32, in C order."""
        rows = self._architecture.order(name.removesuffix(".weight"), self._numbers, self._base.where)
        return np.ascontiguousarray(architecture_lookup.unpermute_rows(self._base.file.tensor(self._sources[name]), rows))


def _write_weights(base: GGUFBase, path: Path) -> None:
    weights = GGUFWeights(base)
    order = safetensors_header.sorted_entries((name, "BF16", shape) for name, shape in weights.shapes.items())
    with open(path, "wb") as file:
        file.write(safetensors_header.header_bytes(order, {"format": "pt"}))
        # One tensor in memory at a time.
        for name, _, _ in order:
            file.write(safetensors_file.byte_view(weights.tensor(name).astype(dtypes.BF16)))


# The splitting rules of a pre-tokenizer, applied one after the other (`llm_tokenizer_bpe`, `regex_exprs`), in terms
# of the tokenizers library: every digit alone, then GPT-2's expression, which ByteLevel applies.
_PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "smollm": [
        {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
    "gpt-2": [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}],
}


def tokenizer(base: GGUFBase) -> dict[str, Any]:
    """Return the `tokenizer.json` with llama.cpp's ids: byte-level BPE with the file's tokens and merges."""
    model, pre = base.single("tokenizer.ggml.model"), base.single("tokenizer.ggml.pre")
    if model != "gpt2":
        raise RefusedError(base.where, f"tokenizer model {model!r} cannot be converted to a tokenizer.json yet, only gpt2")
    if pre not in _PRE_TOKENIZERS:
        supported = ", ".join(sorted(_PRE_TOKENIZERS))
        raise RefusedError(
            base.where, f"pre-tokenizer {pre!r} is not supported, only {supported}; another one would split differently"
        )
    tokens, types = base.array(_TOKENS, str), base.array("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens):
        raise RefusedError(base.where, f"tokenizer.ggml.token_type has {len(types):,} entries for {len(tokens):,} tokens")
    merges = [merge.split(" ", 1) for merge in base.array("tokenizer.ggml.merges", str)]
    if malformed := next((merge for merge in merges if len(merge) != 2), None):
        raise RefusedError(base.where, f"tokenizer.ggml.merges has {malformed[0][:40]!r}, which is not a pair")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise RefusedError(base.where, "two tokens of the vocabulary are the same text, which tokenizer.json does not support")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added_token(number, token, special=kind == CONTROL)
            for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _PRE_TOKENIZERS[pre]},
        "post_processor": _post_processor(base, tokens),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


def _added_token(number: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": number, "content": content, **flags}


def _post_processor(base: GGUFBase, tokens: list[str]) -> dict[str, Any] | None:
    """Return a template that adds the same tokens as llama.cpp; None if it adds none.

    `add_bos_token` and `add_eos_token` are both off by default for gpt2.
    """
    ids = {
        kind: number
        for kind in ("bos", "eos")
        if base.single(f"tokenizer.ggml.add_{kind}_token") and (number := base.token_id(kind)) is not None
    }
    if not ids:
        return None
    special = {kind: {"SpecialToken": {"id": tokens[number], "type_id": 0}} for kind, number in ids.items()}
    sequence = [special[kind] for kind in ("bos",) if kind in special]
    sequence += [{"Sequence": {"id": "A", "type_id": 0}}]
    sequence += [special[kind] for kind in ("eos",) if kind in special]
    return {
        "type": "TemplateProcessing",
        "single": sequence,
        "pair": [*sequence, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            tokens[number]: {"id": tokens[number], "ids": [number], "tokens": [tokens[number]]} for number in ids.values()
        },
    }


def _tokenizer_config(base: GGUFBase) -> dict[str, Any]:
    tokens = base.array(_TOKENS, str)
    special = {
        f"{kind}_token": tokens[number] for kind in ("bos", "eos", "pad", "unk") if (number := base.token_id(kind)) is not None
    }
    return {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": base.count("context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
    }


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
