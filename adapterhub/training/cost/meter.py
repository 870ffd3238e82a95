"""Measurements of a training run: time, memory, and the share of the machine's arithmetic that it used.

None of them goes into the adapter, whose bytes must not depend on when or where it was trained.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from adapterhub.training import compute_device
from adapterhub.training.events import Event, OnEvent, Ready, Report, ResumeEvent, StepEvent
from adapterhub.training.train_config import TrainConfig
from adapterhub_converters.bases import BaseSpec

from .memory import flops, full_fine_tuning, plan
from .peaks import peak_rate

_MAX_ATTEMPTS = 6
_SECONDS = 0.5  # for all of them
_TOKENS, _SIZE = 512, 2048  # a matmul like those of a training run: tokens times a square weight
_FIRST_TOKENS = 4  # of the first product on a CPU
_CUDA_SIZE = 8192  # tokens and size, on CUDA


class Meter:
    """A meter that times the steps and passes every event on; a step takes the time since the previous event."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._last_event_time = time.monotonic()
        self.seconds = 0.0
        self.label_tokens = 0
        self.read = 0
        self._parameters = self._base = 0
        self._resumed_tokens = 0  # label tokens of the run that was resumed

    def __call__(self, event: Event) -> None:
        """Handle one event of the trainer."""
        if isinstance(event, StepEvent):
            self.seconds += time.monotonic() - self._last_event_time
            # The event counts from the start of the run; the report only covers this process.
            self.label_tokens = event.tokens - self._resumed_tokens
            self.read += event.read
        elif isinstance(event, Ready):
            self._parameters, self._base = event.parameters, event.base_parameters
        elif isinstance(event, ResumeEvent):
            self._resumed_tokens = event.tokens
        self._on_event(event)
        # Taken after the event was handled: drawing a progress bar or writing a log is not part of a step.
        self._last_event_time = time.monotonic()

    def report(self, config: TrainConfig, spec: BaseSpec, device: torch.device, *, context: float) -> Report:
        """Return a report on the steps that this process ran; `context` is the mean length of a token's document."""
        counts = {"tokens": self.read, "label_tokens": self.label_tokens, "trained": self._parameters}
        operations = flops(config, spec, **counts, context=context)
        rate = matmul_rate(getattr(torch, config.base.dtype), device)
        return Report(
            parameters=self._parameters,
            base_parameters=self._base,
            predicted=plan(config, spec, card=compute_device.memory(device)).total,
            peak=compute_device.peak(device),
            full_fine_tuning=full_fine_tuning(config, spec, card=compute_device.memory(device)),
            seconds=self.seconds,
            tokens_per_second=self.read / self.seconds if self.seconds else 0.0,
            flops=operations,
            matmul=rate,
            utilization=operations / self.seconds / rate if self.seconds and rate else 0.0,
            checkpointing=config.train.checkpointing is True,
            card=compute_device.name(device),
            peak_rate=peak_rate(compute_device.name(device), config.base.dtype),
        )


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return the floating-point operations per second of the best of a few matrix products in `dtype`, with torch's threads.

    On CUDA the product is large enough to hide the launch, and is timed by the device's own clock. A CPU without instructions
    for `dtype` takes seconds for what others do in milliseconds: its products have only the rows that there is time for.
    """
    is_cuda = device.type == "cuda"
    tokens, size = (_CUDA_SIZE, _CUDA_SIZE) if is_cuda else (_TOKENS, _SIZE)
    x, weight = (torch.ones(rows, size, dtype=dtype, device=device) for rows in (tokens, size))
    measure = _seconds_on_cuda if is_cuda else _seconds
    rows, best_rate, end = tokens if is_cuda else _FIRST_TOKENS, 0.0, time.monotonic() + _SECONDS
    with torch.no_grad():
        for _ in range(_MAX_ATTEMPTS):
            seconds = max(measure(x[:rows], weight), 1e-9)
            best_rate = max(best_rate, 2 * rows * size**2 / seconds)
            remaining = end - time.monotonic()
            if remaining <= 0:
                break
            rows = rows_in(remaining, rows, seconds, most=tokens)
    return best_rate


def rows_in(remaining: float, rows: int, seconds: float, *, most: int) -> int:
    """Return how many rows the next product has, for which `remaining` seconds are left, when `rows` took `seconds`."""
    return min(most, max(rows, int(rows * remaining / seconds)))


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
