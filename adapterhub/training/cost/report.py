"""Measure a training: time, memory, and the share of the machine's arithmetic that it used.

None of it goes into the adapter, whose bytes must not depend on when or where it was made.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from adapterhub.training import devices
from adapterhub.training.config import TrainConfig
from adapterhub.training.events import Event, OnEvent, Ready, Report, Resumed, Stepped
from adapterhub_converters.bases import BaseSpec

from .memory import flops, full_fine_tuning, plan
from .peaks import peak_rate

_TRIES = 5
_SECONDS = 0.5  # for all of them
_TOKENS, _SIZE = 512, 2048  # a matmul as a training's are: tokens times a square weight
_LARGE = 8192  # both, on CUDA


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
            predicted=plan(config, spec, card=devices.memory(device)).total,
            peak=devices.peak(device),
            full_fine_tuning=full_fine_tuning(config, spec, card=devices.memory(device)),
            seconds=self.seconds,
            tokens_per_second=self.read / self.seconds if self.seconds else 0.0,
            flops=operations,
            matmul=rate,
            utilization=operations / self.seconds / rate if self.seconds and rate else 0.0,
            checkpointing=config.train.checkpointing is True,
            card=devices.name(device),
            peak_rate=peak_rate(devices.name(device), config.base.dtype),
        )


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the floating-point operations a second of the best of a few matrix products in `dtype`, with torch's threads.

    On CUDA a product is large enough that nothing waits for its start, and its time is that of the device's own clock.
    """
    tokens, size = (_LARGE, _LARGE) if device.type == "cuda" else (_TOKENS, _SIZE)
    x, weight = (torch.ones(rows, size, dtype=dtype, device=device) for rows in (tokens, size))
    seconds = _seconds_on_cuda if device.type == "cuda" else _seconds
    best, end = float("inf"), time.monotonic() + _SECONDS
    with torch.no_grad():
        for done in range(_TRIES):
            if done and time.monotonic() > end:
                break
            best = min(best, seconds(x, weight))
    return 2 * tokens * size**2 / max(best, 1e-9)


def _seconds(x: Tensor, weight: Tensor) -> float:
    start = time.perf_counter()
    torch.mm(x, weight)
    return time.perf_counter() - start


def _seconds_on_cuda(x: Tensor, weight: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.mm(x, weight)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
