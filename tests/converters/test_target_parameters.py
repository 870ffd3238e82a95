"""LoRA on parameters of experts, as each version of peft has saved it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from adapterhub_converters.bases import BaseSpec, BaseTensor
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from tests.conftest import need_module
from tests.converters.test_peft_peer import dense, rewritten

pytestmark = pytest.mark.peer


@pytest.fixture(autouse=True)
def _peft() -> None:
    need_module("peft")


@pytest.mark.parametrize(
    ("version", "family"), [("0.17.1", "qwen"), ("0.18.1", "gpt-oss"), ("0.19.0", "qwen"), ("0.19.0", "gpt-oss")]
)
@pytest.mark.parametrize("known_by", ["neighbor", "base"])
def test_experts_of_older_pefts_follow_their_formula(version: str, family: str, known_by: str, tmp_path: Path) -> None:
    """No swap before 0.19; in 0.19.0 a swap where the base says is_transposed (peft, `ParamWrapper.get_delta_weight`)."""
    flagged = family == "gpt-oss"
    swapped = version == "0.19.0" and flagged
    experts, r, sizes = 4, 2, {"gate_up_proj": (8, 16), "down_proj": (8, 8)}  # in, out: one is square
    tensors, expected, shapes = {}, {}, {}
    rng = np.random.default_rng(0)
    for name, (into, out) in sizes.items():
        if known_by == "base" and name == "gate_up_proj":
            continue
        d1, d2 = (into, out) if flagged else (out, into)
        a_columns, b_rows = (d2, d1) if swapped else (d1, d2)
        lora_A, lora_B = (rng.normal(size=s).astype(np.float32) for s in ((experts * r, a_columns), (b_rows, experts * r)))
        stem = "l.0.mlp.experts" + (".base_layer" if name == "gate_up_proj" else "")
        tensors |= {f"base_model.model.{stem}.lora_A.weight": lora_A, f"base_model.model.{stem}.lora_B.weight": lora_B}
        delta = np.einsum(
            "ore,eri->eoi" if swapped else "ore,eri->eio",
            lora_B.reshape(b_rows, r, experts),
            lora_A.reshape(experts, r, a_columns),
        )
        expected[f"l.0.mlp.experts.{name}"] = delta.swapaxes(1, 2) if flagged else delta
        shapes[f"l.0.mlp.experts.{name}"] = BaseTensor((experts, d1, d2), "F32")
    config = {
        "peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": [], "peft_version": version,
        "target_parameters": [name.removeprefix("l.0.") for name in expected],
    }  # fmt: skip
    model_type = "gpt_oss" if flagged else "qwen3_moe"
    base = BaseSpec("base", "hf", "", model_type, {}, shapes) if known_by == "base" else None
    source = tmp_path / "a"
    source.mkdir()
    safetensors_file.write(source / peft.WEIGHTS, tensors, {"format": "pt"})
    (source / peft.CONFIG).write_text(json.dumps(config))
    adapter = peft.read(source, base=base)
    assert adapter.deltas.keys() == expected.keys()
    for target, delta in adapter.deltas.items():
        np.testing.assert_allclose(dense(delta), expected[target], rtol=1e-5)
    (tmp_path / "b").mkdir()
    peft.write(adapter, tmp_path / "b")
    assert (tmp_path / "b" / peft.WEIGHTS).read_bytes() == (source / peft.WEIGHTS).read_bytes()
    newer = peft.read(rewritten(adapter, tmp_path / "c"))
    assert {t: dense(d).tobytes() for t, d in newer.deltas.items()} == {
        t: dense(d).tobytes() for t, d in adapter.deltas.items()
    }
    if known_by == "base" and version != "0.19.0":
        with pytest.raises(RefusedError, match="depends on how the base stores them.*Name its base model"):
            peft.read(source)
