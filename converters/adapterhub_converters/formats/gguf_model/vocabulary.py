"""Conversion of a model folder's vocabulary to GGUF's keys, by its file and architecture.

The rules are those of `set_vocab` in each class of llama.cpp's conversion (`conversion/*.py`). A folder without a tokenizer
becomes a model that llama.cpp runs on token ids only, with a note.
"""

from __future__ import annotations

from collections.abc import Iterable

from adapterhub_converters.architectures.architecture import Architecture
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.gguf_types import MetadataValue, bool_value, string_value, u32_value
from adapterhub_converters.errors import RefusedError

from . import byte_level, sentencepiece
from .special_tokens import Tokenizer, special_tokens

_LLAMA = ("llama", "arcee", "smollm3", "granite", "granitemoe", "mistral3", "apertus")
_PIECES_ONLY = ("gemma", "gemma2", "nemotron", "ernie4_5", "ernie4_5-moe")
_EITHER = (
    *_LLAMA, "qwen2", "qwen3", "gemma3", "phi3", "qwen2vl", "qwen3vl",
)  # fmt: skip
_NO_SPACE = ("gemma", "gemma2", "gemma3")
_CODE_LLAMA, _SMALL_CODE = 32016, 49152  # rows of embeddings by which llama.cpp recognizes models
NO_TOKENIZER = "the folder has no tokenizer: llama.cpp can run the model on token ids, but not on text"


def vocabulary(architecture: Architecture, tokenizer: Tokenizer, size: int) -> tuple[dict[str, MetadataValue], tuple[str, ...]]:
    """Return the keys `tokenizer.*` for a model with `size` rows of embeddings, and notes; RefusedError if unsupported."""
    metadata, notes = _vocabulary(architecture.gguf, tokenizer, size)
    if architecture.gguf == "phi2":
        metadata["tokenizer.ggml.add_bos_token"] = bool_value(False)
    return metadata, notes


def _vocabulary(gguf: str, tokenizer: Tokenizer, size: int) -> tuple[dict[str, MetadataValue], tuple[str, ...]]:
    folder = tokenizer.folder
    pieces = (folder / sentencepiece.NAME).is_file()
    if not pieces and not tokenizer.json:
        unsupported_files = [name for name in ("tekken.json", "vocab.json", "spiece.model") if (folder / name).is_file()]
        if unsupported_files:
            problem = f"its only tokenizer is {unsupported_files[0]}, which is not supported"
            raise RefusedError(str(folder), problem, "Save it with transformers as tokenizer.json")
        return {"tokenizer.ggml.model": string_value("none"), f"{gguf}.vocab_size": u32_value(size)}, (NO_TOKENIZER,)
    # Which file a class of llama.cpp's conversion prefers differs between architectures.
    if pieces and (gguf in _PIECES_ONLY or (gguf in _EITHER and not _is_gpt2(gguf, tokenizer))):
        return _from_pieces(gguf, tokenizer, size), ()
    if gguf in _PIECES_ONLY or not tokenizer.json:
        required_file = sentencepiece.NAME if gguf in _PIECES_ONLY else "tokenizer.json"
        problem = f"llama.cpp's {gguf} reads its vocabulary from {required_file}, which is missing"
        raise RefusedError(str(folder), problem, "Copy it from the original model")
    return _from_bytes(gguf, tokenizer, size), ()


def _is_gpt2(gguf: str, tokenizer: Tokenizer) -> bool:
    return gguf == "phi3" and tokenizer.config.get("tokenizer_class") == "GPT2Tokenizer"


def _from_pieces(gguf: str, tokenizer: Tokenizer, size: int) -> dict[str, MetadataValue]:
    pieces = sentencepiece.read_pieces(tokenizer)
    metadata = sentencepiece.vocabulary(tokenizer, pieces, size, phi=gguf == "phi3")
    # llama.cpp sets eot for every Gemma, for the sake of the code models (conversion/gemma.py).
    metadata |= special_tokens(tokenizer, size, {"eot": 107} if gguf == "gemma" else None)
    if gguf == "nemotron":
        metadata |= {"tokenizer.ggml.padding_token_id": u32_value(0), "tokenizer.ggml.unknown_token_id": u32_value(1)}
    metadata |= _space_prefix(gguf, tokenizer)
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix")
    if pieces.prefixed != (prefixed is None or bool(prefixed.value)):
        problem = f"{sentencepiece.NAME} {'adds a' if pieces.prefixed else 'adds no'} space before a text, but llama.cpp would"
        raise RefusedError(tokenizer.where, f"{problem}{' not' if pieces.prefixed else ''}")
    return metadata | _llama(gguf, tokenizer, size)


def _from_bytes(gguf: str, tokenizer: Tokenizer, size: int) -> dict[str, MetadataValue]:
    default_ids = {}
    if gguf == "glm4":
        added = _added_ids(tokenizer, "GLM-4", ("<|endoftext|>", "<|user|>"))
        default_ids = dict.fromkeys(("eos", "unk", "bos"), added["<|endoftext|>"]) | {"eot": added["<|user|>"]}
    elif gguf == "glm4moe":
        default_ids = _glm4moe(tokenizer)
    metadata = byte_level.vocabulary(tokenizer, gguf, size) | special_tokens(tokenizer, None, default_ids)
    metadata |= _space_prefix(gguf, tokenizer) | _llama(gguf, tokenizer, size)
    return metadata | (_hunyuan(tokenizer) if gguf == "hunyuan-dense" else {})


def _added_ids(tokenizer: Tokenizer, family: str, needed: Iterable[str]) -> dict[str, int]:
    """Return the ids of the added tokens by their text; RefusedError if one of the `needed` tokens is missing."""
    added = {token["content"]: token["id"] for token in (tokenizer.json.get("added_tokens") or [])}
    if missing := next((text for text in needed if text not in added), None):
        raise RefusedError(tokenizer.where, f"tokenizer.json: the added token {missing} of {family} is missing")
    return added


def _glm4moe(tokenizer: Tokenizer) -> dict[str, int]:
    token_texts = {"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}
    added = _added_ids(tokenizer, "GLM-4.5", token_texts.values())
    return {kind: added[text] for kind, text in token_texts.items()}


def _hunyuan(tokenizer: Tokenizer) -> dict[str, MetadataValue]:
    """Return the ends of texts and turns that llama.cpp's conversion takes from the configs (conversion/hunyuan.py)."""
    metadata = {}
    end, path = tokenizer.model.get("eod_token_id", 3), tokenizer.folder / "generation_config.json"
    if isinstance(end, int) and 0 <= end < 1 << 32:
        metadata["tokenizer.ggml.eos_token_id"] = u32_value(end)
    ends = json_file.read_object(path).get("eos_token_id") if path.is_file() else None
    if isinstance(ends, list) and len(ends) > 1 and isinstance(ends[0], int) and 0 <= ends[0] < 1 << 32:
        metadata["tokenizer.ggml.eot_token_id"] = u32_value(ends[0])
    return metadata


def _space_prefix(gguf: str, tokenizer: Tokenizer) -> dict[str, MetadataValue]:
    """Return the key for a space before a text, for the classes of llama.cpp's conversion that write it."""
    if gguf in _NO_SPACE:
        return {"tokenizer.ggml.add_space_prefix": bool_value(False)}
    prefix = tokenizer.config.get("add_prefix_space") if gguf in (*_LLAMA, "ernie4_5", "ernie4_5-moe") else None
    return {"tokenizer.ggml.add_space_prefix": bool_value(bool(prefix))} if prefix is not None else {}


def _llama(gguf: str, tokenizer: Tokenizer, size: int) -> dict[str, MetadataValue]:
    if gguf not in _LLAMA or size not in (_CODE_LLAMA, _SMALL_CODE):
        return {}
    if size == _SMALL_CODE:
        return {"tokenizer.ggml.add_bos_token": bool_value(False)}
    # Code Llama's end of an infilled text.
    return {"tokenizer.ggml.eot_token_id": u32_value(32010)}
