"""A pack gives any part of what went in, or says in one line what is wrong with it."""

from __future__ import annotations

import io
import struct
import tracemalloc
from collections.abc import Iterator

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.store.packs import container
from adapterhub_converters.errors import FormatError, RefusedError
from tests.store.test_packs import entry, forged, pack, tensors, trained, unpack


@settings(max_examples=30)
@given(tensors(), st.data())
def test_any_part_can_be_read_at_its_offset(blob: bytes, data: st.DataObject) -> None:
    with container.PackReader(io.BytesIO(pack(blob, limit=16)), "x") as reader:
        for _ in range(5):
            offset, size = data.draw(st.integers(0, len(blob) + 5)), data.draw(st.integers(0, len(blob)))
            assert reader.read_at(offset, size) == blob[offset : offset + size]


def damaged() -> Iterator[bytes]:
    """A pack with every byte of its head and index changed, and some of the rest; cut anywhere."""
    raw = pack(trained("BF16", step=1e-4), trained("BF16"))
    index = struct.unpack_from("<Q", raw, 16)[0]
    for at in (*range(64), *range(64, index, 9973), *range(index, len(raw))):
        for bit in (0, 7):
            yield raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :]
    for size in (0, 1, 63, 64, 65, index, len(raw) - 1):
        yield raw[:size]


def test_a_damaged_pack_is_one_line_or_other_bytes() -> None:
    """Other bytes have another digest, which every reader compares."""
    blob, parent = trained("BF16", step=1e-4), trained("BF16")
    outcomes = [outcome(raw, parent, blob) for raw in damaged()]
    # "same": the digest of the parent, which is the store's business, and bits of a zstd frame that mean nothing.
    assert outcomes.count("same") <= 64 + 8
    assert outcomes.count("error") > 100


def outcome(raw: bytes, parent: bytes, blob: bytes) -> str:
    """What reading a pack comes to; any other exception fails the test."""
    try:
        return "same" if unpack(raw, parent) == blob else "other"
    except (FormatError, RefusedError) as error:
        return "error" if "x.pack: " in str(error) else str(error)


BOMB = zstandard.ZstdCompressor(level=3).compress(bytes(100 << 20))


STREAM = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1000))


HOSTILE = {
    "a block of 4 GB": forged([entry(2**32 - 1, 1, (2**32 - 1,))]),
    "a block over the limit": forged([entry(2 << 20, 1, (2 << 20,))], bytes(2 << 20)),
    "a bomb in a plane": forged([entry(1 << 20, 1, (len(BOMB),))], BOMB),
    "a frame that does not say how long it is": forged([entry(1000, 1, (len(STREAM),))], STREAM),
    "no zstd at all": forged([entry(1000, 1, (10,))], b"0123456789"),
    "a width of 3": forged([entry(3, 3, (1, 1, 1))], b"abc"),
    "a plane longer than its numbers": forged([entry(4, 2, (3, 3))], b"abcdef"),
    "an empty plane": forged([entry(4, 2, (2, 0))], b"ab"),
    "half a word": forged([entry(3, 2, (1, 1))], b"ab"),
    "more planes than the width has": forged([entry(2, 1, (2, 2))], b"abcd"),
    "a size that the blocks do not have": forged([entry(2, 1, (2,))], b"ab", size=2**40),
    "planes that are not there": forged([entry(2, 1, (2,))], b""),
    "a difference without a parent": forged([entry(2, 1, (2,), delta=1)], b"ab"),
    "a difference beyond its parent": forged([entry(2, 1, (2,), delta=1, parent=2**40)], b"ab", parent=b"\1" * 32),
    "a reserved field": forged([entry(2, 1, (2,), zero=1)], b"ab"),
    "a block of nothing": forged([entry(0, 1, (0,))]),
    "another file": b"\x89PNG" + bytes(100),
    "an index of 4 billion blocks": struct.pack("<7sBQQII32s", b"ahpack\0", 1, 1, 64, 8, 2**32 - 1, bytes(32)) + bytes(8),
    "an index elsewhere": struct.pack("<7sBQQII32s", b"ahpack\0", 1, 1, 2**63, 8, 1, bytes(32)) + bytes(8),
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pack_is_one_line_and_little_memory(raw: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="x.pack: .*Check the registry"):
            unpack(raw, b"parent")
        assert tracemalloc.get_traced_memory()[1] < 60 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"PK" + bytes(100), "not a pack"),
        (b"ahpack\0", "not a pack"),
        (b"ahpack\0\0" + bytes(56), "the head of the pack is invalid"),
        (pack(b"x" * 5000)[:-1], "a damaged pack: truncated"),
        (forged([entry(1, 1, (1,), delta=1)], b"a"), "a damaged pack: its index is invalid"),
        (
            forged([entry(1, 1, (1,), delta=1)], b"a", parent=b"\1" * 32),
            "a damaged pack: block 0: its difference needs bytes beyond the end of the parent",
        ),
    ],
)
def test_what_is_wrong_with_a_pack_is_told(raw: bytes, words: str) -> None:
    with pytest.raises(FormatError) as error:
        unpack(raw)
    assert str(error.value) == f"x.pack: {words}. Check the registry"
    assert error.value.code == "check-registry"


def test_a_pack_of_a_newer_program_is_refused_by_name() -> None:
    raw = bytearray(pack(b"x"))
    raw[7] = 2
    with pytest.raises(RefusedError, match="pack version 2 is newer than the 1 known here. Upgrade adapterhub"):
        unpack(bytes(raw))


@given(st.binary(max_size=200))
def test_noise_is_one_line(raw: bytes) -> None:
    with pytest.raises(FormatError):
        unpack(raw)
    with pytest.raises(FormatError):
        unpack(pack(b"x" * 5000)[:64] + raw)
