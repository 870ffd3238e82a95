"""Compare a training with the memory that is free, and with other settings."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapterhub.training.config import TrainConfig
from adapterhub.training.events import MemoryPlan
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import RefusedError

from .memory import full_fine_tuning, parameters, plan

_CGROUP = Path("sys/fs/cgroup")
_BUSY = 10  # percent of the time
_SHORTEST = 128  # tokens; shorter rows are never suggested
Step = tuple[str, str, object]
"""Section, key and value."""


@dataclass(frozen=True)
class Alternative:
    """Other settings, as they are written in the config, and the memory of a training with them."""

    settings: str
    plan: MemoryPlan


@dataclass(frozen=True)
class Forecast:
    """What a training will need, before anything of it is run; sizes in bytes.

    Attributes:
        config: The config, with each `auto` decided.
        memory: At the peak.
        parameters: How many are trained, besides `base_parameters` that are not.
        free: The free memory; None if unknown.
        card: The bytes of memory of the CUDA device that it is for; None for a CPU.
        full_fine_tuning: The least memory of training every parameter in float32.
        alternatives: The same with one setting changed at a time.
        misfit: The error of a training that does not fit; None where it does.
    """

    config: TrainConfig
    memory: MemoryPlan
    parameters: int
    base_parameters: int
    free: int | None
    full_fine_tuning: int
    alternatives: tuple[Alternative, ...]
    misfit: RefusedError | None
    card: int | None = None

    def fits(self, plan: MemoryPlan) -> bool | None:
        """Return True if a plan fits into the free memory; None if that is unknown."""
        return None if self.free is None else plan.total <= self.free


def forecast(config: TrainConfig, spec: BaseSpec, *, memory: int | None = None, card: int | None = None) -> Forecast:
    """Return what a training on `spec` will need, from its headers alone.

    Args:
        memory: Bytes that are free; None for those of this machine's CPU, or all of the card's.
        card: The bytes of memory of the CUDA device that it is for; None for a CPU.
    """
    free = memory if memory is not None else card if card is not None else free_memory()
    config = settled(config, spec, free=free, card=card)
    base, trained = parameters(config, spec)
    return Forecast(
        config=config,
        memory=plan(config, spec, card=card),
        parameters=trained,
        base_parameters=base,
        free=free,
        full_fine_tuning=full_fine_tuning(config, spec, card=card),
        alternatives=tuple(alternatives(config, spec, card=card)),
        misfit=misfit(config, spec, free=free, card=card),
        card=card,
    )


def alternatives(config: TrainConfig, spec: BaseSpec, *, card: int | None = None) -> list[Alternative]:
    """Return plans with one setting changed at a time: rows at once, the sequence, checkpointing, the quantization."""
    return [Alternative(text, plan(changed, spec, card=card)) for text, changed in _changes(config)]


def _changes(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    micro = config.train.micro_rows or config.train.rows
    sizes = {size for size in (micro // 2, 1) if 0 < size < micro and config.train.rows % size == 0}
    for size in sorted(sizes, reverse=True):
        yield f"micro_rows = {size}", _with(config, "train", micro_rows=size)
    for sequence in (config.data.sequence // 2, config.data.sequence * 2):
        if sequence > 1:
            yield f"sequence = {sequence}", _with(config, "data", sequence=sequence)
    on = config.train.checkpointing is not True
    yield f"checkpointing = {str(on).lower()}", _with(config, "train", checkpointing=on)
    kind = "none" if config.base.quantize == "nf4" else "nf4"
    yield f'quantize = "{kind}"', _with(config, "base", quantize=kind, hold="quantized")


def _with(config: TrainConfig, section: str, **values: object) -> TrainConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def settled(config: TrainConfig, spec: BaseSpec, *, free: int | None, held: int = 0, card: int | None = None) -> TrainConfig:
    """Return the config with each `auto` replaced.

    `checkpointing` is on only where the training does not fit without it, which costs more time than `hold` saves; what is held
    is dense where the training then still fits. `free`, `held` and `card` as for `check`.
    """

    def fits(changed: TrainConfig) -> bool:
        return free is None or plan(changed, spec, card=card).total <= free + held

    if config.train.checkpointing == "auto":
        without = _with(config, "train", checkpointing=False)
        config = without if fits(without) else _with(config, "train", checkpointing=True)
    if config.base.hold == "auto":
        dense = _with(config, "base", hold="dense")
        possible = config.base.quantize == "nf4" and not (config.base.shard or config.lora.dora)
        config = dense if possible and fits(dense) else _with(config, "base", hold="quantized")
    return config


def check(config: TrainConfig, spec: BaseSpec, *, free: int | None, held: int = 0, card: int | None = None) -> None:
    """Refuse a training that does not fit into memory.

    Args:
        free: Bytes that are free; None if unknown, which passes.
        held: Bytes of the training that this process already holds.
        card: The bytes of memory of the CUDA device that it is for; None for a CPU.

    Raises:
        RefusedError: With the code `training-memory`, and the field `change`: the least change that makes it fit.
    """
    if error := misfit(config, spec, free=free, held=held, card=card):
        raise error


def misfit(
    config: TrainConfig, spec: BaseSpec, *, free: int | None, held: int = 0, card: int | None = None
) -> RefusedError | None:
    """Return the error of `check`; None where the training fits."""
    needed = plan(config, spec, card=card).total
    if free is None or needed <= free + held:
        return None
    room = free + held
    fitting = next((text for text, changed in _remedies(config) if plan(changed, spec, card=card).total <= room), None)
    change = f"Set {fitting}" if fitting else "No setting of rows, sequence or quantization makes it fit: use a smaller base"
    what = f"training needs about {_gigabytes(needed)}, but {_gigabytes(free + held)} are free"
    return RefusedError(config.where, what, change, code="training-memory", change=change)


def _remedies(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Yield changes, the least harmful first: fewer rows at once cost nothing, checkpointing costs time, short rows context."""
    steps: list[Step] = []
    if (config.train.micro_rows or config.train.rows) > 1:
        steps.append(("train", "micro_rows", 1))
    if config.base.hold == "dense":
        steps.append(("base", "hold", "quantized"))
    if config.base.quantize != "nf4":
        steps.append(("base", "quantize", "nf4"))
    if config.train.checkpointing is not True:
        steps.append(("train", "checkpointing", True))
    alone = [[step] for step in steps]
    together = [steps[:count] for count in range(2, len(steps) + 1)]
    shorter = [
        [*steps, ("data", "sequence", sequence)]
        for sequence in (config.data.sequence >> halvings for halvings in range(1, 8))
        if sequence >= _SHORTEST
    ]
    for chosen in (*alone, *together, *shorter):
        yield ", ".join(f"{name} = {json.dumps(value)}" for _, name, value in chosen), _changed(config, chosen)


def _changed(config: TrainConfig, steps: Sequence[Step]) -> TrainConfig:
    for section, name, value in steps:
        config = _with(config, section, **{name: value})
    return config


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count < 99.5e9 else f"{count / 1e9:.0f} GB"


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes available without swapping: of the system, or of this process's control group if less.

    None where the system does not report it.
    """
    found = [count for count in (_available(root), _left_in_group(root)) if count is not None]
    return min(found) if found else None


def cores_are_busy(root: Path = Path("/")) -> bool:
    """Return whether some thread waited for a core in over a tenth of the last ten seconds (kernel.org, "PSI").

    False where the system does not report it.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/pressure/cpu").read_text().splitlines():
            if line.startswith("some avg10="):
                return float(line.split()[1].partition("=")[2]) > _BUSY
    return False


def _available(root: Path) -> int | None:
    """Return `MemAvailable` of /proc/meminfo (proc(5)); None on other systems."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _left_in_group(root: Path) -> int | None:
    """Return what is left of a container's limit (kernel.org, "Control Group v2", memory.max); cached files do not count."""
    group = root / _CGROUP
    with contextlib.suppress(OSError, ValueError):
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used = int((group / "memory.current").read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
    return None
