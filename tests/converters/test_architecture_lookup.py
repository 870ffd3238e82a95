"""Every architecture against llama.cpp itself: its conversion of models, and its logits.

With f the real `convert_hf_to_gguf.py`, W the weights of a random model and s·BA the deltas of an adapter on all of them,
f(W + s·BA) − f(W) is what our file of the adapter adds, on every tensor. Nothing of ours is in f or in W + s·BA.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub import checks as compat
from adapterhub_converters.adapter import Adapter, Delta, LowRank, LowRankEmbedding, StackedLowRank
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.architectures.architecture_lookup import Architecture
from adapterhub_converters.bases import BaseSpec, read_base
from adapterhub_converters.containers import gguf_output, safetensors_file
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.containers.gguf_types import MetadataValue
from adapterhub_converters.formats import gguf as gguf_lora
from adapterhub_converters.formats import peft
from tests.conftest import need_module
from tests.support import llama_cpp, tiny
from tests.support.llama_cpp_scripts import Converter

CLASSES = [name for architecture in architecture_lookup.ARCHITECTURES for name in architecture.classes]
TOKENS = [3, 17, 99, 5, 64, 23, 101, 7]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder and GGUF file of a random model of a class."""
    folders: dict[tuple[str, ...], tuple[Path, Path]] = {}

    def model(name: str, converted: Converter, *flags: str, **config: Any) -> tuple[Path, Path]:
        key = (name, *flags, *map(str, config.items()))
        if key not in folders:
            root = tmp_path_factory.mktemp(name)
            tiny.model(name, **config).save_pretrained(root / "hf")
            if name.startswith("Gemma3"):
                # its conversion cuts the table of embeddings to as many rows as there are tokens
                vocabulary = {str(number): number for number in range(tiny.CONFIG["vocab_size"])}
                (root / "hf" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
            folders[key] = root / "hf", converted(root / "hf", root / "base.gguf", *flags)
        return folders[key]

    return model


def deltas(base: BaseSpec, architecture: Architecture, *, skip: str = "nothing") -> Iterator[tuple[str, Delta]]:
    """A random delta on everything that an adapter may change, with another rank and scale for each."""
    rng = np.random.default_rng(7)

    def noise(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * 0.2).astype(np.float32)

    for number, (name, tensor) in enumerate(sorted(base.tensors.items())):
        target, r, alpha = name.removesuffix(".weight"), 2 + number % 3, 3.0 + number % 5
        tied = base.tied and target in (*architecture_lookup.EMBEDDINGS, "lm_head")
        if (
            skip in name
            or tied
            or len(tensor.shape) < 2
            or not architecture.stem(target)
            or architecture.reason_ignored(target)
        ):
            continue
        if architecture.is_stacked(target):
            n, into, out = tensor.shape
            transposed = bool(architecture.experts and architecture.experts.transposed)
            out, into = (out, into) if transposed else (into, out)
            yield target, StackedLowRank(noise(n, r, into), noise(n, out, r), alpha, transposed_base=transposed)
        elif architecture.stem(target) == "token_embd":
            yield target, LowRankEmbedding(noise(r, tensor.shape[0]), noise(tensor.shape[1], r), alpha)
        else:
            out, into = reversed(tensor.shape) if turned(architecture, target) else tensor.shape
            yield target, LowRank(noise(r, into), noise(out, r), alpha, transposed_base=turned(architecture, target))


def turned(architecture: Architecture, target: str) -> bool:
    return architecture.transposed and architecture_lookup.layer_of(target) is not None


def merged(folder: Path, adapter: Adapter, dst: Path, files: Mapping[str, str] | None = None) -> Path:
    """The model with the adapter added to its weights, by the definition of a delta and nothing else.

    `files` has the names in the file of parameters that the adapter calls otherwise.
    """
    shutil.copytree(folder, dst)
    with safetensors_file.SafetensorsFile(folder / "model.safetensors") as file:
        weights = {name: file.tensor(name) for name in file.tensors}
        metadata = file.header.metadata
    for target, delta in adapter.deltas.items():
        change = delta.scaling * (delta.lora_B.astype(np.float64) @ delta.lora_A.astype(np.float64))
        if isinstance(delta, LowRankEmbedding) or getattr(delta, "transposed_base", False):
            change = change.swapaxes(-1, -2)
        name = target if isinstance(delta, StackedLowRank) else f"{target}.weight"
        name = (files or {}).get(name, name)
        weights[name] = (weights[name] + change).astype(np.float32)
    safetensors_file.write(dst / "model.safetensors", weights, metadata)
    return dst


def emitted(path: Path) -> dict[str, np.ndarray]:
    """What a GGUF adapter adds to each tensor, as llama.cpp computes it."""
    with GGUFFile(path) as file:
        tensors = {name: file.tensor(name).astype(np.float64) for name in file.tensors}
        alpha = float(file.header.metadata["adapter.lora.alpha"])
    products: dict[str, np.ndarray] = {}
    for name, lora_a in tensors.items():
        stem = name.removesuffix(".lora_a")
        if stem != name:
            lora_b = tensors[f"{stem}.lora_b"]
            product = lora_a @ lora_b.T if stem == "token_embd.weight" else lora_b @ lora_a
            products[stem] = alpha / lora_b.shape[-1] * product
    return products


def assert_linear(base: Path, changed: Path, adapter: Path) -> float:
    """f(W + s·BA) − f(W) is what the adapter adds; the largest error of any element comes back."""
    adds = emitted(adapter)
    worst = 0.0
    with GGUFFile(base) as before, GGUFFile(changed) as after:
        assert set(adds) <= set(before.tensors)
        for name in before.tensors:
            difference = after.tensor(name).astype(np.float64) - before.tensor(name)
            error = np.abs(difference - adds.get(name, 0.0)).max()
            assert error < 2e-6, name
            worst = max(worst, float(error))
    return worst


def logits_of(folder: Path) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    return logits


def read_back(path: Path, adapter: Adapter) -> None:
    """Reading without a base gives every array back, byte for byte."""
    again = gguf_lora.read(path)
    assert set(again.deltas) == set(adapter.deltas)
    for target, delta in adapter.deltas.items():
        assert again.deltas[target].lora_A.tobytes() == delta.lora_A.tobytes(), target
        assert again.deltas[target].lora_B.tobytes() == delta.lora_B.tobytes(), target
        assert again.deltas[target].scaling == delta.scaling


@pytest.mark.peer
@pytest.mark.parametrize("name", CLASSES)
def test_our_file_adds_what_llama_cpp_s_conversion_makes_of_the_weights(
    tmp_path: Path, converted: Converter, models: Any, name: str
) -> None:
    need_module("llama_cpp_py_sync")
    folder, gguf = models(name, converted)
    base = read_base(folder)
    architecture = architecture_lookup.by_class(name, "test")
    adapter = Adapter(dict(deltas(base, architecture)))
    assert len(adapter.deltas) >= 8
    gguf_lora.write(adapter, tmp_path / "a.gguf", base=base)
    changed = converted(merged(folder, adapter, tmp_path / "merged"), tmp_path / "merged.gguf")
    error = assert_linear(gguf, changed, tmp_path / "a.gguf")

    expected = llama_cpp.logits(changed, TOKENS)
    effect = np.abs(expected - llama_cpp.logits(gguf, TOKENS)).max()
    our_logits = llama_cpp.logits(gguf, TOKENS, tmp_path / "a.gguf")
    off = np.abs(our_logits - expected).max()
    hf = np.abs(logits_of(tmp_path / "merged") - our_logits).max()
    print(f"{name}: linear to {error:.1g}, logits off by {off:.2g} (llama.cpp merged), {hf:.2g} (transformers merged), "
          f"effect {effect:.2g}")  # fmt: skip
    assert effect > 1
    assert off < 1e-3 * max(1, effect)
    assert hf < 5e-3 * max(1, effect)
    if not any(isinstance(delta, StackedLowRank) for delta in adapter.deltas.values()):
        read_back(tmp_path / "a.gguf", adapter)


@pytest.mark.peer
@pytest.mark.parametrize("name", CLASSES)
def test_llama_cpp_computes_what_peft_computes(tmp_path: Path, converted: Converter, models: Any, name: str) -> None:
    import torch

    need_module("llama_cpp_py_sync")
    need_module("peft")
    _, gguf = models(name, converted)
    model = tiny.model(name)
    modules = dict(model.named_modules())
    architecture = architecture_lookup.by_class(name, "test")
    targets = [
        path
        for path, module in modules.items()
        if type(module).__name__ in ("Linear", "Conv1D", "FalconLinear")
        and architecture.stem(path)
        and not architecture.reason_ignored(path)
        and path != "lm_head"
        and not (name.startswith("Deepseek") and ".mlp." in path)  # peft takes shared experts for the routed ones
    ]
    strength = 0.2 if len(targets) > 8 or "llama" in name.lower() else 0.4
    wrapped = tiny.adapter(model, tmp_path / "peft", strength=strength, target_modules=targets, alpha_pattern={"k_proj": 3})
    gguf_lora.write(peft.read(tmp_path / "peft"), tmp_path / "a.gguf", base=read_base(gguf))
    with torch.no_grad():
        expected = wrapped(torch.tensor([TOKENS])).logits[0].float().numpy()
    our_logits = llama_cpp.logits(gguf, TOKENS, tmp_path / "a.gguf")
    effect = np.abs(expected - llama_cpp.logits(gguf, TOKENS)).max()
    print(f"{name}: error {np.abs(our_logits - expected).max():.2g}, effect {effect:.2g}, {len(targets)} modules")
    assert effect > 1
    assert np.abs(our_logits - expected).max() < 5e-3
    again = tmp_path / "again"
    again.mkdir()
    peft.write(gguf_lora.read(tmp_path / "a.gguf"), again)
    for file in (peft.CONFIG, peft.WEIGHTS):
        assert (again / file).read_bytes() == (tmp_path / "peft" / file).read_bytes()


MOE = [name for name in CLASSES if architecture_lookup.by_class(name, "").experts]


@pytest.mark.peer
@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_and_its_gguf_are_one_base(tmp_path: Path, converted: Converter, models: Any, name: str) -> None:
    """Also when transformers saves its own names for what a checkpoint has otherwise, and llama.cpp fuses q, k and v."""
    need_module("transformers")
    folder, gguf = models(name, converted)
    base = read_base(folder)
    shutil.copytree(folder, tmp_path / "own")
    tiny.model(name).save_pretrained(tmp_path / "own", save_original_format=False)
    own_base = read_base(tmp_path / "own")
    assert (own_base.tensors != base.tensors) == (name in MOE and name != "GptOssForCausalLM")
    prints = {base.fingerprint, *(read_base(path).fingerprint for path in (gguf, _fused(name, converted, models)))}
    assert len(prints) == 1
    assert None not in prints
    assert own_base.has_fingerprint(base.fingerprint)


def _fused(name: str, converted: Converter, models: Any) -> Path:
    gguf: Path = models(name, converted, "fuse_qkv")[1]
    return gguf


@pytest.mark.peer
def test_experts_in_four_bits_are_those_of_the_same_base(tmp_path: Path, converted: Converter, models: Any) -> None:
    need_module("transformers")
    folder, gguf = models("GptOssForCausalLM", converted)
    shutil.copytree(folder, tmp_path / "hf")
    with safetensors_file.SafetensorsFile(folder / "model.safetensors") as file:
        weights = {name: file.tensor(name) for name in file.tensors}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, into, out = weights.pop(name).shape
        weights[f"{name}_blocks"] = np.zeros((experts, out, into // 32, 16), np.uint8)
        weights[f"{name}_scales"] = np.full((experts, out, into // 32), 127, np.uint8)
    safetensors_file.write(tmp_path / "hf" / "model.safetensors", weights)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    four_bits = converted(tmp_path / "hf", tmp_path / "mxfp4.gguf")
    bases = [read_base(path) for path in (folder, gguf, tmp_path / "hf", four_bits)]
    assert {base.quantization for base in bases} == {None, "mxfp4"}
    assert len({base.fingerprint for base in bases}) == 1


@pytest.mark.peer
@pytest.mark.parametrize("name", MOE)
def test_a_check_finds_the_experts_of_a_gguf(tmp_path: Path, converted: Converter, models: Any, name: str) -> None:
    need_module("transformers")
    folder, gguf = models(name, converted)
    adapter = Adapter(dict(deltas(read_base(folder), architecture_lookup.by_class(name, ""))))
    peft.write(adapter, tmp_path)
    stack = architecture_lookup.by_class(name, "").experts
    assert stack
    assert any("experts." in target for target in adapter.deltas)
    for base in (folder, gguf):
        assert {problem.code for problem in compat.check(tmp_path, base=read_base(base)).problems} <= {
            "unpinned",
            "old-experts",
            "peft-refuses",  # the routers
        }


@pytest.mark.peer
@pytest.mark.parametrize("name", MOE)
def test_a_check_finds_stacked_experts_however_the_base_has_them(
    tmp_path: Path, converted: Converter, models: Any, name: str
) -> None:
    need_module("transformers")
    _, gguf = models(name, converted)
    tiny.model(name).save_pretrained(tmp_path / "own", save_original_format=False)
    base, architecture = read_base(tmp_path / "own"), architecture_lookup.by_class(name, "")
    stacked = {target: delta for target, delta in deltas(base, architecture) if architecture.is_stacked(target)}
    assert stacked
    for target, delta in stacked.items():
        tensor = read_base(gguf).tensor(target)
        assert tensor
        assert tensor.shape == base.tensors[target].shape, target
        assert tensor.shape[-2:] in (delta.shape[-2:], delta.shape[:-3:-1])


OLD_FALCON = {"new_decoder_architecture": False, "multi_query": True, "num_kv_heads": 1}


@pytest.mark.peer
def test_an_old_falcon_is_linear_and_computed_alike(tmp_path: Path, converted: Converter, models: Any) -> None:
    """Falcon-7B's kind: one norm, one key and value head for all."""
    need_module("llama_cpp_py_sync")
    folder, gguf = models("FalconForCausalLM", converted, **OLD_FALCON)
    base = read_base(folder)
    assert base.fingerprint == read_base(gguf).fingerprint
    adapter = Adapter(dict(deltas(base, architecture_lookup.by_class("FalconForCausalLM", ""))))
    for spec in (base, read_base(gguf)):
        gguf_lora.write(adapter, tmp_path / "a.gguf", base=spec)
        shutil.rmtree(tmp_path / "linear", ignore_errors=True)
        changed = converted(merged(folder, adapter, tmp_path / "linear"), tmp_path / "linear.gguf")
        assert_linear(gguf, changed, tmp_path / "a.gguf")
    assert check(tmp_path, gguf, folder, adapter, base) < 5e-3


def nonzero(adapter: Adapter, *keep: str) -> Adapter:
    return Adapter({target: delta for target, delta in adapter.deltas.items() if any(part in target for part in keep)})


def check(tmp_path: Path, gguf: Path, folder: Path, adapter: Adapter, base: BaseSpec, **options: Any) -> float:
    """llama.cpp's logits with our file against transformers' with the adapter merged; the error comes back."""
    gguf_lora.write(adapter, tmp_path / "a.gguf", base=base, **options)
    expected = logits_of(merged(folder, adapter, tmp_path / "merged"))
    our_logits = llama_cpp.logits(gguf, TOKENS, tmp_path / "a.gguf")
    effect, error = np.abs(expected - llama_cpp.logits(gguf, TOKENS)).max(), np.abs(our_logits - expected).max()
    print(f"error {error:.2g}, effect {effect:.2g}")
    assert effect > 1
    return float(error)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM"])
@pytest.mark.parametrize("keep", [("experts.1.", "experts.2."), ("down_proj", ".w2")])
def test_llama_cpp_runs_experts_of_which_some_have_no_delta(
    tmp_path: Path, converted: Converter, models: Any, name: str, keep: tuple[str, ...]
) -> None:
    need_module("llama_cpp_py_sync")
    folder, gguf = models(name, converted)
    adapter = nonzero(Adapter(dict(deltas(read_base(folder), architecture_lookup.by_class(name, "")))), *keep)
    assert check(tmp_path, gguf, folder, adapter, read_base(gguf)) < 5e-3
    read_back(tmp_path / "a.gguf", adapter)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_llama_cpp_computes_what_peft_computes_with_target_parameters(
    tmp_path: Path, converted: Converter, models: Any, name: str
) -> None:
    import torch

    need_module("llama_cpp_py_sync")
    need_module("peft")
    from peft import LoraConfig, get_peft_model

    _, gguf = models(name, converted)
    names_of = [f"{layer}.mlp.experts.{kind}" for layer in (0, 1) for kind in ("gate_up_proj", "down_proj")]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=names_of, task_type="CAUSAL_LM")
    wrapped = get_peft_model(tiny.model(name), config).eval()
    stacked: dict[str, Delta] = {}
    for path, module in wrapped.named_modules():
        if type(module).__name__ == "ParamWrapper":
            with torch.no_grad():
                for half in (module.lora_A, module.lora_B):
                    half["default"].weight.copy_(torch.randn(half["default"].weight.shape) * 0.2)
            lora_A, lora_B = (half["default"].weight.detach().numpy() for half in (module.lora_A, module.lora_B))
            target = f"{path.removeprefix('base_model.model.').replace('.base_layer', '')}.{module.parameter_name}"
            experts = lora_A.shape[0] // 2  # peft 0.21: A has the experts outermost, B innermost
            stacked_B = np.ascontiguousarray(lora_B.reshape(-1, 2, experts).transpose(2, 0, 1))
            transposed = name == "GptOssForCausalLM"
            stacked[target] = StackedLowRank(lora_A.reshape(experts, 2, -1), stacked_B, 6.0, transposed_base=transposed)
    assert len(stacked) == 4
    gguf_lora.write(Adapter(stacked), tmp_path / "a.gguf", base=read_base(gguf))
    with torch.no_grad():
        expected = wrapped(torch.tensor([TOKENS])).logits[0].float().numpy()
    effect = np.abs(expected - llama_cpp.logits(gguf, TOKENS)).max()
    error = np.abs(llama_cpp.logits(gguf, TOKENS, tmp_path / "a.gguf") - expected).max()
    print(f"{name}: error {error:.2g}, effect {effect:.2g}")
    assert effect > 1
    assert error < 5e-3


SPLIT = [name for name in CLASSES if "self_attn.q_proj" in architecture_lookup.by_class(name, "").linear]


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "keep"),
    [(name, ("q_proj", "k_proj", "v_proj")) for name in SPLIT]
    + [("LlamaForCausalLM", ("q_proj", "v_proj")), ("Qwen2ForCausalLM", ("k_proj",))],
)
def test_llama_cpp_runs_split_projections_on_a_base_that_fuses_them(
    tmp_path: Path, converted: Converter, models: Any, name: str, keep: tuple[str, ...]
) -> None:
    need_module("llama_cpp_py_sync")
    folder, gguf = models(name, converted, "fuse_qkv")
    base = read_base(gguf)
    assert "blk.0.attn_qkv.weight" in base.stored
    adapter = nonzero(Adapter(dict(deltas(read_base(folder), architecture_lookup.by_class(name, "")))), *keep, "o_proj")
    assert check(tmp_path, gguf, folder, adapter, base) < 5e-3
    read_back(tmp_path / "a.gguf", adapter)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"])
def test_llama_cpp_runs_gate_and_up_on_a_base_that_fuses_them(
    tmp_path: Path, converted: Converter, models: Any, name: str
) -> None:
    """Of our architectures llama.cpp loads only DeepSeek's with `ffn_gate_up_exps`."""
    need_module("llama_cpp_py_sync")
    folder, gguf = models(name, converted)
    with GGUFFile(gguf) as file:
        metadata = {key: MetadataValue(file.header.kinds[key], value) for key, value in file.header.metadata.items()}
        tensors = {name: file.tensor(name) for name in file.tensors}
    halves = [tensors.pop(f"blk.1.ffn_{half}_exps.weight") for half in ("gate", "up")]
    tensors["blk.1.ffn_gate_up_exps.weight"] = np.concatenate(halves, axis=1)
    gguf_output.write(tmp_path / "fused.gguf", metadata, tensors)
    base = read_base(tmp_path / "fused.gguf")
    assert base.fingerprint == read_base(folder).fingerprint
    adapter = Adapter(dict(deltas(read_base(folder), architecture_lookup.by_class(name, ""))))
    assert check(tmp_path, tmp_path / "fused.gguf", folder, adapter, base) < 5e-3
    read_back(tmp_path / "a.gguf", adapter)


@pytest.mark.peer
@pytest.mark.parametrize("name", MOE)
def test_llama_cpp_computes_what_peft_computes_on_routers(tmp_path: Path, converted: Converter, models: Any, name: str) -> None:
    """Under the name that transformers 5 has for them, where a LoRA on one is a `target_parameters`."""
    import torch

    need_module("llama_cpp_py_sync")
    need_module("peft")
    folder, gguf = models(name, converted)
    router = "router" if name == "GptOssForCausalLM" else "gate"
    lora_options: dict[str, Any] = {"target_modules": ["o_proj"], "target_parameters": [f"mlp.{router}.weight"]}
    wrapped = tiny.adapter(tiny.model(name), tmp_path / "peft", strength=0.4, **lora_options)
    adapter = peft.read(tmp_path / "peft")
    assert f"model.layers.1.mlp.{router}" in adapter.deltas
    for base in (folder, gguf):
        gguf_lora.write(adapter, tmp_path / "a.gguf", base=read_base(base))
        with torch.no_grad():
            expected = wrapped(torch.tensor([TOKENS])).logits[0].float().numpy()
        our_logits = llama_cpp.logits(gguf, TOKENS, tmp_path / "a.gguf")
        assert np.abs(expected - llama_cpp.logits(gguf, TOKENS)).max() > 0.5
        assert np.abs(our_logits - expected).max() < 5e-3


@pytest.mark.peer
def test_llama_cpp_runs_a_fused_projection_on_a_base_that_splits_it(tmp_path: Path, converted: Converter, models: Any) -> None:
    need_module("llama_cpp_py_sync")
    folder, gguf = models("Phi3ForCausalLM", converted)
    with GGUFFile(gguf) as file:
        metadata = {key: MetadataValue(file.header.kinds[key], value) for key, value in file.header.metadata.items()}
        tensors = {name: file.tensor(name) for name in file.tensors}
    for layer in (0, 1):
        rows = tensors.pop(f"blk.{layer}.attn_qkv.weight")
        for name, part in zip("qkv", np.split(rows, [64, 96]), strict=True):
            tensors[f"blk.{layer}.attn_{name}.weight"] = np.ascontiguousarray(part)
    gguf_output.write(tmp_path / "split.gguf", metadata, tensors)
    adapter = Adapter(dict(deltas(read_base(folder), architecture_lookup.by_class("Phi3ForCausalLM", ""))))
    assert check(tmp_path, tmp_path / "split.gguf", folder, adapter, read_base(tmp_path / "split.gguf")) < 5e-3
    read_back(tmp_path / "a.gguf", adapter)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-4), ("f16", 1e-2), ("bf16", 1e-1), ("q8_0", 3e-1), ("q4_0", 3e-1)])
def test_llama_cpp_runs_every_type(
    tmp_path: Path, converted: Converter, models: Any, name: str, dtype: str, tolerance: float
) -> None:
    """To the rounding of the activations that meet the factors; Mixtral with the last layer's experts alone: a rounded
    number that changes a routing changes everything."""
    need_module("llama_cpp_py_sync")
    need_module("gguf")
    folder, gguf = models(name, converted)
    adapter = Adapter(dict(deltas(read_base(folder), architecture_lookup.by_class(name, ""))))
    adapter = nonzero(adapter, "layers.1.block_sparse_moe.experts") if "Mixtral" in name else adapter
    gguf_lora.write(adapter, tmp_path / "a.gguf", base=read_base(gguf), dtype=dtype)
    runs = gguf_lora.read(tmp_path / "a.gguf")
    expected = logits_of(merged(folder, runs, tmp_path / "merged"))
    error = np.abs(llama_cpp.logits(gguf, TOKENS, tmp_path / "a.gguf") - expected).max()
    print(f"{name} {dtype}: error {error:.2g}")
    assert np.abs(expected - llama_cpp.logits(gguf, TOKENS)).max() > 1
    assert error < tolerance
