"""peft and transformers as the oracle: `merge_into_base` writes, bit for bit, what `merge_and_unload` returns.

That holds on CPUs where torch sums a product in the order that `product.product` defines, and elsewhere up to the rounding of
the sums. Above rank 192 that order is another on more CPUs; there the test finds out which, and holds `merge_into_base` to it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks
from adapterhub.merging import merge_into_base
from adapterhub.merging.into_base import product
from adapterhub_converters.bases import read_base
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from tests.support import tiny
from tests.support.torch_order import assert_same_bits, assert_same_merge, sums_as_we_do

pytestmark = pytest.mark.peer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read_all(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("dtype", "shard_size", "config", "saved"),
    [
        ("bfloat16", "5GB", {"r": 16, "target_modules": LINEAR}, "float32"),
        ("bfloat16", "200KB", {"r": 4, "lora_alpha": 7, "target_modules": LINEAR, "use_rslora": True}, "float32"),
        ("float16", "200KB", {"r": 8, "target_modules": LINEAR, "rank_pattern": {"q_proj": 3}}, "bfloat16"),
        ("float32", "5GB", {"r": 5, "target_modules": LINEAR, "alpha_pattern": {"v_proj": 0.3}}, "float32"),
        ("bfloat16", "5GB", {"r": 1, "target_modules": LINEAR, "lora_alpha": -3}, "bfloat16"),
        ("bfloat16", "5GB", {"r": 6, "target_modules": ["embed_tokens", "lm_head"]}, "float32"),
        ("float16", "5GB", {"r": 6, "target_modules": ["embed_tokens", "up_proj"]}, "float32"),
    ],
)
def test_a_merge_equals_merge_and_unload(
    torch: Any,
    llama: Any,
    trained: Any,
    merged_by_peft: Any,
    tmp_path: Path,
    dtype: str,
    shard_size: str,
    config: Any,
    saved: str,
) -> None:
    base = llama(dtype, shard_size=shard_size)
    adapter = trained(base, dtype=saved, **config)
    report = merge_into_base([(peft.read(adapter), 1.0)], base, tmp_path / "out")
    theirs = merged_by_peft(base, adapter)
    assert_same_merge(read_all(tmp_path / "out"), theirs)
    assert len(report.touched) == len(peft.read(adapter).deltas)
    assert all(change.retained is not None and change.retained > 0.9 for change in report.touched.values())


def panel_of_torch(
    torch: Any, left_factor: np.ndarray, right_factor: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> int | None:
    """The number of terms that torch on this CPU adds up before it starts the next sum; None if it uses another order."""
    expected = (torch.from_numpy(left_factor) @ torch.from_numpy(right_factor)).numpy()
    for panel in (192, 384):
        with monkeypatch.context() as patched:
            patched.setattr(product, "PANEL", panel)
            if np.array_equal(product.product(left_factor, right_factor, np.empty_like(expected)), expected):
                return panel
    return None


def test_above_rank_192_a_merge_equals_merge_and_unload_in_the_order_of_sums_of_this_cpu(
    torch: Any, llama: Any, trained: Any, merged_by_peft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = llama("float32")
    adapter = trained(base, dtype="float16", r=200, target_modules=["q_proj"], use_rslora=True)
    ours = peft.read(adapter)
    merge_into_base([(ours, 1.0)], base, tmp_path / "out")
    theirs, before, after = merged_by_peft(base, adapter), read_all(base), read_all(tmp_path / "out")
    factors = [(delta.lora_B.astype(np.float32), delta.lora_A.astype(np.float32)) for delta in ours.deltas.values()]
    (panel,) = {panel_of_torch(torch, *pair, monkeypatch) for pair in factors}
    if panel == product.PANEL:
        assert_same_bits(after, theirs)
    elif panel:
        with monkeypatch.context() as patched:
            patched.setattr(product, "PANEL", panel)
            merge_into_base([(ours, 1.0)], base, tmp_path / "in-the-order-of-torch")
        assert_same_bits(read_all(tmp_path / "in-the-order-of-torch"), theirs)
    for (target, delta), (lora_B, lora_A) in zip(ours.deltas.items(), factors, strict=True):
        name, scaling = f"{target}.weight", delta.scaling
        exact = before[name].double().numpy() + scaling * (lora_B.astype(np.float64) @ lora_A.astype(np.float64))
        error, peft_error = (np.abs(merged_product[name].double().numpy() - exact) for merged_product in (after, theirs))
        # Two chains of 100 terms, their sum, the scale and the addition (Higham 2002, section 3.1), u = 2**-24.
        magnitudes = scaling * (np.abs(lora_B).astype(np.float64) @ np.abs(lora_A))
        assert (error <= 2.0**-24 * (104 * magnitudes + 1.01 * np.abs(exact))).all()
        if panel:  # the longer a chain, the larger its error
            assert np.linalg.norm(error) <= np.linalg.norm(peft_error)


def test_a_copy_of_a_table_next_to_its_delta_changes_nothing(torch: Any, llama: Any, trained: Any, tmp_path: Path) -> None:
    base = llama("bfloat16")
    adapter = peft.read(trained(base, dtype="float32", r=4, target_modules=["embed_tokens", "up_proj"]))
    name = "model.embed_tokens.weight"
    copy = read_all(base)[name].float().numpy()
    merge_into_base([(adapter, 1.0)], base, tmp_path / "without")
    merge_into_base([(dataclasses.replace(adapter, copies={name: copy}), 1.0)], base, tmp_path / "with")
    assert_same_bits(read_all(tmp_path / "with"), read_all(tmp_path / "without"))
    with pytest.raises(RefusedError, match="differs from the base's"):
        merge_into_base([(dataclasses.replace(adapter, copies={name: copy + 1}), 1.0)], base, tmp_path / "other")


def test_vera_equals_merge_and_unload_up_to_its_order_of_rounding(
    torch: Any, llama: Any, merged_by_peft: Any, tmp_path: Path
) -> None:
    import peft as peft_library
    from transformers import AutoModelForCausalLM

    base = llama("float32")
    config = peft_library.VeraConfig(r=8, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = peft_library.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vera_lambda" in name:
                parameter.normal_(0, 0.5)
    model.save_pretrained(tmp_path / "vera")
    adapter = peft.read(tmp_path / "vera", base=read_base(base))
    merge_into_base([(adapter, 1.0)], base, tmp_path / "out")
    theirs = merged_by_peft(base, tmp_path / "vera")
    for name, tensor in read_all(tmp_path / "out").items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pissa_equals_merge_and_unload_up_to_the_rounding_of_its_residual(
    torch: Any, llama: Any, trained: Any, merged_by_peft: Any, tmp_path: Path, dtype: str
) -> None:
    base = llama(dtype)
    # peft begins it anew on the base as it loads it, in the base's own dtype.
    adapter = trained(base, std=0.02, r=4, lora_alpha=6, target_modules=LINEAR, init_lora_weights="pissa")
    report = merge_into_base([(peft.read(adapter), 1.0)], base, tmp_path / "out")
    assert any("plain LoRA of twice the rank" in note for note in report.notes)
    theirs, before = merged_by_peft(base, adapter), read_all(base)
    step = 2.0**-8 if dtype == "bfloat16" else 1e-5  # of each of the two roundings, where we have one
    for name, tensor in read_all(tmp_path / "out").items():
        ours, theirs_merged = tensor.float(), theirs[name].float()
        largest = float(torch.maximum(theirs_merged.abs().max(), before[name].float().abs().max()))
        assert float((ours - theirs_merged).abs().max()) <= 2 * step * largest, name
        assert float((ours - theirs_merged).norm()) <= step * float(theirs_merged.norm()), name
        assert name not in report.touched or float((theirs_merged - before[name].float()).norm()) > 0.05 * float(
            theirs_merged.norm()
        )


def test_two_adapters_equal_peft_merging_one_after_the_other(
    torch: Any, llama: Any, trained: Any, merged_by_peft: Any, tmp_path: Path
) -> None:
    base = llama()
    adapters = [trained(base, name="a", r=8, target_modules=LINEAR), trained(base, name="b", r=4, target_modules=["v_proj"])]
    merge_into_base([(peft.read(adapter), 1.0) for adapter in adapters], base, tmp_path / "out")
    assert_same_merge(read_all(tmp_path / "out"), merged_by_peft(base, *adapters))


def test_transformers_computes_base_plus_adapter_with_the_result(torch: Any, llama: Any, trained: Any, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = llama("float32", shard_size="200KB")
    adapter = trained(base, r=8, target_modules=LINEAR)
    merge_into_base([(peft.read(adapter), 1.0)], base, tmp_path / "out")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)
        bare = plain(ids).logits
        theirs = PeftModel.from_pretrained(plain, adapter)(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (ours - bare).abs().max() > 0.01 * theirs.abs().max()


@pytest.mark.parametrize("stripped", [False, True])
def test_gpt2_stores_its_weights_transposed(
    torch: Any, trained: Any, merged_by_peft: Any, tmp_path: Path, stripped: bool
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from adapterhub_converters.containers import safetensors_file

    torch.manual_seed(0)
    base = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(vocab_size=200, n_positions=32, n_embd=64, n_layer=2, n_head=4)).save_pretrained(base)
    adapter = trained(base, r=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    theirs = merged_by_peft(base, adapter)
    if stripped:  # as the published checkpoint names its tensors
        with safetensors_file.SafetensorsFile(base / "model.safetensors") as file:
            tensors = {name.removeprefix("transformer."): file.tensor(name) for name in file.tensors}
        safetensors_file.write(base / "model.safetensors", tensors, {"format": "pt"})
    report = merge_into_base([(peft.read(adapter), 1.0)], base, tmp_path / "out")
    assert_same_merge(read_all(tmp_path / "out"), theirs)
    assert bool(report.notes) == stripped


def test_dora_differs_from_peft_in_the_last_bit_at_most(
    torch: Any, llama: Any, trained: Any, merged_by_peft: Any, tmp_path: Path
) -> None:
    base = llama("float32")
    adapter = trained(base, r=8, target_modules=LINEAR, use_dora=True)
    merge_into_base([(peft.read(adapter), 1.0)], base, tmp_path / "out")
    theirs = merged_by_peft(base, adapter)
    for name, tensor in read_all(tmp_path / "out").items():
        if sums_as_we_do():
            np.testing.assert_array_max_ulp(tensor.numpy(), theirs[name].numpy(), maxulp=3)
        else:  # where terms cancel, an error of a sum is large beside what is left
            assert float((tensor - theirs[name]).abs().max()) <= 2.0**-21 * float(theirs[name].abs().max()), name


def test_lora_bias_goes_into_the_bias_of_the_base(
    torch: Any, llama: Any, trained: Any, merged_by_peft: Any, tmp_path: Path
) -> None:
    base = llama(attention_bias=True)
    adapter = trained(base, r=8, target_modules=["q_proj", "o_proj"], lora_bias=True)
    merge_into_base([(peft.read(adapter), 1.0)], base, tmp_path / "out")
    assert_same_merge(read_all(tmp_path / "out"), merged_by_peft(base, adapter))


def test_replaced_modules_and_rows(torch: Any, llama: Any, trained: Any, merged_by_peft: Any, tmp_path: Path) -> None:
    base = llama("float32")
    adapter = trained(
        base, r=8, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [3, 250]}
    )
    merge_into_base([(peft.read(adapter), 1.0)], base, tmp_path / "out")
    assert_same_merge(read_all(tmp_path / "out"), merged_by_peft(base, adapter))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trained_bias_and_what_lora_adds_to_it_are_merged_as_by_peft(
    torch: Any, tmp_path: Path, merged_by_peft: Any, dtype: str
) -> None:
    """`bias: all` with `lora_bias`: what LoRA adds was trained on top of the new bias."""
    from peft import LoraConfig, get_peft_model

    model = tiny.model("GPT2LMHeadModel").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], bias="all", lora_bias=True, fan_in_fan_out=True)
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(
                    0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(parameter.dtype)
                )
    wrapped.save_pretrained(tmp_path / "adapter")
    merge_into_base([(peft.read(tmp_path / "adapter"), 1.0)], tmp_path / "base", tmp_path / "out")
    ours, theirs = read_all(tmp_path / "out"), merged_by_peft(tmp_path / "base", tmp_path / "adapter")
    assert_same_merge(ours, {name: theirs[name] for name in ours})


@pytest.mark.parametrize("kind", ["TRAINABLE_TOKENS", "LORA"])
def test_rows_of_tied_tables_are_merged_as_by_peft(torch: Any, tmp_path: Path, merged_by_peft: Any, kind: str) -> None:
    """peft saves those of the tuner TRAINABLE_TOKENS once for each of the tied tables."""
    from peft import LoraConfig, TrainableTokensConfig, get_peft_model

    model = tiny.model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    rows, lora = {"token_indices": [1, 3]}, {"trainable_token_indices": [1, 3], "target_modules": ["q_proj"]}
    wrapped = get_peft_model(model, LoraConfig(**lora) if kind == "LORA" else TrainableTokensConfig(**rows))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_()
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = peft.read(tmp_path / "adapter")
    merge_into_base([(adapter, 1.0)], tmp_path / "base", tmp_path / "out")
    ours, theirs = read_all(tmp_path / "out"), merged_by_peft(tmp_path / "base", tmp_path / "adapter")
    assert_same_bits(ours, {name: theirs[name] for name in ours})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    report = checks.check(tmp_path / "adapter", base=read_base(tmp_path / "base"))
    assert [problem for problem in report.problems if problem.severity == "error"] == []
    if kind == "TRAINABLE_TOKENS":
        changed_rows = dataclasses.replace(adapter.rows["lm_head"], values=adapter.rows["lm_head"].values + 1)
        differing = dataclasses.replace(adapter, rows={**adapter.rows, "lm_head": changed_rows})
        with pytest.raises(RefusedError, match="other rows than those of the base's model"):
            merge_into_base([(differing, 1.0)], tmp_path / "base", tmp_path / "no")
