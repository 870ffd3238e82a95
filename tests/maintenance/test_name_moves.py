"""A name that gets another one keeps what it had, whole under the old name until it is whole under the new one."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from adapterhub.index import queries
from adapterhub.maintenance import name_moves, retention
from adapterhub.maintenance.fsck import fsck
from adapterhub.manifest.keep_rule import KeepRule
from adapterhub.manifest.measurement import Evaluation
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.ref import Ref
from adapterhub.registry import measurement_log, withdrawals
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import release_moves
from adapterhub.registry.repository_documents import Repository
from adapterhub.registry.repository_records import Repositories
from adapterhub.store.ref_log import Entry
from adapterhub_converters.errors import ConflictError, NotFoundError, RefusedError
from tests.registry.forks import finished, fork
from tests.support.adapters import Make

OLD, NEW = "team/sql", "team/new"


@pytest.fixture
def root(make: Make, tmp_path: Path) -> Path:
    """A name with versions 2 to 4 of different authors and days, tags, a deprecation, a measurement, a withdrawal, a rule."""
    with Registry.init(tmp_path / "registry") as registry, pytest.MonkeyPatch.context() as patch:
        for seed in range(1, 5):
            patch.setattr("adapterhub.registry.moves.now", lambda seed=seed: f"2026-01-0{seed}T00:00:00Z")
            registry.author = f"author{seed}"
            registry.push(make(f"a{seed}", seed), Ref(OLD))
        patch.undo()
        registry.tag(Ref(OLD, number=2), "prod")
        retention.keep(registry, Ref(OLD), KeepRule(2, 3600))
        retention.drop(registry, None, dry_run=False)
        registry.deprecate(Ref(OLD, number=2), "Use v4.")
        measurement_log.record(registry, Ref(OLD, number=4), Evaluation("eval", {"loss": 0.5}))
        release_moves.withdraw(registry.ledger, Ref(OLD, number=3), ReleaseStatement("a leaked key"))
    return tmp_path / "registry"


def contents(registry: Registry, name: str) -> Any:
    """All that is kept of a name but its digests of entries, and its past."""
    rows = [(row.number, row.tags, row.digest, row.time) for row in queries.versions(registry.index, name=name)]
    pushes = {entry.number: (entry.author, entry.message) for entry in registry.log(Ref(name)) if entry.op == "push"}
    marks = [queries.marks(registry.index, kind, name) for kind in ("deprecate", "evaluate", "keep")]
    reasons = withdrawals.reasons(registry.index, name)
    return rows, [pushes[number] for number, *_ in rows], marks, reasons


def errors(registry: Registry) -> list[str]:
    return [str(finding) for finding in fsck(registry) if finding.severity == "error"]


def test_a_name_that_a_hub_has_a_repository_of_is_renamed_at_the_hub_alone(root: Path) -> None:
    """Its versions would be readable by all under the new name, whose repository is not private."""
    with Registry.open(root) as registry:
        Repositories(registry).change(OLD, lambda _: Repository(private=True))
        before = contents(registry, OLD)
        with pytest.raises(RefusedError, match="a hub in this folder has a repository of this name") as caught:
            name_moves.move(registry, OLD, NEW)
        assert caught.value.code == "repository-of-hub"
        assert contents(registry, OLD) == before


def test_a_moved_name_keeps_its_versions_and_what_was_recorded_of_them(root: Path) -> None:
    with Registry.open(root) as registry:
        before = contents(registry, OLD)
        registry.author = "mover"
        assert name_moves.move(registry, OLD, NEW) == 3
        assert registry.author == "mover"
        assert contents(registry, NEW) == before
        assert errors(registry) == []
        with pytest.raises(NotFoundError, match=r"team/sql:v4: was moved to team/new\. Write team/new:v4") as raised:
            registry.resolve(Ref(OLD, number=4))
        assert raised.value.code == "moved"
        with pytest.raises(NotFoundError, match="was moved to team/new"):
            name_moves.move(registry, OLD, NEW)
        registry.restore(OLD)
        registry.rm(Ref(NEW))
        assert contents(registry, OLD) == before


def test_a_choice_to_keep_all_versions_goes_along(root: Path) -> None:
    with Registry.open(root) as registry:
        registry.rm(Ref(OLD, tag="prod"))
        retention.keep(registry, Ref(OLD), None)
        name_moves.move(registry, OLD, NEW)
        assert retention.drop(registry, KeepRule(1), dry_run=True).refs == []


def test_a_name_is_moved_back_with_what_was_done_under_the_other_one_and_without_what_was_undone_there(
    root: Path, make: Make
) -> None:
    with Registry.open(root) as registry:
        registry.tag(Ref(OLD, number=2), "old")
        name_moves.move(registry, OLD, NEW)
        registry.rm(Ref(NEW, tag="old"))
        registry.deprecate(Ref(NEW, number=2), undo=True)
        release_moves.undo_withdrawal(registry.ledger, Ref(NEW, number=3))
        retention.keep(registry, Ref(NEW), None)
        registry.push(make("a5", 5), Ref(NEW))
        before = contents(registry, NEW)
        for destination, back in ((NEW, OLD), (OLD, NEW), (NEW, OLD)):
            assert name_moves.move(registry, destination, back) == 4
            assert contents(registry, back) == before
        assert errors(registry) == []
        with pytest.raises(NotFoundError, match="was moved to team/sql"):
            registry.resolve(Ref(NEW))
        registry.rm(Ref(OLD))
        registry.restore(NEW)
        with pytest.raises(RefusedError, match="this name was removed"):
            name_moves.move(registry, NEW, OLD)


def test_a_name_that_is_taken_was_removed_or_is_not_allowed_is_refused_and_nothing_moves(root: Path, make: Make) -> None:
    with Registry.open(root) as registry:
        registry.push(make("other", 9), Ref("team/taken"))
        registry.push(make("gone", 8), Ref("team/gone"))
        registry.rm(Ref("team/gone"))
        before = registry.list()
        for new, error, problem in (
            ("team/taken", ConflictError, "exists already"),
            (OLD, ConflictError, "exists already"),
            ("team/gone", RefusedError, "this name was removed"),
        ):
            with pytest.raises(error, match=problem):
                name_moves.move(registry, OLD, new)
        registry.protect(Ref(OLD, tag="prod"))
        with pytest.raises(RefusedError, match="is protected"):
            name_moves.move(registry, OLD, NEW)
        registry.protect(Ref(OLD, tag="prod"), on=False)
        assert registry.list() == before
    (root / "adapterhub.toml").write_text("[promote.prod.require]\napprovals = 1\n")
    with Registry.open(root) as registry, pytest.raises(RefusedError, match="has requirements, and the evidence"):
        name_moves.move(registry, OLD, NEW)
    (root / "adapterhub.toml").write_text('[policy]\nallow = ["other/*"]\n')
    with Registry.open(root) as registry, pytest.raises(RefusedError, match="allow"):
        name_moves.move(registry, OLD, NEW)
    with Registry.open(root) as registry:
        assert registry.list() == before


def test_what_another_process_records_meanwhile_moves_too(root: Path, make: Make) -> None:
    """A version that was pushed between the last copy and the removal went with the old name."""
    folder = make("late", 7)
    with Registry.open(root) as registry, Registry.open(root) as other_registry:
        before = contents(registry, OLD)

        def push_meanwhile(_entry: Entry) -> None:
            registry.ledger.on_commit = None
            other_registry.push(folder, Ref(OLD))
            other_registry.deprecate(Ref(OLD, number=4), "Use v5.")

        registry.ledger.on_commit = push_meanwhile
        assert name_moves.move(registry, OLD, NEW) == 4
        (newest, *older), _, marks, _ = contents(registry, NEW)
        assert (newest[0], newest[1]) == (5, ("latest",))
        assert [number for number, *_ in older] == [number for number, *_ in before[0]]
        assert marks[0] == {"2": "Use v4.", "4": "Use v5."}
        assert errors(registry) == []


def killed(root: Path, steps: int, old: str, new: str, *, after: bool) -> int:
    """The exit code of a process that moves a name, killed at an entry of the log: before it is there, or after."""

    def work() -> None:
        with Registry.open(root) as registry:
            append, calls_left = registry.store.log.append, steps

            def counting(*words: Any, **options: Any) -> bool:
                nonlocal calls_left
                calls_left -= 1
                is_appended = append(*words, **options) if calls_left or after else False
                if not calls_left:
                    os.kill(os.getpid(), signal.SIGKILL)
                return is_appended

            registry.store.log.append = counting  # type: ignore[method-assign]
            name_moves.move(registry, old, new)

    return finished([fork(work)])[0]


@pytest.mark.parametrize(("old", "new"), [(OLD, NEW), (NEW, OLD)])
def test_a_move_killed_at_any_entry_leaves_the_old_name_whole_and_the_same_call_ends_it(
    root: Path, tmp_path: Path, old: str, new: str
) -> None:
    with Registry.open(root) as registry:
        if old == NEW:
            registry.tag(Ref(OLD, number=2), "old")
            name_moves.move(registry, OLD, NEW)
            registry.rm(Ref(NEW, tag="old"))
            registry.deprecate(Ref(NEW, number=2), undo=True)
        before = contents(registry, old)
    codes = []
    while not codes or codes[-1]:
        again = tmp_path / f"killed-{len(codes)}"
        shutil.copytree(root, again)
        # At every second entry, in turn before it is in the log and after.
        codes.append(killed(again, 2 * len(codes) + 1, old, new, after=len(codes) % 2 == 1))
        assert codes[-1] in (0, -signal.SIGKILL)
        with Registry.open(again) as registry:
            if queries.name(registry.index, old).deleted:  # it was killed after its last entry, or not at all
                assert contents(registry, new) == before
            else:
                assert contents(registry, old) == before
                name_moves.move(registry, old, new)
            assert contents(registry, new) == before
            assert errors(registry) == []
    assert len(codes) > 2 + 2 * (old == OLD)  # three pushes or a restore, the marks, the withdrawal, and the removal
