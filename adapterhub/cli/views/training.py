"""The display of a training while it runs, on a screen or in a log, and of its result."""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.cli import output
from adapterhub.cli.progress import bar, has_screen
from adapterhub_converters.containers.open_file import walk
from adapterhub_converters.display import printable

from . import train_plan

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from adapterhub.training import EvaluationEvent, Event, Ready, Report, ResumeEvent, StepEvent, TrainConfig, TrainingResult

_LINES = 10  # about so many lines about steps in a log


class Screen:
    """A display of the events of a training on stderr: a bar on a terminal, a few lines in a log."""

    def __init__(self, config: TrainConfig) -> None:
        self.ready: Ready | None = None
        self._config = config
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._losses: list[float] = []

    def __enter__(self) -> Screen:
        if has_screen():
            from rich.progress import TimeRemainingColumn

            self._bar = bar("{task.fields[text]}", TimeRemainingColumn(compact=True))
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, event: Event) -> None:
        """Show one event of the trainer."""
        handlers: dict[str, Callable[[Any], None]] = {
            "Loading": lambda e: self._advance("loading the base", e.done, e.total, ""),
            "Encoding": lambda e: self._advance("encoding the data", e.done, e.total, ""),
            "Ready": self._show_ready,
            "ResumeEvent": self._show_resumed,
            "StepEvent": self._show_step,
            "EvaluationEvent": self._show_evaluation,
            "SaveEvent": lambda e: None,
            "NoteEvent": lambda e: output.say(output.one_line(f"note: {e.text}")),
            "TrackerFailureEvent": lambda e: output.say(
                output.one_line(f"note: {e.name} accepts no more metrics ({e.reason}); log.jsonl has all")
            ),
        }
        handlers[type(event).__name__](event)

    def _advance(self, title: str, completed: int, total: int, text: str) -> None:
        if self._bar is None:
            return
        if self._task is None:
            self._task = self._bar.add_task(printable(title), total=total, text=text)
        self._bar.update(self._task, description=title, completed=completed, total=total, text=text)

    def _show_ready(self, ready: Ready) -> None:
        self.ready = ready
        if self._bar is not None and self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        for line in _start_lines(self._config, ready):
            output.say(line)
        self._advance(f"step 0/{ready.steps}", 0, ready.steps, "")

    def _show_resumed(self, resumed: ResumeEvent) -> None:
        output.say(f"resuming after step {resumed.step}, from {resumed.path}")
        steps = self.ready.steps if self.ready else 0
        self._advance(f"step {resumed.step}/{steps}", resumed.step, steps, "")

    def _show_step(self, step: StepEvent) -> None:
        from adapterhub.training.artifacts import loss_curve

        self._losses.append(step.loss)
        memory = f" {output.size(step.memory)}" if step.memory else ""
        # On a narrow screen the curve shrinks first, then the bar.
        width = max(8, min(24, self._bar.console.width // 8)) if self._bar else 0
        curve = f"{loss_curve.line(self._losses, width)}  " if self._bar else ""
        text = f"loss {step.loss:.3f}  {curve}{step.tokens_per_second:.0f} tokens/s read {memory}"
        self._advance(f"step {step.step}/{step.steps}", step.step, step.steps, text)
        # Without a bar, a few lines in all, so that a log of 10,000 steps stays short.
        if self._bar is None and (step.step % max(1, step.steps // _LINES) == 0 or step.step == step.steps):
            output.say(f"step {step.step}/{step.steps}  {text}")

    def _show_evaluation(self, evaluated: EvaluationEvent) -> None:
        if evaluated.accuracy is None:
            measurement = f"perplexity {evaluated.perplexity:.3f}"
        else:
            measurement = f"pairs: {evaluated.accuracy:.1%} preferred, margin {evaluated.margin:.3f}, loss {evaluated.loss:.3f}"
        output.say(f"step {evaluated.step}/{evaluated.steps}: held-out {measurement}")
        for prompt, answer in evaluated.samples:
            output.say(f"  {output.one_line(f'{prompt} → {answer}')}")


def _start_lines(config: TrainConfig, ready: Ready) -> list[str]:
    """Return the lines before the first step: the trained parameters, the base, the data, the memory."""
    in_16, in_4 = output.size(ready.base_in_16_bits), output.size(ready.base_in_4_bits)
    return [
        train_plan.trained_line(ready.parameters, ready.base_parameters),
        f"base: {in_16} in 16 bits, {in_4} in 4 bits; loaded {_base_storage(config)}",
        (
            f"data: {output.plural(ready.documents, 'document')}, {output.number(ready.tokens)} tokens in "
            f"{output.plural(ready.rows, 'row')}; {output.plural(ready.steps, 'step')}"
        ),
        f"memory: {output.size(ready.memory.total)} at the peak; --dry-run shows its parts",
        *([train_plan.checkpointing_line(ready.checkpointing)] if config.train.checkpointing == "auto" else []),
        *([train_plan.base_line(ready.dequantized)] if ready.dequantized else []),
        *(f"note: {note}" for note in ready.notes),
    ]


def _base_storage(config: TrainConfig) -> str:
    return "in 4 bits (NF4)" if config.base.quantize == "nf4" else f"as {config.base.dtype}"


def _files(folder: Path) -> list[dict[str, Any]]:
    files = sorted((path, status.st_size) for path, status in walk(folder) if stat.S_ISREG(status.st_mode))
    return [{"path": path, "size": size} for path, size in files]


def document(result: TrainingResult, ready: Ready | None) -> dict[str, Any]:
    """Return the result as JSON; the keys are stable."""
    return {
        "output": str(result.folder),
        "steps": result.steps,
        "tokens": result.tokens,
        "loss": result.loss,
        "perplexity_before": result.perplexity_before,
        "perplexity_after": result.perplexity_after,
        "accuracy_before": result.accuracy_before,
        "accuracy_after": result.accuracy_after,
        "kept": result.kept_step,
        "parameters": ready.parameters if ready else None,
        "memory": train_plan.memory_document(ready.memory) if ready else None,
        "report": _report(result.report) if result.report else None,
        "files": _files(result.folder),
    }


def _report(report: Report) -> dict[str, Any]:
    return {**dataclasses.asdict(report), "share": report.share, "mfu": report.mfu}


def text(result: TrainingResult, pushed: Mapping[str, Any] | None) -> None:
    """Print the result."""
    output.write(
        f"{result.folder}: {output.plural(result.steps, 'step')}, {output.number(result.tokens)} tokens trained on, "
        f"loss {result.loss:.3f}"
    )
    if result.perplexity_before is not None and result.perplexity_after is not None:
        best = f", from step {result.kept_step}" if result.kept_step not in (None, result.steps) else ""
        output.write(f"held-out perplexity {result.perplexity_before:.3f} -> {result.perplexity_after:.3f}{best}")
        if result.perplexity_after > result.perplexity_before:
            output.say("warning: the held-out data became less likely; see `adapterhub train --explain keep_best`")
    if result.accuracy_before is not None and result.accuracy_after is not None:
        output.write(f"held-out pairs preferred {result.accuracy_before:.1%} -> {result.accuracy_after:.1%}")
    output.write_pairs(_cost_pairs(result.report) if result.report else {})
    for file in _files(result.folder):
        output.write(f"  {file['path']}  {output.size(file['size'])}")
    if pushed:
        output.write(f"pushed {pushed['ref']}  {output.digest(pushed['digest'])}")


def _cost_pairs(report: Report) -> dict[str, str]:
    """Return memory and speed, next to the prediction and to full fine-tuning."""
    full = output.size(report.full_fine_tuning)
    share = f"{report.peak / report.full_fine_tuning:.0%} of the {full} or more for full fine-tuning"
    suffix = " with checkpointing" if report.checkpointing else ""
    peak = f"{output.size(report.peak)} at the peak{suffix}, predicted {output.size(report.predicted)}; {share}"
    return {
        "memory": peak if report.peak else f"{output.size(report.predicted)} predicted, not measured here",
        "speed": f"{report.tokens_per_second:.0f} tokens/s read over {report.seconds:.1f} s of steps, without padding",
        "arithmetic": f"{report.utilization:.1%} of the {report.matmul / 1e9:.0f} GFLOP/s of a matrix product on this machine",
        **({"MFU": _mfu(report)} if report.card else {}),
    }


def _mfu(report: Report) -> str:
    if report.mfu is None or report.peak_rate is None:
        return f"unknown, since {report.card} is not among the cards whose data sheets are known"
    return f"{report.mfu:.1%} of the {report.peak_rate / 1e12:.0f} TFLOP/s of the data sheet of {report.card}"
