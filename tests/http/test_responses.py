"""Bodies of responses: whole or not at all, no further than expected, never compressed; and when to ask again."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from adapterhub.http.client import Client
from adapterhub.http.http_errors import RetriesExhaustedError, TruncatedBodyError
from adapterhub.http.responses import Response, retry_after_seconds
from adapterhub_converters.errors import FormatError, RemoteError
from tests.http.test_client import DATA, client, get, streamed
from tests.support.web_server import Handler, Web


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_comes_whole_at_once_and_piece_by_piece(web: Web, chunked: bool) -> None:
    def pieces(to: Handler) -> None:
        to.send_response(200)
        to.send_header("Transfer-Encoding", "chunked")
        to.end_headers()
        for n in range(0, len(DATA), 50_000):
            part = DATA[n : n + 50_000]
            to.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        to.wfile.write(b"0\r\n\r\n")

    web.rules["/x"] = pieces if chunked else lambda to: to.send(200, DATA)
    asking = client(web)
    assert get(asking, "/x") == DATA
    assert streamed(asking, "/x", 7777) == DATA
    assert get(asking, "/x", limit=len(DATA)) == DATA
    with pytest.raises(FormatError, match="larger than the limit of 255999 bytes"):
        get(asking, "/x", limit=len(DATA) - 1)


@pytest.mark.parametrize("read", [get, streamed])
def test_a_body_that_ends_too_early_is_never_taken(web: Web, read: Callable[[Client, str], bytes]) -> None:
    def cut(to: Handler) -> None:
        to.send(200, DATA, **{"Content-Length": str(len(DATA) + 9)})
        to.close_connection = True

    web.rules["/x"] = cut
    with pytest.raises((TruncatedBodyError, RetriesExhaustedError), match="the connection ended 9 bytes too early") as caught:
        read(client(web), "/x")
    assert caught.value.code == ("no-answer" if read is get else "connection-lost")


def test_a_range_is_asked_for_and_the_rest_of_a_body_is_not_waited_for(web: Web) -> None:
    web.files["/x"] = DATA
    asking = client(web)
    with asking.stream(f"{web.url}/x", "x", headers={"Range": "bytes=256-511"}) as body:
        assert (body.status, body.length, body.read(1000)) == (206, 256, DATA[:256])
    web.rules["/endless"] = lambda to: to.send(200, DATA, **{"Content-Length": str(2**50)})
    with asking.stream(f"{web.url}/endless", "x") as body:
        assert body.read(1000) == DATA[:1000]
    assert get(asking, "/x") == DATA


@pytest.mark.parametrize("read", [get, streamed])
def test_a_compressed_body_is_refused(web: Web, read: Callable[[Client, str], bytes]) -> None:
    web.rules["/x"] = lambda to: to.send(200, b"zz", **{"Content-Encoding": "gzip"})
    with pytest.raises(RemoteError, match="compressed though"):
        read(client(web), "/x")
    assert web.requests[0][1]["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("0012", 12), ("", None), ("-1", None), ("1.0", None), ("\u0663", None), ("1" * 20, None)]
)
def test_a_header_that_is_not_a_plain_number_is_none(text: str, number: int | None) -> None:
    assert Response(200, {"x-total": text}, b"", "http://127.0.0.1").number("x-total") == number
    assert Response(200, {}, b"", "http://127.0.0.1").number("x-total") is None


@pytest.mark.parametrize("text", ["0", "Tue, 01 Jan 2019 00:00:00 GMT"])
def test_a_pause_of_zero_seconds_is_no_pause(text: str) -> None:
    assert retry_after_seconds(text) == 0.0


@pytest.mark.parametrize("text", [None, "", "soon", "-1", "1e9", "9" * 40, "Tue, 99 Jan 2019", "٣"])
def test_nonsense_asks_for_nothing(text: str | None) -> None:
    assert retry_after_seconds(text) is None
