"""GGUF files: what is written is read, what is malformed is refused at once, and gguf-py agrees."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters.containers import gguf_file, gguf_output, gguf_types
from adapterhub_converters.containers.gguf_file import GGUFFile, GGUFHeader
from adapterhub_converters.containers.gguf_types import MetadataValue
from adapterhub_converters.errors import FormatError
from tests.conftest import need_module

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.int64]


def read(raw: bytes) -> GGUFHeader:
    return gguf_file.read_header(lambda offset, n: raw[offset : offset + n], len(raw), "x.gguf")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(n_tensors: int = 0, n_keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def key(name: str, kind: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + raw


def tensor(name: str, dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(*tensors: bytes, keys: tuple[bytes, ...] = (), data: int = 64) -> bytes:
    raw = header(len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    return raw + bytes(-len(raw) % 32 + data)


NAMES = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=15)
SCALARS = {
    "UINT8": st.integers(0, 255),
    "INT16": st.integers(-(2**15), 2**15 - 1),
    "UINT32": st.integers(0, 2**32 - 1),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "FLOAT32": st.floats(width=32, allow_nan=False),
    "FLOAT64": st.floats(allow_nan=False),
    "BOOL": st.booleans(),
    "STRING": st.text(max_size=30),
}
VALUES = st.sampled_from(sorted(SCALARS)).flatmap(
    lambda kind: (
        SCALARS[kind].map(lambda value: MetadataValue(kind, value))
        | st.lists(SCALARS[kind], max_size=8).map(lambda values: MetadataValue(f"[{kind}]", values))
    )
)
ARRAYS = st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 100)).map(
    lambda parts: np.random.default_rng(parts[2]).integers(0, 100, parts[1]).astype(parts[0])
)


@given(
    metadata=st.dictionaries(NAMES.filter(lambda name: name != "general.alignment"), VALUES, max_size=6),
    tensors=st.dictionaries(NAMES, ARRAYS, max_size=6),
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, MetadataValue], tensors: dict[str, np.ndarray]
) -> None:
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    gguf_output.write(path, metadata, tensors)
    with GGUFFile(path) as opened:
        assert opened.header.kinds == {key: value.kind for key, value in metadata.items()}
        assert list(opened.tensors) == list(tensors)
        for name, value in metadata.items():
            assert np.array_equal(opened.header.metadata[name], value.value)
        for name, array in tensors.items():
            again = opened.tensor(name)
            assert (again.dtype, again.shape, again.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not a GGUF file"),
        (b"GGML" + bytes(40), "not a GGUF file"),
        (header(version=1), "GGUF version 1 is not read"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "GGUF big-endian is not read"),
        # These 49 bytes make gguf-py 0.19 loop and allocate forever.
        (header(0, 1) + key("a", 9, struct.pack("<IQ", 8, 2**63)), "truncated: key 'a' takes 73786976294838206464 bytes"),
        (header(0, 1) + key("a", 9, struct.pack("<IQ", 4, 2**62)), "truncated: key 'a' takes 18446744073709551616 bytes"),
        (header(0, 1) + key("a", 8, struct.pack("<Q", 2**60)), "is over the limit of 100000000"),
        (header(0, 1) + key("a", 8, struct.pack("<Q", 1000)), "truncated: key 'a' takes 1000 bytes"),
        (header(2**40, 0), "tensors are over the limit of 1000000"),
        (header(0, 2**60), "truncated: a header of"),
        (header(1000, 0), "truncated: a header of"),
        (header(0, 1) + key("a", 9, struct.pack("<IQ", 9, 1)), "key 'a' is an array of arrays"),
        (header(0, 1) + key("a", 99, bytes(8)), "key 'a' has the unknown type 99"),
        (header(0, 1) + key("a", 7, b"\2"), "neither 0 nor 1"),
        (header(0, 1) + key("a", 8, struct.pack("<Q", 1) + b"\xff"), "key 'a' is not UTF-8"),
        (header(0, 1) + key("a", 9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", 1) + b"\xff"), "key 'a' is not UTF-8"),
        (file(keys=(key("a", 0, b"\0"), key("a", 0, b"\0"))), "key 'a' is empty or duplicate"),
        (file(keys=(key("general.alignment", 4, struct.pack("<I", 0)),)), "general.alignment 0 is not a power"),
        (file(keys=(key("general.alignment", 4, struct.pack("<I", 48)),)), "general.alignment 48 is not a power"),
        (file(keys=(key("general.alignment", 4, struct.pack("<I", 2**31)),)), "is not a power of two up to"),
        (file(keys=(key("general.alignment", 10, struct.pack("<Q", 32)),)), "general.alignment is not a UINT32"),
        (file(tensor("t"), tensor("t", offset=32)), "tensor 't' is duplicate"),
        (file(tensor("t"), tensor("u")), "overlaps the one before it"),
        (file(tensor("t", offset=4)), "does not begin at a multiple of 32"),
        (file(tensor("t", dims=(2**40,))), "truncated: tensor 't' ends at byte"),
        (file(tensor("t", dims=(2**32, 2**32))), "tensor 't' is too large for any file"),
        (file(tensor("t", dims=(2**63, 0))), "tensor 't' is too large for any file"),
        (file(tensor("t", dims=(1,) * 5)), "has 5 dimensions, more than 4"),
        (file(tensor("t", kind=4)), "has the unknown type 4"),
        (file(tensor("t", dims=(33,), kind=8)), "rows of 33 are not whole blocks of Q8_0 (32)"),
        (file(tensor("t" * 65)), "a tensor's name of 65 bytes is over the limit"),
        (file(tensor("a\nb")), "is empty or unprintable"),
        (file(tensor("t"), data=0), "truncated: tensor 't' ends"),
    ],
)
def test_malformed_files_are_refused_in_one_line(raw: bytes, says: str) -> None:
    with pytest.raises(FormatError) as caught:
        read(raw)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


GOOD = file(
    tensor("a", (4, 2)),
    tensor("b", (32,), 8, 32),
    keys=(
        key("general.architecture", 8, text("llama")),
        key("l", 9, struct.pack("<IQ", 8, 2) + text("x") + text("é")),
        key("n", 9, struct.pack("<IQ", 5, 3) + bytes(12)),
        key("f", 6, bytes(4)),
    ),
    data=80,
)


@given(st.data())
def test_mutated_files_are_valid_or_refused(data: st.DataObject) -> None:
    raw = bytearray(GOOD[: data.draw(st.integers(0, len(GOOD)))] if data.draw(st.booleans()) else GOOD)
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        read(bytes(raw))


def test_a_large_vocabulary_reads_fast_and_in_few_pieces(tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    vocabulary = [f"token{n}" * (n % 5) for n in range(100_000)]
    gguf_output.write(path, {"tokenizer.ggml.tokens": gguf_types.strings_value(vocabulary)}, {})
    raw, reads = path.read_bytes(), []

    def read_at(offset: int, n: int) -> bytes:
        reads.append(n)
        return raw[offset : offset + n]

    assert gguf_file.read_header(read_at, len(raw), "v").metadata["tokenizer.ggml.tokens"] == vocabulary
    assert len(reads) <= len(raw) // (1 << 20) + 2


@pytest.mark.peer
def test_gguf_py_reads_what_we_wrote(tmp_path: Path) -> None:
    need_module("gguf")
    from gguf import GGUFReader

    rng = np.random.default_rng(0)
    tensors = {f"t{n}": rng.integers(0, 9, (3, 2 + n)).astype(dtype) for n, dtype in enumerate(DTYPES)}
    metadata = {
        "s": gguf_types.string_value("é"),
        "f": gguf_types.f32_value(1.5),
        "l": gguf_types.strings_value(["a", ""]),
        "u": gguf_types.u32_value(7),
    }
    gguf_output.write(tmp_path / "x.gguf", metadata, tensors)
    reader = GGUFReader(tmp_path / "x.gguf")
    assert {key: reader.fields[key].contents() for key in metadata} == {key: value.value for key, value in metadata.items()}
    for tensor in reader.tensors:
        assert np.asarray(tensor.data).tobytes() == tensors[tensor.name].tobytes()
        assert [int(dim) for dim in tensor.shape] == list(tensors[tensor.name].shape[::-1])


@pytest.mark.peer
def test_we_read_what_gguf_py_wrote(tmp_path: Path) -> None:
    need_module("gguf")
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    weights = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_custom_alignment(64)
    packed = {kind: quants.quantize(weights, GGMLQuantizationType[kind]) for kind in ("Q4_0", "Q4_1", "Q8_0", "BF16")}
    for kind, array in packed.items():
        writer.add_tensor(kind, array, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "x.gguf") as opened:
        for kind, array in packed.items():
            expected = quants.dequantize(array, GGMLQuantizationType[kind])
            assert np.array_equal(opened.tensor(kind).astype(np.float32), expected)
            assert (opened.tensors[kind].type_name, opened.tensors[kind].shape) == (kind, (4, 64))
