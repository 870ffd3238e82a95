"""fsck beside writers, and against an index that says something else than the logs."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path

import pytest

from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import AdapterhubError
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
