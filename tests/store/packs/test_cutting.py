"""Files are cut for packing at their tensors."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from adapterhub.store.packs import container, cutting
from adapterhub_converters.containers import gguf_output, gguf_types, safetensors_header
from tests.store.test_packs import pack, trained, unpack


def test_a_gguf_file_is_cut_at_its_tensors(tmp_path: Path) -> None:
    values = (np.random.default_rng(0).normal(size=(64, 512)) * 0.02).astype(np.float16)
    arrays: dict[str, np.ndarray | gguf_output.QuantizedTensor] = {"a.lora_a": values, "b.lora_b": values.astype(np.float32)}
    gguf_output.write(tmp_path / "x.gguf", {"general.architecture": gguf_types.MetadataValue("STRING", "llama")}, arrays)
    blob = (tmp_path / "x.gguf").read_bytes()
    widths = {run.key[0]: run.width for run in cutting.runs(container.offset_reader(io.BytesIO(blob)), len(blob)) if run.key}
    assert widths == {"a.lora_a": 2, "b.lora_b": 4}
    assert unpack(pack(blob)) == blob


def test_a_tensor_that_moved_is_still_a_difference_to_itself() -> None:
    parent = trained("BF16")
    longer_header = safetensors_header.header_bytes([("another", "BF16", (4, 4)), ("lora_A", "BF16", (256, 1024))], {}) + bytes(
        32
    )
    child = longer_header + parent[-256 * 1024 * 2 :]
    assert len(pack(child, parent)) < 1000
