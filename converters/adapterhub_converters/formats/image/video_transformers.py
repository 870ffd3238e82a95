"""The tables of the transformers of video models; `image_transformers` says where their names come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction

from .name_table import (
    DIFFUSION_MODEL,
    DOUBLE,
    QKV,
    Reading,
    Table,
    embedders,
    hunyuan_blocks,
    hunyuan_glyphs,
    hunyuan_rest,
    hunyuan_single_blocks,
    paths,
    renames,
    same_names,
    single,
)


def _hunyuan() -> Iterator[tuple[str, Reading]]:
    yield from hunyuan_blocks(fused=True)
    yield from hunyuan_single_blocks()
    yield from hunyuan_rest("time_text_embed")
    yield from renames(embedders("", "time_text_embed", {"guidance_in": "guidance"}, "mlp.0 mlp.2")).items()
    yield from renames(embedders("", "time_text_embed", {"vector_in": "text"})).items()


def _hunyuan_15() -> Iterator[tuple[str, Reading]]:
    yield from hunyuan_blocks(fused=False)
    yield from hunyuan_rest("time_embed")
    yield from hunyuan_glyphs()
    yield from ((f"vision_in.proj.{2 * n - 1}", single(f"image_embedder.linear_{n}")) for n in (1, 2))
    yield from ((f"time_r_in.mlp.{2 * n}", single(f"time_embed.timestep_embedder_r.linear_{n + 1}")) for n in (0, 1))


def _wan() -> Iterator[tuple[str, Reading]]:
    """Yield modules of Wan and VACE, with the norms and parameters that files of distilled models have."""
    inside = {"ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "norm3": "norm2"}
    inside |= {f"cross_attn.{a}_img": f"attn2.add_{a}_proj" for a in "kv"} | {"cross_attn.norm_k_img": "attn2.norm_added_k"}
    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        ends = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
        inside |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in ends.items()}
    for block in ("blocks.N", "vace_blocks.N"):
        yield from ((f"{block}.{theirs}", single(f"{block}.{ours}")) for theirs, ours in inside.items())
        yield f"{block}.modulation", Reading((f"{block}.scale_shift_table",), parameter=True)
    yield "head.modulation", Reading(("scale_shift_table",), parameter=True)
    outside = {
        "time_projection.1": "condition_embedder.time_proj",
        "head.head": "proj_out",
        "patch_embedding": "patch_embedding",
    }
    outside |= {f"vace_blocks.N.{a}_proj": f"vace_blocks.N.proj_{b}" for a, b in (("before", "in"), ("after", "out"))}
    outside |= {"vace_patch_embedding": "vace_patch_embedding"}
    for kind in ("text", "time"):
        outside |= {f"{kind}_embedding.{2 * n}": f"condition_embedder.{kind}_embedder.linear_{n + 1}" for n in range(2)}
    parts = {0: "norm1", 1: "ff.net.0.proj", 3: "ff.net.2", 4: "norm2"}
    outside |= {f"img_emb.proj.{n}": f"condition_embedder.image_embedder.{end}" for n, end in parts.items()}
    yield from renames(outside.items()).items()


def _ltx() -> Iterator[tuple[str, str]]:
    """Yield modules of LTX-Video and LTX-2."""
    for name in ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"):
        yield from ((path, path) for path in paths(f"{DOUBLE}.{name}", f"{QKV} to_out.0"))
    for name in ("ff", "audio_ff"):
        yield from ((path, path) for path in paths(f"{DOUBLE}.{name}", "net.0.proj net.2"))
    modulations = {
        "adaln_single": "time_embed", "audio_adaln_single": "audio_time_embed",
        "prompt_adaln_single": "prompt_adaln", "audio_prompt_adaln_single": "audio_prompt_adaln",
        "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
        "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
        "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
        "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
    }  # fmt: skip
    ends = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
    yield from ((f"{theirs}.{end}", f"{ours}.{end}") for theirs, ours in modulations.items() for end in ends)
    yield from (("patchify_proj", "proj_in"), ("audio_patchify_proj", "audio_proj_in"))
    captions = (
        path for name in ("caption_projection", "audio_caption_projection") for path in paths(name, "linear_1 linear_2")
    )
    yield from ((path, path) for path in (*captions, "proj_out", "audio_proj_out"))


def _kandinsky() -> Iterator[str]:
    attention = "to_query to_key to_value out_layer"
    for kind in ("text", "visual"):
        block = f"{kind}_transformer_blocks.N"
        yield from paths(f"{block}.self_attention", attention)
        yield from paths(f"{block}.feed_forward", "in_layer out_layer")
        yield f"{block}.{kind}_modulation.out_layer"
    yield from paths("visual_transformer_blocks.N.cross_attention", attention)
    yield from ("time_embeddings.in_layer", "time_embeddings.out_layer", "text_embeddings.in_layer")
    yield from ("pooled_text_embeddings.in_layer", "visual_embeddings.in_layer", "out_layer.modulation.out_layer")
    yield "out_layer.out_layer"


def _minimax() -> Iterator[tuple[str, Reading]]:
    for theirs, ours in (("blocks.N", DOUBLE), ("token_refiner.blocks.N", "token_refiner.refiner_blocks.N")):
        yield f"{theirs}.attn.qkv_proj", Reading(tuple(paths(f"{ours}.attn", QKV)), ratio=Fraction(4), shares=(1, 1, 1))
        yield f"{theirs}.attn.out_proj", single(f"{ours}.attn.to_out.0")
        yield f"{theirs}.mlp.fc1", Reading((f"{ours}.ff.net.0.proj",), swapped=True)  # the gate comes second in diffusers
        yield f"{theirs}.mlp.fc2", single(f"{ours}.ff.net.2")
    yield "blocks.N.adaln_proj.linear", single(f"{DOUBLE}.adaln_proj.linear")
    yield from renames([
        ("video_patch_proj", "proj_in"), ("audio_patch_proj", "audio_proj_in"), ("condition_proj", "context_embedder"),
        ("time_embedder.proj_in", "time_embedder.linear_1"), ("time_embedder.proj_out", "time_embedder.linear_2"),
        ("final_layer.adaln_proj.linear", "norm_out.linear"), ("final_layer.video_out", "proj_out"),
        ("final_layer.audio_out", "audio_proj_out"),
    ]).items()  # fmt: skip


def _ace_step() -> Iterator[tuple[str, str]]:
    """Yield modules of ACE-Step 1.5, which makes music; its makers' names for attention are those of language models."""
    ends = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"}
    for name in ("self_attn", "cross_attn"):
        yield from ((f"layers.N.{name}.{theirs}", f"layers.N.{name}.{ours}") for theirs, ours in ends.items())
    same = [*paths("layers.N.mlp", "gate_proj up_proj down_proj"), "condition_embedder"]
    same += [path for name in ("time_embed", "time_embed_r") for path in paths(name, "linear_1 linear_2 time_proj")]
    yield from ((path, path) for path in same)


WAN = Table("Wan", "transformer", dict(_wan()), headers="wan", classes="Wan|SkyReels|Helios")
HUNYUAN = Table(
    "HunyuanVideo", "transformer", dict(_hunyuan()), prefix=DIFFUSION_MODEL, headers="hunyuan[-_]video($|[^-_]|[-_][^1])",
    classes=r"HunyuanVideo($|[^1F])",
)  # fmt: skip
HUNYUAN_MUSUBI = dataclasses.replace(
    HUNYUAN, name="HunyuanVideo by musubi-tuner", prefix="lora_unet_", classes="", variant=True
)
HUNYUAN_15 = Table(
    "HunyuanVideo 1.5", "transformer", dict(_hunyuan_15()), headers=r"hunyuan[-_]video[-_]1[-._]5", classes="HunyuanVideo15",
    variant=True,
)  # fmt: skip
LTX = Table("LTX-Video", "transformer", renames(_ltx()), prefix=DIFFUSION_MODEL, headers="ltx", classes="LTX", shared=True)
KANDINSKY = Table(
    "Kandinsky 5", "transformer", same_names(*_kandinsky()), headers="kandinsky[-_]?5", classes="Kandinsky5", variant=True,
)  # fmt: skip
MINIMAX = Table(
    "MiniMax-H3", "transformer", dict(_minimax()), prefix=DIFFUSION_MODEL, headers="minimax[-_]h3", classes="MiniMaxH3",
    variant=True,
)  # fmt: skip
MINIMAX_MUSUBI = dataclasses.replace(MINIMAX, name="MiniMax-H3 by musubi-tuner", prefix="lora_unet_", classes="")
ACE_STEP = Table(
    "ACE-Step", "transformer", renames(_ace_step()), prefix=DIFFUSION_MODEL, headers="ace[-_]?step", classes="AceStep",
    variant=True, prefixed=True,
)  # fmt: skip

TABLES = (WAN, HUNYUAN, HUNYUAN_MUSUBI, HUNYUAN_15, LTX, KANDINSKY, MINIMAX, MINIMAX_MUSUBI, ACE_STEP)
"""In the order in which they are compared."""
