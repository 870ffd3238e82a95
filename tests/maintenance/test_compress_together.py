"""Packing next to readers, writers, collections and kills: no version is lost, whatever comes in between."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from adapterhub.maintenance import compress
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc
from adapterhub.manifest import oci_manifest
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import (
    ConflictError,
    LocalIOError,
    NotFoundError,
    RefusedError,
)
from tests.registry.forks import finished, fork, under_strace
from tests.support.trained_versions import check_whole, weights, work_on_registry, write_trained

SQL = Ref.parse("team/sql")
Trained = Callable[..., Path]


@pytest.fixture
def trained(tmp_path: Path) -> Trained:
    return functools.partial(write_trained, tmp_path)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.init(tmp_path / "registry")


def test_readers_see_every_version_while_it_is_packed_and_unpacked(
    registry: Registry, trained: Trained, tmp_path: Path
) -> None:
    for step in range(3):
        registry.push(trained(f"s{step}", step=step), SQL)
    finished = threading.Event()

    def turn() -> None:
        with Registry.open(registry.root) as mine:
            for _ in range(6):
                compress.pack(mine)
                compress.unpack(mine)
        finished.set()

    thread = threading.Thread(target=turn)
    thread.start()
    n = 0
    while not finished.is_set():
        n += 1
        registry.pull(Ref.parse(f"team/sql:v{n % 3 + 1}"), tmp_path / f"out{n}")
        assert registry.store.size(weights(registry, "team/sql")) is not None
        shutil.rmtree(tmp_path / f"out{n}")
    thread.join()
    check_whole(registry)


def test_two_packers_at_once_lose_nothing(registry: Registry, trained: Trained) -> None:
    for step in range(4):
        registry.push(trained(f"s{step}", step=step), SQL)

    def turn(level: int) -> None:
        with Registry.open(registry.root) as mine:
            compress.pack(mine, level=level)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(turn, [1, 3]))
    assert len(list(registry.store.packs.digests())) == 4
    check_whole(registry)


@pytest.fixture(params=["pack", "unpack"])
def work(request: pytest.FixtureRequest, registry: Registry, trained: Trained) -> str:
    """What is done to a registry of two versions, of which the second packs as a difference to the first."""
    for step in range(2):
        registry.push(trained(f"s{step}", step=step), SQL)
    if request.param == "unpack":
        compress.pack(registry)
    registry.close()
    return str(request.param)


def check_survived(root: Path, work: str) -> None:
    with Registry.open(root) as registry:
        check_whole(registry)
        getattr(compress, work)(registry)
        check_whole(registry)
        packed = list(registry.store.packs.digests())
        assert len(packed) == (2 if work == "pack" else 0)
        assert not any(registry.store.blob_path(digest).exists() for digest in packed)


@pytest.mark.peer
@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC"])
def test_killed_or_refused_at_any_system_call_every_version_stays(
    registry: Registry, work: str, fault: str, tmp_path: Path
) -> None:
    """Of calls in a row that are alike, the first, the last and some between."""
    calls = {"fsync": range(1, 10), "rename": (1, 3, 4), "unlink": (1, 3, 5, 8), "write": (2, 6, 14), "mkdir": (1, 3)}

    def run_with_fault(inject: str) -> int:
        root = tmp_path / inject.replace(":", "-")
        shutil.copytree(registry.root, root)
        status = under_strace(inject, lambda: work_on_registry(root, work))
        check_survived(root, work)
        shutil.rmtree(root)
        return status

    statuses = [run_with_fault(f"{call}:{fault}:when={call_number}") for call, whens in calls.items() for call_number in whens]
    failed = -signal.SIGKILL if "KILL" in fault else LocalIOError.exit_code
    assert set(statuses) <= {0, failed}
    assert statuses.count(failed) >= 7


def test_killed_at_random_times_every_version_stays(registry: Registry, work: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    for n in range(4):
        root = tmp_path / f"r{n}"
        shutil.copytree(registry.root, root)
        child = fork(lambda root=root: work_on_registry(root, work))  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        finished([child])
        check_survived(root, work)


def test_one_packs_while_another_unpacks_and_nothing_is_lost(registry: Registry, trained: Trained) -> None:
    for step in range(3):
        registry.push(trained(f"s{step}", step=step), SQL)

    def turn(work: Callable[[Registry], object]) -> None:
        with Registry.open(registry.root) as mine:
            for _ in range(8):
                work(mine)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(turn, [compress.pack, compress.unpack, compress.unpack]))
    check_whole(registry)


def test_what_is_unpacked_between_two_looks_is_packed_again(
    registry: Registry, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.push(trained("a"), SQL)
    compress.pack(registry)
    settled = compress._Packer._has_valid_pack

    def and_unpacks(packer: Any, layer: Any) -> bool:
        is_settled = settled(packer, layer)
        compress._unpack(registry, layer, dry_run=False)
        return is_settled

    monkeypatch.setattr(compress._Packer, "_has_valid_pack", and_unpacks)
    assert "packed" in {change.outcome for change in compress.pack(registry)}
    check_whole(registry)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_packing_during_pushes_removals_and_collections_loses_nothing(trained: Trained, tmp_path: Path) -> None:
    """ADAPTERHUB_SOAK=SECONDS has it run that long instead of a few rounds."""
    steps = [trained(f"s{step}", step=step) for step in range(4)]
    digests = [oci_manifest.build(folder).digest for folder in steps]
    root, until = tmp_path / "registry", time.monotonic() + float(os.environ.get("ADAPTERHUB_SOAK", "0"))
    Registry.init(root).close()

    def work_once(registry: Registry, ref: Ref, rng: random.Random, out: Path) -> None:
        choice, step = rng.choice(["push", "push", "push", "pack", "pack", "unpack", "gc", "rm", "pull"]), rng.randrange(4)
        if choice == "push":
            with contextlib.suppress(RefusedError, NotFoundError):  # it was not removed, or was never pushed
                registry.restore(ref.name)
            assert registry.push(steps[step], ref).digest == digests[step]
        elif choice == "gc":
            gc(registry, grace=0, last=rng.choice([None, 1, 2]))
        elif choice == "rm":
            registry.rm(ref)
        elif choice == "pull":
            pulled = registry.pull(ref, out)
            assert oci_manifest.build(out).digest == pulled.digest
            shutil.rmtree(out)
        else:
            (compress.pack if choice == "pack" else compress.unpack)(registry)

    def worker(seed: int) -> Callable[[], None]:
        rng = random.Random(seed)

        def work() -> None:
            n = 0
            while n < 20 or time.monotonic() < until:
                n += 1
                missing = contextlib.suppress(NotFoundError, ConflictError)  # not pushed yet, or removed
                with Registry.open(root) as registry, missing:
                    work_once(registry, Ref(f"team/{rng.choice('ab')}"), rng, tmp_path / f"out{seed}-{n}")

        return work

    assert finished([fork(worker(seed)) for seed in range(3)]) == [0, 0, 0]
    with Registry.open(root) as registry:
        check_whole(registry)
        gc(registry, grace=0)
        assert fsck(registry) == []
