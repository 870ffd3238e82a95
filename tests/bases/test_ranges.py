"""Files read by ranges: the bytes of the file or a refusal in one line, whatever the server answers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterhub.bases.ranges import RangeClient, WebFile
from adapterhub_converters.bases import read_base
from adapterhub_converters.containers import gguf_file
from adapterhub_converters.errors import AdapterhubError, FormatError, RemoteError
from tests.bases.test_remote_base import gguf, model, read, same
from tests.support.web_server import Handler, Web


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


@settings(max_examples=40, deadline=None)
@given(
    st.binary(min_size=1, max_size=3000),
    st.lists(st.tuples(st.integers(0, 3200), st.integers(0, 3200)), max_size=8),
    st.integers(1, 200),
    st.integers(0, 200),
    st.booleans(),
)
def test_any_reads_of_a_file_are_those_of_its_bytes(
    data: bytes, reads: list[tuple[int, int]], first: int, ahead: int, ranges: bool
) -> None:
    with Web() as web:
        web.rules["/x"] = lambda to: to.file(data) if ranges else to.send(200, data)
        file = WebFile(RangeClient(), f"{web.url}/x", "x", first=first, ahead=ahead)
        assert file.size == len(data)
        for offset, n in reads:
            assert file.read_at(offset, n) == data[offset : offset + n]


def times(count: int, first: Callable[[Handler], None], data: bytes) -> Callable[[Handler], None]:
    """`first` so many times, then the file."""
    failures_left = [count]

    def rule(to: Handler) -> None:
        failures_left[0] -= 1
        if failures_left[0] >= 0:
            first(to)
        else:
            to.file(data)

    return rule


def cut(to: Handler) -> None:
    """Promise more than is sent, and hang up."""
    to.send(206, b"12345", **{"Content-Length": "1000", "Content-Range": "bytes 0-999/5000"})
    to.close_connection = True


@pytest.mark.parametrize("first", [cut, lambda to: to.send(503), lambda to: to.send(429, **{"Retry-After": "0"})])
def test_what_may_go_better_next_time_is_tried_again(web: Web, tmp_path: Path, first: Callable[[Handler], None]) -> None:
    path = gguf(tmp_path / "g")
    web.rules["/m.gguf"] = times(2, first, path.read_bytes())
    same(read(f"{web.url}/m.gguf"), read_base(path))
    web.rules["/m.gguf"] = times(3, first, path.read_bytes())
    with pytest.raises(RemoteError, match=r"\(3 tries\)"):
        read(f"{web.url}/m.gguf")


def test_a_server_without_ranges_is_read_no_further_than_the_header(web: Web, tmp_path: Path) -> None:
    path = gguf(tmp_path / "g")
    data = path.read_bytes() + bytes(200 << 20)
    with gguf_file.GGUFFile(path) as file:
        header = file.header.data_start
    web.rules["/m.gguf"] = lambda to: to.send(200, data)
    spec = read(f"{web.url}/m.gguf")
    assert spec.tensors == read_base(path).tensors
    assert spec.fetched is not None
    assert header < spec.fetched < 8 * header


def test_distant_parts_are_not_read_from_a_server_without_ranges(web: Web, tmp_path: Path) -> None:
    header = {
        "a.weight": {"dtype": "U8", "shape": [8 << 30, 1], "data_offsets": [0, 8 << 30]},
        "a.weight.quant_state.bitsandbytes__nf4": {"dtype": "U8", "shape": [2], "data_offsets": [8 << 30, (8 << 30) + 2]},
    }
    raw = json.dumps(header).encode()
    size, body = str(8 + len(raw) + (8 << 30) + 2), struct.pack("<Q", len(raw)) + raw + bytes(1 << 20)
    web.rules["/m.safetensors"] = lambda to: to.send(200, body, **{"Content-Length": size})
    with pytest.raises(RemoteError, match="the server supports no ranges, and 8589934"):
        read(f"{web.url}/m.safetensors")


def lying(data: bytes, **changes: Any) -> Callable[[Handler], None]:
    """Answers of 206 with these headers and five bytes, or `body`; the file itself to the first request if `later`."""
    request_count = [0]

    def rule(to: Handler) -> None:
        request_count[0] += 1
        if changes.get("later") and request_count[0] == 1:
            to.file(data)
            return
        headers = {key.replace("_", "-"): value for key, value in changes.items() if key not in ("later", "body")}
        to.send(206, changes.get("body", data[:5]), **{"ETag": '"x"', **headers})

    return rule


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "a part of a file with an invalid Content-Range ('')"),
        ({"Content_Range": "bytes 0-4/*"}, "with an invalid Content-Range"),
        ({"Content_Range": "bytes 1-5/5000000"}, "bytes 1 to 5 of 5000000 received, 0 to"),
        ({"Content_Range": "bytes 0-4/5000000"}, "bytes 0 to 4 of 5000000 received"),
        ({"Content_Range": "bytes 0-9/10"}, "5 bytes received for bytes 0 to 9"),
        ({"Content_Range": "bytes 0-3/4"}, "5 bytes received for bytes 0 to 3"),
        ({"later": True, "Content_Range": "bytes 0-4/5"}, "changed while it was read"),
        ({"Content_Encoding": "gzip", "Content_Range": "bytes 0-4/5"}, "compressed"),
        ({"Content_Range": "bytes 0-4/5"}, "not a GGUF file"),
        ({"Content_Range": "bytes 0-23/24", "body": b"GGUF" + struct.pack("<IQQ", 3, 2**40, 1)}, "over the limit of"),
    ],
)
def test_a_dishonest_server_is_refused_in_one_line(web: Web, tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    web.rules["/m.gguf"] = lying(gguf(tmp_path / "g").read_bytes(), **changes)
    with pytest.raises(AdapterhubError) as caught:
        read(f"{web.url}/m.gguf")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_small_file_that_is_large_is_not_read(web: Web) -> None:
    web.files["/config.json"] = b"12345"
    with pytest.raises(FormatError, match="5 bytes, more than the 4 of a small file") as caught:
        RangeClient(web.url).get(f"{web.url}/config.json", "config.json", n=4)
    assert caught.value.code == "too-large"


def unsatisfiable(to: Handler) -> None:
    to.send(416, **{"Content-Range": "bytes */100"})


def of_no_length(to: Handler) -> None:
    to.send(200, b"GGUF", **{"Content-Length": "", "Connection": "close"})
    to.close_connection = True


def shorter_than_its_length(to: Handler) -> None:
    """Chunks, which count, and a length of more bytes, which should not be there with them (RFC 9112, 6.2)."""
    to.send(200, b"4\r\nGGUF\r\n0\r\n\r\n", **{"Content-Length": "1000", "Transfer-Encoding": "chunked"})


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (unsatisfiable, "HTTP 416 (range not satisfiable) for bytes inside the file. Download it, and name the file"),
        (of_no_length, "the server does not send the length of the file. Download it, and name the file"),
        (shorter_than_its_length, "4 bytes received instead of 1000. Try again"),
    ],
)
def test_an_answer_without_the_bytes_that_were_requested_is_refused(
    web: Web, answer: Callable[[Handler], None], words: str
) -> None:
    web.rules["/m.gguf"] = answer
    with pytest.raises(RemoteError) as caught:
        read(f"{web.url}/m.gguf")
    assert str(caught.value) == f"{web.url}/m.gguf: {words}"


def test_a_file_that_changes_between_two_ranges_is_noticed(web: Web, tmp_path: Path) -> None:
    data = gguf(tmp_path / "g").read_bytes()
    etags = iter(['"1"', '"2"'])
    web.rules["/m.gguf"] = lambda to: to.file(data, ETag=next(etags))
    with pytest.raises(RemoteError, match="changed while it was read. Try again"):
        read(f"{web.url}/m.gguf")


def test_a_header_longer_than_any_is_not_read(web: Web) -> None:
    head = struct.pack("<Q", 90_000_000) + b"{" + b" " * 100

    def short(to: Handler) -> None:
        to.send(200, head + bytes(1 << 20), **{"Content-Length": "50000000000"})
        to.close_connection = True

    web.rules["/m.safetensors"] = short
    with pytest.raises(RemoteError, match="the connection ended"):
        read(f"{web.url}/m.safetensors")
    web.files["/n.safetensors"] = struct.pack("<Q", 2**40) + head
    with pytest.raises(AdapterhubError, match="header of 1099511627776 bytes is over the limit"):
        read(f"{web.url}/n.safetensors")
    web.files["/empty.safetensors"] = b""
    with pytest.raises(AdapterhubError, match="0 bytes are fewer than its length field needs"):
        read(f"{web.url}/empty.safetensors")


def test_a_part_of_a_small_file_is_not_accepted_as_the_whole(web: Web, tmp_path: Path) -> None:
    web.add(model(tmp_path / "m"))
    web.rules["/config.json"] = lambda to: to.send(206, b"{}", **{"Content-Range": "bytes 0-1/500"})
    with pytest.raises(RemoteError, match="HTTP 206 for a request of the whole file"):
        read(web.url)
