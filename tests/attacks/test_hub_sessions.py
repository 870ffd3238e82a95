"""Uploads that one tenant begins and leaves cost the others nothing: neither open files nor looks at what was left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub import uploads
from adapterhub_converters.containers.confined_files import ConfinedFiles
from tests.hub.conftest import Running, hub
from tests.support.hub_tenants import Tenant

__all__ = ["hub"]


def open_uploads(hub: Running) -> int:
    """Return how many uploads of this hub are open; another one of this process may still be ending."""
    paths = [Path(os.path.realpath(f"/proc/self/fd/{entry}")) for entry in os.listdir("/proc/self/fd")]
    return sum(path.suffix == ".upload" and path.is_relative_to(hub.folder.resolve()) for path in paths)


def test_uploads_that_are_left_do_not_keep_files_open(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_MAX_OPEN", 5)
    red = Tenant(hub, "red")
    places = [red.post("/v2/red/sql/blobs/uploads/").headers["location"] for _ in range(30)]
    assert 0 < open_uploads(hub) <= 6
    for place in (places[0], places[-1]):  # each of them goes on
        assert red.request("PATCH", place, data=b"abc").status_code == 202
        assert red.get(place).headers["range"] == "0-2"


def test_what_was_left_is_not_looked_at_for_each_upload(hub: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    red, looks = Tenant(hub, "red"), []
    listed = ConfinedFiles.list_folder

    def counted(files: ConfinedFiles, path: Any) -> Any:
        looks.append(path)
        return listed(files, path)

    monkeypatch.setattr(ConfinedFiles, "list_folder", counted)
    monkeypatch.setattr(uploads, "_SWEEP_INTERVAL", 3600.0)  # a busy machine may take longer than a minute
    for _ in range(20):
        assert red.post("/v2/red/sql/blobs/uploads/").status_code == 202
    # One for all of them, and perhaps one of what the hub does in the background.
    assert sum(path.name == "tmp" and path.is_relative_to(hub.folder) for path in looks) <= 2
