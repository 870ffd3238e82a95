"""What the modules of image models are called: by diffusers, whose names are the canonical ones, and by the trainers.

The UNets of Stable Diffusion and SDXL and the text encoders, as sd-scripts (`networks/`) names them, and all tables there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from . import families
from .families import QKV
from .table import Table, joined, own, renamed

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
    """SDXL's blocks as its checkpoint numbers them: in threes, a resnet and perhaps a transformer each."""
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


SD = Table("Stable Diffusion", "unet", own(*_unet()), said="sd_v[12]|stable-diffusion-v[12]", classes="StableDiffusion(?!XL|3)")
SDXL = Table("SDXL", "unet", renamed(_ldm()), said="sdxl|stable-diffusion-xl", classes="StableDiffusionXL")
TABLES = (SD, SDXL, *families.TABLES)

FIRST = frozenset(target.partition(".")[0] for table in TABLES for r in table.modules.values() for target in r.targets)
"""What the paths of all their modules begin with."""

_CLIP = [*joined("self_attn", "q_proj k_proj v_proj out_proj"), *joined("mlp", "fc1 fc2")]
_T5 = [*joined("layer.0.SelfAttention", "q k v o"), *joined("layer.1.DenseReluDense", "wi wi_0 wi_1 wo")]
TEXT = Table(
    "text encoders",
    "",
    own(*joined("text_model.encoder.layers.N", " ".join(_CLIP)), *joined("encoder.block.N", " ".join(_T5)), "text_projection"),
)

_3X3 = re.compile(r"unet\.(?:conv_in|conv_out|.+\.(?:conv1|conv2|(?:down|up)samplers\.0\.conv))")
_1X1 = re.compile(r"unet\..+\.conv_shortcut")


def kernel(target: str) -> tuple[int, ...]:
    """The kernel of a UNet's module that is a convolution in every model of its kind; empty for the others."""
    return (3, 3) if _3X3.fullmatch(target) else (1, 1) if _1X1.fullmatch(target) else ()
