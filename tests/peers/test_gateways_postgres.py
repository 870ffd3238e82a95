"""A record of usage in PostgreSQL: the contract of `tests/serve/usage/test_record_place.py`, and limits that machines share."""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from threading import Thread

import pytest

from adapterhub import postgres as database_module
from adapterhub.http_server.rate_windows import Windows
from adapterhub.hub.storage.postgres import PostgresDatabase
from adapterhub.serve.usage import answer_log, delayed_limits, record_place, usage_report
from adapterhub.serve.usage.delayed_limits import DelayedLimits
from adapterhub.serve.usage.postgres_record import PostgresLimits, PostgresUsage
from adapterhub.serve.usage.record_place import Place, PostgresAddress
from adapterhub.serve.usage.usage_database import DAY
from adapterhub.serve.usage.usage_recorder import UsageRecorder
from adapterhub_converters.errors import RemoteError
from tests.conftest import Run
from tests.serve.usage.test_record_place import *  # noqa: F403 - the contract
from tests.serve.usage.test_record_place import ANSWER, add
from tests.support.postgres import Postgres

pytestmark = pytest.mark.peer
Gateway = Callable[[], DelayedLimits]


class Clock:
    """A time that tests set."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def address(postgres: Postgres) -> PostgresAddress:
    address = record_place.parse(postgres.database())
    assert isinstance(address, PostgresAddress)
    return address


@pytest.fixture
def place(address: PostgresAddress) -> Place:
    return address


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gateway(address: PostgresAddress, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    """Returns the limits of another gateway each time, which look at the database only when a test says so."""
    monkeypatch.setattr(DelayedLimits, "_start", lambda _limits: None)
    monkeypatch.setattr(PostgresLimits, "now", lambda _database: clock.now)
    with ExitStack() as opened:

        def gateway() -> DelayedLimits:
            limits = DelayedLimits(address, clock)
            opened.callback(limits._discard_database)
            limits.flush()
            return limits

        yield gateway


def test_a_window_is_shared_until_it_ends(gateway: Gateway, clock: Clock) -> None:
    first, right, windows = gateway(), gateway(), [Windows(2, 60, clock), Windows(2, 60, clock)]
    assert not first.count("ada", "requests", windows[0]).over
    first.flush()
    clock.now += 20
    assert not right.count("ada", "requests", windows[1]).over
    for limits in (right, first, right):
        limits.flush()
    for limits, own_windows in zip((first, right), windows, strict=True):
        window = limits.count("ada", "requests", own_windows)
        assert (window.over, window.remaining, window.seconds) == (True, 0, 40)
        assert not limits.count("bob", "requests", own_windows).over
        assert not limits.count("ada", "tokens", own_windows).over
    clock.now += 40
    assert not first.count("ada", "requests", windows[0]).over


def test_what_is_counted_while_the_database_is_asked_is_counted_once(gateway: Gateway, clock: Clock) -> None:
    limits, windows = gateway(), Windows(10, 60, clock)
    for _ in range(3):
        limits.count("ada", "requests", windows)
        limits.count("ada", "requests", windows)
        limits.flush()
    assert limits.count("ada", "requests", windows, 0).remaining == 4
    assert gateway().count("ada", "requests", Windows(10, 60, clock), 0).remaining == 10  # not read yet
    second = gateway()
    second.count("ada", "requests", Windows(10, 60, clock))
    second.flush()
    assert second.count("ada", "requests", Windows(10, 60, clock), 0).remaining == 3


def test_requests_that_run_elsewhere_count_until_they_end_or_their_gateway_is_dead(gateway: Gateway, clock: Clock) -> None:
    first, right = gateway(), gateway()
    assert first.begin("ada", 2)
    assert first.begin("ada", 2)
    assert not first.begin("ada", 2)
    first.flush()
    right.flush()
    assert not right.begin("ada", 2)
    assert right.begin("bob", 2)
    first.end("ada")
    first.flush()
    right.flush()
    assert right.begin("ada", 2)
    assert not right.begin("ada", 2)
    right.end("ada")
    clock.now += 11  # in which the left one says nothing
    right.flush()
    assert [right.begin("ada", 2) for _ in range(3)] == [True, True, False]


def test_without_its_database_a_gateway_counts_for_itself_and_adds_that_later(
    gateway: Gateway, clock: Clock, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    limits, windows = gateway(), Windows(3, 60, clock)
    limits.count("ada", "requests", windows)
    limits.flush()
    postgres.stop()
    try:
        limits.flush()
        assert [limits.count("ada", "requests", windows).over for _ in range(3)] == [False, False, True]
        limits.flush()
    finally:
        postgres.start()
    assert len(re.findall("counted for this gateway alone", caplog.text)) == 1
    limits.flush()
    second, other_windows = gateway(), Windows(3, 60, clock)
    second.count("ada", "requests", other_windows)
    second.flush()
    assert second.count("ada", "requests", other_windows, 0).over


def test_what_is_counted_without_the_database_is_forgotten_with_its_window(
    gateway: Gateway, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, second, windows = gateway(), gateway(), Windows(3, 60, clock)

    def refuse(_address: PostgresAddress) -> None:
        raise RemoteError("db.example", "no connection to the database")

    with monkeypatch.context() as patched:
        limits._discard_database()
        patched.setattr(delayed_limits, "PostgresLimits", refuse)
        for _ in range(4):
            limits.flush()
            assert not limits.count("ada", "requests", windows).over
            clock.now += 30
        limits.flush()
        assert not limits.count("bob", "requests", windows, 3).over
        clock.now += 45
        assert not limits.count("ada", "requests", windows).over
        clock.now += 15
    limits.flush()
    assert limits.count("ada", "requests", windows, 0).remaining == 2
    second.count("ada", "requests", Windows(3, 60, clock), 0)
    second.flush()
    assert second.count("ada", "requests", Windows(3, 60, clock), 0).remaining == 2
    assert limits.count("bob", "requests", windows, 0).remaining == 3


def test_a_window_is_shared_by_gateways_whose_clocks_differ(address: PostgresAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DelayedLimits, "_start", lambda _limits: None)
    gateways = [DelayedLimits(address, lambda ahead=ahead: time.time() + ahead) for ahead in (-3600, 0, 30)]  # type: ignore[misc]
    for limits in gateways:
        limits.count("ada", "requests", Windows(3, 60))
        assert limits.begin("ada", 9)
        limits.flush()
    for limits in gateways:
        limits.flush()
        window = limits.count("ada", "requests", Windows(3, 60), 0)
        assert window.over
        assert window.seconds <= 60
        assert limits._elsewhere == {"ada": 2}
        limits._discard_database()


@contextmanager
def commits_without_answer(server: int) -> Iterator[tuple[int, list[bool]]]:
    """Serve the database on another port; while the list has an element, a connection ends when it has committed."""
    is_cut: list[bool] = []

    def forward(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", server)) as database:
            while readable := select.select([client, database], [], [])[0]:
                for source in readable:
                    data = source.recv(1 << 16)
                    (database if source is client else client).sendall(data)
                    if not data:
                        return
                    if is_cut and source is client and b"COMMIT" in data:
                        database.recv(1)
                        return

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    Thread(target=forward, args=(listener.accept()[0],), daemon=True).start()

        Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1], is_cut


def test_a_commit_whose_answer_is_lost_counts_once(address: PostgresAddress, postgres: Postgres) -> None:
    with commits_without_answer(postgres.port) as (port, is_cut):
        near = PostgresAddress(address.url.replace(f":{postgres.port}/", f":{port}/"), "near")
        recorder = UsageRecorder(near, has_budgets=lambda: True, clock=lambda: 9.5 * DAY)
        recorder.add_answer(ANSWER)
        add(recorder)
        is_cut.append(True)
        recorder.add_answer(replace(ANSWER, answer="chatcmpl-2"))
        add(recorder)  # which fails, after the commit
        is_cut.clear()
        assert usage_report.report(address, ["key"], 0).total.usage.requests == 2
        assert recorder.spent_by("ada") == (46, 46)
        add(recorder)
        assert usage_report.report(address, ["key"], 0).total.usage.requests == 3
        assert len(answer_log.find_answers(address, "r1")) == 2
        assert recorder.spent_by("ada") == (69, 69)
        recorder._discard_database()


@pytest.mark.parametrize("words", [("usage",), ("served", "r1")])
def test_a_database_that_is_down_is_said_in_one_line(run: Run, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module.Postgres, "_connect_seconds", 600)  # only who must not wait for so long does not
    result = run(*words, "--usage-file", "postgresql://127.0.0.1:1/x", code=5)
    assert (
        result.stderr.removeprefix("error: ")
        == "postgresql://127.0.0.1:1/x: no connection to the database. Try again later  [remote-error]\n"
    )


def test_the_tables_are_for_a_user_who_may_create_no_schema(address: PostgresAddress, postgres: Postgres) -> None:
    name = address.url.rpartition("/")[2]
    user = f"user_of_{name}"
    postgres.sql(name, f"CREATE USER {user}; CREATE SCHEMA adapterhub_gateway AUTHORIZATION {user}")
    url = address.url.replace("postgres@", f"{user}@")
    with closing(PostgresUsage(PostgresAddress(url, ""))) as usage, closing(PostgresLimits(PostgresAddress(url, ""))):
        assert usage.has_table("usage")


def test_both_kinds_of_tables_may_be_created_at_once(address: PostgresAddress) -> None:
    kinds = [PostgresUsage, PostgresLimits] * 3
    with ThreadPoolExecutor(len(kinds)) as pool:
        for tables in pool.map(lambda kind: kind(address), kinds):
            tables.close()


def test_a_database_that_hangs_holds_up_no_request(address: PostgresAddress, postgres: Postgres) -> None:
    limits, windows = DelayedLimits(address), Windows(2, 3600)
    limits.count("ada", "requests", windows)
    while not limits._is_connected(limits._clock()):
        time.sleep(0.01)
    with postgres.hanging():
        assert [limits.count("ada", "requests", windows).over for _ in range(3)] == [False, True, True]
        assert limits.begin("ada", 1)
        limits.end("ada")
        limits.close()  # which waits for a moment only


def test_the_database_may_be_that_of_a_hub(address: PostgresAddress, recorder: Callable[[], UsageRecorder]) -> None:
    with closing(PostgresDatabase(address.url)) as hub:
        add(recorder())
        assert not hub.has_table("usage")
        assert hub.has_table("entries")


@pytest.mark.parametrize("address", ["postgresql://ada:se%zzcret@127.0.0.1:1/x", "postgresql://127.0.0.1:1/x?pass=se%zzcret"])
def test_an_address_that_cannot_be_read_is_not_repeated(run: Run, address: str) -> None:
    result = run("usage", "--usage-file", address, code=2)
    assert result.stderr.startswith("error: database: not an address of PostgreSQL. ")
    assert result.stderr.count("\n") == 1
    assert "cret" not in result.stderr


def test_the_command_line_reads_it(run: Run, address: PostgresAddress, recorder: Callable[[], UsageRecorder]) -> None:
    add(recorder())
    result = run("usage", "--usage-file", address.url, "--since", "1970-01-01", "--csv")
    assert result.stdout.splitlines()[1].startswith("team/a,1,0,20,16,3")
