"""A pack gives back what went in, byte for byte, whatever that was; and a hostile one gives one line."""

from __future__ import annotations

import io
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapterhub.store.packs import byte_planes, container, cutting, pack_chains
from adapterhub.store.store import Store
from adapterhub_converters import dtypes
from adapterhub_converters.containers import gguf_output, gguf_types, safetensors_file
from adapterhub_converters.errors import FormatError, NotFoundError, RefusedError

DIGEST = "sha256:" + "1" * 64


def pack(blob: bytes, parent: bytes | None = None, *, limit: int = cutting.MAX_BLOCK) -> bytes:
    """The pack of a blob, alone or against a parent."""
    reading = container.offset_reader(io.BytesIO(blob))
    runs, known = cutting.runs(reading, len(blob)), None
    if parent is not None:
        before = container.offset_reader(io.BytesIO(parent))
        runs, known = cutting.match_to_parent(runs, cutting.runs(before, len(parent))), (DIGEST, before)
    file = io.BytesIO()
    written = container.write(file, reading, len(blob), cutting.blocks(runs, limit), parent=known)
    assert written.size == len(file.getvalue())
    return file.getvalue()


def unpack(raw: bytes, parent: bytes | None = None) -> bytes:
    with container.PackReader(io.BytesIO(raw), "x.pack", None if parent is None else io.BytesIO(parent)) as reader:
        return reader.read()


# ---- what goes in comes out

DTYPES = [name for name in dtypes.BITS if dtypes.BITS[name] >= 8]


@st.composite
def tensors(draw: st.DrawFn) -> bytes:
    """A safetensors file of tensors of any type and any bits: NaNs with payloads, -0.0, none at all."""
    layout, data = [], b""
    for n in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(DTYPES))
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        size = dtypes.BITS[kind] // 8 * int(np.prod(shape))
        layout.append((f"t{n}", kind, shape))
        data += draw(st.sampled_from([bytes(size), b"\x80\xff\x7f" * size, draw(st.binary(min_size=size, max_size=size))]))[
            :size
        ]
    metadata = draw(st.dictionaries(st.text("ab"), st.text(max_size=9), max_size=2))
    return safetensors_file.header_bytes(layout, metadata) + data


@given(tensors() | st.binary(max_size=300), st.sampled_from([8, 64, cutting.MAX_BLOCK]))
@example(b"", 8)
@example(b"\x08\0\0\0\0\0\0\0{}      tail", 8)
def test_any_packed_blob_comes_back(blob: bytes, limit: int) -> None:
    assert unpack(pack(blob, limit=limit)) == blob


@given(tensors(), st.randoms(use_true_random=False), st.sampled_from([8, 64, cutting.MAX_BLOCK]))
def test_a_difference_to_a_parent_comes_back(parent: bytes, random: object, limit: int) -> None:
    rng = np.random.default_rng(random.randrange(2**32))  # type: ignore[attr-defined]
    child = bytearray(parent)
    for at in rng.integers(0, len(parent), 5):
        child[at] ^= 1 << rng.integers(8)
    assert unpack(pack(bytes(child), parent, limit=limit), parent) == child


@given(tensors(), tensors())
def test_a_difference_to_anything_comes_back(parent: bytes, child: bytes) -> None:
    assert unpack(pack(child, parent), parent) == child


@settings(max_examples=30)
@given(tensors(), st.data())
def test_any_part_can_be_read_at_its_offset(blob: bytes, data: st.DataObject) -> None:
    with container.PackReader(io.BytesIO(pack(blob, limit=16)), "x") as reader:
        for _ in range(5):
            offset, size = data.draw(st.integers(0, len(blob) + 5)), data.draw(st.integers(0, len(blob)))
            assert reader.read_at(offset, size) == blob[offset : offset + size]


@pytest.mark.parametrize("width", byte_planes.WIDTHS)
def test_every_bit_pattern_survives_either_coding(width: int) -> None:
    words = np.arange(65536, dtype=np.uint16).view(np.uint8)
    shuffled = np.random.default_rng(0).permutation(words)
    for parent in (None, shuffled):
        stored = [bytes(plane) for plane in byte_planes.encode(words, width, parent)]
        assert bytes(byte_planes.decode(stored, width, len(words) // width, parent)) == bytes(words)


def test_a_gguf_file_is_cut_at_its_tensors(tmp_path: Path) -> None:
    values = (np.random.default_rng(0).normal(size=(64, 512)) * 0.02).astype(np.float16)
    arrays: dict[str, np.ndarray | gguf_output.QuantizedTensor] = {"a.lora_a": values, "b.lora_b": values.astype(np.float32)}
    gguf_output.write(tmp_path / "x.gguf", {"general.architecture": gguf_types.MetadataValue("STRING", "llama")}, arrays)
    blob = (tmp_path / "x.gguf").read_bytes()
    found = {run.key[0]: run.width for run in cutting.runs(container.offset_reader(io.BytesIO(blob)), len(blob)) if run.key}
    assert found == {"a.lora_a": 2, "b.lora_b": 4}
    assert unpack(pack(blob)) == blob


# ---- it is smaller


def trained(kind: str, seed: int = 0, step: float = 0.0) -> bytes:
    """Factors as training leaves them: about normal, and a step later a little elsewhere."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(256, 1024)).astype(np.float32) * 0.02
    values += np.random.default_rng(seed + 1).normal(size=values.shape).astype(np.float32) * step
    return safetensors_file.header_bytes([("lora_A", kind, values.shape)], {}) + values.astype(dtypes.NUMPY[kind]).tobytes()


@pytest.mark.parametrize(("kind", "alone", "near"), [("BF16", 0.68, 0.30), ("F16", 0.87, 0.50), ("F32", 0.85, 0.65)])
def test_floats_shrink_and_a_near_parent_shrinks_them_more(kind: str, alone: float, near: float) -> None:
    parent, child = trained(kind), trained(kind, step=1e-4)
    assert len(pack(child)) < alone * len(child)
    assert len(pack(child, parent)) < near * len(child)


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    blob = np.random.default_rng(0).bytes(100_000)
    assert len(pack(blob)) < len(blob) + 200
    assert blob in pack(blob)


def test_a_tensor_that_moved_is_still_a_difference_to_itself() -> None:
    parent = trained("BF16")
    more = safetensors_file.header_bytes([("another", "BF16", (4, 4)), ("lora_A", "BF16", (256, 1024))], {}) + bytes(32)
    child = more + parent[-256 * 1024 * 2 :]
    assert len(pack(child, parent)) < 1000


# ---- hostile packs


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


def forged(entries: list[tuple[object, ...]], stored: bytes = b"", size: int | None = None, parent: bytes = bytes(32)) -> bytes:
    """A pack with the index that is given."""
    table = np.array(entries, container._ENTRY)
    index = byte_planes.deflate(table.tobytes())
    total = int(table["size"].sum()) if size is None else size
    head = struct.pack("<7sBQQII32s", b"ahpack\0", 1, total, 64 + len(stored), len(index), len(entries), parent)
    return head + stored + index


def entry(size: int, width: int = 1, lengths: tuple[int, ...] = (), **more: int) -> tuple[object, ...]:
    return size, width, more.get("delta", 0), more.get("zero", 0), more.get("parent", 0), (*lengths, *[0] * (8 - len(lengths)))


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


def test_a_pack_that_was_removed_is_not_found(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create()
    with pytest.raises(NotFoundError, match=rf"{DIGEST[7:]}: no such pack"), store.open_pack(DIGEST):
        pass


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


# ---- who needs whom


def test_parents_are_kept_and_go_last() -> None:
    parents = {"d": "c", "c": "b", "b": "a", "x": "a"}
    assert pack_chains.chain("d", parents) == ["c", "b", "a"]
    assert pack_chains.with_parents({"c", "y"}, parents) == {"a", "b", "c", "y"}
    assert pack_chains.children_first(["a", "b", "c", "d", "x"], parents) == ["d", "c", "b", "x", "a"]
    assert len(pack_chains.chain("p", {"p": "q", "q": "p"})) == 2  # a circle, which a hostile store may have, ends


def test_no_circle_and_no_long_chain() -> None:
    parents = {"d": "c", "c": "b", "b": "a"}
    assert pack_chains.may_follow("e", "d", parents)
    assert not pack_chains.may_follow("f", "e", {**parents, "e": "d"})
    assert not pack_chains.may_follow("a", "d", parents)
    assert not pack_chains.may_follow("a", "a", {})
    assert pack_chains.may_follow("a", "z", parents)
    assert not pack_chains.may_follow("a", "z", {**parents, "e": "d"})
