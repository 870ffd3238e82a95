"""What docs/formats.md says of image models is what conversions do: each cell of its table is tried, all others are exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from adapterhub_converters import bases
from adapterhub_converters.adapter import Loss
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert, peft, pipeline
from adapterhub_converters.formats.image import preserved_header
from adapterhub_converters.formats.lossy import KINDS, LossAllowance
from tests.conftest import ROOT
from tests.support.images import Numbers, pair

Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
K, CONV = Q.replace("to_q", "to_k"), "mid_block.resnets.0.conv1"
DOC = (ROOT / "docs/formats.md").read_text()
SDXL = bases.BaseSpec("sdxl", "hf", "StableDiffusionXLPipeline", "", {})
numbers = Numbers(np.float32)


def factors(target: str = Q, shape: tuple[int, ...] = (16, 16), r: int = 2) -> dict[str, np.ndarray]:
    return dict(zip((f"{target}.lora_A.weight", f"{target}.lora_B.weight"), pair(numbers, shape, r), strict=True))


Content = tuple[dict[str, np.ndarray], dict[str, Any]]
FEATURES: dict[str, Callable[[], Content]] = {
    "plain, rsLoRA, any alpha": lambda: (factors(), {"use_rslora": True, "lora_alpha": 3.7}),
    "alpha_pattern, rank_pattern": lambda: (factors() | factors(K, r=3), {"alpha_pattern": {"to_k": 3}}),
    "DoRA": lambda: (factors() | {f"{Q}.lora_magnitude_vector": numbers(16)}, {"use_dora": True}),
    "lora_bias, a scale of 1": lambda: (factors() | {f"{Q}.lora_B.bias": numbers(16)}, {"lora_bias": True, "lora_alpha": 2}),
    "lora_bias, a scale other than 1": lambda: (factors() | {f"{Q}.lora_B.bias": numbers(16)}, {"lora_bias": True}),
    "convolutions": lambda: (factors(CONV, (8, 8, 3, 3)), {}),
    "LoHa": lambda: (
        {f"{Q}.hada_w{n}_{half}": numbers(*shape) for n in (1, 2) for half, shape in (("a", (16, 2)), ("b", (2, 16)))},
        {"peft_type": "LOHA", "alpha": 3},
    ),
    "LoKr": lambda: (
        {f"{Q}.lokr_w1": numbers(4, 4), f"{Q}.lokr_w2_a": numbers(4, 2), f"{Q}.lokr_w2_b": numbers(2, 4)},
        {"peft_type": "LOKR", "alpha": 3, "r": 2},
    ),
    "AdaLoRA": lambda: (
        {f"{Q}.lora_A": numbers(2, 16), f"{Q}.lora_B": numbers(16, 2), f"{Q}.lora_E": numbers(2, 1)}, {"peft_type": "ADALORA"},
    ),
    "modules_to_save": lambda: (factors() | {"conv_norm_out.weight": numbers(8)}, {"modules_to_save": ["conv_norm_out"]}),
    "OLoRA, CorDA, LoftQ": lambda: (factors(), {"init_lora_weights": "olora"}),
}  # fmt: skip


def cell(source: Path, target: Path, to: str) -> str:
    for word, allowed in (("", LossAllowance()), ("`--allow-drop`", LossAllowance(drop=KINDS))):
        try:
            report = convert.convert(source, target.with_name(f"{target.name}{word}"), to=to, base=SDXL, allowed=allowed)
        except RefusedError:
            continue
        return word or {Loss.EXACT: "exact", Loss.REWRITTEN: "other form", Loss.ROUNDED: "rounded"}[report.worst]
    return "refused"


def test_the_table_is_what_conversions_do(tmp_path: Path) -> None:
    lines = ["| of a PEFT adapter of SDXL's UNet | kohya | diffusers |", "| --- | --- | --- |"]
    for n, (feature, make) in enumerate(FEATURES.items()):
        tensors, config = make()
        source = tmp_path / f"source{n}"
        source.mkdir()
        safetensors_file.write(source / peft.WEIGHTS, {f"base_model.model.{name}": a for name, a in tensors.items()})
        (source / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
        cells = [cell(source, tmp_path / f"{n}{to}", to) for to in ("kohya", "diffusers")]
        lines += [f"| {feature} | {' | '.join(cells)} |"] * (cells != ["exact", "exact"])
    joined = "\n".join(lines)
    assert joined in DOC, f"docs/formats.md should have:\n{joined}"


def test_every_key_is_in_the_docs() -> None:
    assert all(f"`{key}`" in DOC for key in (pipeline.PART_KEY, preserved_header.HEADER_KEY, preserved_header.NAMES_KEY))
