"""Names and suffixes of the files that belong to an adapter, in one place."""

from __future__ import annotations

ADAPTER_JSON = "adapter.json"
"""The manifest of an adapter (`adapterhub.manifest.document`)."""
ADAPTER_TOML = "adapter.toml"
"""What the owner of an adapter declares about it."""
ADAPTER_CONFIG = "adapter_config.json"
"""The config of PEFT, and of MLX, which has other keys in it."""
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_INDEX = "adapter_model.safetensors.index.json"
MLX_WEIGHTS = "adapters.safetensors"
LITGPT_WEIGHTS = "lit_model.pth.lora"
"""A pickle, as litgpt saves it."""
README = "README.md"

WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf"})
