"""Recognition of pickles, by content and by name: they can run code when they are loaded, and are refused.

On request a pickle is converted in a separate process: `torch.load(weights_only=True)`, which builds only tensors, under limits
on memory, time and output, and unable to start another process. The result is a safetensors file, which is read like any
untrusted one. Outside of training, this is the only code path that needs torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub_converters.adapter_files import (
    LITGPT_WEIGHTS,
    MLX_WEIGHTS,
    PEFT_WEIGHTS,
    is_pickle_name,
    pickled_weights,
    starts_like_pickle,
    starts_like_safetensors,
)
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import (
    AdapterhubError,
    FormatError,
    LocalIOError,
    MissingExtraError,
    NotFoundError,
    RefusedError,
)

from . import FORMATS, added_format, peft
from .candidate import Candidate

if TYPE_CHECKING:
    import subprocess

_SECONDS = 300  # of wall time; the child's own limit is in CPU seconds


def is_pickle(path: Path | Candidate) -> bool:
    """Return whether the file begins with the bytes of a pickle, or of the zip archive that torch puts around one."""
    try:
        head = Candidate.of(path).head
    except (LocalIOError, NotFoundError, RefusedError):
        return False
    return starts_like_pickle(head) and not starts_like_safetensors(head)


def pickle_in(path: Path | Candidate) -> Path | None:
    """Return `path` if it is a pickle, or the pickle with the weights of the folder `path`; else None.

    A file that the format of another package recognizes is none: its container may be a zip archive, as torch's is.
    """
    candidate = Candidate.of(path)
    path = candidate.path
    if candidate.is_file:
        resembles_pickle = is_pickle(candidate) or (is_pickle_name(path.name) and not candidate.is_gguf)
        return path if resembles_pickle and added_format(path) is None else None
    # A pickle may carry the name of a safetensors file.
    for name in (PEFT_WEIGHTS, MLX_WEIGHTS):
        if (path / name).is_file():
            return path / name if is_pickle(candidate.file(name)) else None
    if (path / LITGPT_WEIGHTS).is_file():
        return path / LITGPT_WEIGHTS
    if not (path / peft.CONFIG).is_file():
        return None
    return next((path / name for name in pickled_weights(item.name for item in path.iterdir())), None)


def refuse(path: Path | Candidate) -> None:
    """Raise RefusedError if `path` is a pickle, or a folder whose weights are in one."""
    pickle = pickle_in(path)
    if pickle is not None:
        hint = "Save the adapter again with safe_serialization=True"
        raise RefusedError(str(pickle), "a pickle can run code when it is loaded", hint, code="pickle")


def convert_pickle(pickle: Path, folder: Path) -> Path:
    """Convert the tensors of `pickle` into the empty `folder`.

    Returns:
        `folder` if there is a PEFT config next to the pickle, else the one file in it.

    Raises:
        RefusedError: The pickle contains more than tensors.
        FormatError: It cannot be loaded within the limits.
        MissingExtraError: torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingExtraError(str(pickle), "reading a pickle needs torch", "Run `pip install 'adapterhub[train]'`")
    import subprocess  # late: few adapters are pickles

    weights = folder / peft.WEIGHTS
    # The package is found by an explicit path, as the child gets neither PYTHONPATH nor the parent's sys.path.
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from adapterhub_converters.formats import unpickle; unpickle.main()"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parents[2]), str(pickle.resolve()), str(weights)]
    # The child gets nothing of the environment, and one thread, as it may not start any.
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        result = subprocess.run(
            command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise FormatError(str(pickle), f"loading it took more than {_SECONDS} seconds, and was stopped") from error
    except OSError as error:
        raise LocalIOError(str(pickle), error.strerror or str(error)) from error
    _raise_for_failure(pickle, result)
    config = pickle.with_name(peft.CONFIG)
    if not config.is_file():
        return weights
    shutil.copyfile(config, folder / peft.CONFIG)
    return folder


@contextlib.contextmanager
def open_source(candidate: Candidate, *, unsafe_pickle: bool) -> Iterator[Candidate]:
    """Yield an adapter or, if it is a pickle that may be loaded, the tensors in it."""
    pickle = pickle_in(candidate)
    if pickle is None or not unsafe_pickle:
        if pickle is not None:
            refuse(candidate)
        yield candidate.adapter
        return
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as folder:
        try:
            yield Candidate(_converted_pickle_path(convert_pickle(pickle, Path(folder)), pickle))
        except AdapterhubError as error:
            error.where = error.where.replace(folder, str(pickle.parent))  # nobody knows the temporary name
            raise


def _converted_pickle_path(converted: Path, pickle: Path) -> Path:
    """Return the path to read for a converted pickle.

    For a trainer's own format this is the file alone, with the trainer's YAML copied next to it.
    """
    weights = converted / peft.WEIGHTS if converted.is_dir() else converted
    candidate = Candidate(weights)
    if not any(row.sniff(candidate) for row in FORMATS.values() if row.alpha and row.name != "raw"):
        return converted
    for yaml in pickle.parent.glob("*.yaml"):
        shutil.copyfile(yaml, weights.with_name(yaml.name))
    return weights


def _raise_for_failure(pickle: Path, result: subprocess.CompletedProcess[bytes]) -> None:
    if result.returncode == 0:
        return
    try:
        # torch may print warnings first; the answer is the last line.
        answer = json_file.parse_object(result.stdout.splitlines()[-1], str(pickle))
        kind, reason = str(answer["kind"]), " ".join(str(answer["reason"]).split())[:200]
    except (FormatError, LookupError):
        kind, reason = "", f"loading it exited with code {result.returncode}: over the limits of memory, time or output"
    if kind == "refused":
        raise RefusedError(str(pickle), f"it contains more than tensors: {reason}", "Do not load it with anything else either")
    raise FormatError(str(pickle), reason if not kind else f"not a file of tensors: {reason}")
