"""A push that is killed, or whose disk says no, at any point: nothing half-visible, nothing lost, and the next one works."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jsonschema  # noqa: F401 - so that no process has to import it anew
import pytest

from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc as collect
from adapterhub.maintenance.verify import verify
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import LocalIOError
from tests.registry.forks import finished, fork, under_strace

Make = Callable[..., Path]
SQL = Ref.parse("team/sql")
PROD = Ref.parse("team/sql:prod")


def push(root: Path, second: Path) -> None:
    with Registry.init(root) as registry:
        registry.push(second, PROD)


def tag(root: Path) -> None:
    with Registry.open(root) as registry:
        registry.tag(Ref.parse("team/sql:v1"), "prod")
        registry.rm(PROD)


def gc(root: Path) -> None:
    with Registry.open(root) as registry:
        collect(registry, grace=0, last=1)


@pytest.fixture
def template(make: Make, tmp_path: Path) -> Path:
    """A registry with one version, to be copied for each fault."""
    with Registry.init(tmp_path / "template") as registry:
        registry.push(make("first", 1), SQL)
    return tmp_path / "template"


def check_whole(root: Path, second: Path, *, versions: int) -> None:
    """Everything visible is complete, fsck finds no error, and the interrupted push can be done again."""
    with Registry.init(root) as registry:
        rows = registry.list()
        assert len(rows) in (versions, versions + 1)
        for row in rows:
            assert verify(registry, row.ref) == []
        assert [finding for finding in fsck(registry) if finding.severity == "error"] == []
        assert registry.push(second, PROD).number == versions + 1
        assert registry.resolve(PROD).number == registry.resolve(SQL).number == versions + 1
        assert {finding.severity for finding in fsck(registry)} <= {"note"}
        assert not list((registry.store.root / "pending").iterdir())


def sweep(calls: Mapping[str, Sequence[int]], fault: str, template: Path | None, second: Path, tmp_path: Path) -> list[int]:
    """A push for every call and every `when` of it, each in a registry of its own; their exit statuses.

    Of calls in a row that are alike, as the writes of one blob after the other, the first, the last and some between are made.
    """

    def run_with_fault(inject: str) -> int:
        root = tmp_path / inject.replace(":", "-")
        if template:
            shutil.copytree(template, root)
        status = under_strace(inject, lambda: push(root, second))
        if "error" in fault:
            assert not list((root / ".adapterhub" / "tmp").glob("*"))
        check_whole(root, second, versions=1 if template else 0)
        shutil.rmtree(root)
        return status

    return [run_with_fault(f"{call}:{fault}:when={call_number}") for call, whens in calls.items() for call_number in whens]


@pytest.mark.peer
def test_a_push_killed_at_any_system_call(template: Path, make: Make, tmp_path: Path) -> None:
    calls = {
        "fsync": range(1, 13), "rename": (1, 3, 4, 6), "link": (1,), "unlink": (3, 7, 11), "write": (2, 6, 10),
        "pwrite64": (9, 15, 21), "fdatasync": (1, 3, 5),
    }  # fmt: skip
    statuses = sweep(calls, "signal=SIGKILL", template, make("second", 2), tmp_path)
    assert statuses.count(-signal.SIGKILL) >= len(statuses) - 5


@pytest.mark.peer
def test_the_first_push_killed_while_the_registry_is_made(make: Make, tmp_path: Path) -> None:
    calls = {"rename": (1, 2, 3), "link": (1, 2), "mkdir": (1, 3, 5, 8), "fdatasync": (1, 5)}
    sweep(calls, "signal=SIGKILL", None, make("second", 2), tmp_path)


@pytest.mark.peer
def test_a_rebuild_of_the_catalog_killed(template: Path, make: Make, tmp_path: Path) -> None:
    (template / "registry.db").unlink()
    calls = {"link": (1, 2), "fdatasync": (1, 4, 7), "pwrite64": (1, 19, 37), "unlink": (1, 3)}
    sweep(calls, "signal=SIGKILL", template, make("second", 2), tmp_path)


@pytest.mark.peer
@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_a_push_to_a_failing_disk(template: Path, make: Make, tmp_path: Path, error: str) -> None:
    calls = {"fsync": (1, 4, 7, 11), "rename": (1, 3, 5), "link": (1,), "write": (2, 8)}
    statuses = sweep(calls, f"error={error}", template, make("second", 2), tmp_path)
    assert set(statuses) <= {0, LocalIOError.exit_code}
    assert statuses.count(LocalIOError.exit_code) >= len(statuses) - 3


@pytest.mark.peer
@pytest.mark.parametrize("work", [tag, gc])
@pytest.mark.parametrize("fault", ["error=ENOSPC", "signal=SIGKILL"])
def test_a_move_and_a_collection_on_a_failing_disk(
    template: Path, make: Make, tmp_path: Path, work: Callable[[Path], None], fault: str
) -> None:
    with Registry.open(template) as registry:
        for seed in (3, 4):
            registry.push(make(f"more{seed}", seed), SQL)
        registry.store.put_bytes(b"orphan")
    calls = {
        "fsync": (1, 2, 4),
        "rename": (1, 3),
        "link": (1,),
        "unlink": (1, 4, 6),
        "pwrite64": (1, 5),
        "write": (2, 4),
    }

    def run_with_fault(inject: str) -> int:
        root = tmp_path / inject.replace(":", "-")
        shutil.copytree(template, root)
        status = under_strace(inject, lambda: work(root))
        with Registry.open(root) as registry:
            assert [finding for finding in fsck(registry) if finding.severity == "error"] == []
            rows = registry.list()
            assert [row.number for row in rows] in ([3, 2, 1], [3])
            assert all(verify(registry, row.ref) == [] for row in rows)
            registry.tag(SQL, "prod")
            collect(registry, grace=0, last=1)
            assert [(row.number, row.tags) for row in registry.list()] == [(3, ("latest", "prod"))]
            assert {finding.severity for finding in fsck(registry)} <= {"note"}
        return status

    statuses = [run_with_fault(f"{call}:{fault}:when={call_number}") for call, whens in calls.items() for call_number in whens]
    assert set(statuses) <= {0, -signal.SIGKILL if "signal" in fault else LocalIOError.exit_code}
    assert len([status for status in statuses if status]) >= len(statuses) // 3


def test_a_push_killed_at_random_times(template: Path, make: Make, tmp_path: Path) -> None:
    second, rng = make("second", 2), random.Random(0)
    for n in range(8):
        root = tmp_path / f"r{n}"
        shutil.copytree(template, root)
        child = fork(lambda root=root: push(root, second))  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.012))
        os.kill(child, signal.SIGKILL)
        finished([child])
        check_whole(root, second, versions=1)


def test_a_file_too_large_for_the_disk(template: Path, make: Make) -> None:
    second = make("second", 2)
    (second / "README.md").write_text("x" * 300_000)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        push(template, second)

    assert finished([fork(limited)]) == [LocalIOError.exit_code]
    assert not list((template / ".adapterhub" / "tmp").iterdir())
    check_whole(template, second, versions=1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_nothing_of_a_pull(small_disk: Path, make: Make, tmp_path: Path) -> None:
    second = make("second", 2)
    (second / "README.md").write_text("x" * 2_000_000)
    with Registry.init(tmp_path / "registry") as registry:
        registry.push(second, SQL)
        with pytest.raises(LocalIOError, match="No space left on device. Free some space and try again"):
            registry.pull(SQL, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_leaves_no_version_of_a_push(small_disk: Path, make: Make) -> None:
    second = make("second", 2)
    (second / "README.md").write_text("x" * 2_000_000)
    with Registry.init(small_disk / "registry") as registry:
        with pytest.raises(LocalIOError, match="No space left on device. Free some space and try again"):
            registry.push(second, SQL)
        assert registry.list() == []
        assert not list((registry.store.root / "tmp").iterdir())
        assert {finding.severity for finding in fsck(registry)} <= {"note"}
        (second / "README.md").write_text("x")
        assert registry.push(second, SQL).number == 1
