"""Commands beside a hub, on the same registry: neither takes the other's files away."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.hub.conftest import Running, adapter, hub
from tests.support.hub_tenants import Tenant

__all__ = ["adapter", "hub"]


def command(hub: Running, *words: str) -> str:
    """What a command prints, in a process of its own."""
    line = [sys.executable, "-m", "adapterhub", "--registry", str(hub.folder), *words]
    return subprocess.run(line, check=True, capture_output=True, text=True, timeout=60).stdout


def deleted_files() -> set[str]:
    """Databases that this process has open and that have no name any more."""
    names = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            name = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue
        if ".db" in name and name.endswith("(deleted)"):
            names.add(name)
    return names


def test_a_command_does_not_remove_the_log_that_the_hub_writes(hub: Running, adapter: Callable[..., Path]) -> None:
    red = Tenant(hub, "red")
    red.create("open")
    with ThreadPoolExecutor(8) as pool:  # each thread of the hub opens the index for itself
        assert {answer.status_code for answer in pool.map(red.get, ["/api/models"] * 32)} == {200}
    before = deleted_files()
    command(hub, "list")
    assert deleted_files() == before
    assert red.upload("open", adapter(1)).status_code == 200
    assert "red/open" in command(hub, "list")
    assert [model["id"] for model in red.get("/api/models").json()] == ["red/open"]
