"""QLoRA on one machine: an NF4 base, LoRA on its linear layers, and an adapter that says how it came to be.

Read in the order things happen: `config`, `data`, `base` (with `nf4`), `lora`, `loop`, `card`; `run` ties them.
"""
