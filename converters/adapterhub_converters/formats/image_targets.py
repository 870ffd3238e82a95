"""Whether an adapter's targets are modules of image models, answered for language models without the tables of image models."""

from __future__ import annotations

from collections.abc import Collection

from adapterhub_converters import safe_regex
from adapterhub_converters.bases.canonical_names import PIPELINE_PARTS

from . import FORMATS, pipeline

FIRST = frozenset({
    "adaLN_modulation", "adaln_proj", "add_embedding", "all_final_layer", "all_x_embedder",
    "audio_caption_projection", "audio_proj_in", "audio_proj_out", "audio_prompt_adaln", "audio_time_embed",
    "av_cross_attn_audio_scale_shift", "av_cross_attn_audio_v2a_gate", "av_cross_attn_video_a2v_gate",
    "av_cross_attn_video_scale_shift", "blocks", "cap_embedder", "caption_projection", "condition_embedder",
    "context_embedder", "context_embedder_2", "context_refiner", "conv_in", "conv_norm_out", "conv_out",
    "distilled_guidance_layer", "double_stream_blocks", "double_stream_modulation_img",
    "double_stream_modulation_txt", "down_blocks", "early_stream_modulations", "final_layer", "final_linear",
    "final_norm", "image_embedder", "img_in", "input_proj", "joint_transformer_blocks", "layers", "llm_cond_proj",
    "mid_block", "mode_blocks", "noise_refiner", "norm_out", "out_layer", "p_embedder", "patch_embed",
    "patch_embedding", "pooled_text_embeddings", "pos_embed", "proj_in", "proj_out", "prompt_adaln",
    "scale_shift_table", "single_stream_blocks", "single_stream_modulation", "single_stream_modulations",
    "single_transformer_blocks", "t_embedder", "t_embedding", "target_timestep_embedder", "text_embeddings",
    "text_fusion", "text_proj", "text_transformer_blocks", "time_caption_embed", "time_embed", "time_embed_r",
    "time_embedder", "time_embedding", "time_embeddings", "time_guidance_embed", "time_mod_proj", "time_step_proj",
    "time_text_embed", "timestep_embedder", "token_refiner", "transformer_blocks", "txt_in", "txt_mode_blocks",
    "up_blocks", "vace_blocks", "vace_patch_embedding", "visual_embeddings", "visual_transformer_blocks",
    "x_embedder", "x_embedders",
})  # fmt: skip
"""The first components of all module paths in the tables."""
# MLPs of Z-Image and ERNIE-Image, whose names occur in language models too; and attention as only language models name it.
LANGUAGE_TOO = safe_regex.Pattern(r"layers\.[0-9]+\.(?:(?:feed_forward|mlp)\.|self_attn\.[qkvo]_proj$)")


def are_image_targets(targets: Collection[str]) -> bool:
    """Return whether these are modules of image models rather than of a language model."""
    if FIRST.union(PIPELINE_PARTS).isdisjoint({target.partition(".")[0] for target in targets}):
        return False
    plain = (target.removeprefix(f"{pipeline.part_of(target)}.") for target in targets)
    likely = [t for t in plain if "." in t and t.partition(".")[0] in FIRST and not LANGUAGE_TOO.match(t)]
    return bool(likely) and any(map(FORMATS["kohya"].implementation.is_image_module, likely))
