"""`extract`: what it takes out is the best there is, up to a percent, and the error it tells is the true one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import merge_into_base
from adapterhub.merging.into_base.extraction import ExtractionOptions, WeightExtraction, extract
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from tests.conftest import Run
from tests.merging.into_base.test_model_merge import K, Q, base_in, tensors_of

QW, KW, TABLE = f"{Q}.weight", f"{K}.weight", "model.embed_tokens.weight"


def tuned_from(base: Path, out: Path, changes: dict[str, np.ndarray], dtype: np.dtype = dtypes.F32) -> Path:
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors_of(base).items()}
    for name, change in changes.items():
        tensors[name] = tensors[name] + change if change.shape == tensors[name].shape else change
    shutil.copytree(base, out)
    safetensors_file.write(out / "model.safetensors", {name: t.astype(dtype) for name, t in tensors.items()}, {"format": "pt"})
    return out


def noise(*shape: int, scale: float = 0.1) -> np.ndarray:
    return (scale * np.random.default_rng(sum(shape)).normal(size=shape)).astype(np.float32)


def write_peft(adapter: Adapter, folder: Path) -> None:
    folder.mkdir()
    peft.write(adapter, folder)


def extraction_of(name: str, weights: tuple[WeightExtraction, ...]) -> WeightExtraction:
    return next(weight for weight in weights if weight.name == name)


def dense(adapter: Adapter, target: str) -> np.ndarray:
    low = adapter.deltas[target]
    product: np.ndarray = low.scaling * (low.lora_B.astype(np.float64) @ low.lora_A.astype(np.float64))
    return product


def test_a_change_of_low_rank_comes_out_whole(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    change = noise(16, 2) @ noise(2, 16)
    adapter, report = extract(base, tuned_from(base, tmp_path / "tuned", {QW: change}), ExtractionOptions(rank=2))
    np.testing.assert_allclose(dense(adapter, Q), change, atol=1e-6)
    assert report.error < 1e-4
    assert (len(report.weights), report.unchanged) == (1, 4)


def test_the_error_is_the_true_one_and_the_least(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    changes = {QW: noise(16, 16), KW: noise(8, 16)}
    adapter, report = extract(base, tuned_from(base, tmp_path / "tuned", changes), ExtractionOptions(rank=3))
    for name, narrow in changes.items():
        change = narrow.astype(np.float64)
        s = np.linalg.svd(change, compute_uv=False)
        best = float(np.sqrt(np.sum(s[3:] ** 2) / np.sum(s**2)))
        true = np.linalg.norm(change - dense(adapter, name.removesuffix(".weight"))) / np.linalg.norm(change)
        assert extraction_of(name, report.weights).error == pytest.approx(true, rel=1e-4)
        assert true == pytest.approx(best, rel=1e-3)
    squared_errors = sum(extraction_of(name, report.weights).error ** 2 * np.sum(change**2) for name, change in changes.items())
    assert report.error == pytest.approx(
        (squared_errors / sum(np.sum(change**2) for change in changes.values())) ** 0.5, rel=1e-4
    )


def test_an_energy_takes_the_least_ranks_that_keep_it(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    U, V = (np.linalg.qr(np.random.default_rng(i).normal(size=(16, 16)))[0] for i in (1, 2))
    change = (U * [4, 2, 1, 0.5, *[0.001] * 12] @ V).astype(np.float32)
    for energy, rank in ((0.5, 1), (0.9, 2), (0.95, 3), (1 - 1e-4, 4)):
        tuned = tuned_from(base, tmp_path / f"tuned-{rank}", {QW: change})
        _, report = extract(base, tuned, ExtractionOptions(energy=energy))
        assert extraction_of(QW, report.weights).rank == rank
        assert extraction_of(QW, report.weights).error ** 2 <= 1 - energy + 1e-5
    _, report = extract(base, tmp_path / "tuned-4", ExtractionOptions(energy=1 - 1e-4, limit=2))
    assert extraction_of(QW, report.weights).rank == 2
    assert extraction_of(QW, report.weights).error == pytest.approx((1.25 / 21.25) ** 0.5, rel=1e-3)


def test_what_no_low_rank_delta_can_express_is_reported_or_stored_whole(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    tuned = tuned_from(base, tmp_path / "tuned", {QW: noise(16, 1) @ noise(1, 16), f"{Q}.bias": noise(16)})
    adapter, report = extract(base, tuned, ExtractionOptions(rank=1))
    assert not adapter.replaced
    assert extraction_of(f"{Q}.bias", report.weights).reason
    assert report.error > 0.1
    adapter, report = extract(base, tuned, ExtractionOptions(rank=1, keep_other_tensors=True))
    assert list(adapter.replaced) == [f"{Q}.bias"]
    assert report.error < 1e-4


def test_extracted_and_merged_again_it_is_the_fine_tune(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    changes = {QW: noise(16, 16), KW: noise(8, 16), TABLE: noise(40, 16), "lm_head.weight": noise(40, 16)}
    tuned = tuned_from(base, tmp_path / "tuned", changes)
    adapter, report = extract(base, tuned, ExtractionOptions(rank=16))
    assert report.error < 1e-5
    write_peft(adapter, tmp_path / "adapter")
    merge_into_base([(peft.read(tmp_path / "adapter"), 1)], base, tmp_path / "again")
    for name, tensor in tensors_of(tuned).items():
        np.testing.assert_allclose(tensors_of(tmp_path / "again")[name], tensor, atol=1e-5)


def test_conv1d_weights_are_taken_the_right_way_round(tmp_path: Path) -> None:
    name = "h.0.attn.c_attn.weight"
    base = base_in(tmp_path / "base", dtypes.F32)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    safetensors_file.write(base / "model.safetensors", {name: noise(16, 48)}, {"format": "pt"})
    change = noise(16, 2) @ noise(2, 48)
    adapter, _ = extract(base, tuned_from(base, tmp_path / "tuned", {name: change}), ExtractionOptions(rank=2))
    delta = adapter.deltas["h.0.attn.c_attn"]
    assert isinstance(delta, LowRank)
    assert delta.transposed_base
    assert delta.shape == (48, 16)
    np.testing.assert_allclose(dense(adapter, "h.0.attn.c_attn").T, change, atol=1e-6)


def test_the_same_models_give_the_same_adapter(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    tuned = tuned_from(base, tmp_path / "tuned", {QW: noise(16, 16)})
    first, second = (extract(base, tuned, ExtractionOptions(rank=4))[0].deltas[Q] for _ in range(2))
    assert first.lora_A.tobytes() == second.lora_A.tobytes()
    assert first.lora_B.tobytes() == second.lora_B.tobytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "the same in every weight"),
        ({QW: np.full((16, 16), np.nan, np.float32)}, "NaN or infinity"),
        ({"lm_head.weight": np.ones((41, 16), np.float32)}, "vocabulary was resized"),
    ],
    ids=["the same", "NaN", "resized"],
)
def test_what_is_no_fine_tune_of_the_base_is_refused(tmp_path: Path, changes: dict[str, np.ndarray], words: str) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    with pytest.raises(RefusedError) as caught:
        extract(base, tuned_from(base, tmp_path / "tuned", changes), ExtractionOptions(rank=2))
    assert words in f"{caught.value}"


def test_factors_in_sixteen_bits_report_their_own_error(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    tuned = tuned_from(base, tmp_path / "tuned", {QW: noise(16, 2) @ noise(2, 16)})
    adapter, report = extract(base, tuned, ExtractionOptions(rank=2, dtype="BF16"))
    assert adapter.deltas[Q].lora_A.dtype == dtypes.BF16
    assert 1e-4 < report.error < 1e-2


@pytest.mark.peer
def test_peft_computes_what_the_fine_tune_does(torch: Any, llama: Callable[..., Path], tmp_path: Path) -> None:
    import peft as peer
    from transformers import AutoModelForCausalLM

    base = llama("float32")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name or "lm_head" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape[0], 3) @ torch.randn(3, parameter.shape[1]))
    model.save_pretrained(tmp_path / "tuned")
    adapter, report = extract(base, tmp_path / "tuned", ExtractionOptions(rank=3))
    assert report.error < 1e-4
    write_peft(adapter, tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = peer.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_a_change_from_zero_is_null_in_the_document(tmp_path: Path, run: Run) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    tensors = {**tensors_of(base), f"{Q}.bias": np.zeros(16, np.float32)}
    safetensors_file.write(base / "model.safetensors", tensors, {"format": "pt"})
    tuned_from(base, tmp_path / "tuned", {QW: noise(16, 2) @ noise(2, 16), f"{Q}.bias": noise(16)})
    text = run("extract", tmp_path / "tuned", "--base", base, "--rank", "2", "-o", tmp_path / "out", "--json").stdout
    assert "Infinity" not in text
    assert json.loads(text)["weights"][f"{Q}.bias"]["change"] is None
    assert json.loads(text)["weights"][QW]["change"] > 0
