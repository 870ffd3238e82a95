"""One rank and one alpha for all modules of a PEFT folder, and the same function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub as ah
from adapterhub_converters.adapter import LowRank, LowRankEmbedding
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from adapterhub_converters.formats.peft.one_scale import with_one_scale
from tests.support.folders import Shapes, adapter, pairs, vera

V = "model.layers.{}.self_attn.v_proj"
QV: Shapes = {**pairs(2), **pairs(2, module=V)}
EMBED: Shapes = {"model.embed_tokens.lora_embedding_A": (2, 12), "model.embed_tokens.lora_embedding_B": (8, 2)}


def product(delta: object) -> np.ndarray:
    assert isinstance(delta, LowRank | LowRankEmbedding)
    return np.asarray(delta.scaling * (delta.lora_B.astype(np.float64) @ delta.lora_A))


@pytest.mark.parametrize(
    ("shapes", "config", "note"),
    [
        (QV, {}, None),
        (QV, {"use_rslora": True}, "rsLoRA is folded into lora_alpha"),
        (QV, {"alpha_pattern": {"layers.1.self_attn.q_proj": 3}}, "scales folded into lora_B: 1"),
        (QV, {"alpha_pattern": {"layers.1.self_attn.q_proj": 0}}, "are multiplied by 2^-100"),
        (
            {**QV, **pairs(1, r=3)},
            {"rank_pattern": {"layers.0.self_attn.q_proj": 3}},
            "padded with zeros to rank 3: 3",
        ),
        ({**QV, **EMBED}, {"use_rslora": True, "target_modules": ["q_proj", "v_proj", "embed_tokens"]}, "rsLoRA"),
    ],
)
def test_every_module_has_the_same_scale_and_its_own_function(
    tmp_path: Path, shapes: Shapes, config: dict[str, Any], note: str | None
) -> None:
    source = ah.load(adapter(tmp_path / "a", shapes, **config))
    folded = with_one_scale(source)
    assert folded.deltas.keys() == source.deltas.keys()
    scales = {(delta.alpha, delta.r, delta.rslora) for delta in folded.deltas.values()}  # type: ignore[union-attr]
    assert len(scales) == 1
    for target, delta in source.deltas.items():
        np.testing.assert_allclose(product(folded.deltas[target]), product(delta), rtol=1e-5, atol=1e-6)
    assert any(note in note_text for note_text in folded.notes) if note else not folded.notes
    (tmp_path / "out").mkdir()
    peft.write(folded, tmp_path / "out")
    assert ah.check(tmp_path / "out", runtimes=["sglang"]).verdicts["sglang"].verdict == "applied"


def test_what_is_more_or_other_than_two_matrices_is_refused(tmp_path: Path) -> None:
    biases = {f"{name.removesuffix('.weight')}.bias": (8,) for name in QV if "lora_B" in name}
    with pytest.raises(RefusedError, match="has a magnitude or a bias beside its two matrices"):
        with_one_scale(ah.load(adapter(tmp_path / "a", {**QV, **biases}, lora_bias=True)))
    with pytest.raises(RefusedError, match="is not supported here"):
        with_one_scale(ah.load(vera(tmp_path / "b", {"layers.0.self_attn.q_proj": 8}, (8, 8))))


def test_an_adapter_that_changes_nothing_has_no_scale_to_share(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is 0 in every module, so that the adapter changes nothing"):
        with_one_scale(ah.load(adapter(tmp_path / "a", QV, lora_alpha=0)))
