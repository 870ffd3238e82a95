"""A store that cannot create a file exclusively is found out once, and its user is warned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.registry.moves import ABSENT
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.objects.object_repository import SINGLE_WRITER
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.errors import RefusedError
from tests.remotes.test_object_repository import expecting, place
from tests.support.adapters import write_adapter
from tests.support.object_stores import Server

pytestmark = pytest.mark.peer


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "sql")


def test_a_store_that_cannot_create_exclusively_is_written_with_a_warning(rclone: Server, adapter: Path) -> None:
    bucket = rclone.bucket()
    with place(rclone, bucket) as to:
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
        assert to.notes == [SINGLE_WRITER]
        assert to.manifest("prod").digest == oci_manifest.build(adapter).digest
    with expecting(rclone, bucket, ABSENT) as to, pytest.raises(RefusedError, match="cannot compare"):
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
    assert rclone.folder is not None
    assert not (rclone.folder / bucket / "deep/down/capabilities.json").exists()


def test_what_was_proven_is_remembered_for_that_server_alone(moto: Server, adapter: Path, tmp_path: Path) -> None:
    bucket = moto.bucket()
    with place(moto, bucket) as to:
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
        assert to.notes == []
        raw = to._bucket.read("capabilities.json", 1000)
        assert raw is not None
        assert json.loads(raw) == {"version": 1, "endpoint": moto.url, "exclusive": True}
        to._bucket.put_object("capabilities.json", raw.replace(moto.url.encode(), b"http://elsewhere"))
    with place(moto, bucket, "team/other") as to:
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
        assert to._bucket.read("capabilities.json", 1000) == raw
    with place(tmp_path / "store") as to:  # asked anew each time: one folder may be on another disk tomorrow
        copy_version(AdapterFolder(adapter), "latest", to, "prod")
        assert to.notes == []
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["blobs", "oci-layout", "refs", "tmp"]
    assert list((tmp_path / "store/tmp").iterdir()) == []
