"""Megatron's adapters, by the layout that Megatron-Bridge publishes: fused and canonical, whole and in shards, and back."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from adapterhub_converters.adapter import Adapter, Loss, LowRank
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import AdapterhubError, FormatError, RefusedError
from adapterhub_converters.formats import convert
from adapterhub_converters.formats.trainers import megatron
from tests.conftest import Run
from tests.converters import trained
from tests.converters.trained import GATE, LLAMA, UP, K, Q, V, tensors_of

Tensors = dict[str, np.ndarray]


written = partial(trained.written, "megatron")


def megatrons(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a layer as Megatron has them: for each group its queries, its key and its value; gate, then up.

    An oracle of its own: head by head, from the description in Megatron-Bridge's `param_mapping.py`.
    """
    heads: list[np.ndarray] = []
    for group in range(2):
        heads += [weights["self_attn.q_proj"][head * 4 : head * 4 + 4] for head in (2 * group, 2 * group + 1)]
        heads += [weights[f"self_attn.{x}_proj"][group * 4 : group * 4 + 4] for x in "kv"]
    return {
        "self_attention.linear_qkv": np.concatenate(heads),
        "self_attention.linear_proj": weights["self_attn.o_proj"],
        "mlp.linear_fc1": np.concatenate([weights["mlp.gate_proj"], weights["mlp.up_proj"]]),
        "mlp.linear_fc2": weights["mlp.down_proj"],
    }


def shared() -> Adapter:
    """q, k and v of one `lora_A`, gate and up of one: what LoRA without Canonical trains."""
    deltas = dict(trained.full().deltas)
    for layer, (first, *later_modules) in itertools.product((0, 1), ((Q, K, V), (GATE, UP))):
        first_delta = deltas[first.replace(".0.", f".{layer}.")]
        for later_module in later_modules:
            target = later_module.replace(".0.", f".{layer}.")
            later_delta = deltas[target]
            assert isinstance(first_delta, LowRank)
            assert isinstance(later_delta, LowRank)
            deltas[target] = dataclasses.replace(later_delta, lora_A=first_delta.lora_A)
    return Adapter(deltas)


def test_fused_modules_add_what_megatron_adds(tmp_path: Path) -> None:
    tensors = tensors_of(written(shared(), tmp_path / "a.safetensors"))
    for layer in (0, 1):
        added = trained.dense(shared())
        expected = megatrons({kind: added[f"model.layers.{layer}.{kind}"] for kind in trained.SHAPES if kind != "lm_head"})
        for path, array in expected.items():
            stem = f"decoder.layers.{layer}.{path}.adapter"
            ours = 2.0 * tensors[f"{stem}.linear_out.weight"].astype(np.float64) @ tensors[f"{stem}.linear_in.weight"]
            np.testing.assert_allclose(ours, array, rtol=1e-6, atol=1e-6)
    assert "output_layer.adapter.linear_in.weight" in tensors


def test_what_shares_no_factor_is_written_as_canonical_lora(tmp_path: Path) -> None:
    tensors = tensors_of(written(trained.full(), tmp_path / "a.safetensors"))
    stem = "decoder.layers.0.self_attention.linear_qkv.adapter"
    np.testing.assert_array_equal(tensors[f"{stem}.adapter_k.linear_out.weight"], trained.delta(K).lora_B)
    assert "decoder.layers.0.mlp.linear_fc1.adapter.adapter_gate.linear_in.weight" in tensors
    assert f"{stem}.linear_in.weight" not in tensors


@pytest.mark.parametrize("adapter", [shared(), trained.full(), trained.full("q_proj", "up_proj")])
def test_it_reads_to_the_same_function_without_what_rides_along(tmp_path: Path, adapter: Adapter) -> None:
    plain = trained.stripped(written(adapter, tmp_path / "a.safetensors"))
    trained.assert_same(megatron.read(plain, base=LLAMA, alpha=4), adapter)


def test_the_round_trip_of_fused_modules_preserves_every_byte(tmp_path: Path) -> None:
    assert trained.there_and_back(shared(), tmp_path, "megatron").worst == Loss.EXACT


@given(adapter=trained.adapters())
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_function_is_the_same_whatever_was_filled_or_multiplied_in(
    tmp_path_factory: pytest.TempPathFactory, adapter: Adapter
) -> None:
    folder = tmp_path_factory.mktemp("t")
    plain = trained.stripped(written(adapter, folder / "a.safetensors"))
    used = trained.settings_of(folder / "a.safetensors")
    (folder / "run_config.yaml").write_text(f"model:\n  alpha: 7\npeft:\n  alpha: {used['alpha']}\n  dim: {used['dim']}\n")
    trained.assert_same(megatron.read(plain, base=LLAMA), adapter, rtol=2e-6)


# --- shards


def cut(name: str, array: np.ndarray, ranks: int) -> Iterator[np.ndarray]:
    """The part of each tensor rank, as Megatron-Bridge's `ParallelLinearAdapter` has it."""
    if name.endswith("linear_in.weight") and (".linear_proj." in name or ".linear_fc2." in name):
        yield from np.split(array, ranks, -1)
    elif name.endswith("linear_fc1.adapter.linear_out.weight"):
        gate, up = np.split(array, 2, -2)
        for part, up_part in zip(np.split(gate, ranks, -2), np.split(up, ranks, -2), strict=True):
            yield np.concatenate([part, up_part], -2)
    else:
        yield from np.split(array, ranks, -2)


def sharded(whole: Tensors, folder: Path, *, tp: int, pp: int, local: bool) -> Path:
    shards: dict[str, Tensors] = {}
    for name, array in whole.items():
        layer = int(name.split(".")[2]) if name.startswith("decoder.") else 1
        stage = layer * pp // 2
        called = name.replace(f"layers.{layer}.", f"layers.{layer - stage * (2 // pp)}.") if local else name
        for rank, part in enumerate(cut(name, array, tp)):
            shards.setdefault(f"mp_rank_{rank:02}" + (f"_{stage:03}" if pp > 1 else ""), {})[f"module.{called}"] = part
    for name, tensors in shards.items():
        (folder / name).mkdir(parents=True)
        safetensors_file.write(folder / name / "model.safetensors", tensors)
    return folder


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("make", [shared, trained.full])
def test_shards_read_to_what_was_cut_up(tmp_path: Path, make: Callable[[], Adapter], tp: int, pp: int, *, local: bool) -> None:
    whole = tensors_of(written(make(), tmp_path / "a.safetensors"))
    folder = sharded(whole, tmp_path / "iter_1", tp=tp, pp=pp, local=local)
    (folder / "run_config.yaml").write_text("peft:\n  _target_: megatron.bridge.peft.lora.LoRA\n  alpha: 4\n  dim: 2\n")
    assert convert.sniff(folder) == "megatron"
    convert.convert(folder, tmp_path / "peft", to="peft", base=LLAMA)
    trained.assert_same(convert.read(tmp_path / "peft"), make())


def test_the_command_takes_a_folder_of_shards(tmp_path: Path, run: Run) -> None:
    folder = sharded(tensors_of(written(shared(), tmp_path / "a.safetensors")), tmp_path / "iter_1", tp=2, pp=2, local=True)
    model = tmp_path / "base"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **trained.CONFIG})
    )
    run("convert", folder, tmp_path / "peft", "--to", "peft", "--base", model, "--alpha", 4)
    trained.assert_same(convert.read(tmp_path / "peft"), shared())
    assert "Pass --base" in run("convert", folder, tmp_path / "no", "--to", "peft", code=6).stderr


def test_what_wrappers_put_before_names_is_taken_off(tmp_path: Path) -> None:
    plain = tensors_of(written(shared(), tmp_path / "a.safetensors"))
    safetensors_file.write(tmp_path / "b.safetensors", {f"module.module.{name}": array for name, array in plain.items()})
    trained.assert_same(megatron.read(tmp_path / "b.safetensors", base=LLAMA, alpha=4), shared())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = sharded(tensors_of(written(shared(), tmp_path / "a.safetensors")), tmp_path / "f", tp=2, pp=2, local=True)
    (folder / "mp_rank_01_000/model.safetensors").unlink()
    with pytest.raises(FormatError, match="mp_rank_01_000: has no safetensors file, but the other ranks have one"):
        megatron.read(folder, base=LLAMA, alpha=4)
    (folder / "mp_rank_01_000").rmdir()
    with pytest.raises(FormatError, match="the shard of mp_rank_01_000_000 is missing"):
        megatron.read(folder, base=LLAMA, alpha=4)


def _without(tensors: Tensors, name: str) -> None:
    del tensors[name]


def _of_other_columns(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name][:, :-1]


def _of_other_type(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].astype(np.float16)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without, "some tensor ranks of pipeline rank 0 have it, and others do not"),
        (_of_other_columns, "its shards, float32 (1, 16) and float32 (1, 15), are not parts of one matrix"),
        (_of_other_type, "its shards, float32 (1, 16) and float16 (1, 16), are not parts of one matrix"),
    ],
)
def test_shards_of_two_checkpoints_are_refused(tmp_path: Path, change: Callable[[Tensors, str], None], says: str) -> None:
    whole = tensors_of(written(shared(), tmp_path / "a.safetensors"))
    shard = sharded(whole, tmp_path / "f", tp=2, pp=1, local=True) / "mp_rank_01/model.safetensors"
    tensors = tensors_of(shard)
    name = "decoder.layers.0.self_attention.linear_qkv.adapter.linear_in.weight"
    change(tensors, f"module.{name}")
    safetensors_file.write(shard, tensors)
    with pytest.raises(FormatError) as caught:
        megatron.read(tmp_path / "f", base=LLAMA, alpha=4)
    assert f"{name}: {says}. Take all shards from one checkpoint" in str(caught.value)


def test_a_tensor_that_two_ranks_have_with_other_values_is_refused(tmp_path: Path) -> None:
    name, array = "output_layer.adapter.linear_in.weight", np.ones((2, 16), np.float32)
    for rank in (0, 1):
        folder = tmp_path / f"mp_rank_00_00{rank}"
        folder.mkdir()
        safetensors_file.write(folder / "model.safetensors", {name: array + rank})
    with pytest.raises(FormatError, match=rf"{name}: two ranks have it with different values\. Take all shards from one"):
        megatron.read(tmp_path, base=LLAMA, alpha=4)


@pytest.mark.parametrize("name", ["iter_1/__0_0.distcp", "nemo2/weights/__0_0.distcp", "sql.nemo"])
def test_a_distributed_checkpoint_is_refused_by_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"x" * 600)
    with pytest.raises(RefusedError, match=r"distributed checkpoint.* Export it to PEFT with Megatron-Bridge"):
        convert.read(tmp_path / name.partition("/")[0])


def test_shards_that_end_early_are_noted(tmp_path: Path) -> None:
    folder = sharded(tensors_of(written(shared(), tmp_path / "a.safetensors")), tmp_path / "f", tp=1, pp=2, local=False)
    (folder / "mp_rank_00_001/model.safetensors").unlink()
    (folder / "mp_rank_00_001").rmdir()
    assert "layers 1 to 1 have no delta" in " ".join(megatron.read(folder, base=LLAMA, alpha=4).notes)


MOE = trained.base("Qwen3MoeForCausalLM", num_experts=4)


def expert(number: int, part: str) -> LowRank:
    return trained.delta({"gate_proj": GATE, "up_proj": UP, "down_proj": UP.replace("up", "down")}[part], seed=number)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("style", ["listed", "stacked"])
def test_experts_are_those_of_their_ranks(tmp_path: Path, style: str, ranks: int) -> None:
    first = {
        e: (expert(e, "gate_proj").lora_A, np.concatenate([expert(e, p).lora_B for p in ("gate_proj", "up_proj")]))
        for e in range(4)
    }
    second = {e: (expert(e, "down_proj").lora_A, expert(e, "down_proj").lora_B) for e in range(4)}
    for rank, expert_numbers in enumerate(np.split(np.arange(4), ranks)):
        tensors: Tensors = {}
        for half, name in enumerate(("in", "out")):
            for path, pairs in (("linear_fc1", first), ("linear_fc2", second)):
                parts = [pairs[int(e)][half] for e in expert_numbers]
                stem = "decoder.layers.1.mlp.experts"
                if style == "stacked":
                    tensors[f"{stem}.{path}.adapter.linear_{name}.weight"] = np.stack(parts)
                else:
                    tensors |= {
                        f"{stem}.local_experts.{n}.{path}.adapter.linear_{name}.weight": part for n, part in enumerate(parts)
                    }
        folder = tmp_path / "f" / f"mp_rank_00_000_{rank:03}"
        folder.mkdir(parents=True)
        safetensors_file.write(folder / "model.safetensors", tensors)
    adapter = megatron.read(tmp_path / "f", base=MOE, alpha=4)
    assert len(adapter.deltas) == 12
    for e, part in itertools.product(range(4), ("gate_proj", "up_proj", "down_proj")):
        delta = adapter.deltas[f"model.layers.1.mlp.experts.{e}.{part}"]
        np.testing.assert_array_equal(delta.lora_B, expert(e, part).lora_B)
        np.testing.assert_array_equal(delta.lora_A, expert(e, "gate_proj" if part == "up_proj" else part).lora_A)


def of_experts(*, listed: str = "mlp.experts", ends: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Adapter:
    """Attention of both layers, and of one layer two experts, all of which share `lora_A` where Megatron's LoRA does."""
    deltas: dict[str, Any] = {t: d for t, d in shared().deltas.items() if t.endswith(("q_proj", "k_proj", "v_proj"))}
    for e in (0, 3):
        gate, up, down = (expert(e, part) for part in ("gate_proj", "up_proj", "down_proj"))
        parts = (gate, dataclasses.replace(up, lora_A=gate.lora_A), down)
        deltas |= {f"model.layers.1.{listed}.{e}.{end}": part for end, part in zip(ends, parts, strict=True)}
    return Adapter(deltas)


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("Qwen3MoeForCausalLM", {}),
        ("MixtralForCausalLM", {"listed": "block_sparse_moe.experts", "ends": ("w1", "w3", "w2")}),
    ],
)
def test_experts_are_written_one_by_one_and_come_back(tmp_path: Path, architecture: str, options: Any) -> None:
    spec, adapter = trained.base(architecture, num_experts=4), of_experts(**options)
    report = trained.there_and_back(adapter, tmp_path, "megatron", spec)
    assert report.worst == Loss.EXACT
    assert "moe_grouped_gemm=False" in report.notes[-1]
    tensors = tensors_of(tmp_path / "there")
    stem = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.adapter"
    gate, up = (list(adapter.deltas.values())[-3 + n] for n in (0, 1))
    np.testing.assert_array_equal(tensors[f"{stem}.linear_out.weight"], np.concatenate([gate.lora_B, up.lora_B]))
    again = megatron.read(trained.stripped(tmp_path / "there"), base=spec, alpha=4)
    assert {t: d.lora_B.tobytes() for t, d in again.deltas.items()} == {
        t: d.lora_B.tobytes() for t, d in adapter.deltas.items()
    }


@pytest.mark.parametrize("alone", [True, False])
def test_experts_whose_gate_and_up_share_nothing_are_canonical_lora(tmp_path: Path, *, alone: bool) -> None:
    deltas: dict[str, Any] = dict(of_experts().deltas)
    up = deltas.pop("model.layers.1.mlp.experts.3.up_proj")
    if not alone:
        deltas["model.layers.1.mlp.experts.3.up_proj"] = dataclasses.replace(up, lora_A=2 * up.lora_A)
    report = trained.there_and_back(Adapter(deltas), tmp_path, "megatron", MOE)
    assert "peft=canonical_lora" in report.notes[-1]
    stem = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.adapter"
    assert f"{stem}.adapter_gate.linear_in.weight" in tensors_of(tmp_path / "there")
    again = megatron.read(trained.stripped(tmp_path / "there"), base=MOE, alpha=4)
    assert {t: d.lora_A.tobytes() for t, d in again.deltas.items()} == {t: d.lora_A.tobytes() for t, d in deltas.items()}


def test_an_expert_that_the_base_lacks_is_refused_by_name(tmp_path: Path) -> None:
    adapter = Adapter({"model.layers.1.mlp.experts.4.down_proj": expert(0, "down_proj")})
    with pytest.raises(RefusedError, match=r"experts\.4\.down_proj: not a module that Megatron is known to have LoRA on"):
        megatron.write(adapter, tmp_path / "a.safetensors", base=MOE)


# --- refusals


STEM = "decoder.layers.0.self_attention.linear_qkv.adapter"
PAIR = {f"{STEM}.linear_in.weight": np.ones((2, 16), np.float32), f"{STEM}.linear_out.weight": np.ones((32, 2), np.float32)}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (PAIR, "its alpha is not recorded anywhere, and the scale depends on it. Give the alpha"),
        (
            {**PAIR, f"{STEM}.linear_out.weight": np.ones((16, 2), np.float32)},
            "16 rows, but 32 in this base. Is a shard missing?",
        ),
        ({**PAIR, f"{STEM}.linear_out.weight": np.ones((32, 3), np.float32)}, "are not a pair"),
        ({f"{STEM}.linear_in.weight": np.ones((2, 16), np.float32)}, "has linear_in alone; its counterpart is missing"),
        ({**PAIR, f"{STEM}.weight_magnitude": np.ones(32, np.float32)}, "tensor 'decoder.layers.0.self_attention.linear_qkv"),
        (
            PAIR | {k.replace("adapter.", "adapter.adapter_k."): np.ones((2, 16), np.float32) for k in PAIR},
            f"{STEM}.adapter_k: there is another delta of model.layers.0.self_attn.k_proj",
        ),
        (
            {k.replace("linear_qkv.adapter", "linear_qkv.adapter.adapter_up"): v for k, v in PAIR.items()},
            "linear_qkv has no adapter_up",
        ),
        (
            {k.replace("self_attention.linear_qkv", "mlp.experts.linear_fc1"): v for k, v in PAIR.items()},
            "not known to have experts",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path: Path, tensors: Tensors, says: str) -> None:
    safetensors_file.write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterhubError) as caught:
        megatron.read(tmp_path / "a.safetensors", base=LLAMA, alpha=None if tensors is PAIR else 4)
    assert isinstance(caught.value, FormatError | RefusedError)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "base", "says"),
    [
        (trained.full(), None, "depend on the base. Name its base model"),
        (trained.full(), trained.base("GPT2LMHeadModel"), "no verified mapping to Megatron's names"),
        (
            shared(),
            trained.base(num_key_value_heads=3),
            "4 attention heads of size 4 cannot be divided evenly into 3 groups. Name a base with a valid config",
        ),
        (
            shared(),
            trained.base(head_dim=None, hidden_size=2),
            "4 attention heads of size 0 cannot be divided evenly into 2 groups",
        ),
        (shared(), trained.base(head_dim="x" * 99), f'"head_dim" in its config is {"x" * 40}, not a number above 0'),
        (shared(), trained.base(num_attention_heads=None), 'its config has no "num_attention_heads". Name a base whose config'),
        (Adapter({Q: trained.delta(magnitude=np.ones(16))}), LLAMA, "q_proj: DoRA cannot be expressed in Megatron's adapters"),
        (
            shared(),
            trained.base(num_key_value_heads=4),
            "model.layers.0.self_attn.k_proj: its delta is (8, 16), the base's weight (16, 16)",
        ),
    ],
)
def test_what_megatron_cannot_express_is_refused_by_name(tmp_path: Path, adapter: Adapter, base: Any, says: str) -> None:
    with pytest.raises(RefusedError) as caught:
        megatron.write(adapter, tmp_path / "a.safetensors", base=base)
    assert says in str(caught.value)
