"""Work that may take long says how far it has come: bytes done, of bytes in all, up to the last."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapterhub.maintenance import compress, fsck
from adapterhub.maintenance import verify as verification
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from tests.support.adapters import Make

SQL = Ref.parse("team/sql")


class Told:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, int]] = []

    def __call__(self, bytes_done: int, total: int) -> None:
        self.reports.append((bytes_done, total))


def push(registry: Registry, folder: Path, progress: Told) -> int:
    registry.push(folder, SQL, progress=progress)
    return sum(path.stat().st_size for path in folder.iterdir())


def pull(registry: Registry, folder: Path, progress: Told) -> int:
    return registry.pull(SQL, folder / "out", progress).size or 0


def verify(registry: Registry, _folder: Path, progress: Told) -> int:
    assert verification.verify(registry, SQL, progress) == []
    document = registry.show(SQL)
    return int(document["size"] + document["oci_manifest"]["config"]["size"])


def verify_folder(registry: Registry, folder: Path, progress: Told) -> int:
    registry.pull(SQL, folder / "out")
    assert verification.verify_folder(folder / "out", progress) == []
    return sum(path.stat().st_size for path in (folder / "out").iterdir())


def check(registry: Registry, _folder: Path, progress: Told) -> int:
    assert fsck.fsck(registry, progress=progress) == []
    return sum(path.stat().st_size for path in registry.store.blobs())


def check_packed(registry: Registry, _folder: Path, progress: Told) -> int:
    plain = sum(path.stat().st_size for path in registry.store.blobs())
    compress.pack(registry)
    assert fsck.fsck(registry, progress=progress) == []
    return plain


def list_tensors(registry: Registry, folder: Path, progress: Told) -> int:
    registry.list_tensors(progress)
    return (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("work", [push, pull, verify, verify_folder, check, check_packed, list_tensors])
def test_long_operations_report_progress(work: Callable[[Registry, Path, Told], int], make: Make, tmp_path: Path) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        folder, progress = make("a"), Told()
        if work is not push:
            registry.push(folder, SQL)
        total = work(registry, folder, progress)
    assert progress.reports[-1] == (total, total)
    assert [bytes_done for bytes_done, _ in progress.reports] == sorted({bytes_done for bytes_done, _ in progress.reports})
    assert {total_reported for _, total_reported in progress.reports} == {progress.reports[-1][1]}
