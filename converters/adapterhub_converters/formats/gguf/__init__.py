"""GGUF LoRA adapters, as llama.cpp loads them.

llama.cpp keeps one alpha per file and multiplies `lora_b @ lora_a` by alpha / r, r being that tensor's own rank; an
alpha of 0 or none means 1 (`src/llama-adapter.h`, `get_scale`). PEFT has an alpha per module and rsLoRA, so the file
gets the alpha that most modules need and the others have the difference multiplied into `lora_b`. What llama.cpp would
ignore, abort on or scale wrongly is refused by name.

The source's config, which GGUF cannot say, rides along under `adapterhub.*` keys with the digest of the tensors and
alpha it belongs to. As long as they are unchanged, reading gives back the source's own bytes and needs no base.
"""

from .reader import read, sniff
from .writer import CHOICES, NEVER, write

__all__ = ["CHOICES", "NEVER", "read", "sniff", "write"]
