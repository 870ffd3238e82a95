"""Headers that strangers write: whatever is in them, reading takes memory in proportion to their size."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("resource")

SIZE = 8_000_000  # bytes of a header
# Each case is a header that begins with the first bytes, repeats the second, and ends with the third.
DENSE = {
    "objects": (b'{"a":[', b"{},", b"{}]}"),
    "objects without a key": (b"{", b"{},", b"{}}"),
    "lists in lists": (b'{"a":', b"[", b"}"),
    "objects in objects": (b"", b'{"a":', b"}"),
    "zeros": (b'{"a":[', b"0,", b"0]}"),
    "digits": (b'{"a":', b"9", b"}"),
    "digits of an offset": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,', b"9", b"]}}"),
    "dimensions": (b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[', b"1,", b"0]}}"),
    "spaces": (b"{", b" ", b"}x"),
    "one name": (b'{"', b"a", b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "backslashes": (b'{"', rb"\\", b'":{}}'),
    "a name without an end": (b'{"', b"a", b""),
    "the same tensor": (b"{", b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},', b'"b":{}}'),
    "texts of metadata": (b'{"__metadata__":{"', b"a", b'":1}}'),
    "the same key of metadata": (b'{"__metadata__":{', b'"":"",', b'"a":"b"}}'),
    "objects of metadata": (b'{"__metadata__":{"a":[', b"{},", b"{}]}}"),
    "trailing bytes": (b"{}", b"x", b""),
    "numbers too large for a float": (b'{"a":[', b"1e400,", b"0]}"),
    "halves of characters": (b'{"', rb"\ud800", b'":{}}'),
    "halves of characters in metadata": (b'{"__metadata__":{"a":"', rb"\ud800", b'"}}'),
    "backslashes in metadata": (b'{"__metadata__":{"a":"', rb"\\", b'"},"":{}}'),
    "byte order marks": (b"", b"\xef\xbb\xbf", b""),
}  # fmt: skip


def memory_to_read(path: Path) -> tuple[int, str]:
    """The bytes by which reading a header raises the peak of a process, and what was said."""
    program = """
import os, resource, sys
from pathlib import Path
from adapterhub_converters.containers import gguf_file, safetensors_header
from adapterhub_converters.errors import FormatError
def peak():
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # ru_maxrss would include what the parent had at its peak.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
file = open(sys.argv[1], "rb")
read = gguf_file.read_header if sys.argv[1].endswith("gguf") else safetensors_header.read_header
def read_at(offset, n):
    file.seek(offset)
    return file.read(n)
before = peak()
try:
    print(len(read(read_at, os.fstat(file.fileno()).st_size, "x").tensors), "tensors")
except FormatError as error:
    print(error)
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    *output_lines, grown = result.stdout.splitlines()
    assert len(output_lines) == 1
    return int(grown), output_lines[0]


def framed(header: bytes, data: int = 0) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(data)


@pytest.mark.parametrize("kind", DENSE)
def test_a_dense_header_is_refused_in_memory_linear_in_its_size(kind: str, tmp_path: Path) -> None:
    start, repeated, end = DENSE[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(framed(start + repeated * (SIZE // len(repeated)) + end))
    grown, output = memory_to_read(path)
    assert output.startswith("x: ")
    assert len(output) < 400
    assert grown < 5 * SIZE


def entries(count: int) -> Iterator[str]:
    """Tensors of an adapter with experts, by names as long as real ones."""
    for n in range(count):
        name = f"base_model.model.model.layers.{n // 512}.mlp.experts.{n // 2 % 256}.up_proj.lora_{'AB'[n % 2]}.weight"
        yield f'"{name}":{{"dtype":"BF16","shape":[1,1],"data_offsets":[{2 * n},{2 * n + 2}]}}'


def test_a_good_header_is_read_in_memory_linear_in_its_size(tmp_path: Path) -> None:
    count = 100_000
    header = ("{" + ",".join(entries(count)) + "}").encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(framed(header, 2 * count))
    grown, output = memory_to_read(path)
    assert output == f"{count} tensors"
    assert grown < 4 * len(header)


LIMITS = {
    "tensors": (
        lambda n: f'"{n:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 500_001, "more than 500000 tensors"
    ),
    "shapes": (
        lambda n: f'"{n:x}":{{"dtype":"U8","shape":[0,{n}],"data_offsets":[0,0]}}', 65_537, "more than 65536 different shapes"
    ),
    "metadata": (
        lambda n: ('"__metadata__":{' if not n else "") + f'"{n:x}":""', 65_537, "more than 65536 keys in __metadata__"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIMITS)
def test_a_limit_is_named_where_a_header_is_over_it(kind: str, tmp_path: Path) -> None:
    entry, count, says = LIMITS[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(framed(("{" + ",".join(map(entry, range(count))) + "}").encode()))
    grown, output = memory_to_read(path)
    assert says in output
    assert grown < 400_000_000


def gguf(keys: int, pairs: bytes, tensors: int = 0, infos: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + pairs + infos


def packed(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def many_keys() -> bytes:
    return gguf(100_001, b"".join(packed(b"%x" % n) + struct.pack("<IB", 0, 0) for n in range(100_001)))


def many_texts() -> bytes:
    return gguf(1, packed(b"a") + struct.pack("<IIQ", 9, 8, 4_000_001) + packed(b"ab") * 4_000_001)


def many_tensors() -> bytes:
    return gguf(0, b"", 1_000_001)


def one_name() -> bytes:
    return gguf(0, b"", 500_000, (packed(b"a") + struct.pack("<IQIQ", 1, 0, 0, 0)) * 500_000 + bytes(32))


GGUF_LIMITS = {
    "100001 keys": many_keys,
    "4000001 texts in arrays": many_texts,
    "1000001 tensors": many_tensors,
    "is duplicate": one_name,
}


@pytest.mark.parametrize("says", GGUF_LIMITS)
def test_a_gguf_header_over_a_limit_is_refused_by_name(says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(GGUF_LIMITS[says]())
    grown, output = memory_to_read(path)
    assert says in output
    assert grown < 300_000_000


def test_a_header_over_the_limit_of_bytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        os.truncate(file.fileno(), 200_000_000)
    grown, output = memory_to_read(path)
    assert "over the limit of 100000000" in output
    assert grown < 1_000_000
