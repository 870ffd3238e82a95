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

_MAX_ATTEMPTS = 5
_SECONDS = 0.5  # for all of them
_SIZES = (256, 512, 1024, 2048)  # of square weights that a quarter as many tokens are multiplied with; the last as in training
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

    On a CPU it is the rate of free cores: seconds are those that the thread computed, so that other programs on a busy
    machine do not count. The products grow as long as there is time for the next: torch takes 15 s for the largest in bfloat16
    or float16 on a processor without AVX-512. On CUDA there is one, large enough to hide the launch, timed by the device's own
    clock.
    """
    if device.type == "cuda":
        return _best_rate(_CUDA_SIZE, _CUDA_SIZE, dtype, device)
    best_rate, end = 0.0, time.monotonic() + _SECONDS
    for size in _SIZES:
        tokens = size // 4
        if best_rate and time.monotonic() + 2 * tokens * size**2 / best_rate > end:
            break
        best_rate = max(best_rate, _best_rate(tokens, size, dtype, device))
    return best_rate


def _best_rate(tokens: int, size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return the floating-point operations per second of the best of a few products of one size."""
    x, weight = (torch.ones(rows, size, dtype=dtype, device=device) for rows in (tokens, size))
    measure = _seconds_on_cuda if device.type == "cuda" else _seconds
    best_seconds, end = float("inf"), time.monotonic() + _SECONDS
    with torch.no_grad():
        for attempt in range(_MAX_ATTEMPTS):
            # At least one attempt, no matter how slow the machine is.
            if attempt and time.monotonic() > end:
                break
            best_seconds = min(best_seconds, measure(x, weight))
    return 2 * tokens * size**2 / max(best_seconds, 1e-9)


def _seconds(x: Tensor, weight: Tensor) -> float:
    """Return the seconds that this thread computed: its part of the product, which other threads compute at the same time."""
    start = time.thread_time()
    torch.mm(x, weight)
    return time.thread_time() - start


def _seconds_on_cuda(x: Tensor, weight: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.mm(x, weight)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
