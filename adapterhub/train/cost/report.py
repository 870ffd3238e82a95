"""What a training took: time, memory, and how much of the machine's arithmetic it used. Clocks are here and nowhere else.

None of it goes into the adapter, whose bytes must not depend on when or where it was made.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import torch

from adapterhub.train import devices
from adapterhub.train.config import TrainConfig
from adapterhub.train.events import Event, OnEvent, Ready, Report, Resumed, Stepped

from .memory import flops, full_fine_tuning, plan

_TRIES = 5
_SECONDS = 0.5  # for all of them
_TOKENS, _SIZE = 512, 2048  # a matmul as a training's are: tokens times a square weight


class Meter:
    """Times the steps, and passes every event on; what lies between a step and the event before it is the step."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._mark = time.monotonic()
        self.seconds = 0.0
        self.steps = 0
        self.learned = 0
        self._parameters = self._base = 0
        self._before = 0  # tokens learned by a run that was stopped

    def __call__(self, event: Event) -> None:
        """Take in one event of the trainer."""
        if isinstance(event, Stepped):
            self.seconds += time.monotonic() - self._mark
            self.steps += 1
            self.learned = event.tokens - self._before
        elif isinstance(event, Ready):
            self._parameters, self._base = event.parameters, event.base_parameters
        elif isinstance(event, Resumed):
            self._before = event.tokens
        self._on_event(event)
        self._mark = time.monotonic()

    def report(self, config: TrainConfig, device: Any) -> Report:
        """What the steps took that this process did."""
        tokens = self.steps * config.train.rows * config.data.sequence
        operations = flops(config, tokens=tokens, learned=self.learned, trained=self._parameters)
        rate = matmul_rate(getattr(torch, config.base.dtype), device)
        return Report(
            parameters=self._parameters,
            base_parameters=self._base,
            predicted=plan(config).total,
            peak=devices.peak(device) or peak_memory(),
            full_fine_tuning=full_fine_tuning(config),
            seconds=self.seconds,
            tokens_per_second=tokens / self.seconds if self.seconds else 0.0,
            flops=operations,
            matmul=rate,
            utilization=operations / self.seconds / rate if self.seconds and rate else 0.0,
            checkpointing=config.train.checkpointing is True,
        )


def matmul_rate(dtype: Any, device: Any) -> float:
    """Floating-point operations a second of the best of a few plain matrix products in `dtype`, with torch's threads now."""
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


def peak_memory() -> int:
    """The most bytes this process has held, or 0 where the system doesn't say."""
    # ru_maxrss would count what the parent held before it started this program (getrusage(2)).
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    return 0
