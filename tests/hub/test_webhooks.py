"""Webhooks: signed, sent again until they are accepted, and never to an address that the operator has not allowed."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from adapterhub.hub import webhooks
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.settings import HubSettings
from adapterhub.hub.webhooks import Webhooks, signature
from adapterhub.index.queries import LogState
from adapterhub.store.ref_log import Entry, RefLog
from adapterhub.store.store import Store
from adapterhub_converters.errors import NotFoundError, UsageError
from tests.conftest import ROOT
from tests.hub.conftest import Running

ENTRY = Entry("team/sql", 1, "push", "9999-01-01T00:00:00Z", "sha256:" + "0" * 64, 10, 1, ("latest", "prod"), author="ada")
REMOVED = Entry("team/sql", 1, "delete", "9999-01-01T00:00:00Z")


class Receiver(ThreadingHTTPServer):
    """Receives what is posted; answers with `status`."""

    daemon_threads = True

    def __init__(self) -> None:
        self.status = 204
        self.wait: queue.Queue[Any] | None = None
        self.meanwhile: Callable[[], object] = lambda: None  # before it answers
        self.received: queue.Queue[tuple[dict[str, str], bytes]] = queue.Queue()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook/secret-path"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.wait is not None:
            self.server.wait.get(timeout=5)
        self.server.received.put(({key.lower(): value for key, value in self.headers.items()}, body))
        self.server.meanwhile()
        self.send_response(self.server.status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[HubDatabase]:
    with closing(HubDatabase(tmp_path)) as opened:
        yield opened


@pytest.fixture
def log(tmp_path: Path) -> RefLog:
    """A log to which `announced` adds."""
    store = Store(tmp_path / "store")
    store.create()
    return store.log


def announced(sender: Webhooks, log: RefLog, entry: Entry) -> None:
    """Write an entry, and have it announced."""
    assert log.append(entry)
    sender.announce(entry)


KILLED = """
import os, signal, sys
from pathlib import Path
from adapterhub.hub.hub import Hub
from adapterhub.hub.settings import HubSettings
from adapterhub.index import index_file
from adapterhub.ref import Ref
hub = Hub(HubSettings(registry=Path(sys.argv[1])))
registry = hub.workers.worker().registry
kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[3] == "with an index that lacks it":
    index_file.write = kill
registry.ledger.on_commit = kill
registry.push(Path(sys.argv[2]), Ref.parse("team/sql:prod"))
"""


@pytest.mark.parametrize("moment", ["with an index that lacks it", "with an index that has it"])
def test_a_move_whose_process_was_killed_before_it_announced_it_is_announced_by_the_next(
    tmp_path: Path, adapter: Callable[..., Path], moment: str
) -> None:
    settings = HubSettings(registry=tmp_path / "hub")
    with closing(Hub(settings)) as hub:
        webhooks.add(hub.database, "team", "https://ci.example/hook")
    words = [sys.executable, "-c", KILLED, str(settings.registry), str(adapter(1)), moment]
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "converters", "schemas"))
    killed = subprocess.run(words, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert killed.returncode == -signal.SIGKILL
    for _ in range(2):  # once, however many look
        with closing(Hub(settings)) as hub:
            hub._maintain(hub.workers.worker())
            events = [delivery.event for delivery in webhooks.deliveries(hub.database)]
            assert sorted(events) == ["tag.moved", "tag.moved", "version.created"]


def test_what_was_moved_before_a_webhook_was_added_is_not_announced_to_it(database: HubDatabase, log: RefLog) -> None:
    sender = Webhooks(database, log)
    webhooks.add(database, "team", "https://ci.example/one")
    announced(sender, log, ENTRY)
    database.execute("UPDATE webhooks SET since = '9999-02-01T00:00:00Z'")
    webhooks.add(database, "team", "https://ci.example/two")
    announced(sender, log, replace(ENTRY, seq=2, op="delete"))
    log.append(replace(ENTRY, seq=3, op="delete", time="9999-03-01T00:00:00Z"))
    sender.catch_up({"team": [LogState("team/sql", 3)]}.__getitem__)  # only namespaces with webhooks are looked at
    sender.announce(replace(ENTRY, seq=2, op="delete"))  # by a thread that comes late
    assert [(delivery.webhook, delivery.event) for delivery in webhooks.deliveries(database)][::-1] == [
        *((1, event) for event in ("version.created", "tag.moved", "tag.moved")),
        (2, "name.removed"),
        (1, "name.removed"),
        (2, "name.removed"),
    ]


def test_a_push_by_hf_is_posted_and_signed(hub: Running, hf: Any, receiver: Receiver, adapter: Callable[..., Path]) -> None:
    with closing(HubDatabase(hub.folder)) as database:
        _, secret = webhooks.add(database, "team", receiver.url, private=True)
    hf.create_repo("team/sql")
    commit = hf.upload_folder(folder_path=adapter(1), repo_id="team/sql", commit_message="First")
    hf.create_repo("other/sql")
    hf.upload_folder(folder_path=adapter(1), repo_id="other/sql")
    deliveries = [receiver.received.get(timeout=30) for _ in range(2)]
    documents = sorted((json.loads(body) for _, body in deliveries), key=lambda document: document["event"])
    assert [document["event"] for document in documents] == ["tag.moved", "version.created"]
    created = documents[1]
    assert (created["name"], created["number"], created["author"], created["message"]) == ("team/sql", 1, "alice", "First")
    assert created["digest"].startswith(f"sha256:{commit.oid}")
    for headers, body in deliveries:
        assert headers["x-hub-signature-256"] == signature(secret, body)
        assert headers["x-hub-event"] == json.loads(body)["event"]
    assert receiver.received.empty()


@pytest.mark.parametrize("status", [500, 404, 302])
def test_what_is_not_accepted_is_sent_again_and_given_up_at_last(
    database: HubDatabase, log: RefLog, receiver: Receiver, status: int
) -> None:
    now = 1000.0
    sender = Webhooks(database, log, clock=lambda: now)
    webhooks.add(database, "team", receiver.url, private=True)
    announced(sender, log, REMOVED)
    receiver.status = status
    sender.deliver()
    sender.deliver()  # not due yet
    assert receiver.received.qsize() == 1
    for pause in webhooks.PAUSES:
        now += pause
        sender.deliver()
    (delivery,) = webhooks.deliveries(database)
    assert (delivery.state, delivery.tries) == ("failed", len(webhooks.PAUSES) + 1)
    assert delivery.error
    assert "secret-path" not in delivery.error
    assert len({headers["x-hub-delivery"] for headers, _ in receiver.received.queue}) == 1


def test_it_is_accepted_at_the_second_try(database: HubDatabase, log: RefLog, receiver: Receiver) -> None:
    now = 1000.0
    sender = Webhooks(database, log, clock=lambda: now)
    webhooks.add(database, "team", receiver.url, private=True)
    announced(sender, log, ENTRY)
    receiver.status = 503
    sender.deliver()
    receiver.status, now = 200, now + webhooks.PAUSES[0]
    sender.deliver()
    assert [delivery.state for delivery in webhooks.deliveries(database)] == ["delivered"] * 3


def test_what_a_process_sends_no_other_one_sends_however_long_those_before_took(
    database: HubDatabase, log: RefLog, receiver: Receiver
) -> None:
    now = 1000.0
    first, second = (Webhooks(database, log, clock=lambda: now) for _ in range(2))
    webhooks.add(database, "team", receiver.url, private=True)
    announced(first, log, ENTRY)

    def slow() -> None:
        nonlocal now
        now += 100
        if receiver.received.qsize() == 2:
            second.deliver()

    receiver.meanwhile = slow
    first.deliver()
    assert len({headers["x-hub-delivery"] for headers, _ in receiver.received.queue}) == receiver.received.qsize() == 3


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "169.254.169.254", "10.0.0.1", "0x7f000001"])
def test_nothing_is_posted_to_this_machine_or_its_network_unasked(
    database: HubDatabase, log: RefLog, receiver: Receiver, host: str
) -> None:
    webhooks.add(database, "team", receiver.url.replace("127.0.0.1", host))
    sender = Webhooks(database, log)
    announced(sender, log, ENTRY)
    sender.deliver()
    assert receiver.received.empty()
    assert {"it is not at a public address" in delivery.error for delivery in webhooks.deliveries(database)} == {True}


@pytest.mark.parametrize("url", ["ftp://x/y", "x", "https://user:password@host/", "file:///etc/passwd"])
def test_only_the_urls_of_web_servers_are_taken(database: HubDatabase, url: str) -> None:
    with pytest.raises(UsageError) as error:
        webhooks.add(database, "team", url)
    assert "password" not in str(error.value)


def test_a_webhook_that_is_removed_is_told_nothing(database: HubDatabase, log: RefLog, receiver: Receiver) -> None:
    ident, _ = webhooks.add(database, "team", receiver.url, private=True)
    sender = Webhooks(database, log)
    announced(sender, log, ENTRY)
    webhooks.remove(database, ident)
    sender.deliver()
    assert receiver.received.empty()
    with pytest.raises(NotFoundError, match=f"{ident}: no such webhook. List the webhooks") as error:
        webhooks.remove(database, ident)
    assert (error.value.code, error.value.fields) == ("no-such-number", {"kind": "webhook"})


def test_a_receiver_that_is_behind_has_no_other_one_wait(database: HubDatabase, log: RefLog, receiver: Receiver) -> None:
    sender = Webhooks(database, log)
    webhooks.add(database, "slow", "http://127.0.0.1:1/", private=True)
    webhooks.add(database, "team", receiver.url, private=True)
    for seq in range(50):
        announced(sender, log, replace(ENTRY, name="slow/sql", seq=seq + 1))
    announced(sender, log, ENTRY)
    sender.deliver()
    assert receiver.received.qsize() == 3


def test_a_receiver_that_does_not_answer_has_no_other_one_wait(database: HubDatabase, log: RefLog, receiver: Receiver) -> None:
    """It answers once the other one has been told."""
    with Receiver() as slow:
        slow.wait = receiver.received
        threading.Thread(target=slow.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        sender = Webhooks(database, log)
        for namespace, delivery in (("slow", slow), ("team", receiver)):
            webhooks.add(database, namespace, delivery.url, private=True)
            announced(sender, log, replace(REMOVED, name=f"{namespace}/sql"))
        sender.deliver()
        slow.shutdown()
    assert [delivery.state for delivery in webhooks.deliveries(database)] == ["delivered"] * 2


def test_no_namespace_holds_more_than_one_of_the_threads_however_many_receivers_of_it_hang(
    database: HubDatabase, log: RefLog, receiver: Receiver
) -> None:
    """Each of 50 webhooks held one for ten seconds, so that events of all others came a minute late."""
    other_delivered = threading.Event()
    receiver.meanwhile = other_delivered.set
    with Receiver() as slow:
        slow.meanwhile = lambda: other_delivered.wait(20)  # it answers once the other namespace has been told
        threading.Thread(target=slow.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        sender = Webhooks(database, log)
        for namespace, url in [*(("slow", slow.url) for _ in range(webhooks._THREADS)), ("team", receiver.url)]:
            webhooks.add(database, namespace, url, private=True)
        for namespace in ("slow", "team"):
            announced(sender, log, replace(REMOVED, name=f"{namespace}/sql"))
        sender.deliver()
        slow.shutdown()
    assert {delivery.state for delivery in webhooks.deliveries(database)} == {"delivered"}


def test_the_words_of_a_move_are_no_headers(database: HubDatabase, log: RefLog, receiver: Receiver) -> None:
    webhooks.add(database, "team", receiver.url, private=True)
    sender = Webhooks(database, log)
    announced(sender, log, replace(ENTRY, message="x\r\nX-Evil: 1\r\n\r\n", author="ada\r\nX-Evil: 2"))
    sender.deliver()
    assert receiver.received.queue
    for headers, body in receiver.received.queue:
        assert "x-evil" not in headers
        assert headers["x-hub-event"] in ("version.created", "tag.moved")
        assert json.loads(body)["message"] == "x\r\nX-Evil: 1\r\n\r\n"


def test_an_answer_of_an_empty_line_is_none(database: HubDatabase, log: RefLog) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: _answer(server, b"\r\n\r\n"), daemon=True).start()
        webhooks.add(database, "team", f"http://127.0.0.1:{server.getsockname()[1]}/", private=True)
        sender = Webhooks(database, log)
        announced(sender, log, REMOVED)
        sender.deliver()
    (delivery,) = webhooks.deliveries(database)
    assert (delivery.state, delivery.error) == ("waiting", "badstatusline")


def _answer(server: socket.socket, data: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(1 << 16)
        connection.sendall(data)
