"""mlx-lm's adapters: a folder with `adapter_config.json` and `adapters.safetensors`.

mlx-lm adds `scale * (x @ lora_a) @ lora_b` with `lora_a` `(in, r)` and `lora_b` `(r, out)`, and has one scale and one
rank for the whole file (mlx-lm, `tuner/lora.py`, `tuner/utils.py`). It names modules as Hugging Face does, except for
experts, which are one `switch_mlp` with factors `(experts, r, in)` and `(experts, out, r)`. For modules that need another
scale the quotient is multiplied into `lora_b`; smaller ranks are padded with zeros. DoRA has `.m` on every module.
A delta on the embedding table also acts on the output layer if the base ties them. The source's config is stored in
the header's metadata. Before mlx-vlm adopted this format, its adapters had `A` and `B` instead, and a config of `rank` and
`alpha` (mlx-vlm, `trainer/peft/lora.py`).

`reader` and `writer` share `folder_layout` and `module_names`; `full_tuning` has layers without a delta.
"""

from .folder_layout import CONFIG, WEIGHTS, sniff
from .reader import read
from .writer import write

__all__ = ["CONFIG", "WEIGHTS", "read", "sniff", "write"]
