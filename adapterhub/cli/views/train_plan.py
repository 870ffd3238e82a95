"""The memory plan of a training: `adapterhub train CONFIG --dry-run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterhub.cli import errors, output
from adapterhub.cli.options import Settings
from adapterhub.cli.output import Column

if TYPE_CHECKING:
    from adapterhub.training import MemoryPlan, TrainConfig
    from adapterhub.training.cost.budget import Forecast

# Parts of a plan, as shown.
_PARTS = {
    "base": "base", "adapter": "adapter", "gradients": "gradients", "optimizer": "optimizer", "activations": "activations",
    "logits": "logits", "data": "data", "runtime": "interpreter",
}  # fmt: skip


def show(settings: Settings, config: TrainConfig, found: Forecast, *, force: bool) -> int:
    """Print the plan; exit as the training would where it cannot fit, unless forced."""
    checkpoints = found.config.train.checkpointing is True
    document = {
        "fits": None if found.free is None else found.misfit is None,
        "parameters": found.parameters,
        "base_parameters": found.base_parameters,
        "memory": memory_document(found.memory),
        "free": found.free,
        "checkpointing": found.config.train.checkpointing,
        "full_fine_tuning": found.full_fine_tuning,
        "what_if": [
            {"settings": item.settings, "memory": memory_document(item.plan), "fits": found.fits(item.plan)}
            for item in found.alternatives
        ],
    }

    def text() -> None:
        output.write(trained(found.parameters, found.base_parameters))
        output.write()
        for line in table(found.memory):
            output.write(line)
        if config.train.checkpointing == "auto":
            output.write(checkpointing(checkpoints))
        output.write()
        for line in _what_if(found):
            output.write(line)
        output.write()
        output.write(f"full fine-tuning in float32 needs at least {output.size(found.full_fine_tuning)}")
        if found.free is not None:
            output.write(f"{output.size(found.free)} free")

    output.emit(document, as_json=settings.as_json, text=text)
    if found.misfit is None or force:
        return 0
    output.say(output.one_line(f"error: {errors.in_words_of_the_command_line(found.misfit)}"))
    return found.misfit.exit_code


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


def table(plan: MemoryPlan) -> list[str]:
    """The parts of a plan and their sum, at the peak."""
    rows = [[_PARTS[part], output.size(count)] for part, count in plan.parts().items()]
    columns = (Column("MEMORY"), Column("BYTES", right=True))
    return output.table(columns, [*rows, ["peak", output.size(plan.total)]], screen=output.width())


def _what_if(found: Forecast) -> list[str]:
    rows = []
    for item in found.alternatives:
        change = item.plan.total - found.memory.total
        verdict = "does not fit" if found.fits(item.plan) is False else ""
        rows.append(
            [item.settings, output.size(item.plan.total), f"{'-' if change < 0 else '+'}{output.size(abs(change))}", verdict]
        )
    columns = (Column("WITH"), Column("PEAK", right=True), Column("CHANGE", right=True), Column("", drop=1))
    return output.table(columns, rows, screen=output.width())
