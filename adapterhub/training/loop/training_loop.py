"""The training loop: the actions of a step, in the order in which they happen."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapterhub.training import compute_device, distributed
from adapterhub.training.data.packed_rows import PackedRows, Rows, order, tokens_read
from adapterhub.training.events import NoteEvent, OnEvent, StepEvent
from adapterhub.training.machine import cores_are_busy
from adapterhub.training.model.base_model import Base
from adapterhub.training.train_config import OptimConfig, PreferenceConfig
from adapterhub_converters.errors import AdapterhubError, RefusedError, StoppedError

from .heldout import evaluate, log_evaluation
from .loss import Loss, logprobs, mean_loss, passes, sum_of_parts, trim
from .optimizer import learning_rate
from .preference import pair_count, preference_loss
from .state import State, out_of_patience, restore_trained

_MAX_SKIPPED = 3  # steps in a row without a finite gradient that are tolerated
_TRIAL_STEP = 10  # the number of steps after which their threads are checked once: by then their time is stable
_MAX_TRIAL_SECONDS = 10.0  # seconds of a step times threads
_MIN_GAIN = 1.2  # the speed-up from a single thread that is worth a note


def run(
    base: Base,
    rows: Rows | PackedRows,
    heldout: Rows | None,
    state: State,
    config: OptimConfig,
    *,
    steps: int,
    save: Callable[[], Path],
    keep: Callable[[], Path],
    on_event: OnEvent,
    preference: PreferenceConfig | None = None,
    until: int | None = None,
) -> None:
    """Train from `state` to the last step, or until patience ends.

    Args:
        save: Writes the checkpoint to resume from, and returns its path.
        keep: Writes one that stays, likewise.
        until: End after this step, without the last evaluation and the choice of the best parameters; None for the last step.

    Raises:
        StoppedError: SIGTERM or SIGINT arrived; the checkpoint after the current step is written.
        RefusedError: A loss is not finite.
    """
    first_step, last_save = state.step, time.monotonic()
    with _stop_signals() as stop_requested:
        if state.step == 0:
            log_evaluation(base, heldout, state, config, preference, steps=steps, on_event=on_event)
        while state.step < (until or steps) and not out_of_patience(state.log, config.patience):
            step_start = time.monotonic()
            log_line = advance(base, rows, state, config, steps, preference=preference)
            tokens_per_second = log_line["read"] / max(time.monotonic() - step_start, 1e-9)
            if state.step == first_step + _TRIAL_STEP and (
                note := _slow_threads_note(base, rows, config, time.monotonic() - step_start)
            ):
                on_event(NoteEvent(note))
            # In float16, a skipped step is how the loss scale finds its value; only in other dtypes is it worth a note.
            if log_line.pop("skipped", False) and not state.scale.needed:
                on_event(NoteEvent(f"step {state.step} changed nothing, because its gradient is not finite"))
            allocated = compute_device.allocated_memory(base.device)
            on_event(StepEvent(steps=steps, tokens_per_second=tokens_per_second, memory=allocated, **log_line))
            if state.step == steps or (config.evaluate_every and state.step % config.evaluate_every == 0):
                log_evaluation(base, heldout, state, config, preference, steps=steps, on_event=on_event)
            # All processes stop after the same step, no matter which of them got the signal.
            if distributed.total(stop_requested.is_set()) and state.step < steps:
                problem = f"stopped after step {state.step} of {steps}"
                raise StoppedError(str(save()), problem, "The same training resumes from it", code="training-stopped")
            due = _due_checkpoints(config, state.step, time.monotonic() - last_save, save, keep) if state.step < steps else ()
            try:
                for write in due:
                    write()
            except AdapterhubError as error:  # a full disk may have room again before the training ends
                on_event(NoteEvent(f"no checkpoint was written after step {state.step}: {error}"))
            last_save = time.monotonic() if due else last_save
    if state.best and until is None:
        restore_trained(base.model, state.best)


def _due_checkpoints(
    config: OptimConfig, step: int, seconds: float, save: Callable[[], Path], keep: Callable[[], Path]
) -> Sequence[Callable[[], Path]]:
    """Return the functions that write the checkpoints due after `step`, with the last one `seconds` ago."""
    if config.keep_every > 0 and step % config.keep_every == 0:
        return keep, save  # in this order: the log of the second one has the digest of the first
    by_time = bool(config.save_minutes) and seconds >= 60 * config.save_minutes
    return (save,) if by_time or (config.save_every > 0 and step % config.save_every == 0) else ()


def advance(
    base: Base,
    rows: Rows | PackedRows,
    state: State,
    config: OptimConfig,
    steps: int,
    *,
    preference: PreferenceConfig | None = None,
) -> dict[str, Any]:
    """Run one step over `config.rows` rows; return the result of `optim_step`, and the number of tokens read."""
    tokens_before = state.read
    step_rows = batch(rows, state, config, steps)
    forward_backward(base, step_rows, state, config, usual_loss(base, step_rows, preference))
    return {**optim_step(state, config, steps), "read": state.read - tokens_before}


def batch(rows: Rows | PackedRows, state: State, config: OptimConfig, steps: int) -> Rows:
    """Return the rows of the next of `steps` steps."""
    if state.order is None:
        # The last step of an epoch may have fewer rows, so that no row is trained on again before all others have been.
        rows_of_epochs = math.ceil(config.epochs * len(rows))
        complete_epochs = not config.steps and steps == -(rows_of_epochs // -config.rows)
        needed = rows_of_epochs if complete_epochs else steps * config.rows
        state.order = order(len(rows), needed, config.seed)
    return rows.take(state.order[state.step * config.rows : (state.step + 1) * config.rows])


def usual_loss(base: Base, rows: Rows, preference: PreferenceConfig | None) -> Loss:
    """Return the loss of a step over `rows`: the mean over their labels, or with a preference over their pairs."""
    return preference_loss(base, preference, pair_count(rows)) if preference else mean_loss(rows.label_tokens)


def forward_backward(base: Base, rows: Rows, state: State, config: OptimConfig, loss: Loss) -> float:
    """Add the gradient of the loss of `rows` to those since the last update, and return the loss.

    The rows are computed `config.micro_rows` at a time.

    Raises:
        RefusedError: The loss is not finite.
    """
    losses: list[Tensor] = []
    for start, micro_batch in passes(rows, config.micro_rows or config.rows):
        with torch.random.fork_rng(devices=[]), noise(base.model, config.neftune):
            # Dropout and noise depend on seed, step and row alone, so a resumed run draws the same numbers.
            torch.manual_seed(draw_seed(config.seed, state.step, state.rows + start))
            trimmed_rows = trim(micro_batch)
            loss_part = loss(logprobs(base, trimmed_rows), trimmed_rows)
            if loss_part.requires_grad:
                (loss_part * state.scale.factor if state.scale.needed else loss_part).backward()
        losses.append(loss_part.detach())
    value = sum_of_parts(losses)
    if not math.isfinite(value):
        raise RefusedError(
            "train", f"the loss is {value} at step {state.step + 1}", "Lower learning_rate, or raise warmup", code="diverged"
        )
    state.rows += len(rows)
    state.loss += value
    state.tokens += rows.label_tokens
    state.read += tokens_read(rows.labels)
    return value


def optim_step(state: State, config: OptimConfig, steps: int) -> dict[str, Any]:
    """Update the parameters with the gradients since the last update; return the step's log line and the gradient's norm.

    Raises:
        RefusedError: Too many gradients in a row are not finite.
    """
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    distributed.sum_gradients(parameters)
    state.scale.unscale(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip if config.clip > 0 else math.inf)
    rate = learning_rate(config, state.step, steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    is_finite = state.scale.accepts(float(norm))
    if is_finite:
        for parameter in parameters:
            # AdamW would leave out an expert that has no token in a step: in peft its moments decay.
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        state.optimizer.step()
    # To None: adding to zeros would take a pass over each gradient, and filling them another.
    state.optimizer.zero_grad()
    state.step += 1
    if state.scale.skipped >= _MAX_SKIPPED and state.scale.factor == 1.0:
        problem = f"the gradient was not finite in {state.scale.skipped} steps in a row, up to step {state.step}"
        raise RefusedError("train", problem, "Lower learning_rate, or set base.dtype to float32", code="diverged")
    log_line = {"step": state.step, "loss": state.loss, "learning_rate": rate, "tokens": state.tokens}
    state.rows, state.loss = 0, 0.0
    if not is_finite:
        log_line["skipped"] = True
    state.log.append(log_line)
    return {**log_line, "gradient_norm": float(norm)}


def _slow_threads_note(base: Base, rows: Rows | PackedRows, config: OptimConfig, seconds: float) -> str | None:
    """Return a note if threads wait for each other so long that one would be faster; `seconds` is the time of a step.

    This is tried only if other programs are using the cores, on rows whose evaluation takes seconds; no result depends on it.
    """
    count = torch.get_num_threads()
    threads_matter = base.device.type == "cpu" and distributed.count() == 1 and count > 1
    if not threads_matter or seconds * count > _MAX_TRIAL_SECONDS or not cores_are_busy():
        return None
    size = config.micro_rows or config.rows
    sample = rows.take(np.arange(min(size, len(rows))))
    gain = compute_device.gain_of_one_thread(lambda: evaluate(base, sample, size))
    finding = f"other programs have some of the cores, and the {count} threads of a step wait for each other"
    return f"{finding}: with threads = 1 it would be about {gain:.1f} times as fast" if gain > _MIN_GAIN else None


def draw_seed(seed: int, step: int, row: int) -> int:
    """Return the seed of dropout and noise for the rows of a step from `row` on; so no other random state has to be saved."""
    return int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def noise(model: nn.Module, alpha: float) -> Iterator[None]:
    """Within the block, add NEFTune's noise (arXiv 2310.05914) to the embeddings in training; none if `alpha` is 0.

    It is uniform, at most `alpha / sqrt(tokens * size)`, and drawn as transformers draws it (`integrations/neftune.py`), so
    that the same state of torch's generator gives the same noise.
    """
    if not alpha:
        yield
        return

    def disturb(module: nn.Module, _: Any, output: Any) -> Any:
        largest = alpha / math.sqrt(output.shape[1] * output.shape[2])
        return output + torch.zeros_like(output).uniform_(-largest, largest) if module.training else output

    handle = model.get_input_embeddings().register_forward_hook(disturb)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or SIGINT sets; a second SIGINT interrupts at once. Only a main thread can handle signals."""
    stop_requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested
        return
    previous_handlers: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, _: object) -> None:
        stop_requested.set()
        # A second signal of this kind gets the previous handler, which interrupts at once.
        signal.signal(number, previous_handlers[number])

    for number in previous_handlers:
        signal.signal(number, stop)
    try:
        yield stop_requested
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
