"""Tar archives of layouts that lie are refused by name."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from adapterhub.remotes.layouts import archive_tar
from adapterhub.remotes.layouts.layout_archive import LayoutArchive
from adapterhub_converters.errors import FormatError
from tests.remotes.test_layout_archive import HEX


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
    archive = bytearray(data)
    archive[at : at + len(new)] = new
    archive[148:156] = b"        "
    archive[148:156] = b"%06o\0 " % sum(archive[:512])
    return bytes(archive)


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


def test_names_beyond_ustar_are_written_in_a_way_that_tar_reads() -> None:
    for name in ("x" * 90, "a/" * 100 + "b", "é.md", "deep/" * 60 + "é"):
        file = io.BytesIO(archive_tar.header(name, 3) + b"abc" + archive_tar.padding(3) + archive_tar.END)
        with tarfile.open(fileobj=file) as tar:
            (member,) = tar.getmembers()
            assert (member.name, member.size, member.mtime) == (name, 3, 0)
