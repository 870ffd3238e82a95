"""A GGUF base in one file or split: whole, or refused by what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import gguf_output, gguf_types
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError
from tests.conftest import need_module
from tests.converters.test_base_reader import SHAPES, sharded


def split(folder: Path, count: int = 3, **changes: dict[str, gguf_types.MetadataValue]) -> list[Path]:
    """A tiny llama in `count` parts, with the keys that llama-gguf-split writes; `changes` for single parts, `p0`, `p1`, …"""
    folder.mkdir(exist_ok=True)
    tensors = {
        "token_embd.weight": (12, 8), "output.weight": (12, 8), "output_norm.weight": (8,), "blk.0.attn_q.weight": (8, 8),
        "blk.1.attn_q.weight": (8, 8),
    }  # fmt: skip
    model = {"general.architecture": gguf_types.string_value("llama"), "llama.attention.head_count": gguf_types.u32_value(2)}
    paths = [folder / f"m-{n + 1:05}-of-{count:05}.gguf" for n in range(count)]
    for n, path in enumerate(paths):
        split_keys = {
            "split.no": gguf_types.MetadataValue("UINT16", n), "split.count": gguf_types.MetadataValue("UINT16", count),
            "split.tensors.count": gguf_types.MetadataValue("INT32", len(tensors)),
        }  # fmt: skip
        part = {name: np.zeros(shape, np.float32) for i, (name, shape) in enumerate(tensors.items()) if i % count == n}
        gguf_output.write(path, {**(model if n == 0 else {}), **split_keys, **changes.get(f"p{n}", {})}, part)
    return paths


@pytest.mark.parametrize("part", [0, 1, 2])
def test_any_part_of_a_split_gguf_is_the_whole_model(tmp_path: Path, part: int) -> None:
    spec = read_base(split(tmp_path)[part])
    assert {name: tensor.shape for name, tensor in spec.tensors.items()} == SHAPES
    assert (spec.architecture, spec.tied, spec.config["num_attention_heads"]) == ("LlamaForCausalLM", False, 2)
    assert spec.fingerprint == read_base(sharded(tmp_path / "hf")).fingerprint


def test_a_split_gguf_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    paths = split(tmp_path)
    paths[1].rename(tmp_path / "away.gguf")
    with pytest.raises(
        NotFoundError, match=r"m-00002-of-00003.gguf: no such file: one of 3 parts of a model\. Download it"
    ) as caught:
        read_base(paths[0])
    assert caught.value.code == "no-such-file"
    with pytest.raises(RefusedError, match=r"part 1 \(from 0\) of 3 of a model, and its name has no part number"):
        read_base(tmp_path / "away.gguf")
    paths[0].rename(paths[1])
    with pytest.raises(NotFoundError, match="m-00001-of-00003.gguf"):
        read_base(paths[2])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"p1": {"split.no": gguf_types.MetadataValue("UINT16", 2)}}, "part 2 (from 0) of 3, its name another"),
        ({"p2": {"split.count": gguf_types.MetadataValue("UINT16", 4)}}, "part 2 (from 0) of 4, its name another"),
        ({"p0": {"split.count": gguf_types.string_value("3")}}, "split.count is a STRING, not a number"),
        ({"p0": {"split.no": gguf_types.MetadataValue("[UINT32]", [0, 1])}}, "split.no is a [UINT32], not a number"),
        (
            {"p0": {"split.tensors.count": gguf_types.MetadataValue("[INT32]", [5, 5])}},
            "split.tensors.count is a [INT32], not a number",
        ),
        ({"p0": {"split.tensors.count": gguf_types.MetadataValue("INT32", 6)}}, "counts 6 tensors in all, the parts have 5"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(tmp_path: Path, changes: Any, says: str) -> None:
    with pytest.raises(FormatError) as caught:
        read_base(split(tmp_path, **changes)[0])
    assert says in str(caught.value)


def test_a_tensor_that_two_parts_have_is_refused(tmp_path: Path) -> None:
    first, second, _ = split(tmp_path)
    split_keys = {f"split.{key}": gguf_types.MetadataValue("UINT16", value) for key, value in (("no", 1), ("count", 3))}
    gguf_output.write(second, split_keys, {"token_embd.weight": np.zeros((12, 8), np.float32)})
    with pytest.raises(FormatError) as caught:
        read_base(first)
    assert str(caught.value) == (
        f"{second}: tensor 'token_embd.weight' is also in an earlier part, so that the parts are not those of one model. "
        "Download all of them again"
    )


@pytest.mark.peer
def test_what_gguf_py_splits_is_read_whole(tmp_path: Path) -> None:
    need_module("gguf")
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    writer.add_head_count(2)
    for name, shape in (("token_embd.weight", (12, 8)), ("output.weight", (12, 8)), ("blk.0.attn_q.weight", (8, 8))):
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    spec = read_base(tmp_path / "m-00002-of-00002.gguf")
    assert sorted(spec.tensors) == ["lm_head.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"]
