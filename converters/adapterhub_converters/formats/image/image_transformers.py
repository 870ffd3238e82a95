"""The tables of the transformers of image models.

Names are those of sd-scripts (`networks/lora_*.py`), musubi-tuner (`networks/`, with the names of the models' own
repositories), ComfyUI (`comfy/lora.py`, `comfy/utils.py`) and XLabs. The names in diffusers, which are the canonical ones,
follow its converters for whole checkpoints (0.42, `loaders/single_file_utils.py`, `loaders/lora_conversion_utils.py`,
`scripts/`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction

from .name_table import (
    ADDED,
    DIFFUSION_MODEL,
    DOUBLE,
    QKV,
    SINGLE,
    Reading,
    Table,
    attention_and_mlp,
    embedders,
    hunyuan_blocks,
    hunyuan_glyphs,
    hunyuan_rest,
    hunyuan_single_blocks,
    last_modulation,
    paths,
    renames,
    same_names,
    single,
    single_block,
    thirds,
)


def _flux() -> Iterator[tuple[str, Reading]]:
    yield "double_blocks.N.img_attn.qkv", thirds(f"{DOUBLE}.attn", QKV)
    yield "double_blocks.N.txt_attn.qkv", thirds(f"{DOUBLE}.attn", ADDED)
    yield "single_blocks.N.linear1", single_block(SINGLE)
    inside: dict[str, tuple[str, int | Fraction]] = {
        "img_attn.proj": ("attn.to_out.0", 1), "txt_attn.proj": ("attn.to_add_out", 1),
        "img_mlp.0": ("ff.net.0.proj", 4), "img_mlp.2": ("ff.net.2", Fraction(1, 4)),
        "txt_mlp.0": ("ff_context.net.0.proj", 4), "txt_mlp.2": ("ff_context.net.2", Fraction(1, 4)),
        "img_mod.lin": ("norm1.linear", 6), "txt_mod.lin": ("norm1_context.linear", 6),
    }  # fmt: skip
    yield from ((f"double_blocks.N.{theirs}", single(f"{DOUBLE}.{ours}", ratio)) for theirs, (ours, ratio) in inside.items())
    yield "single_blocks.N.linear2", single(f"{SINGLE}.proj_out", Fraction(1, 5))
    yield "single_blocks.N.modulation.lin", single(f"{SINGLE}.norm.linear", 3)
    for kind, (query, key) in {"img": ("norm_q", "norm_k"), "txt": ("norm_added_q", "norm_added_k")}.items():
        yield f"double_blocks.N.{kind}_attn.norm.query_norm", single(f"{DOUBLE}.attn.{query}")
        yield f"double_blocks.N.{kind}_attn.norm.key_norm", single(f"{DOUBLE}.attn.{key}")
    for end in ("query", "key"):
        yield f"single_blocks.N.norm.{end}_norm", single(f"{SINGLE}.attn.norm_{end[0]}")
    kinds = {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}
    yield from renames(embedders("", "time_text_embed", kinds)).items()
    yield from renames([("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out")]).items()
    yield "final_layer.adaLN_modulation.1", last_modulation()
    guidance = "distilled_guidance_layer"  # Chroma's
    ends = {"in_proj": "in_proj", "out_proj": "out_proj", "layers.N.in_layer": "layers.N.linear_1"}
    ends |= {"layers.N.out_layer": "layers.N.linear_2"}
    yield from ((f"{guidance}.{theirs}", single(f"{guidance}.{ours}")) for theirs, ours in ends.items())


def _xlabs() -> Iterator[tuple[str, Reading]]:
    yield "double_blocks.N.processor.qkv_lora1", thirds(f"{DOUBLE}.attn", QKV)
    yield "double_blocks.N.processor.qkv_lora2", thirds(f"{DOUBLE}.attn", ADDED)
    yield "double_blocks.N.processor.proj_lora1", single(f"{DOUBLE}.attn.to_out.0")
    yield "double_blocks.N.processor.proj_lora2", single(f"{DOUBLE}.attn.to_add_out")
    yield "single_blocks.N.processor.qkv_lora", thirds(f"{SINGLE}.attn", QKV)
    yield "single_blocks.N.processor.proj_lora", single(f"{SINGLE}.proj_out")


def _flux2() -> Iterator[tuple[str, Reading]]:
    yield "double_blocks.N.img_attn.qkv", thirds(f"{DOUBLE}.attn", QKV)
    yield "double_blocks.N.txt_attn.qkv", thirds(f"{DOUBLE}.attn", ADDED)
    inside: dict[str, tuple[str, int | Fraction]] = {
        "img_attn.proj": ("attn.to_out.0", 1), "txt_attn.proj": ("attn.to_add_out", 1),
        "img_mlp.0": ("ff.linear_in", 6), "img_mlp.2": ("ff.linear_out", Fraction(1, 3)),
        "txt_mlp.0": ("ff_context.linear_in", 6), "txt_mlp.2": ("ff_context.linear_out", Fraction(1, 3)),
    }  # fmt: skip
    yield from ((f"double_blocks.N.{theirs}", single(f"{DOUBLE}.{ours}", ratio)) for theirs, (ours, ratio) in inside.items())
    yield "single_blocks.N.linear1", single(f"{SINGLE}.attn.to_qkv_mlp_proj", 9)
    yield "single_blocks.N.linear2", single(f"{SINGLE}.attn.to_out", Fraction(1, 4))
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        yield f"{name}.lin", single(f"{name}.linear")
    kinds = {"time_in": "timestep", "guidance_in": "guidance"}
    yield from renames(embedders("", "time_guidance_embed", kinds)).items()
    yield from renames([("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out")]).items()
    yield "final_layer.adaLN_modulation.1", last_modulation()


def _sd3() -> Iterator[tuple[str, Reading]]:
    for block in ("x_block", "context_block"):
        stem = f"joint_blocks.N.{block}"
        yield from attention_and_mlp(f"{stem}.attn.", f"{stem}.mlp", text=block == "context_block")
    yield "joint_blocks.N.x_block.attn2.qkv", thirds(f"{DOUBLE}.attn2", QKV)
    yield "joint_blocks.N.x_block.attn2.proj", single(f"{DOUBLE}.attn2.to_out.0")
    yield "joint_blocks.N.x_block.adaLN_modulation.1", single(f"{DOUBLE}.norm1.linear")
    # The last block's has only a shift and a scale, which diffusers has in the other order.
    context = Reading((f"{DOUBLE}.norm1_context.linear",), swapped=True, halves=Fraction(2))
    yield "joint_blocks.N.context_block.adaLN_modulation.1", context
    kinds = {"t_embedder": "timestep", "y_embedder": "text"}
    yield from renames(embedders("", "time_text_embed", kinds, "mlp.0 mlp.2")).items()
    yield from renames([("context_embedder", "context_embedder"), ("x_embedder.proj", "pos_embed.proj")]).items()
    yield "final_layer.linear", single("proj_out")
    yield "final_layer.adaLN_modulation.1", last_modulation()


def _transformer() -> Iterator[str]:
    """Yield modules of FLUX.1, Stable Diffusion 3, HunyuanVideo and Qwen-Image under diffusers' names."""
    attention = f"{QKV} to_out.0 {ADDED} to_add_out"
    yield from (path for name in ("attn", "attn2") for path in paths(f"{DOUBLE}.{name}", attention))
    feeds = ("ff", "ff_context", "img_mlp", "txt_mlp")
    yield from (path for name in feeds for path in paths(f"{DOUBLE}.{name}", "net.0.proj net.2"))
    yield from paths(DOUBLE, "norm1.linear norm1_context.linear img_mod.1 txt_mod.1")
    yield from paths(f"{SINGLE}.attn", QKV)
    yield from paths(SINGLE, "proj_mlp proj_out norm.linear")
    for embedder in ("timestep", "guidance", "text"):
        yield from paths(f"time_text_embed.{embedder}_embedder", "linear_1 linear_2")
    yield from ("x_embedder", "context_embedder", "img_in", "txt_in", "norm_out.linear", "proj_out")


_LAYERS = ("layers.N", "noise_refiner.N", "context_refiner.N")
_WIDTHS = {1: Fraction(8, 3), 2: Fraction(3, 8), 3: Fraction(8, 3)}


def _z_feeds(layer: str) -> Iterator[tuple[str, Reading]]:
    for n, ratio in _WIDTHS.items():
        yield f"{layer}.feed_forward.w{n}", single(f"{layer}.feed_forward.w{n}", ratio)
    if not layer.startswith("context"):
        yield from same_names(f"{layer}.adaLN_modulation.0").items()


def _z_image() -> Iterator[tuple[str, Reading]]:
    for layer in _LAYERS:
        yield from same_names(*paths(f"{layer}.attention", f"{QKV} to_out.0")).items()
        yield from _z_feeds(layer)
    yield from same_names("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1", "all_x_embedder.2-1").items()
    yield from same_names(*paths("all_final_layer.2-1", "linear adaLN_modulation.1")).items()


def _z_image_native() -> Iterator[tuple[str, Reading]]:
    for layer in _LAYERS:
        yield f"{layer}.attention.qkv", thirds(f"{layer}.attention", QKV)
        yield f"{layer}.attention.out", single(f"{layer}.attention.to_out.0", 1)
        yield from _z_feeds(layer)
    yield from same_names("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1").items()
    final = [(f"final_layer.{end}", f"all_final_layer.2-1.{end}") for end in ("linear", "adaLN_modulation.1")]
    yield from renames([("x_embedder", "all_x_embedder.2-1"), *final]).items()


def _lumina() -> Iterator[tuple[str, Reading]]:
    for layer in _LAYERS:
        rows = Reading(tuple(paths(f"{layer}.attn", QKV)), ratio=Fraction(5, 3), shares=(3, 1, 1))
        yield f"{layer}.attention.qkv", rows
        yield f"{layer}.attention.out", single(f"{layer}.attn.to_out.0", 1)
        for n, ratio in ((1, Fraction(4)), (2, Fraction(1, 4)), (3, Fraction(4))):
            yield f"{layer}.feed_forward.w{n}", single(f"{layer}.feed_forward.linear_{n}", ratio)
        if not layer.startswith("context"):
            yield f"{layer}.adaLN_modulation.1", single(f"{layer}.norm1.linear")
    stem = "time_caption_embed"
    yield from renames([
        ("t_embedder.mlp.0", f"{stem}.timestep_embedder.linear_1"), ("t_embedder.mlp.2", f"{stem}.timestep_embedder.linear_2"),
        ("cap_embedder.1", f"{stem}.caption_embedder.1"), ("x_embedder", "x_embedder"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear_1"), ("final_layer.linear", "norm_out.linear_2"),
    ]).items()  # fmt: skip


def _hunyuan_image() -> Iterator[tuple[str, Reading]]:
    yield from hunyuan_blocks(fused=True)
    yield from hunyuan_single_blocks()
    yield from hunyuan_rest("time_guidance_embed")
    yield from hunyuan_glyphs()
    yield from renames(embedders("", "time_guidance_embed", {"guidance_in": "guidance"}, "mlp.0 mlp.2")).items()


def _krea2() -> Iterator[tuple[str, str]]:
    ends = {"attn.wq": "attn.to_q", "attn.wk": "attn.to_k", "attn.wv": "attn.to_v", "attn.wo": "attn.to_out.0"}
    ends |= {"attn.gate": "attn.to_gate"} | {f"mlp.{name}": f"ff.{name}" for name in ("gate", "up", "down")}
    blocks = {"blocks.N": DOUBLE}
    blocks |= {f"txtfusion.{kind}_blocks.N": f"text_fusion.{kind}_blocks.N" for kind in ("layerwise", "refiner")}
    yield from ((f"{theirs}.{a}", f"{ours}.{b}") for theirs, ours in blocks.items() for a, b in ends.items())
    yield from (
        ("first", "img_in"), ("last.linear", "final_layer.linear"), ("tmlp.0", "time_embed.linear_1"),
        ("tmlp.2", "time_embed.linear_2"), ("tproj.1", "time_mod_proj"), ("txtmlp.1", "txt_in.linear_1"),
        ("txtmlp.3", "txt_in.linear_2"), ("txtfusion.projector", "text_fusion.projector"),
    )  # fmt: skip


def _ideogram4() -> Iterator[tuple[str, Reading]]:
    yield "layers.N.attention.qkv", thirds("layers.N.attention", QKV)
    yield "layers.N.attention.o", single("layers.N.attention.to_out.0", 1)
    yield from ((f"layers.N.feed_forward.w{n}", single(f"layers.N.feed_forward.w{n}", ratio)) for n, ratio in _WIDTHS.items())
    yield from same_names(
        "layers.N.adaln_modulation", "input_proj", "llm_cond_proj", "t_embedding.mlp_in", "t_embedding.mlp_out", "adaln_proj"
    ).items()
    yield from same_names(*paths("final_layer", "linear adaln_modulation")).items()


def _flux3() -> Iterator[tuple[str, Reading]]:
    ends = {"q_proj": "attn.to_q", "k_proj": "attn.to_k", "v_proj": "attn.to_v", "attn_out": "attn.to_out.0"}
    ends |= {"mlp_in": "ff.linear_in", "mlp_out": "ff.linear_out"}
    kinds = ("image", "image_cond")
    blocks = {f"content_mode_blocks.{kind}.N": f"mode_blocks.{kind}.N" for kind in kinds}
    blocks |= {"txt_mode_blocks.N": "txt_mode_blocks.N", "single_blocks.N": SINGLE}
    yield from ((f"{theirs}.{a}", single(f"{ours}.{b}")) for theirs, ours in blocks.items() for a, b in ends.items())
    for stream_name in ("early_stream", "single_stream"):
        for kind in (*kinds, "txt"):
            yield f"{stream_name}_modulations.{kind}.lin", single(f"{stream_name}_modulations.{kind}.linear")
    yield from ((f"emb_in.{kind}", single(f"x_embedders.{kind}")) for kind in kinds)
    times = {"time_in": "timestep", "ref_time_in": "target_timestep"}
    for theirs, ours in times.items():
        yield from ((f"{theirs}.{end}_layer", single(f"{ours}_embedder.linear_{n}")) for n, end in ((1, "in"), (2, "out")))
    yield from renames([("txt_in", "context_embedder"), ("final_layer.image.linear", "proj_out")]).items()
    yield "final_layer.image.adaLN_modulation.1", last_modulation()


def _auraflow() -> Iterator[tuple[str, Reading]]:
    feed = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
    inner = {"w2q": "to_q", "w2k": "to_k", "w2v": "to_v", "w2o": "to_out.0"}
    inner |= {"w1q": "add_q_proj", "w1k": "add_k_proj", "w1v": "add_v_proj", "w1o": "to_add_out"}
    double, ours = "double_layers.N", "joint_transformer_blocks.N"
    yield from ((f"{double}.attn.{a}", single(f"{ours}.attn.{b}")) for a, b in inner.items())
    for name, mlp, norm in (("X", "ff", "norm1"), ("C", "ff_context", "norm1_context")):
        yield from ((f"{double}.mlp{name}.{a}", single(f"{ours}.{mlp}.{b}")) for a, b in feed.items())
        yield f"{double}.mod{name}.1", single(f"{ours}.{norm}.linear")
    single_names = {"w1q": "to_q", "w1k": "to_k", "w1v": "to_v", "w1o": "to_out.0"}
    yield from ((f"single_layers.N.attn.{a}", single(f"{SINGLE}.attn.{b}")) for a, b in single_names.items())
    yield from ((f"single_layers.N.mlp.{a}", single(f"{SINGLE}.ff.{b}")) for a, b in feed.items())
    yield "single_layers.N.modCX.1", single(f"{SINGLE}.norm1.linear")
    times = (("t_embedder.mlp.0", "time_step_proj.linear_1"), ("t_embedder.mlp.2", "time_step_proj.linear_2"))
    outside = (("cond_seq_linear", "context_embedder"), ("init_x_linear", "pos_embed.proj"), ("final_linear", "proj_out"))
    yield from renames((*times, *outside)).items()
    yield "modF.1", last_modulation()


def _hidream() -> Iterator[str]:
    for block in ("double_stream_blocks.N.block", "single_stream_blocks.N.block"):
        yield f"{block}.adaLN_modulation.1"
        yield from paths(f"{block}.attn1", "to_q to_k to_v to_out to_q_t to_k_t to_v_t to_out_t")
        feeds = ("ff_i.shared_experts", "ff_i.experts.N", "ff_t")
        yield from (path for mlp in feeds for path in paths(f"{block}.{mlp}", "w1 w2 w3"))
    yield from paths("t_embedder.timestep_embedder", "linear_1 linear_2")
    yield from paths("p_embedder.pooled_embedder", "linear_1 linear_2")
    yield from ("x_embedder.proj", "final_layer.linear", "final_layer.adaLN_modulation.1", "caption_projection.N.linear")


def _ernie() -> Iterator[str]:
    yield from paths("layers.N.self_attention", f"{QKV} to_out.0")
    yield from paths("layers.N.mlp", "gate_proj up_proj linear_fc2")
    yield from paths("time_embedding", "linear_1 linear_2")
    yield from ("x_embedder.proj", "text_proj", "adaLN_modulation.1", "final_norm.linear", "final_linear")


def _cosmos() -> Iterator[tuple[str, str]]:
    """Yield modules of Cosmos 2 and Anima."""
    ends = {f"adaln_modulation_{a}.{n}": f"norm{k}.linear_{n}" for k, a in enumerate(("self_attn", "cross_attn", "mlp"), 1)
            for n in (1, 2)}  # fmt: skip
    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        ends |= {f"{theirs}.{name}_proj": f"{ours}.to_{name}" for name in "qkv"} | {f"{theirs}.output_proj": f"{ours}.to_out.0"}
    ends |= {"mlp.layer1": "ff.net.0.proj", "mlp.layer2": "ff.net.2"}
    yield from ((f"blocks.N.{theirs}", f"{DOUBLE}.{ours}") for theirs, ours in ends.items())
    yield from ((f"t_embedder.1.linear_{n}", f"time_embed.t_embedder.linear_{n}") for n in (1, 2))
    yield from ((f"final_layer.adaln_modulation.{n}", f"norm_out.linear_{n}") for n in (1, 2))
    yield from (("final_layer.linear", "proj_out"), ("x_embedder.proj.1", "patch_embed.proj"))


_FLUX_HEADERS = r"flux[._-]?1|flux_kontext|chroma"
FLUX = Table("FLUX.1", "transformer", dict(_flux()), headers=_FLUX_HEADERS, classes=r"Flux($|[^23])|Chroma")
XLABS = Table("FLUX.1 by XLabs", "transformer", dict(_xlabs()), headers=_FLUX_HEADERS, writes=False)
FLUX2 = Table("FLUX.2", "transformer", dict(_flux2()), headers=r"flux[._-]?2", classes="Flux2")
FLUX2_OWN = Table(
    "FLUX.2 by SimpleTuner", "transformer", same_names(*(target for r in FLUX2.modules.values() for target in r.targets)),
    prefix="lycoris_", headers=FLUX2.headers, variant=True,
)  # fmt: skip
SD3 = Table(
    "Stable Diffusion 3",
    "transformer",
    dict(_sd3()),
    headers="sd3|stable-diffusion-3",
    classes="StableDiffusion3|SD3Transformer",
)
TRANSFORMER = Table(
    "diffusers' transformers", "transformer", same_names(*_transformer()),
    headers=f"qwen|framepack|sd3|stable-diffusion-3|{_FLUX_HEADERS}", classes="QwenImage|HunyuanVideoFramepack", shared=True,
)  # fmt: skip
Z_IMAGE = Table("Z-Image", "transformer", dict(_z_image()), prefix=DIFFUSION_MODEL, headers="z[-_]image", classes="ZImage")
Z_IMAGE_MUSUBI = dataclasses.replace(Z_IMAGE, name="Z-Image by musubi-tuner", prefix="lora_unet_", classes="", variant=True)
Z_IMAGE_NATIVE = Table("Z-Image by ComfyUI", "transformer", dict(_z_image_native()), headers="z[-_]image", variant=True)
LUMINA = Table("Lumina 2", "transformer", dict(_lumina()), headers="lumina", classes="Lumina2")
HUNYUAN_IMAGE = Table(
    "HunyuanImage", "transformer", dict(_hunyuan_image()), headers="hunyuan[-_]image", classes="HunyuanImage", variant=True,
)  # fmt: skip
KREA2 = Table(
    "Krea 2", "transformer", renames(_krea2()), prefix=DIFFUSION_MODEL, headers="krea[-_]?2", classes="Krea2", variant=True,
)  # fmt: skip
KREA2_MUSUBI = dataclasses.replace(KREA2, name="Krea 2 by musubi-tuner", prefix="lora_unet_", classes="")
IDEOGRAM = Table(
    "Ideogram 4", "transformer", dict(_ideogram4()), prefix=DIFFUSION_MODEL, headers="ideogram", classes="Ideogram4",
    variant=True,
)  # fmt: skip
IDEOGRAM_MUSUBI = dataclasses.replace(IDEOGRAM, name="Ideogram 4 by musubi-tuner", prefix="lora_unet_", classes="")
FLUX3 = Table(
    "FLUX.3", "transformer", dict(_flux3()), prefix=DIFFUSION_MODEL, headers="flux[._-]?3", classes="Flux3", variant=True,
)  # fmt: skip
AURAFLOW = Table(
    "AuraFlow", "transformer", dict(_auraflow()), prefix=DIFFUSION_MODEL, headers="aura[-_]?flow", classes="AuraFlow",
    variant=True,
)  # fmt: skip
HIDREAM = Table(
    "HiDream", "transformer", same_names(*_hidream()), prefix=DIFFUSION_MODEL, headers="hidream[-_]i1", classes="HiDreamImage",
    variant=True,
)  # fmt: skip
ERNIE = Table(
    "ERNIE-Image", "transformer", same_names(*_ernie()), prefix=DIFFUSION_MODEL, headers="ernie", classes="ErnieImage",
    variant=True,
)  # fmt: skip
COSMOS = Table(
    "Cosmos and Anima", "transformer", renames(_cosmos()), prefix=DIFFUSION_MODEL, headers="anima|cosmos",
    classes="Cosmos|Anima", variant=True,
)  # fmt: skip
COSMOS_KOHYA = dataclasses.replace(COSMOS, name="Anima by sd-scripts", prefix="lora_unet_", classes="")

TABLES = (
    FLUX, XLABS, FLUX2, FLUX2_OWN, SD3, TRANSFORMER, Z_IMAGE, Z_IMAGE_MUSUBI, Z_IMAGE_NATIVE, LUMINA, HUNYUAN_IMAGE, KREA2,
    KREA2_MUSUBI, IDEOGRAM, IDEOGRAM_MUSUBI, FLUX3, AURAFLOW, HIDREAM, ERNIE, COSMOS, COSMOS_KOHYA,
)  # fmt: skip
"""In the order in which they are compared."""
