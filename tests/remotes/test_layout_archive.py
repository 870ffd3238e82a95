"""Image layouts: addresses, what is written, and archives that lie."""

from __future__ import annotations

import contextlib
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adapterhub as ah
from adapterhub.manifest import oci_manifest
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.download import discard_part, receive
from adapterhub.remotes.layouts.layout_archive import LayoutArchive
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import AdapterhubError, ConflictError, IntegrityError
from tests.conftest import Run
from tests.support.adapters import write_adapter
from tests.support.registry import listed

Make = Callable[..., Path]
HEX = "ab" * 32


def archived(folder: Path, out: Path, name: str = "v1") -> bytes:
    with LayoutArchive(out) as target:
        copy_version(AdapterFolder(folder), "latest", target, name)
    return out.read_bytes()


def test_an_archive_has_the_same_bytes_whatever_was_there_when(make: Make, tmp_path: Path) -> None:
    once = archived(make(), tmp_path / "one.tar")
    assert archived(make(), tmp_path / "two.tar") == once
    with tarfile.open(tmp_path / "one.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members[:2]] == ["oci-layout", "index.json"]
    assert sorted(member.name for member in members[2:]) == [member.name for member in members[2:]]
    assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in members} == {(0, 0, 0, "", 0o644)}
    other_folder, grown = make("other", 1), tmp_path / "grown.tar"
    archived(make(), grown)
    archived(other_folder, grown, "v2")
    with LayoutArchive(tmp_path / "both.tar") as target:  # in the other order, at once
        copy_version(AdapterFolder(other_folder), "latest", target, "v2")
        copy_version(AdapterFolder(make()), "latest", target, "v1")
    assert grown.read_bytes() == (tmp_path / "both.tar").read_bytes()


def test_an_archive_whose_work_fails_stays_as_it_was(make: Make, tmp_path: Path) -> None:
    before, out = archived(make(), tmp_path / "one.tar"), tmp_path / "one.tar"
    for path in (out, tmp_path / "new.tar"):
        with contextlib.suppress(RuntimeError), LayoutArchive(path) as target:
            copy_version(AdapterFolder(make("other", 1)), "latest", target, "v2")
            assert target.tags()[-1] == "v2"
            raise RuntimeError
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "one.tar", "other"]


def test_what_a_killed_writer_left_goes_after_a_day(make: Make, tmp_path: Path) -> None:
    for name, age in (("old", 90_000), ("new", 10)):
        leftover = tmp_path / f".x.tar.blobs-{name}"
        leftover.mkdir()
        (leftover / "blob").touch()
        for path in (leftover / "blob", leftover):
            os.utime(path, (time.time() - age,) * 2)
    archived(make(), tmp_path / "x.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.tar.blobs-new", "adapter", "x.tar"]


def test_of_two_writers_of_one_archive_the_second_gets_a_conflict(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "x.tar"
    archived(make(), out)
    late = LayoutArchive(out)
    copy_version(AdapterFolder(make("late", 1)), "latest", late, "v2")
    archived(make("early", 2), out, "v3")
    with pytest.raises(ConflictError, match="changed while it was in use"):
        late.commit()
    late.close()
    with LayoutArchive(out) as archive:
        assert archive.tags() == ["v1", "v3"]


def test_fsck_puts_back_what_a_layout_has(make: Make, run: Run, tmp_path: Path) -> None:
    run("push", make(), "team/sql", "--registry", ".")
    archived(make(), tmp_path / "x.tar")
    lost = tmp_path / ".adapterhub/blobs/sha256" / oci_manifest.build(make()).layers[-1].digest[7:]
    lost.unlink()
    assert "restored 1 blob" in run("fsck", "--repair", "--from", "layout://x.tar").stderr
    run("verify", "team/sql")


def test_commands_take_a_layout_as_any_other_place(make: Make, run: Run, tmp_path: Path) -> None:
    source, digest = make(), oci_manifest.build(make()).digest
    assert digest in run("push", source, "oci-archive:x.tar:v2").stdout
    assert listed(run("list", "layout://x.tar").stdout) == ["layout://x.tar:v2"]
    assert digest in run("copy", "layout://x.tar", "team/sql").stdout  # it has one version only
    assert digest in run("copy", "layout://x.tar:v2", "oci:dir:team/sql:v2").stdout
    assert run("validate", "oci:dir:team/sql:v2").stdout.endswith("ok: nothing to report\n")
    run("pull", f"layout://x.tar@{digest}", "-o", "out")
    assert oci_manifest.build(tmp_path / "out").digest == digest
    run("push", make("other", 1), "layout://x.tar:v3")
    assert "no such name" in run("pull", "layout://x.tar", "-o", "which", code=3).stderr


def test_flipped_bytes_are_not_accepted(make: Make, run: Run, tmp_path: Path) -> None:
    whole = archived(make(), tmp_path / "x.tar")
    with tarfile.open(tmp_path / "x.tar") as tar:
        blobs = [member for member in tar.getmembers() if member.name.startswith("blobs/") and member.size > 500]
    for number, member in enumerate(blobs):
        flipped = bytearray(whole)
        flipped[member.offset_data + member.size // 2] ^= 1
        (tmp_path / "x.tar").write_bytes(flipped)
        run("pull", "layout://x.tar:v1", "-o", f"out-{number}", code=4)
        run("copy", "layout://x.tar:v1", "team/sql", "--registry", f"empty-{number}", code=4)
        pushed = run("push", make("other", 1), "layout://x.tar:v4", code=4)  # it would be written again
        assert f"error: sha256:{member.name[-64:]}: {member.size} bytes of sha256:" in pushed.stderr
        assert f" were read instead of {member.size} of sha256:{member.name[-64:]}. Nothing was stored; if it" in pushed.stderr
        with pytest.raises(IntegrityError) as caught:
            ah.push(tmp_path / "other", f"layout://{tmp_path}/x.tar:v4")
        assert (caught.value.hint, caught.value.code) == ("Nothing was written", "source-damaged")
        assert (tmp_path / "x.tar").read_bytes() == flipped
        assert not (tmp_path / f"out-{number}").exists()


# ---- archives that lie


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive `good.tar`, and the folder `mutated` that it is of."""
    root = tmp_path_factory.mktemp("archive")
    archived(write_adapter(root / "mutated"), root / "good.tar")
    return root


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_changed_archive_has_the_right_version_or_none(archive: Path, data: st.DataObject) -> None:
    root, good = archive, archive / "good.tar"
    manifest = oci_manifest.build(root / "mutated")
    raw = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 1500) | st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (root / "bad.tar").write_bytes(raw[: data.draw(st.integers(0, len(raw)) | st.just(len(raw)))])
    with LayoutArchive(root / "bad.tar") as source:
        try:
            assert source.manifest("v1").raw == manifest.raw
            for layer in manifest.layers:
                with receive(source, layer, ConfinedFiles(root), root / "part") as (path, _):
                    assert path.stat().st_size == layer.size
        except AdapterhubError:
            pass  # anything else is a bug
        finally:
            discard_part(ConfinedFiles(root), root / "part")
