"""litgpt's adapters: its deltas on its own model, q, k and v one after another, and the way back to PEFT byte for byte."""

from __future__ import annotations

import itertools
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from adapterhub_converters.adapter import Adapter
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError
from adapterhub_converters.formats import convert, peft
from adapterhub_converters.formats.trainers import litgpt
from tests.conftest import Run
from tests.converters import trained
from tests.converters.trained import LLAMA, K, Q, V, tensors_of

ATTENTION = "transformer.h.0.attn.qkv"


written = partial(trained.written, "litgpt")


# --- without litgpt


def test_queries_keys_and_values_are_consecutive(tmp_path: Path) -> None:
    adapter = trained.full()
    tensors = tensors_of(path := written(adapter, tmp_path / "a.safetensors"))
    np.testing.assert_array_equal(tensors[f"{ATTENTION}.lora_A"], np.concatenate([adapter.deltas[t].lora_A for t in (Q, K, V)]))
    np.testing.assert_array_equal(tensors[f"{ATTENTION}.lora_B"], np.concatenate([adapter.deltas[t].lora_B for t in (Q, K, V)]))
    assert trained.settings_of(path)["lora_key"] is True


@given(adapter=trained.adapters())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_function_is_the_same_whatever_was_filled_or_multiplied_in(
    tmp_path_factory: pytest.TempPathFactory, adapter: Adapter
) -> None:
    folder = tmp_path_factory.mktemp("t")
    plain = trained.stripped(written(adapter, folder / "a.safetensors"))
    options = trained.settings_of(folder / "a.safetensors")
    (folder / "hyperparameters.yaml").write_text("".join(f"{key}: {str(value).lower()}\n" for key, value in options.items()))
    trained.assert_same(litgpt.read(plain, base=LLAMA), adapter, rtol=2e-6)


def test_an_alpha_that_is_no_whole_number_is_multiplied_in(tmp_path: Path) -> None:
    report = trained.there_and_back(trained.full("q_proj", alpha=2.5), tmp_path, "litgpt")
    assert "alpha 2.5 is not a whole number: the file has 2" in report.notes


HYPER = """model_name: x
data:
  lora_alpha: 99
lora_r: 2
lora_alpha: 4 # said
lora_query: true
lora_key: false
lora_value: true
"""


@pytest.mark.parametrize("yaml", [None, HYPER])
def test_the_options_tell_q_k_and_v_apart(tmp_path: Path, yaml: str | None) -> None:
    plain = trained.stripped(written(trained.full("q_proj", "v_proj"), tmp_path / "a.safetensors"))
    if yaml:
        (tmp_path / "hyperparameters.yaml").write_text(yaml)
        trained.assert_same(litgpt.read(plain, base=LLAMA), trained.full("q_proj", "v_proj"))
        return
    with pytest.raises(RefusedError) as caught:
        litgpt.read(plain, base=LLAMA, alpha=4)
    assert "qkv: may be q and k or q and v. Put litgpt's hyperparameters.yaml next to it" in str(caught.value)


def test_all_three_need_no_options(tmp_path: Path) -> None:
    plain = trained.stripped(written(trained.full(), tmp_path / "a.safetensors"))
    trained.assert_same(litgpt.read(plain, base=LLAMA, alpha=4), trained.full())


def test_a_file_that_litgpt_made_adds_what_litgpt_merged(tmp_path: Path) -> None:
    tensors = tensors_of(
        Path(__file__).parent / "golden/made_by_litgpt.safetensors"
    )  # of 0.5.13: one layer of `merged`, q and v
    lora = {name.removeprefix("lora/"): array for name, array in tensors.items() if name.startswith("lora/")}
    safetensors_file.write(tmp_path / "a.safetensors", lora, {"format": "pt"})
    (tmp_path / "hyperparameters.yaml").write_text("lora_r: 2\nlora_alpha: 5\nlora_query: true\nlora_value: true\n")
    dense = trained.dense(litgpt.read(tmp_path / "a.safetensors", base=LLAMA))
    assert {f"added/{target}" for target in dense} == {name for name in tensors if name.startswith("added/")}
    for target, array in dense.items():
        np.testing.assert_allclose(array, tensors[f"added/{target}"], atol=2e-5, err_msg=target)


PAIR = {f"{ATTENTION}.lora_A": np.ones((6, 16), np.float32), f"{ATTENTION}.lora_B": np.ones((32, 2), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "yaml", "says"),
    [
        (PAIR, "", "its alpha is not recorded anywhere, and the scale depends on it. Give the alpha"),
        ({**PAIR, f"{ATTENTION}.lora_B": np.ones((30, 2), np.float32)}, "lora_alpha: 4", "do not match the heads of this base"),
        ({**PAIR, f"{ATTENTION}.lora_B": np.ones((32, 4), np.float32)}, "lora_alpha: 4", "are not a pair"),
        (PAIR, "lora_alpha: 4\nlora_r: 3", "rank 2 by its tensors, but 3 in the config next to the file"),
        (PAIR, "lora_alpha: 4\nlora_query: true", "do not match q of this base"),
        ({f"{ATTENTION}.lora_A": np.ones((6, 16), np.float32)}, "", "has lora_A alone; its counterpart is missing"),
        ({**PAIR, "transformer.h.0.mlp.fc.lora_A": np.ones((2, 16), np.float32)}, "", "tensor 'transformer.h.0.mlp.fc.lora_A'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path: Path, tensors: dict[str, np.ndarray], yaml: str, says: str) -> None:
    safetensors_file.write(tmp_path / "a.safetensors", tensors)
    (tmp_path / "hyperparameters.yaml").write_text(yaml)
    with pytest.raises(AdapterhubError) as caught:
        litgpt.read(tmp_path / "a.safetensors", base=LLAMA)
    assert isinstance(caught.value, FormatError | RefusedError)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "base", "says"),
    [
        (trained.full(), None, "depend on the base. Name its base model"),
        (trained.full(), trained.base("Phi3ForCausalLM"), "no verified mapping to litgpt's names"),
        (Adapter({Q: trained.delta(magnitude=np.ones(16))}), LLAMA, "q_proj: DoRA cannot be expressed in litgpt's adapters"),
    ],
)
def test_what_litgpt_cannot_express_is_refused_by_name(tmp_path: Path, adapter: Adapter, base: Any, says: str) -> None:
    with pytest.raises(RefusedError) as caught:
        litgpt.write(adapter, tmp_path / "a.safetensors", base=base)
    assert says in str(caught.value)


def test_the_pickle_it_saves_is_taken_on_request(tmp_path: Path, run: Run) -> None:
    torch = pytest.importorskip("torch")
    plain = trained.stripped(written(trained.full(), tmp_path / "a.safetensors"))
    folder = tmp_path / "final"
    folder.mkdir()
    state = {name: torch.from_numpy(array.copy()) for name, array in tensors_of(plain).items()}
    torch.save({"model": state}, folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_text(
        "lora_r: 2\nlora_alpha: 4\nlora_query: true\nlora_key: true\nlora_value: true\n"
    )
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **trained.CONFIG})
    )
    refusal = run("convert", folder, tmp_path / "no", "--to", "peft", "--base", model, code=6).stderr
    assert "lit_model.pth.lora: a pickle can run code" in refusal
    run("convert", folder, tmp_path / "peft", "--to", "peft", "--base", model, "--unsafe-pickle")
    trained.assert_same(peft.read(tmp_path / "peft"), trained.full())


# --- with litgpt


def merged(enabled: tuple[bool, bool, bool], kind: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """The LoRA of litgpt's own tiny model, what it adds to the weights under Hugging Face's names, and its options."""
    pytest.importorskip("litgpt.lora", reason="litgpt isn't installed: tests/peers has it [make test-peers]")
    import torch
    from litgpt.lora import GPT, Config, lora_filter, merge_lora_weights
    from litgpt.scripts import convert_lit_checkpoint

    options = dict(zip(("lora_query", "lora_key", "lora_value"), enabled, strict=True))
    numbers: dict[str, Any] = {
        "n_layer": 2, "n_head": 4, "n_query_groups": 2, "head_size": 4, "n_embd": 16, "intermediate_size": 24, "vocab_size": 20,
        "padded_vocab_size": 20, "block_size": 32, "bias": False, "parallel_residual": False, "rotary_percentage": 1.0,
        "norm_class_name": "RMSNorm", "mlp_class_name": kind, "lora_r": 2, "lora_alpha": 5, "lora_projection": True,
        "lora_mlp": True, "lora_head": True, **options,
    }  # fmt: skip
    config = Config(**numbers)
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.data.normal_()
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def hf(whole: dict[str, Any]) -> dict[str, np.ndarray]:
        bare = {name.replace(".linear.", "."): value for name, value in whole.items() if not lora_filter(name, value)}
        weights_by_name: dict[str, Any] = {}
        convert_lit_checkpoint.copy_weights_llama(config, weights_by_name, bare)
        return {name: value.detach().numpy().copy() for name, value in weights_by_name.items()}

    before = hf(state)
    merge_lora_weights(model)
    after = hf(dict(model.state_dict()))
    lora = {name: value.numpy() for name, value in state.items() if lora_filter(name, value)}
    return lora, {name: after[name] - before[name] for name in before}, {"lora_r": 2, "lora_alpha": 5, **options}


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["LLaMAMLP", "GemmaMLP"])
@pytest.mark.parametrize("enabled", [flags for flags in itertools.product((True, False), repeat=3) if any(flags)])
def test_the_deltas_are_what_litgpt_merges(tmp_path: Path, enabled: tuple[bool, bool, bool], kind: str) -> None:
    lora, added, options = merged(enabled, kind)
    safetensors_file.write(tmp_path / "a.safetensors", lora, {"format": "pt"})
    (tmp_path / "hyperparameters.yaml").write_text("".join(f"{key}: {str(value).lower()}\n" for key, value in options.items()))
    adapter = litgpt.read(tmp_path / "a.safetensors", base=LLAMA)
    dense = trained.dense(adapter)
    for name, array in added.items():
        target = name.removesuffix(".weight")
        np.testing.assert_allclose(dense.pop(target, np.zeros_like(array)), array, atol=2e-5, err_msg=target)
    assert not dense


NUMBERS: dict[str, Any] = {
    "n_layer": 2, "n_head": 4, "n_query_groups": 2, "head_size": 4, "n_embd": 16, "intermediate_size": 24, "vocab_size": 20,
    "padded_vocab_size": 20, "block_size": 32, "bias": False, "parallel_residual": False, "rotary_percentage": 1.0,
    "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "norm_eps": 1e-5, "lora_r": 2, "lora_alpha": 5,
    "lora_query": True, "lora_key": True, "lora_value": True, "lora_projection": True, "lora_mlp": True, "lora_head": True,
}  # fmt: skip
# By the class in transformers: litgpt's own numbers and what it converts weights with.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "Llama": ({}, "copy_weights_llama"),
    "Qwen2": ({"attn_bias": True}, "copy_weights_qwen_2_5"),
    "Qwen3": ({"norm_qk": True}, "copy_weights_qwen_3"),
    "Gemma": (
        {"name": "Gemma", "mlp_class_name": "GemmaMLP", "scale_embeddings": True, "gelu_approximate": "tanh"},
        "copy_weights_llama",
    ),
}


@pytest.mark.peer
@pytest.mark.parametrize("kind", MODELS)
def test_transformers_computes_with_the_deltas_what_litgpt_computes(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("litgpt.lora", reason="litgpt isn't installed: tests/peers has it [make test-peers]")
    import torch
    import transformers
    from litgpt.lora import GPT, Config, lora_filter
    from litgpt.scripts import convert_lit_checkpoint

    model_numbers, copy = MODELS[kind]
    config = Config(**NUMBERS | model_numbers)
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    state = model.state_dict()
    safetensors_file.write(tmp_path / "a.safetensors", {k: v.numpy() for k, v in state.items() if lora_filter(k, v)})
    weights: dict[str, Any] = {}
    bare = {name.replace(".linear.", "."): value for name, value in state.items() if not lora_filter(name, value)}
    getattr(convert_lit_checkpoint, copy)(config, weights, bare)
    adapter = litgpt.read(tmp_path / "a.safetensors", base=trained.base(f"{kind}ForCausalLM"), alpha=5)
    for target, delta in adapter.deltas.items():
        weights[f"{target}.weight"] = weights[f"{target}.weight"] + torch.from_numpy(
            delta.scaling * delta.lora_B @ delta.lora_A
        )
    numbers = {**trained.CONFIG, "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    numbers = {key: value for key, value in numbers.items() if kind != "Qwen2" or key != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    build, make = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForCausalLM")
    hf_model = make(build(**numbers, rope_parameters=rope))
    hf_model.load_state_dict(weights, strict=True)
    ids = torch.tensor([[1, 5, 7, 3, 9, 2, 11, 4]])
    with torch.no_grad():
        torch.testing.assert_close(hf_model.eval()(ids).logits, model.eval()(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.peer
def test_litgpt_loads_what_we_write(tmp_path: Path) -> None:
    lora, _, _ = merged((True, True, True), "LLaMAMLP")
    convert.convert(trained.folder(trained.full(), tmp_path / "source"), tmp_path / "a.safetensors", to="litgpt", base=LLAMA)
    tensors = tensors_of(tmp_path / "a.safetensors")
    assert {name: array.shape for name, array in tensors.items()} == {name: array.shape for name, array in lora.items()}


@pytest.mark.peer
@pytest.mark.parametrize("enabled", [flags for flags in itertools.product((True, False), repeat=3) if any(flags)])
def test_the_module_of_before_is_read_as_litgpt_had_it(tmp_path: Path, enabled: tuple[bool, bool, bool]) -> None:
    pytest.importorskip("litgpt.lora", reason="litgpt isn't installed: tests/peers has it [make test-peers]")
    import litgpt as maker

    if (
        getattr(maker, "__file__", "")
        and "attn = LoRAQKVLinear" not in Path(sys.modules["litgpt.lora"].__file__ or "").read_text()
    ):
        pytest.skip("this litgpt is not one of before 0.5.7")
    import torch

    model = sys.modules["litgpt.lora"].LoRAQKVLinear(
        16, 32, head_size=4, n_head=4, n_query_groups=2, r=2, lora_alpha=5, enable_lora=enabled, bias=False
    )
    torch.manual_seed(0)
    model.lora_A.data.normal_()
    model.lora_B.data.normal_()
    fused = model.get_lora_AB().detach().numpy().reshape(2, 4, 4, 16)
    parts = {Q: fused[:, :2], K: fused[:, 2], V: fused[:, 3]}
    stem = "transformer.h.0.attn.attn"
    lora = {f"{stem}.lora_{half}": getattr(model, f"lora_{half}").detach().numpy() for half in "AB"}
    safetensors_file.write(tmp_path / "a.safetensors", lora)
    flags = zip(("lora_query", "lora_key", "lora_value"), enabled, strict=True)
    (tmp_path / "hyperparameters.yaml").write_text("".join(f"{key}: {str(value).lower()}\n" for key, value in flags))
    dense = trained.dense(litgpt.read(tmp_path / "a.safetensors", base=LLAMA, alpha=5))
    for target, part in parts.items():
        expected = part.reshape(-1, 16)
        np.testing.assert_allclose(dense.get(target, np.zeros_like(expected)), expected, atol=2e-5, err_msg=target)
