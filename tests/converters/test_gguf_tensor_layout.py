"""Experts, fused projections and types of numbers in GGUF adapters: what is where, and that all of it comes back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters import formats
from adapterhub_converters.adapter import Adapter, Delta, Loss, LowRank, StackedLowRank
from adapterhub_converters.architectures import architecture_lookup
from adapterhub_converters.bases import BaseSpec, BaseTensor, canonical_names
from adapterhub_converters.containers import gguf_output, gguf_types
from adapterhub_converters.containers.gguf_file import GGUFFile
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError, UsageError
from adapterhub_converters.formats import gguf, peft
from adapterhub_converters.formats.gguf import writer
from tests.conftest import need_module

D, FF = 32, 48


def base(kind: str = "MixtralForCausalLM", model_type: str = "mixtral", **config: Any) -> BaseSpec:
    numbers = {
        "num_hidden_layers": 2, "hidden_size": D, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "num_local_experts": 4, **config,
    }  # fmt: skip
    return BaseSpec("base", "hf", kind, model_type, numbers)


def low(out: int, into: int, *, r: int = 2, seed: int = 0, dtype: Any = np.float32, alpha: float = 4.0) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(rng.normal(size=(r, into)).astype(dtype), rng.normal(size=(out, r)).astype(dtype), alpha)


def expert(number: int, name: str, layer: int = 0) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{name}"


def write(path: Path, adapter: Adapter, spec: BaseSpec, **options: Any) -> dict[str, np.ndarray]:
    gguf.write(adapter, path, base=spec, **options)
    with GGUFFile(path) as file:
        return {name: file.tensor(name) for name in file.tensors}


def same(first: Adapter, second: Adapter) -> None:
    assert set(first.deltas) == set(second.deltas)
    for target, delta in first.deltas.items():
        read_delta = second.deltas[target]
        for mine, theirs in ((delta.lora_A, read_delta.lora_A), (delta.lora_B, read_delta.lora_B)):
            assert mine.dtype == theirs.dtype, target
            assert mine.tobytes() == theirs.tobytes(), target
        assert read_delta.scaling == pytest.approx(delta.scaling), target


def without_source_config(path: Path, **keep: gguf_types.MetadataValue) -> Path:
    with GGUFFile(path) as file:
        kept_metadata = {
            key: gguf_types.MetadataValue(file.header.kinds[key], value)
            for key, value in file.header.metadata.items()
            if not key.startswith("adapterhub.")
        }
        tensors = {name: file.tensor(name) for name in file.tensors}
    gguf_output.write(path, kept_metadata | keep, tensors)
    return path


# One delta of rank 1, one of rank 4, one in 16 bits, one expert without any.
UNEVEN = Adapter(
    {
        expert(0, "w1"): low(FF, D, r=1, seed=1),
        expert(1, "w1"): low(FF, D, r=4, seed=2, alpha=7.0),
        expert(3, "w1"): low(FF, D, r=3, seed=3, dtype=ml_dtypes.bfloat16),
        expert(1, "w2"): low(D, FF, r=2, seed=4),
        "model.layers.1.self_attn.q_proj": low(32, D, seed=5),
    }
)


def test_experts_are_stacked_with_zeros_for_what_has_no_delta(tmp_path: Path) -> None:
    tensors = write(tmp_path / "a.gguf", UNEVEN, base())
    with GGUFFile(tmp_path / "a.gguf") as file:
        alpha = file.header.metadata["adapter.lora.alpha"]
    assert set(tensors) == {
        f"blk.{stem}.weight.lora_{half}" for stem in ("0.ffn_gate_exps", "0.ffn_down_exps", "1.attn_q") for half in "ab"
    }
    lora_a, lora_b = (tensors[f"blk.0.ffn_gate_exps.weight.lora_{half}"] for half in "ab")
    assert (lora_a.shape, lora_b.shape) == ((4, 4, D), (4, FF, 4))
    for number in range(4):
        runs = alpha / 4 * lora_b[number].astype(np.float64) @ lora_a[number].astype(np.float64)
        delta = UNEVEN.deltas.get(expert(number, "w1"))
        if delta is None:
            assert not lora_a[number].any()
            assert not runs.any()
        else:
            expected = delta.scaling * delta.lora_B.astype(np.float64) @ delta.lora_A.astype(np.float64)
            np.testing.assert_allclose(runs, expected, rtol=1e-5, atol=1e-7)


def test_experts_come_back_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", UNEVEN, base())
    same(UNEVEN, gguf.read(tmp_path / "a.gguf"))
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    peft.write(UNEVEN, tmp_path / "one")
    peft.write(gguf.read(tmp_path / "a.gguf"), tmp_path / "two")
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_experts_without_a_source_config_are_read_as_modules(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", UNEVEN, base())
    again = gguf.read(without_source_config(tmp_path / "a.gguf"), base=base())
    assert set(again.deltas) == set(UNEVEN.deltas)
    for target, delta in UNEVEN.deltas.items():
        read_delta = again.deltas[target]
        np.testing.assert_allclose(product(read_delta), product(delta), rtol=1e-5, atol=1e-6)


def product(delta: Delta) -> np.ndarray:
    result: np.ndarray = delta.scaling * delta.lora_B.astype(np.float64) @ delta.lora_A.astype(np.float64)
    return result


@given(
    ranks=st.dictionaries(st.integers(0, 5), st.integers(1, 5), min_size=1),
    alphas=st.lists(st.sampled_from([1.0, 3.0, 8.0, 0.1]), min_size=6, max_size=6),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_any_ranks_and_scales_of_experts_come_back(
    tmp_path_factory: pytest.TempPathFactory, ranks: dict[int, int], alphas: list[float], dtype: Any
) -> None:
    path = tmp_path_factory.mktemp("experts") / "a.gguf"
    adapter = Adapter({expert(n, "w3"): low(FF, D, r=r, seed=n, alpha=alphas[n], dtype=dtype) for n, r in ranks.items()})
    write(path, adapter, base(num_local_experts=6))
    same(adapter, gguf.read(path))


def stack(out: int, into: int, *, experts: int = 4, r: int = 2, **fields: Any) -> StackedLowRank:
    rng = np.random.default_rng(3)
    lora_A, lora_B = rng.normal(size=(experts, r, into)), rng.normal(size=(experts, out, r))
    return StackedLowRank(lora_A.astype(np.float32), lora_B.astype(np.float32), 6.0, **fields)


GATE_UP, DOWN = (f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate_up", "down"))


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (("MixtralForCausalLM", "mixtral"), (slice(0, FF), slice(FF, None))),
        (("GptOssForCausalLM", "gpt_oss"), (slice(0, None, 2), slice(1, None, 2))),
    ],
    ids=["halves", "interleaved"],
)
def test_gate_and_up_of_one_parameter_are_two_tensors(tmp_path: Path, kind: tuple[str, str], rows: Any) -> None:
    gate_up, down = stack(2 * FF, D), stack(D, FF)
    tensors = write(tmp_path / "a.gguf", Adapter({GATE_UP: gate_up, DOWN: down}), base(*kind))
    for name, row in zip(("gate", "up"), rows, strict=True):
        assert np.array_equal(tensors[f"blk.0.ffn_{name}_exps.weight.lora_a"], gate_up.lora_A)
        assert np.array_equal(tensors[f"blk.0.ffn_{name}_exps.weight.lora_b"], gate_up.lora_B[:, row])
    assert np.array_equal(tensors["blk.0.ffn_down_exps.weight.lora_b"], down.lora_B)


@pytest.mark.parametrize("shared", [True, False])
def test_experts_without_a_source_config_are_one_parameter_where_there_are_no_modules(tmp_path: Path, shared: bool) -> None:
    spec = base("GptOssForCausalLM", "gpt_oss")
    gate_up = stack(2 * FF, D)
    tensors = write(tmp_path / "a.gguf", Adapter({GATE_UP: gate_up}), spec)
    name = "blk.0.ffn_up_exps.weight.lora_a"
    if not shared:
        tensors[name] = tensors[name] + 1
        metadata = {
            "general.architecture": gguf_types.string_value("gpt-oss"),
            "general.type": gguf_types.string_value("adapter"),
        }
        metadata |= {"adapter.type": gguf_types.string_value("lora"), "adapter.lora.alpha": gguf_types.f32_value(6.0)}
        gguf_output.write(tmp_path / "a.gguf", metadata, tensors)
    read_delta = gguf.read(without_source_config(tmp_path / "a.gguf"), base=spec).deltas[GATE_UP]
    assert isinstance(read_delta, StackedLowRank)
    assert read_delta.transposed_base
    assert read_delta.r == (2 if shared else 4)
    for number, half in enumerate(("gate", "up")):
        lora_a, lora_b = (tensors[f"blk.0.ffn_{half}_exps.weight.lora_{side}"] for side in "ab")
        np.testing.assert_allclose(product(read_delta)[:, number::2], 3.0 * (lora_b @ lora_a), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", ["0.18.1", "0.19.0", "0.19.1"])
def test_parameters_of_experts_come_back_as_the_folder_they_came_from(tmp_path: Path, version: str) -> None:
    """Whatever peft wrote them, and although the base that told the factors apart isn't there."""
    import json

    square = dataclasses.replace(
        base(), tensors={GATE_UP: BaseTensor((4, 2 * FF, D), "F32"), DOWN: BaseTensor((4, D, FF), "F32")}
    )
    (tmp_path / "one").mkdir()
    peft.write(
        Adapter({GATE_UP: stack(2 * FF, D, transposed_base=False), DOWN: stack(D, FF, transposed_base=False)}), tmp_path / "one"
    )
    config = json.loads((tmp_path / "one" / peft.CONFIG).read_text())
    (tmp_path / "one" / peft.CONFIG).write_text(json.dumps({**config, "peft_version": version}))
    source = peft.read(tmp_path / "one", base=square)
    gguf.write(source, tmp_path / "a.gguf", base=base())
    (tmp_path / "two").mkdir()
    again = gguf.read(tmp_path / "a.gguf")
    same(source, again)
    peft.write(again, tmp_path / "two")
    for name in (peft.CONFIG, peft.WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_names_that_a_trainer_gave_its_tensors_come_back(tmp_path: Path) -> None:
    from adapterhub_converters.containers import safetensors_file

    (tmp_path / "one").mkdir()
    peft.write(Adapter({"model.layers.0.mlp.up_proj": low(FF, D)}), tmp_path / "one")
    with safetensors_file.SafetensorsFile(tmp_path / "one" / peft.WEIGHTS) as file:
        tensors = {f"base_model.model.{name}": file.tensor(name) for name in file.tensors}
    safetensors_file.write(tmp_path / "one" / peft.WEIGHTS, tensors, {"format": "pt"})
    write(tmp_path / "a.gguf", peft.read(tmp_path / "one"), base("LlamaForCausalLM", "llama"))
    (tmp_path / "two").mkdir()
    peft.write(gguf.read(tmp_path / "a.gguf"), tmp_path / "two")
    assert (tmp_path / "one" / peft.WEIGHTS).read_bytes() == (tmp_path / "two" / peft.WEIGHTS).read_bytes()


QKV = {"q": 32, "k": 16, "v": 16}


def in_gguf(spec: BaseSpec, **shapes: tuple[int, ...]) -> BaseSpec:
    """The spec of a GGUF file with these tensors in each layer."""
    stored = {f"blk.{layer}.{name}.weight": BaseTensor(shape, "F32") for layer in (0, 1) for name, shape in shapes.items()}
    tensors = canonical_names.rename_gguf(architecture_lookup.by_class(spec.architecture, ""), stored, spec.config)
    return dataclasses.replace(spec, kind="gguf", tensors=tensors, stored=stored)


def fused_base(rows: int = 64, **config: Any) -> BaseSpec:
    return in_gguf(base("LlamaForCausalLM", "llama", **config), attn_qkv=(rows, D))


@pytest.mark.parametrize("projections", ["qkv", "qv", "q", "k", "v"])
def test_split_projections_go_where_the_base_fuses_them_and_come_back(tmp_path: Path, projections: str) -> None:
    adapter = Adapter(
        {
            f"model.layers.0.self_attn.{name}_proj": low(QKV[name], D, r=2 + number, seed=number, alpha=3.0 + number)
            for number, name in enumerate(projections)
        }
    )
    tensors = write(tmp_path / "a.gguf", adapter, fused_base())
    assert set(tensors) == {"blk.0.attn_qkv.weight.lora_a", "blk.0.attn_qkv.weight.lora_b"}
    assert tensors["blk.0.attn_qkv.weight.lora_b"].shape == (64, sum(2 + n for n in range(len(projections))))
    same(adapter, gguf.read(tmp_path / "a.gguf"))

    again = gguf.read(without_source_config(tmp_path / "a.gguf"), base=base("LlamaForCausalLM", "llama"))
    assert len(again.deltas) == 3
    for target, delta in again.deltas.items():
        expected = product(adapter.deltas[target]) if target in adapter.deltas else np.zeros(delta.shape)
        np.testing.assert_allclose(product(delta), expected, rtol=1e-5, atol=1e-5)


def test_assumptions_about_a_missing_gguf_are_reported(tmp_path: Path) -> None:
    adapter, llama = Adapter({"model.layers.0.self_attn.q_proj": low(32, D)}), base("LlamaForCausalLM", "llama")
    says = "for a GGUF of the base in which q, k, v, gate and up are separate tensors"
    assert any(says in note for note in gguf.write(adapter, tmp_path / "a.gguf", base=llama).notes)
    assert gguf.write(adapter, tmp_path / "b.gguf", base=fused_base()).notes == ()


@pytest.mark.parametrize("parts", [("w1", "w3"), ("w1",), ("w3", "w2"), "stack"])
def test_gate_and_up_go_where_the_base_fuses_them_and_come_back(tmp_path: Path, parts: Any) -> None:
    spec = in_gguf(base(), ffn_gate_up_exps=(4, 2 * FF, D), ffn_down_exps=(4, D, FF))
    shapes = {"w1": (FF, D), "w3": (FF, D), "w2": (D, FF)}
    adapter = Adapter({expert(n, name): low(*shapes[name], seed=n) for n in (0, 2) for name in parts if parts != "stack"})
    adapter = adapter if adapter.deltas else Adapter({GATE_UP: stack(2 * FF, D)})
    tensors = write(tmp_path / "a.gguf", adapter, spec)
    assert "blk.0.ffn_gate_up_exps.weight.lora_a" in tensors
    same(adapter, gguf.read(tmp_path / "a.gguf"))
    again = gguf.read(without_source_config(tmp_path / "a.gguf"), base=base())
    for target, delta in again.deltas.items():
        number, name = target.split(".")[-2:]
        expected = product(adapter.deltas[target]) if target in adapter.deltas else np.zeros(delta.shape)
        if parts == "stack":
            expected = product(adapter.deltas[GATE_UP])[int(number)][slice(0, FF) if name == "w1" else slice(FF, None)]
        np.testing.assert_allclose(product(delta), expected, rtol=1e-5, atol=1e-5)


def test_a_fused_projection_goes_where_the_base_splits_it_and_comes_back(tmp_path: Path) -> None:
    spec = in_gguf(base("Phi3ForCausalLM", "phi3"), **{f"attn_{name}": (rows, D) for name, rows in QKV.items()})
    delta = low(64, D)
    adapter = Adapter({"model.layers.0.self_attn.qkv_proj": delta})
    written = write(tmp_path / "a.gguf", adapter, spec)
    assert len(written) == 6
    start = 0
    for name, rows in QKV.items():
        assert np.array_equal(written[f"blk.0.attn_{name}.weight.lora_a"], delta.lora_A)
        assert np.array_equal(written[f"blk.0.attn_{name}.weight.lora_b"], delta.lora_B[start : start + rows])
        start += rows
    same(adapter, gguf.read(tmp_path / "a.gguf"))


ONE = {expert(0, "w1"): low(FF, D)}


@pytest.mark.parametrize(
    ("adapter", "spec", "says"),
    [
        (Adapter({expert(4, "w1"): low(FF, D)}), base(), "experts.4.w1: the base has 4 experts"),
        (Adapter(ONE), base(num_local_experts=None), "the base has an unknown number of experts. Name its base model"),
        (Adapter({GATE_UP: stack(96, D, experts=3)}), base(), "the delta has 3 experts, the base 4"),
        (Adapter({GATE_UP: low(96, D)}), base(), "a delta of all experts on a module of one"),
        (Adapter({expert(0, "w1"): stack(FF, D)}), base(), "or vice versa"),
        (Adapter({**ONE, GATE_UP: stack(96, D)}), base(), "there are several deltas for the same rows of blk.0.ffn_gate_exps"),
        (
            Adapter({expert(0, "w1"): low(FF, D, r=5), GATE_UP: stack(96, D)}),
            base(),
            "there are several deltas for the same rows of blk.0.ffn_gate_exps",
        ),
        (
            Adapter({GATE_UP: stack(97, D)}),
            base(),
            "97 rows cannot be divided evenly into blk.0.ffn_gate_exps and blk.0.ffn_up_exps",
        ),
        (
            Adapter({"transformer.h.0.self_attention.query_key_value": low(96, D)}),
            base("FalconForCausalLM", "falcon", new_decoder_architecture=True, num_kv_heads=3),
            "query_key_value: 4 heads cannot be divided evenly into 3 groups",
        ),
        (
            Adapter({"model.layers.0.self_attn.k_proj": low(48, D)}),
            fused_base(head_dim=None),
            "the base has no such module (base), but blk.0.attn_qkv.weight, which may fuse it with others",
        ),
        (
            Adapter({"model.layers.0.self_attn.k_proj": low(24, D)}),
            fused_base(),
            "the delta is (24, 32), the base's weight (16, 32)",
        ),
        (
            Adapter({"model.layers.0.self_attn.q_proj": low(32, D + 1)}),
            fused_base(),
            "the delta is (32, 33), the base's weight (32, 32)",
        ),
        (
            Adapter({"model.layers.0.self_attn.kv_b_proj": low(48, D)}),
            base("DeepseekV2ForCausalLM", "deepseek_v2"),
            "kv_b_proj: llama.cpp bypasses the adapter here",
        ),
        (Adapter({"lm_head": low(48, D)}), base("DeepseekV3ForCausalLM", "deepseek_v3"), "lm_head: llama.cpp bypasses"),
        (
            Adapter({"transformer.h.0.self_attention.query_key_value": low(96, D)}),
            base("FalconForCausalLM", "falcon", multi_query=False),
            "does not support Falcon without multi-query attention (Falcon-RW)",
        ),
        (
            Adapter({"transformer.h.0.self_attention.dense": low(32, D)}),
            base("FalconForCausalLM", "falcon", new_decoder_architecture=True, alibi=True),
            "does not support Falcon with ALiBi (Falcon-RW)",
        ),
        (
            Adapter({"transformer.h.0.mlp.dense_h_to_4h": low(32, D)}),
            base("FalconForCausalLM", "falcon", multi_query=True, parallel_attn=False),
            "does not support Falcon with sequential attention and MLP (Falcon-RW)",
        ),
        (
            Adapter(dict.fromkeys((f"model.layers.0.{gate}.gate" for gate in ("block_sparse_moe", "mlp")), low(4, D))),
            base(),
            "there are several deltas for the same rows of blk.0.ffn_gate_inp",
        ),
        (
            Adapter({"model.layers.0.self_attn.q_proj": low(32, D)}),
            fused_base(16),
            "the base has no such module (base), but blk.0.attn_qkv.weight",
        ),
        (
            Adapter({GATE_UP: stack(2 * FF, D)}),
            in_gguf(base(), ffn_gate_up_exps=(4, 2 * FF + 2, D)),
            "the delta is (96, 32), the base's weight (98, 32)",
        ),
    ],
)
def test_what_has_no_place_is_refused_by_name(tmp_path: Path, adapter: Adapter, spec: BaseSpec, says: str) -> None:
    with pytest.raises(RefusedError) as caught:
        gguf.write(adapter, tmp_path / "a.gguf", base=spec)
    assert says in str(caught.value)


@pytest.mark.parametrize("change", ["more in the file", "another rank", "another order", "another expert"])
def test_a_source_config_that_does_not_match_the_file_is_refused(tmp_path: Path, change: str) -> None:
    from adapterhub_converters.formats import source_config

    path = tmp_path / "a.gguf"
    gguf.write(UNEVEN, path, base=base())
    with GGUFFile(path) as file:
        metadata = {key: gguf_types.MetadataValue(file.header.kinds[key], value) for key, value in file.header.metadata.items()}
        tensors = {name: file.tensor(name) for name in file.tensors}
    if change == "more in the file":
        tensors["blk.0.ffn_gate_exps.weight.lora_b"][2] = 1.0
        tensors["blk.0.ffn_gate_exps.weight.lora_a"][2] = 1.0
        alpha = float(metadata["adapter.lora.alpha"].value)
        digest = source_config.payload_digest(tensors, "llama", np.float32(alpha).tobytes().hex())
        metadata["adapterhub.source.payload"] = gguf_types.string_value(digest)
    key = "adapterhub.source.tensors"
    text = str(metadata[key].value)
    edits = {
        "another rank": ("[4,48,0,", "[3,48,0,"),
        "another order": (",4,false]", ",0,false]"),
        "another expert": ("experts.0.", "experts.2."),
    }
    if change in edits:
        assert edits[change][0] in text
        metadata[key] = gguf_types.string_value(text.replace(*edits[change]))
    gguf_output.write(path, metadata, tensors)
    with pytest.raises(AdapterhubError):
        gguf.read(path)


# Types


@pytest.mark.peer
@pytest.mark.parametrize("dtype", formats.DTYPES)
def test_the_loss_report_has_the_largest_error_of_every_tensor(tmp_path: Path, dtype: str) -> None:
    need_module("gguf")
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    adapter = Adapter({up: low(FF, D, seed=1), down: low(D, FF, r=32, seed=2, alpha=64.0)})
    spec = base("LlamaForCausalLM", "llama")
    report = gguf.write(adapter, tmp_path / "a.gguf", base=spec, dtype=dtype)
    with GGUFFile(tmp_path / "a.gguf") as file:
        types = {name: info.type_name for name, info in file.tensors.items()}
        tensors = {name: file.tensor(name) for name in file.tensors}
    if dtype in ("source", "f32"):
        assert report.worst == Loss.EXACT
        same(adapter, gguf.read(tmp_path / "a.gguf"))
        return
    quantized = dtype.endswith("_0")
    assert types["blk.0.ffn_up.weight.lora_a"] == dtype.upper()
    assert types["blk.0.ffn_up.weight.lora_b"] == ("F16" if quantized else dtype.upper())
    assert types["blk.0.ffn_down.weight.lora_b"] == dtype.upper()
    losses_by_name = {line.name: line for line in report.losses}
    assert report.worst == Loss.ROUNDED
    error = np.abs(tensors["blk.0.ffn_up.weight.lora_a"].astype(np.float64) - adapter.deltas[up].lora_A).max()
    assert f"largest error {error:.3g}" in losses_by_name[f"{up}.lora_A"].note
    if quantized:
        assert "rows of 2 are not a multiple" in losses_by_name[f"{up}.lora_B"].note
    # The way back gives the config of the source and the numbers that run.
    again = gguf.read(tmp_path / "a.gguf")
    assert again.deltas[up].alpha == 4.0
    assert np.array_equal(again.deltas[up].lora_A, tensors["blk.0.ffn_up.weight.lora_a"])


def test_16_bits_that_hold_every_number_are_exact(tmp_path: Path) -> None:
    whole = LowRank(np.ones((2, D), np.float32), np.full((FF, 2), 0.5, np.float32), 4.0)
    adapter = Adapter({"model.layers.0.mlp.up_proj": whole})
    report = gguf.write(adapter, tmp_path / "a.gguf", base=base("LlamaForCausalLM", "llama"), dtype="f16")
    assert report.worst == Loss.EXACT
    same(adapter, gguf.read(tmp_path / "a.gguf"))


def test_a_number_too_large_for_16_bits_never_becomes_infinite(tmp_path: Path) -> None:
    large = LowRank(np.ones((2, D), np.float32), np.full((FF, 2), 1e5, np.float32), 4.0)
    adapter, spec = Adapter({"model.layers.0.mlp.up_proj": large}), base("LlamaForCausalLM", "llama")
    with pytest.raises(RefusedError, match="lora_b: 100000 does not fit into F16. Choose another dtype"):
        gguf.write(adapter, tmp_path / "a.gguf", base=spec, dtype="f16")
    assert gguf.write(adapter, tmp_path / "b.gguf", base=spec, dtype="bf16").worst == Loss.ROUNDED


@pytest.mark.peer
def test_rows_that_no_block_divides_stay_in_floats_that_hold_them() -> None:
    need_module("gguf")
    rounded = writer.as_dtype("x", np.full((4, 2), 1e5, np.float32), "q8_0")
    assert rounded.read_back.dtype == np.float32
    assert rounded.note == "rows of 2 are not a multiple of Q8_0's blocks (32): stays F32"


def test_another_dtype_is_no_choice(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="GGUF has no 'q4_k'. One of source, f32"):
        gguf.write(Adapter(ONE), tmp_path / "a.gguf", base=base(), dtype="q4_k")


@given(st.lists(st.lists(st.one_of(st.integers(-1, 9), st.text(max_size=3), st.booleans()), max_size=6), max_size=1))
def test_odd_blocks_of_a_source_config_are_refused(tmp_path_factory: pytest.TempPathFactory, last_fields: list[Any]) -> None:
    import json

    path = tmp_path_factory.mktemp("odd") / "a.gguf"
    gguf.write(Adapter(ONE), path, base=base())
    with GGUFFile(path) as file:
        metadata = {key: gguf_types.MetadataValue(file.header.kinds[key], value) for key, value in file.header.metadata.items()}
        tensors = {name: file.tensor(name) for name in file.tensors}
    rows = json.loads(str(metadata["adapterhub.source.tensors"].value))
    metadata["adapterhub.source.tensors"] = gguf_types.string_value(json.dumps([[*rows[0][:6], *last_fields]]))
    gguf_output.write(path, metadata, tensors)
    try:
        gguf.read(path)
    except (FormatError, RefusedError):
        return
    assert last_fields == [rows[0][6]]
