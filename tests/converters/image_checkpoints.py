"""Names and shapes of image models as their makers' checkpoints have them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from adapterhub_converters.formats.image import family_tables, name_table
from tests.conftest import need_module

for _peer in ("diffusers", "torch"):
    need_module(_peer)
H, LONG = 16, 3072  # the width of most, and that of HunyuanVideo, which diffusers' converter has written into it


def hunyuan() -> Iterator[tuple[str, int]]:
    for kind in ("img", "txt"):
        yield from ((f"double_blocks.0.{kind}_{end}", k * LONG) for end, k in (
            ("attn_qkv", 3), ("attn_proj", 1), ("mlp.fc1", 4), ("mlp.fc2", 1), ("mod.linear", 6)))  # fmt: skip
    yield from ((f"single_blocks.0.{end}", k * LONG) for end, k in (("linear1", 7), ("linear2", 1), ("modulation.linear", 3)))
    token = "txt_in.individual_token_refiner.blocks.1"
    yield from ((f"{token}.{end}", k * LONG) for end, k in (
        ("self_attn_qkv", 3), ("self_attn_proj", 1), ("mlp.fc1", 4), ("mlp.fc2", 1), ("adaLN_modulation.1", 2)))  # fmt: skip
    yield from ((f"txt_in.{end}", H) for end in (
        "input_embedder", "t_embedder.mlp.0", "t_embedder.mlp.2", "c_embedder.linear_1", "c_embedder.linear_2"))  # fmt: skip
    ends = {"time_in": "mlp.0 mlp.2", "guidance_in": "mlp.0 mlp.2", "vector_in": "in_layer out_layer"}
    yield from ((f"{name}.{end}", H) for name, several in ends.items() for end in several.split())
    yield from (("final_layer.linear", 8), ("final_layer.adaLN_modulation.1", 2 * H))


def lumina() -> Iterator[tuple[str, int]]:
    for layer in ("layers.0", "noise_refiner.1", "context_refiner.0"):
        yield from ((f"{layer}.attention.{end}", rows) for end, rows in (("qkv", 2304 + 2 * 768), ("out", 2304)))
        yield from ((f"{layer}.feed_forward.{end}", rows) for end, rows in (("w1", 9216), ("w2", 2304), ("w3", 9216)))
        yield from () if layer.startswith("context") else ((f"{layer}.adaLN_modulation.1", 9216),)
    yield from (("t_embedder.mlp.0", H), ("t_embedder.mlp.2", H), ("cap_embedder.1", H), ("x_embedder", H))
    yield from (("final_layer.linear", 8), ("final_layer.adaLN_modulation.1", H))


@dataclass(frozen=True)
class Family:
    """diffusers' model of a family in its own size, with few layers.

    Attributes:
        model: The class.
        numbers: Its arguments.
        convert: The function in `diffusers.loaders` that renames the makers' modules one by one, if there is one.
        prefix: That of the names that it is given.
        only: The beginning of the names that it knows.
        required: Tensors that it asks for, and that no adapter has.
    """

    model: str
    numbers: dict[str, Any]
    convert: str = ""
    prefix: str = ""
    only: str = ""
    required: tuple[str, ...] = ()

    def required_zeros(self) -> dict[str, Any]:
        """`required`, as zeros."""
        import torch

        return {name: torch.zeros(1) for name in self.required}


CHECKPOINT, LORA = "single_file_utils.convert_", "lora_conversion_utils._convert_non_diffusers_"
# One row for each family of transformers, by the name of its table.
FAMILIES: dict[str, Family] = {
    "FLUX.1": Family("FluxTransformer2DModel", {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}),
    "FLUX.2": Family("Flux2Transformer2DModel", {"num_layers": 1, "num_single_layers": 1}),
    "Stable Diffusion 3": Family("SD3Transformer2DModel", {"num_layers": 2, "dual_attention_layers": (0,)}),
    "diffusers' transformers": Family("QwenImageTransformer2DModel", {"num_layers": 1}),
    "HunyuanVideo": Family(
        "HunyuanVideoTransformer3DModel", {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
    ),
    "HunyuanVideo 1.5": Family(
        "HunyuanVideo15Transformer3DModel", {"num_layers": 1, "num_refiner_layers": 1, "use_meanflow": True},
    ),
    "HunyuanImage": Family(
        "HunyuanImageTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_2_dim": 8, "guidance_embeds": True},
    ),
    "Wan": Family("WanTransformer3DModel", {"num_layers": 1, "image_dim": 8, "added_kv_proj_dim": 8}),
    "LTX-Video": Family("LTX2VideoTransformer3DModel", {"num_layers": 1}),
    "Z-Image": Family("ZImageTransformer2DModel", {"n_layers": 1, "n_refiner_layers": 1}),
    "Lumina 2": Family("Lumina2Transformer2DModel", {"num_layers": 1, "num_refiner_layers": 1}),
    "Krea 2": Family(
        "Krea2Transformer2DModel", {"num_layers": 1, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
        CHECKPOINT + "krea2_transformer_checkpoint_to_diffusers",
    ),
    "Ideogram 4": Family(
        "Ideogram4Transformer2DModel", {"num_layers": 1}, LORA + "ideogram4_lora_to_diffusers", "diffusion_model.", "layers.",
    ),
    "FLUX.3": Family(
        "Flux3Transformer2DModel", {"num_layers": 1, "num_single_layers": 1, "flow_map": True},
        CHECKPOINT + "flux3_transformer_checkpoint_to_diffusers",
    ),
    "AuraFlow": Family(
        "AuraFlowTransformer2DModel", {"num_mmdit_layers": 1, "num_single_dit_layers": 1},
        CHECKPOINT + "auraflow_transformer_checkpoint_to_diffusers", required=("positional_encoding", "init_x_linear.bias"),
    ),
    "HiDream": Family(
        "HiDreamImageTransformer2DModel",
        {"patch_size": 2, "num_layers": 1, "num_single_layers": 1, "caption_channels": [8, 8], "llama_layers": [0]},
        CHECKPOINT + "hidream_transformer_to_diffusers",
    ),
    "ERNIE-Image": Family(
        "ErnieImageTransformer2DModel", {"num_layers": 1}, CHECKPOINT + "ernie_image_transformer_checkpoint_to_diffusers",
    ),
    "Cosmos and Anima": Family(
        "CosmosTransformer3DModel", {"num_layers": 1}, CHECKPOINT + "cosmos_transformer_checkpoint_to_diffusers", "net.",
    ),
    "Kandinsky 5": Family("Kandinsky5Transformer3DModel", {"num_text_blocks": 1, "num_visual_blocks": 1}),
    "MiniMax-H3": Family(
        "MiniMaxH3Transformer3DModel", {"num_layers": 1, "num_refiner_layers": 1}, LORA + "minimax_h3_lora_to_diffusers",
    ),
    "ACE-Step": Family("AceStepTransformer1DModel", {"num_hidden_layers": 1}, LORA + "ace_step_lora_to_diffusers"),
}  # fmt: skip


@functools.cache
def linears(family: str) -> dict[str, tuple[int, int]]:
    """The linear modules of diffusers' own model, in its own size, and their shapes."""
    import diffusers
    import torch

    row = FAMILIES[family]
    with torch.device("meta"):
        model = getattr(diffusers, row.model)(**row.numbers)
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def table_of(family: str) -> name_table.Table:
    return next(table for table in family_tables.TRANSFORMERS if table.name == family)
