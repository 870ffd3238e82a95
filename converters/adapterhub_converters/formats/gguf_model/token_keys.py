"""The numbers and names of a GGUF's vocabulary, `tokenizer.ggml.*`, which a model's tokenizer is read from and written to."""

from __future__ import annotations

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Of `token_type` (llama.h, `enum llama_token_type`)."""

SPECIAL = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask", "eot": "eot",
}  # fmt: skip
"""What transformers calls a special token, to what GGUF calls it (gguf-py, `constants.py`, `Keys.Tokenizer`)."""


def id_key(kind: str) -> str:
    """The key of the id of a special token that transformers calls `kind`."""
    return f"tokenizer.ggml.{SPECIAL[kind]}_token_id"
