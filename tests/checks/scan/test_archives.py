"""Archives are archives, however their members and directories are broken."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest

from adapterhub.checks.scan import archives, scan
from tests.checks.test_scan import codes
from tests.support import malicious


def test_a_zip_is_an_archive_however_its_members_are_broken(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.dat", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"hello")
    raw = bytearray((tmp_path / "a.dat").read_bytes())
    raw[35] = 0xFF  # LZMA's properties
    (tmp_path / "a.dat").write_bytes(raw)
    assert "archive" in codes(tmp_path / "a.dat")


def test_a_zip_is_not_read_by_a_second_directory_that_is_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_MAX_DIRECTORY", 1_000)
    member = struct.pack("<4s4B4H3L5H2L", b"PK\x01\x02", 20, 0, 20, *(0,) * 15)
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 100, 100, 4_600, 0)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 4_600, 1)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, len(member + end64 + locator), 0, 0)
    (tmp_path / "a.dat").write_bytes(member * 100 + end64 + locator + end)
    listed: list[int] = []

    def infolist(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
        listed.append(len(archive.filelist))
        return []

    monkeypatch.setattr(zipfile.ZipFile, "infolist", infolist)
    scan(tmp_path / "a.dat")
    assert not listed
    (tmp_path / "a.dat").write_bytes(malicious.zipped(a=b"x"))
    scan(tmp_path / "a.dat")
    assert listed == [1]
