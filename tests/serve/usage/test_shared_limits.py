"""Limits of keys over several gateways: exact between processes, and those of a gateway alone where there is no file."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub.http_server.rate_windows import Windows
from adapterhub.serve.usage import shared_limits
from adapterhub.serve.usage.shared_limits import SharedLimits

HAMMER = """
import sys
from pathlib import Path
from adapterhub.http_server.rate_windows import Windows
from adapterhub.serve.usage import limits_database
from adapterhub.serve.usage.shared_limits import SharedLimits

limits_database._LOCK_SECONDS = 60.0  # a busy machine may stop the other process in the middle of a statement
limits, windows = SharedLimits(Path(sys.argv[1])), Windows(300, 3600)
print("ready", flush=True)
sys.stdin.readline()
answered = [not limits.count("ada", "requests", windows).over for _ in range(200)]
running = [limits.begin("ada", 30) for _ in range(20)]
print(sum(answered), sum(running), flush=True)
sys.stdin.readline()
"""


class Clock:
    """A time that tests set."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gateway(tmp_path: Path, clock: Clock) -> Callable[[], SharedLimits]:
    return lambda: SharedLimits(tmp_path / "usage" / "limits.db", clock)


def test_processes_that_count_at_the_same_time_answer_together_exactly_what_a_limit_allows(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HAMMER, str(tmp_path / "limits.db")]
    gateways = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in gateways:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
        for process in gateways:
            assert process.stdin
            print(file=process.stdin, flush=True)
        counts = [tuple(map(int, process.stdout.readline().split())) for process in gateways if process.stdout]
    finally:
        for process in gateways:
            process.communicate("\n", timeout=60)
    assert [sum(column) for column in zip(*counts, strict=True)] == [300, 30]


def test_a_window_is_shared_until_it_ends(gateway: Callable[[], SharedLimits], clock: Clock) -> None:
    left, right, windows = gateway(), gateway(), Windows(2, 60, clock)
    assert not left.count("ada", "requests", windows).over
    clock.now += 20
    assert not right.count("ada", "requests", Windows(2, 60, clock)).over
    window = left.count("ada", "requests", windows)
    assert (window.over, window.remaining, window.seconds) == (True, 0, 40)
    assert not left.count("bob", "requests", windows).over
    assert not left.count("ada", "tokens", windows).over
    clock.now += 40
    assert not right.count("ada", "requests", Windows(2, 60, clock)).over


def test_a_look_at_a_window_counts_nothing(gateway: Callable[[], SharedLimits], clock: Clock) -> None:
    left, right = gateway(), gateway()
    assert left.count("ada", "tokens", Windows(100, 60, clock), 0).remaining == 100
    right.count("ada", "tokens", Windows(100, 60, clock), 100)
    assert left.count("ada", "tokens", Windows(100, 60, clock), 0).over


def test_a_gateway_that_read_the_clock_before_another_began_a_window_counts_in_it(
    gateway: Callable[[], SharedLimits], clock: Clock
) -> None:
    assert not gateway().count("ada", "requests", Windows(1, 60, clock)).over
    clock.now -= 0.1
    assert gateway().count("ada", "requests", Windows(1, 60, clock), 0).over
    assert gateway().count("ada", "requests", Windows(1, 60, clock)).over


def test_a_clock_that_is_set_back_locks_nobody_out(gateway: Callable[[], SharedLimits], clock: Clock) -> None:
    left = gateway()
    assert left.begin("ada", 1)
    assert left.count("ada", "requests", Windows(1, 60, clock)).remaining == 0
    clock.now -= 3600
    assert not gateway().count("ada", "requests", Windows(1, 60, clock)).over
    assert gateway().begin("ada", 1)


def test_requests_at_once_are_shared_until_they_end(gateway: Callable[[], SharedLimits]) -> None:
    left, right = gateway(), gateway()
    assert left.begin("ada", 2)
    assert right.begin("ada", 2)
    assert not left.begin("ada", 2)
    right.end("ada")
    assert left.begin("ada", 2)
    left.close()
    assert right.begin("ada", 1)


def test_a_killed_gateway_holds_its_requests_for_ten_seconds_and_one_that_lives_as_long_as_they_run(
    gateway: Callable[[], SharedLimits], clock: Clock
) -> None:
    living, killed, third = gateway(), gateway(), gateway()
    assert living.begin("ada", 3)
    assert killed.begin("ada", 3)
    for _ in range(4):
        clock.now += 2.4
        living.refresh()
    assert third.begin("ada", 3)
    assert not third.begin("ada", 3)
    clock.now += 1
    living.refresh()
    assert third.begin("ada", 3)
    assert not third.begin("ada", 3)


@pytest.mark.parametrize("kind", ["none", "a folder", "no database"])
def test_without_a_file_a_gateway_counts_for_itself_and_says_why_once(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(shared_limits, "_RETRY_SECONDS", 0.0)
    path = tmp_path / "limits.db"
    if kind == "a folder":
        path.mkdir()
    elif kind == "no database":
        path.write_bytes(b"x" * 4096)
    limits, windows = SharedLimits(None if kind == "none" else path, clock), Windows(2, 60, clock)
    assert [limits.count("ada", "requests", windows).over for _ in range(3)] == [False, False, True]
    assert [limits.begin("ada", 1), limits.begin("ada", 1)] == [True, False]
    limits.end("ada")
    assert limits.begin("ada", 1)
    limits.refresh()
    limits.close()
    assert [record.levelname for record in caplog.records] == ["ERROR"] * (kind != "none")


def test_a_gateway_uses_the_file_again_once_it_can(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_limits, "_RETRY_SECONDS", 0.0)
    path = tmp_path / "limits.db"
    path.mkdir()
    left, right = SharedLimits(path, clock), SharedLimits(path, clock)
    assert left.begin("ada", 1)
    path.rmdir()
    left.end("ada")
    assert left.begin("ada", 1)
    assert not right.begin("ada", 1)


@pytest.mark.parametrize("elapsed", [0, 61])
def test_what_is_counted_while_the_file_is_locked_is_added_within_its_window(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, elapsed: float
) -> None:
    monkeypatch.setattr(shared_limits, "_RETRY_SECONDS", 0.0)
    path = tmp_path / "limits.db"
    left, right = SharedLimits(path, clock), SharedLimits(path, clock)
    windows = Windows(4, 60, clock)
    assert left.count("ada", "requests", windows).remaining == 3
    with closing(sqlite3.connect(path)) as database:
        database.execute("BEGIN IMMEDIATE")
        assert left.count("ada", "requests", windows).remaining == 2
        assert left.count("ada", "requests", windows).remaining == 1
    clock.now += elapsed
    assert left.count("ada", "requests", windows, 0).remaining == (4 if elapsed else 1)
    assert right.count("ada", "requests", Windows(4, 60, clock)).remaining == (3 if elapsed else 0)


def test_events_are_given_back_to_the_window_in_which_they_were_counted(
    gateway: Callable[[], SharedLimits], clock: Clock
) -> None:
    left, right, windows = gateway(), gateway(), Windows(10, 60)
    left.count("ada", "tokens", windows, 8)
    assert right.count("ada", "tokens", windows, -3).remaining == 5
    assert right.count("ada", "tokens", windows, -30).remaining == 10
    clock.now += 61
    left.count("ada", "tokens", windows, -3)
    assert right.count("ada", "tokens", windows, 0).remaining == 10
