"""The loop: what happens in a step, in the order in which it happens."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adapterhub.training import devices, distributed
from adapterhub.training.config import OptimConfig, PreferenceConfig
from adapterhub.training.cost.budget import cores_are_busy
from adapterhub.training.data.rows import Packed, Rows, order, tokens_read
from adapterhub.training.events import Noted, OnEvent, Stepped
from adapterhub.training.model.base import Base
from adapterhub_converters.errors import RefusedError, StoppedError

from .heldout import evaluate, log_evaluation
from .loss import Loss, logprobs, mean_loss, passes, total, trimmed
from .optimizer import learning_rate
from .preference import count, preference_loss
from .state import State, out_of_patience, restore_trained

_MOST_SKIPPED = 3  # steps in a row without a finite gradient
_SETTLED = 10  # steps after which their threads are looked at
_LONGEST_TRIAL = 10.0  # seconds of a step, times threads
_WORTH = 1.2  # times as fast with one thread


def run(
    base: Base,
    rows: Rows | Packed,
    heldout: Rows | None,
    state: State,
    config: OptimConfig,
    *,
    steps: int,
    save: Callable[[], Path],
    on_event: OnEvent,
    preference: PreferenceConfig | None = None,
) -> None:
    """Train from `state` to the last step, or until patience ends; `save` writes a checkpoint and returns its path.

    Raises:
        StoppedError: SIGTERM or SIGINT came; the checkpoint after the current step is written.
        RefusedError: A loss is not finite.
    """
    first = state.step
    with _signals() as stopped:
        if state.step == 0:
            log_evaluation(base, heldout, state, config, preference, steps=steps, on_event=on_event)
        while state.step < steps and not out_of_patience(state.log, config.patience):
            started = time.monotonic()
            line = advance(base, rows, state, config, steps, preference=preference)
            speed = line["read"] / max(time.monotonic() - started, 1e-9)
            if state.step == first + _SETTLED and (note := _waiting(base, rows, config, time.monotonic() - started)):
                on_event(Noted(note))
            if line.pop("skipped", False) and not state.scale.needed:
                on_event(Noted(f"step {state.step} changed nothing, because its gradient is not finite"))
            on_event(Stepped(steps=steps, tokens_per_second=speed, memory=devices.held(base.device), **line))
            if state.step == steps or (config.evaluate_every and state.step % config.evaluate_every == 0):
                log_evaluation(base, heldout, state, config, preference, steps=steps, on_event=on_event)
            # All processes stop after the same step, whichever of them got the signal.
            if distributed.total(stopped.is_set()) and state.step < steps:
                what = f"stopped after step {state.step} of {steps}"
                raise StoppedError(str(save()), what, "The same training resumes from it", code="training-stopped")
            if config.save_every and state.step % config.save_every == 0 and state.step < steps:
                save()
    if state.best:
        restore_trained(base.model, state.best)


def advance(
    base: Base,
    rows: Rows | Packed,
    state: State,
    config: OptimConfig,
    steps: int,
    *,
    preference: PreferenceConfig | None = None,
) -> dict[str, Any]:
    """Do one step over `config.rows` rows; returns what `optim_step` does, and the tokens read."""
    read = state.read
    some = batch(rows, state, config, steps)
    forward_backward(base, some, state, config, usual_loss(base, some, preference))
    return {**optim_step(state, config, steps), "read": state.read - read}


def batch(rows: Rows | Packed, state: State, config: OptimConfig, steps: int) -> Rows:
    """Return the rows of the next of `steps` steps."""
    if state.order is None:
        sizes = rows.sizes if config.group_by_length else None
        # The last step of an epoch may have fewer rows: none is trained on twice before all are trained on as often.
        epochs = math.ceil(config.epochs * len(rows))
        whole = not config.steps and steps == -(epochs // -config.rows)
        needed = epochs if whole else steps * config.rows
        state.order = order(len(rows), needed, config.seed, sizes=sizes, together=config.rows)
    return rows.take(state.order[state.step * config.rows : (state.step + 1) * config.rows])


def usual_loss(base: Base, rows: Rows, preference: PreferenceConfig | None) -> Loss:
    """Return the loss of a step over `rows`: the mean over their labels, or with a preference over their pairs."""
    return preference_loss(base, preference, count(rows)) if preference else mean_loss(rows.label_tokens)


def forward_backward(base: Base, rows: Rows, state: State, config: OptimConfig, loss: Loss) -> float:
    """Add the gradient of a loss of `rows`, `config.micro_rows` at a time, to those since the last update; returns the loss.

    Raises:
        RefusedError: The loss is not finite.
    """
    shares: list[Tensor] = []
    for start, part in passes(rows, config.micro_rows or config.rows):
        with torch.random.fork_rng(devices=[]), noise(base.model, config.neftune):
            torch.manual_seed(draw_seed(config.seed, state.step, state.rows + start))
            some = trimmed(part)
            share = loss(logprobs(base, some), some)
            if share.requires_grad:
                (share * state.scale.factor if state.scale.needed else share).backward()
        shares.append(share.detach())
    value = total(shares)
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
    """Update the parameters with the gradients since the last update; returns its line of the log and the gradient's norm.

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
    accepted = state.scale.accepts(float(norm))
    if accepted:
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=False)
    state.step += 1
    if state.scale.skipped >= _MOST_SKIPPED and state.scale.factor == 1.0:
        what = f"the gradient was not finite in {state.scale.skipped} steps in a row, up to step {state.step}"
        raise RefusedError("train", what, "Lower learning_rate, or set base.dtype to float32", code="diverged")
    line = {"step": state.step, "loss": state.loss, "learning_rate": rate, "tokens": state.tokens}
    state.rows, state.loss = 0, 0.0
    if not accepted:
        line["skipped"] = True
    state.log.append(line)
    return {**line, "gradient_norm": float(norm)}


def _waiting(base: Base, rows: Rows | Packed, config: OptimConfig, seconds: float) -> str | None:
    """Return a note if threads wait for each other so long that one would be faster; `seconds` are those of a step.

    Tried where other programs want the cores, on rows whose evaluation takes seconds at most; no number depends on it.
    """
    count = torch.get_num_threads()
    alone = base.device.type == "cpu" and distributed.count() == 1 and count > 1
    if not alone or seconds * count > _LONGEST_TRIAL or not cores_are_busy():
        return None
    size = config.micro_rows or config.rows
    some = rows.take(np.arange(min(size, len(rows))))
    gain = devices.gain_of_one_thread(lambda: evaluate(base, some, size))
    what = f"other programs have some of the cores, and the {count} threads of a step wait for each other"
    return f"{what}: with threads = 1 it would be about {gain:.1f} times as fast" if gain > _WORTH else None


def draw_seed(seed: int, step: int, row: int) -> int:
    """Return the seed of dropout and noise in the rows of a step from `row` on; no other random state has to be saved."""
    return int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def noise(model: nn.Module, alpha: float) -> Iterator[None]:
    """Add NEFTune's noise (arXiv 2310.05914) to the embeddings in training within the block; none for `alpha` 0.

    It is uniform, `alpha / sqrt(tokens * size)` at most, and drawn as transformers draws it (`integrations/neftune.py`), so
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
def _signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM or SIGINT sets; a second SIGINT interrupts at once. Only a main thread can handle signals."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(number: int, _: object) -> None:
        stopped.set()
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
