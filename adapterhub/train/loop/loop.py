"""The loop: what happens in a step, in the order it happens."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapterhub.train import devices, distributed
from adapterhub.train.config import OptimConfig
from adapterhub.train.data.dataset import IGNORED, Rows, lengths, order
from adapterhub.train.events import Evaluated, OnEvent, Stepped
from adapterhub.train.model.base import Base
from adapterhub_converters.errors import RefusedError, StoppedError

from . import best, optimizer, scaling
from .loss import cross_entropy
from .noise import noisy
from .samples import answers
from .schedule import rate

_LARGEST = 700.0  # nats: beyond, the perplexity is no number


@dataclass
class State:
    """All that a run is, besides its config and data: goes into a checkpoint and comes back."""

    optimizer: Any
    step: int = 0
    tokens: int = 0
    log: list[dict[str, Any]] = field(default_factory=list)
    """What log.jsonl will say; no clock in it, so that the same run gives the same bytes."""
    order: np.ndarray | None = None
    """Which row comes when; follows from seed and data, so no checkpoint holds it."""

    scale: scaling.Scale = field(default_factory=lambda: scaling.Scale(needed=False))
    best: dict[str, Any] = field(default_factory=dict)
    """What was learned when the held-out loss was lowest, by name, where that is kept."""

    @property
    def kept(self) -> int:
        """The step whose factors are the result."""
        return (best.step(self.log) or 0) if self.best else self.step

    def heldout(self, step: int) -> float | None:
        """The held-out loss after `step` steps, if it was measured."""
        return next((line["heldout_loss"] for line in self.log if "heldout_loss" in line and line["step"] == step), None)


def new_state(model: Any, config: OptimConfig) -> State:
    """Nothing done yet."""
    return State(optimizer.make(model, config), scale=scaling.scale(model))


def advance(base: Base, rows: Rows, state: State, config: OptimConfig, steps: int) -> dict[str, Any]:
    """One optimizer step over `config.rows` rows; returns its line of the log."""
    if state.order is None:
        sizes = lengths(rows.labels) if config.group_by_length else None
        state.order = order(len(rows), steps * config.rows, config.seed, sizes=sizes, together=config.rows)
    chosen = state.order[state.step * config.rows : (state.step + 1) * config.rows]
    label_tokens = int((rows.labels[chosen] != IGNORED).sum())
    loss = distributed.total(_gradients(base, rows, chosen, state, config))
    parameters = [parameter for group in state.optimizer.param_groups for parameter in group["params"]]
    distributed.sum_gradients(parameters)
    state.scale.undo(parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip if config.clip > 0 else math.inf)
    learning_rate = rate(config, state.step, steps)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate * group["ratio"]
    if state.scale.passes(float(norm)):
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=False)
    state.step += 1
    state.tokens += label_tokens
    if not math.isfinite(loss):
        raise RefusedError("train", f"the loss is {loss} at step {state.step}", "Lower learning_rate, or raise warmup")
    line = {"step": state.step, "loss": loss, "learning_rate": learning_rate, "tokens": state.tokens}
    state.log.append(line)
    return {**line, "gradient_norm": float(norm)}


def _gradients(base: Base, rows: Rows, chosen: np.ndarray, state: State, config: OptimConfig) -> float:
    """Add up the gradients of this process's part of the step; returns its part of the loss."""
    label_tokens = int((rows.labels[chosen] != IGNORED).sum())
    loss = 0.0
    for start, part in _passes(rows, chosen, config.micro_rows or config.rows):
        with torch.random.fork_rng(devices=[]), noisy(base.model, config.neftune):
            torch.manual_seed(chance(config.seed, state.step, start))
            # Divided by the tokens of the whole step: rows with few labels count by their tokens, not as rows.
            share = summed_loss(base, part, np.arange(len(part))) / max(1, label_tokens)
            if share.requires_grad:
                (share * state.scale.factor if state.scale.needed else share).backward()
        loss += float(share.detach())
    return loss


def _passes(rows: Rows, chosen: np.ndarray, size: int) -> Iterator[tuple[int, Rows]]:
    """This process's part of the chosen rows, `size` at a time, each with the number of its first row.

    Every process makes the same number of passes, or those that hold a part of the base each would wait for one another:
    one that has no row left takes the first, with nothing to learn.
    """
    own, before = distributed.share(chosen)
    for start in range(0, distributed.rounds(len(chosen), size) * size, size):
        numbers = own[start : start + size]
        if len(numbers):
            yield before + start, Rows(rows.ids[numbers], rows.labels[numbers], rows.positions[numbers])
        else:
            first = chosen[:1]
            yield before + start, Rows(rows.ids[first], np.full_like(rows.labels[first], IGNORED), rows.positions[first])


def chance(seed: int, step: int, row: int) -> int:
    """What dropout and noise are drawn from in the rows of a step that begin with `row`: nothing else has to be kept."""
    return int(np.random.SeedSequence([seed, step, row]).generate_state(1, np.uint64)[0] >> 1)


def summed_loss(base: Base, rows: Rows, chosen: np.ndarray) -> Any:
    """The summed loss, in nats, of some rows; a float32 scalar that can be differentiated."""
    # Padding behind the last label changes no number; odd widths are slow.
    width = -(max(1, int(lengths(rows.labels[chosen]).max())) // -16) * 16
    parts = (rows.ids, rows.positions, rows.labels)
    ids, positions, labels = (torch.from_numpy(part[chosen, :width]).to(base.device) for part in parts)
    hidden = base.states(ids, positions)
    trained_rows = base.head_rows
    extra = {} if trained_rows is None else {"ids": trained_rows.places, "rows": trained_rows.rows}
    return cross_entropy(hidden, base.head, labels, bias=base.head_bias, shape=base.logits, **extra)


def evaluate(base: Base, rows: Rows, size: int) -> float:
    """The mean loss, in nats a token, of all rows, `size` at a time."""
    total = 0.0
    base.model.eval()
    with torch.no_grad():
        for _, part in _passes(rows, np.arange(len(rows)), size):
            total += float(summed_loss(base, part, np.arange(len(part))))
    base.model.train()
    return distributed.total(total) / max(1, rows.label_tokens)


def loop(
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
    """From `state` to the last step, or to where it gives up; `save` writes a checkpoint."""
    with _signals() as stopped:
        if state.step == 0:
            _measure(base, heldout, state, config, steps=steps, on_event=on_event)
        while state.step < steps and not best.given_up(state.log, config.patience):
            before, started = state.tokens, time.monotonic()
            line = advance(base, rows, state, config, steps)
            seconds = time.monotonic() - started
            done = state.tokens - before
            on_event(
                Stepped(
                    steps=steps,
                    tokens_per_second=done / max(seconds, 1e-9),
                    memory=devices.held(base.device) or resident(),
                    **line,
                )
            )
            if state.step == steps or (config.evaluate_every and state.step % config.evaluate_every == 0):
                _measure(base, heldout, state, config, steps=steps, on_event=on_event)
            # Whichever process was told to stop, all stop after the same step.
            if distributed.total(stopped.is_set()) and state.step < steps:
                raise StoppedError(str(save()), f"stopped after step {state.step} of {steps}", "Run the same command to go on")
            if config.save_every and state.step % config.save_every == 0 and state.step < steps:
                save()
    if state.best:
        best.put_back(base.model, state.best)


def _measure(base: Base, heldout: Rows | None, state: State, config: OptimConfig, *, steps: int, on_event: OnEvent) -> None:
    """Evaluate, once for each step."""
    if heldout is None or state.heldout(state.step) is not None:
        return
    loss = evaluate(base, heldout, config.micro_rows or config.rows)
    if not loss < _LARGEST:
        raise RefusedError("train", f"the held-out loss is {loss} at step {state.step}", "Lower learning_rate, or raise warmup")
    line = {"step": state.step, "heldout_loss": loss, "tokens": state.tokens}
    said = answers(base, config.samples, config.sample_tokens)
    state.log.append({**line, "samples": said} if said else line)
    if config.keep_best and best.step(state.log) == state.step:
        state.best = best.copy(base.model)
    on_event(Evaluated(state.step, steps, loss, math.exp(loss), tuple((one["prompt"], one["text"]) for one in said)))


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Set once SIGTERM or SIGINT has come; a second SIGINT interrupts at once. Only a main thread can listen."""
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


def resident() -> int:
    """Bytes of memory this process holds now, or 0 where the system doesn't say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()
