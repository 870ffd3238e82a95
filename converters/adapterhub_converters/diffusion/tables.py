"""What the modules of image models are called: by diffusers, whose names are the canonical ones, and by the trainers.

Each table is closed: a name is in it or it isn't known. Trainers that follow sd-scripts write `_` for `.`, which loses
where a name ends and the next begins; a table gives it back, and says so where two fit. Names are those of diffusers
0.42 (`loaders/lora_conversion_utils.py`), sd-scripts (`networks/`), musubi-tuner and XLabs. `N` stands for a number.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """What a trainer's module is: one module of the base, or several whose rows it has one below the other.

    `swapped`: the two halves of its rows are in each other's place.
    """

    targets: tuple[str, ...]
    swapped: bool = False


@dataclass(frozen=True, eq=False)
class Table:
    """The modules of one family of models: a trainer's path to the base's.

    Attributes:
        name: What people call the family.
        part: Which model of a pipeline it names.
        modules: Path, or pattern of paths, to the base's.
        writes: Whether the tools that read these names read no others.
    """

    name: str
    part: str
    modules: Mapping[str, Reading]
    writes: bool = True

    def read(self, stem: str) -> Reading | None:
        """What `stem`, its dots perhaps underscores, names."""
        for pattern, reading in self._patterns.get(_shape(stem.replace(".", "_")), ()):
            match = pattern.fullmatch(stem)
            if match:
                return Reading(tuple(_filled(target, match.groups()) for target in reading.targets), reading.swapped)
        return None

    def written(self, target: str) -> tuple[str, Reading] | None:
        """The trainer's path that has `target` in it, and all that is in it."""
        for pattern, path, reading in self._inverse.get(_shape(target), ()):
            match = pattern.fullmatch(target)
            if match:
                filled = Reading(tuple(_filled(each, match.groups()) for each in reading.targets), reading.swapped)
                return _filled(path, match.groups()), filled
        return None

    @functools.cached_property
    def _patterns(self) -> dict[str, list[tuple[re.Pattern[str], Reading]]]:
        found: dict[str, list[tuple[re.Pattern[str], Reading]]] = {}
        for path, reading in self.modules.items():
            found.setdefault(_shape(path.replace(".", "_")), []).append((_pattern(path, r"[._]"), reading))
        return found

    @functools.cached_property
    def _inverse(self) -> dict[str, list[tuple[re.Pattern[str], str, Reading]]]:
        found: dict[str, list[tuple[re.Pattern[str], str, Reading]]] = {}
        for path, reading in self.modules.items():
            for target in reading.targets:
                found.setdefault(_shape(target), []).append((_pattern(target, r"\."), path, reading))
        return found


def _shape(path: str) -> str:
    """A path without its numbers: of the few that share it one may match."""
    return _NUMBER.sub("#", path)


_NUMBER = re.compile(r"[0-9]+|(?<![A-Za-z])N(?![A-Za-z])")


def _pattern(path: str, dot: str) -> re.Pattern[str]:
    words = ("(0|[1-9][0-9]{0,3})" if word == "N" else re.escape(word) for word in path.split("."))
    return re.compile(dot.join(words))


def _filled(path: str, numbers: tuple[str, ...]) -> str:
    left = iter(numbers)
    return ".".join(next(left) if word == "N" else word for word in path.split("."))


def _own(*paths: str) -> dict[str, Reading]:
    """Modules that the trainer calls what diffusers does."""
    return {path: Reading((path,)) for path in paths}


def _joined(stem: str, ends: str) -> list[str]:
    return [f"{stem}.{end}" for end in ends.split()]


_QKV = "to_q to_k to_v"
_IN_TRANSFORMER = [
    *_joined("transformer_blocks.N.attn1", f"{_QKV} to_out.0"), *_joined("transformer_blocks.N.attn2", f"{_QKV} to_out.0"),
    *_joined("transformer_blocks.N.ff", "net.0.proj net.2"), "proj_in", "proj_out",
]  # fmt: skip
_IN_RESNET = "conv1 conv2 conv_shortcut time_emb_proj"


def _unet() -> Iterator[str]:
    for block in ("down_blocks.N", "mid_block", "up_blocks.N"):
        yield from _joined(f"{block}.attentions.N", " ".join(_IN_TRANSFORMER))
        yield from _joined(f"{block}.resnets.N", _IN_RESNET)
    yield from ("down_blocks.N.downsamplers.0.conv", "up_blocks.N.upsamplers.0.conv", "conv_in", "conv_out")
    yield from _joined("time_embedding", "linear_1 linear_2")
    yield from _joined("add_embedding", "linear_1 linear_2")


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


def _flux() -> Iterator[tuple[str, Reading]]:
    double, single = "transformer_blocks.N", "single_transformer_blocks.N"
    fused = {
        "double_blocks.N.img_attn.qkv": _joined(f"{double}.attn", _QKV),
        "double_blocks.N.txt_attn.qkv": _joined(f"{double}.attn", "add_q_proj add_k_proj add_v_proj"),
        "single_blocks.N.linear1": [*_joined(f"{single}.attn", _QKV), f"{single}.proj_mlp"],
    }
    yield from ((theirs, Reading(tuple(ours))) for theirs, ours in fused.items())
    one = {
        "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj",
        "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj", "txt_mlp.2": "ff_context.net.2",
        "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear",
    }  # fmt: skip
    yield from ((f"double_blocks.N.{theirs}", Reading((f"{double}.{ours}",))) for theirs, ours in one.items())
    yield from (("single_blocks.N.linear2", Reading((f"{single}.proj_out",))),)
    yield from (("single_blocks.N.modulation.lin", Reading((f"{single}.norm.linear",))),)
    for theirs, ours in {"time_in": "timestep", "vector_in": "text", "guidance_in": "guidance"}.items():
        yield f"{theirs}.in_layer", Reading((f"time_text_embed.{ours}_embedder.linear_1",))
        yield f"{theirs}.out_layer", Reading((f"time_text_embed.{ours}_embedder.linear_2",))
    yield from (("img_in", Reading(("x_embedder",))), ("txt_in", Reading(("context_embedder",))))
    yield "final_layer.linear", Reading(("proj_out",))
    # FLUX has shift above scale, diffusers scale above shift (its `swap_scale_shift`).
    yield "final_layer.adaLN_modulation.1", Reading(("norm_out.linear",), swapped=True)


def _xlabs() -> Iterator[tuple[str, Reading]]:
    double, single = "transformer_blocks.N", "single_transformer_blocks.N"
    yield "double_blocks.N.processor.qkv_lora1", Reading(tuple(_joined(f"{double}.attn", _QKV)))
    added = _joined(f"{double}.attn", "add_q_proj add_k_proj add_v_proj")
    yield "double_blocks.N.processor.qkv_lora2", Reading(tuple(added))
    yield "double_blocks.N.processor.proj_lora1", Reading((f"{double}.attn.to_out.0",))
    yield "double_blocks.N.processor.proj_lora2", Reading((f"{double}.attn.to_add_out",))
    yield "single_blocks.N.processor.qkv_lora", Reading(tuple(_joined(f"{single}.attn", _QKV)))
    yield "single_blocks.N.processor.proj_lora", Reading((f"{single}.proj_out",))


def _transformer() -> Iterator[str]:
    """Modules of FLUX.1, Stable Diffusion 3 and Qwen-Image as diffusers calls them."""
    block, single = "transformer_blocks.N", "single_transformer_blocks.N"
    attention = f"{_QKV} to_out.0 add_q_proj add_k_proj add_v_proj to_add_out"
    yield from (path for name in ("attn", "attn2") for path in _joined(f"{block}.{name}", attention))
    yield from (
        p for name in ("ff", "ff_context", "img_mlp", "txt_mlp") for p in _joined(f"{block}.{name}", "net.0.proj net.2")
    )
    yield from _joined(block, "norm1.linear norm1_context.linear img_mod.1 txt_mod.1")
    yield from _joined(f"{single}.attn", _QKV)
    yield from _joined(single, "proj_mlp proj_out norm.linear")
    for embedder in ("timestep", "guidance", "text"):
        yield from _joined(f"time_text_embed.{embedder}_embedder", "linear_1 linear_2")
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


def _hunyuan() -> Iterator[str]:
    """HunyuanVideo's, which share some with FLUX.1's once dots are underscores; not read, but not taken for FLUX either."""
    yield from (f"double_blocks.N.{kind}_{end}" for kind in ("img", "txt") for end in (
        "attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2", "mod.linear"))  # fmt: skip
    yield from _joined("single_blocks.N", "linear1 linear2 modulation.linear")


def _renamed(pairs: Iterator[tuple[str, str]]) -> dict[str, Reading]:
    return {theirs: Reading((ours,)) for theirs, ours in pairs}


SD = Table("Stable Diffusion", "unet", _own(*_unet()))
SDXL = Table("SDXL", "unet", _renamed(_ldm()))
FLUX = Table("FLUX.1", "transformer", dict(_flux()))
XLABS = Table("FLUX.1 by XLabs", "transformer", dict(_xlabs()), writes=False)
TRANSFORMER = Table("diffusers' transformers", "transformer", _own(*_transformer()))
WAN = Table("Wan", "transformer", _renamed(_wan()))
HUNYUAN = Table("HunyuanVideo", "", _own(*_hunyuan()), writes=False)
TABLES = (SD, SDXL, FLUX, XLABS, TRANSFORMER, WAN, HUNYUAN)

FIRST = frozenset(target.partition(".")[0] for table in TABLES for r in table.modules.values() for target in r.targets)
"""What the paths of all their modules begin with."""

_CLIP = [*_joined("self_attn", "q_proj k_proj v_proj out_proj"), *_joined("mlp", "fc1 fc2")]
_T5 = [*_joined("layer.0.SelfAttention", "q k v o"), *_joined("layer.1.DenseReluDense", "wi wi_0 wi_1 wo")]
TEXT = Table(
    "text encoders",
    "",
    _own(
        *_joined("text_model.encoder.layers.N", " ".join(_CLIP)), *_joined("encoder.block.N", " ".join(_T5)), "text_projection"
    ),
)

_3X3 = re.compile(r"unet\.(?:conv_in|conv_out|.+\.(?:conv1|conv2|(?:down|up)samplers\.0\.conv))")
_1X1 = re.compile(r"unet\..+\.conv_shortcut")


def kernel(target: str) -> tuple[int, ...]:
    """The kernel of a UNet's module that is a convolution in every model of its kind; empty for the others."""
    return (3, 3) if _3X3.fullmatch(target) else (1, 1) if _1X1.fullmatch(target) else ()
