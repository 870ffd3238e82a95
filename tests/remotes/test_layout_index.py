"""The index of a layout keeps entries of others."""

from __future__ import annotations

import json
from pathlib import Path

from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.layouts.layout_folder import LayoutFolder
from adapterhub.remotes.version_copy import copy_version
from tests.remotes.test_layout_archive import HEX, Make


def test_entries_of_others_stay_in_the_index(make: Make, tmp_path: Path) -> None:
    with LayoutFolder(tmp_path / "x") as target:
        copy_version(AdapterFolder(make()), "latest", target, "v1")
        document = json.loads((tmp_path / "x/index.json").read_bytes())
        foreign = {"mediaType": "a/b", "digest": f"sha256:{HEX}", "size": 3, "platform": {"os": "linux"}, "urls": ["x"]}
        document["manifests"].append(foreign)
        (tmp_path / "x/index.json").write_text(json.dumps(document))
        copy_version(AdapterFolder(make()), "latest", target, "v2")
        assert target.tags() == ["v1", "v2"]
    assert foreign in json.loads((tmp_path / "x/index.json").read_bytes())["manifests"]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["blobs", "index.json", "ingest", "oci-layout"]
    assert list((tmp_path / "x/ingest").iterdir()) == []
