"""Containers of formats: safetensors, GGUF, and JSON files, read with every length checked and written reproducibly."""
