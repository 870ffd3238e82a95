"""A whole training: the same bytes twice, peft's losses, a folder that peft loads, and no step lost to a signal."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import runpy
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import training as train  # noqa: E402
from adapterhub.manifest.document import AdapterManifest  # noqa: E402
from adapterhub.training import train_config  # noqa: E402
from adapterhub.training.artifacts import finished_folder  # noqa: E402
from adapterhub.training.cost import budget  # noqa: E402
from adapterhub.training.data import dataset, document_files  # noqa: E402
from adapterhub.training.data.example import Example  # noqa: E402
from adapterhub.training.data.packed_rows import IGNORED, Rows, order  # noqa: E402
from adapterhub.training.layers import lora, nf4_matrix  # noqa: E402
from adapterhub.training.loop import training_loop  # noqa: E402
from adapterhub.training.loop.loss import cross_entropy, logprobs  # noqa: E402
from adapterhub.training.loop.optimizer import learning_rate  # noqa: E402
from adapterhub.training.loop.state import State, new_state  # noqa: E402
from adapterhub_converters.bases import read_base  # noqa: E402
from adapterhub_converters.errors import (  # noqa: E402
    AdapterhubError,
    ConflictError,
    LocalIOError,
    OutputExistsError,
    RefusedError,
    UsageError,
)
from adapterhub_converters.formats import peft as peft_format  # noqa: E402
from tests.conftest import Run, need_module  # noqa: E402
from tests.training.conftest import load_base, packed_rows  # noqa: E402

TEXTS = [f"{number} times {number} is {number * number}. " * 4 for number in range(24)]


def settings(folder: Path, tiny_base: Path, **train_keys: object) -> Path:
    """A config file with its data beside it."""
    folder.mkdir(exist_ok=True)
    for name, texts in (("train", TEXTS[:20]), ("heldout", TEXTS[20:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    keys = {"steps": 6, "rows": 4, "learning_rate": 0.01, "warmup": 1, "threads": 1, **train_keys}
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    text = f"""
[base]
path = {json.dumps(str(tiny_base))}
name = "someone/tiny"
[data]
train = "train.jsonl"
heldout = "heldout.jsonl"
sequence = 48
[lora]
r = 4
alpha = 8
[train]
{chr(10).join(lines)}
[card]
title = "Squares: a test"
license = "mit"
"""
    (folder / "c.toml").write_text(text)
    return folder / "c.toml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path):  # type: ignore[no-untyped-def]
    """A finished folder, what it was trained with, its events and its result."""
    folder = tmp_path_factory.mktemp("trained")
    path, events = settings(folder, tiny_base), []
    result = train.run(train.read_config(path), folder / "out", on_event=events.append)
    return folder / "out", path, events, result


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_loss_falls_and_the_folder_is_whole(trained) -> None:  # type: ignore[no-untyped-def]
    out, _, events, result = trained
    assert result.perplexity_after < result.perplexity_before
    assert set(contents(out)) == {
        "README.md", "adapter.json", "adapter_config.json", "adapter_model.safetensors", "log.jsonl", "loss.png",
    }  # fmt: skip
    assert [type(event).__name__ for event in events if not isinstance(event, train.Loading | train.Encoding)] == [
        "Ready", "EvaluationEvent", *["StepEvent"] * 6, "EvaluationEvent", "SaveEvent",
    ]  # fmt: skip
    assert list(out.parent.glob(".out*")) == []


def test_twice_gives_the_same_bytes(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out, path, _, _ = trained
    train.run(train.read_config(path), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(out)


def test_the_manifest_names_base_data_and_outcome(trained) -> None:  # type: ignore[no-untyped-def]
    out, path, _, result = trained
    manifest = AdapterManifest.read(out)
    assert manifest is not None
    assert (manifest.base.repo, manifest.base.quantization) == ("someone/tiny", "nf4")
    assert (manifest.r, manifest.alpha, manifest.license) == (4, 8, "mit")
    training = manifest.training
    assert training is not None
    assert [item.documents for item in training.data or ()] == [20, 4]
    assert (training.metrics or {})["heldout_perplexity"] == result.perplexity_after
    assert (
        str(path.parent) not in manifest.dump().decode()
    )  # where it was trained is nobody's business, and would change its bytes
    card = (out / "README.md").read_text()
    assert 'base_model: "someone/tiny"\nlibrary_name: "peft"' in card
    assert "# Squares: a test" in card


def test_the_card_has_the_license_and_lines_that_load_the_adapter(trained, tmp_path: Path, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    card = (trained[0] / "README.md").read_text()
    assert 'license: "mit"' in card
    code = card.partition("```python\n")[2].partition("```")[0]
    assert 'from_pretrained("someone/tiny")' in code
    script = tmp_path / "load.py"
    script.write_text(code.replace("someone/tiny", str(tiny_base)).replace("PATH", str(trained[0])))
    assert type(runpy.run_path(str(script))["model"]).__name__ == "PeftModelForCausalLM"


def test_accumulated_gradients_are_those_of_one_batch(tmp_path: Path, tiny_base: Path) -> None:
    """Rows with few labels must count by their tokens."""
    factors = []
    for micro in (4, 1):
        path = settings(tmp_path, tiny_base, steps=1, micro_rows=micro)
        loaded, rows = prepared(train.read_config(path))
        rows.labels[0, 5:] = IGNORED
        state = new_state(loaded.model, train_config.OptimConfig(rows=4, micro_rows=micro, clip=0))
        gradients = {}
        for path_name, layer in lora.lora_layers(loaded.model):
            layer.lora_B.register_post_accumulate_grad_hook(partial(keep, gradients, path_name))
        training_loop.advance(loaded, rows, state, train_config.OptimConfig(rows=4, micro_rows=micro, clip=0), steps=1)
        factors.append(gradients)
    for name, gradient in factors[0].items():
        torch.testing.assert_close(factors[1][name], gradient, rtol=1e-4, atol=1e-6)


def keep(gradients: dict[str, object], name: str, parameter: object) -> None:
    gradients[name] = parameter.grad.clone()  # type: ignore[attr-defined]


def prepared(settings_: train.TrainConfig, dtype: Any = "float32"):  # type: ignore[no-untyped-def]
    """The base in `dtype` and the training rows, as the trainer makes them."""
    settings_ = dataclasses.replace(settings_, base=dataclasses.replace(settings_.base, dtype=dtype))
    base = load_base(settings_.resolve(settings_.base.path), settings_.base, settings_.lora, location="c.toml")
    lora.reset(base.model, 0)
    files = [document_files.read(settings_.resolve("train.jsonl"))]
    rows = dataset.build(files, base.tokenizer, sequence=48, loss="all", seed=0).rows
    return base, rows


@pytest.mark.peer
def test_losses_are_those_of_peft_on_bitsandbytes(tmp_path: Path, tiny_base: Path) -> None:
    need_module("peft")
    need_module("bitsandbytes")
    import bitsandbytes
    import transformers
    from peft import LoraConfig, get_peft_model

    options = train_config.OptimConfig(steps=8, rows=4, learning_rate=0.01, schedule="linear", clip=1.0)
    loaded, rows = prepared(train.read_config(settings(tmp_path, tiny_base)))
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and module.in_features % 64:  # bitsandbytes' kernel for CPUs is wrong there
            module.weight.data = nf4_matrix.dequantize_reference(nf4_matrix.quantize(module.weight.data), torch.float32)
        elif isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            linear = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            linear.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            lora.replace_module(model, name, linear.to("cpu"))
    theirs = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, layer in lora.lora_layers(loaded.model):
        module = theirs.base_model.model.get_submodule(name)
        module.lora_A["default"].weight.data.copy_(layer.lora_A.data)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    state = new_state(loaded.model, options)
    for step in range(8):
        chosen = order(len(rows), 32, options.seed)[step * 4 : step * 4 + 4]
        labels = torch.from_numpy(rows.labels[chosen])
        logits = theirs(
            input_ids=torch.from_numpy(rows.ids[chosen]), position_ids=torch.from_numpy(rows.positions[chosen]), use_cache=False
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(options, step, 8)
        optimizer.step()
        optimizer.zero_grad()
        assert training_loop.advance(loaded, rows, state, options, steps=8)["loss"] == pytest.approx(loss.item(), rel=2e-4), (
            step
        )


@pytest.mark.peer
def test_peft_loads_the_folder_and_computes_the_same(trained, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    need_module("peft")
    import transformers
    from peft import PeftModel

    out, path, _, _ = trained
    ids = torch.arange(3, 43)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(model, out)
    settings_ = dataclasses.replace(
        train.read_config(path), base=train_config.BaseConfig(path=str(tiny_base), quantize="none", dtype="float32")
    )
    base = load_base(tiny_base, settings_.base, settings_.lora, location="")
    adapter = peft_format.read(out)
    for name, layer in lora.lora_layers(base.model):
        layer.lora_A.data.copy_(torch.from_numpy(adapter.deltas[name].lora_A))
        layer.lora_B.data.copy_(torch.from_numpy(adapter.deltas[name].lora_B))
    with torch.no_grad():
        logits = theirs(ids).logits
        torch.testing.assert_close(base.model(ids).logits, logits, rtol=1e-4, atol=1e-4)
        assert (logits - theirs.get_base_model()(ids).logits).abs().max() == 0  # peft computes in place
        with theirs.disable_adapter():
            assert (theirs(ids).logits - logits).abs().max() > 0.1


def test_documents_in_one_row_do_not_see_each_other(tiny_base: Path) -> None:
    base = load_base(
        tiny_base, train_config.BaseConfig("", quantize="none", dtype="float32"), train_config.LoRAConfig(r=2), location=""
    )
    alone, other_ids = torch.arange(40, 52), torch.arange(100, 110)
    positions = torch.cat([torch.arange(10), torch.arange(12)])[None]
    with torch.no_grad():
        expected = base.model(alone[None], use_cache=False).logits[0]
        packed = base.model(torch.cat([other_ids, alone])[None], position_ids=positions, use_cache=False).logits[0, 10:]
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [64, 520])  # rows short enough for our own attention, and longer ones
def test_changing_one_sample_changes_no_others_loss(length: int, tiny_base: Path) -> None:
    base = load_base(
        tiny_base, train_config.BaseConfig("", quantize="none", dtype="float32"), train_config.LoRAConfig(r=2), location=""
    )
    numbers = np.random.default_rng(0)
    texts = [numbers.integers(3, 250, size) for size in (length // 2, length // 4, length // 4)]
    other_texts = [texts[0], numbers.integers(3, 250, length // 4), texts[2]]

    def losses(documents: list[np.ndarray]) -> list[float]:
        """The loss of each document, all in one row."""
        rows = packed_rows([Example(ids, np.ones(len(ids), bool), joint=True) for ids in documents], length)
        assert len(rows) == 1
        losses_by_document, starts = [], [*np.flatnonzero(rows.positions[0] == 0), length]
        for start, end in itertools.pairwise(starts):
            labels = np.full_like(rows.labels, IGNORED)
            labels[:, start:end] = rows.labels[:, start:end]
            losses_by_document.append(-logprobs(base, Rows(rows.ids, labels, rows.positions)).sum().item())
        return losses_by_document

    before, after = losses(texts), losses(other_texts)
    assert (before[0], before[2]) == (after[0], after[2])
    assert before[1] != after[1]


def test_cross_entropy_in_chunks_is_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 150, 16, requires_grad=True), torch.randn(90, 16)
    labels = torch.randint(0, 90, (3, 150))
    labels[0, :60] = IGNORED
    ours = cross_entropy(hidden, head, labels).sum()
    logits = hidden @ head.t()
    plain = torch.nn.functional.cross_entropy(logits.view(-1, 90), labels.view(-1), ignore_index=IGNORED, reduction="sum")
    torch.testing.assert_close(ours, plain)
    (gradient,) = torch.autograd.grad(ours * 0.5, hidden)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain * 0.5, hidden)[0], rtol=1e-4, atol=1e-5)


def test_checkpointing_changes_no_number(trained, tmp_path: Path, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    out, _, _, _ = trained
    path = settings(tmp_path, tiny_base, checkpointing=True)
    train.run(train.read_config(path), tmp_path / "out")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (out / weights).read_bytes()


# ---- Step by step


def test_steps_done_by_a_program_give_the_bytes_of_a_run(trained, tmp_path: Path, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    out, path, _, _ = trained
    event_names: list[str] = []
    with train.open_trainer(
        train.read_config(path), tmp_path / "out", on_event=lambda event: event_names.append(type(event).__name__)
    ) as trainer:
        trainer.evaluate()
        for batch in trainer.batches():
            trainer.forward_backward(batch)
            trainer.optim_step()
        assert trainer.evaluate() == trainer.state.heldout(6)
        result = trainer.save()
    assert contents(result.folder) == contents(out)
    steps = ["EvaluationEvent", *["StepEvent"] * 6, "EvaluationEvent", "SaveEvent"]
    assert [name for name in event_names if name not in ("Loading", "Encoding")] == ["Ready", *steps]


def test_a_loss_of_ones_own_learns_with_its_gradient_and_is_recorded(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The usual loss written by a user, in two halves of each batch, is the usual training; half of it is not."""
    _, path, _, usual = trained
    halves = [np.arange(2), np.arange(2, 4)]
    results = []
    for share in (1.0, 0.5):
        with train.open_trainer(train.read_config(path), tmp_path / str(share)) as trainer:
            for batch in trainer.batches():

                def mean(logprobs, rows, share=share, tokens=batch.label_tokens):  # type: ignore[no-untyped-def]
                    assert logprobs.shape == rows.labels.shape
                    assert bool(((logprobs != 0).numpy() == (rows.labels != IGNORED)).all())
                    return -share * logprobs.sum() / tokens

                for half in halves:
                    trainer.forward_backward(batch.take(half), mean)
                trainer.optim_step()
            results.append(trainer.save())
    assert results[0].loss == pytest.approx(usual.loss, rel=1e-3)
    assert results[1].loss == pytest.approx(usual.loss / 2, rel=0.1)
    manifest = AdapterManifest.read(tmp_path / "1.0")
    assert manifest is not None
    assert manifest.training is not None
    assert (manifest.training.config or {})["loss_function"].endswith("mean")


def test_a_program_stops_and_goes_on_samples_and_cannot_save_nothing(trained, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out, path, _, _ = trained
    with train.open_trainer(train.read_config(path), tmp_path / "out") as trainer:
        with pytest.raises(UsageError, match="nothing to save"):
            trainer.save()
        batches = trainer.batches()
        next(batches)
        with pytest.raises(UsageError, match="step 1 was not done"):
            next(batches)
        for batch in itertools.islice(trainer.batches(), 2):
            trainer.forward_backward(batch)
            trainer.optim_step()
        assert len(trainer.sample("2 times", tokens=3)) <= 12
        trainer.save_checkpoint()
    with train.open_trainer(train.read_config(path), tmp_path / "out") as trainer:
        assert trainer.state.step == 2
        trainer.run()
        trainer.save()
    weights = "adapter_model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (out / weights).read_bytes()


# Ends by the signal that it sends to itself after a step.
RUN = """
import os, sys
from pathlib import Path
from adapterhub import training as train
def say(event):
    if isinstance(event, train.StepEvent) and event.step == int(sys.argv[3]):
        os.kill(os.getpid(), int(sys.argv[4]))
try:
    train.run(train.read_config(Path(sys.argv[1])), Path(sys.argv[2]), on_event=say)
except Exception as error:
    print(type(error).__name__, error, getattr(error, "code", ""))
"""


def test_a_stopped_run_resumes_to_the_same_bytes(trained, learn: Run, tmp_path: Path, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    out, path, _, _ = trained
    stdout = learn(RUN, path, tmp_path / "out", 2, int(signal.SIGTERM)).stdout
    assert "StoppedError" in stdout
    assert "The same training resumes from it" in stdout
    assert stdout.split()[-1] == "training-stopped"
    checkpoint = tmp_path / "out.checkpoint.safetensors"
    assert checkpoint.exists()
    assert not (tmp_path / "out").exists()
    changed = settings(tmp_path / "other", tiny_base, learning_rate=0.02)
    with pytest.raises(ConflictError, match="belongs to a training with another config, data, base or version"):
        train.run(train.read_config(changed), tmp_path / "out")
    events: list[train.Event] = []
    train.run(train.read_config(path), tmp_path / "out", on_event=events.append)
    assert any(isinstance(event, train.ResumeEvent) for event in events)
    for name, raw in contents(out).items():
        assert contents(tmp_path / "out")[name] == raw, name
    assert not checkpoint.exists()


def test_refusals(tmp_path: Path, tiny_base: Path) -> None:
    path = settings(tmp_path, tiny_base)
    (tmp_path / "full").mkdir()
    for nowhere in ("/proc/out", path / "out"):
        with pytest.raises(LocalIOError, match="out: .*; nothing was left behind") as caught:
            train.run(train.read_config(path), Path(nowhere), on_event=lambda event: pytest.fail(str(event)))
        assert caught.value.code == "io-error"
    (tmp_path / "full" / "x").write_text("mine")
    with pytest.raises(OutputExistsError, match="already exists"):
        train.run(train.read_config(path), tmp_path / "full")
    path.write_text(path.read_text().replace("alpha = 8", 'alpha = 8\ntargets = ["gate"]'))
    with pytest.raises(RefusedError, match="'gate' matches no linear layer"):
        train.run(train.read_config(path), tmp_path / "out")
    path.write_text(path.read_text().replace(json.dumps(str(tiny_base)), '"nowhere"'))
    with pytest.raises(AdapterhubError, match="nowhere"):
        train.run(train.read_config(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_samples_without_held_out_data_are_a_note(tmp_path: Path, tiny_base: Path) -> None:
    path = settings(tmp_path, tiny_base)
    events: list[object] = []
    config = train.read_config(path, ["data.heldout=[]", "train.evaluate_every=0", 'train.samples=["a"]', "train.steps=1"])
    train.run(config, tmp_path / "out", on_event=events.append)
    (notes,) = [event.notes for event in events if isinstance(event, train.Ready)]
    assert "[train] samples are answered when held-out data are evaluated, and there are none" in notes


def test_the_memory_plan_counts_what_there_is(trained) -> None:  # type: ignore[no-untyped-def]
    _, path, events, _ = trained
    settings_ = train.read_config(path)
    planned = budget.forecast(settings_, read_base(settings_.resolve(settings_.base.path))).memory
    ready = next(event for event in events if isinstance(event, train.Ready))
    assert planned == ready.memory
    assert planned.adapter == 4 * ready.parameters
    assert planned.total > planned.runtime


def test_the_report_counts_what_was_computed(trained) -> None:  # type: ignore[no-untyped-def]
    out, path, events, result = trained
    read = sum(event.read for event in events if isinstance(event, train.StepEvent))
    report, settings_ = result.report, train.read_config(path)
    linears, head, trained_numbers = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3), 259 * 64, report.parameters
    windows = [size for text in TEXTS[:20] for size in (48, (len(text) + 1) % 48)]  # of 49 to 95 tokens
    attention = 12 * 2 * 64 * sum(size**2 for size in windows) / sum(windows)
    assert report.flops == round(read * (4 * linears + 6 * trained_numbers + attention)) + 4 * head * result.tokens
    assert report.base_parameters == linears + head + 5 * 64
    assert report.predicted == budget.forecast(settings_, read_base(settings_.resolve(settings_.base.path))).memory.total
    assert report.tokens_per_second == pytest.approx(read / report.seconds)
    assert result.tokens < read <= 6 * 4 * 48  # every row has a token that predicts nothing; the last row is not full
    assert report.utilization == pytest.approx(report.flops / report.seconds / report.matmul)
    manifest = AdapterManifest.read(out)
    assert manifest is not None
    assert manifest.training is not None
    metrics = manifest.training.metrics or {}
    assert (metrics["flops"], metrics["trained_share"]) == (report.flops, report.share)
    assert all(isinstance(event, train.Event) for event in events)


def test_the_manifest_has_the_weights_that_were_trained_on_and_the_curve(trained, tiny_base: Path) -> None:  # type: ignore[no-untyped-def]
    out, _, events, _ = trained
    manifest = AdapterManifest.read(out)
    assert manifest is not None
    training = manifest.to_dict()["training"]
    raw = (tiny_base / "model.safetensors").read_bytes()
    digest = f"sha256:{hashlib.sha256(raw).hexdigest()}"
    assert training["weights"] == [{"path": "model.safetensors", "digest": digest, "size": len(raw)}]
    steps = [{"step": event.step, "loss": event.loss} for event in events if isinstance(event, train.StepEvent)]
    evaluations = [
        {"step": event.step, "heldout_loss": event.loss} for event in events if isinstance(event, train.EvaluationEvent)
    ]
    assert training["curve"] == [evaluations[0], *steps, evaluations[1]]
    assert set(training) == {"config", "data", "weights", "seed", "versions", "metrics", "curve", "recorder"}


def test_a_long_curve_is_thinned_and_keeps_its_last_step_and_all_that_was_held_out() -> None:
    log = [{"step": step, "loss": 1.0, "tokens": 9} for step in range(1, 1001)] + [{"step": 1000, "heldout_loss": 0.5}]
    curve = finished_folder.curve(State(None, log=log))
    assert len(curve) <= 101
    assert curve[-2:] == [{"step": 1000, "loss": 1.0}, {"step": 1000, "heldout_loss": 0.5}]
