"""Many processes on one registry, any of them killed at any time: fsck finds no error, and what was promised is there.

ADAPTERHUB_SOAK=SECONDS has the loop of pushes, removals and collections run that long instead of a few rounds.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.index import queries
from adapterhub.maintenance import name_moves
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc as collect
from adapterhub.maintenance.verify import verify
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.rollout_state import RolloutState, RolloutStep
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import rollouts
from adapterhub_converters.errors import ConflictError, LocalIOError, NotFoundError, RefusedError
from tests.conftest import Run
from tests.registry.forks import finished, fork
from tests.registry.test_faults import small_disk
from tests.support.adapters import Make
from tests.support.aged import age

__all__ = ["small_disk"]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
SQL, PROD = Ref.parse("team/sql"), Ref.parse("team/sql:prod")
KILLS = 8  # of each kind of work; test_faults has one at each kind of system call


def check(root: Path) -> None:
    """All that is visible is whole, and the catalog says what the log says."""
    with Registry.open(root) as registry:
        assert [str(finding) for finding in fsck(registry) if finding.severity == "error"] == []
        rows = registry.list()
        assert all(verify(registry, row.ref) == [] for row in rows)
        assert registry.rebuild_index() == []
        assert registry.list() == rows


@pytest.fixture
def template(make: Make, tmp_path: Path) -> Path:
    """Four versions, a removed name, an orphan, and the second folder of which is not pushed yet."""
    make("new", 9)
    with Registry.init(tmp_path / "template") as registry:
        for seed in range(1, 5):
            registry.push(make(f"a{seed}", seed), PROD if seed == 1 else SQL)
        registry.push(make("gone", 7), Ref.parse("team/gone"))
        registry.rm(Ref.parse("team/gone"))
        registry.store.put_bytes(b"orphan")
    return tmp_path / "template"


def push(root: Path) -> None:
    with Registry.open(root) as registry:
        registry.push(root.parent / "new", PROD)


def tag(root: Path) -> None:
    with Registry.open(root) as registry:
        if queries.marks(registry.index, "protect", "team/sql"):  # killed right there
            registry.protect(PROD, on=False)
        for number in (2, 3, 4):
            registry.tag(Ref("team/sql", number=number), "prod")
        registry.protect(PROD)
        registry.protect(PROD, on=False)
        registry.restore_tag(PROD)
        registry.rm(PROD)
        registry.tag(SQL, "prod")


def roll(root: Path) -> None:
    with Registry.open(root) as registry:
        ref = Ref("team/sql", digest=registry.row(SQL).digest)
        for number in range(8):
            step = RolloutState("legal", "team/sql@sha256:0", (RolloutStep(5, 60),), seconds=float(number))
            rollouts.change(registry.ledger, ref, "legal", lambda _, step=step: step)  # type: ignore[misc]


def gc(root: Path) -> None:
    with Registry.open(root) as registry:
        collect(registry, grace=0, last=1)


def rename(root: Path) -> None:
    with Registry.open(root) as registry:
        with contextlib.suppress(NotFoundError):  # killed after its last entry
            name_moves.move(registry, "team/sql", "team/new")
        assert [row.number for row in registry.list("team/new")] == [4, 3, 2, 1]
        assert registry.list("team/sql") == []


def migrate(root: Path) -> None:
    Registry.open(root).close()


@pytest.mark.parametrize("work", [push, tag, roll, gc, rename, migrate])
def test_killed_at_random_times(template: Path, tmp_path: Path, work: Callable[[Path], None]) -> None:
    if work is migrate:
        age(template / "registry.db", 1)
    rng = random.Random(work.__name__)
    killed = 0
    for n in range(KILLS):
        root = tmp_path / f"r{n}"
        shutil.copytree(template, root)
        child = fork(lambda root=root: work(root))  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.03) if n else 0)  # the first before it can have ended
        os.kill(child, signal.SIGKILL)
        status = finished([child])[0]
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        check(root)
        work(root)
        with Registry.open(root) as registry:
            assert collect(registry, grace=0).waiting == 0
            # A file of a killed process that had no lease stays for an hour, and is noted.
            assert {finding.severity for finding in fsck(registry)} <= {"note"}
        shutil.rmtree(root)
    assert killed


# ---- at once


def at_once(works: list[Callable[[], None]]) -> list[int]:
    """Let processes begin together; their exit codes."""
    read_end, write_end = os.pipe()

    def waiting(work: Callable[[], None]) -> Callable[[], None]:
        def begin() -> None:
            os.close(write_end)
            os.read(read_end, 1)
            work()

        return begin

    children = [fork(waiting(work)) for work in works]
    os.close(read_end)
    os.close(write_end)
    return finished(children)


def test_of_eight_pushes_that_expect_the_same_one_wins(template: Path, make: Make, tmp_path: Path) -> None:
    folders = [make(f"n{n}", 100 + n) for n in range(8)]
    with Registry.open(template) as registry:
        before = registry.resolve(PROD).digest

    def push_of(folder: Path) -> Callable[[], None]:
        def work() -> None:
            with Registry.open(template) as registry:
                try:
                    won = registry.push(folder, PROD, expect=before).digest
                    (tmp_path / f"won-{won.removeprefix('sha256:')}").touch()
                except ConflictError as error:
                    (tmp_path / f"lost-{folder.name}").write_text(str(error))

        return work

    assert at_once([push_of(folder) for folder in folders]) == [0] * 8
    (won,) = (path.name.removeprefix("won-") for path in tmp_path.glob("won-*"))
    lost = [path.read_text() for path in tmp_path.glob("lost-*")]
    assert len(lost) == 7
    assert all(f"moved in the meantime: it is sha256:{won}, not {before}" in text for text in lost)
    with Registry.open(template) as registry:
        assert registry.resolve(PROD).digest == f"sha256:{won}"
        assert registry.resolve(SQL).number == 5
    check(template)
    with Registry.open(template) as registry:  # the losers' blobs were stored, whole, and can go
        collect(registry, grace=0)
        assert fsck(registry) == []


def test_eight_pushes_of_the_same_content_are_one_version(template: Path, make: Make) -> None:
    folder = make("n", 100)

    def work() -> None:
        with Registry.open(template) as registry:
            assert registry.push(folder, PROD).number == 5

    assert at_once([work] * 8) == [0] * 8
    with Registry.open(template) as registry:
        assert [entry.op for entry in registry.log(PROD)] == ["push", "push"]
    check(template)


def test_pushes_removals_and_collections_side_by_side(make: Make, tmp_path: Path) -> None:
    folders = {oci_manifest.build(folder).digest: folder for folder in (make(f"n{n}", n) for n in range(4))}
    root, until = tmp_path / "registry", time.monotonic() + float(os.environ.get("ADAPTERHUB_SOAK", "0"))
    Registry.init(root).close()

    def worker(seed: int) -> Callable[[], None]:
        rng = random.Random(seed)

        def rounds() -> Iterator[int]:
            n = 0
            while n < 25 or time.monotonic() < until:
                yield n
                n += 1

        def work() -> None:
            for n in rounds():
                with Registry.open(root) as registry:
                    work_once(registry, Ref(f"team/{rng.choice('ab')}", tag=rng.choice([None, "prod"])), rng, f"{seed}-{n}")

        return work

    def work_once(registry: Registry, ref: Ref, rng: random.Random, ident: str) -> None:
        digest, folder = rng.choice(sorted(folders.items()))
        choice = rng.choice(["push", "push", "push", "gc", "rm", "tag", "pull"])
        try:
            if choice == "push":
                with contextlib.suppress(RefusedError, NotFoundError):  # it was not removed, or was never pushed
                    registry.restore(ref.name)
                assert registry.push(folder, ref).digest == digest
            elif choice == "gc":
                collect(registry, grace=0, last=rng.choice([None, 1, 2]))
            elif choice == "rm":
                registry.rm(ref)
            elif choice == "tag":
                registry.tag(Ref(ref.name), "dev")
            else:
                pulled = registry.pull(ref, tmp_path / ident)
                assert oci_manifest.build(tmp_path / ident).digest == pulled.digest
                shutil.rmtree(tmp_path / ident)
        except (NotFoundError, ConflictError):  # not pushed yet, or removed by another; never bytes that are missing or wrong
            pass

    children = [fork(worker(seed)) for seed in range(3)]
    assert finished(children) == [0, 0, 0]
    check(root)
    with Registry.open(root) as registry:
        collect(registry, grace=0)
        assert fsck(registry) == []


# ---- full disks


def test_on_a_full_disk_nothing_moves_and_a_collection_still_makes_room(template: Path, small_disk: Path) -> None:
    shutil.copytree(template, small_disk / "registry")
    with Registry.open(small_disk / "registry") as registry:
        registry.tag(SQL, "dev")
        rows = registry.list()
        filler = small_disk / "filler"
        with open(filler, "wb", buffering=0) as file:
            free = os.statvfs(small_disk)
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
        for call in (
            lambda: registry.tag(Ref.parse("team/sql:v1"), "dev"),
            lambda: registry.protect(PROD),
            lambda: registry.push(template.parent / "new", SQL),
        ):
            with pytest.raises((LocalIOError, RefusedError), match="No space left|disk is full"):
                call()
        assert registry.list() == rows
        assert collect(registry, grace=0).blobs == 5
        filler.unlink()
        registry.tag(Ref.parse("team/sql:v1"), "dev")
    check(small_disk / "registry")


def test_a_database_deleted_after_its_writer_was_killed_is_rebuilt(make: Make, tmp_path: Path) -> None:
    """What is left beside it, a write-ahead log with some pages of the old one, must not be replayed into the new one."""
    root = tmp_path / "registry"
    with Registry.init(root) as registry:
        for n in range(30):
            registry.push(make("a", n), Ref.parse(f"team/n{n % 5}"))
        for n in range(4):
            registry.rm(Ref.parse(f"team/n{n}"))

    def work() -> None:
        registry = Registry.open(root)
        for n in range(30, 33):
            registry.push(make("b", n), Ref.parse(f"team/later{n}"))
        os.kill(os.getpid(), signal.SIGKILL)

    finished([fork(work)])
    assert (root / "registry.db-wal").stat().st_size > 0
    (root / "registry.db").unlink()
    with Registry.open(root) as registry:
        assert registry.index.select("PRAGMA integrity_check") == [("ok",)]
        assert len(registry.list()) == 6 + 3
        assert [finding for finding in fsck(registry) if finding.severity == "error"] == []


def test_a_command_on_a_full_disk_reads_and_makes_room(template: Path, small_disk: Path, run: Run) -> None:
    shutil.copytree(template, small_disk / "registry")
    with Registry.open(small_disk / "registry"):
        pass
    with open(small_disk / "filler", "wb", buffering=0) as file:
        free = os.statvfs(small_disk)
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
    at = ("--registry", small_disk / "registry")
    assert "team/sql:v4" in run("list", *at).stdout
    run("pull", "team/sql", *at)
    run("fsck", *at)
    assert "No space left" in run("push", template.parent / "new", "team/sql", *at, code=8).stderr
    assert "removed 5 blobs" in run("gc", "--grace", "0", *at).stdout
    (small_disk / "filler").unlink()
    run("push", template.parent / "new", "team/sql", *at)
    check(small_disk / "registry")
