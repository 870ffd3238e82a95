"""Measure a training: time, memory, and the share of the machine's arithmetic that it used.

None of it goes into the adapter, whose bytes must not depend on when or where it was made.
"""

from __future__ import annotations

import time

import torch

from adapterhub.training import devices
from adapterhub.training.config import TrainConfig
from adapterhub.training.events import Event, OnEvent, Ready, Report, Resumed, Stepped
from adapterhub_converters.bases import BaseSpec

from .memory import flops, full_fine_tuning, plan

_TRIES = 5
_SECONDS = 0.5  # for all of them
_TOKENS, _SIZE = 512, 2048  # a matmul as a training's are: tokens times a square weight


class Meter:
    """Time the steps, and pass every event on: a step is the time since the event before it."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._mark = time.monotonic()
        self.seconds = 0.0
        self.label_tokens = 0
        self.read = 0
        self._parameters = self._base = 0
        self._before = 0  # label tokens of the run that was resumed

    def __call__(self, event: Event) -> None:
        """Handle one event of the trainer."""
        if isinstance(event, Stepped):
            self.seconds += time.monotonic() - self._mark
            self.label_tokens = event.tokens - self._before
            self.read += event.read
        elif isinstance(event, Ready):
            self._parameters, self._base = event.parameters, event.base_parameters
        elif isinstance(event, Resumed):
            self._before = event.tokens
        self._on_event(event)
        self._mark = time.monotonic()

    def report(self, config: TrainConfig, spec: BaseSpec, device: torch.device, *, context: float) -> Report:
        """Report on the steps that this process did; `context` is the mean length of a token's document."""
        counts = {"tokens": self.read, "label_tokens": self.label_tokens, "trained": self._parameters}
        operations = flops(config, spec, **counts, context=context)
        rate = matmul_rate(getattr(torch, config.base.dtype), device)
        return Report(
            parameters=self._parameters,
            base_parameters=self._base,
            predicted=plan(config, spec).total,
            peak=devices.peak(device),
            full_fine_tuning=full_fine_tuning(config, spec),
            seconds=self.seconds,
            tokens_per_second=self.read / self.seconds if self.seconds else 0.0,
            flops=operations,
            matmul=rate,
            utilization=operations / self.seconds / rate if self.seconds and rate else 0.0,
            checkpointing=config.train.checkpointing is True,
        )


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the floating-point operations a second of the best of a few matrix products in `dtype`, with torch's threads."""
    x, weight = (torch.ones(size, _SIZE, dtype=dtype, device=device) for size in (_TOKENS, _SIZE))
    best, end = float("inf"), time.monotonic() + _SECONDS
    with torch.no_grad():
        for done in range(_TRIES):
            if done and time.monotonic() > end:
                break
            start = time.perf_counter()
            torch.mm(x, weight)[0, 0].item()  # which waits for the device
            best = min(best, time.perf_counter() - start)
    return 2 * _TOKENS * _SIZE**2 / max(best, 1e-9)
