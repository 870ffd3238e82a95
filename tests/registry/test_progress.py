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
        self.said: list[tuple[int, int]] = []

    def __call__(self, done: int, total: int) -> None:
        self.said.append((done, total))


def push(registry: Registry, folder: Path, told: Told) -> int:
    registry.push(folder, SQL, progress=told)
    return sum(path.stat().st_size for path in folder.iterdir())


def pull(registry: Registry, folder: Path, told: Told) -> int:
    return registry.pull(SQL, folder / "out", told).size or 0


def verify(registry: Registry, _folder: Path, told: Told) -> int:
    assert verification.verify(registry, SQL, told) == []
    document = registry.show(SQL)
    return int(document["size"] + document["oci_manifest"]["config"]["size"])


def verify_folder(registry: Registry, folder: Path, told: Told) -> int:
    registry.pull(SQL, folder / "out")
    assert verification.verify_folder(folder / "out", told) == []
    return sum(path.stat().st_size for path in (folder / "out").iterdir())


def check(registry: Registry, _folder: Path, told: Told) -> int:
    assert fsck.fsck(registry, progress=told) == []
    return sum(path.stat().st_size for path in registry.store.blobs())


def check_packed(registry: Registry, _folder: Path, told: Told) -> int:
    plain = sum(path.stat().st_size for path in registry.store.blobs())
    compress.pack(registry)
    assert fsck.fsck(registry, progress=told) == []
    return plain


def list_tensors(registry: Registry, folder: Path, told: Told) -> int:
    registry.list_tensors(told)
    return (folder / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("work", [push, pull, verify, verify_folder, check, check_packed, list_tensors])
def test_long_operations_report_progress(work: Callable[[Registry, Path, Told], int], make: Make, tmp_path: Path) -> None:
    with Registry.init(tmp_path / "registry") as registry:
        folder, told = make("a"), Told()
        if work is not push:
            registry.push(folder, SQL)
        total = work(registry, folder, told)
    assert told.said[-1] == (total, total)
    assert [done for done, _ in told.said] == sorted({done for done, _ in told.said})
    assert {of for _, of in told.said} == {told.said[-1][1]}
