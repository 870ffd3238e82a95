"""The one HTTP client against real servers on 127.0.0.1: what they may do to it, and who is told the credentials."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from adapterhub.cli import environment
from adapterhub.http.boundary import Boundary, LedAstrayError, Reach, reach_of
from adapterhub.http.bounded import Progress, SlowError
from adapterhub.http.client import MAX_REDIRECTS, Client, retry_after_seconds
from adapterhub.http.http_errors import DeniedError, RetriesExhaustedError, RetryableError, TruncatedBodyError
from adapterhub.http.urls import origin, proxy_to, resolve_link
from adapterhub_converters.errors import AdapterhubError, FormatError, NotFoundError, RemoteError, UsageError
from tests.support.forward_proxy import ForwardProxy
from tests.support.registry import certificate
from tests.support.web_server import Handler, Web

SECRET = "not-a-secret-9"
DATA = bytes(range(256)) * 1000


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


@pytest.fixture
def other() -> Iterator[Web]:
    with Web() as server:
        yield server


def client(web: Web, pauses: Sequence[float] = (), **changes: object) -> Client:
    return Client(web.url, pauses=pauses, **changes)  # type: ignore[arg-type]


def get(client: Client, path: str, limit: int = 1 << 20) -> bytes:
    return client.request("GET", client.base + path, "x", good=(200,), limit=limit).body


def streamed(client: Client, path: str, size: int = 1 << 16) -> bytes:
    found, buffer = bytearray(), memoryview(bytearray(size))
    with client.stream(client.base + path, "x") as body:
        while n := body.readinto(buffer):
            found += buffer[:n]
    return bytes(found)


def said(web: Web) -> list[str | None]:
    """The `Authorization` of each request."""
    return [headers.get("authorization") for _, headers in web.requests]


@contextlib.contextmanager
def raw(*answers: bytes | Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server that gives each connection one answer, after one request, and closes it; its URL and the requests."""
    listening, seen = socket.create_server(("127.0.0.1", 0)), list[bytes]()

    def serve() -> None:
        with contextlib.suppress(OSError):
            for answer in answers:
                connection, _ = listening.accept()
                with connection:
                    seen.append(connection.recv(1 << 16))
                    if isinstance(answer, bytes):
                        connection.sendall(answer)
                    else:
                        answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", seen


# ---- bodies


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


def test_a_body_that_broke_off_is_fetched_again_as_often_as_there_are_pauses(web: Web) -> None:
    left = [2]

    def cut(to: Handler) -> None:
        left[0] -= 1
        to.send(200, DATA[:5] if left[0] >= 0 else DATA, **{"Content-Length": str(len(DATA))})
        to.close_connection = True

    web.rules["/x"] = cut
    assert get(client(web, (0.0, 0.0)), "/x") == DATA
    left[0] = 2
    with pytest.raises(RetriesExhaustedError, match=r"too early \(2 tries\)\. Try again later"):
        get(client(web, (0.0,)), "/x")


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


class Pieces:
    """A body in parts."""

    def __init__(self, *parts: bytes) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[memoryview]:
        yield from (memoryview(part) for part in self.parts)


def test_a_body_is_sent_piece_by_piece_under_its_length(web: Web) -> None:
    got = []

    def put(to: Handler) -> None:
        got.append(to.rfile.read(int(to.headers["Content-Length"])))
        to.send(201)

    Handler.do_PUT = Handler.do_GET  # type: ignore[attr-defined]
    try:
        web.rules["/x"] = put
        for body in (Pieces(DATA, b"", DATA), DATA, b""):
            client(web).request("PUT", f"{web.url}/x", "x", good=(201,), body=body)
    finally:
        del Handler.do_PUT  # type: ignore[attr-defined]
    assert got == [DATA + DATA, DATA, b""]


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
    gone = threading.Event()

    def drip(to: Handler) -> None:
        with contextlib.suppress(OSError):
            to.wfile.write(b"HTTP/1.1 100 Continue\r\nX: " if b"100" in piece else b"HTTP/1.1 200 OK\r\nX: ")
            while not gone.wait(0.05):
                to.wfile.write(piece)

    web.rules["/x"] = drip
    try:
        with pytest.raises(RemoteError, match="no answer in time|more than 8 informational"):
            get(client(web, timeout=0.5), "/x")
    finally:
        gone.set()


def test_a_small_body_that_drips_is_given_up(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = threading.Event()

    def drip(to: Handler) -> None:
        with contextlib.suppress(OSError):
            to.send(200, b"", **{"Content-Length": "5000"})
            while not gone.wait(0.05):
                to.wfile.write(b"x")

    web.rules["/x"] = drip
    try:
        with pytest.raises(RemoteError, match="the server sends less than 50 kB a second"):
            get(client(web, timeout=0.5), "/x")
    finally:
        gone.set()


def test_a_long_body_that_drips_is_given_up_and_a_slow_one_is_not(web: Web) -> None:
    gone = threading.Event()

    def drip(size: int) -> Callable[[Handler], None]:
        def answer(to: Handler) -> None:
            with contextlib.suppress(OSError):
                to.send(200, b"", **{"Content-Length": str(20 * size)})
                for _ in range(20):
                    gone.wait(0.05)
                    to.wfile.write(b"x" * size)

        return answer

    web.rules |= {"/x": drip(1), "/y": drip(4000)}
    try:
        with pytest.raises(RemoteError, match="the server sends less than 1 kB a second"):
            streamed(client(web, timeout=0.5), "/x")
        assert streamed(client(web, timeout=0.5), "/y") == b"x" * 80_000
    finally:
        gone.set()


def test_progress_counts_the_time_of_waiting_alone() -> None:
    progress = Progress(60)
    for _ in range(100):
        progress.add(30, 40_000)
    progress.add(59, 0)
    with pytest.raises(SlowError, match="less than 1 kB a second"):
        progress.add(2, 50_000)


def test_redirects_and_their_bodies_have_one_time_together(web: Web) -> None:
    gone, count = threading.Event(), [0]

    def drip(to: Handler) -> None:
        count[0] += 1
        with contextlib.suppress(OSError):
            to.send(302, b"", Location=f"/x?{count[0]}", **{"Content-Length": "5000"})
            while not gone.wait(0.05):
                to.wfile.write(b"x")

    web.rules["/x"] = drip
    try:
        with pytest.raises(RemoteError, match="its redirects take longer than 0.5 seconds"):
            get(client(web, timeout=0.5), "/x")
        assert count == [1]
    finally:
        gone.set()


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


@pytest.mark.parametrize(
    ("address", "reach"),
    [("8.8.8.8", Reach.PUBLIC), ("2001:4860:4860::8888", Reach.PUBLIC), ("10.0.0.1", Reach.PRIVATE), ("fd00::1", Reach.PRIVATE),
     ("100.64.0.1", Reach.PRIVATE), ("127.9.9.9", Reach.LOOPBACK), ("::1", Reach.LOOPBACK), ("::", Reach.LOOPBACK),
     ("169.254.1.1", Reach.LINK), ("fe80::1%eth0", Reach.LINK), ("fd00:ec2::254", Reach.LINK), ("168.63.129.16", Reach.LINK),
     ("::ffff:127.0.0.1", Reach.LOOPBACK), ("64:ff9b::a00:1", Reach.PRIVATE), ("2002:a9fe:a9fe::1", Reach.LINK),
     ("::10.0.0.1", Reach.PRIVATE), ("::127.0.0.1", Reach.LOOPBACK), ("fec0::1", Reach.PRIVATE), ("224.0.0.1", Reach.PRIVATE),
     ("ff02::1", Reach.PRIVATE), ("64:ff9b:1::a00:1", Reach.PRIVATE)],
)  # fmt: skip
def test_who_can_reach_an_address(address: str, reach: Reach) -> None:
    assert reach_of(address) is reach


def test_this_machine_by_name_is_no_other_machine() -> None:
    Boundary("localhost").check_peer("localhost", "127.0.0.1")
    for home, host in (("localhost", "localhost"), ("a.localhost", "a.localhost"), ("public.example", "x.localhost")):
        with pytest.raises(LedAstrayError, match="is 8.8.8.8 here, which is not this machine"):
            Boundary(home).check_peer(host, "8.8.8.8")


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The addresses of names, which a hostile DNS server chooses."""
    names: dict[str, list[str]] = {}
    look_up = socket.getaddrinfo

    def answer(host: str, *rest: Any, **more: Any) -> list[Any]:
        if host not in names:
            return look_up(host, *rest, **more)
        addresses = names[host]
        return [entry for address in addresses for entry in look_up(address, *rest, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return names


def test_a_name_of_a_near_address_tells_nobody_which_of_its_ports_are_open(resolved: dict[str, list[str]]) -> None:
    """It was judged once it was connected to, so that a webhook's error told open ports from closed ones."""
    resolved["hooks.example"] = ["127.0.0.1", "127.0.0.2"]
    errors = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        for port in (listener.getsockname()[1], 1):
            client = Client(pauses=(), boundary=Boundary("", public_only=True))
            with pytest.raises(RemoteError, match="it is not at a public address") as caught:
                client.request("POST", f"http://hooks.example:{port}/", "x", good=(200,))
            errors.append(str(caught.value))
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert errors[0] == errors[1]
    assert "127.0.0" not in errors[0]


def test_a_name_leads_to_the_first_of_its_addresses_that_answers(web: Web, resolved: dict[str, list[str]]) -> None:
    port = origin(web.url, "x")[2]
    resolved["hub.example"] = ["127.0.0.2", "127.0.0.1"]
    web.rules["/x"] = lambda to: to.send(200, b"ok")
    assert get(Client(f"http://hub.example:{port}", pauses=()), "/x") == b"ok"


def test_of_hundreds_of_addresses_few_are_tried(resolved: dict[str, list[str]]) -> None:
    """Each had a timeout of its own: a name with 200 addresses that do not answer held a thread for 33 minutes."""
    tried: list[str] = []

    class Recording(Boundary):
        def check_peer(self, host: str, address: str, *, is_connected: bool = True) -> None:
            tried.append(address)
            raise LedAstrayError(address)

    resolved["hooks.example"] = [f"127.0.1.{number}" for number in range(1, 201)]
    with pytest.raises(RemoteError):
        Client(pauses=(), boundary=Recording("nobody.invalid")).request("GET", "http://hooks.example:1/", "x", good=(200,))
    assert tried == resolved["hooks.example"][:8]


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


@pytest.mark.parametrize("text", ["0", "Tue, 01 Jan 2019 00:00:00 GMT"])
def test_a_pause_of_zero_seconds_is_no_pause(text: str) -> None:
    assert retry_after_seconds(text) == 0.0


@pytest.mark.parametrize("text", [None, "", "soon", "-1", "1e9", "9" * 40, "Tue, 99 Jan 2019", "٣"])
def test_nonsense_asks_for_nothing(text: str | None) -> None:
    assert retry_after_seconds(text) is None


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
    gone = threading.Event()

    def hang(to: Handler) -> None:
        if waiting == "pause":
            to.send(503, **{"Retry-After": "100"})
            return
        if waiting == "body":
            to.send(200, b"x", **{"Content-Length": "5000"})
        gone.wait(60)

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
        gone.set()


# ---- connections


def counted(web: Web) -> list[object]:
    """The connections that a server has got, from now on."""
    found: list[object] = []
    accept = web.get_request

    def counting() -> tuple[socket.socket, object]:
        found.append(pair := accept())
        return pair

    web.get_request = counting  # type: ignore[method-assign]
    return found


def test_a_connection_is_reused_by_the_next_request(web: Web, other: Web) -> None:
    connections, elsewhere = counted(web), counted(other)
    web.files["/x"] = DATA
    other.files["/y"] = b"y"
    web.rules["/there"] = lambda to: to.send(302, Location=f"{other.url}/y")
    web.rules["/no"] = lambda to: to.send(404, b"no")
    asking = client(web)
    for _ in range(3):
        assert get(asking, "/x") == streamed(asking, "/x") == DATA
        assert get(asking, "/there") == b"y"
        assert asking.request("HEAD", f"{web.url}/x", "x", good=(200,)).number("content-length") == len(DATA)
        with pytest.raises(NotFoundError):
            get(asking, "/no")
    assert (len(connections), len(elsewhere)) == (1, 1)
    asking.close()
    assert get(asking, "/x") == DATA
    assert len(connections) == 2


def test_threads_have_a_connection_each(web: Web) -> None:
    connections = counted(web)
    web.files["/x"] = DATA
    asking = client(web)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda n: (get, streamed)[n % 2](asking, "/x"), range(100))) == {DATA}
    assert 1 <= len(connections) <= 4


@pytest.mark.parametrize("method", ["GET", "POST", "PATCH"])
def test_a_kept_connection_that_the_server_has_closed_is_no_failure(method: str) -> None:
    """Of a PATCH some may have arrived, so that only its caller knows how to continue."""
    kept = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    again = threading.Event()

    def once(connection: socket.socket) -> None:
        connection.sendall(kept)
        connection.recv(1 << 16)  # the next request, which is not answered
        again.set()

    with raw(once, kept) as (url, seen):
        asking = Client(url, pauses=())
        asking.request("GET", url, "x", good=(200,))
        if method == "PATCH":
            with pytest.raises(RemoteError, match="closed|reset"):
                asking.request(method, url, "x", good=(200,), body=b"abc")
        else:
            assert asking.request(method, url, "x", good=(200,)).status == 200
        assert again.is_set()
        assert len(seen) == (1 if method == "PATCH" else 2)


def test_a_server_that_closes_at_once_is_a_failure() -> None:
    with raw(b"", b"") as (url, seen), pytest.raises(RetriesExhaustedError, match=r"closed|reset"):
        Client(url, pauses=(0.0,)).request("GET", url, "x", good=(200,))
    assert len(seen) == 2


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


def test_redirects_are_followed_unless_the_caller_objects_or_something_is_sent(web: Web) -> None:
    web.files["/y"] = b"y"
    web.rules["/x"] = lambda to: to.send(307, Location="y")
    Handler.do_POST = Handler.do_GET  # type: ignore[attr-defined]
    asking = client(web)
    assert asking.request("GET", f"{web.url}/x", "x", good=(200,)).url == f"{web.url}/y"
    for method, redirects in (("GET", False), ("POST", True)):
        with pytest.raises(RemoteError, match="HTTP 307"):
            asking.request(method, f"{web.url}/x", "x", good=(200,), redirects=redirects)
    del Handler.do_POST  # type: ignore[attr-defined]


def test_nothing_goes_from_https_to_http() -> None:
    assert resolve_link("http://a/x", "https://b/y", "x") == "https://b/y"
    assert resolve_link("https://a/x", "y", "x") == "https://a/y"
    with pytest.raises(RemoteError, match="from https to http"):
        resolve_link("https://a/x", "http://a/x", "x")


def test_credentials_go_to_the_server_s_origin_alone(web: Web, other: Web) -> None:
    other.files["/y"] = b"y"
    web.rules["/x"] = lambda to: to.send(302, Location=f"{other.url}/y")
    web.rules["/home"] = lambda to: to.send(302, Location=f"{web.url}/x")
    asking = client(web, authorizations={"": f"Bearer {SECRET}"})
    assert get(asking, "/home") == streamed(asking, "/home") == b"y"
    assert said(web) == [f"Bearer {SECRET}"] * 4
    assert said(other) == [None, None]
    asking.request("GET", f"{other.url}/y", "x", good=(200,))
    assert said(other) == [None] * 3


def test_a_login_is_made_once_for_all_threads_and_again_when_it_expires(web: Web, other: Web) -> None:
    valid, asked = ["one"], list[tuple[list[str], str]]()

    def authorize(challenges: Sequence[str], scope: str) -> str:
        asked.append((list(challenges), scope))
        return f"Bearer {valid[0]}"

    def guarded(to: Handler) -> None:
        if to.headers["Authorization"] == f"Bearer {valid[0]}":
            to.send(200, b"in")
        else:
            to.send(401, b"{}", **{"WWW-Authenticate": 'Bearer realm="r"'})

    web.rules["/x"] = guarded
    asking = client(web, authorize=authorize)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: get(asking, "/x"), range(8))) == {b"in"}
    assert asked == [(['Bearer realm="r"'], "")]
    valid[0] = "two"
    assert get(asking, "/x") == b"in"
    assert len(asked) == 2
    other.rules["/z"] = lambda to: to.send(401, **{"WWW-Authenticate": 'Basic realm="give"'})
    web.rules["/away"] = lambda to: to.send(302, Location=f"{other.url}/z")
    with pytest.raises(DeniedError, match="HTTP 401: login required"):
        get(asking, "/away")
    assert len(asked) == 2


def test_a_login_that_is_refused_is_not_repeated(web: Web) -> None:
    web.rules["/x"] = lambda to: to.send(401)
    asking = client(web, authorize=lambda _challenges, _scope: f"Bearer {SECRET}", login_hint="Log in")
    with pytest.raises(DeniedError, match="HTTP 401: login required. Log in") as caught:
        get(asking, "/x")
    assert said(web) == [None, f"Bearer {SECRET}"]
    assert SECRET not in str(caught.value) + repr(asking)


def test_a_text_with_a_secret_is_dropped() -> None:
    asking = Client("http://127.0.0.1", secrets=lambda: ["pass"], authorizations={"": f"Bearer {SECRET}"})
    assert [asking.unless_secret(text) for text in ("fine", f"no {SECRET}", "my pass!")] == ["fine", "", ""]


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


def test_an_origin_is_scheme_host_and_port() -> None:
    assert origin("HTTPS://Hub.Example/x", "x") == ("https", "hub.example", 443)
    assert origin("http://[::1]:5/x", "x") == ("http", "::1", 5)


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Web, Path]]:
    """A server with TLS for registry.test and 127.0.0.1, and the certificate to trust."""
    folder = tmp_path_factory.mktemp("tls")
    path = certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, folder / "key.pem")
    server = Web()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with server:
        server.files["/x"] = DATA
        yield server, path


def test_a_certificate_is_checked_against_the_authorities_and_the_name(
    secure: tuple[Web, Path], web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, path = secure
    port = server.server_address[1]
    with pytest.raises(RemoteError, match="its certificate is not trusted .*set SSL_CERT_FILE"):
        get(Client(f"https://127.0.0.1:{port}", pauses=()), "/x")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    asking = Client(f"https://127.0.0.1:{port}", pauses=())
    assert get(asking, "/x") == streamed(asking, "/x") == DATA
    with pytest.raises(RemoteError, match="not trusted"):
        get(Client(f"https://localhost:{port}", pauses=()), "/x")
    with pytest.raises(RemoteError, match="it does not speak TLS"):
        get(Client(web.url.replace("http:", "https:"), pauses=()), "/x")


def test_TLS_goes_through_a_tunnel_and_only_the_proxy_gets_its_password(
    secure: tuple[Web, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, path = secure
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    port = server.server_address[1]
    server.requests.clear()
    with ForwardProxy(f"user:{SECRET}") as company:
        asking = Client(f"https://registry.test:{port}", pauses=(), proxy=lambda *_: f"http://user:{SECRET}@{company.address}")
        assert get(asking, "/x") == streamed(asking, "/x") == DATA
        assert company.seen == [f"CONNECT registry.test:{port}"]
    assert all("proxy-authorization" not in headers for _, headers in server.requests)


def test_plain_http_is_asked_of_a_proxy_by_its_whole_address(web: Web) -> None:
    web.files["/x"] = DATA
    port = web.server_address[1]
    with ForwardProxy(f"user:{SECRET}") as company:
        asked = list[tuple[str, str]]()

        def proxy(scheme: str, host: str) -> str:
            asked.append((scheme, host))
            return f"user:{SECRET}@{company.address}"

        asking = Client(f"http://registry.test:{port}", pauses=(), proxy=proxy)
        assert get(asking, "/x?y=%2f").__len__() == len(DATA)
        assert company.seen[0].lower() == f"get http://registry.test:{port}/x?y=%2f"
        assert asked == [("http", "registry.test")]
        get(Client(web.url, proxy=proxy), "/x")  # this machine
        assert len(company.seen) == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_is_named_without_its_password(scheme: str) -> None:
    with ForwardProxy(f"user:{SECRET}") as company:
        asking = Client(f"{scheme}://registry.test:5", pauses=(), proxy=lambda *_: f"http://user:wrong@{company.address}")
        with pytest.raises(RemoteError, match="407") as caught:
            get(asking, "/x")
    if scheme == "https":
        assert f"the proxy {company.address} refused (407 Proxy Authentication Required)" in caught.value.what
        assert caught.value.hint.endswith("into the variable that names it, like http://USER:PASSWORD@HOST:PORT")
    assert "wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("proxy", "words"),
    [
        ("socks5://127.0.0.1:1", "the address of the proxy begins with socks5://; only http:// is supported"),
        ("https://127.0.0.1:1", "the address of the proxy begins with https://; only http:// is supported"),
        ("http://:3128", "the address of the proxy is invalid"),
        ("http://127.0.0.1:port", "the address of the proxy is invalid"),
        ("http://[::1", "the address of the proxy is invalid"),
    ],
)
def test_a_proxy_that_cannot_be_used_is_one_line(proxy: str, words: str) -> None:
    with pytest.raises(RemoteError) as error:
        proxy_to("https", "registry.test", lambda *_: proxy, "x")
    assert str(error.value) == f"x: {words}. Set HTTPS_PROXY to one like http://proxy.example:3128"


def test_only_the_command_line_reads_the_environment(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert environment.proxy("https", "registry.test") == ""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:2")
    monkeypatch.setenv("no_proxy", "other.test,.inside.test")
    hosts = ("registry.test", "other.test", "a.inside.test")
    assert [environment.proxy("https", host) for host in hosts] == ["http://127.0.0.1:1", "", ""]
    assert environment.proxy("http", "registry.test") == "http://127.0.0.1:2"
    with pytest.raises(RemoteError, match="no such host|looked up"):  # not the proxy's "connection refused"
        get(Client("http://registry.invalid", pauses=()), "/x")
