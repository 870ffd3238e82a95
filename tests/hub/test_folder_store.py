"""A change that fails takes back its blobs, and none that somebody else relies on."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.hub.storage.folder_storage import Storage
from adapterhub.hub.storage.folder_store import FileState, FolderStore, collecting_new_blobs
from adapterhub.maintenance import gc
from adapterhub.registry.registry import Registry
from adapterhub.store.store_files import StoreFiles

DATA = b"the same bytes"


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[tuple[FolderStore, FolderStore]]:
    """Two stores of one folder: that of a hub, with its lease, and that of one of its threads."""
    store = FolderStore(tmp_path / ".adapterhub")
    store.create()
    with store.lease("hub"):
        yield store, FolderStore(store.root)


def store_in_a_change(store: FolderStore) -> dict[str, FileState]:
    with collecting_new_blobs() as blobs:
        store.put_bytes(DATA)
    return blobs


def test_a_blob_that_nobody_else_has_found_is_removed(stores: tuple[FolderStore, FolderStore]) -> None:
    store, _ = stores
    (digest,) = blobs = store_in_a_change(store)
    assert store.take_back(blobs) == [digest]
    assert store.size(digest) is None


def test_a_blob_that_is_found_at_the_moment_it_gets_its_name_stays(
    stores: tuple[FolderStore, FolderStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time was read after that, so that the renewed one was taken for that of the change."""
    store, other_store = stores

    def move(path: Path, final: Path) -> None:
        StoreFiles.move(store.files, path, final)
        assert other_store.retain_if_present(f"sha256:{final.name}", len(DATA))

    monkeypatch.setattr(store.files, "move", move)
    (digest,) = blobs = store_in_a_change(store)
    monkeypatch.undo()
    assert store.take_back(blobs) == []
    assert store.has_blob(digest, len(DATA))


def test_the_time_of_a_new_blob_is_not_one_that_a_coarse_clock_renews_it_with(
    stores: tuple[FolderStore, FolderStore],
) -> None:
    """Clocks of file systems tick every few milliseconds, and on some disks every two seconds."""
    store, _ = stores
    began = time.time()
    (digest,) = store_in_a_change(store)
    assert store.files.status(store.blob_path(digest)).st_mtime < began - 5


def test_a_blob_that_two_changes_store_at_once_stays_for_the_other(stores: tuple[FolderStore, FolderStore]) -> None:
    store, other_store = stores
    (digest,) = blobs = store_in_a_change(store)
    with (
        collecting_new_blobs(),
        other_store.files.temporary() as (path, file),
    ):  # it had looked before the first one had stored it
        file.write(DATA)
        other_store.commit_blob(path, file, digest)
    assert store.take_back(blobs) == []
    assert store.has_blob(digest, len(DATA))


def test_a_blob_that_the_lease_of_another_process_lists_stays(stores: tuple[FolderStore, FolderStore]) -> None:
    store, other_store = stores
    (digest,) = blobs = store_in_a_change(store)
    with other_store.lease("push") as lease:
        lease.note(digest)
        assert store.take_back(blobs) == []
    assert store.has_blob(digest, len(DATA))


def collect_garbage(folder: Path) -> None:
    """As a command does, a day after the hub has ended."""
    (aside,) = (folder / ".adapterhub/tmp").glob("taken-*")
    os.utime(aside, (1, 1))
    with Registry.open(folder) as registry:
        registry.store.files.sweep()
        assert aside.exists()
        gc.gc(registry, grace=1e10)


@pytest.mark.parametrize("restore", [lambda folder: Storage.open(folder).remove_stale(), collect_garbage])
def test_a_blob_that_a_killed_process_had_set_aside_is_restored(
    stores: tuple[FolderStore, FolderStore], monkeypatch: pytest.MonkeyPatch, restore: Callable[[Path], None]
) -> None:
    store, other_store = stores
    (digest,) = blobs = store_in_a_change(store)
    move = store.files.move

    def move_and_die(path: Path, final: Path) -> None:
        move(path, final)
        raise KeyboardInterrupt

    monkeypatch.setattr(store.files, "move", move_and_die)
    with pytest.raises(KeyboardInterrupt):
        store.take_back(blobs)
    assert not other_store.has_blob(digest, len(DATA))
    restore(store.root.parent)
    assert other_store.has_blob(digest, len(DATA))
