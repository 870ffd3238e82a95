"""`verify-merge` says of a merged model, made by us, by peft or by a hand that errs, what is in it; and what isn't."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import merge_into_base
from adapterhub.merging.into_base.merge_proof import Proofs, prove
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import convert
from tests.merging.into_base.test_model_merge import K, Q, base_in, low_rank, tensors_of

QW, KW = f"{Q}.weight", f"{K}.weight"
SMALL = Adapter({Q: low_rank(scale=0.05), K: low_rank(8, 16, scale=0.05)})


def by_hand(base: Path, out: Path, change: Callable[[dict[str, np.ndarray]], None], dtype: np.dtype | None = None) -> Path:
    """A merged model as another tool may have written it."""
    tensors = {name: tensor.astype(np.float32) for name, tensor in tensors_of(base).items()}
    change(tensors)
    shutil.copytree(base, out)
    stored = dtype or dtypes.BF16
    safetensors_file.write(out / "model.safetensors", {name: t.astype(stored) for name, t in tensors.items()}, {"format": "pt"})
    return out


def delta(target: str, scale: float = 1) -> np.ndarray:
    low = SMALL.deltas[target]
    return scale * low.scaling * (low.lora_B @ low.lora_A)


def add_both(tensors: dict[str, np.ndarray], scale: float = 1) -> None:
    tensors[QW] += delta(Q, scale)
    tensors[KW] += delta(K, scale)


def verdicts(proofs: Proofs) -> dict[str, str]:
    return {tensor.name: tensor.verdict for tensor in proofs.tensors if tensor.verdict != "untouched"}


def strength(proofs: Proofs, name: str) -> tuple[float, ...]:
    strength_values = next(tensor.strength for tensor in proofs.tensors if tensor.name == name)
    assert strength_values
    return strength_values


def test_our_own_merge_is_proven_to_the_bit(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    merge_into_base([(SMALL, 0.5)], base, tmp_path / "out")
    proof = prove([(SMALL, 0.5)], base, tmp_path / "out")
    assert proof.good
    assert verdicts(proof) == {QW: "exact", KW: "exact"}
    assert strength(proof, QW) == pytest.approx((1.0,), abs=0.05)


@pytest.mark.parametrize("dtype", [dtypes.F32, dtypes.F16], ids=["f32", "f16"])
def test_a_merge_into_another_dtype_is_right_up_to_its_rounding(tmp_path: Path, dtype: np.dtype) -> None:
    base = base_in(tmp_path / "base")
    proof = prove([(SMALL, 1)], base, by_hand(base, tmp_path / "out", add_both, dtype))
    assert proof.good
    assert set(verdicts(proof).values()) <= {"exact", "rounded"}


@pytest.mark.parametrize(
    ("scale", "verdict"), [(2**-0.5, "weaker"), (2**0.5, "stronger"), (0.0, "absent"), (-1.0, "absent")], ids=str
)
def test_another_strength_is_named_and_measured(tmp_path: Path, scale: float, verdict: str) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    by_strength = by_hand(base, tmp_path / "out", lambda tensors: add_both(tensors, scale), dtypes.F32)
    proof = prove([(SMALL, 1)], base, by_strength)
    assert not proof.good
    assert verdicts(proof) == {QW: verdict if scale >= 0 else "weaker", KW: verdict if scale >= 0 else "weaker"}
    assert strength(proof, QW) == pytest.approx((scale,), abs=1e-4)


def test_a_skipped_module_is_absent(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")

    def add_one(tensors: dict[str, np.ndarray]) -> None:
        tensors[QW] += delta(Q)

    proof = prove([(SMALL, 1)], base, by_hand(base, tmp_path / "out", add_one))
    assert not proof.good
    assert verdicts(proof)[KW] == "absent"


def test_what_no_adapter_did_is_seen(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")

    def add_more(tensors: dict[str, np.ndarray]) -> None:
        add_both(tensors)
        tensors["lm_head.weight"][3] *= 1.5
        tensors[QW] += 2 * np.random.default_rng(7).normal(size=(16, 16)).astype(np.float32)

    proof = prove([(SMALL, 1)], base, by_hand(base, tmp_path / "out", add_more))
    assert not proof.good
    assert verdicts(proof)["lm_head.weight"] == "changed"
    assert verdicts(proof)[QW] not in ("exact", "rounded", "near")


def test_two_adapters_are_distinguished(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base", dtypes.F32)
    adapter = Adapter({Q: low_rank(r=3, scale=0.1)})
    two = adapter.deltas[Q]

    def sums(tensors: dict[str, np.ndarray]) -> None:
        tensors[QW] += 0.7 * delta(Q) + 0.15 * two.scaling * (two.lora_B @ two.lora_A)
        tensors[KW] += 0.7 * delta(K)

    proof = prove([(SMALL, 0.7), (adapter, 0.3)], base, by_hand(base, tmp_path / "out", sums, dtypes.F32))
    assert strength(proof, QW) == pytest.approx((1.0, 0.5), abs=1e-3)
    assert verdicts(proof)[QW] == "weaker"
    assert verdicts(proof)[KW] in ("exact", "rounded")
    assert proof.strengths()[1] == pytest.approx((0.5, 0.5, 0.5), abs=1e-3)


def test_what_cannot_be_compared_is_a_finding(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")

    def odd(tensors: dict[str, np.ndarray]) -> None:
        add_both(tensors)
        del tensors[f"{Q}.bias"]
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
        tensors["stranger"] = np.ones(3, np.float32)

    proof = prove([(SMALL, 1)], base, by_hand(base, tmp_path / "out", odd))
    assert not proof.good
    assert {f"{Q}.bias": "missing", "lm_head.weight": "shape", "stranger": "unknown"}.items() <= verdicts(proof).items()


def test_nan_is_never_right(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")

    def nan(tensors: dict[str, np.ndarray]) -> None:
        add_both(tensors)
        tensors[QW][0, 0] = np.nan

    proof = prove([(SMALL, 1)], base, by_hand(base, tmp_path / "out", nan))
    assert verdicts(proof)[QW] == "other"


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    base = base_in(tmp_path / "base")
    with pytest.raises(RefusedError):
        prove([(Adapter({Q: low_rank(8, 8)}), 1)], base, base)
    with pytest.raises(RefusedError, match="is a file, and the base of a comparison is a Hugging Face folder"):
        prove([(SMALL, 1)], base / "model.safetensors", base)


@pytest.mark.peer
@pytest.mark.parametrize(
    "extra", [{}, {"use_dora": True}, {"use_rslora": True, "lora_bias": False}], ids=["lora", "dora", "rslora"]
)
def test_what_peft_merges_is_proven(
    torch: Any, llama: Callable[..., Path], trained: Callable[..., Path], tmp_path: Path, extra: dict[str, Any]
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = llama()
    adapter = trained(base, r=4, target_modules="all-linear", **extra)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tmp_path / "merged")
    proof = prove([(convert.read(adapter), 1)], base, tmp_path / "merged")
    assert proof.good, verdicts(proof)
    assert len(verdicts(proof)) == 14
    if extra.get("use_rslora"):  # the scale that a tool which overlooks rsLoRA would have used
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": False}))
        wrong = prove([(convert.read(adapter), 1)], base, tmp_path / "merged")
        assert {tensor.verdict for tensor in wrong.tensors if tensor.strength} == {"stronger"}
        assert wrong.strengths()[0] == pytest.approx((2.0, 2.0, 2.0), rel=0.02)
