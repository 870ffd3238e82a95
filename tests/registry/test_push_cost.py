"""What a file or a tensor adds to the cost of a push, in calls of functions: a hostile adapter has as many as it may.

A bound that is far above what is measured is lowered in the same change.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

import numpy as np

from adapterhub.operations.local_registry import Registry
from adapterhub_converters.containers import safetensors_file
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.formats import peft
from tests.support import folders

_MAX_CALLS_OF_A_FILE = 480
_MAX_CALLS_OF_A_TENSOR = 14
_MAX_CALLS_OF_A_BAD_TENSOR = 19


def _calls_of_a_push(folder: Path) -> int:
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    with Registry(folder.parent / f"registry of {folder.name}") as registry:
        sys.setprofile(count)
        try:
            with suppress(RefusedError):
                registry.push(folder, "team/adapter")
        finally:
            sys.setprofile(None)
    return calls


def test_a_file_adds_no_more_calls_to_a_push_than_it_did(tmp_path: Path) -> None:
    """10,000 files of a few bytes took 14 s of CPU: 943 calls for each."""
    counts = []
    for count in (8, 20, 40):  # the first for what is loaded late
        folder = folders.adapter(tmp_path / str(count), folders.pairs(1))
        for number in range(count):
            (folder / f"{number}.md").write_text(f"note {number}\n")
        counts.append(_calls_of_a_push(folder))
    calls = (counts[2] - counts[1]) / 20
    assert 0.8 * _MAX_CALLS_OF_A_FILE <= calls <= _MAX_CALLS_OF_A_FILE


def test_a_tensor_adds_no_more_calls_to_a_push_than_it_did(tmp_path: Path) -> None:
    """300,000 tensors took 10 s of CPU: 39 calls for each."""
    counts = [_calls_of_a_push(folders.adapter(tmp_path / str(layers), folders.pairs(layers))) for layers in (8, 20, 70)]
    calls = (counts[2] - counts[1]) / 100
    assert 0.8 * _MAX_CALLS_OF_A_TENSOR <= calls <= _MAX_CALLS_OF_A_TENSOR


def test_a_tensor_with_a_bad_name_adds_no_more_calls_to_a_refusal_than_it_did(tmp_path: Path) -> None:
    """300,000 tensors without the prefix of peft took 3.7 s of CPU: 26 calls for each."""
    counts = []
    for layers in (8, 20, 70):
        folder = folders.adapter(tmp_path / str(layers), folders.pairs(1))
        tensors = {name: np.zeros(shape, np.float32) for name, shape in folders.pairs(layers).items()}
        safetensors_file.write(folder / peft.WEIGHTS, tensors)
        counts.append(_calls_of_a_push(folder))
    calls = (counts[2] - counts[1]) / 100
    assert 0.8 * _MAX_CALLS_OF_A_BAD_TENSOR <= calls <= _MAX_CALLS_OF_A_BAD_TENSOR
