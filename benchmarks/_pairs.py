"""Two programs on the same work in turn, as whole processes: median wall time, ratio and peak memory.

They alternate, so that a machine that slows down slows both; each run counts from fork to exit, imports included,
because that is what who types the command waits for. Peak memory is the kernel's `ru_maxrss` of that child alone.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One process: `seconds` of wall time, its peak resident memory in `bytes`, and its `cpu` seconds, its children's too."""

    seconds: float
    bytes: int
    cpu: float


@dataclass(frozen=True)
class Pair:
    """The medians of both programs; `speedup` and `memory` say how many times less ours takes."""

    ours: Run
    theirs: Run

    @property
    def speedup(self) -> float:
        return self.theirs.seconds / self.ours.seconds

    @property
    def memory(self) -> float:
        return self.theirs.bytes / self.ours.bytes


def timed(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Run:
    """Run `command` once. A failure raises with its output."""
    start = time.perf_counter()
    process = subprocess.Popen(
        list(command), env={**os.environ, **(env or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}\n{output.decode(errors='replace')[-2000:]}")
    peak = usage.ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)
    return Run(seconds, peak, usage.ru_utime + usage.ru_stime)


def compare(
    ours: Sequence[str],
    theirs: Sequence[str],
    runs: int = 5,
    *,
    title: str = "",
    env: Mapping[str, str] | None = None,
    fresh: Sequence[Path] = (),
) -> Pair:
    """Run both in turn, one unmeasured round first to fill the disk cache, then `runs` rounds; print a table.

    The `fresh` files and folders, what the two make, are removed before each round, untimed.
    """
    rounds: list[tuple[Run, Run]] = []
    for _ in range(runs + 1):
        for path in fresh:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        rounds.append((timed(ours, env=env), timed(theirs, env=env)))
    del rounds[0]
    pair = Pair(median([ours for ours, _ in rounds]), median([theirs for _, theirs in rounds]))
    print(f"{title or 'whole process'}, median of {runs} alternating runs")
    print(f"{'':8}{'seconds':>10}{'peak MB':>10}")
    for name, run in (("ours", pair.ours), ("theirs", pair.theirs)):
        print(f"{name:8}{run.seconds:10.3f}{run.bytes / 1e6:10.1f}")
    print(f"{'ratio':8}{pair.speedup:9.1f}x{pair.memory:9.1f}x")
    return pair


def median(runs: Sequence[Run]) -> Run:
    """The medians of all three numbers."""
    return Run(
        statistics.median(run.seconds for run in runs),
        int(statistics.median(run.bytes for run in runs)),
        statistics.median(run.cpu for run in runs),
    )
