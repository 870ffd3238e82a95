"""fsck beside writers, and against an index that says something else than the logs."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from pathlib import Path

import pytest

from adapterhub.maintenance import compress
from adapterhub.maintenance.fsck import Scope, fsck
from adapterhub.maintenance.gc import gc
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import AdapterhubError
from tests.conftest import Run
from tests.registry.forks import fork
from tests.support.adapters import Make

WRITERS, ROUNDS = 3, 6


def work(root: Path, folders: list[Path], seed: int) -> None:
    rng = random.Random(seed)
    with Registry.open(root) as registry:
        for _ in range(ROUNDS):
            ref = Ref.parse(f"team/n{rng.randrange(3)}")
            try:
                with contextlib.suppress(AdapterhubError):
                    registry.restore(ref.name)
                registry.push(rng.choice(folders), Ref(ref.name, tag=rng.choice(["prod", "dev"])))
                registry.tag(ref, "x")
                registry.protect(Ref(ref.name, tag="x"))
                registry.protect(Ref(ref.name, tag="x"), on=False)
                registry.rm(rng.choice([ref, Ref(ref.name, tag="x")]))
                gc(registry, grace=0, last=1)
            except AdapterhubError:  # another writer was first
                continue


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_concurrent_writers_cause_no_false_error(make: Make, tmp_path: Path) -> None:
    folders = [make(f"a{seed}", seed) for seed in range(6)]
    root = tmp_path / "r"
    Registry.init(root).close()
    children = [fork(lambda seed=seed: work(root, folders, seed)) for seed in range(WRITERS)]  # type: ignore[misc]
    running = set(children)
    checks = 0
    while running:
        with Registry.open(root) as registry:
            assert [str(finding) for finding in fsck(registry) if finding.severity == "error"] == []
        checks += 1
        for child in list(running):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                assert status == 0
                running.remove(child)
    assert checks
    with Registry.open(root) as registry:
        assert [str(finding) for finding in fsck(registry) if finding.severity == "error"] == []


def flip(path: Path) -> None:
    """Change a byte near the end of a stored file."""
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.chmod(0o644)
    path.write_bytes(raw)


def test_the_parts_of_an_fsck_read_each_blob_once(make: Make, tmp_path: Path) -> None:
    with Registry.init(tmp_path / "r") as registry:
        for seed in range(3):
            registry.push(make("a", seed), Ref("team/sql"))
        damaged = [path for path in registry.store.blobs() if path.stat().st_size > 900]
        for path in damaged:
            flip(path)
        per_part = [fsck(registry, scope=Scope(part=part, parts=5)) for part in range(1, 6)]
        flipped = [[finding.where for finding in findings if finding.code == "flipped"] for findings in per_part]
        assert sorted(itertools.chain(*flipped)) == sorted(map(str, damaged))
        assert len([part for part in flipped if part]) > 1
        assert [finding for finding in fsck(registry, scope=None) if finding.code == "flipped"] == []


def test_the_parts_of_an_fsck_unpack_each_pack_once(make: Make, tmp_path: Path) -> None:
    def bytes_read(scope: Scope) -> int:
        counts = [0]
        assert fsck(registry, scope=scope, progress=lambda count, _: counts.append(count)) == []
        return max(counts)

    with Registry.init(tmp_path / "r") as registry:
        for seed in range(4):
            (make("a", seed) / "README.md").write_text(f"{seed} is a number, and this is not.\n" * 300)
            registry.push(tmp_path / "a", Ref("team/sql"))
        compress.pack(registry)
        assert len(list(registry.store.packs.files())) == 4
        parts = [bytes_read(Scope(part=part, parts=3)) for part in (1, 2, 3)]
        assert sum(parts) == bytes_read(Scope())
        assert len([count for count in parts if count]) > 1


def test_an_fsck_since_a_time_reads_what_was_stored_or_packed_since(make: Make, tmp_path: Path) -> None:
    with Registry.init(tmp_path / "r") as registry:
        for seed in range(2):
            registry.push(make("a", seed), Ref("team/sql"))
        old, new = (registry.store.blob_path(registry.resolve(Ref("team/sql", number=number)).digest) for number in (1, 2))
        for path, age in ((old, 1000), (new, 10)):
            flip(path)
            os.utime(path, (time.time() - age,) * 2)
        findings = fsck(registry, scope=Scope(since=time.time() - 100))
        assert [finding.where for finding in findings if finding.code == "flipped"] == [str(new)]
        assert len([finding for finding in fsck(registry) if finding.code == "flipped"]) == 2


@pytest.mark.parametrize("part", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/3/5", "¹/3", "1/1000000000"])
def test_a_part_is_one_of_so_many(run: Run, part: str) -> None:
    run("init")
    assert "is not a part. Write it like 3/30" in run("fsck", "--part", part, code=2).stderr


def test_a_part_and_an_age_are_options(run: Run, make: Make) -> None:
    run("push", make(), "team/sql")
    assert "clean" in run("fsck", "--part", "1/2", "--since", "7d").stdout
    assert "hashes nothing" in run("fsck", "--quick", "--since", "7d", code=2).stderr
    assert "neither an age nor a date" in run("fsck", "--since", "yesterday", code=2).stderr
