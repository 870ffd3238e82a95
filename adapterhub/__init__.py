"""The packaging layer for LoRA adapters: describe, check, convert, version, merge and train them."""

__version__ = "0.1.0"
