"""The one HTTP client against real servers on 127.0.0.1: what they may do to it, and who is told the credentials."""

from __future__ import annotations

import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import format_datetime

import pytest

from adapterhub.http.bounded_responses import Progress, SlowError
from adapterhub.http.client import MAX_REDIRECTS, Client
from adapterhub.http.http_errors import RetriesExhaustedError, RetryableError
from adapterhub.http.urls import origin
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RemoteError, UsageError
from tests.support.web_server import Handler, Web

DATA = bytes(range(256)) * 1000


def client(web: Web, pauses: Sequence[float] = (), **changes: object) -> Client:
    return Client(web.url, pauses=pauses, **changes)  # type: ignore[arg-type]


def get(client: Client, path: str, limit: int = 1 << 20) -> bytes:
    return client.request("GET", client.base + path, "x", good=(200,), limit=limit).body


def streamed(client: Client, path: str, size: int = 1 << 16) -> bytes:
    data, buffer = bytearray(), memoryview(bytearray(size))
    with client.stream(client.base + path, "x") as body:
        while n := body.readinto(buffer):
            data += buffer[:n]
    return bytes(data)


@contextlib.contextmanager
def raw(*answers: bytes | Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives each connection one answer, after one request, and closes it; its URL and the requests."""
    listening, requests = socket.create_server(("127.0.0.1", 0)), list[bytes]()

    def serve() -> None:
        with contextlib.suppress(OSError):
            for answer in answers:
                connection, _ = listening.accept()
                with connection:
                    requests.append(connection.recv(1 << 16))
                    if isinstance(answer, bytes):
                        connection.sendall(answer)
                    else:
                        answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", requests


# ---- bodies


def test_a_body_that_broke_off_is_fetched_again_as_often_as_there_are_pauses(web: Web) -> None:
    failures_left = [2]

    def cut(to: Handler) -> None:
        failures_left[0] -= 1
        to.send(200, DATA[:5] if failures_left[0] >= 0 else DATA, **{"Content-Length": str(len(DATA))})
        to.close_connection = True

    web.rules["/x"] = cut
    assert get(client(web, (0.0, 0.0)), "/x") == DATA
    failures_left[0] = 2
    with pytest.raises(RetriesExhaustedError, match=r"too early \(2 tries\)\. Try again later"):
        get(client(web, (0.0,)), "/x")


class Pieces:
    """A body in parts."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[memoryview]:
        yield from (memoryview(part) for part in self.parts)


def test_a_body_is_sent_piece_by_piece_under_its_length(web: Web) -> None:
    bodies = []

    def receive_body(to: Handler) -> None:
        bodies.append(to.rfile.read(int(to.headers["Content-Length"])))
        to.send(201)

    Handler.do_PUT = Handler.do_GET  # type: ignore[attr-defined]
    try:
        web.rules["/x"] = receive_body
        for body in (Pieces(DATA, b"", DATA), DATA, b""):
            client(web).request("PUT", f"{web.url}/x", "x", good=(201,), body=body)
    finally:
        del Handler.do_PUT  # type: ignore[attr-defined]
    assert bodies == [DATA + DATA, DATA, b""]


def test_a_refusal_in_the_middle_of_sending_is_understood() -> None:
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

    def answer(connection: socket.socket) -> None:
        connection.sendall(refusal)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):  # what was sent meanwhile, or the refusal would be lost in a reset
            while connection.recv(1 << 20):
                pass

    with raw(answer) as (url, _), pytest.raises(RemoteError, match="HTTP 413"):
        Client(url, pauses=()).request("PUT", url, "x", good=(201,), body=Pieces(*[bytes(1 << 20)] * 20))


# ---- time


@pytest.mark.parametrize("piece", [b"X: a\r\n", b"a", b"\r\n\r\nHTTP/1.1 100 Continue\r\nX: "])
def test_headers_that_never_end_are_not_waited_for(web: Web, piece: bytes) -> None:
    client_left = threading.Event()

    def drip(to: Handler) -> None:
        with contextlib.suppress(OSError):
            to.wfile.write(b"HTTP/1.1 100 Continue\r\nX: " if b"100" in piece else b"HTTP/1.1 200 OK\r\nX: ")
            while not client_left.wait(0.05):
                to.wfile.write(piece)

    web.rules["/x"] = drip
    try:
        with pytest.raises(RemoteError, match="no answer in time|more than 8 informational"):
            get(client(web, timeout=0.5), "/x")
    finally:
        client_left.set()


def test_a_small_body_that_drips_is_given_up(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    client_left = threading.Event()

    def drip(to: Handler) -> None:
        with contextlib.suppress(OSError):
            to.send(200, b"", **{"Content-Length": "5000"})
            while not client_left.wait(0.05):
                to.wfile.write(b"x")

    web.rules["/x"] = drip
    try:
        with pytest.raises(RemoteError, match="the server sends less than 50 kB a second"):
            get(client(web, timeout=0.5), "/x")
    finally:
        client_left.set()


def test_a_long_body_that_drips_is_given_up_and_a_slow_one_is_not(web: Web) -> None:
    client_left = threading.Event()

    def drip(size: int) -> Callable[[Handler], None]:
        def answer(to: Handler) -> None:
            with contextlib.suppress(OSError):
                to.send(200, b"", **{"Content-Length": str(20 * size)})
                for _ in range(20):
                    client_left.wait(0.05)
                    to.wfile.write(b"x" * size)

        return answer

    web.rules |= {"/x": drip(1), "/y": drip(4000)}
    try:
        with pytest.raises(RemoteError, match="the server sends less than 1 kB a second"):
            streamed(client(web, timeout=0.5), "/x")
        assert streamed(client(web, timeout=0.5), "/y") == b"x" * 80_000
    finally:
        client_left.set()


def test_progress_counts_the_time_of_waiting_alone() -> None:
    progress = Progress(60)
    for _ in range(100):
        progress.add(30, 40_000)
    progress.add(59, 0)
    with pytest.raises(SlowError, match="less than 1 kB a second"):
        progress.add(2, 50_000)


def test_redirects_and_their_bodies_have_one_time_together(web: Web) -> None:
    client_left, count = threading.Event(), [0]

    def drip(to: Handler) -> None:
        count[0] += 1
        with contextlib.suppress(OSError):
            to.send(302, b"", Location=f"/x?{count[0]}", **{"Content-Length": "5000"})
            while not client_left.wait(0.05):
                to.wfile.write(b"x")

    web.rules["/x"] = drip
    try:
        with pytest.raises(RemoteError, match="its redirects take longer than 0.5 seconds"):
            get(client(web, timeout=0.5), "/x")
        assert count == [1]
    finally:
        client_left.set()


def test_incomplete_headers_are_not_accepted() -> None:
    for half in (b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n"):
        with raw(half) as (url, _), pytest.raises(RemoteError, match="too early"):
            Client(url, pauses=()).request("GET", url, "x", good=(200,))


def test_informational_answers_are_passed_over() -> None:
    answer = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 4 + b"HTTP/1.1 100 Continue\r\n\r\n" * 4
    with raw(answer + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") as (url, _):
        assert Client(url, pauses=()).request("GET", url, "x", good=(200,)).body == b"ok"


def test_trailers_and_extensions_of_chunks_are_passed_over() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b\r\nok\r\n00;c\r\nX: y\r\nZ: z\r\n\r\n"
    for read in (get, streamed):
        with raw(answer) as (url, _):
            assert read(Client(url, pauses=()), "/x") == b"ok"


def in_an_hour() -> str:
    return format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1, minutes=1), usegmt=True)


@pytest.mark.parametrize("pause", [lambda: "3600", in_an_hour], ids=["seconds", "date"])
def test_a_server_that_asks_to_wait_for_an_hour_is_quoted_and_not_asked_again(web: Web, pause: Callable[[], str]) -> None:
    web.rules["/x"] = lambda to: to.send(429, **{"Retry-After": pause()})
    with pytest.raises(RemoteError, match=r"HTTP 429; it asks to wait 3[0-9]{3} seconds\. Try again then"):
        get(client(web, (0.0, 0.0)), "/x")
    assert len(web.requests) == 1


def test_a_server_that_asks_to_wait_is_waited_for(web: Web) -> None:
    answers = iter((503, 429))

    def busy(to: Handler) -> None:
        status = next(answers, 200)
        to.send(status, b"", **({"Retry-After": "1"} if status == 429 else {}))

    web.rules["/x"] = busy
    began = time.monotonic()
    assert get(client(web, (0.0, 0.0)), "/x") == b""
    assert 1 <= time.monotonic() - began < 30


@pytest.mark.parametrize("status", [400, 404, 418])
def test_an_error_that_stays_is_not_tried_again(web: Web, status: int) -> None:
    web.rules["/x"] = lambda to: to.send(status)
    with pytest.raises(NotFoundError if status == 404 else RemoteError, match=f"HTTP {status}"):
        get(client(web, (0.0, 0.0)), "/x")
    assert len(web.requests) == 1


def test_without_retry_the_caller_decides(web: Web) -> None:
    web.rules["/x"] = lambda to: to.send(503, **{"Retry-After": "7"})
    with pytest.raises(RetryableError) as caught:
        client(web, (0.0,)).request("GET", f"{web.url}/x", "x", good=(200,), retry=False)
    assert (caught.value.reason, caught.value.pause) == ("HTTP 503", 7.0)


@pytest.mark.parametrize("waiting", ["headers", "body", "pause"])
def test_stop_ends_what_other_threads_wait_for(web: Web, waiting: str) -> None:
    client_left = threading.Event()

    def hang(to: Handler) -> None:
        if waiting == "pause":
            to.send(503, **{"Retry-After": "100"})
            return
        if waiting == "body":
            to.send(200, b"x", **{"Content-Length": "5000"})
        client_left.wait(60)

    web.rules["/x"] = hang
    web.files["/y"] = DATA
    asking = client(web, (100.0,))
    try:
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(streamed, asking, "/x")
            while not web.requests:
                time.sleep(0.01)
            time.sleep(0.1)
            asking.stop()
            with pytest.raises(RemoteError):
                job.result(timeout=10)
        asking.stop(on=False)
        assert streamed(asking, "/y") == DATA
    finally:
        client_left.set()


# ---- connections


@pytest.mark.parametrize(
    "answer",
    [b"SSH-2.0-x\r\n", b"HTTP/1.1 2x0 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
     b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 200 + b"\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"],
    ids=["no HTTP", "no status", "a long header", "many headers", "two lengths", "no chunk", "half a chunk"],
)  # fmt: skip
def test_an_answer_that_makes_no_sense_is_one_line(answer: bytes) -> None:
    for read in (get, streamed):
        with raw(answer) as (url, _), pytest.raises(AdapterhubError) as caught:
            read(Client(url, pauses=()), "/x")
        assert caught.value.exit_code == 5
        assert len(str(caught.value).splitlines()) == 1


def test_a_path_is_sent_as_it_is(web: Web) -> None:
    web.rules["/a/../b%2Fc"] = lambda to: to.send(200)
    get(client(web), "/a/../b%2Fc?x=%2F&y=a+b")
    assert web.paths() == ["/a/../b%2Fc?x=%2F&y=a+b"]


# ---- redirects and credentials


@pytest.mark.parametrize(
    ("location", "says"),
    [
        ("/x", f"redirected more than {MAX_REDIRECTS} times"),
        ("file:///etc/passwd", "the server names an address that is not http or https"),
        ("ftp://x/y", "the server names an address that is not http or https"),
        ("http://user:pass@127.0.0.1/", "the server names an address with credentials"),
        ("http://127.0.0.1/\x7f", "the server names an address that is not http or https"),
        ("", "the server redirects without an address"),
        ("http://[::1", "the server names an invalid address"),
        ("http://127.0.0.1:99999/", "the server names an invalid address"),
        ("http://a..b/", "no such host"),
    ],
)
def test_a_redirect_that_leads_nowhere_is_one_line(web: Web, location: str, says: str) -> None:
    web.rules["/x"] = lambda to: to.send(302, Location=location)
    for read in (get, streamed):
        with pytest.raises(RemoteError, match=says) as caught:
            read(client(web), "/x")
        assert "pass@" not in str(caught.value)
        assert (caught.value.code == "no-such-host") == (says == "no such host")
    assert len(web.requests) == (2 * (MAX_REDIRECTS + 2) if location == "/x" else 2)


# ---- the way there


def test_a_server_that_is_not_there_is_one_line(web: Web) -> None:
    web.shutdown()
    web.server_close()
    with pytest.raises(
        RemoteError, match=r"x: 127.0.0.1: connection refused \(3 tries\)\. Check the address, and that the server is"
    ):
        get(client(web, (0.0, 0.0)), "/x")


@pytest.mark.parametrize("url", ["http://", "https://user:secret@host/x", "http://[::1/x", "http://host:port/x", "http://a b/"])
def test_a_malformed_address_is_the_user_s_error_only_if_typed(url: str) -> None:
    for typed, error in ((True, UsageError), (False, RemoteError)):
        with pytest.raises(error) as caught:
            origin(url, url, is_user_input=typed)
        assert "secret" not in str(caught.value)
