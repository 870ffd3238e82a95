"""Pickles run code when they are loaded, so they are recognized by content and by name, and refused.

Who insists gets one converted in a process of its own: `torch.load(weights_only=True)`, which builds tensors and nothing
else, under limits of memory, time and output, without a way to start another process, and what comes out of it is a
safetensors file that is read like any stranger's. The one path outside of training that needs torch.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

from adapterhub_converters.adapter_files import (
    HEAD,
    LITGPT_WEIGHTS,
    MLX_WEIGHTS,
    PEFT_WEIGHTS,
    is_pickle_name,
    pickled_weights,
    starts_like_pickle,
    starts_like_safetensors,
)
from adapterhub_converters.errors import FormatError, LocalIOError, MissingExtraError, RefusedError

from . import peft

_SECONDS = 300  # of wall time; the child's own limit is in CPU seconds


def is_pickle(path: Path) -> bool:
    """Whether the file's first bytes are those of a pickle or of torch's zip of one, whatever its name says."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
    except OSError:
        return False
    return starts_like_pickle(head) and not starts_like_safetensors(head)


def found(path: Path) -> Path | None:
    """The pickle that `path` is, or that holds the weights of the folder `path`."""
    if path.is_file():
        return path if is_pickle(path) or (is_pickle_name(path.name) and not _is_gguf(path)) else None
    for name in (PEFT_WEIGHTS, MLX_WEIGHTS):
        if (path / name).is_file():
            return path / name if is_pickle(path / name) else None
    if (path / LITGPT_WEIGHTS).is_file():
        return path / LITGPT_WEIGHTS
    if not (path / peft.CONFIG).is_file():
        return None
    return next((path / name for name in pickled_weights(item.name for item in path.iterdir())), None)


def _is_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def refuse(path: Path) -> None:
    """RefusedError if `path` is a pickle or has its weights in one."""
    pickle = found(path)
    if pickle is not None:
        hint = "Save the adapter again with safe_serialization=True, or convert it with --unsafe-pickle"
        raise RefusedError(str(pickle), "a pickle can run code when it is loaded", hint)


def converted(pickle: Path, folder: Path) -> Path:
    """The tensors of `pickle` in the empty `folder`: itself if a PEFT config lies beside the pickle, else a lone file."""
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError(str(pickle), "reading a pickle needs torch", "pip install 'adapterhub[train]'")
    weights = folder / peft.WEIGHTS
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from adapterhub_converters.formats import unpickle; unpickle.main()"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2]), str(pickle.resolve()), str(weights)]
    # Nothing of the environment goes in; one thread, because the child may start none.
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise FormatError(str(pickle), f"loading it took more than {_SECONDS} seconds") from error
    except OSError as error:
        raise LocalIOError(str(pickle), error.strerror or str(error)) from error
    _check(pickle, done)
    beside = pickle.with_name(peft.CONFIG)
    if not beside.is_file():
        return weights
    shutil.copyfile(beside, folder / peft.CONFIG)
    return folder


def _check(pickle: Path, done: subprocess.CompletedProcess[bytes]) -> None:
    if done.returncode == 0:
        return
    try:
        answer = json.loads(done.stdout.decode().splitlines()[-1])
        kind, reason = str(answer["kind"]), " ".join(str(answer["reason"]).split())[:200]
    except (ValueError, LookupError, TypeError):
        kind, reason = "", f"loading it ended with code {done.returncode}: over the limits of memory, time or output"
    if kind == "refused":
        raise RefusedError(str(pickle), f"it holds more than tensors: {reason}", "Do not load it with anything else either")
    raise FormatError(str(pickle), reason if not kind else f"no file of tensors: {reason}")
