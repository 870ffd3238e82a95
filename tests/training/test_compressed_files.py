"""Compressed data mean what is in them, and neither a damaged file nor a bomb is read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from adapterhub.digest import sha256_bytes
from adapterhub.training.data import compressed_files, document_files
from adapterhub_converters.errors import FormatError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
LINES = "".join(json.dumps({"text": f"{number} apples"}) + "\n" for number in range(2000)).encode()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_means_what_is_in_it(suffix: str, tmp_path: Path) -> None:
    """In one piece or in several, as programs that compress in parallel write them."""
    contents = {
        "a.jsonl": LINES,
        "a.json": b"[%s]" % b",".join(LINES.splitlines()),
        "a.csv": b"text\n" + b"some apples\n" * 2000,
    }
    for name, raw in contents.items():
        (tmp_path / name).write_bytes(raw)
        path = tmp_path / f"{name}{suffix}"
        for stored in (COMPRESS[suffix](raw), COMPRESS[suffix](raw[:5000]) + COMPRESS[suffix](raw[5000:])):
            path.write_bytes(stored)
            plain, compressed = document_files.read(tmp_path / name), document_files.read(path)
            assert [document.record for document in compressed.documents] == [document.record for document in plain.documents]
            assert (compressed.digest, compressed.size) == (sha256_bytes(stored), len(stored))
        path.write_bytes(COMPRESS[suffix](b"\n{\n" if name != "a.csv" else b'text\n"\n'))
        with pytest.raises(FormatError, match=f"{path}"):
            document_files.read(path)
    (tmp_path / "folder").mkdir()
    for number in range(2):
        (tmp_path / "folder" / f"train-{number}.jsonl{suffix}").write_bytes(COMPRESS[suffix](LINES))
    assert len(document_files.read(tmp_path / "folder").documents) == 4000


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_file_is_refused(suffix: str, tmp_path: Path) -> None:
    stored = COMPRESS[suffix](LINES)
    for damaged in (b"", stored[:-3], stored[: len(stored) // 2], LINES, stored + b"more"):
        (tmp_path / f"a.jsonl{suffix}").write_bytes(damaged)
        with pytest.raises(FormatError, match=rf"a.jsonl\{suffix}: not a whole \{suffix} file \("):
            document_files.read(tmp_path / f"a.jsonl{suffix}")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_refused_before_it_is_unpacked(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compressed_files, "_ALWAYS_ALLOWED", 1 << 20)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](b" " * (64 << 20)))
    with pytest.raises(FormatError, match=r"its [\d,]+ bytes unpack to more than [\d,]+"):
        document_files.read(path)
