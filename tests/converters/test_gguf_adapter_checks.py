"""What llama.cpp would ignore, abort on or scale wrongly is refused by name before anything is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.adapter import Adapter, LowRank, LowRankEmbedding, Meta, Rows
from adapterhub_converters.bases import BaseSpec, BaseTensor
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import gguf
from tests.converters.test_gguf_reader import delta, llama
from tests.converters.test_gguf_writer import llama as twelve_layers
from tests.converters.test_gguf_writer import written

Q, K, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.up_proj"
TABLE = {"model.embed_tokens.weight": BaseTensor((10, 32), "F32"), f"{Q}.weight": BaseTensor((64, 32), "F32")}
EMBED = LowRankEmbedding(np.ones((2, 10), np.float32), np.ones((32, 2), np.float32), 4)


@pytest.mark.parametrize(
    ("adapter", "base", "says"),
    [
        (Adapter({}), llama(), "there is no low-rank delta"),
        (Adapter({Q: delta(magnitude=np.ones(32, np.float32))}), llama(), "q_proj: DoRA cannot be expressed"),
        (Adapter({Q: delta(bias=np.ones(32, np.float32))}), llama(), "q_proj: lora_bias cannot be expressed"),
        (Adapter({Q: delta()}, replaced={"lm_head.weight": np.ones((2, 2))}), llama(), "lm_head.weight: a replaced parameter"),
        (Adapter({Q: delta()}, rows={"model.embed_tokens": Rows((1,), np.ones((1, 2)))}), llama(), "replaced rows"),
        (Adapter({Q: delta()}, meta=Meta(init="pissa")), llama(), "its factors were initialized with pissa"),
        (Adapter({"model.embed_tokens": EMBED}), dataclasses.replace(llama(), tied=True), "llama.cpp aborts on LoRA"),
        (Adapter({"lm_head": delta()}), dataclasses.replace(llama(), tied=True), "llama.cpp aborts on LoRA"),
        (Adapter({"model.layers.0.input_layernorm": delta()}), llama(), "llama.cpp ignores LoRA on norms"),
        (
            Adapter({"model.layers.0.mlp.qkv_proj": delta()}),
            llama(),
            "qkv_proj: llama.cpp's 'llama' has no tensor for this module",
        ),
        (Adapter({"model.layers.7.mlp.up_proj": delta()}), llama(), "the base has only 2 layers (base)"),
        (Adapter({UP: delta()}), dataclasses.replace(llama(), tensors=TABLE), "the base has no such module (base)"),
        (
            Adapter({K: delta(16)}),
            dataclasses.replace(llama(), tensors=TABLE | {"blk.1.attn_qkv.weight": BaseTensor((64, 32), "F32")}),
            "k_proj: the base has no such module (base), but blk.1.attn_qkv.weight, which may fuse it with others",
        ),
        (
            Adapter({Q: delta()}),
            dataclasses.replace(llama(), tensors=TABLE),
            "the delta is (32, 32), the base's weight (64, 32)",
        ),
        (Adapter({Q: delta(30)}), llama(), "30 rows do not match 4 heads"),
        (Adapter({Q: delta(dtype=np.float64)}), llama(), "llama.cpp does not support float64"),
        (Adapter({"model.embed_tokens": delta()}), llama(), "an embedding delta on a module that is not an embedding"),
        (
            Adapter({Q: delta()}),
            llama(num_attention_heads=None),
            "depends on the number of heads, which is unknown. Name its base model",
        ),
        (Adapter({Q: delta()}), dataclasses.replace(llama(), architecture="RWKV7ForCausalLM"), "no verified mapping"),
        (Adapter({Q: delta()}), None, "depends on the base's architecture and heads. Name its base model"),
        (Adapter({Q: delta(magnitude=np.ones(32)), K: delta(dtype=np.float64)}), llama(), "(and 2 more like it)"),
        (Adapter({Q: delta(alpha=1e-35)}), llama(), "a float32 cannot hold the alpha"),
        (Adapter({Q: delta(), K: delta(16), UP: delta(alpha=1e45)}), llama(), "does not fit into float32"),
    ],
)
def test_what_llama_cpp_would_get_wrong_is_refused_by_name(
    tmp_path: Path, adapter: Adapter, base: BaseSpec | None, says: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        gguf.write(adapter, tmp_path / "a.gguf", base=base)
    assert says in str(caught.value)
    assert not (tmp_path / "a.gguf").exists()


Q, V, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.10.mlp.up_proj"
DOWN = "model.layers.0.mlp.down_proj"


def test_separate_projections_are_assumed_and_reported_unless_the_gguf_is_there(tmp_path: Path) -> None:
    assumed = "for a GGUF of the base in which q, k, v, gate and up are separate tensors"
    for number, (target, rows, kind, notes) in enumerate([(V, 16, "hf", 1), (V, 16, "gguf", 0), (DOWN, 32, "hf", 0)]):
        (tmp_path / str(number)).mkdir()
        adapter = Adapter({target: LowRank(np.ones((2, 32), np.float32), np.ones((rows, 2), np.float32), 4)})
        _, _, report = written(adapter, tmp_path / str(number), dataclasses.replace(twelve_layers(), kind=kind))
        assert sum(note.startswith(assumed) for note in report.notes) == notes
