"""A gc reads what is new since the last one, and needs the same blobs as one that reads everything."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from adapterhub.index import queries
from adapterhub.maintenance import gc_marks, name_moves, retention
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import NeededBlobs, gc
from adapterhub.maintenance.gc_marks import Marks
from adapterhub.manifest.keep_rule import KeepRule
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub_converters.errors import AdapterhubError, IntegrityError
from tests.maintenance.test_gc import SQL, blobs
from tests.registry.forks import finished, fork
from tests.registry.test_registry import flip
from tests.support.adapters import Make


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as registry:
        yield registry


def needed(registry: Registry, marks: Marks, grace: float = 3600.0) -> tuple[set[str], set[str]]:
    """The needed blobs, and those of them that only the grace period keeps."""
    seqs = {name.name: name.seq for name in queries.names(registry.index)}
    needs = NeededBlobs(registry.store, lambda: seqs, grace, {}, marks=marks)
    return needs.update(), needs.spared


def test_a_second_gc_reads_only_what_was_pushed_since(registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    files, opened = registry.store.files, list[str]()
    open_file = files.open

    def counting(path: Path) -> object:
        opened.append(path.relative_to(files.root).as_posix())
        return open_file(path)

    def gc_opens() -> list[str]:
        opened.clear()
        gc(registry)
        return sorted(name for name in opened if name.startswith(("refs/", "blobs/")))

    for seed in range(3):
        registry.push(make(f"a{seed}", seed), SQL)
    monkeypatch.setattr(files, "open", counting)
    assert len(gc_opens()) == 6  # the entries and the manifests
    version = registry.push(make("b", 9), SQL)
    # And the last entry that the first gc has read, to know that the log is the same.
    entries = ["refs/team/sql/00000003.json", "refs/team/sql/00000004.json"]
    assert gc_opens() == [f"blobs/sha256/{version.digest[7:]}", *entries]
    assert gc_opens() == entries[1:]


def test_whatever_happens_between_two_of_them_the_needs_are_those_of_a_first_one(registry: Registry, make: Make) -> None:
    draw = random.Random(1)
    names = ["team/a", "team/b", "team/c"]

    def attempt(act: Callable[[str], object]) -> None:
        with contextlib.suppress(AdapterhubError):  # such as that a name was removed
            act(draw.choice(names))

    acts: list[Callable[[str], object]] = [
        lambda name: registry.push(make("draft", draw.randrange(8)), Ref(name)),
        lambda name: registry.push(make("draft", draw.randrange(8)), Ref(name, tag="prod")),
        lambda name: retention.keep(registry, Ref(name), KeepRule(draw.randrange(3))),
        lambda name: registry.rm(Ref(name), force=True),
        registry.restore,
        lambda name: name_moves.move(registry, name, draw.choice(names)),
    ]
    for _ in range(60):
        attempt(draw.choice(acts + acts[:2] * 3))
        if draw.random() < 0.3:
            gc(registry, grace=draw.choice([0, 24]))
            assert gc_marks.read(registry.store).raw
        for grace in (0.0, 3600.0):
            assert needed(registry, gc_marks.read(registry.store), grace) == needed(registry, Marks(), grace)
    assert [finding for finding in fsck(registry) if finding.severity == "error"] == []


def reset(text: bytes) -> bytes:
    return sha256(text).hexdigest().encode() + b"\n" + text


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\n",
        reset(b"[]"),
        reset(b"{}"),
        reset(b'{"version": 2, "logs": [], "blobs": {}}'),
        reset(b'{"version": 1, "logs": [["refs", "team/sql", [1]]], "blobs": {}}'),
        reset(b'{"version": 1, "logs": 3, "blobs": {}}'),
        reset(b"[" * 100_000),
        reset(b"\xff"),
        None,
    ],
)
def test_a_damaged_file_is_as_none(registry: Registry, make: Make, damaged: bytes | None) -> None:
    registry.push(make(), SQL)
    gc(registry)
    path = registry.store.root / "gc.json"
    path.write_bytes(damaged) if damaged is not None else flip(path, 100)
    assert gc_marks.read(registry.store) == Marks()
    before = blobs(registry)
    gc(registry, grace=0)
    assert blobs(registry) == before
    assert gc_marks.read(registry.store).logs


def test_the_logs_of_a_backup_are_read_from_their_beginning(registry: Registry, make: Make, tmp_path: Path) -> None:
    registry.push(make("a", 1), SQL)
    root = registry.root
    shutil.copytree(root, tmp_path / "backup")
    registry.push(make("b", 2), SQL)
    gc(registry)
    marks = (registry.store.root / "gc.json").read_bytes()
    with Registry.open(tmp_path / "backup") as restored:
        for seed in range(3, 6):  # as many entries as the other log, and more
            version = restored.push(make(f"c{seed}", seed), SQL)
            (restored.store.root / "gc.json").write_bytes(marks)
            gc(restored, grace=0)
            assert version.digest[7:] in blobs(restored)
            assert [finding for finding in fsck(restored) if finding.severity == "error"] == []


@pytest.mark.parametrize("damage", ["last entry flipped", "gap", "end missing"])
def test_what_a_gc_has_read_hides_no_broken_end_of_a_log(registry: Registry, make: Make, damage: str) -> None:
    for seed in (1, 2):
        registry.push(make(f"a{seed}", seed), SQL)
    gc(registry)
    for seed in (3, 4):
        registry.push(make(f"a{seed}", seed), SQL)
    path = registry.store.log.path("team/sql", {"last entry flipped": 2, "gap": 3, "end missing": 4}[damage])
    flip(path, 20) if damage.endswith("flipped") else path.unlink()
    before = blobs(registry)
    with pytest.raises(IntegrityError):
        gc(registry, grace=0)
    assert blobs(registry) == before


def test_a_dry_run_keeps_nothing(registry: Registry, make: Make) -> None:
    registry.push(make(), SQL)
    gc(registry, dry_run=True)
    assert not (registry.store.root / "gc.json").exists()


def test_a_gc_killed_at_any_file_leaves_the_next_one_the_same_needs(registry: Registry, make: Make, tmp_path: Path) -> None:
    for seed in range(4):
        registry.push(make(f"a{seed}", seed), SQL)
    gc(registry)
    retention.keep(registry, SQL, KeepRule(1))
    root, codes = registry.root, []
    while not codes or codes[-1]:
        again = tmp_path / f"killed-{len(codes)}"
        shutil.copytree(root, again)

        def work(again: Path = again, count: int = len(codes)) -> None:
            with Registry.open(again) as copy:
                files, calls_left = copy.store.files, count

                def killing(act: Callable[..., object]) -> Callable[..., object]:
                    def acting(*words: object, **options: object) -> object:
                        nonlocal calls_left
                        if not calls_left:
                            os.kill(os.getpid(), signal.SIGKILL)
                        calls_left -= 1
                        return act(*words, **options)

                    return acting

                for name in ("remove", "move", "link"):
                    setattr(files, name, killing(getattr(files, name)))
                gc(copy, grace=0)

        codes.append(finished([fork(work)])[0])
        with Registry.open(again) as copy:
            assert needed(copy, gc_marks.read(copy.store), 0.0) == needed(copy, Marks(), 0.0)
            gc(copy, grace=0)
            assert [finding for finding in fsck(copy) if finding.severity == "error"] == []
            assert [row.number for row in copy.list("team/sql")] == [4]
    assert len(codes) > 10  # a drop, twelve blobs, and the file


def test_a_push_beside_a_gc_is_needed_by_the_next(registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.push(make("a", 1), SQL)
    written = gc_marks.write

    def pushing(*words: object) -> None:
        registry.push(make("b", 2), SQL)  # after all that was read
        written(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(gc_marks, "write", pushing)
    gc(registry, grace=0)
    monkeypatch.undo()
    before = blobs(registry)
    gc(registry, grace=0)
    assert blobs(registry) == before
    assert json.loads((registry.store.root / "gc.json").read_bytes().partition(b"\n")[2])["logs"][0][2][0] == 2
    assert fsck(registry) == []
