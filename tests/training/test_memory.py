"""What a training is said to take is what it takes, and what cannot fit doesn't start."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapterhub import training
from adapterhub.training import train_config
from adapterhub.training.cost import budget, memory, model_sizes
from adapterhub_converters.bases import read_base
from tests.conftest import ROOT, need_module
from tests.support.byte_tokenizer import write_tokenizer
from tests.training.conftest import load_base

# The peak is set back when all is imported: what comes above that is the training's own.
MEASURE = """
import sys
from pathlib import Path
import bitsandbytes, matplotlib, torch, transformers
import adapterhub.training.trainer
from adapterhub import training as train
from transformers import LlamaForCausalLM
def kilobytes(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
start = kilobytes("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")
train.run(train.read_config(Path(sys.argv[1])), Path(sys.argv[2]))
print(start * 1024, kilobytes("VmHWM:") * 1024)
"""
TINY = {
    "vocab_size": 259, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
LIKE_135M = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 9,
    "num_key_value_heads": 3,
}  # fmt: skip


def write_settings(
    folder: Path, numbers: dict[str, int], *, sequence: int, base: str = "", lora: str = "", **keys: object
) -> Path:
    """A config over a new base of that shape."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**numbers, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    line = json.dumps({"text": "the quick brown fox jumps over the lazy dog. " * 23})  # a document that fills rows
    (folder / "t.jsonl").write_text(f"{line}\n" * 80)
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in {"steps": 2, "threads": 1, **keys}.items())
    heldout = 'heldout = "t.jsonl"\nheldout_tokens = 2048\n' if "evaluate_every" in keys else ""
    (folder / "c.toml").write_text(
        f'[base]\npath = "base"\n{base}\n[data]\ntrain = "t.jsonl"\n{heldout}sequence = {sequence}\n'
        f"[lora]\nr = 16\n{lora}[train]\n{lines}\n"
    )
    return folder / "c.toml"


# In float32 a matrix of its MLP takes more than `nf4_matrix.MAX_NEW_BYTES`, so that its memory is used again and stays.
WIDE = {
    "vocab_size": 259, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "num_attention_heads": 32,
    "num_key_value_heads": 4,
}  # fmt: skip


# Five processes hold every kind of what can be trained, four of them in tests/peers; which of a row's kinds is wrong, the
# parts of the plan say.
KINDS: dict[str, tuple[dict[str, int], dict[str, object], str, str]] = {
    "small-and-many-tokens": (TINY, {"sequence": 1024, "rows": 12}, "", ""),
    "checkpointing-dora-best": (
        LIKE_135M,
        {
            "sequence": 256, "rows": 8, "checkpointing": True, "evaluate_every": 2, "keep_best": True, "samples": ["a?"],
            "sample_tokens": 4,
        },
        "", "dora = true\nrank_pattern = {down_proj = 64}\n",
    ),
    # Rows enough that the work space of a machine's MKL, 0 to 45 MB, is a small part of it.
    "dropout-float32": (LIKE_135M, {"sequence": 256, "rows": 8}, 'dtype = "float32"', "dropout = 0.1\ndora = true\n"),
    "pissa-embedding-few-targets": (
        LIKE_135M, {"sequence": 256, "rows": 4}, "", 'init = "pissa"\ntargets = ["q_proj", "down_proj", "embed_tokens"]\n',
    ),
    "wide-layer-float32": (WIDE, {"sequence": 128, "rows": 1}, 'dtype = "float32"', ""),
}  # fmt: skip
EVERY_DAY = "small-and-many-tokens"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc to measure memory with")
@pytest.mark.parametrize("kind", [EVERY_DAY])
def test_the_measured_memory_is_within_15_percent_of_the_prediction(tmp_path: Path, kind: str) -> None:
    for name in ("bitsandbytes", "matplotlib"):
        need_module(name)
    from adapterhub.training import compute_device  # imports torch

    numbers, keys, base, lora = KINDS[kind]
    tolerance = 0.15
    if not base and not compute_device.multiplies_bfloat16():
        # Torch's own loop for bfloat16 takes minutes here, and none of oneDNN's memory, which the plan includes.
        base, tolerance = 'dtype = "float32"', 0.2
    path = write_settings(tmp_path, numbers, base=base, lora=lora, **keys)  # type: ignore[arg-type]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "converters", "schemas")),
        "GOMP_SPINCOUNT": "1000",
    }  # fmt: skip
    command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    start, peak = map(int, result.stdout.split())
    planned = budget.forecast(training.read_config(path), read_base(tmp_path / "base")).memory
    assert (planned.total - start) / (peak - start) == pytest.approx(1, abs=tolerance), (planned, start, peak)


def config_of(tmp_path: Path, tiny_base: Path, **keys: object) -> training.TrainConfig:
    (tmp_path / "t.jsonl").write_text('{"text": "a b c"}\n' * 8)
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in {"steps": 1, "rows": 8, **keys}.items())
    (tmp_path / "c.toml").write_text(
        f'[base]\npath = {json.dumps(str(tiny_base))}\n[data]\ntrain = "t.jsonl"\nsequence = 256\n[train]\n{lines}\n'
    )
    return training.read_config(tmp_path / "c.toml")


def test_other_settings_change_the_parts_that_they_are_about(tmp_path: Path, tiny_base: Path) -> None:
    config = config_of(tmp_path, tiny_base)
    spec = read_base(tiny_base)
    planned = memory.plan(config, spec)
    plans = {item.settings: item.plan for item in budget.alternatives(config, spec)}
    assert list(plans) == [
        "micro_rows = 4", "micro_rows = 1", "sequence = 128", "sequence = 512", "checkpointing = true", 'quantize = "none"',
    ]  # fmt: skip
    assert plans["micro_rows = 1"].activations < plans["micro_rows = 4"].activations < planned.activations
    assert plans["checkpointing = true"].activations < planned.activations
    assert plans['quantize = "none"'].base > planned.base
    assert all(plan.adapter == planned.adapter for plan in plans.values())


def test_full_fine_tuning_holds_sixteen_bytes_a_parameter_and_the_same_rows(tmp_path: Path, tiny_base: Path) -> None:
    config = config_of(tmp_path, tiny_base)
    spec = read_base(tiny_base)
    base, adapter = memory.parameters(config, spec)
    planned = memory.plan(config, spec)
    assert planned.adapter == 4 * adapter
    same = planned.total - planned.base - planned.adapter - planned.gradients - planned.optimizer
    assert memory.full_fine_tuning(config, spec) == 16 * base + same


def test_what_cannot_fit_is_refused_with_the_least_change_that_makes_it_fit(tmp_path: Path, tiny_base: Path) -> None:
    config = config_of(tmp_path, tiny_base)
    spec = read_base(tiny_base)
    total = memory.plan(config, spec).total

    def remedy(free: int | None, **sizes: int) -> str | None:
        error = budget.misfit(config, spec, free=free, **sizes)
        return None if error is None else error.hint

    assert remedy(total) is remedy(total - 1, allocated=1) is remedy(None) is None
    assert remedy(total - 1) == "Set micro_rows = 1"
    smallest = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, sequence=128),
        train=dataclasses.replace(config.train, micro_rows=1, checkpointing=True),
    )
    fits = memory.plan(smallest, spec).total
    assert remedy(fits) == "Set micro_rows = 1, checkpointing = true, sequence = 128"
    assert "use a smaller base" in str(remedy(fits - 1))


def test_checkpointing_is_chosen_where_it_does_not_fit_otherwise(tmp_path: Path, tiny_base: Path) -> None:
    config = config_of(tmp_path, tiny_base)
    spec = read_base(tiny_base)
    assert config.train.checkpointing == "auto"
    total = memory.plan(config, spec).total
    assert budget.resolve_auto(config, spec, free=total).train.checkpointing is False
    assert budget.resolve_auto(config, spec, free=total - 1, allocated=1).train.checkpointing is False
    assert budget.resolve_auto(config, spec, free=None).train.checkpointing is False
    settled = budget.resolve_auto(config, spec, free=total - 1)
    assert settled.train.checkpointing is True
    assert memory.plan(settled, spec).total < total
    for checkpointing in (True, False):
        chosen = dataclasses.replace(config, train=dataclasses.replace(config.train, checkpointing=checkpointing))
        assert budget.resolve_auto(chosen, spec, free=1) == chosen


def test_the_base_is_dequantized_where_it_fits(tmp_path: Path, tiny_base: Path) -> None:
    """Into half of the memory, on a fast processor; not for DoRA, whose norms come from the codes, nor in float32."""
    config = config_of(tmp_path, tiny_base)
    spec = read_base(tiny_base)
    whole = memory.plan(dataclasses.replace(config, dequantized=True), spec).total
    assert memory.plan(config, spec).total < whole
    assert budget.resolve_auto(config, spec, free=2 * whole, is_fast=True).dequantized
    assert budget.resolve_auto(config, spec, free=2 * whole - 1, allocated=1, is_fast=True).dequantized
    assert not budget.resolve_auto(config, spec, free=2 * whole - 2, is_fast=True).dequantized
    assert not budget.resolve_auto(config, spec, free=None, is_fast=True).dequantized
    assert not budget.resolve_auto(config, spec, free=2 * whole).dequantized
    for variant in (
        dataclasses.replace(config, lora=dataclasses.replace(config.lora, dora=True)),
        dataclasses.replace(config, base=dataclasses.replace(config.base, dtype="float32")),
        dataclasses.replace(config, base=dataclasses.replace(config.base, quantize="none")),
    ):
        assert not budget.resolve_auto(variant, spec, free=99 * whole, is_fast=True).dequantized


def test_the_plan_counts_what_the_training_trains(tiny_base: Path, tmp_path: Path) -> None:
    """Against the model itself, for whatever gives it trained numbers."""
    pytest.importorskip("torch")
    for words in (
        {}, {"dora": True, "layers": (1,)}, {"targets": ("q_proj", "embed_tokens"), "rank_pattern": {"q_proj": 3}},
        {"targets": r".*\.0\..*(gate|up)_proj"}, {"exclude": ("mlp.down_proj",), "trainable_token_indices": (4, 9)},
    ):  # fmt: skip
        config = dataclasses.replace(config_of(tmp_path, tiny_base), lora=training.train_config.LoRAConfig(r=2, **words))
        spec = read_base(tiny_base)
        loaded = load_base(tiny_base, config.base, config.lora, location="")
        trained = sum(parameter.numel() for parameter in loaded.model.parameters() if parameter.requires_grad)
        assert memory.parameters(config, spec)[1] == trained, words


@pytest.mark.parametrize("quantize", ["nf4", "none"])
def test_the_base_takes_the_planned_bytes(quantize: train_config.BaseForm, tiny_base: Path, tmp_path: Path) -> None:
    """Those of the loaded tensors, which are what the README and the start of a training tell."""
    pytest.importorskip("torch")
    from adapterhub.training.layers import lora, nf4_matrix

    config, spec = config_of(tmp_path, tiny_base), read_base(tiny_base)
    config = dataclasses.replace(config, base=dataclasses.replace(config.base, quantize=quantize))
    model = load_base(tiny_base, config.base, config.lora, location="").model
    held_bytes = {id(parameter): parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad}
    matrices = [module.base for module in model.modules() if isinstance(module, lora.Frozen)]
    held_bytes |= {id(matrix): matrix.size if isinstance(matrix, nf4_matrix.NF4) else matrix.nbytes for matrix in matrices}
    assert memory.plan(config, spec).base == pytest.approx(sum(held_bytes.values()), rel=0.01)


EXPERTS = {"MixtralForCausalLM": ("experts.gate_up_proj",), "Qwen2MoeForCausalLM": ("mlp.experts.down_proj", "q_proj")}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_counted_whether_stacked_or_separate(kind: str, tmp_path: Path) -> None:
    from tests.support import tiny

    model = tiny.model(kind)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "c.toml").write_text(
        f'[base]\npath = "base"\n[data]\ntrain = "t.jsonl"\n[lora]\nr = 2\ntargets = {json.dumps(EXPERTS[kind])}\n'
    )
    config, spec = training.read_config(tmp_path / "c.toml"), read_base(tmp_path / "base")
    expected = sum(
        2 * (parameter.shape[0] if parameter.ndim == 3 else 1) * sum(parameter.shape[-2:])
        for name, parameter in model.named_parameters()
        if name.removesuffix(".weight").endswith(EXPERTS[kind])
    )
    assert memory.parameters(config, spec) == (sum(p.numel() for p in model.parameters()), expected)
    shape = model_sizes.shape_of(config, spec)
    experts = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 3)
    assert shape.linear - shape.used == experts - experts * model.config.num_experts_per_tok // next(
        parameter.shape[0] for parameter in model.parameters() if parameter.ndim == 3
    )


def test_logits_take_the_bytes_of_the_compute_dtype_as_float32_has_only_a_few_rows_at_a_time(
    tmp_path: Path, tiny_base: Path
) -> None:
    spec, config = read_base(tiny_base), config_of(tmp_path, tiny_base)
    in_float32 = dataclasses.replace(config, base=dataclasses.replace(config.base, dtype="float32"))
    assert [memory.logits_at_once(128_256, width, None) for width in (2, 4)] == [256, 256]
    assert memory.plan(config, spec).logits == 256 * 259 * 2
    assert memory.plan(in_float32, spec).logits == 256 * 259 * 4


def test_a_card_holds_more_logits_at_once_neither_data_nor_masks_and_no_interpreter(tmp_path: Path, tiny_base: Path) -> None:
    sizes = [memory.logits_at_once(128_256, 2, card) for card in (None, 8 << 30, 24 << 30, 80 << 30, 192 << 30)]
    assert sizes == [256, 128, 512, 1024, 1024]
    config, spec = config_of(tmp_path, tiny_base), read_base(tiny_base)
    plan, on_card = memory.plan(config, spec), memory.plan(config, spec, card=24 << 30)
    assert (on_card.base, on_card.adapter, on_card.optimizer, on_card.data) == (plan.base, plan.adapter, plan.optimizer, 0)
    assert on_card.logits == 12 * plan.logits
    long, twice = (
        memory.plan(dataclasses.replace(config, data=dataclasses.replace(config.data, sequence=tokens)), spec, card=80 << 30)
        for tokens in (32_768, 65_536)
    )
    assert twice.activations / long.activations == pytest.approx(2, rel=0.01)  # not the square of a row's length
