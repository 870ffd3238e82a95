"""What a push at work has a lease on stays, and leases of the dead and of other hosts end."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc
from adapterhub.registry.registry import Registry
from tests.maintenance.test_gc import SQL, age
from tests.support.adapters import Make


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as opened:
        yield opened


def test_what_a_push_at_work_found_or_put_stays(registry: Registry) -> None:
    stored_digest = registry.store.put_bytes(b"there already")[0]
    with registry.store.lease("push"):
        registry.store.put_bytes(b"there already")
        fresh = registry.store.put_bytes(b"new")[0]
        assert gc(registry, grace=0).blobs == 0
    assert gc(registry, grace=0).blobs == 2
    assert not registry.store.has_blob(stored_digest, 13)
    assert not registry.store.has_blob(fresh, 3)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_a_killed_push_left_is_known_at_once(registry: Registry) -> None:
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        with registry.store.lease("push") as lease:
            (registry.store.root / "tmp" / f"{lease.id}-half").write_bytes(b"half a blob")
            (registry.store.root / "tmp" / "0123-of-somebody").write_bytes(b"")
            os.write(write_end, b"x")
            signal.pause()
        os._exit(1)
    os.read(read_end, 1)
    assert gc(registry).leftovers == 0
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert {finding.code for finding in fsck(registry)} == {"leftovers"}
    swept = gc(registry)
    assert (swept.leftovers, swept.blobs) == (2, 0)
    assert [path.name for path in (registry.store.root / "tmp").iterdir()] == ["0123-of-somebody"]
    assert list((registry.store.root / "leases").iterdir()) == []
    age(registry)
    assert gc(registry).leftovers == 1


def test_a_lease_of_another_host_counts_for_a_day(registry: Registry) -> None:
    digest = registry.store.put_bytes(b"x")[0]
    path = registry.store.root / "leases" / "00.lease"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere"}) + f"\n{digest}\n")
    assert gc(registry, grace=0).blobs == 0
    age(registry)
    assert (gc(registry, grace=0).blobs, path.exists()) == (1, False)


def test_a_store_of_an_older_adapterhub_has_no_leases_yet(registry: Registry, make: Make) -> None:
    shutil.rmtree(registry.store.root / "leases", ignore_errors=True)
    assert gc(registry, grace=0).leftovers == 0
    registry.push(make(), SQL)
    assert fsck(registry) == []
