"""The registry as a Python object."""

from __future__ import annotations

from pathlib import Path

import pytest

import adapterhub as ah
from tests.support.adapters import write_adapter


def test_a_push_to_an_address_is_refused_before_anything_is_written_there(tmp_path: Path) -> None:
    address = f"layout://{tmp_path}/out.tar:v1"
    with ah.Registry(tmp_path / "registry") as registry, pytest.raises(ah.ParameterError, match="is an address"):
        registry.push(write_adapter(tmp_path / "sql"), address)
    assert not (tmp_path / "out.tar").exists()
