"""Formats of trainers that build LoRA into the model: torchtune, litgpt, Megatron."""
