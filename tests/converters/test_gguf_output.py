"""GGUF files as they are written: reproducible bytes, aligned tensors, and values that come last."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.containers import gguf_output
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.gguf_output import QuantizedTensor
from adapterhub_converters.containers.gguf_types import ALIGNMENT, MetadataValue, string_value, u32_value

METADATA = {"general.type": string_value("adapter"), "general.count": u32_value(3)}
TENSORS: dict[str, np.ndarray | QuantizedTensor] = {"a": np.arange(5, dtype=np.float32), "b": np.ones((2, 3), np.float16)}


def test_a_file_has_just_these_keys_and_tensors_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("first.gguf", "second.gguf"):
        gguf_output.write(tmp_path / name, METADATA, TENSORS)
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "second.gguf").read_bytes()
    with GGUFFile(tmp_path / "first.gguf") as file:
        assert dict(file.header.metadata) == {"general.type": "adapter", "general.count": 3}
        assert [*file.tensors] == ["a", "b"]
        for name, tensor in TENSORS.items():
            np.testing.assert_array_equal(file.tensor(name), tensor)
            assert file.tensors[name].offset % ALIGNMENT == 0


def test_a_quantized_tensor_keeps_its_blocks(tmp_path: Path) -> None:
    blocks = np.arange(2 * 34, dtype=np.uint8).reshape(2, 34)
    gguf_output.write(tmp_path / "a.gguf", METADATA, {"q": QuantizedTensor("Q8_0", (2, 32), blocks)})
    with GGUFFile(tmp_path / "a.gguf") as file:
        assert (file.tensors["q"].type_name, file.tensors["q"].shape) == ("Q8_0", (2, 32))
    assert (tmp_path / "a.gguf").read_bytes().count(blocks.tobytes()) == 1


def test_values_that_come_last_replace_placeholders_of_their_size(tmp_path: Path) -> None:
    def final_values() -> dict[str, MetadataValue]:
        return {"general.count": u32_value(7)}

    gguf_output.write(tmp_path / "a.gguf", METADATA, TENSORS, final_values)
    with GGUFFile(tmp_path / "a.gguf") as file:
        assert file.header.metadata["general.count"] == 7
        np.testing.assert_array_equal(file.tensor("a"), TENSORS["a"])
    with pytest.raises(ValueError, match="differs in size"):
        gguf_output.write(tmp_path / "b.gguf", METADATA, TENSORS, lambda: {"general.type": string_value("x" * 64)})


@pytest.mark.parametrize("alignment", [32, 64, 256])
def test_a_header_ends_at_its_alignment(alignment: int) -> None:
    raw = gguf_output.header_bytes(METADATA, [("a", "F32", (5,)), ("b", "F16", (2, 3))], alignment)
    assert len(raw) % alignment == 0
