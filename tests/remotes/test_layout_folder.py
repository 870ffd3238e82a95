"""An image layout in a folder: written by many at once, and never into something else."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapterhub.manifest import oci_manifest
from adapterhub.remotes import download
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.layouts.layout_folder import LayoutFolder
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.containers import file_lock
from tests.conftest import Run
from tests.remotes.test_layout_archive import Make
from tests.support.adapters import write_adapter


def test_many_who_write_one_layout_at_once_lose_nothing(make: Make, tmp_path: Path) -> None:
    sources = [AdapterFolder(make(f"a{n}", n)) for n in range(6)]

    def push_source(n: int) -> None:
        with LayoutFolder(tmp_path / "x") as target:
            copy_version(sources[n], "latest", target, f"v{n}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(push_source, range(6)))
    with LayoutFolder(tmp_path / "x") as layout:
        assert layout.tags() == [f"v{n}" for n in range(6)]
        assert [layout.manifest(f"v{n}").digest for n in range(6)] == [source.manifest("latest").digest for source in sources]


def test_a_blob_that_another_process_finishes_meanwhile_is_left_whole(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one moves the file that was opened here to its final name, before the lock on it is had."""
    source = AdapterFolder(make())
    blob = next(layer for layer in source.manifest("latest").layers if layer.path.endswith(".safetensors"))
    part, final = (tmp_path / "x" / folder for folder in (f"ingest/{blob.digest[7:]}.part", f"blobs/sha256/{blob.digest[7:]}"))
    locked, sizes = file_lock.try_lock, []

    def finished(handle: int) -> bool:
        if not final.exists():
            part.write_bytes((tmp_path / "adapter" / blob.path).read_bytes())
            os.replace(part, final)
        else:
            sizes.append(final.stat().st_size)
        return locked(handle)

    monkeypatch.setattr(download, "try_lock", finished)
    with LayoutFolder(tmp_path / "x") as target:
        target.put_blob(blob, source)
    assert sizes == [blob.size]
    assert hashlib.sha256(final.read_bytes()).hexdigest() == blob.digest[7:]


def test_a_layout_that_was_only_half_made_is_made(make: Make, tmp_path: Path) -> None:
    (tmp_path / "x/blobs/sha256").mkdir(parents=True)
    (tmp_path / "x/ingest").mkdir()
    with LayoutFolder(tmp_path / "x") as target:
        copy_version(AdapterFolder(make()), "latest", target, "v1")
        assert target.tags() == ["v1"]


def test_a_registry_s_store_and_a_folder_of_something_else_are_not_written_to(make: Make, run: Run, tmp_path: Path) -> None:
    source = make()
    run("init", ".")
    run("push", source, "team/sql")
    assert run("push", source, "layout://.adapterhub:v9", code=6).stderr.endswith("[store-of-registry]\n")
    run("pull", "layout://.adapterhub:team/sql:v1", "-o", "out")
    before = sorted(path.name for path in source.iterdir())
    assert "not an image layout" in run("push", source, f"layout://{source}", code=4).stderr
    assert sorted(path.name for path in source.iterdir()) == before
    assert "no such file or folder" in run("pull", "oci:nothing:v1", code=3).stderr
    assert "it has team/sql:latest, team/sql:v1" in run("pull", "layout://.adapterhub:v7", code=3).stderr


def test_a_wrong_blob_in_a_folder_is_not_accepted(make: Make, run: Run, tmp_path: Path) -> None:
    manifest = oci_manifest.build(make())
    run("push", write_adapter(tmp_path / "adapter"), "oci:x:v1")
    blob = tmp_path / "x/blobs/sha256" / manifest.layers[0].digest[7:]
    blob.write_bytes(b"y" * blob.stat().st_size)
    run("pull", "oci:x:v1", "-o", "out", code=4)
    blob.unlink()
    run("pull", "oci:x:v1", "-o", "out", code=3)
    blob.symlink_to("/etc/passwd")
    run("pull", "oci:x:v1", "-o", "out", code=6)
    blob.unlink()
    os.mkfifo(blob)
    run("pull", "oci:x:v1", "-o", "out", code=6)
    assert not (tmp_path / "out").exists()
