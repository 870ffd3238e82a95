"""The tables of all families of image and video models, and of text encoders."""

from __future__ import annotations

from collections.abc import Iterator

from adapterhub_converters import safe_regex

from . import image_transformers, video_transformers
from .name_table import QKV, Table, paths, renames, same_names, shape_of, with_zeros

TRANSFORMERS = (*image_transformers.TABLES, *video_transformers.TABLES)


_IN_TRANSFORMER = [
    *paths("transformer_blocks.N.attn1", f"{QKV} to_out.0"), *paths("transformer_blocks.N.attn2", f"{QKV} to_out.0"),
    *paths("transformer_blocks.N.ff", "net.0.proj net.2"), *paths("transformer_blocks.N", "norm1 norm2 norm3"),
    "proj_in", "proj_out", "norm",
]  # fmt: skip
_IN_RESNET = "conv1 conv2 conv_shortcut time_emb_proj norm1 norm2"


def _unet() -> Iterator[str]:
    for block in ("down_blocks.N", "mid_block", "up_blocks.N"):
        yield from paths(f"{block}.attentions.N", " ".join(_IN_TRANSFORMER))
        yield from paths(f"{block}.resnets.N", _IN_RESNET)
    yield from ("down_blocks.N.downsamplers.0.conv", "up_blocks.N.upsamplers.0.conv", "conv_in", "conv_out", "conv_norm_out")
    yield from paths("time_embedding", "linear_1 linear_2")
    yield from paths("add_embedding", "linear_1 linear_2")


def _ldm() -> Iterator[tuple[str, str]]:
    """Yield SDXL's blocks as its checkpoint numbers them: in threes, each a resnet and possibly a transformer."""
    resnet = {
        "in_layers.2": "conv1",
        "emb_layers.1": "time_emb_proj",
        "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
        "in_layers.0": "norm1",
        "out_layers.0": "norm2",
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
    yield from (("input_blocks.0.0", "conv_in"), ("out.2", "conv_out"), ("out.0", "conv_norm_out"))
    yield from ((f"time_embed.{2 * n}", f"time_embedding.linear_{n + 1}") for n in range(2))
    yield from ((f"label_emb.0.{2 * n}", f"add_embedding.linear_{n + 1}") for n in range(2))


_KINDS = ("resnets", "attentions")


SD = Table(
    "Stable Diffusion",
    "unet",
    same_names(*_unet()),
    headers="sd_v[12]|stable-diffusion-v[12]",
    classes=r"StableDiffusion($|[^X3])",
)
SDXL = Table("SDXL", "unet", renames(_ldm()), headers="sdxl|stable-diffusion-xl", classes="StableDiffusionXL")
TABLES = (SD, SDXL, *TRANSFORMERS)


def families() -> list[str]:
    """Return the families whose files are read and written."""
    names = (table.name for table in TABLES if table.classes or table.part == "unet")
    return [name if name != image_transformers.TRANSFORMER.name else "Qwen-Image" for name in names]


# The names that a table renames, without those that also exist in diffusers.
_FOREIGN = frozenset(
    shape
    for table in TRANSFORMERS
    if not table.prefixed
    for shape, several in table.shapes().items()
    if any("N" in path.split(".") and reading.targets != (path,) for path, reading in several)
) - {shape_of(with_zeros(target)) for table in TABLES for r in table.modules.values() for target in r.targets}
FOREIGN_FIRST = frozenset(shape.partition(".")[0] for shape in _FOREIGN)
"""The first components of the names for which `is_foreign` is true."""


def is_foreign(name: str) -> bool:
    """Return whether a dotted name was given to a module in a block by a transformer's makers, but not by diffusers."""
    return shape_of(name) in _FOREIGN


_CLIP = [*paths("self_attn", "q_proj k_proj v_proj out_proj"), *paths("mlp", "fc1 fc2"), "layer_norm1", "layer_norm2"]
_T5 = [*paths("layer.0.SelfAttention", "q k v o"), *paths("layer.1.DenseReluDense", "wi wi_0 wi_1 wo")]
_CONDITIONER = [*paths("self_attn", "q_proj k_proj v_proj o_proj"), *paths("cross_attn", "q_proj k_proj v_proj o_proj")]
TEXT = Table(
    "text encoders",
    "",
    same_names(
        *paths("text_model.encoder.layers.N", " ".join(_CLIP)), "text_model.final_layer_norm", "text_projection",
        *paths("encoder.block.N", " ".join(_T5)),
        *paths("blocks.N", f"{' '.join(_CONDITIONER)} mlp.0 mlp.2"), "in_proj", "out_proj",
    ) | renames([("aggregate_embed", "text_proj_in")]),
)  # fmt: skip
"""Modules of CLIP and T5, of Anima's conditioner (`blocks.N`) and of LTX-2's connectors."""

_3X3 = safe_regex.Pattern(r"unet\.(?:conv_in|conv_out|.+\.(?:conv1|conv2|(?:down|up)samplers\.0\.conv))")
_1X1 = safe_regex.Pattern(r"unet\..+\.conv_shortcut")


def kernel(target: str) -> tuple[int, ...]:
    """Return the kernel of a UNet module that is a convolution in every such model; empty for other modules."""
    return (3, 3) if _3X3.fullmatch(target) else (1, 1) if _1X1.fullmatch(target) else ()
