"""What transformers 5 calls a module that files of the same model call otherwise, as data.

It renames as it loads and again as it saves (transformers 5.24, `conversion_mapping.py`): files keep the names of
transformers 4, while peft sees, and writes, those of the model in memory.
"""

from __future__ import annotations

import re

_Rules = tuple[tuple[str, str], ...]

_VISION: _Rules = (
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^language_model\.(model\.)?", "model.language_model."),
    (r"^(vision_tower|image_tower|video_tower|vision_model|multi_modal_projector|image_newline)\b", r"model.\1"),
    (r"^model\.(vision|image|video)_tower\.vision_model\.", r"model.\1_tower."),
)
_QWEN_VISION: _Rules = (
    (r"^visual\.", "model.visual."),
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."),
)
_ATTENTION: _Rules = (
    *((rf"\battention\.attention\.{old}\b", f"attention.{old[0]}_proj") for old in ("query", "key", "value")),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
)
_IMAGE: _Rules = (
    (r"\bencoder\.layer\.", "layers."),
    *_ATTENTION,
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)
_RULES: dict[str, _Rules] = {
    **dict.fromkeys(
        ("llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "video_llava", "mistral3", "paligemma",
         "gemma3", "internvl", "got_ocr2", "aya_vision", "mllama"),
        _VISION,
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN_VISION),
    **dict.fromkeys(("vit", "deit", "beit"), _IMAGE),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), _ATTENTION),
    "mixtral": ((r"\.block_sparse_moe\.", ".mlp."),),
}  # fmt: skip
# Of these, an adapter under the old names meets a peft that skips it, or that finds no module for its target_modules.
SKIPPED = frozenset({"qwen2_vl", "qwen2_5_vl"})
REFUSED = frozenset({"vit", "deit", "beit", "dinov2", "dinov2_with_registers"})
# TensorFlow's words for a normalization's weight and bias, which every model of transformers still reads.
_ALWAYS: _Rules = ((r"\bLayerNorm\.gamma$", "LayerNorm.weight"), (r"\bLayerNorm\.beta$", "LayerNorm.bias"))


def in_memory(name: str, model_type: str) -> str:
    """The name that a parameter or module of a file has in the model that transformers 5 makes of it."""
    for pattern, replacement in (*_RULES.get(model_type, ()), *_ALWAYS):
        name = re.sub(pattern, replacement, name)
    return name
