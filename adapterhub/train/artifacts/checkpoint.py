"""A run that was stopped, as one safetensors file: the factors, the optimizer's moments, the log so far.

Nothing else is needed, because there is no other state: the order of the data follows from the seed and the step.
The file names the training it belongs to, so that it cannot go on as another one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adapterhub.train import distributed
from adapterhub.train.layers.lora import trained
from adapterhub.train.loop import optimizer
from adapterhub.train.loop.loop import State
from adapterhub.train.model.weights import as_numpy, as_torch
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import ConflictError, FormatError, LocalIOError

_BEST = ".best"  # what a parameter was when the held-out loss was lowest


def path_for(out: Path) -> Path:
    """Where the checkpoint of a run into `out` lies: beside it."""
    return out.with_name(out.name + ".checkpoint.safetensors")


def identity(facts: Mapping[str, Any]) -> str:
    """Digest of what makes two runs the same."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def save(path: Path, model: Any, state: State, run: str) -> Path:
    """Write the checkpoint whole, over the one before; only the first of several processes does."""
    if not distributed.first():
        return path
    tensors = {f"{name}{_BEST}": _array(value) for name, value in state.best.items()}
    for name, parameter in trained(model):
        tensors[name] = _array(parameter)
        # An expert that no token has come to yet has no moments.
        for moment, value in optimizer.moments(state.optimizer, parameter).items():
            tensors[f"{name}.{moment}"] = _array(value)
    metadata = {"run": run, "step": str(state.step), "tokens": str(state.tokens), "log": json.dumps(state.log)}
    metadata["scale"] = json.dumps([state.scale.factor, state.scale.good])
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        safetensors_file.write(temporary, tensors, metadata)
        os.replace(temporary, path)
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _array(tensor: Any) -> Any:
    return tensor.cpu().numpy() if tensor.dtype == torch.uint8 else as_numpy(tensor)


def restore(path: Path, model: Any, state: State, run: str) -> bool:
    """Bring model and state to where the checkpoint at `path` left them; False if there is none."""
    if not path.exists():
        return False
    with safetensors_file.SafetensorsFile(path) as file:
        metadata = file.header.metadata
        if metadata.get("run") != run:
            raise ConflictError(
                str(path), "is of a training with another config, data or base", "Delete it, or name another output folder"
            )
        try:
            for name, parameter in trained(model):
                with torch.no_grad():
                    parameter.copy_(as_torch(file.tensor(name)))
                moments = [key for key in file.header.tensors if key.startswith(f"{name}.") and key != f"{name}{_BEST}"]
                if moments:
                    known = {key.removeprefix(f"{name}."): as_torch(file.tensor(key)) for key in moments}
                    optimizer.put(state.optimizer, parameter, known)
            best = [key for key in file.header.tensors if key.endswith(_BEST)]
            state.best = {key.removesuffix(_BEST): as_torch(file.tensor(key)) for key in best}
            state.step, state.tokens = int(metadata["step"]), int(metadata["tokens"])
            state.log[:] = json.loads(metadata["log"])
            state.scale.factor, state.scale.good = json.loads(metadata["scale"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise FormatError(str(path), f"not a checkpoint of this training ({error})") from error
    return True
