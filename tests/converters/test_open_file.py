"""Devices and pipes in the place of files are refused before they are opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub_converters.containers import open_file
from adapterhub_converters.errors import RefusedError
from tests.attacks.test_special_files import pipe


def test_a_device_and_a_pipe_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    for path in (Path("/dev/zero"), pipe(tmp_path / "pipe")):
        with pytest.raises(RefusedError, match="a pipe or a device"):
            open_file.open_regular(path)
