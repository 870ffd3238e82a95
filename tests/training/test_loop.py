"""What a step is: the same gradient however it is cut up, noise as transformers draws it, the best kept, the rest given up."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from adapterhub import training  # noqa: E402
from adapterhub.training import compute_device, machine, train_config  # noqa: E402
from adapterhub.training.artifacts import loss_curve, tracking  # noqa: E402
from adapterhub.training.data import dataset, document_files  # noqa: E402
from adapterhub.training.data.packed_rows import IGNORED  # noqa: E402
from adapterhub.training.layers import expert_stacks, lora, nf4_matrix  # noqa: E402
from adapterhub.training.loop import heldout, optimizer, training_loop  # noqa: E402
from adapterhub.training.loop.state import best_step, new_state, out_of_patience  # noqa: E402
from adapterhub.training.model.loading import dequantize  # noqa: E402
from adapterhub_converters.errors import MissingExtraError, RefusedError, UsageError  # noqa: E402
from tests.conftest import Run, need_module  # noqa: E402
from tests.training.conftest import load_base  # noqa: E402
from tests.training.test_kinds import loaded, peft_losses, peft_model, rows, whole  # noqa: E402
from tests.training.test_trainer import RUN, contents, settings  # noqa: E402


def test_four_times_two_rows_learn_what_eight_rows_do(tiny_base: Path) -> None:
    """Rows have one to 24 labels: an average of averages would be another loss, and another adapter."""
    documents = rows(16)
    for number in range(16):
        documents.labels[number, 1 + number % 24 :] = IGNORED
    runs = []
    for micro in (8, 2):
        loaded_model, options = loaded(whole(tiny_base)), train_config.OptimConfig(rows=8, micro_rows=micro, learning_rate=5e-3)
        state = new_state(loaded_model.model, options)
        losses = [training_loop.advance(loaded_model, documents, state, options, 6)["loss"] for _ in range(6)]
        runs.append((losses, dict(lora.trained_parameters(loaded_model.model))))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-6)
    for name, parameter in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], parameter, rtol=1e-3, atol=2e-5)


@pytest.mark.peer
def test_noise_on_the_embeddings_is_transformers(tiny_base: Path) -> None:
    need_module("peft")
    from transformers.integrations.neftune import neftune_post_forward_hook

    plan = whole(tiny_base, targets=("q_proj", "down_proj"))
    plan = replace(plan, train=replace(plan.train, neftune=5.0))
    ours = loaded(plan)
    theirs = peft_model(plan, ours)
    table = theirs.get_input_embeddings()
    table.neftune_noise_alpha = 5.0
    table.register_forward_hook(neftune_post_forward_hook)
    expected = peft_losses(theirs, plan, rows())
    state = new_state(ours.model, plan.train)
    losses = [training_loop.advance(ours, rows(), state, plan.train, 20)["loss"] for _ in range(20)]
    assert losses == pytest.approx(expected, abs=1e-5, rel=1e-5)
    quiet = heldout.evaluate(ours, rows(), 4)
    assert quiet == heldout.evaluate(ours, rows(), 4)


@pytest.mark.parametrize(("words", "expected"), [({}, [1] * 10), ({"steps": 3}, [1] * 8 + [2] * 2), ({"epochs": 1.5}, None)])
def test_an_epoch_has_every_row_once(words: dict[str, Any], expected: list[int] | None, tiny_base: Path) -> None:
    """Also where the rows of a step do not divide them: the last step has fewer."""
    loaded_model, options = loaded(whole(tiny_base)), train_config.OptimConfig(rows=4, learning_rate=1e-3, **words)
    steps = replace(whole(tiny_base), train=options).steps(10)
    state = new_state(loaded_model.model, options)
    training_loop.run(loaded_model, rows(10), None, state, options, steps=steps, save=Path, keep=Path, on_event=lambda _: None)
    assert state.order is not None
    assert state.step == steps
    drawn = sorted(np.bincount(state.order, minlength=10).tolist())
    assert drawn == (expected or [1] * 5 + [2] * 5)


def test_only_factors_decay(tiny_base: Path) -> None:
    """Without a gradient, decay alone moves a parameter: toward 0, which is the start of factors only."""
    for words in ({"lora_bias": True}, {"dora": True}, {"trainable_token_indices": (3, 4)}):
        plan = whole(tiny_base, **words)
        loaded_model = loaded(plan)
        options = replace(plan.train, weight_decay=0.5, clip=0.0)
        state = new_state(loaded_model.model, options)
        before = {}
        for name, parameter in lora.trained_parameters(loaded_model.model):
            parameter.grad = torch.zeros_like(parameter)
            with torch.no_grad():
                parameter.add_(1)
            before[name] = parameter.detach().clone()
        for group in state.optimizer.param_groups:
            group["lr"] = 0.1 * group["ratio"]
        state.optimizer.step()
        for name, parameter in lora.trained_parameters(loaded_model.model):
            factor = 0.95 if name.endswith(("lora_A", "lora_B")) else 1
            torch.testing.assert_close(parameter.detach(), before[name] * factor)


WAITING = {"steps": 3, "threads": 2, "rows": 2}


def poisoned(layer: Any, steps: set[int]) -> None:
    """Have the gradient of a layer be infinite in some of its steps."""
    count = iter(range(1000))
    layer.lora_B.register_hook(lambda gradient: gradient * (float("inf") if next(count) in steps else 1))


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_base: Path) -> None:
    """In every dtype: with it, clipping would make every parameter NaN."""
    loaded_model, options = loaded(whole(tiny_base)), train_config.OptimConfig(rows=2, learning_rate=5e-3)
    poisoned(next(layer for _, layer in lora.lora_layers(loaded_model.model)), {1, 2, 4})
    state, events = new_state(loaded_model.model, options), []
    training_loop.run(loaded_model, rows(), None, state, options, steps=6, save=Path, keep=Path, on_event=events.append)
    assert [line["step"] for line in state.log if line.get("skipped")] == [2, 3, 5]
    noted = [event.text for event in events if isinstance(event, training.NoteEvent)]
    assert noted[0] == "step 2 changed nothing, because its gradient is not finite"
    assert len(noted) == 3
    assert all(torch.isfinite(parameter).all() for _, parameter in lora.trained_parameters(loaded_model.model))


def test_a_gradient_that_stays_infinite_ends_the_training(tiny_base: Path) -> None:
    loaded_model, options = loaded(whole(tiny_base)), train_config.OptimConfig(rows=2, learning_rate=5e-3)
    poisoned(next(layer for _, layer in lora.lora_layers(loaded_model.model)), {2, 3, 4})
    with pytest.raises(RefusedError, match=r"train: the gradient was not finite in 3 steps in a row, up to step 5") as ended:
        training_loop.run(
            loaded_model,
            rows(),
            None,
            new_state(loaded_model.model, options),
            options,
            steps=6,
            save=Path,
            keep=Path,
            on_event=lambda _: None,
        )
    assert (ended.value.code, ended.value.hint) == ("diverged", "Lower learning_rate, or set base.dtype to float32")


@pytest.mark.parametrize("is_heldout", [True, False])
def test_a_loss_that_is_not_finite_ends_the_training_by_name(is_heldout: bool, tiny_base: Path) -> None:
    loaded_model, options = loaded(whole(tiny_base)), train_config.OptimConfig(rows=2)
    with torch.no_grad():
        next(layer for _, layer in lora.lora_layers(loaded_model.model)).lora_B.fill_(float("nan"))
    says = f"train: the {'held-out ' * is_heldout}loss is nan at step {1 - is_heldout}. Lower learning_rate, or raise warmup"
    heldout_rows, state = rows() if is_heldout else None, new_state(loaded_model.model, options)
    with pytest.raises(RefusedError, match=says) as ended:
        training_loop.run(
            loaded_model, rows(), heldout_rows, state, options, steps=2, save=Path, keep=Path, on_event=lambda _: None
        )
    assert ended.value.code == "diverged"


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, bytes]:
    """What a training of three steps in two threads writes where nothing is said of them."""
    folder = tmp_path_factory.mktemp("quiet")
    training.run(training.read_config(settings(folder, tiny_base, **WAITING)), folder / "out")
    return contents(folder / "out")


@pytest.mark.parametrize(("busy", "gain", "notes"), [(True, 2.5, 1), (True, 1.1, 0), (False, 2.5, 0)])
def test_the_cost_of_waiting_threads_is_told_once_and_changes_no_byte(
    busy: bool,
    gain: float,
    notes: int,
    tmp_path: Path,
    tiny_base: Path,
    quiet: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """How busy this machine is, and how fast, no test can know; the trial itself runs."""
    trial = compute_device.gain_of_one_thread
    monkeypatch.setattr(compute_device, "gain_of_one_thread", lambda work: gain * bool(trial(work)))
    monkeypatch.setattr(training_loop, "_TRIAL_STEP", 2)
    monkeypatch.setattr(training_loop, "_MAX_TRIAL_SECONDS", float("inf"))  # a step can take long beside other programs
    plan, events = training.read_config(settings(tmp_path, tiny_base, **WAITING)), []
    monkeypatch.setattr(training_loop, "cores_are_busy", lambda: busy)
    training.run(plan, tmp_path / "out", on_event=events.append)
    noted = [event.text for event in events if isinstance(event, training.NoteEvent)]
    assert len(noted) == notes
    assert all("with threads = 1 it would be about 2.5 times as fast" in note for note in noted)
    assert contents(tmp_path / "out") == quiet


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"schedule": "constant", "warmup": 3}, [0.25, 0.5, 0.75, 1.0, 1.0]),
        ({"schedule": "linear"}, [1.0, 0.9, 0.8, 0.7, 0.6]),
    ],
)
def test_the_rate(words: dict[str, Any], expected: list[float]) -> None:
    options = train_config.OptimConfig(learning_rate=1.0, **words)
    assert [optimizer.learning_rate(options, step, 10) for step in range(5)] == pytest.approx(expected)


def log(*losses: float) -> list[dict[str, Any]]:
    return [{"step": 2 * number, "heldout_loss": loss} for number, loss in enumerate(losses)]


def test_giving_up() -> None:
    assert best_step(log(3, 2, 1, 1, 2)) == 4
    assert not out_of_patience(log(3, 2, 1, 1), 2)
    assert out_of_patience(log(3, 2, 1, 1, 2), 2)
    assert not out_of_patience(log(3, 2, 1, 1, 2), 0)
    assert not out_of_patience([], 1)


def spoiling(folder: Path, tiny_base: Path, **words: object) -> Path:
    """A training that soon gets worse."""
    keys = {"steps": 30, "learning_rate": 1.0, "schedule": "constant", "evaluate_every": 1, "keep_best": True, **words}
    return settings(folder, tiny_base, **keys)


def test_the_best_is_kept_and_patience_ends(tmp_path: Path, tiny_base: Path) -> None:
    path = spoiling(tmp_path, tiny_base, patience=2)
    result = training.run(training.read_config(path), tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    losses = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
    assert result.steps < 30
    assert losses.index(min(losses)) == len(losses) - 3
    assert result.perplexity_after == pytest.approx(np.exp(min(losses)))
    assert result.kept_step == result.steps - 2
    # What is written is the best, not the last.
    base = load_base(tiny_base, train_config.BaseConfig(str(tiny_base)), train_config.LoRAConfig(r=4, alpha=8), location="")
    from adapterhub_converters.formats import peft as peft_format

    written = peft_format.read(tmp_path / "out")
    for name, layer in lora.lora_layers(base.model):
        layer.lora_A.data.copy_(torch.from_numpy(written.deltas[name].lora_A))
        layer.lora_B.data.copy_(torch.from_numpy(written.deltas[name].lora_B))
    files = [document_files.read(tmp_path / "heldout.jsonl")]
    heldout_rows = dataset.build(files, base.tokenizer, sequence=48, loss="completion", seed=None).rows
    assert heldout.evaluate(base, heldout_rows, 4) == pytest.approx(min(losses), rel=1e-4)


def test_with_checkpointing_the_same_is_learned_byte_for_byte(tmp_path: Path, tiny_base: Path) -> None:
    """Or `auto` would have the result depend on how much memory was free."""
    path = settings(tmp_path, tiny_base, steps=3, neftune=5.0)
    path.write_text(path.read_text().replace("alpha = 8", "alpha = 8\ndropout = 0.1\ndora = true"))
    plain = training.read_config(path)
    for out, on in (("kept", False), ("again", True)):
        result = training.run(replace(plain, train=replace(plain.train, checkpointing=on)), tmp_path / out)
        assert result.report is not None
        assert result.report.checkpointing is on
    for name in ("adapter_model.safetensors", "log.jsonl"):
        assert contents(tmp_path / "kept")[name] == contents(tmp_path / "again")[name]


def test_with_a_dequantized_base_the_same_is_learned_byte_for_byte(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings(tmp_path, tiny_base, steps=3)
    events: list[Any] = []
    for is_fast in (False, True):
        monkeypatch.setattr(machine, "multiplies_bfloat16_fast", lambda is_fast=is_fast: is_fast)
        training.run(training.read_config(path), tmp_path / str(is_fast), on_event=events.append)
    assert contents(tmp_path / "False") == contents(tmp_path / "True")
    assert [event.dequantized for event in events if isinstance(event, training.Ready)] == [False, True]


def test_with_reused_memory_for_dense_weights_the_same_is_learned_byte_for_byte(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = settings(tmp_path, tiny_base, steps=3)
    for max_new_bytes in (nf4_matrix.MAX_NEW_BYTES, 0):
        monkeypatch.setattr(nf4_matrix, "MAX_NEW_BYTES", max_new_bytes)
        training.run(training.read_config(path), tmp_path / str(bool(max_new_bytes)))
    assert contents(tmp_path / "True") == contents(tmp_path / "False")


def test_a_dtype_that_the_processor_multiplies_slowly_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, card = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.setattr(compute_device, "multiplies_bfloat16", lambda: False)
    [note] = compute_device.dtype_notes("bfloat16", cpu)
    assert note.endswith('set dtype = "float32" in [base]')
    assert compute_device.dtype_notes("float32", cpu) == compute_device.dtype_notes("bfloat16", card) == []
    monkeypatch.setattr(compute_device, "multiplies_bfloat16", lambda: True)
    assert compute_device.dtype_notes("bfloat16", cpu) == []


def test_small_products_of_sixteen_bits_are_in_float32_where_the_processor_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, card = torch.device("cpu"), torch.device("cuda", 0)
    for is_fast in (False, True):
        monkeypatch.setattr(compute_device, "multiplies_bfloat16", lambda is_fast=is_fast: is_fast)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert compute_device.product_dtype(dtype, cpu) == (dtype if is_fast else torch.float32)
            assert compute_device.product_dtype(dtype, card) == dtype


def test_a_dry_run_has_the_note_on_a_slow_dtype_as_well(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = training.read_config(settings(tmp_path, tiny_base, steps=3))
    config = replace(config, base=replace(config.base, dtype="bfloat16"))
    monkeypatch.setattr(compute_device, "multiplies_bfloat16", lambda: False)
    slow = "this processor multiplies bfloat16 4 to 15 times slower"
    assert any(note.startswith(slow) for note in training.preview(config).notes)
    assert not any(note.startswith(slow) for note in training.preview(config, on_this_machine=False).notes)


def test_dequantized_experts_compute_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = [nf4_matrix.quantize(torch.randn(64, 128, generator=generator), "w") for _ in range(3)]
    stack = expert_stacks.Stack(matrices, transposed=False)
    x = torch.randn(7, 128, generator=generator).bfloat16()
    before = stack(x, [3, 0, 4])
    dequantize(torch.nn.ModuleList([stack]), torch.bfloat16)
    assert not any(isinstance(matrix, nf4_matrix.NF4) for matrix in stack.matrices)
    assert (stack(x, [3, 0, 4]) == before).all()


def test_a_killed_run_resumes_to_the_same_bytes(learn: Run, tmp_path: Path, tiny_base: Path) -> None:
    """With all that is drawn by chance, and a best that lies before the checkpoint."""
    path = spoiling(tmp_path, tiny_base, neftune=5.0, save_every=3, steps=8, samples=["3 times 3"], sample_tokens=4)
    path.write_text(path.read_text().replace("alpha = 8", "alpha = 8\ndropout = 0.1\ndora = true"))
    training.run(training.read_config(path), tmp_path / "whole")
    assert learn(RUN, path, tmp_path / "out", 4, int(signal.SIGKILL)).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    events: list[training.Event] = []
    # The interval is no part of the result: it may change before a run resumes.
    training.run(training.read_config(path, ["train.save_minutes=0"]), tmp_path / "out", on_event=events.append)
    assert [event.step for event in events if isinstance(event, training.ResumeEvent)] == [3]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_checkpoints_are_written_by_time_unless_that_is_off(tmp_path: Path, tiny_base: Path) -> None:
    for minutes, expected in ((1e-9, [1, 2, 3]), (0, [3])):
        path, events = settings(tmp_path, tiny_base, save_minutes=minutes, steps=3), list[Any]()
        training.run(training.read_config(path), tmp_path / "out", on_event=events.append, replace=True)
        assert [event.step for event in events if isinstance(event, training.SaveEvent)] == expected


def test_a_checkpoint_that_cannot_be_written_is_a_note_and_the_run_goes_on(tmp_path: Path, tiny_base: Path) -> None:
    path = settings(tmp_path, tiny_base, save_every=2, steps=5)
    checkpoint = tmp_path / "out.checkpoint.safetensors"
    events: list[Any] = []

    def note_and_block(event: object) -> None:
        events.append(event)
        if isinstance(event, training.StepEvent):  # a folder in its place from the first step to the third
            checkpoint.mkdir() if event.step == 1 else checkpoint.rmdir() if event.step == 3 else None

    training.run(training.read_config(path), tmp_path / "out", on_event=note_and_block)
    [note] = [event.text for event in events if isinstance(event, training.NoteEvent)]
    assert note.startswith(f"no checkpoint was written after step 2: {checkpoint}: ")
    assert [event.step for event in events if isinstance(event, training.SaveEvent)] == [4, 5]
    assert not checkpoint.exists()


def test_samples_equal_the_output_of_generate(tiny_base: Path) -> None:
    loaded_model = loaded(whole(tiny_base))
    (sample,) = heldout.answers(loaded_model, ["what?"], 6)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    ids = loaded_model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "what?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    expected = plain.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert sample == {"prompt": "what?", "text": loaded_model.tokenizer.decode(expected, skip_special_tokens=True)}
    assert loaded_model.model.training


def test_numbers_go_to_tensorboard(tmp_path: Path, tiny_base: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = settings(tmp_path, tiny_base, steps=2, log_to=["tensorboard"])
    training.run(training.read_config(path), tmp_path / "out")
    read = EventAccumulator(str(tmp_path / "out.tensorboard"))
    read.Reload()
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [event.value for event in read.Scalars("train/loss")] == pytest.approx(losses)
    assert [event.step for event in read.Scalars("heldout/perplexity")] == [0, 2]


def test_unsupported_numbers_are_reported(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = settings(tmp_path, tiny_base, log_to=["paper"])
    with pytest.raises(UsageError, match="unknown tracker 'paper'. Use tensorboard or wandb; from Python, on_event"):
        training.run(training.read_config(path), tmp_path / "out")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtraError, match="wandb is not installed. Run `pip install wandb`"):
        training.run(replace(training.read_config(path), train=train_config.OptimConfig(log_to=("wandb",))), tmp_path / "out")


def test_a_log_that_does_not_start_is_one_line(tmp_path: Path, tiny_base: Path) -> None:
    pytest.importorskip("tensorboard")
    path = settings(tmp_path, tiny_base, log_to=["tensorboard"])
    (tmp_path / "out.tensorboard").write_text("in the way")
    with pytest.raises(RefusedError, match=r"\[train\] log_to: tensorboard does not start .* or remove it from log_to"):
        training.run(training.read_config(path), tmp_path / "out")


def test_a_log_that_fails_meanwhile_is_reported_and_gets_no_more_events() -> None:
    events: list[Any] = []
    logged: dict[str, list[int]] = {"good": [], "bad": []}

    def bad(step: int, numbers: Any) -> None:
        logged["bad"].append(step)
        raise ConnectionError("no such\nhost")

    tell = tracking.logging_to({"bad": bad, "good": lambda step, numbers: logged["good"].append(step)}, events.append)
    steps = [training.StepEvent(n, 3, 1.0, 1e-3, 1.0, 10 * n, 5.0, 0) for n in (1, 2, 3)]
    for step in steps:
        tell(step)
    assert logged == {"good": [1, 2, 3], "bad": [1]}
    assert events == [training.TrackerFailureEvent("bad", "no such host"), *steps]


@pytest.mark.parametrize("fails", [False, True])
def test_a_log_receives_whether_the_training_failed(
    fails: bool, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed_with: list[Any] = []

    class Opened:
        def __enter__(self) -> Any:
            return lambda step, numbers: None

        def __exit__(self, kind: Any, *_: object) -> None:
            closed_with.append(kind)
            raise ConnectionError("gone")

    monkeypatch.setitem(tracking._TRACKERS, "tensorboard", lambda config, out: Opened())
    settled = training.read_config(settings(tmp_path, tiny_base, log_to=["tensorboard"]))
    events: list[Any] = []
    try:
        with tracking.with_trackers(settled, tmp_path / "out", events.append):
            if fails:
                raise UsageError("x", "wrong")
    except ConnectionError:
        assert fails
    assert (closed_with, events) == (
        ([UsageError], []) if fails else ([None], [training.TrackerFailureEvent("tensorboard", "gone")])
    )


def test_a_curve_in_a_line() -> None:
    assert loss_curve.line([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert len(loss_curve.line(list(range(1000)), 24)) == 24
    assert (loss_curve.line([]), loss_curve.line([3.0, 3.0])) == ("", "▁▁")
