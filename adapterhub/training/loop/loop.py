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

from adapterhub.training import devices, distributed
from adapterhub.training.config import OptimConfig
from adapterhub.training.data.dataset import IGNORED, Rows, lengths, order, tokens_read
from adapterhub.training.events import OnEvent, Stepped
from adapterhub.training.model.base import Base
from adapterhub_converters.errors import RefusedError, StoppedError

from .heldout import log_evaluation
from .loss import passes, summed_loss
from .optimizer import learning_rate
from .state import State, out_of_patience, restore_trained


def run(
    base: Base,
    rows: Rows,
    heldout: Rows | None,
    state: State,
    config: OptimConfig,
    *,
    steps: int,
    save: Callable[[], Path],
    on_event: OnEvent,
) -> None:
    """Train from `state` to the last step, or until patience ends; `save` writes a checkpoint and returns its path.

    Raises:
        StoppedError: SIGTERM or SIGINT came; the checkpoint after the current step is written.
        RefusedError: A loss is not finite.
    """
    with _signals() as stopped:
        if state.step == 0:
            log_evaluation(base, heldout, state, config, steps=steps, on_event=on_event)
        while state.step < steps and not out_of_patience(state.log, config.patience):
            started = time.monotonic()
            line = advance(base, rows, state, config, steps)
            speed = line["read"] / max(time.monotonic() - started, 1e-9)
            on_event(Stepped(steps=steps, tokens_per_second=speed, memory=devices.held(base.device), **line))
            if state.step == steps or (config.evaluate_every and state.step % config.evaluate_every == 0):
                log_evaluation(base, heldout, state, config, steps=steps, on_event=on_event)
            # All processes stop after the same step, whichever of them got the signal.
            if distributed.total(stopped.is_set()) and state.step < steps:
                what = f"stopped after step {state.step} of {steps}"
                raise StoppedError(str(save()), what, "The same training resumes from it", code="training-stopped")
            if config.save_every and state.step % config.save_every == 0 and state.step < steps:
                save()
    if state.best:
        restore_trained(base.model, state.best)


def advance(base: Base, rows: Rows, state: State, config: OptimConfig, steps: int) -> dict[str, Any]:
    """Do one optimizer step over `config.rows` rows; returns its line of the log, the gradient's norm and the tokens read."""
    if state.order is None:
        sizes = lengths(rows.labels) if config.group_by_length else None
        state.order = order(len(rows), steps * config.rows, config.seed, sizes=sizes, together=config.rows)
    chosen = state.order[state.step * config.rows : (state.step + 1) * config.rows]
    label_tokens = int((rows.labels[chosen] != IGNORED).sum())
    loss = distributed.total(_add_gradients(base, rows, chosen, state, config))
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    distributed.sum_gradients(parameters)
    state.scale.unscale(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip if config.clip > 0 else math.inf)
    rate = learning_rate(config, state.step, steps)
    for group in state.optimizer.param_groups:
        group["lr"] = rate * group["ratio"]
    if state.scale.accepts(float(norm)):
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=False)
    state.step += 1
    state.tokens += label_tokens
    if not math.isfinite(loss):
        raise RefusedError("train", f"the loss is {loss} at step {state.step}", "Lower learning_rate, or raise warmup")
    line = {"step": state.step, "loss": loss, "learning_rate": rate, "tokens": state.tokens}
    state.log.append(line)
    return {**line, "gradient_norm": float(norm), "read": tokens_read(rows.labels[chosen])}


def _add_gradients(base: Base, rows: Rows, chosen: np.ndarray, state: State, config: OptimConfig) -> float:
    """Add up the gradients of this process's part of the step; returns its part of the loss."""
    label_tokens = int((rows.labels[chosen] != IGNORED).sum())
    loss = 0.0
    for start, part in passes(rows, chosen, config.micro_rows or config.rows):
        with torch.random.fork_rng(devices=[]), noise(base.model, config.neftune):
            torch.manual_seed(draw_seed(config.seed, state.step, start))
            # Divided by the labels of the whole step: rows with few labels count by their labels, not as rows.
            share = summed_loss(base, part) / max(1, label_tokens)
            if share.requires_grad:
                (share * state.scale.factor if state.scale.needed else share).backward()
        loss += float(share.detach())
    return loss


def draw_seed(seed: int, step: int, row: int) -> int:
    """Return the seed of dropout and noise in the rows of a step from `row` on; no other random state has to be saved."""
    return int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0] >> 1)


@contextlib.contextmanager
def noise(model: Any, alpha: float) -> Iterator[None]:
    """Add NEFTune's noise (arXiv 2310.05914) to the embeddings in training within the block; none for `alpha` 0.

    It is uniform, `alpha / sqrt(tokens * size)` at most, and drawn as transformers draws it (`integrations/neftune.py`), so
    that the same state of torch's generator gives the same noise.
    """
    if not alpha:
        yield
        return

    def disturb(module: Any, _: Any, output: Any) -> Any:
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
