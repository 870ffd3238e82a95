"""Headers of safetensors files: any spelling of the same JSON is read, and malformed ones are refused at once."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapterhub_converters.containers import safetensors_header
from adapterhub_converters.containers.safetensors_header import SafetensorsHeader
from adapterhub_converters.errors import FormatError


def read(raw: bytes) -> SafetensorsHeader:
    return safetensors_header.read_header(lambda offset, n: raw[offset : offset + n], len(raw), "x.safetensors")


def file(header: object, data: int = 0) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BASE = {"t": entry()}
TWICE = json.dumps(BASE).encode()[:-1]  # without the last }


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "0 bytes are fewer than its length field needs"),
        (b"1234567", "7 bytes are fewer"),
        ((2**63).to_bytes(8, "little"), "header of 9223372036854775808 bytes is over the limit"),
        ((100).to_bytes(8, "little") + b"{}", "truncated: the header takes 100 bytes, the file has 2 left"),
        (file(b" {}"), "the header does not start with {"),
        (file(b'{"\xff":{}}'), "the header is not UTF-8"),
        (file(b"{"), "not valid JSON"),
        (file(b"{}{}"), "something follows the object"),
        (file(b"{},"), "something follows the object"),
        (file(b"\xef\xbb\xbf{}"), "the header does not start with {"),
        (file(b'{"a":' + b"[" * 100_000), "tensor 'a' does not have exactly dtype, shape and data_offsets, but '[[["),
        (file(TWICE + b"," + TWICE[1:] + b"}", 8), "duplicate key 't'"),
        (file(TWICE + b',"t":{}}', 8), "duplicate key 't'"),
        (file(TWICE + rb',"\u0074":{}}', 8), "duplicate key 't'"),
        (file(TWICE + b",}", 8), "not valid JSON at byte 61 of the header: '}'"),
        (file(TWICE[:-1] + b',"dtype":"I32"}}', 8), 'but \'{"dtype": "F32"'),
        (file(b'{"t":{"dtype":"F32","shape":[],"shape":[]}}', 8), "does not have exactly dtype, shape and data_offsets"),
        (file(b'{"__metadata__":{"a":"","a":""}}'), "duplicate key 'a'"),
        (file(b'{"__metadata__":{},"__metadata__":{}}'), "duplicate key '__metadata__'"),
        (file({"t": 1}), "does not have exactly dtype, shape and data_offsets"),
        (file({"t": entry() | {"more": 1}}, 8), "does not have exactly dtype, shape and data_offsets"),
        (file({"t": entry("F99")}, 8), "has an unknown dtype 'F99'"),
        (file({"t": entry(["F32"])}, 8), "does not have exactly dtype, shape and data_offsets"),
        (file({"t": entry(shape=[-2])}, 8), "does not have exactly dtype, shape and data_offsets"),
        (file({"t": entry(shape=[True, 2])}, 8), "does not have exactly dtype, shape and data_offsets"),
        (file(json.dumps({"t": entry()}).encode().replace(b"[2]", b"[02]"), 8), "has a malformed shape"),
        (file(json.dumps({"t": entry()}).encode().replace(b"[2]", b"[1,,2]"), 8), "has a malformed shape"),
        (file({"t": entry(shape=[2**63])}, 8), "has a malformed shape"),
        (file({"t": entry(shape=[2**62, 2**62, 16])}, 8), "is not the 8 bytes of its offsets"),
        (file({"t": entry(shape=[1] * 17)}, 8), "has a malformed shape"),
        (file({"t": entry(offsets=[0])}, 8), "does not have exactly dtype, shape and data_offsets"),
        (file({"t": entry(offsets=[0.0, 8])}, 8), "does not have exactly dtype, shape and data_offsets"),
        (file({"t": entry(offsets=[8, 0])}, 8), "is not the -8 bytes of its offsets"),
        (file({"t": entry(), "u": entry()}, 16), "overlaps the one before it"),
        (file({"t": entry(offsets=[8, 16])}, 16), "leaves a hole before it"),
        (file(BASE, 4), "truncated: the tensors end at byte"),
        (file(BASE, 9), "1 bytes follow the last tensor"),
        (file({"": entry()}, 8), "is empty, too long or unprintable"),
        (file({"a\0b": entry()}, 8), "is empty, too long or unprintable"),
        (file({"n" * 2000: entry()}, 8), "is empty, too long or unprintable"),
        (file({"__metadata__": {"a": 1}}), "__metadata__ is not a map of strings to strings"),
        (file({"__metadata__": []}), "__metadata__ is not a map of strings to strings"),
        (file(b'{"t":NaN}'), "does not have exactly dtype, shape and data_offsets, but 'NaN}'"),
        (file(b'{"t":' + b"9" * 5000 + b"}"), "does not have exactly dtype, shape and data_offsets"),
        (file(b'{"t":1e400}'), "does not have exactly dtype, shape and data_offsets"),
        (file(rb'{"\ud800":{}}'), "not valid JSON"),
        (file(rb'{"__metadata__":{"a":"\ud800"}}'), "not valid JSON"),
        (file(rb'{"__metadata__":{"a":"\q"}}'), "not valid JSON"),
        (file(b'{"__metadata__":{"a":"\n"}}'), "is not a map of strings"),
        (file({"t": entry("F4", [3], [0, 1])}, 1), "does not end with a whole byte"),
    ],
)
def test_malformed_files_are_refused_in_one_line(raw: bytes, says: str) -> None:
    with pytest.raises(FormatError) as caught:
        read(raw)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metadata_may_be_null_as_mlx_writes_it() -> None:
    assert read(file({"__metadata__": None, "t": entry()}, 8)).metadata == {}


GOOD = file({"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("F16", [2, 3], [8, 20])}, 20)


@given(st.data())
def test_mutated_files_are_valid_or_refused(data: st.DataObject) -> None:
    raw = bytearray(GOOD[: data.draw(st.integers(0, len(GOOD)))] if data.draw(st.booleans()) else GOOD)
    for _ in range(data.draw(st.integers(0, 4))):
        if raw:
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):
        read(bytes(raw))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_any_json_is_valid_or_refused(document: object) -> None:
    with contextlib.suppress(FormatError):
        read(file({"t": document} if not isinstance(document, dict) else document, 8))


def test_a_header_is_the_same_however_its_json_is_spaced_ordered_and_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = (
        b'{ "b" :\t{"data_offsets": [ 8 , 20 ] , "shape":[ 2,\n3 ], "dtype" : "F16" } ,\r\n'
        rb'"\u0061":{"shape":[2],"dtype":"F32","data_offsets":[0,8]},"__metadata__":{"form\u0061t":"pt"}}   '
    )
    expected = [("a", "F32", (2,), 8), ("b", "F16", (2, 3), 12)]
    for piece in (1, 7, 64, 1_000):  # bytes read at once
        monkeypatch.setattr(safetensors_header, "_READ_SIZE", piece)
        header = read(file(spaced, 20))
        assert [(info.name, info.dtype, info.shape, info.size) for info in header.tensors.values()] == expected
        assert header.metadata == {"format": "pt"}


def test_an_empty_header_is_read_whole_or_not() -> None:
    assert read(file(b"{}")) == SafetensorsHeader([], [], {}, 10)
    assert read(file(b"{ }  ")) == SafetensorsHeader([], [], {}, 13)


@given(st.text(max_size=20), st.integers(1, 5))
def test_escaped_metadata_is_the_same_in_pieces_of_any_length(text: str, length: int) -> None:
    escaped = json.dumps(text).encode()
    pieces = safetensors_header._ESCAPED.pattern.replace("100000", str(length))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors_header, "_ESCAPED", re.compile(pieces))
        assert read(file(b'{"__metadata__":{"a":%b}}' % escaped)).metadata == {"a": text}
