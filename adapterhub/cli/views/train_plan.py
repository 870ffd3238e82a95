"""The plan of a training: what it will read, do and need (`adapterhub train CONFIG --dry-run`)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from adapterhub.cli import errors, output
from adapterhub.cli.options import Settings
from adapterhub.cli.output import Column

if TYPE_CHECKING:
    from adapterhub.training import MemoryPlan, TrainConfig
    from adapterhub.training.cost.budget import Forecast
    from adapterhub.training.data.survey import Count
    from adapterhub.training.training_preview import Preview

# Parts of a memory plan, as they are shown.
_PARTS = {
    "base": "base", "adapter": "adapter", "gradients": "gradients", "optimizer": "optimizer", "activations": "activations",
    "logits": "logits", "data": "data", "runtime": "interpreter",
}  # fmt: skip


def show(settings: Settings, config: TrainConfig, forecast: Forecast, *, force: bool, is_local: bool) -> int:
    """Print the plan. Return the exit code that the training would have if it cannot fit, unless forced.

    `is_local` says whether the plan is for this machine.
    """
    from adapterhub.training import preview

    preview_ = preview(config, on_this_machine=is_local)
    checkpoints = forecast.config.train.checkpointing is True
    document = {
        "fits": None if forecast.free is None else forecast.misfit is None,
        "parameters": forecast.parameters,
        "base_parameters": forecast.base_parameters,
        "data": _data_document(preview_),
        "memory": memory_document(forecast.memory),
        "free": forecast.free,
        "checkpointing": forecast.config.train.checkpointing,
        "dequantized": forecast.config.dequantized,
        "full_fine_tuning": forecast.full_fine_tuning,
        "what_if": [
            {
                "settings": alternative.settings,
                "memory": memory_document(alternative.plan),
                "fits": forecast.fits(alternative.plan),
            }
            for alternative in forecast.alternatives
        ],
    }

    def text() -> None:
        output.write(trained_line(forecast.parameters, forecast.base_parameters))
        output.write()
        _write_data(preview_, config)
        output.write()
        for line in table(forecast.memory):
            output.write(line)
        if config.train.checkpointing == "auto":
            output.write(checkpointing_line(checkpoints))
        if config.base.quantize == "nf4":
            output.write(base_line(forecast.config.dequantized))
        output.write()
        for line in _what_if(forecast):
            output.write(line)
        output.write()
        output.write(f"full fine-tuning in float32 needs at least {output.size(forecast.full_fine_tuning)}")
        if forecast.free is not None:
            location = "" if is_local else " on the device that is planned for"
            output.write(f"{output.size(forecast.free)} free{location}")

    output.emit(document, as_json=settings.as_json, text=text)
    if forecast.misfit is None or force:
        return 0
    errors.say(forecast.misfit)
    return forecast.misfit.exit_code


def _data_document(plan: Preview) -> dict[str, Any]:
    """Return the data and steps as JSON; tokens, steps and time are null if they are not known."""
    count = plan.data.count
    return {
        "files": [dataclasses.asdict(file) for file in plan.data.files],
        "documents": plan.data.documents,
        "heldout_documents": plan.data.heldout_documents,
        "tokens": count and count.tokens,
        "trained_tokens": count and count.trained,
        "counted_share": count and count.share,
        "rows": count and count.rows,
        "steps": count and count.steps,
        "steps_per_epoch": count and count.steps_per_epoch,
        "encoding_seconds": plan.data.count and plan.data.encoding_seconds,
        "seconds_at_least": plan.seconds,
        "matmul": plan.matmul,
        "notes": list(plan.notes),
    }


def _write_data(plan: Preview, config: TrainConfig) -> None:
    """Print the files, and the counts of documents, tokens and steps."""
    rows = [[file.path, file.contents or "empty", "held out" * (file.split == "heldout")] for file in plan.data.files]
    for line in output.table((Column("DATA"), Column("CONTAINS"), Column("")), rows, screen=output.width()):
        output.write(line)
    heldout = f", {plan.data.heldout_documents:,} held out" if plan.data.heldout_documents else ""
    pairs = {"examples": f"{plan.data.documents:,} to train on{heldout}"}
    if plan.data.count is None:
        pairs["tokens"] = "not counted: pip install 'adapterhub[train]'"
    else:
        pairs |= _steps(plan.data.count, config)
    if plan.data.encoding_seconds >= 1:
        pairs["encoding"] = f"about {_duration(plan.data.encoding_seconds)} on this machine, before the first step"
    if plan.seconds is not None and plan.matmul is not None:
        rate = f"{plan.matmul / 1e9:.0f} GFLOP/s of a matrix product on this machine"
        pairs["time"] = f"at least {_duration(plan.seconds)}, the steps' arithmetic at the {rate}"
    output.write_pairs(pairs)
    for note in plan.notes:
        output.write(f"note: {note}")


def _steps(count: Count, config: TrainConfig) -> dict[str, str]:
    prefix = "about " if count.share < 1 else ""
    estimate_note = f"; estimated from {count.share:.1%} of the text" if prefix else ""
    row = f"of {output.plural(config.train.rows, 'row')}, {config.data.sequence} tokens each"
    return {
        "tokens": f"{prefix}{output.number(count.tokens)}, {output.number(count.trained)} of them trained on{estimate_note}",
        "steps": f"{prefix}{count.steps:,} {row}; an epoch is {prefix}{count.steps_per_epoch:,}",
    }


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{max(1, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


def trained_line(adapter: int, base: int) -> str:
    """Return a sentence about the trained share of the parameters."""
    share = f" ({adapter / (base + adapter):.2%})" if base else ""
    return f"trains {output.number(adapter)} of {output.number(base + adapter)} parameters{share}"


def checkpointing_line(enabled: bool) -> str:
    """Return a sentence about the choice of `checkpointing = "auto"`."""
    return "checkpointing: on, because it does not fit without" if enabled else "checkpointing: off, because it fits without"


def base_line(dequantized: bool) -> str:
    """Return a sentence about the form in which the quantized base is held."""
    if dequantized:
        return "base: dequantized once, because it fits into half of the memory and this processor multiplies bfloat16 fast"
    return "base: kept in 4 bits, and dequantized by each step"


def memory_document(plan: MemoryPlan) -> dict[str, int]:
    """Return a memory plan as JSON; the keys are stable."""
    return {**plan.parts(), "total": plan.total}


def table(plan: MemoryPlan) -> list[str]:
    """Return the parts of a memory plan and their sum, at the peak."""
    rows = [[_PARTS[part], output.size(count)] for part, count in plan.parts().items()]
    columns = (Column("MEMORY"), Column("BYTES", right=True))
    return output.table(columns, [*rows, ["peak", output.size(plan.total)]], screen=output.width())


def _what_if(forecast: Forecast) -> list[str]:
    rows = []
    for alternative in forecast.alternatives:
        change = alternative.plan.total - forecast.memory.total
        verdict = "does not fit" if forecast.fits(alternative.plan) is False else ""
        rows.append(
            [
                alternative.settings,
                output.size(alternative.plan.total),
                f"{'-' if change < 0 else '+'}{output.size(abs(change))}",
                verdict,
            ]
        )
    columns = (Column("WITH"), Column("PEAK", right=True), Column("CHANGE", right=True), Column("", drop=1))
    return output.table(columns, rows, screen=output.width())
