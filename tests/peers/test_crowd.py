"""Eight clients push and pull for a minute: nothing is lost, nobody is refused, and the hub stays within its memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hub.crowd import push_and_pull
from tests.hub.killing import assert_sound, killable_hub
from tests.support.adapters import write_adapter, write_large_adapter

pytestmark = pytest.mark.peer
_MINUTE, _MB = 60, 200


def make(folder: Path, seed: int) -> Path:
    """An adapter; one of eight has 16 MiB."""
    return write_adapter(folder, seed) if seed % 8 else write_large_adapter(folder, seed)


def test_a_minute_of_eight_clients_loses_nothing_and_takes_200_mb(tmp_path: Path) -> None:
    with killable_hub(tmp_path / "hub") as process:
        assert push_and_pull(process.running(), make, tmp_path, _MINUTE) > 0
        assert process.peak <= _MB
    assert_sound(tmp_path / "hub")
