"""Formats of trainers that build LoRA into the model: torchtune, litgpt, Megatron.

`torchtune` and `litgpt` are over `fused_layers`, and so is `megatron`, which `megatron_shards` assembles first.
"""
