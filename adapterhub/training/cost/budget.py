"""The comparison of a training run's memory with the free memory, and with that of other settings."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence

from adapterhub.training import machine
from adapterhub.training.events import MemoryPlan
from adapterhub.training.train_config import TrainConfig
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .memory import full_fine_tuning, parameters, plan

_MIN_SEQUENCE = 128  # tokens; shorter rows are never suggested
SettingChange = tuple[str, str, object]
"""Section, key and value."""


@dataclass(frozen=True)
class Alternative:
    """Alternative settings, as written in the config, with the memory plan of a training run that has them."""

    settings: str
    plan: MemoryPlan


@dataclass(frozen=True)
class Forecast:
    """The needs of a training run, computed in advance; sizes in bytes.

    Attributes:
        config: The config with each `auto` decided.
        memory: The memory at the peak.
        parameters: The number of trained parameters; the `base_parameters` are frozen.
        free: The free memory; None if unknown.
        card: The memory of the CUDA device to plan for; None for a CPU.
        full_fine_tuning: The minimum memory for training every parameter in float32.
        alternatives: The same training with one setting changed at a time.
        misfit: The error of a training run that does not fit; None if it fits.
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
        """Return whether a plan fits into the free memory; None if that is unknown."""
        return None if self.free is None else plan.total <= self.free


def forecast(config: TrainConfig, spec: BaseSpec, *, memory: int | None = None, card: int | None = None) -> Forecast:
    """Return what a training run on `spec` will need, from its headers alone.

    Args:
        memory: The free bytes; None for those of this machine, or for the whole memory of the card.
        card: The memory in bytes of the CUDA device to plan for; None for a CPU.
    """
    free = memory if memory is not None else card if card is not None else machine.free_memory()
    is_fast = memory is None and card is None and machine.multiplies_bfloat16_fast()
    config = resolve_auto(config, spec, free=free, card=card, is_fast=is_fast)
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
    """Return plans with one setting changed at a time: micro-rows, row length, checkpointing, quantization."""
    micro = config.train.micro_rows or config.train.rows
    sizes = {size for size in (micro // 2, 1) if 0 < size < micro and config.train.rows % size == 0}
    # Both directions: longer rows show what more memory would buy.
    sequences = [sequence for sequence in (config.data.sequence // 2, config.data.sequence * 2) if sequence > 1]
    changes: list[SettingChange] = [
        *(("train", "micro_rows", size) for size in sorted(sizes, reverse=True)),
        *(("data", "sequence", sequence) for sequence in sequences),
        ("train", "checkpointing", config.train.checkpointing is not True),
        ("base", "quantize", "none" if config.base.quantize == "nf4" else "nf4"),
    ]
    return [Alternative(_text([change]), plan(_with_changes(config, [change]), spec, card=card)) for change in changes]


def _with(config: TrainConfig, section: str, **values: object) -> TrainConfig:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def resolve_auto(
    config: TrainConfig,
    spec: BaseSpec,
    *,
    free: int | None,
    allocated: int = 0,
    card: int | None = None,
    is_fast: bool = False,
) -> TrainConfig:
    """Return the config with `auto` and `dequantized` decided.

    Checkpointing is on only if the training does not fit without it, because it costs more time than dequantizing once saves.
    The base is dequantized if the training then takes at most half of the memory: for a few percent, others keep theirs.

    Args:
        free: As for `misfit`, like `allocated` and `card`.
        is_fast: Whether the processor multiplies so fast that dequantizing is a part of a step worth its memory.
    """

    def fits(candidate: TrainConfig, share: float = 1.0) -> bool:
        return free is None or plan(candidate, spec, card=card).total <= share * (free + allocated)

    # Checkpointing is decided first: it depends on the quantized base, and a dequantized one must not force it on.
    if config.train.checkpointing == "auto":
        unchecked = _with(config, "train", checkpointing=False)
        config = unchecked if fits(unchecked) else _with(config, "train", checkpointing=True)
    # The norms of DoRA are computed from the codes, in float32.
    can_be_dequantized = config.base.quantize == "nf4" and config.base.dtype == "bfloat16" and not config.lora.dora
    if is_fast and can_be_dequantized and free is not None:
        dequantized = dataclasses.replace(config, dequantized=True)
        config = dequantized if fits(dequantized, 0.5) else config
    return config


def misfit(
    config: TrainConfig, spec: BaseSpec, *, free: int | None, allocated: int = 0, card: int | None = None
) -> RefusedError | None:
    """Return the error of a training run that does not fit into memory; None if it fits.

    It has the code `training-memory`, and the smallest change that makes the run fit in its field `change`.

    Args:
        free: The free bytes; None if unknown, which counts as enough.
        allocated: The bytes of the training that this process already holds.
        card: The memory in bytes of the CUDA device to plan for; None for a CPU.
    """
    needed = plan(config, spec, card=card).total
    if free is None or needed <= (available := free + allocated):
        return None
    fitting_settings = next(
        (text for text, changed in _remedies(config) if plan(changed, spec, card=card).total <= available), None
    )
    remedy = (
        f"Set {fitting_settings}"
        if fitting_settings
        else "No setting of rows, sequence or quantization makes it fit: use a smaller base"
    )
    problem = f"training needs about {_gigabytes(needed)}, but {_gigabytes(available)} are free"
    return RefusedError(config.location, problem, remedy, code="training-memory", change=remedy)


def _remedies(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Yield changed configs, the least harmful first: fewer rows at once, then slower checkpointing, then shorter rows."""
    changes: list[SettingChange] = []
    if (config.train.micro_rows or config.train.rows) > 1:
        changes.append(("train", "micro_rows", 1))
    if config.base.quantize != "nf4":
        changes.append(("base", "quantize", "nf4"))
    if config.train.checkpointing is not True:
        changes.append(("train", "checkpointing", True))
    # One change at a time, then the first two, three … together, then rows that are half as long with all of them.
    single_changes = [[change] for change in changes]
    cumulative_changes = [changes[:count] for count in range(2, len(changes) + 1)]
    shorter_rows = [
        [*changes, ("data", "sequence", sequence)]
        for sequence in (config.data.sequence >> halvings for halvings in range(1, 8))
        if sequence >= _MIN_SEQUENCE
    ]
    for combination in (*single_changes, *cumulative_changes, *shorter_rows):
        yield _text(combination), _with_changes(config, combination)


def _text(changes: Sequence[SettingChange]) -> str:
    """Return changes as they are written in a config."""
    return ", ".join(f"{name} = {json.dumps(value)}" for _, name, value in changes)


def _with_changes(config: TrainConfig, changes: Sequence[SettingChange]) -> TrainConfig:
    for section, name, value in changes:
        config = _with(config, section, **{name: value})
    return config


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count < 99.5e9 else f"{count / 1e9:.0f} GB"
