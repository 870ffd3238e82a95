"""A pack gives back what went in, byte for byte, whatever that was; and a hostile one gives one line."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from adapterhub.store.packs import byte_planes, container, cutting, pack_chains
from adapterhub_converters import dtypes
from adapterhub_converters.containers import safetensors_header

DIGEST = "sha256:" + "1" * 64


def pack(blob: bytes, parent: bytes | None = None, *, limit: int = cutting.MAX_BLOCK) -> bytes:
    """The pack of a blob, alone or against a parent."""
    reading = container.offset_reader(io.BytesIO(blob))
    runs, parent_source = cutting.runs(reading, len(blob)), None
    if parent is not None:
        before = container.offset_reader(io.BytesIO(parent))
        runs, parent_source = cutting.match_to_parent(runs, cutting.runs(before, len(parent))), (DIGEST, before)
    file = io.BytesIO()
    written = container.write(file, reading, len(blob), cutting.blocks(runs, limit), parent=parent_source)
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
    return safetensors_header.header_bytes(layout, metadata) + data


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


# ---- it is smaller


def trained(kind: str, seed: int = 0, step: float = 0.0) -> bytes:
    """Factors as training leaves them: about normal, and a step later a little elsewhere."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(256, 1024)).astype(np.float32) * 0.02
    values += np.random.default_rng(seed + 1).normal(size=values.shape).astype(np.float32) * step
    return safetensors_header.header_bytes([("lora_A", kind, values.shape)], {}) + values.astype(dtypes.NUMPY[kind]).tobytes()


@pytest.mark.parametrize(("kind", "alone", "near"), [("BF16", 0.68, 0.30), ("F16", 0.87, 0.50), ("F32", 0.85, 0.65)])
def test_floats_shrink_and_a_near_parent_shrinks_them_more(kind: str, alone: float, near: float) -> None:
    parent, child = trained(kind), trained(kind, step=1e-4)
    assert len(pack(child)) < alone * len(child)
    assert len(pack(child, parent)) < near * len(child)


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    blob = np.random.default_rng(0).bytes(100_000)
    assert len(pack(blob)) < len(blob) + 200
    assert blob in pack(blob)


# ---- hostile packs


def forged(entries: list[tuple[object, ...]], stored: bytes = b"", size: int | None = None, parent: bytes = bytes(32)) -> bytes:
    """A pack with the index that is given."""
    table = np.array(entries, container._ENTRY)
    index = byte_planes.deflate(table.tobytes())
    total = int(table["size"].sum()) if size is None else size
    head = struct.pack("<7sBQQII32s", b"ahpack\0", 1, total, 64 + len(stored), len(index), len(entries), parent)
    return head + stored + index


def entry(size: int, width: int = 1, lengths: tuple[int, ...] = (), **fields: int) -> tuple[object, ...]:
    return (
        size,
        width,
        fields.get("delta", 0),
        fields.get("zero", 0),
        fields.get("parent", 0),
        (*lengths, *[0] * (8 - len(lengths))),
    )


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
