"""The tables of all families of image and video models, and of text encoders.

Names are those of sd-scripts (`networks/lora_*.py`), musubi-tuner (`networks/`, with the names of the models' own
repositories), ComfyUI (`comfy/lora.py`, `comfy/utils.py`) and XLabs. Their names in diffusers, which are the
canonical ones, are those of its converters of whole checkpoints (0.42, `loaders/single_file_utils.py`,
`loaders/lora_conversion_utils.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction

from adapterhub_converters import linear

from .table import Reading, Table, joined, own, renamed

QKV = "to_q to_k to_v"
_ADDED = "add_q_proj add_k_proj add_v_proj"
_DOUBLE, _SINGLE = "transformer_blocks.N", "single_transformer_blocks.N"
_DIFFUSION_MODEL = "diffusion_model."


def _one(target: str, ratio: int | Fraction | None = None) -> Reading:
    return Reading((target,), ratio=None if ratio is None else Fraction(ratio))


def _thirds(stem: str, ends: str) -> Reading:
    """Queries, keys and values with as many rows each as columns."""
    return Reading(tuple(joined(stem, ends)), ratio=Fraction(3), shares=(1, 1, 1))


def _single(stem: str) -> Reading:
    """The first module of a single block in FLUX.1 and HunyuanVideo: queries, keys, values and an MLP four times as wide."""
    return Reading((*joined(f"{stem}.attn", QKV), f"{stem}.proj_mlp"), ratio=Fraction(7), shares=(1, 1, 1, 4))


def _last(target: str = "norm_out.linear") -> Reading:
    """The last layer's modulation: shift before scale, but scale before shift in diffusers (its `swap_scale_shift`)."""
    return Reading((target,), swapped=True, ratio=Fraction(2))


def _embedders(theirs: str, ours: str, names: dict[str, str], ends: str = "in_layer out_layer") -> Iterator[tuple[str, str]]:
    for name, embedder in names.items():
        for n, end in enumerate(ends.split(), 1):
            yield f"{theirs}{name}.{end}", f"{ours}.{embedder}_embedder.linear_{n}"


def _flux() -> Iterator[tuple[str, Reading]]:
    yield "double_blocks.N.img_attn.qkv", _thirds(f"{_DOUBLE}.attn", QKV)
    yield "double_blocks.N.txt_attn.qkv", _thirds(f"{_DOUBLE}.attn", _ADDED)
    yield "single_blocks.N.linear1", _single(_SINGLE)
    one: dict[str, tuple[str, int | Fraction]] = {
        "img_attn.proj": ("attn.to_out.0", 1), "txt_attn.proj": ("attn.to_add_out", 1),
        "img_mlp.0": ("ff.net.0.proj", 4), "img_mlp.2": ("ff.net.2", Fraction(1, 4)),
        "txt_mlp.0": ("ff_context.net.0.proj", 4), "txt_mlp.2": ("ff_context.net.2", Fraction(1, 4)),
        "img_mod.lin": ("norm1.linear", 6), "txt_mod.lin": ("norm1_context.linear", 6),
    }  # fmt: skip
    yield from ((f"double_blocks.N.{theirs}", _one(f"{_DOUBLE}.{ours}", ratio)) for theirs, (ours, ratio) in one.items())
    yield "single_blocks.N.linear2", _one(f"{_SINGLE}.proj_out", Fraction(1, 5))
    yield "single_blocks.N.modulation.lin", _one(f"{_SINGLE}.norm.linear", 3)
    embedders = {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}
    yield from renamed(_embedders("", "time_text_embed", embedders)).items()
    yield from renamed([("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out")]).items()
    yield "final_layer.adaLN_modulation.1", _last()


def _xlabs() -> Iterator[tuple[str, Reading]]:
    yield "double_blocks.N.processor.qkv_lora1", _thirds(f"{_DOUBLE}.attn", QKV)
    yield "double_blocks.N.processor.qkv_lora2", _thirds(f"{_DOUBLE}.attn", _ADDED)
    yield "double_blocks.N.processor.proj_lora1", _one(f"{_DOUBLE}.attn.to_out.0")
    yield "double_blocks.N.processor.proj_lora2", _one(f"{_DOUBLE}.attn.to_add_out")
    yield "single_blocks.N.processor.qkv_lora", _thirds(f"{_SINGLE}.attn", QKV)
    yield "single_blocks.N.processor.proj_lora", _one(f"{_SINGLE}.proj_out")


def _flux2() -> Iterator[tuple[str, Reading]]:
    yield "double_blocks.N.img_attn.qkv", _thirds(f"{_DOUBLE}.attn", QKV)
    yield "double_blocks.N.txt_attn.qkv", _thirds(f"{_DOUBLE}.attn", _ADDED)
    one: dict[str, tuple[str, int | Fraction]] = {
        "img_attn.proj": ("attn.to_out.0", 1), "txt_attn.proj": ("attn.to_add_out", 1),
        "img_mlp.0": ("ff.linear_in", 6), "img_mlp.2": ("ff.linear_out", Fraction(1, 3)),
        "txt_mlp.0": ("ff_context.linear_in", 6), "txt_mlp.2": ("ff_context.linear_out", Fraction(1, 3)),
    }  # fmt: skip
    yield from ((f"double_blocks.N.{theirs}", _one(f"{_DOUBLE}.{ours}", ratio)) for theirs, (ours, ratio) in one.items())
    yield "single_blocks.N.linear1", _one(f"{_SINGLE}.attn.to_qkv_mlp_proj", 9)
    yield "single_blocks.N.linear2", _one(f"{_SINGLE}.attn.to_out", Fraction(1, 4))
    for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
        yield f"{name}.lin", _one(f"{name}.linear")
    embedders = {"time_in": "timestep", "guidance_in": "guidance"}
    yield from renamed(_embedders("", "time_guidance_embed", embedders)).items()
    yield from renamed([("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out")]).items()
    yield "final_layer.adaLN_modulation.1", _last()


def _stream(attention: str, mlp: str, *, text: bool) -> Iterator[tuple[str, Reading]]:
    """Attention and MLP of a double block, for the image's tokens or the text's; `attention` is the prefix of `qkv`."""
    ends, out, feed = (_ADDED, "to_add_out", "ff_context") if text else (QKV, "to_out.0", "ff")
    yield f"{attention}qkv", _thirds(f"{_DOUBLE}.attn", ends)
    yield f"{attention}proj", _one(f"{_DOUBLE}.attn.{out}")
    yield f"{mlp}.fc1", _one(f"{_DOUBLE}.{feed}.net.0.proj")
    yield f"{mlp}.fc2", _one(f"{_DOUBLE}.{feed}.net.2")


def _sd3() -> Iterator[tuple[str, Reading]]:
    for block in ("x_block", "context_block"):
        stem = f"joint_blocks.N.{block}"
        yield from _stream(f"{stem}.attn.", f"{stem}.mlp", text=block == "context_block")
    yield "joint_blocks.N.x_block.attn2.qkv", _thirds(f"{_DOUBLE}.attn2", QKV)
    yield "joint_blocks.N.x_block.attn2.proj", _one(f"{_DOUBLE}.attn2.to_out.0")
    yield "joint_blocks.N.x_block.adaLN_modulation.1", _one(f"{_DOUBLE}.norm1.linear")
    # The last block's has only a shift and a scale, which diffusers has in the other order.
    context = Reading((f"{_DOUBLE}.norm1_context.linear",), swapped=True, halves=Fraction(2))
    yield "joint_blocks.N.context_block.adaLN_modulation.1", context
    embedders = {"t_embedder": "timestep", "y_embedder": "text"}
    yield from renamed(_embedders("", "time_text_embed", embedders, "mlp.0 mlp.2")).items()
    yield from renamed([("context_embedder", "context_embedder"), ("x_embedder.proj", "pos_embed.proj")]).items()
    yield "final_layer.linear", _one("proj_out")
    yield "final_layer.adaLN_modulation.1", _last()


def _hunyuan() -> Iterator[tuple[str, Reading]]:
    for kind in ("img", "txt"):
        stem = f"double_blocks.N.{kind}"
        yield from _stream(f"{stem}_attn_", f"{stem}_mlp", text=kind == "txt")
        yield f"{stem}_mod.linear", _one(f"{_DOUBLE}.norm1{'' if kind == 'img' else '_context'}.linear")
    yield "single_blocks.N.linear1", _single(_SINGLE)
    yield "single_blocks.N.linear2", _one(f"{_SINGLE}.proj_out", Fraction(1, 5))
    yield "single_blocks.N.modulation.linear", _one(f"{_SINGLE}.norm.linear")
    token, ours = "txt_in.individual_token_refiner.blocks.N", "context_embedder.token_refiner.refiner_blocks.N"
    yield f"{token}.self_attn_qkv", _thirds(f"{ours}.attn", QKV)
    inside = {"self_attn_proj": "attn.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"}
    inside |= {"adaLN_modulation.1": "norm_out.linear"}
    yield from ((f"{token}.{a}", _one(f"{ours}.{b}")) for a, b in inside.items())
    embedders = {"time_in": "timestep", "guidance_in": "guidance"}
    yield from renamed(_embedders("", "time_text_embed", embedders, "mlp.0 mlp.2")).items()
    yield from renamed(_embedders("", "time_text_embed", {"vector_in": "text"})).items()
    inner = "context_embedder.time_text_embed"
    yield from renamed(_embedders("txt_in.", inner, {"t_embedder": "timestep"}, "mlp.0 mlp.2")).items()
    yield from renamed(_embedders("txt_in.", inner, {"c_embedder": "text"}, "linear_1 linear_2")).items()
    yield from renamed([("img_in.proj", "x_embedder.proj"), ("txt_in.input_embedder", "context_embedder.proj_in")]).items()
    yield "final_layer.linear", _one("proj_out")
    yield "final_layer.adaLN_modulation.1", _last()


def _transformer() -> Iterator[str]:
    """Modules of FLUX.1, Stable Diffusion 3, HunyuanVideo and Qwen-Image under diffusers' names."""
    attention = f"{QKV} to_out.0 {_ADDED} to_add_out"
    yield from (path for name in ("attn", "attn2") for path in joined(f"{_DOUBLE}.{name}", attention))
    feeds = ("ff", "ff_context", "img_mlp", "txt_mlp")
    yield from (path for name in feeds for path in joined(f"{_DOUBLE}.{name}", "net.0.proj net.2"))
    yield from joined(_DOUBLE, "norm1.linear norm1_context.linear img_mod.1 txt_mod.1")
    yield from joined(f"{_SINGLE}.attn", QKV)
    yield from joined(_SINGLE, "proj_mlp proj_out norm.linear")
    for embedder in ("timestep", "guidance", "text"):
        yield from joined(f"time_text_embed.{embedder}_embedder", "linear_1 linear_2")
    yield from ("x_embedder", "context_embedder", "img_in", "txt_in", "norm_out.linear", "proj_out")


def _wan() -> Iterator[tuple[str, str]]:
    outer = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        yield from ((f"blocks.N.{theirs}.{a}", f"blocks.N.{ours}.{b}") for a, b in outer.items())
    yield from ((f"blocks.N.cross_attn.{a}_img", f"blocks.N.attn2.add_{a}_proj") for a in "kv")
    yield from (("blocks.N.ffn.0", "blocks.N.ffn.net.0.proj"), ("blocks.N.ffn.2", "blocks.N.ffn.net.2"))
    for kind in ("text", "time"):
        yield from ((f"{kind}_embedding.{2 * n}", f"condition_embedder.{kind}_embedder.linear_{n + 1}") for n in range(2))
    yield from (("time_projection.1", "condition_embedder.time_proj"), ("head.head", "proj_out"))
    yield from (
        ("img_emb.proj.1", "condition_embedder.image_embedder.ff.net.0.proj"),
        ("img_emb.proj.3", "condition_embedder.image_embedder.ff.net.2"),
    )


def _ltx() -> Iterator[tuple[str, str]]:
    """Modules of LTX-Video and LTX-2."""
    for name in ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn"):
        yield from ((path, path) for path in joined(f"{_DOUBLE}.{name}", f"{QKV} to_out.0"))
    for name in ("ff", "audio_ff"):
        yield from ((path, path) for path in joined(f"{_DOUBLE}.{name}", "net.0.proj net.2"))
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
        path for name in ("caption_projection", "audio_caption_projection") for path in joined(name, "linear_1 linear_2")
    )
    yield from ((path, path) for path in (*captions, "proj_out", "audio_proj_out"))


_LAYERS = ("layers.N", "noise_refiner.N", "context_refiner.N")


_WIDE = Fraction(8, 3)


def _z_feeds(layer: str) -> Iterator[tuple[str, Reading]]:
    for name, ratio in (("w1", _WIDE), ("w2", 1 / _WIDE), ("w3", _WIDE)):
        yield f"{layer}.feed_forward.{name}", _one(f"{layer}.feed_forward.{name}", ratio)
    if not layer.startswith("context"):
        yield from own(f"{layer}.adaLN_modulation.0").items()


def _z_image() -> Iterator[tuple[str, Reading]]:
    for layer in _LAYERS:
        yield from own(*joined(f"{layer}.attention", f"{QKV} to_out.0")).items()
        yield from _z_feeds(layer)
    yield from own("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1", "all_x_embedder.2-1").items()
    yield from own(*joined("all_final_layer.2-1", "linear adaLN_modulation.1")).items()


def _z_image_native() -> Iterator[tuple[str, Reading]]:
    for layer in _LAYERS:
        yield f"{layer}.attention.qkv", _thirds(f"{layer}.attention", QKV)
        yield f"{layer}.attention.out", _one(f"{layer}.attention.to_out.0", 1)
        yield from _z_feeds(layer)
    yield from own("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1").items()
    last = [(f"final_layer.{end}", f"all_final_layer.2-1.{end}") for end in ("linear", "adaLN_modulation.1")]
    yield from renamed([("x_embedder", "all_x_embedder.2-1"), *last]).items()


def _lumina() -> Iterator[tuple[str, Reading]]:
    for layer in _LAYERS:
        rows = Reading(tuple(joined(f"{layer}.attn", QKV)), ratio=Fraction(5, 3), shares=(3, 1, 1))
        yield f"{layer}.attention.qkv", rows
        yield f"{layer}.attention.out", _one(f"{layer}.attn.to_out.0", 1)
        for n, ratio in ((1, Fraction(4)), (2, Fraction(1, 4)), (3, Fraction(4))):
            yield f"{layer}.feed_forward.w{n}", _one(f"{layer}.feed_forward.linear_{n}", ratio)
        if not layer.startswith("context"):
            yield f"{layer}.adaLN_modulation.1", _one(f"{layer}.norm1.linear")
    stem = "time_caption_embed"
    yield from renamed([
        ("t_embedder.mlp.0", f"{stem}.timestep_embedder.linear_1"), ("t_embedder.mlp.2", f"{stem}.timestep_embedder.linear_2"),
        ("cap_embedder.1", f"{stem}.caption_embedder.1"), ("x_embedder", "x_embedder"),
        ("final_layer.adaLN_modulation.1", "norm_out.linear_1"), ("final_layer.linear", "norm_out.linear_2"),
    ]).items()  # fmt: skip


_FLUX_HEADERS = r"flux[._-]?1|flux_kontext|chroma"
FLUX = Table("FLUX.1", "transformer", dict(_flux()), headers=_FLUX_HEADERS, classes=r"Flux($|[^23])|Chroma")
XLABS = Table("FLUX.1 by XLabs", "transformer", dict(_xlabs()), headers=_FLUX_HEADERS, writes=False)
FLUX2 = Table("FLUX.2", "transformer", dict(_flux2()), headers=r"flux[._-]?2", classes="Flux2")
FLUX2_OWN = Table(
    "FLUX.2 by SimpleTuner", "transformer", own(*(target for r in FLUX2.modules.values() for target in r.targets)),
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
    "diffusers' transformers", "transformer", own(*_transformer()),
    headers=f"qwen|framepack|sd3|stable-diffusion-3|{_FLUX_HEADERS}", classes="QwenImage|HunyuanVideoFramepack", shared=True,
)  # fmt: skip
WAN = Table("Wan", "transformer", renamed(_wan()), headers="wan", classes="Wan")
HUNYUAN = Table(
    "HunyuanVideo", "transformer", dict(_hunyuan()), prefix=_DIFFUSION_MODEL, headers="hunyuan[-_]video",
    classes=r"HunyuanVideo($|[^1F])",
)  # fmt: skip
HUNYUAN_MUSUBI = dataclasses.replace(
    HUNYUAN, name="HunyuanVideo by musubi-tuner", prefix="lora_unet_", classes="", variant=True
)
LTX = Table("LTX-Video", "transformer", renamed(_ltx()), prefix=_DIFFUSION_MODEL, headers="ltx", classes="LTX", shared=True)
Z_IMAGE = Table("Z-Image", "transformer", dict(_z_image()), prefix=_DIFFUSION_MODEL, headers="z[-_]image", classes="ZImage")
Z_IMAGE_MUSUBI = dataclasses.replace(Z_IMAGE, name="Z-Image by musubi-tuner", prefix="lora_unet_", classes="", variant=True)
Z_IMAGE_NATIVE = Table("Z-Image by ComfyUI", "transformer", dict(_z_image_native()), headers="z[-_]image", variant=True)
LUMINA = Table("Lumina 2", "transformer", dict(_lumina()), headers="lumina", classes="Lumina2")

TRANSFORMERS = (
    FLUX, XLABS, FLUX2, FLUX2_OWN, SD3, TRANSFORMER, WAN, HUNYUAN, HUNYUAN_MUSUBI, LTX, Z_IMAGE, Z_IMAGE_MUSUBI, Z_IMAGE_NATIVE,
    LUMINA,
)  # fmt: skip


# ---- UNets and text encoders


_IN_TRANSFORMER = [
    *joined("transformer_blocks.N.attn1", f"{QKV} to_out.0"), *joined("transformer_blocks.N.attn2", f"{QKV} to_out.0"),
    *joined("transformer_blocks.N.ff", "net.0.proj net.2"), "proj_in", "proj_out",
]  # fmt: skip
_IN_RESNET = "conv1 conv2 conv_shortcut time_emb_proj"


def _unet() -> Iterator[str]:
    for block in ("down_blocks.N", "mid_block", "up_blocks.N"):
        yield from joined(f"{block}.attentions.N", " ".join(_IN_TRANSFORMER))
        yield from joined(f"{block}.resnets.N", _IN_RESNET)
    yield from ("down_blocks.N.downsamplers.0.conv", "up_blocks.N.upsamplers.0.conv", "conv_in", "conv_out")
    yield from joined("time_embedding", "linear_1 linear_2")
    yield from joined("add_embedding", "linear_1 linear_2")


def _ldm() -> Iterator[tuple[str, str]]:
    """SDXL's blocks as its checkpoint numbers them: in threes, each a resnet and possibly a transformer."""
    resnet = {
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }
    blocks = {f"input_blocks.{1 + 3 * b + n}": (f"down_blocks.{b}", n) for b in range(3) for n in range(2)}
    blocks |= {f"output_blocks.{3 * b + n}": (f"up_blocks.{b}", n) for b in range(3) for n in range(3)}
    places = [(f"{ldm}.{j}", f"{ours}.{kind}.{n}") for ldm, (ours, n) in blocks.items() for j, kind in enumerate(_KINDS)]
    places += [(f"middle_block.{j}", f"mid_block.{kind}") for j, kind in enumerate(("resnets.0", "attentions.0", "resnets.1"))]
    for ldm, ours in places:
        inside = resnet if ".resnets." in ours else dict(zip(_IN_TRANSFORMER, _IN_TRANSFORMER, strict=True))
        yield from ((f"{ldm}.{theirs}", f"{ours}.{name}") for theirs, name in inside.items())
    yield from ((f"input_blocks.{3 + 3 * b}.0.op", f"down_blocks.{b}.downsamplers.0.conv") for b in range(2))
    yield from ((f"output_blocks.{2 + 3 * b}.2.conv", f"up_blocks.{b}.upsamplers.0.conv") for b in range(2))
    yield from (("input_blocks.0.0", "conv_in"), ("out.2", "conv_out"))
    yield from ((f"time_embed.{2 * n}", f"time_embedding.linear_{n + 1}") for n in range(2))
    yield from ((f"label_emb.0.{2 * n}", f"add_embedding.linear_{n + 1}") for n in range(2))


_KINDS = ("resnets", "attentions")


SD = Table(
    "Stable Diffusion", "unet", own(*_unet()), headers="sd_v[12]|stable-diffusion-v[12]", classes=r"StableDiffusion($|[^X3])"
)
SDXL = Table("SDXL", "unet", renamed(_ldm()), headers="sdxl|stable-diffusion-xl", classes="StableDiffusionXL")
TABLES = (SD, SDXL, *TRANSFORMERS)

FIRST = frozenset(target.partition(".")[0] for table in TABLES for r in table.modules.values() for target in r.targets)
"""The first components of the paths of all their modules."""

_CLIP = [*joined("self_attn", "q_proj k_proj v_proj out_proj"), *joined("mlp", "fc1 fc2")]
_T5 = [*joined("layer.0.SelfAttention", "q k v o"), *joined("layer.1.DenseReluDense", "wi wi_0 wi_1 wo")]
TEXT = Table(
    "text encoders",
    "",
    own(*joined("text_model.encoder.layers.N", " ".join(_CLIP)), *joined("encoder.block.N", " ".join(_T5)), "text_projection"),
)

_3X3 = linear.Pattern(r"unet\.(?:conv_in|conv_out|.+\.(?:conv1|conv2|(?:down|up)samplers\.0\.conv))")
_1X1 = linear.Pattern(r"unet\..+\.conv_shortcut")


def kernel(target: str) -> tuple[int, ...]:
    """The kernel of a UNet module that is a convolution in every such model; empty for other modules."""
    return (3, 3) if _3X3.fullmatch(target) else (1, 1) if _1X1.fullmatch(target) else ()
