"""Image layouts: addresses, what is written, and archives that lie."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adapterhub as ah
from adapterhub.manifest import oci_manifest
from adapterhub.remotes import address_schemes, download, remote_address
from adapterhub.remotes.adapter_folders import AdapterFolder
from adapterhub.remotes.download import discard_part, receive
from adapterhub.remotes.layouts import archive_tar
from adapterhub.remotes.layouts import layout_address as layout
from adapterhub.remotes.layouts.layout_archive import LayoutArchive
from adapterhub.remotes.layouts.layout_folder import LayoutFolder
from adapterhub.remotes.version_copy import copy_version
from adapterhub_converters.containers import file_lock
from adapterhub_converters.containers.confined_files import ConfinedFiles
from adapterhub_converters.errors import AdapterhubError, ConflictError, FormatError, IntegrityError, UsageError
from tests.conftest import Run
from tests.support.adapters import write_adapter
from tests.support.registry import listed

Make = Callable[..., Path]
HEX = "ab" * 32


@pytest.mark.parametrize(
    ("text", "path", "name", "digest"),
    [
        ("layout://x.tar", "x.tar", None, None),
        ("layout:///a/b:v2", "/a/b", "v2", None),
        ("layout://b.tar:team/sql:v2", "b.tar", "team/sql:v2", None),
        (f"layout://b.tar@sha256:{HEX}", "b.tar", None, f"sha256:{HEX}"),
        ("oci:dir:v2", "dir", "v2", None),
        ("oci-archive:a/b.tar:team/sql:v2", "a/b.tar", "team/sql:v2", None),
        ("layout://C:\\x\\b.tar:v2", "C:\\x\\b.tar", "v2", None),
    ],
)
def test_an_address_has_path_and_name(text: str, path: str, name: str | None, digest: str | None) -> None:
    assert address_schemes.is_address(text)
    address = layout.parse(text)
    assert (address.path, address.tag, address.digest, str(address)) == (path, name, digest, text)


@pytest.mark.parametrize(
    "text", ["layout://", "oci:", "layout://x.tar:", f"layout://x:v1@sha256:{HEX}", "oci:x:a b", "layout://:v2", "oci:x:../y z"]
)
def test_an_address_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        layout.parse(text)


@pytest.mark.parametrize("text", ["oci://host/name:v1", "team/sql:v2", "./oci", "ocidir:v2", "https://host/x"])
def test_other_words_are_no_layout(text: str) -> None:
    assert not address_schemes.is_address(text) or isinstance(remote_address.parse(text), layout.LayoutAddress) is False


def test_a_folder_or_a_tar_is_recognized_by_prefix_content_or_name(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "y").touch()
    kinds = {
        f"layout://{tmp_path}/new": False,
        f"layout://{tmp_path}/new.tar": True,
        f"layout://{tmp_path}/x.tar": False,
        f"layout://{tmp_path}/y": True,
        f"oci:{tmp_path}/new.tar": False,
        f"oci-archive:{tmp_path}/new": True,
    }
    assert {text: layout.parse(text).is_archive for text in kinds} == kinds


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
    other, grown = make("other", 1), tmp_path / "grown.tar"
    archived(make(), grown)
    archived(other, grown, "v2")
    with LayoutArchive(tmp_path / "both.tar") as target:  # in the other order, at once
        copy_version(AdapterFolder(other), "latest", target, "v2")
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
        left = tmp_path / f".x.tar.blobs-{name}"
        left.mkdir()
        (left / "blob").touch()
        for path in (left / "blob", left):
            os.utime(path, (time.time() - age,) * 2)
    archived(make(), tmp_path / "x.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.tar.blobs-new", "adapter", "x.tar"]


def test_entries_of_others_stay_in_the_index(make: Make, tmp_path: Path) -> None:
    with LayoutFolder(tmp_path / "x") as target:
        copy_version(AdapterFolder(make()), "latest", target, "v1")
        document = json.loads((tmp_path / "x/index.json").read_bytes())
        foreign = {"mediaType": "a/b", "digest": f"sha256:{HEX}", "size": 3, "platform": {"os": "linux"}, "urls": ["x"]}
        document["manifests"].append(foreign)
        (tmp_path / "x/index.json").write_text(json.dumps(document))
        copy_version(AdapterFolder(make()), "latest", target, "v2")
        assert target.tags() == ["v1", "v2"]
    assert foreign in json.loads((tmp_path / "x/index.json").read_bytes())["manifests"]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["blobs", "index.json", "ingest", "oci-layout"]
    assert list((tmp_path / "x/ingest").iterdir()) == []


def test_many_who_write_one_layout_at_once_lose_nothing(make: Make, tmp_path: Path) -> None:
    sources = [AdapterFolder(make(f"a{n}", n)) for n in range(6)]

    def put(n: int) -> None:
        with LayoutFolder(tmp_path / "x") as target:
            copy_version(sources[n], "latest", target, f"v{n}")

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(put, range(6)))
    with LayoutFolder(tmp_path / "x") as found:
        assert found.tags() == [f"v{n}" for n in range(6)]
        assert [found.manifest(f"v{n}").digest for n in range(6)] == [source.manifest("latest").digest for source in sources]


def test_a_blob_that_another_process_finishes_meanwhile_is_left_whole(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one moves the file that was opened here to its final name, before the lock on it is had."""
    source = AdapterFolder(make())
    blob = next(layer for layer in source.manifest("latest").layers if layer.path.endswith(".safetensors"))
    part, final = (tmp_path / "x" / folder for folder in (f"ingest/{blob.digest[7:]}.part", f"blobs/sha256/{blob.digest[7:]}"))
    locked, sizes = file_lock.try_lock, []

    def finished(handle: int) -> bool:
        if not final.exists():
            part.write_bytes((tmp_path / "adapter" / blob.path).read_bytes())
            os.replace(part, final)
        else:
            sizes.append(final.stat().st_size)
        return locked(handle)

    monkeypatch.setattr(download, "try_lock", finished)
    with LayoutFolder(tmp_path / "x") as target:
        target.put_blob(blob, source)
    assert sizes == [blob.size]
    assert hashlib.sha256(final.read_bytes()).hexdigest() == blob.digest[7:]


def test_of_two_writers_of_one_archive_the_second_gets_a_conflict(make: Make, tmp_path: Path) -> None:
    out = tmp_path / "x.tar"
    archived(make(), out)
    late = LayoutArchive(out)
    copy_version(AdapterFolder(make("late", 1)), "latest", late, "v2")
    archived(make("early", 2), out, "v3")
    with pytest.raises(ConflictError, match="changed while it was in use"):
        late.commit()
    late.close()
    with LayoutArchive(out) as found:
        assert found.tags() == ["v1", "v3"]


def test_a_layout_that_was_only_half_made_is_made(make: Make, tmp_path: Path) -> None:
    (tmp_path / "x/blobs/sha256").mkdir(parents=True)
    (tmp_path / "x/ingest").mkdir()
    with LayoutFolder(tmp_path / "x") as target:
        copy_version(AdapterFolder(make()), "latest", target, "v1")
        assert target.tags() == ["v1"]


def test_fsck_puts_back_what_a_layout_has(make: Make, run: Run, tmp_path: Path) -> None:
    run("push", make(), "team/sql", "--registry", ".")
    archived(make(), tmp_path / "x.tar")
    lost = tmp_path / ".adapterhub/blobs/sha256" / oci_manifest.build(make()).layers[-1].digest[7:]
    lost.unlink()
    assert "restored 1 blob" in run("fsck", "--repair", "--from", "layout://x.tar").stderr
    run("verify", "team/sql")


def test_a_registry_s_store_and_a_folder_of_something_else_are_not_written_to(make: Make, run: Run, tmp_path: Path) -> None:
    source = make()
    run("init", ".")
    run("push", source, "team/sql")
    assert run("push", source, "layout://.adapterhub:v9", code=6).stderr.endswith("[store-of-registry]\n")
    run("pull", "layout://.adapterhub:team/sql:v1", "-o", "out")
    before = sorted(path.name for path in source.iterdir())
    assert "not an image layout" in run("push", source, f"layout://{source}", code=4).stderr
    assert sorted(path.name for path in source.iterdir()) == before
    assert "no such file or folder" in run("pull", "oci:nothing:v1", code=3).stderr
    assert "it has team/sql:latest, team/sql:v1" in run("pull", "layout://.adapterhub:v7", code=3).stderr


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


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo, kind: int = tarfile.USTAR_FORMAT, **pax: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind, pax_headers=pax) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member, io.BytesIO(bytes(member.size)) if member.isreg() else None)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


def odd(name: str, kind: bytes, link: str = "", **pax: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.pax_headers = kind, link, pax
    return info


MARK = ("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
INDEX = ("index.json", b'{"schemaVersion":2,"manifests":[]}')
GOOD = tar_of(MARK, INDEX)


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """A header field changed, its checksum right again."""
    made = bytearray(data)
    made[at : at + len(new)] = new
    made[148:156] = b"        "
    made[148:156] = b"%06o\0 " % sum(made[:512])
    return bytes(made)


HOSTILE = {
    "empty": (b"", "not a tar"),
    "zeros only": (bytes(2048), "no file oci-layout"),
    "random": (hashlib.sha256(b"x").digest() * 64, "not a tar"),
    "gzip": (b"\x1f\x8b" + bytes(1000), "compressed"),
    "no end": (GOOD[:1024], "truncated"),
    "cut in a member": (GOOD[:520], "'oci-layout' has 30 bytes, but the archive ends before: it is truncated"),
    "a flipped header": (b"x" + GOOD[1:], "damaged"),
    "a link": (tar_of(MARK, odd("index.json", tarfile.SYMTYPE, "/etc/passwd")), "is a link"),
    "a hard link": (tar_of(MARK, odd("index.json", tarfile.LNKTYPE, "oci-layout")), "is a hard link"),
    "a device": (tar_of(MARK, odd("index.json", tarfile.CHRTYPE)), "is a device"),
    "a pipe": (tar_of(MARK, odd("index.json", tarfile.FIFOTYPE)), "is a pipe"),
    "a sparse file": (patched(GOOD, 156, b"S"), "is a sparse file"),
    "a type nobody knows": (patched(GOOD, 156, b"Q"), "of the type b'Q'"),
    "a long name of GNU's": (tar_of(MARK, ("x" * 200, b""), kind=tarfile.GNU_FORMAT), "of the type b'L'"),
    "a name of another folder": (tar_of(MARK, INDEX, ("blobs/../../x", b"")), "leads out of the archive"),
    "an absolute name": (tar_of(MARK, INDEX, ("/etc/x", b"")), "leads out of the archive"),
    "a backslash": (tar_of(MARK, INDEX, ("a\\b", b"")), "leads out of the archive"),
    "no name": (tar_of(MARK, INDEX, ("", b"")), "leads out of the archive"),
    "a name twice": (tar_of(MARK, INDEX, INDEX), "appears twice"),
    "a name twice, spelled otherwise": (tar_of(MARK, INDEX, ("./index.json", b"{}")), "appears twice"),
    "a folder and a file of one name": (tar_of(MARK, INDEX, odd("x", tarfile.DIRTYPE), ("x", b"")), "appears twice"),
    "a name that is no text": (tar_of(MARK, INDEX, ("\udcff", b"")), "not UTF-8"),
    "pax changes the path": (tar_of(MARK, odd("y", tarfile.REGTYPE, path="index.json"), kind=tarfile.PAX_FORMAT), "'path'"),
    "pax changes the size": (tar_of(MARK, odd("y", tarfile.REGTYPE, size="99"), kind=tarfile.PAX_FORMAT), "'size'"),
    "pax makes it sparse": (
        tar_of(MARK, odd("y", tarfile.REGTYPE, **{"GNU.sparse.major": "1"}), kind=tarfile.PAX_FORMAT),
        "'GNU.sparse.major'",
    ),
    "pax for all that follows": (tar_of(MARK, INDEX, kind=tarfile.PAX_FORMAT, path="x"), "'path'"),
    "a huge pax header": (
        tar_of(MARK, odd("y", tarfile.REGTYPE, comment="z" * 70_000), kind=tarfile.PAX_FORMAT),
        "an extended header of 70015 bytes, over the limit of 65536",
    ),
    "a broken pax header": (patched(GOOD, 156, b"x"), "damaged"),
    "a size beyond the file": (patched(GOOD, 124, b"77777777777\0"), "ends before"),
    "a size of 2^62": (patched(GOOD, 124, b"\x80\0\0\0" + (2**62).to_bytes(8, "big")), "ends before"),
    "a size of 2^90": (patched(GOOD, 124, b"\x80" + (2**85).to_bytes(11, "big")), "invalid number"),
    "a negative size": (patched(GOOD, 124, b"\xff" * 12), "invalid number"),
    "a size of letters": (patched(GOOD, 124, b"12345678901\0"), "invalid number"),
    "a folder with bytes": (patched(GOOD, 156, b"5"), "has 30 bytes"),
    "another layout": (tar_of(("oci-layout", b'{"imageLayoutVersion":"9"}'), INDEX), "of version '9'"),
    "a mark that is none": (tar_of(("oci-layout", b"x"), INDEX), "not valid JSON"),
    "no index": (tar_of(MARK), "no file index.json"),
    "a list as the index": (tar_of(MARK, ("index.json", b"[]")), "not a JSON object"),
    "no manifests": (tar_of(MARK, ("index.json", b"{}")), "not an image index"),
    "an entry that is a number": (tar_of(MARK, ("index.json", b'{"manifests":[1]}')), "not a descriptor"),
    "an entry with a path as its digest": (
        tar_of(MARK, ("index.json", b'{"manifests":[{"mediaType":"x","size":1,"digest":"../../x"}]}')),
        "not a digest",
    ),
    "an entry of no size": (
        tar_of(MARK, ("index.json", b'{"manifests":[{"mediaType":"x","size":-1,"digest":"x"}]}')),
        "no valid size",
    ),
    "annotations that are numbers": (
        tar_of(
            MARK,
            (
                "index.json",
                json.dumps(
                    {"manifests": [{"mediaType": "x", "size": 1, "digest": f"sha256:{HEX}", "annotations": {"a": 1}}]}
                ).encode(),
            ),
        ),
        "map of strings",
    ),
    "a name that writes to the terminal": (
        tar_of(
            MARK,
            (
                "index.json",
                json.dumps(
                    {
                        "manifests": [
                            {
                                "mediaType": "x",
                                "size": 1,
                                "digest": f"sha256:{HEX}",
                                "annotations": {"org.opencontainers.image.ref.name": "v1\x1b[2J"},
                            }
                        ]
                    }
                ).encode(),
            ),
        ),
        "is not a valid name",
    ),
    "two million empty things": (
        tar_of(MARK, ("index.json", b'{"manifests":[' + b"{}," * 2_000_000 + b"{}]}")),
        "too many values",
    ),
    "one name for two things": (
        tar_of(
            MARK,
            (
                "index.json",
                json.dumps(
                    {
                        "manifests": [
                            {
                                "mediaType": "x",
                                "size": 1,
                                "digest": f"sha256:{digit * 64}",
                                "annotations": {"org.opencontainers.image.ref.name": "v1"},
                            }
                            for digit in "ab"
                        ]
                    }
                ).encode(),
            ),
        ),
        "two manifests have the name",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_dishonest_archive_is_refused_by_name(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    (tmp_path / "x.tar").write_bytes(data)
    with LayoutArchive(tmp_path / "x.tar") as source, pytest.raises(FormatError) as caught:
        source.tags()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_times_and_owners_in_a_second_header_change_nothing(tmp_path: Path) -> None:
    extra = {"mtime": "1.5", "uname": "somebody", "uid": "7"}
    members = (odd("blobs/", tarfile.DIRTYPE), MARK, INDEX, odd("empty", tarfile.REGTYPE, **extra))
    (tmp_path / "x.tar").write_bytes(tar_of(*members, kind=tarfile.PAX_FORMAT))
    with LayoutArchive(tmp_path / "x.tar") as source:
        assert source.tags() == []


def test_so_many_members_are_no_archive_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_tar, "MAX_MEMBERS", 2)
    (tmp_path / "x.tar").write_bytes(GOOD)
    with LayoutArchive(tmp_path / "x.tar") as source, pytest.raises(FormatError, match="more than 2 members"):
        source.tags()


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


def test_names_beyond_ustar_are_written_in_a_way_that_tar_reads() -> None:
    for name in ("x" * 90, "a/" * 100 + "b", "é.md", "deep/" * 60 + "é"):
        file = io.BytesIO(archive_tar.header(name, 3) + b"abc" + archive_tar.padding(3) + archive_tar.END)
        with tarfile.open(fileobj=file) as tar:
            (member,) = tar.getmembers()
            assert (member.name, member.size, member.mtime) == (name, 3, 0)


def test_a_wrong_blob_in_a_folder_is_not_accepted(make: Make, run: Run, tmp_path: Path) -> None:
    manifest = oci_manifest.build(make())
    run("push", write_adapter(tmp_path / "adapter"), "oci:x:v1")
    blob = tmp_path / "x/blobs/sha256" / manifest.layers[0].digest[7:]
    blob.write_bytes(b"y" * blob.stat().st_size)
    run("pull", "oci:x:v1", "-o", "out", code=4)
    blob.unlink()
    run("pull", "oci:x:v1", "-o", "out", code=3)
    blob.symlink_to("/etc/passwd")
    run("pull", "oci:x:v1", "-o", "out", code=6)
    blob.unlink()
    os.mkfifo(blob)
    run("pull", "oci:x:v1", "-o", "out", code=6)
    assert not (tmp_path / "out").exists()
