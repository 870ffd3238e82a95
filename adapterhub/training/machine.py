"""What the system reports of this machine: its free memory, its processor, and whether its cores are busy; without torch."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_CGROUP = Path("sys/fs/cgroup")
# Processors on which dequantizing takes 3 to 11 percent of a step (measured), as they multiply bfloat16 fast (/proc/cpuinfo).
_FAST_FLAGS = {"amx_bf16", "avx512_bf16"}
_BUSY_PERCENT = 10  # of the time that threads run or wait


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes available without swapping: those of the system, or of this process's control group if it has fewer.

    None if the system does not report it.
    """
    limits = [
        count
        for count in (proc_bytes(root / "proc/meminfo", "MemAvailable"), _left_in_control_group(root))
        if count is not None
    ]
    return min(limits) if limits else None


def multiplies_bfloat16_fast(root: Path = Path("/")) -> bool:
    """Return whether the processor has instructions for products of bfloat16; False if the system does not report it."""
    with contextlib.suppress(OSError, ValueError):
        flags = (line.partition(":")[2] for line in (root / "proc/cpuinfo").read_text().splitlines() if line[:5] == "flags")
        return not _FAST_FLAGS.isdisjoint(next(flags, "").split())
    return False


def usable_cores() -> int:
    """Return the number of cores that this process may use; more threads would spin while they wait for each other."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_are_busy(root: Path = Path("/")) -> bool:
    """Return whether some thread waited for a core in over a tenth of the last ten seconds (kernel.org, "PSI").

    False if the system does not report it.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/pressure/cpu").read_text().splitlines():
            if line.startswith("some avg10="):
                return float(line.split()[1].partition("=")[2]) > _BUSY_PERCENT
    return False


def proc_bytes(path: Path, name: str) -> int | None:
    """Return a size in a file of /proc in bytes, such as `MemAvailable` of meminfo (proc(5)); None on other systems."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def _left_in_control_group(root: Path) -> int | None:
    """Return the unused bytes of a container's memory limit, cached files included (kernel.org, "Control Group v2")."""
    group = root / _CGROUP
    with contextlib.suppress(OSError, ValueError):
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            # Cached files that are not in use are freed when memory is needed.
            return max(0, int(limit) - used + int(statistics.get("inactive_file", 0)))
    return None
