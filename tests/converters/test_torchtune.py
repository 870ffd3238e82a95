"""torchtune's own adapters: its deltas on its own model, its export, and the way back to PEFT byte for byte."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from adapterhub_converters.adapter import Adapter, Loss, Meta
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError
from adapterhub_converters.formats import convert, peft
from adapterhub_converters.formats.trainers import torchtune
from tests.conftest import Run
from tests.converters import trained
from tests.converters.trained import LLAMA, K, Q, metadata_of, tensors_of

QWEN = trained.base("Qwen2ForCausalLM")


written = partial(trained.written, "torchtune")


# --- without torchtune


def test_q_and_k_have_the_order_of_metas_rows(tmp_path: Path) -> None:
    tensors = tensors_of(written(trained.full(), tmp_path / "a.safetensors"))
    # The two halves of each of 4 heads of 4 rows alternate: 0, 2, 1, 3.
    rows = [head * 4 + row for head in range(4) for row in (0, 2, 1, 3)]
    source = trained.full().deltas
    np.testing.assert_array_equal(tensors["layers.0.attn.q_proj.lora_b.weight"], source[Q].lora_B[rows])
    np.testing.assert_array_equal(tensors["layers.0.attn.k_proj.lora_b.weight"], source[K].lora_B[rows[:8]])
    np.testing.assert_array_equal(tensors["layers.0.attn.q_proj.lora_a.weight"], source[Q].lora_A)
    np.testing.assert_array_equal(tensors["output.lora_b.weight"], source["lm_head"].lora_B)


def test_qwen2_is_not_turned(tmp_path: Path) -> None:
    tensors = tensors_of(written(trained.full(), tmp_path / "a.safetensors", QWEN))
    np.testing.assert_array_equal(tensors["layers.0.attn.q_proj.lora_b.weight"], trained.full().deltas[Q].lora_B)


def test_it_reads_to_the_same_function_without_what_rides_along(tmp_path: Path) -> None:
    adapter = trained.full(alpha=5, r=3)
    plain = trained.stripped(written(adapter, tmp_path / "a.safetensors"))
    trained.assert_same(torchtune.read(plain, base=LLAMA, alpha=5), adapter)


@given(adapter=trained.adapters())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_function_is_the_same_whatever_was_filled_or_multiplied_in(
    tmp_path_factory: pytest.TempPathFactory, adapter: Adapter
) -> None:
    path = tmp_path_factory.mktemp("t") / "a.safetensors"
    plain = trained.stripped(written(adapter, path))
    alpha = trained.settings_of(path)["lora_alpha"]
    trained.assert_same(torchtune.read(plain, base=LLAMA, alpha=alpha), adapter, rtol=2e-6)


def test_dora_goes_there_and_back(tmp_path: Path) -> None:
    deltas = {t: trained.delta(t, magnitude=np.arange(out, dtype=np.float32) + 1) for t, (out, _) in trained.TARGETS.items()}
    report = trained.there_and_back(Adapter(deltas), tmp_path, "torchtune")
    assert report.worst == Loss.EXACT
    magnitude = tensors_of(tmp_path / "there")["layers.0.attn.q_proj.magnitude"]
    assert magnitude[:4].tolist() == [1, 3, 2, 4]


def test_layers_without_a_delta_get_one_of_zero(tmp_path: Path) -> None:
    report = torchtune.write(Adapter({Q: trained.delta(Q)}), tmp_path / "a.safetensors", base=LLAMA)
    assert not tensors_of(tmp_path / "a.safetensors")["layers.1.attn.q_proj.lora_b.weight"].any()
    assert "1 modules without a delta get zeros" in " ".join(report.notes)


def test_the_source_config_is_ignored_after_a_tensor_has_changed(tmp_path: Path) -> None:
    path = written(trained.full(), tmp_path / "a.safetensors")
    tensors, metadata = tensors_of(path), metadata_of(path)
    tensors["layers.0.attn.q_proj.lora_a.weight"] *= 2
    safetensors_file.write(path, tensors, metadata)
    again = torchtune.read(path, base=LLAMA)
    assert again.source is None
    assert again.notes == (
        "the tensors or their scale have changed since the conversion, so the source's config in the file was ignored",
    )
    np.testing.assert_array_equal(again.deltas[Q].lora_A, 2 * trained.delta(Q).lora_A)


def test_alpha_comes_from_the_config_that_torchtune_writes_next_to_it(tmp_path: Path) -> None:
    plain = trained.stripped(written(trained.full(alpha=6), tmp_path / "a.safetensors"))
    (tmp_path / "adapter_config.json").write_text(
        '{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "peft_type": "LORA"}'
    )
    trained.assert_same(torchtune.read(plain, base=LLAMA), trained.full(alpha=6))


def test_a_file_that_torchtune_made_is_read_as_torchtune_exported_it(tmp_path: Path) -> None:
    tensors = tensors_of(Path(__file__).parent / "golden/made_by_torchtune.safetensors")  # of 0.6.1, one layer of `tuned`
    state = {name.removeprefix("adapter/"): array for name, array in tensors.items() if name.startswith("adapter/")}
    safetensors_file.write(tmp_path / "a.safetensors", state, {"format": "pt"})
    convert.convert(tmp_path / "a.safetensors", tmp_path / "peft", to="peft", base=LLAMA, alpha=5)
    ours = tensors_of(tmp_path / "peft" / peft.WEIGHTS)
    assert {f"peft/{name}": array.tobytes() for name, array in ours.items()} == {
        name: array.tobytes() for name, array in tensors.items() if name.startswith("peft/")
    }


@pytest.mark.parametrize(
    ("adapter", "base", "says"),
    [
        (trained.full(), None, "depend on the base. Name its base model"),
        (trained.full(), trained.base("Phi3ForCausalLM"), "Phi3ForCausalLM has no verified mapping to torchtune's names"),
        (trained.full(), trained.base(num_hidden_layers=1), "model.layers.1.mlp.down_proj: the base has 1 layers"),
        (Adapter({}), LLAMA, "there is no low-rank delta to write"),
        (Adapter({Q: trained.delta(bias=np.ones(16))}), LLAMA, "q_proj: a bias cannot be expressed in torchtune's adapters"),
        (Adapter({Q: trained.delta(), K: trained.delta(K, magnitude=np.ones(8))}), LLAMA, "DoRA on all modules or on none"),
        (Adapter({Q: trained.delta(magnitude=np.ones(16))}), LLAMA, "layers.1.self_attn.q_proj: has no delta"),
        (
            Adapter({Q: trained.delta(magnitude=np.ones(16))}),
            QWEN,
            "q_proj: DoRA on a module with a bias rescales the bias too",
        ),
        (trained.full("lm_head"), dataclasses.replace(LLAMA, tied=True), "lm_head: the base ties it to the embedding table"),
        (Adapter({"model.embed_tokens": trained.delta()}), LLAMA, "not a module that torchtune is known to have LoRA on"),
        (
            Adapter({Q: trained.delta()}, replaced={"lm_head.weight": np.ones((2, 2))}),
            LLAMA,
            "a replaced parameter cannot be expressed",
        ),
        (Adapter({Q: trained.delta()}, meta=Meta(init="olora")), LLAMA, "its factors were initialized with olora"),
    ],
)
def test_what_torchtune_cannot_express_is_refused_by_name(tmp_path: Path, adapter: Adapter, base: Any, says: str) -> None:
    with pytest.raises(RefusedError) as caught:
        torchtune.write(adapter, tmp_path / "a.safetensors", base=base)
    assert says in str(caught.value)


PAIR = {
    "layers.0.attn.q_proj.lora_a.weight": np.ones((2, 16), np.float32),
    "layers.0.attn.q_proj.lora_b.weight": np.ones((16, 2), np.float32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (PAIR, "its alpha is not recorded anywhere, and the scale depends on it. Give the alpha"),
        ({**PAIR, "layers.0.attn.q_proj.lora_b.weight": np.ones((12, 2), np.float32)}, "12 rows do not match 4 heads"),
        ({**PAIR, "layers.0.attn.q_proj.lora_b.weight": np.ones((16, 3), np.float32)}, "are not a pair"),
        ({**PAIR, "layers.0.attn.q_proj.magnitude": np.ones(3, np.float32)}, "not one number for each of 16 rows"),
        ({"layers.0.attn.q_proj.lora_a.weight": np.ones((2, 16), np.float32)}, "its counterpart is missing"),
        ({**PAIR, "decoder.layers.0.attn.q_proj.lora_a.weight": np.ones((2, 16), np.float32)}, "tensor 'decoder.layers.0"),
        ({**PAIR, "layers.0.attn.q_proj.lora_a.weight": np.ones((2, 16), np.int8)}, "which is not a factor"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path: Path, tensors: dict[str, np.ndarray], says: str) -> None:
    safetensors_file.write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterhubError) as caught:
        torchtune.read(tmp_path / "a.safetensors", base=LLAMA, alpha=None if tensors is PAIR else 4)
    assert isinstance(caught.value, FormatError | RefusedError)
    assert (caught.value.code == "alpha-required") == (tensors is PAIR)
    assert says in str(caught.value)


def test_another_alpha_than_the_recorded_one_is_refused(tmp_path: Path) -> None:
    plain = trained.stripped(written(trained.full(alpha=6), tmp_path / "a.safetensors"))
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6, "peft_type": "LORA"}')
    with pytest.raises(RefusedError, match=r"its recorded alpha is 6, not 4\. Leave out alpha") as caught:
        torchtune.read(plain, base=LLAMA, alpha=4)
    assert caught.value.code == "alpha-recorded"
    assert set(torchtune.read(plain, base=LLAMA, alpha=6).deltas) == set(trained.TARGETS)


def test_peft_reads_what_was_turned_back(tmp_path: Path) -> None:
    plain = trained.stripped(written(trained.full(), tmp_path / "a.safetensors"))
    convert.convert(plain, tmp_path / "peft", to="peft", base=LLAMA, alpha=4)
    trained.assert_same(peft.read(tmp_path / "peft"), trained.full())


def test_the_pickle_it_saves_is_taken_on_request(tmp_path: Path, run: Run) -> None:
    torch = pytest.importorskip("torch")
    plain = trained.stripped(written(trained.full(alpha=6), tmp_path / "a.safetensors"))
    folder = tmp_path / "epoch_0"
    folder.mkdir()
    torch.save({name: torch.from_numpy(array.copy()) for name, array in tensors_of(plain).items()}, folder / "adapter_model.pt")
    (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "peft_type": "LORA"}')
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **trained.CONFIG})
    )
    arguments = ("convert", folder / "adapter_model.pt", tmp_path / "peft", "--to", "peft", "--base", model)
    assert "a pickle can run code" in run(*arguments, code=6).stderr
    assert (
        "is in torchtune, which scales by alpha / r. Leave it out"
        in run(*arguments, "--unsafe-pickle", "--rslora", code=2).stderr
    )
    run(*arguments, "--unsafe-pickle")
    trained.assert_same(peft.read(tmp_path / "peft"), trained.full(alpha=6))


# --- with torchtune


def tuned(kind: str, *, dora: bool = False) -> tuple[Any, Any]:
    """torchtune's own tiny model with a LoRA on every module, of random numbers, and its adapter's state."""
    pytest.importorskip("torchtune.models", reason="torchtune isn't installed: tests/peers has it [make test-peers]")
    import torch
    from torchtune.models.llama2._component_builders import lora_llama2
    from torchtune.models.qwen2._component_builders import lora_qwen2
    from torchtune.modules.peft import get_adapter_params

    common: dict[str, Any] = {
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True, "vocab_size": 20,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 16, "intermediate_dim": 24, "max_seq_len": 32,
        "lora_rank": 2, "lora_alpha": 5, "use_dora": dora,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "qwen2":
        model = lora_qwen2(**common, tie_word_embeddings=False, rope_base=1e4, norm_eps=1e-5)
    else:
        model = lora_llama2(**common, apply_lora_to_output=True)
    for parameter in model.parameters():
        parameter.data.normal_()
    state = {name: value.detach().clone() for name, value in get_adapter_params(model).items()}
    return model, state


def numpy_of(state: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in state.items()}


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_deltas_are_what_torchtune_merges(tmp_path: Path, kind: str, *, dora: bool) -> None:
    model, state = tuned(kind, dora=dora)
    from torchtune.models import convert_weights
    from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
    from torchtune.modules.peft import get_merged_lora_ckpt

    safetensors_file.write(tmp_path / "a.safetensors", numpy_of(state), {"format": "pt"})
    spec = LLAMA if kind == "llama" else QWEN
    if dora and kind == "qwen2":
        with pytest.raises(RefusedError, match="k_proj: DoRA on a module with a bias rescales the bias too"):
            torchtune.read(tmp_path / "a.safetensors", base=spec, alpha=5)
        return
    adapter = torchtune.read(tmp_path / "a.safetensors", base=spec, alpha=5)
    assert len(adapter.deltas) == (15 if kind == "llama" else 14)

    whole = {name: value.detach().clone() for name, value in model.state_dict().items()}
    bare = {name: value for name, value in whole.items() if name not in state}
    merged = get_merged_lora_ckpt({name: value.clone() for name, value in whole.items()}, rank=2, alpha=5)
    to_hf: Any = convert_weights.tune_to_hf if kind == "llama" else qwen2_tune_to_hf
    numbers = {"num_heads": 4, "num_kv_heads": 2, "dim": 16, "head_dim": 4}
    before, after = (numpy_of(to_hf(part, **numbers)) for part in (bare, merged))
    for target, delta in adapter.deltas.items():
        added = delta.scaling * delta.lora_B @ delta.lora_A
        base = before[f"{target}.weight"]
        if delta.magnitude is not None:
            whole_weight = base + added
            added = delta.magnitude[:, None] * whole_weight / np.linalg.norm(whole_weight, axis=1, keepdims=True) - base
        np.testing.assert_allclose(after[f"{target}.weight"] - base, added, atol=2e-5, err_msg=target)


@pytest.mark.peer
@pytest.mark.parametrize(("kind", "dora"), [("llama", False), ("llama", True), ("qwen2", False)])
def test_transformers_computes_with_the_deltas_what_torchtune_computes(tmp_path: Path, kind: str, *, dora: bool) -> None:
    model, state = tuned(kind, dora=dora)
    import torch
    import transformers
    from torchtune.models import convert_weights
    from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf

    for name, parameter in model.named_parameters():
        parameter.data.mul_(0.3)
        state.update({name: parameter.data.clone()} if name in state else {})
    safetensors_file.write(tmp_path / "a.safetensors", numpy_of(state), {"format": "pt"})
    adapter = torchtune.read(tmp_path / "a.safetensors", base=LLAMA if kind == "llama" else QWEN, alpha=5)
    bare = {name: value for name, value in model.state_dict().items() if name not in state}
    to_hf: Any = convert_weights.tune_to_hf if kind == "llama" else qwen2_tune_to_hf
    weights = to_hf(bare, num_heads=4, num_kv_heads=2, dim=16, head_dim=4)
    for target, delta in adapter.deltas.items():
        whole = weights[f"{target}.weight"] + torch.from_numpy(delta.scaling * delta.lora_B @ delta.lora_A)
        if delta.magnitude is not None:
            whole = torch.from_numpy(delta.magnitude)[:, None] * whole / whole.norm(dim=1, keepdim=True)
        weights[f"{target}.weight"] = whole
    config = {**trained.CONFIG, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    config = {key: value for key, value in config.items() if kind == "llama" or key != "head_dim"}
    names = ("LlamaConfig", "LlamaForCausalLM") if kind == "llama" else ("Qwen2Config", "Qwen2ForCausalLM")
    build, make = (getattr(transformers, name) for name in names)
    hf_model = make(build(**config, rope_parameters={"rope_type": "default", "rope_theta": 1e4}))
    hf_model.load_state_dict(weights, strict=True)
    ids = torch.tensor([[1, 5, 7, 3, 9, 2, 11, 4]])
    with torch.no_grad():
        torch.testing.assert_close(hf_model.eval()(ids).logits, model.eval()(ids), atol=2e-6, rtol=1e-5)


@pytest.mark.peer
def test_its_export_to_peft_is_ours(tmp_path: Path) -> None:
    _, state = tuned("llama")
    from torchtune.models import convert_weights

    safetensors_file.write(tmp_path / "a.safetensors", numpy_of(state), {"format": "pt"})
    convert.convert(tmp_path / "a.safetensors", tmp_path / "peft", to="peft", base=LLAMA, alpha=5)
    theirs = convert_weights.tune_to_peft_adapter_weights(state, num_heads=4, num_kv_heads=2, dim=16, head_dim=4)
    ours = tensors_of(tmp_path / "peft" / peft.WEIGHTS)
    assert set(ours) == set(theirs)
    assert all(ours[name].tobytes() == value.contiguous().numpy().tobytes() for name, value in theirs.items())


@pytest.mark.peer
def test_torchtune_loads_what_we_write(tmp_path: Path) -> None:
    _, state = tuned("llama")
    from torchtune.training.checkpointing._utils import safe_torch_load

    model, _ = tuned("llama")
    written(trained.full(alpha=5), tmp_path / "a.safetensors")
    loaded = safe_torch_load(tmp_path / "a.safetensors")
    assert set(loaded) == set(state)
    missing, unexpected = model.load_state_dict(loaded, strict=False)
    assert not unexpected
    assert not set(missing) & set(state)
