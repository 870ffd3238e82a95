"""The same training on another device: one that is pretended, so that no operation mixes two, and CUDA where there is one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import training  # noqa: E402
from adapterhub.training import compute_device, train_config  # noqa: E402
from adapterhub.training.artifacts import training_checkpoint  # noqa: E402
from adapterhub.training.layers import lora, nf4_matrix, varlen  # noqa: E402
from adapterhub.training.loop import training_loop  # noqa: E402
from adapterhub.training.loop.state import new_state  # noqa: E402
from adapterhub_converters.errors import RefusedError  # noqa: E402
from adapterhub_converters.formats import peft as peft_format  # noqa: E402
from tests.conftest import Run, need_module  # noqa: E402
from tests.training.test_kinds import loaded, rows, whole  # noqa: E402
from tests.training.test_trainer import settings  # noqa: E402

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")

PRETENDED = """
import sys
from pathlib import Path

import torch

from adapterhub.training import train_config
from adapterhub.training.layers import lora
from adapterhub.training.artifacts import training_checkpoint
from adapterhub.training.loop import heldout, training_loop
from adapterhub.training.loop.state import copy_trained, new_state, restore_trained
from tests.training.conftest import load_base
from tests.training.pretend import THERE, Elsewhere, There, waits
from tests.training.test_kinds import rows

KINDS = {
    "dora": ({"dora": True}, {}),
    "table": ({"targets": ("q_proj", "embed_tokens")}, {}),
    "pissa and rows": ({"init": "pissa", "targets": ("q_proj",), "trainable_token_indices": (5, 7)}, {}),
    "scaled": ({}, {"dtype": "float16"}),
}


def losses(device, lora_words, base_words):
    words = train_config.LoRAConfig(r=2, **lora_words)
    how = train_config.BaseConfig("", **{"dtype": "float32", **base_words})
    made = load_base(Path(sys.argv[1]), how, words, location="c.toml", device=device)
    assert made.by_documents == (device is THERE)
    lora.reset(made.model, 0)
    options = train_config.OptimConfig(rows=4, micro_rows=2, learning_rate=5e-3, clip=0.5)
    state, given = new_state(made.model, options), rows(8)
    waits.clear()
    some = training_loop.batch(given, state, options, 4)
    found = [training_loop.forward_backward(made, some, state, options, training_loop.usual_loss(made, some, None))]
    # The loss is read once, whatever the number of passes, and nothing else of them is.
    assert len(waits) == (device is THERE), waits
    training_loop.optim_step(state, options, 4)
    assert all((type(value) is There) == (device is THERE) for _, value in lora.trained_parameters(made.model))
    training_checkpoint.save(Path("c.safetensors"), made.model, state, "run")
    state.best = copy_trained(made.model)
    assert training_checkpoint.restore(Path("c.safetensors"), made.model, state, "run")
    restore_trained(made.model, copy_trained(made.model))
    found += [training_loop.advance(made, given, state, options, 4)["loss"] for _ in range(1)]
    return [*found, heldout.evaluate(made, given, 4)]


for kind, words in KINDS.items():
    here = losses(torch.device("cpu"), *words)
    with Elsewhere():
        there = losses(THERE, *words)
    assert max(abs(a - b) for a, b in zip(here, there)) < (1e-2 if kind == "scaled" else 2e-5), (kind, here, there)
    print(kind)
"""


def test_no_operation_of_a_step_mixes_devices(learn: Run, tiny_base: Path) -> None:
    """In a process of its own: a pretended device cannot be taken back."""
    result = learn(PRETENDED, tiny_base)
    assert result.stdout.splitlines() == ["dora", "table", "pissa and rows", "scaled"], result.stderr[-3000:]


def test_a_device_that_is_not_there_is_refused() -> None:
    assert compute_device.select("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert compute_device.select("auto").type == "cpu"
        with pytest.raises(RefusedError, match="torch finds no CUDA device"):
            compute_device.select("cuda")


@pytest.mark.parametrize(
    ("dtype", "capability", "expected"),
    [
        ("bfloat16", None, "bfloat16"),
        ("bfloat16", (9, 0), "bfloat16"),
        ("bfloat16", (8, 0), "bfloat16"),
        ("bfloat16", (7, 5), "float16"),
        ("bfloat16", (7, 0), "float16"),
        ("float32", (7, 5), "float32"),
        ("float16", (7, 5), "float16"),
    ],
)
def test_a_card_without_bfloat16_computes_in_float16_and_a_note_says_so(
    dtype: compute_device.Dtype, capability: tuple[int, int] | None, expected: str
) -> None:
    chosen, notes = compute_device.supported_dtype(dtype, capability)
    assert chosen == expected
    assert len(notes) == (chosen != dtype)
    if notes:
        assert f"compute capability {capability[0]}.{capability[1]}) has no bfloat16: float16 is used" in notes[0]


@pytest.mark.parametrize(
    ("device_type", "dtype", "capability", "supported"),
    [
        ("cpu", torch.bfloat16, None, False),
        ("cuda", torch.bfloat16, (8, 0), True),
        ("cuda", torch.float16, (9, 0), True),
        ("cuda", torch.float16, (7, 5), False),
        ("cuda", torch.float32, (9, 0), False),
    ],
)
def test_documents_need_no_mask_where_a_card_has_flash_attention(
    device_type: str, dtype: object, capability: tuple[int, int] | None, supported: bool
) -> None:
    assert varlen.is_supported(device_type, dtype, capability) is supported


def test_a_training_on_a_card_without_bfloat16_records_float16_and_scales_its_loss(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compute_device, "capability", lambda _: (7, 5))
    with training.open_trainer(training.read_config(settings(tmp_path, tiny_base)), tmp_path / "out") as trainer:
        assert trainer.config.base.dtype == "float16"
        assert trainer.state.scale.needed


def test_cuda_uses_only_kernels_that_give_the_same_bytes_and_an_operation_without_one_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values, places = torch.nn.functional.max_pool2d(torch.ones(1, 1, 4, 4), 2, return_indices=True)
    with compute_device.deterministic("cpu"):
        torch.nn.functional.max_unpool2d(values, places, 2)
    says = r"^\[train\] deterministic: max_unpool\w+ does not have a deterministic implementation. Set it to false"
    with pytest.raises(RefusedError, match=says), compute_device.deterministic("auto"):
        torch.nn.functional.max_unpool2d(values, places, 2)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.peer
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_moments_in_eight_bits_are_those_of_bitsandbytes(device: str, tiny_base: Path) -> None:
    need_module("bitsandbytes")
    from bitsandbytes import optim

    torch.manual_seed(0)
    layers = [lora.LoRALinear(torch.zeros(1024, 96), None, r=8, alpha=8).to(device) for _ in range(2)]
    lora.reset(layers[0], 0)
    layers[1].load_state_dict(layers[0].state_dict())
    ours = new_state(layers[0], train_config.OptimConfig(optimizer="adamw8bit")).optimizer
    theirs = optim.AdamW8bit(layers[1].parameters(), lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)
    for _ in range(5):
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = 0.01
        for parameter, second in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            second.grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    assert ours.state[layers[0].lora_B]["state1"].dtype == torch.uint8
    for parameter, second in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        assert torch.equal(parameter, second)


@pytest.mark.peer
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", pytest.param("paged_adamw8bit", marks=needs_cuda)])
def test_a_resumed_run_equals_an_uninterrupted_one(optimizer: str, tmp_path: Path, tiny_base: Path) -> None:
    need_module("bitsandbytes")
    documents = rows(8)
    options = train_config.OptimConfig(rows=4, learning_rate=5e-3, optimizer=optimizer)  # type: ignore[arg-type]
    device = "cuda" if optimizer.startswith("paged") else "cpu"
    results = []
    for stop in (False, True):
        loaded_model = loaded(whole(tiny_base, r=64), device)
        state = new_state(loaded_model.model, options)
        for step in range(6):
            if stop and step == 3:
                training_checkpoint.save(tmp_path / "c.safetensors", loaded_model.model, state, "run")
                loaded_model = loaded(whole(tiny_base, r=64), device)
                state = new_state(loaded_model.model, options)
                assert training_checkpoint.restore(tmp_path / "c.safetensors", loaded_model.model, state, "run")
            training_loop.advance(loaded_model, documents, state, options, 6)
        results.append({name: value.detach().cpu() for name, value in lora.trained_parameters(loaded_model.model)})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_paged_memory_is_for_cuda(tiny_base: Path) -> None:
    loaded_model = loaded(whole(tiny_base))
    with pytest.raises(RefusedError, match="only a CUDA device has paged memory"):
        new_state(loaded_model.model, train_config.OptimConfig(optimizer="paged_adamw8bit"))


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_dequantizes_to_the_numbers_of_the_cpu(dtype: object) -> None:
    matrix = nf4_matrix.quantize(torch.randn(192, 576))
    assert torch.equal(nf4_matrix.dequantize(matrix.to("cuda"), dtype).cpu(), nf4_matrix.dequantize_reference(matrix, dtype))


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_training_on_cuda_learns_what_one_on_the_cpu_does(dtype: str, tmp_path: Path, tiny_base: Path) -> None:
    path = settings(tmp_path, tiny_base)
    deltas_by_device = []
    for device in ("cpu", "cuda"):
        text = path.read_text().replace("[data]", f'device = "{device}"\ndtype = "{dtype}"\n[data]', 1)
        (tmp_path / f"{device}.toml").write_text(text)
        result = training.run(training.read_config(tmp_path / f"{device}.toml"), tmp_path / device)
        assert result.report is not None
        assert result.report.peak
        deltas_by_device.append(peft_format.read(tmp_path / device).deltas)
    for name, delta in deltas_by_device[0].items():
        apart = np.abs(delta.lora_B - deltas_by_device[1][name].lora_B).max() / np.abs(delta.lora_B).max()
        assert apart < (1e-3 if dtype == "float32" else 0.2), name


def test_half_precision_skips_a_step_that_overflows_and_learns_on(tiny_base: Path) -> None:
    plan = whole(tiny_base)
    loaded_model = loaded(dataclasses.replace(plan, base=train_config.BaseConfig(str(tiny_base), dtype="float16")))
    options = train_config.OptimConfig(rows=4, learning_rate=5e-3)
    state, documents = new_state(loaded_model.model, options), rows(8)
    state.scale.factor = 2.0**24
    before = {name: value.detach().clone() for name, value in lora.trained_parameters(loaded_model.model)}
    lines = [training_loop.advance(loaded_model, documents, state, options, 12)]
    assert all(torch.equal(value, before[name]) for name, value in lora.trained_parameters(loaded_model.model))
    assert state.scale.factor == 2.0**23
    lines += [training_loop.advance(loaded_model, documents, state, options, 12) for _ in range(11)]
    assert state.scale.factor < 2.0**22
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
