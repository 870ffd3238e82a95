"""Usage on its way to a file: by several processes, through kill -9, and while the disk is full or broken."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pytest

from adapterhub.serve.usage import answer_log, usage_recorder, usage_report
from adapterhub.serve.usage.answer_log import AnswerRecord
from adapterhub.serve.usage.record_place import FILE
from adapterhub.serve.usage.token_counts import TokenCounts
from adapterhub.serve.usage.usage_database import DAY, UsageDatabase, UsageKey, UsageSum
from adapterhub.serve.usage.usage_recorder import UsageRecorder
from adapterhub.sqlite_file import ConstraintError
from adapterhub_converters.errors import LocalIOError, NotFoundError

TOKENS = TokenCounts(20, 16, 3)


def add(recorder: UsageRecorder, version: str = "team/a", key: str = "ada") -> None:
    recorder.add(key=key, version=version, route="", arm="", engine="vllm", path="/v1/completions", tokens=TOKENS)


def totals(path: Path) -> UsageSum:
    return usage_report.report(path, ["version"], 0).total.usage


def test_requests_of_an_hour_are_one_row(tmp_path: Path) -> None:
    now = 7200.0
    recorder = UsageRecorder(tmp_path / FILE, clock=lambda: now)
    for _ in range(3):
        add(recorder)
        recorder.flush()
    add(recorder, key="")
    now = 10800.0
    add(recorder)
    recorder.flush()
    with closing(UsageDatabase(tmp_path / FILE)) as database:
        rows = database.select("SELECT hour, key, requests, estimated, prompt_tokens, cached_tokens, answer_tokens FROM usage")
    assert sorted(rows) == [(7200, "", 1, 0, 20, 16, 3), (7200, "ada", 3, 0, 60, 48, 9), (10800, "ada", 1, 0, 20, 16, 3)]


def _record(path: Path) -> None:
    recorder = UsageRecorder(path)
    recorder.start()
    for _ in range(50):
        add(recorder)
        recorder.flush()
    recorder.close()


def test_several_processes_add_to_one_file(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_record, args=(tmp_path / FILE,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert totals(tmp_path / FILE) == UsageSum(150, 0, 3000, 2400, 450)


def test_what_was_written_before_a_kill_is_there(tmp_path: Path) -> None:
    """At most the last seconds are lost: all that is written before the kill is read after it, without any repair."""
    script = f"""
import sys, time
from pathlib import Path
from tests.serve.usage.test_usage_recorder import UsageRecorder, add
recorder = UsageRecorder(Path({str(tmp_path / FILE)!r}))
recorder.start()
while True:
    add(recorder)
    time.sleep(0.01)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    path, written = tmp_path / FILE, 0
    while not written:
        with suppress(NotFoundError, LocalIOError):  # the file is not there yet, or has no tables yet
            written = totals(path).requests
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert totals(path).requests >= written
    recorder = UsageRecorder(path)
    recorder.flush()
    add(recorder)
    recorder.flush()
    assert totals(path).requests > written


def test_a_full_disk_loses_nothing_and_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / FILE
    recorder = UsageRecorder(path)
    recorder.flush()
    assert recorder._database is not None
    recorder._database.execute("PRAGMA max_page_count = 1")  # for SQLite, the disk is full from here on
    for number in range(200):
        add(recorder, f"team/a{number}")
    recorder.flush()
    assert "usage is kept in memory" in caplog.text
    assert "full" in caplog.text
    assert totals(path).requests == 0
    add(recorder)
    recorder.flush()
    assert totals(path).requests == 201


def test_a_folder_that_cannot_be_written_holds_nobody_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    recorder = UsageRecorder(tmp_path / "file" / FILE)
    recorder.start()
    for _ in range(3):
        add(recorder)
        recorder.flush()
    recorder.close()
    assert caplog.text.count("usage is kept in memory") == 1
    (tmp_path / "file").unlink()
    recorder.flush()
    assert totals(tmp_path / "file" / FILE).requests == 3


def test_a_file_that_is_no_database_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(b"precious" * 1000)
    recorder = UsageRecorder(tmp_path / FILE)
    recorder.flush()
    add(recorder)
    recorder.flush()
    assert "not a database" in caplog.text
    assert (tmp_path / FILE).read_bytes() == b"precious" * 1000


def test_sums_that_a_constraint_refuses_are_kept(tmp_path: Path) -> None:
    recorder = UsageRecorder(tmp_path / FILE)
    recorder.flush()
    with closing(sqlite3.connect(tmp_path / FILE, isolation_level=None)) as database:
        database.execute("CREATE TRIGGER refuse BEFORE INSERT ON usage BEGIN SELECT RAISE(ABORT, 'no'); END")
        add(recorder)
        with pytest.raises(ConstraintError):
            recorder.flush()
        database.execute("DROP TRIGGER refuse")
    recorder.flush()
    assert totals(tmp_path / FILE).requests == 1


def test_writing_waits_for_a_lock_without_holding_up_requests(tmp_path: Path) -> None:
    path = tmp_path / FILE
    recorder = UsageRecorder(path)
    recorder.start()
    with closing(sqlite3.connect(path, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        while not recorder._lock.acquire(blocking=False):  # held for a moment only, whatever the file does
            pass
        recorder._lock.release()
        add(recorder)
        holder.execute("ROLLBACK")
    recorder.close()
    assert totals(path).requests == 1


def test_the_end_writes_what_is_left(tmp_path: Path) -> None:
    recorder = UsageRecorder(tmp_path / FILE)
    recorder.start()
    add(recorder)
    recorder.close()
    assert totals(tmp_path / FILE).requests == 1


def test_the_rows_of_an_hour_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_recorder, "_MAX_ROWS", 10)
    recorder = UsageRecorder(tmp_path / FILE, clock=lambda: 0.0)
    for number in range(30):
        add(recorder, f"team/a{number}")
        if not number % 7:
            recorder.flush()
    recorder.flush()
    report = usage_report.report(tmp_path / FILE, ["version"], 0)
    assert len(report.rows) == 11
    assert {row.group: row.usage.requests for row in report.rows}[("other",)] == 20


def test_old_rows_are_deleted(tmp_path: Path) -> None:
    with closing(UsageDatabase(tmp_path / FILE)) as database:
        for day in (0, 100, 500):
            database.add({UsageKey(day * DAY, "ada", "team/a", "", "", "vllm", "/"): UsageSum(1)})
        database.delete_old(500.5 * DAY)
        assert database.select("SELECT hour FROM usage") == [(100 * DAY,), (500 * DAY,)]
        assert database.select("SELECT day FROM key_days") == [(100,), (500,)]


# ---- what keys spend

JANUARY_31 = 30 * DAY  # of 1970


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = JANUARY_31 + 7200.0

    def __call__(self) -> float:
        return self.now


def spending(path: Path | None, clock: Clock) -> UsageRecorder:
    recorder = UsageRecorder(path, has_budgets=lambda: True, clock=clock)
    if path:
        recorder.flush()  # as a start would
    return recorder


def test_what_a_key_spends_is_known_at_once_and_counts_once(tmp_path: Path) -> None:
    recorder = spending(tmp_path / FILE, Clock())
    for number in range(1, 5):
        add(recorder)
        assert recorder.spent_by("ada") == (23 * number, 23 * number)
        if number > 1:
            recorder.flush()
        assert recorder.spent_by("ada") == (23 * number, 23 * number)
    assert recorder.spent_by("bob") == (0, 0)


def test_what_a_key_spends_is_shared_and_survives_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    first, second = spending(tmp_path / FILE, clock), spending(tmp_path / FILE, clock)
    add(first)
    add(second)
    first.flush()
    second.flush()
    assert second.spent_by("ada") == (46, 46)
    assert first.spent_by("ada") == (23, 23)  # until it reads the file again
    first.flush()
    assert first.spent_by("ada") == (46, 46)
    third = spending(tmp_path / FILE, clock)
    third.flush()
    assert third.spent_by("ada") == (46, 46)


@pytest.mark.parametrize("flushed", [True, False])
def test_days_and_months_are_those_of_the_calendar(tmp_path: Path, flushed: bool) -> None:
    clock = Clock()
    recorder = spending(tmp_path / FILE, clock)
    clock.now -= DAY
    add(recorder)
    if flushed:
        recorder.flush()
    assert recorder.spent_by("ada") == (23, 23)
    clock.now += DAY
    assert recorder.spent_by("ada") == (0, 23)
    add(recorder)
    if flushed:
        recorder.flush()
    assert recorder.spent_by("ada") == (23, 46)
    clock.now += DAY
    assert recorder.spent_by("ada") == (0, 0)


def test_without_a_file_what_a_key_spends_is_counted_in_memory() -> None:
    recorder = spending(None, Clock())
    recorder.start()
    for _ in range(3):
        add(recorder)
    assert recorder.spent_by("ada") == (69, 69)
    recorder.close()
    assert recorder.spent_by("ada") == (69, 69)


def test_what_a_key_had_spent_is_unknown_until_the_file_has_been_read_and_then_counted_without_it(tmp_path: Path) -> None:
    earlier = spending(tmp_path / FILE, Clock())
    add(earlier)
    earlier.flush()
    (tmp_path / FILE).rename(tmp_path / "away")
    (tmp_path / FILE).mkdir()
    recorder = spending(tmp_path / FILE, Clock())
    add(recorder)
    recorder.flush()
    assert recorder.spent_by("ada") is None
    (tmp_path / FILE).rmdir()
    (tmp_path / "away").rename(tmp_path / FILE)
    recorder.flush()
    assert recorder.spent_by("ada") == (46, 46)
    (tmp_path / FILE).rename(tmp_path / "away")
    (tmp_path / FILE).mkdir()
    add(recorder)
    recorder.flush()
    assert recorder.spent_by("ada") == (69, 69)


def test_the_log_keeps_the_newest_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_log, "MAX_ANSWERS", 3)
    recorder = UsageRecorder(tmp_path / FILE)
    for number in range(5):
        recorder.add_answer(AnswerRecord(f"r{number}", "", 1e10, "", "team/a", "", "", "vllm", "/", 200, 0.1, 1, 1))
        recorder.flush()
    kept_numbers = [number for number in range(5) if answer_log.find_answers(tmp_path / FILE, f"r{number}")]
    assert kept_numbers == [2, 3, 4]


def test_answers_are_kept_in_memory_until_the_file_can_be_written_and_then_written_once(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    recorder = UsageRecorder(tmp_path / FILE)
    recorder.add_answer(AnswerRecord("r", "a", 1e10, "", "team/a", "", "", "vllm", "/", 200, 0.1, 1, 1))
    recorder.flush()
    (tmp_path / FILE).rmdir()
    for _ in range(2):
        recorder.flush()
    assert len(answer_log.find_answers(tmp_path / FILE, "a")) == 1


HOLD_LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+") as file:
    fcntl.lockf(file, fcntl.LOCK_SH)
    print(flush=True)
    sys.stdin.read()
"""


def test_a_gateway_knows_whether_another_process_has_the_same_record(tmp_path: Path) -> None:
    recorder = UsageRecorder(tmp_path / FILE)
    recorder.start()
    try:
        assert not recorder.has_company()
        words = [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "usage.lock")]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other_process:
            assert other_process.stdout is not None
            other_process.stdout.readline()
            assert recorder.has_company()
            assert recorder.has_company()  # a look does not give the lock back
            other_process.communicate()
        assert not recorder.has_company()
    finally:
        recorder.close()
