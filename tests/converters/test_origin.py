"""What the header of an image adapter says of its model, and of the program that saved it."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub_converters.formats import convert
from tests.support.images import kohya_file

Q = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def test_hashes_of_other_bytes_are_left_out(tmp_path: Path) -> None:
    import hashlib

    path = kohya_file(tmp_path / "a", {Q: (16, 16), "lora_unet_label_emb_0_0": (8, 8)})
    raw = path.read_bytes()
    digest = hashlib.sha256(raw[8 + int.from_bytes(raw[:8], "little") :]).hexdigest()
    header = {"sshs_model_hash": digest, "sshs_legacy_hash": "12345678", "ss_a": "b"}
    for n, header_variant in enumerate((header, {**header, "sshs_model_hash": "0" * 64})):
        source = kohya_file(tmp_path / f"k{n}", {Q: (16, 16), "lora_unet_label_emb_0_0": (8, 8)}, header_variant)
        convert.convert(source, tmp_path / f"p{n}", to="peft")
        notes = convert.convert(tmp_path / f"p{n}", tmp_path / f"n{n}", to="kohya").notes
        assert ((tmp_path / f"n{n}").read_bytes() == source.read_bytes()) == (n == 0)
        assert bool(notes) == (n == 1)


@pytest.mark.parametrize(
    ("stem", "header", "expected"),
    [
        (Q, {"ss_network_module": "networks.lora", "ss_sd_model_name": "org/sdxl"}, ("org/sdxl", "SDXL", "sd-scripts")),
        (Q, {"ss_network_module": "lycoris.kohya", "ss_sd_model_name": "sd_xl.safetensors"}, (None, "SDXL", "LyCORIS")),
        ("lora_unet_blocks_0_ffn_0", {"ss_network_module": "networks.lora_wan"}, (None, "Wan", "musubi-tuner")),
        ("diffusion_model.blocks.0.attn.wq", {"software": '{"name": "ai-toolkit"}'}, (None, "Krea 2", "ai-toolkit")),
        ("lora_unet_transformer_blocks_0_attn_to_q", {"modelspec.architecture": "Qwen-Image/lora", "ot_branch": "master"},
         (None, "Qwen-Image", "OneTrainer")),
        ("lora_unet_transformer_blocks_0_attn_to_q", {"software": "{", "ss_base_model_version": "\x1b[31m"}, (None, "", "")),
        ("transformer.blocks.0.attn1.to_q", {}, (None, "Wan", "")),
    ],
)  # fmt: skip
def test_the_family_the_base_and_the_program_are_those_of_names_and_header(
    tmp_path: Path, stem: str, header: dict[str, str], expected: tuple[str | None, str, str]
) -> None:
    path = kohya_file(tmp_path / "x.safetensors", {stem: (24, 24)}, header)
    meta = convert.read(path).meta
    assert (meta.base_model, meta.family, meta.program) == expected
