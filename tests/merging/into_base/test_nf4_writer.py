"""Merges written in NF4, with bitsandbytes and transformers as the oracle: what they make of the merge in 16 bits."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterhub.merging import Options, merge_into_base, prepare_merge
from adapterhub.merging.into_base.merge_proof import prove
from adapterhub.merging.into_base.nf4_writer import weights_for_nf4
from adapterhub.merging.into_base.read_base import Weight, read_folder
from adapterhub_converters import dtypes
from adapterhub_converters.adapter import Adapter, LowRank
from adapterhub_converters.architectures.whole_models import ARCHITECTURES
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError
from adapterhub_converters.formats import peft
from tests.conftest import Run, need_module
from tests.merging.into_base.test_write_folder import loaded, logits, saved, tensors_of
from tests.support import tiny

pytestmark = pytest.mark.peer

NF4 = Options(requantize="nf4")
STATE = ".quant_state.bitsandbytes__nf4"
Q = "model.layers.0.self_attn.q_proj"
ODD = "model.layers.0.mlp.up_proj"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 40, "dtype": "bfloat16"}


@pytest.fixture
def torch(torch: Any) -> Iterator[Any]:
    """With one thread, whose mean is the definition."""
    need_module("bitsandbytes")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(before)


def settings(dtype: str) -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Equal in names, types and bytes, but for the spaces after a state.

    The map of scales is what `torch.linspace` makes of it, which rounds otherwise on processors without AVX2.
    """
    assert sorted(actual) == sorted(expected)
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype, name
        if name.endswith(STATE):
            assert actual[name].tobytes().rstrip() == array.tobytes(), name
        elif name.endswith(".nested_quant_map"):
            np.testing.assert_allclose(actual[name], array, rtol=2.0**-22, err_msg=name)
        else:
            np.testing.assert_array_equal(actual[name], array, err_msg=name)


MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bf16": ("LlamaForCausalLM", "bfloat16", {}),
    "f16": ("LlamaForCausalLM", "float16", {}),
    "f32": ("LlamaForCausalLM", "float32", {}),
    "tied": ("LlamaForCausalLM", "bfloat16", {"tie_word_embeddings": True}),
    "gemma": ("Gemma2ForCausalLM", "bfloat16", {}),
    "experts": ("Qwen3MoeForCausalLM", "bfloat16", {}),
}


@pytest.mark.parametrize("model_kind", MODELS)
def test_it_is_what_transformers_makes_of_the_merge_in_16_bits(torch: Any, tmp_path: Path, model_kind: str) -> None:
    name, dtype, config = MODELS[model_kind]
    model = tiny.model(name, intermediate_size=128, **config).to(getattr(torch, dtype))
    base = saved(model, tmp_path / "base")
    tiny.adapter(model.float(), tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    adapters = [(peft.read(tmp_path / "adapter"), 1.0)]
    merge_into_base(adapters, base, tmp_path / "plain")
    merge_into_base(adapters, base, tmp_path / "ours", options=NF4)
    theirs = loaded(tmp_path / "plain", dtype=getattr(torch, dtype), quantization_config=settings(dtype))
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = tensors_of(tmp_path / "ours"), tensors_of(tmp_path / "theirs")
    same(ours, expected)
    documents = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("ours", "theirs")]
    assert documents[0] == documents[1]
    our_logits, their_logits = logits(loaded(tmp_path / "ours", dtype=getattr(torch, dtype))), logits(theirs)
    if all(np.array_equal(ours[key], array) for key, array in expected.items() if key.endswith(".nested_quant_map")):
        np.testing.assert_array_equal(our_logits, their_logits)
    else:
        np.testing.assert_allclose(our_logits, their_logits, rtol=0, atol=2.0**-7 * np.abs(their_logits).max())


def test_the_layers_are_those_that_transformers_takes_of_every_known_architecture(torch: Any, tmp_path: Path) -> None:
    import transformers
    from bitsandbytes.nn import Linear4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    folder = read_folder(saved(tiny.model(), tmp_path / "base"))
    for architecture in ARCHITECTURES:
        for name, kind in architecture.classes.items():
            cls = getattr(transformers, name)
            numbers = {**tiny.CONFIG, **tiny.CONFIGS.get(name, {})}
            with torch.device("meta"):
                model = cls(cls.config_class(**{key: value for key, value in numbers.items() if value is not None}))
            weights = {
                path: Weight(path, tuple(parameter.shape), "BF16", tmp_path, 0, 0)
                for path, parameter in model.named_parameters()
            }
            spec = dataclasses.replace(folder.spec, architecture=name, model_type=kind)
            skip = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
            replace_with_bnb_linear(model, modules_to_not_convert=skip, quantization_config=settings("float32"))
            expected = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, Linear4bit)}
            changed_spec = dataclasses.replace(folder, spec=spec)
            vars(changed_spec)["weights"] = weights
            if architecture.transposed or not expected:
                with pytest.raises(AdapterhubError, match="transposed" if architecture.transposed else "no layer of Falcon"):
                    weights_for_nf4(changed_spec)
            else:
                assert weights_for_nf4(changed_spec) == expected, name


def random_base(folder: Path, **config: Any) -> Path:
    """A weight of several tiles, and one whose rows and whose last block are not full."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    tensors = {
        f"{Q}.weight": rng.normal(size=(1100, 1000)).astype(dtypes.BF16),
        f"{ODD}.weight": rng.normal(size=(33, 77)).astype(dtypes.BF16),
        "model.norm.weight": np.ones(77, dtypes.F32),
    }
    safetensors_file.write(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def deltas(share: float = 0.05) -> Adapter:
    rng = np.random.default_rng(2)
    factors = {name: (rng.normal(size=(4, n)), rng.normal(size=(m, 4))) for name, m, n in ((Q, 1100, 1000), (ODD, 33, 77))}
    return Adapter(
        {
            name: LowRank(lora_A.astype(np.float32), (share / 2 * lora_B).astype(np.float32), alpha=4)
            for name, (lora_A, lora_B) in factors.items()
        }
    )


@pytest.mark.parametrize("shard_size", [None, 400_000])
def test_weights_of_any_shape_in_tiles_and_in_shards(torch: Any, tmp_path: Path, shard_size: int | None) -> None:
    from bitsandbytes import functional

    base, weighted = random_base(tmp_path / "base"), [(deltas(), 1.0)]
    report = merge_into_base(weighted, base, tmp_path / "out", options=dataclasses.replace(NF4, shard_size=shard_size))
    merge_into_base(weighted, base, tmp_path / "plain")
    expected = {}
    for name, array in tensors_of(tmp_path / "plain").items():
        if name == "model.norm.weight":
            expected[name] = array
            continue
        weight = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        expected[name] = packed.numpy()
        expected |= {f"{name}.{leaf}": tensor.numpy() for leaf, tensor in state.as_dict(packed=True).items()}
    tensors = tensors_of(tmp_path / "out")
    same(tensors, expected)
    assert report.size == sum(array.nbytes for array in tensors.values())
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safetensors_file.SafetensorsFile(path) as file:
            aligned = [tensor.offset - file.header.data_start for tensor in file.tensors.values() if tensor.dtype == "F32"]
        assert not any(offset % 4 for offset in aligned)  # torch maps them
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == bool(shard_size)
    if shard_size:
        document = json.loads(index.read_text())
        assert document["weight_map"].keys() == tensors.keys()
        assert document["metadata"]["total_size"] == report.size


def test_a_base_without_double_quantization_gets_it_where_it_changes(torch: Any, tmp_path: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    model = tiny.model(hidden_size=128, intermediate_size=128).to(torch.bfloat16)
    quantization = settings("bfloat16")
    quantization.bnb_4bit_use_double_quant = False
    loaded(saved(model, tmp_path / "plain"), dtype=torch.bfloat16, quantization_config=quantization).save_pretrained(
        tmp_path / "base"
    )
    tiny.adapter(model.float(), tmp_path / "adapter", target_modules=["q_proj"], strength=0.2)
    adapters = [(peft.read(tmp_path / "adapter"), 1.0)]
    report = merge_into_base(adapters, tmp_path / "base", tmp_path / "out", options=NF4)
    states = {name: array for name, array in tensors_of(tmp_path / "out").items() if name.endswith("nested_absmax")}
    assert states.keys() == {f"{name}.nested_absmax" for name in report.touched}
    verdict_by_name = {tensor.name: tensor.verdict for tensor in prove(adapters, tmp_path / "base", tmp_path / "out").tensors}
    assert {verdict_by_name[name] for name in report.touched} == {"exact"}
    merge_into_base(adapters, tmp_path / "base", tmp_path / "floats", options=Options(dequantize=True))
    plain = tensors_of(tmp_path / "floats")
    out = loaded(tmp_path / "out", dtype=torch.bfloat16)
    for name, module in out.named_modules():
        if hasattr(module, "compute_dtype"):
            back = dequantize_4bit(module.weight.data, module.weight.quant_state).float().numpy()
            off = np.linalg.norm(back - plain[f"{name}.weight"].astype(np.float32)) / np.linalg.norm(back)
            assert off < (0.12 if f"{name}.weight" in report.touched else 1e-2), name


@pytest.fixture
def in_nf4(torch: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A base in NF4 that transformers wrote, and an adapter that changes a layer of it by half."""
    model = tiny.model(hidden_size=128, intermediate_size=128).to(torch.bfloat16)
    base = saved(model, tmp_path / "base")
    quantized = loaded(base, dtype=torch.bfloat16, quantization_config=settings("bfloat16"))
    quantized.save_pretrained(tmp_path / "nf4")
    tiny.adapter(model.float(), tmp_path / "adapter", target_modules=["q_proj"], strength=0.2)
    return tmp_path / "nf4", tmp_path / "adapter"


def test_of_a_base_in_nf4_only_what_changes_is_quantized_again(torch: Any, tmp_path: Path, in_nf4: tuple[Path, Path]) -> None:
    from bitsandbytes import functional

    base, adapter = in_nf4
    adapters = [(peft.read(adapter), 1.0)]
    merge_into_base(adapters, base, tmp_path / "plain", options=Options(dequantize=True))
    report = merge_into_base(adapters, base, tmp_path / "out", options=NF4)
    assert len(report.touched) == 2
    before, plain, requantized = (tensors_of(tmp_path / name) for name in ("nf4", "plain", "out"))
    changed = {name for name in before if name.split(".weight")[0].endswith("q_proj")}
    for name, array in before.items():
        assert name in changed or np.array_equal(requantized[name], array), name
    for name in report.touched:
        weight = torch.from_numpy(plain[name].view(np.int16)).view(torch.bfloat16)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        np.testing.assert_array_equal(requantized[name], packed.numpy())
        np.testing.assert_array_equal(requantized[f"{name}.absmax"], state.absmax.numpy())
        assert json.loads(requantized[f"{name}{STATE}"].tobytes())["nested_offset"] == state.offset.item()
    assert (base / "config.json").read_text().count("bnb_4bit") == (tmp_path / "out" / "config.json").read_text().count(
        "bnb_4bit"
    )
    assert np.isfinite(logits(loaded(tmp_path / "out", dtype=torch.bfloat16))).all()
    with pytest.raises(AdapterhubError, match="the base is in NF4 already"):
        prepare_merge(adapters, base, dataclasses.replace(NF4, dtype="f16"))


def test_of_a_base_in_fp8_what_it_stands_for_is_quantized(torch: Any, tmp_path: Path) -> None:
    from bitsandbytes import functional

    rng = np.random.default_rng(0)
    scale = np.array([0.5], np.float32)
    tensors = {f"{name}.weight": rng.normal(size=(33, 77)).astype(dtypes.NUMPY["F8_E4M3"]) for name in (Q, ODD)}
    tensors |= {f"{Q}.weight_scale": scale, f"{ODD}.weight_scale": scale}
    (tmp_path / "base").mkdir()
    safetensors_file.write(tmp_path / "base" / "model.safetensors", tensors, {"format": "pt"})
    compressed_config = {**CONFIG, "quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(compressed_config))
    weighted = [(Adapter({ODD: deltas().deltas[ODD]}), 1.0)]
    merge_into_base(weighted, tmp_path / "base", tmp_path / "plain", options=Options(dequantize=True))
    merge_into_base(weighted, tmp_path / "base", tmp_path / "out", options=NF4)
    quantized = tensors_of(tmp_path / "out")
    for name, array in tensors_of(tmp_path / "plain").items():
        weight = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        np.testing.assert_array_equal(quantized[name], packed.numpy())
        np.testing.assert_array_equal(quantized[f"{name}.absmax"], state.absmax.numpy())
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bnb_4bit_compute_dtype"]) == ("bitsandbytes", "bfloat16")


def test_a_merge_into_nf4_that_erases_the_adapter_is_refused(tmp_path: Path, in_nf4: tuple[Path, Path]) -> None:
    base, adapter = in_nf4
    adapters = [(peft.read(adapter), 0.03)]
    with pytest.raises(AdapterhubError, match=r"q_proj.weight: .*% of the adapter's change .* kept") as caught:
        prepare_merge(adapters, base, NF4)
    assert (caught.value.exit_code, caught.value.code) == (6, "adapter-lost-in-nf4")
    forced = prepare_merge(adapters, base, dataclasses.replace(NF4, force=True)).report
    assert forced.warnings
    assert all(change.quantized and change.retained is not None and change.retained < 0.9 for change in forced.touched.values())


@pytest.mark.parametrize("share", [0.05, 0.005])
def test_a_small_change_of_full_precision_is_kept_in_nf4(tmp_path: Path, share: float) -> None:
    report = prepare_merge([(deltas(share), 1.0)], random_base(tmp_path / "base"), NF4).report
    change = report.touched[f"{Q}.weight"]
    assert change.quantized
    assert change.relative == pytest.approx(share, rel=0.1)
    assert change.retained == pytest.approx(1, abs=max(0.02, change.uncertainty))
    assert change.uncertainty < 0.2
    assert not report.warnings


def test_trained_in_nf4_the_errors_are_those_of_the_result(tmp_path: Path) -> None:
    weighted = [(deltas(), 1.0)]
    options = dataclasses.replace(NF4, trained_in="nf4")
    change = prepare_merge(weighted, random_base(tmp_path / "base"), options).report.touched[f"{Q}.weight"]
    assert change.original is not None
    assert 0.05 < change.original < 0.15
    with pytest.raises(AdapterhubError, match="of the adapter's change would be kept"):
        prepare_merge(weighted, tmp_path / "base", dataclasses.replace(options, as_trained=True))


def test_verify_merge_proves_it(torch: Any, tmp_path: Path, in_nf4: tuple[Path, Path]) -> None:
    quantized, folder = in_nf4
    adapters = [(peft.read(folder), 1.0)]
    for base in (tmp_path / "base", quantized):
        out = tmp_path / f"{base.name}-out"
        merge_into_base(adapters, base, out, options=NF4)
        proof = prove(adapters, base, out)
        assert proof.good, [tensor for tensor in proof.tensors if not tensor.good]
        assert Counter(tensor.verdict for tensor in proof.tensors if tensor.strength) == {"exact": 2}
        assert {tensor.verdict for tensor in prove(adapters, base, base).tensors if not tensor.good} == {"absent"}
    assert read_base(tmp_path / "base-out").fingerprint == read_base(tmp_path / "base").fingerprint


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "stores its weights transposed"),
        ({"architectures": ["FalconForCausalLM"], "model_type": "falcon"}, "no layer of Falcon"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "are not known"),
    ],
)
def test_where_the_layers_are_not_known_it_is_refused(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    with pytest.raises(AdapterhubError, match=says) as caught:
        prepare_merge([(deltas(), 1.0)], random_base(tmp_path / "base", **config), NF4)
    assert caught.value.exit_code == 6


def test_bitsandbytes_form_of_a_transposed_weight_is_refused(tmp_path: Path) -> None:
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    base = random_base(
        tmp_path / "base", architectures=["GPT2LMHeadModel"], model_type="gpt2", quantization_config=quantization
    )
    with pytest.raises(AdapterhubError, match="transposed") as caught:
        prepare_merge([(deltas(), 1.0)], base, Options(dequantize=True))
    assert caught.value.exit_code == 6


def test_the_command_its_plan_and_its_recipe(run: Run, tmp_path: Path) -> None:
    random_base(tmp_path / "base")
    (tmp_path / "a").mkdir()
    peft.write(deltas(), tmp_path / "a")
    command = ("merge", "a", "--into", "base", "--requantize", "nf4")
    plan = json.loads(run(*command, "-o", "out", "--dry-run", "--json").stdout)
    assert not (tmp_path / "out").exists()
    assert run(*command, "-o", "out").returncode == 0
    assert plan["size"] == sum(array.nbytes for array in tensors_of(tmp_path / "out").values())
    run(*command, "--recipe-only", "-o", "out.json")
    run("rebuild", "out.json", "--adapter", "a", "-o", "again")
    for path in (tmp_path / "out").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["options"]["requantize"] == "nf4"
    assert any("sample" in file for file in document["output"]["files"])
