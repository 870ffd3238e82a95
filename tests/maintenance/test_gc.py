"""What gc removes, and all that it must not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapterhub.bases import registered_bases
from adapterhub.index import version_search
from adapterhub.maintenance.fsck import fsck
from adapterhub.maintenance.gc import gc
from adapterhub.maintenance.repair import repair
from adapterhub.maintenance.verify import verify
from adapterhub.ref import Ref
from adapterhub.registry import conversion_cache
from adapterhub.registry.adapter_recipe import Conversion
from adapterhub.registry.registry import Registry
from adapterhub.store import ingest
from adapterhub_converters.errors import IntegrityError, NotFoundError, RefusedError
from tests.conftest import Run
from tests.registry.test_registry import flip
from tests.support.adapters import Make, made_from
from tests.support.folders import base

SQL, PROD = Ref.parse("team/sql"), Ref.parse("team/sql:prod")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.init(tmp_path / "registry") as opened:
        yield opened


def blobs(registry: Registry) -> set[str]:
    return {path.name for path in registry.store.blobs()}


def age(registry: Registry, hours: float = 100) -> None:
    """Let all that lies in the store have been written long ago."""
    for path in registry.store.root.rglob("*"):
        modified = path.stat().st_mtime - hours * 3600
        os.utime(path, (modified, modified))


def test_what_another_process_removes_while_gc_counts_what_waits_is_not_counted(
    registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.push(make("a"), SQL)
    registry.rm(SQL)
    listed = registry.store.blobs

    def one_fewer_each_time() -> Iterator[Path]:
        paths = list(listed())
        yield from paths
        paths[0].unlink()

    monkeypatch.setattr(registry.store, "blobs", one_fewer_each_time)
    assert gc(registry).waiting == len(list(listed()))


def test_nothing_goes_while_it_is_needed_or_young(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    before = blobs(registry)
    swept = gc(registry, grace=0)
    assert (swept.blobs, swept.leftovers, swept.waiting) == (0, 0, 0)
    registry.push(make("b", 1), Ref.parse("team/other"))
    registry.rm(Ref.parse("team/other"))
    age(registry, 23)
    swept = gc(registry)
    assert (swept.blobs, swept.waiting) == (0, 4)  # a name removed less than a day ago still needs them
    age(registry, 2)
    dry = gc(registry, dry_run=True)
    assert len(blobs(registry)) > len(before)
    swept = gc(registry)
    assert (swept.blobs, swept.size) == (dry.blobs, dry.size) == (4, swept.size)  # README.md is in both
    assert blobs(registry) == before
    assert fsck(registry) == []
    assert verify(registry, SQL) == []


def test_orphans_of_a_push_that_did_not_end_wait_for_the_grace_time(registry: Registry, make: Make) -> None:
    ingest.ingest(registry.store, make())
    swept = gc(registry)
    assert (swept.blobs, swept.waiting) == (0, 6)
    assert gc(registry, grace=0).blobs == 6
    assert blobs(registry) == set()


# ---- who is at work


def test_a_version_that_is_read_stays_until_it_was_read(registry: Registry, make: Make, tmp_path: Path) -> None:
    registry.push(make(), SQL)
    with registry.lease_version(SQL) as version:
        registry.rm(SQL)
        assert gc(registry, grace=0).blobs == 0
        assert len(registry.files(version)) == 4
        assert all(registry.store.has_blob(layer.digest, layer.size) for layer in registry.files(version))
    assert gc(registry, grace=0).blobs == 6
    with pytest.raises(NotFoundError):
        registry.pull(SQL, tmp_path / "out")


@pytest.mark.parametrize("lost", ["all", "one"])
def test_a_push_puts_back_what_a_gc_took_from_under_it(
    registry: Registry, make: Make, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """As where leases and clocks say nothing: everything that has no name yet goes between the put and the move."""
    real, removed_names = ingest.ingest, []

    def robbed(store: Any, folder: Path, *arguments: Any, **named: Any) -> Any:
        result = real(store, folder, *arguments, **named)
        if not removed_names:
            for path in list(store.blobs())[: 1 if lost == "one" else None]:
                removed_names.append(path.name)
                path.unlink()
        return result

    monkeypatch.setattr(ingest, "ingest", robbed)
    assert registry.push(make(), SQL).new
    assert removed_names
    assert fsck(registry) == []
    assert verify(registry, SQL) == []


# ---- what is not known is not removed


@pytest.mark.parametrize("damage", ["manifest flipped", "manifest missing", "entry flipped", "entry missing", "end missing"])
def test_a_registry_that_cannot_be_read_well_loses_nothing(registry: Registry, make: Make, damage: str) -> None:
    for seed in (1, 2):
        version = registry.push(make(f"a{seed}", seed), SQL)
    ingest.ingest(registry.store, make("orphan", 9))
    path = registry.store.blob_path(version.digest)
    if damage.startswith("e"):
        path = registry.store.log.path("team/sql", 1 if damage.startswith("entry") else 2)
    flip(path, 20) if damage.endswith("flipped") else path.unlink()
    before = blobs(registry)
    with pytest.raises(IntegrityError):
        gc(registry, grace=0)
    registry.rebuild_index()
    if damage != "end missing":  # of that nobody could know
        with pytest.raises(IntegrityError):
            gc(registry, grace=0)
    assert blobs(registry) == before


def test_a_store_that_a_newer_adapterhub_wrote_loses_nothing(registry: Registry) -> None:
    digest = registry.store.put_bytes(b"needed by what is not known here")[0]
    (registry.store.root / "novelties").mkdir()
    with pytest.raises(RefusedError, match="novelties: unknown to this adapterhub, ") as error:
        gc(registry, grace=0)
    assert error.value.what == "unknown to this adapterhub, and may refer to any of the blobs; nothing was removed"
    assert (error.value.code, error.value.hint) == ("newer-version", "Upgrade adapterhub, or move that folder elsewhere")
    assert registry.store.blob_path(digest).exists()


def test_files_of_others_stay(registry: Registry) -> None:
    foreign = registry.store.root / "blobs" / "sha256" / "notes.txt"
    foreign.write_text("x")
    assert gc(registry, grace=0).blobs == 0
    assert foreign.exists()


def test_a_clock_that_went_back_loses_nothing(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    registry.push(make("b", 1), Ref.parse("team/other"))
    registry.rm(Ref.parse("team/other"))
    age(registry, -1000)  # all was written in the future
    assert registry.push(make("c", 2), SQL).number == 2
    assert registry.tag(Ref.parse("team/sql:v1"), "prod").number == 1
    swept = gc(registry, grace=0)
    assert (swept.blobs, fsck(registry, scope=None)) == (0, fsck(registry))
    assert all(finding.severity == "note" for finding in fsck(registry))
    age(registry, 2000)
    assert gc(registry, grace=0).blobs == 4
    assert fsck(registry) == []


def test_a_database_deleted_while_open_is_rebuilt(registry: Registry, make: Make) -> None:
    registry.push(make("a"), SQL)
    for path in registry.root.glob("registry.db*"):
        path.unlink()
    with Registry.open(registry.root) as other_registry:
        other_registry.push(make("b", 1), Ref.parse("team/other"))
        assert registry.push(make("c", 2), SQL).number == 2
        assert registry.tag(Ref.parse("team/sql:v1"), "prod").number == 1
        assert other_registry.tag(Ref.parse("team/other"), "prod").number == 1
        assert registry.list() == other_registry.list()
        assert fsck(registry) == fsck(other_registry) == []
    for path in registry.root.glob("registry.db*"):
        path.unlink()
    assert gc(registry, grace=0).blobs == 0
    assert registry.tag(Ref.parse("team/other"), "dev").number == 1
    assert fsck(registry) == []


def test_the_commands(run: Run, registry: Registry, make: Make) -> None:
    for seed in (1, 2, 3):
        registry.push(make(f"a{seed}", seed), SQL)
    registry.close()
    at = ("--registry", registry.root)
    assert "team/sql: every version" in run("keep", "team/sql", *at).stdout
    assert "team/sql: the 2 newest and tagged versions" in run("keep", "team/sql", "--last", "2", *at).stdout
    assert "team/sql: tagged versions" in run("keep", "team/sql", "--tagged", *at).stdout
    assert "the 0 newest and tagged versions" not in run("log", "team/sql", *at).stdout
    run("keep", "team/sql", "--last", "1", *at)
    assert "the newest and tagged versions" in run("log", "team/sql", *at).stdout
    assert "cannot be combined with --last" in run("keep", "team/sql", "--all", "--last", "2", *at, code=2).stderr
    dry = run("gc", "--dry-run", "--grace", "0", *at).stdout
    assert dry == "would remove team/sql:v1\nwould remove team/sql:v2\nwould remove 8 blobs, 9.1 kB\n"
    assert json.loads(run("gc", "--json", *at).stdout)["waiting"] == 8
    assert run("gc", *at).stdout == "8 unused blobs, 9.1 kB: within the grace period\n"
    document = json.loads(run("gc", "--grace", "0", "--json", *at).stdout)
    assert (document["blobs"], document["dropped"], document["dry_run"]) == (8, [], False)
    assert run("gc", *at).stdout == "nothing to remove\n"
    run("fsck", *at)


# ---- what else needs something


def test_what_a_version_that_stays_was_made_from_stays(registry: Registry, make: Make) -> None:
    a1 = registry.push(make("a1", 1), Ref.parse("team/a"))
    b1 = registry.push(made_from(make, "b1", 2, a1), Ref.parse("team/b"))
    a2 = registry.push(made_from(make, "a2", 3, b1), Ref.parse("team/a"))
    registry.push(made_from(make, "c1", 4, a2), Ref.parse("team/c"))
    for n in range(5, 9):
        registry.push(make(f"n{n}", n), Ref.parse(f"team/{'ab'[n % 2]}"))
    dry = gc(registry, grace=0, last=1, dry_run=True)
    swept = gc(registry, grace=0, last=1)
    assert (dry.dropped, dry.parents, dry.blobs) == (swept.dropped, swept.parents, swept.blobs)
    assert list(map(str, swept.parents)) == ["team/a:v1", "team/a:v2", "team/b:v1"]
    assert list(map(str, swept.dropped)) == ["team/a:v3", "team/b:v2"]
    assert fsck(registry) == []


def test_a_name_from_which_others_were_made_goes_only_by_force(registry: Registry, make: Make, run: Run) -> None:
    parent = registry.push(make("a1", 1), Ref.parse("team/a"))
    registry.push(made_from(make, "a2", 2, parent), Ref.parse("team/a"))  # its own children go with it
    registry.push(made_from(make, "b1", 3, parent), Ref.parse("team/b"))
    at = ("--registry", registry.root)
    reason = "team/b:v1 was made from team/a:v1 and could not be made again. --force removes it all the same"
    assert run("rm", "team/a", *at, code=6).stderr == f"error: team/a: {reason}  [has-children]\n"
    copy = registry.push(make("a1", 1), Ref.parse("team/copy"))
    assert copy.digest == parent.digest
    registry.rm(Ref.parse("team/a"))  # the same version has another name
    with pytest.raises(RefusedError, match="team/b:v1 was made from team/copy:v1"):
        registry.rm(Ref.parse("team/copy"))
    run("rm", "team/copy", "--force", *at)
    assert [str(row.ref) for row in registry.list()] == ["team/b:v1"]


def test_a_parent_goes_with_the_last_that_was_made_from_it(registry: Registry, make: Make) -> None:
    a1 = registry.push(make("a1", 1), Ref.parse("team/a"))
    b1 = registry.push(made_from(make, "b1", 2, a1), Ref.parse("team/b"))
    a2 = registry.push(made_from(make, "a2", 3, b1), Ref.parse("team/a"))
    registry.push(made_from(make, "a3", 4, a2, a1), Ref.parse("team/a"))
    registry.tag(Ref.parse("team/a:v3"), "prod")
    for name in "ab":
        registry.push(make(f"{name}-new", ord(name)), Ref.parse(f"team/{name}"))
    assert gc(registry, grace=0, last=1).dropped == []
    registry.rm(Ref.parse("team/a:prod"))
    dry = gc(registry, grace=0, last=1, dry_run=True)
    swept = gc(registry, grace=0, last=1)
    assert list(map(str, swept.dropped)) == ["team/a:v1", "team/a:v2", "team/a:v3", "team/b:v1"]
    assert (dry.dropped, dry.blobs, swept.parents) == (swept.dropped, swept.blobs, [])
    assert fsck(registry) == []
    registry.rebuild_index()
    assert [str(row.ref) for row in registry.list()] == ["team/a:v4", "team/b:v2"]


def test_the_document_of_a_base_stays_as_long_as_its_name_means_it(registry: Registry, tmp_path: Path) -> None:
    spec = base(tmp_path / "base", 2)
    kept_base = registered_bases.add(registry, "tiny", spec, source="here")
    replaced = registered_bases.add(registry, "other", spec, source="elsewhere")
    other_base = registered_bases.add(registry, "other", base(tmp_path / "more", 3), source="here", force=True)
    age(registry, 23)
    assert (gc(registry).blobs, gc(registry).waiting) == (0, 1)
    age(registry, 2)
    assert gc(registry).blobs == 1
    assert not registry.store.blob_path(replaced.digest).exists()
    assert gc(registry, grace=0).blobs == 0
    assert registered_bases.get(registry, "tiny").digest == kept_base.digest
    registered_bases.remove(registry, "other")
    assert gc(registry, grace=0).blobs == 1
    assert not registry.store.blob_path(other_base.digest).exists()
    assert fsck(registry) == []


@pytest.mark.parametrize("damage", ["changed", "lost"])
def test_a_base_whose_log_cannot_be_read_loses_nothing(registry: Registry, tmp_path: Path, damage: str) -> None:
    spec = base(tmp_path / "base", 2)
    registered_bases.add(registry, "tiny", spec, source="here")
    registered_bases.remove(registry, "tiny")
    registered_bases.add(registry, "tiny", spec, source="here")
    path = registry.store.root / "bases/tiny/00000002.json"
    path.write_bytes(path.read_bytes().replace(b"Z", b"z")) if damage == "changed" else path.unlink()
    registry.store.put_bytes(b"nobody's")
    with pytest.raises(IntegrityError, match="nothing was removed"):
        gc(registry, grace=0)
    assert len(blobs(registry)) == 2


def test_a_lost_document_of_a_base_is_put_back(registry: Registry, tmp_path: Path) -> None:
    added_base = registered_bases.add(registry, "tiny", base(tmp_path / "base", 2), source="here")
    shutil.copytree(registry.root, tmp_path / "copy")
    registry.store.blob_path(added_base.digest).unlink()
    assert repair(registry, tmp_path / "copy") == [added_base.digest]
    assert fsck(registry) == []


def test_conversions_unused_for_a_day_are_removed(registry: Registry, make: Make, tmp_path: Path) -> None:
    registry.push(make(), SQL)

    def pull(name: str) -> bool:
        return conversion_cache.pull(registry, SQL, tmp_path / name, Conversion("mlx")).cached

    assert (pull("first"), pull("again")) == (False, True)
    assert gc(registry, grace=0).conversions == 0  # somebody may be reading it
    age(registry, 25)
    assert pull("third")
    assert gc(registry).conversions == 0
    age(registry, 25)
    dry = gc(registry, dry_run=True)
    swept = gc(registry)
    assert (dry.conversions, dry.conversion_size) == (swept.conversions, swept.conversion_size) == (1, swept.conversion_size)
    assert (swept.conversion_size > 0, registry.store.conversions()) == (True, [])
    assert not pull("anew")


def test_a_dropped_version_is_found_no_more(registry: Registry, make: Make) -> None:
    for n in range(3):
        folder = make(f"a{n}", n)
        (folder / "README.md").write_text(f"# word{n}\n")
        registry.push(folder, SQL)
    registry.deprecate(Ref.parse("team/sql:v1"), "old")
    gc(registry, grace=0, last=1)
    assert [version_search.search(registry.index, version_search.Query(f"word{n}")).total for n in range(3)] == [0, 0, 1]
    assert registry.deprecations(["team/sql"]) == {}
    for table in ("texts", "facets", "metrics", "files", "made_from"):
        orphan_count = registry.index.select(f"SELECT count(*) FROM {table} WHERE version NOT IN (SELECT id FROM versions)")
        assert orphan_count == [(0,)]
