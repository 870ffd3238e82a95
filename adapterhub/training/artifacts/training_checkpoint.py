"""Checkpoints: one safetensors file with the trained parameters, the optimizer's moments and the log so far.

There is no other state: the order of the data follows from the seed and the step. The file identifies its training, so that no
other training run can resume from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapterhub.training import distributed
from adapterhub.training.layers.lora import trained_parameters
from adapterhub.training.loop import optimizer
from adapterhub.training.loop.state import State
from adapterhub.training.model.base_tensors import as_numpy, as_torch
from adapterhub_converters import trained_prompt
from adapterhub_converters.containers import atomic, json_file, safetensors_file
from adapterhub_converters.errors import ConflictError, FormatError

KEPT = ""
"""The identity in a checkpoint that stays after its training: adapter.json has its digest, and no run resumes from it."""
_NUMBERS = ("step", "loss", "heldout_loss", "heldout_accuracy", "heldout_margin", "learning_rate", "tokens", "size")
_MAX_NUMBER, _MAX_LOSS = 2.0**53, 700.0  # the perplexity of a larger loss overflows
_BEST_SUFFIX = ".best"  # of the name of a parameter at the lowest held-out loss


def path_for(out: Path) -> Path:
    """Return the path of the checkpoint of a run into `out`: a file next to it."""
    return out.with_name(out.name + ".checkpoint.safetensors")


def kept_folder(out: Path) -> Path:
    """Return the folder of the checkpoints that stay after a run into `out`."""
    return out.with_name(out.name + ".checkpoints")


def kept_name(step: int) -> str:
    """Return the name of the file of a checkpoint that stays."""
    return f"step-{step}.safetensors"


def identity(facts: Mapping[str, Any]) -> str:
    """Return a digest of `facts`, which are equal for runs that give the same result."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def date(path: Path) -> str | None:
    """Return the ISO date that the training of the checkpoint at `path` writes into conversations; None if there is none."""
    if not path.exists():
        return None
    with safetensors_file.SafetensorsFile(path) as file:
        return trained_prompt.valid_date(file.header.metadata.get("date"))


def save(path: Path, model: nn.Module, state: State, run: str, *, date: str | None = None) -> Path:
    """Replace the checkpoint by a new one, on disk completely or not at all; only the first of several processes writes.

    `date` is the date that the chat template writes, if it asks for one.
    """
    if not distributed.first():
        return path
    tensors = {f"{name}{_BEST_SUFFIX}": _array(value) for name, value in state.best.items()}
    for name, parameter in trained_parameters(model):
        tensors[name] = _array(parameter)
        # An expert that has not had a token yet has no moments.
        for moment, value in optimizer.moments(state.optimizer, parameter).items():
            tensors[f"{name}.{moment}"] = _array(value)
    metadata = {"run": run, "step": str(state.step), "tokens": str(state.tokens), "read": str(state.read)}
    if date:
        metadata["date"] = date
    metadata["log"] = json.dumps(state.log)
    metadata["scale"] = json.dumps([state.scale.factor, state.scale.good, state.scale.skipped])
    # A run that is killed while it writes, or whose machine loses power, still has the previous checkpoint.
    with atomic.pending_output(path, folder=False, replace=True) as pending:
        safetensors_file.write(pending, tensors, metadata)
    return path


def remove(path: Path) -> None:
    """Remove the checkpoint at `path`, if there is one, and what killed runs left of others."""
    with atomic.scratch_folder(path):
        path.unlink(missing_ok=True)


def _array(tensor: Tensor) -> Any:
    return tensor.cpu().numpy() if tensor.dtype == torch.uint8 else as_numpy(tensor)


def _checked_line(line: Any) -> dict[str, Any]:
    """Return a line of a log whose numbers can be computed with; ValueError for another: it may be a stranger's."""
    fields = dict(line)
    numbers = [fields[key] for key in _NUMBERS if key in fields]
    is_valid = all(json_file.is_number(number) and abs(number) < _MAX_NUMBER for number in numbers)
    if not is_valid or not json_file.is_integer(fields.get("step")) or fields.get("heldout_loss", 0) > _MAX_LOSS:
        raise ValueError("a line of its log has other numbers")
    if ("heldout_accuracy" in fields) != ("heldout_margin" in fields):
        raise ValueError("a line of its log is incomplete")
    return fields


def restore(path: Path, model: nn.Module, state: State, run: str) -> bool:
    """Restore model and state from the checkpoint at `path`; return False if there is none.

    Raises:
        ConflictError: It belongs to another training run.
        FormatError: It does not fit the model.
    """
    if not path.exists():
        return False
    with safetensors_file.SafetensorsFile(path) as file:
        metadata = file.header.metadata
        if metadata.get("run") != run:
            problem = "belongs to a training with another config, data, base or version"
            raise ConflictError(str(path), problem, "Delete it, or name another folder")
        try:
            for name, parameter in trained_parameters(model):
                value = as_torch(file.tensor(name))
                if value.shape != parameter.shape:  # `copy_` would repeat the values of some shapes
                    raise ValueError(f"{name} has the shape {list(value.shape)}")
                with torch.no_grad():
                    parameter.copy_(value)
                # A parameter is stored as NAME, its moments as NAME.MOMENT, its best values as NAME.best.
                moment_names = [
                    key for key in file.header.tensors if key.startswith(f"{name}.") and key != f"{name}{_BEST_SUFFIX}"
                ]
                if moment_names:
                    tensors = {key.removeprefix(f"{name}."): as_torch(file.tensor(key)) for key in moment_names}
                    optimizer.restore_moments(state.optimizer, parameter, tensors)
            best_names = [key for key in file.header.tensors if key.endswith(_BEST_SUFFIX)]
            state.best = {key.removesuffix(_BEST_SUFFIX): as_torch(file.tensor(key)) for key in best_names}
            state.step, state.tokens, state.read = (int(metadata[key]) for key in ("step", "tokens", "read"))
            if state.best and state.best.keys() != {name for name, _ in trained_parameters(model)}:
                raise ValueError("the best values are of other parameters")
            state.log[:] = map(_checked_line, json_file.parse(metadata["log"], str(path)))
            state.scale.factor, state.scale.good, state.scale.skipped = json_file.parse(metadata["scale"], str(path))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FormatError(str(path), f"not a checkpoint of this training ({error})") from error
    return True
