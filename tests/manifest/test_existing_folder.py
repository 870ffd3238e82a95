"""A folder that a version replaces: what somebody writes into it meanwhile is not lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapterhub.manifest.existing_folder import ExistingFolder
from adapterhub.remotes.adapter_folders import AdapterFolder, download
from adapterhub_converters.errors import ConflictError
from tests.support.adapters import Make


@pytest.mark.parametrize("edited", ["README.md", "adapter_model.safetensors"])  # the same in both versions, and not
def test_a_folder_that_is_edited_while_a_version_replaces_it_is_left_as_it_is(make: Make, tmp_path: Path, edited: str) -> None:
    out = tmp_path / "out"
    download(AdapterFolder(make("old")), "latest", out)

    def edit(_: ExistingFolder) -> None:
        (out / edited).write_text("mine")

    with pytest.raises(ConflictError) as caught:
        download(AdapterFolder(make("new", 1)), "latest", out, replacing=edit)
    assert str(caught.value) == f"{out}/{edited}: was edited meanwhile; nothing was written. Run it again"
    assert caught.value.code == "changed-meanwhile"
    assert (out / edited).read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"out", "old", "new"}
