"""GGUF LoRA adapters, as llama.cpp loads them.

llama.cpp has one alpha per file and multiplies `lora_b @ lora_a` by alpha / r, where r is the rank of that tensor; an alpha
of 0, or a missing one, means a scale of 1 (`src/llama-adapter.h`, `get_scale`). PEFT has an alpha per module and rsLoRA, so
the file gets the alpha that most modules need, and for the others the quotient is multiplied into `lora_b`. Anything that
llama.cpp would ignore, abort on or scale wrongly is refused by name.

The source's config, which GGUF cannot express, is stored under `adapterhub.*` keys with the digest of the tensors and alpha
that it belongs to. As long as these are unchanged, reading recovers the source's own bytes and needs no base.

`reader` and `writer` share `tensor_layout`; `adapter_checks` is what the writer asks first.
"""

from .reader import is_conditional, read, sniff
from .writer import NEGLIGIBLE_ALPHA, write

__all__ = ["NEGLIGIBLE_ALPHA", "is_conditional", "read", "sniff", "write"]
