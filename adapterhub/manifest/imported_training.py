"""The record of a training by another tool, from the file that transformers' Trainer leaves beside an adapter.

trl, axolotl, LLaMA-Factory and unsloth train with that Trainer (transformers, `trainer_callback.py`, `TrainerState`). Which of
them it was is in the tags of the card that they write. The record names that tool as its recorder, not adapterhub's trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.json_file import is_integer, is_number
from adapterhub_converters.errors import AdapterhubError

from .card import Card
from .document import LossPoint, Training
from .package_files import TRAINER_STATE

# The tags of the tools, before those of the ones that they are built on.
_TOOLS = ("axolotl", "llama-factory", "unsloth", "trl")
_MAX_POINTS = 100  # of the curve
_MAX_STEPS = 2**53


def read(folder: Path, card: Card) -> Training | None:
    """Return the record in the folder of an adapter, whose model card is `card`; None if there is none that can be read."""
    try:
        state = json_file.parse_object(json_file.read_text(folder / TRAINER_STATE), TRAINER_STATE)
    except AdapterhubError:  # such as NaN, which JSON does not have
        return None
    lines = state.get("log_history")
    points = list(_points(lines)) if isinstance(lines, list) else []
    metrics = dict(_metrics(state, points))
    if not points and not metrics:
        return None
    tags = {tag.lower() for tag in card.values("tags")}
    tool = next((tool for tool in _TOOLS if tool in tags), "transformers")
    stride = max(1, -(len(points) // -_MAX_POINTS))
    # Counted from the end, so that the last losses are among them.
    return Training(metrics=metrics or None, curve=tuple(points[::-1][::stride][::-1]) or None, recorder=tool)


def _points(lines: list[Any]) -> Iterator[LossPoint]:
    """Yield the losses in a log in order: of training and on held-out data."""
    for line in lines:
        step = line.get("step") if isinstance(line, dict) else None
        if not is_integer(step) or not 0 <= step < _MAX_STEPS:
            continue
        if is_number(line.get("loss")):
            yield LossPoint(step, loss=float(line["loss"]))
        elif is_number(line.get("eval_loss")):
            yield LossPoint(step, heldout_loss=float(line["eval_loss"]))


def _metrics(state: dict[str, Any], points: list[LossPoint]) -> Iterator[tuple[str, float]]:
    """Yield the metrics at the end, under the names that adapterhub's trainer gives them."""
    if is_integer(steps := state.get("global_step")) and 0 < steps < _MAX_STEPS:
        yield "train_steps", steps
    if losses := [point.loss for point in points if point.loss is not None]:
        yield "train_loss", losses[-1]
    if losses := [point.heldout_loss for point in points if point.heldout_loss is not None]:
        yield "heldout_loss", losses[-1]
