"""The memory plan of a training: `adapterhub train CONFIG --dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.cli import errors, output
from adapterhub.cli.options import Settings
from adapterhub.cli.output import Column

if TYPE_CHECKING:
    from adapterhub.training import MemoryPlan, TrainConfig
    from adapterhub.training.cost.budget import Alternative

# Parts of a plan, as shown.
_PARTS = {
    "base": "base", "adapter": "adapter", "gradients": "gradients", "optimizer": "optimizer", "activations": "activations",
    "logits": "logits", "data": "data", "runtime": "interpreter",
}  # fmt: skip


def show(settings: Settings, config: TrainConfig, *, force: bool) -> int:
    """Print the plan; exit as the training would where it cannot fit, unless forced."""
    from adapterhub.training import plan
    from adapterhub.training.cost import budget
    from adapterhub.training.cost.memory import full_fine_tuning, parameters
    from adapterhub_converters.bases import read_base

    spec = read_base(config.resolve(config.base.path))
    free, asked = budget.free_memory(), config.train.checkpointing
    config = budget.settled(config, spec, free=free)
    planned, others = plan(config, spec), budget.alternatives(config, spec)
    base, adapter = parameters(config, spec)
    full = full_fine_tuning(config, spec)
    misfit = budget.misfit(config, spec, free=free)
    document = {
        "fits": None if free is None else misfit is None,
        "parameters": adapter,
        "base_parameters": base,
        "memory": memory_document(planned),
        "free": free,
        "checkpointing": config.train.checkpointing,
        "full_fine_tuning": full,
        "what_if": [
            {"settings": item.settings, "memory": memory_document(item.plan), "fits": fits(item.plan, free)} for item in others
        ],
    }

    def text() -> None:
        output.write(trained(adapter, base))
        output.write()
        for line in table(planned):
            output.write(line)
        if asked == "auto":
            output.write(checkpointing(config.train.checkpointing is True))
        output.write()
        for line in _what_if(planned, others, free):
            output.write(line)
        output.write()
        output.write(f"full fine-tuning in float32 needs at least {output.size(full)}")
        if free is not None:
            output.write(f"{output.size(free)} free")

    output.emit(document, as_json=settings.as_json, text=text)
    if misfit is None or force:
        return 0
    output.say(output.one_line(f"error: {errors.in_words_of_the_command_line(misfit)}"))
    return misfit.exit_code


def trained(adapter: int, base: int) -> str:
    """The trained share of the parameters."""
    share = f" ({adapter / (base + adapter):.2%})" if base else ""
    return f"trains {output.number(adapter)} of {output.number(base + adapter)} parameters{share}"


def checkpointing(on: bool) -> str:
    """The choice of `checkpointing = "auto"`."""
    return "checkpointing: on, because it does not fit without" if on else "checkpointing: off, because it fits without"


def memory_document(plan: MemoryPlan) -> dict[str, int]:
    """A plan with stable keys."""
    return {**plan.parts(), "total": plan.total}


def fits(plan: MemoryPlan, free: int | None) -> bool | None:
    """True if a plan fits into the free memory; None if that is unknown."""
    return None if free is None else plan.total <= free


def table(plan: MemoryPlan) -> list[str]:
    """The parts of a plan and their sum, at the peak."""
    rows = [[_PARTS[part], output.size(count)] for part, count in plan.parts().items()]
    columns = (Column("MEMORY"), Column("BYTES", right=True))
    return output.table(columns, [*rows, ["peak", output.size(plan.total)]], screen=output.width())


def _what_if(planned: MemoryPlan, others: Sequence[Alternative], free: int | None) -> list[str]:
    rows: list[list[Any]] = []
    for item in others:
        change = item.plan.total - planned.total
        verdict = {True: "", False: "does not fit", None: ""}[fits(item.plan, free)]
        rows.append(
            [item.settings, output.size(item.plan.total), f"{'-' if change < 0 else '+'}{output.size(abs(change))}", verdict]
        )
    columns = (Column("WITH"), Column("PEAK", right=True), Column("CHANGE", right=True), Column("", drop=1))
    return output.table(columns, rows, screen=output.width())
