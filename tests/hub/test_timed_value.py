"""One thread computes a value, and whoever asks meanwhile waits for the first one and has the earlier of later ones."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from adapterhub.hub import timed_value
from adapterhub.hub.timed_value import TimedValue


class Slow:
    """A computation that waits for `go`, and counts how often it began."""

    def __init__(self) -> None:
        self.count, self.started, self.go = 0, threading.Event(), threading.Event()

    def __call__(self) -> int:
        self.count += 1
        self.started.set()
        assert self.go.wait(30)
        return self.count


def test_of_threads_that_ask_for_the_first_value_one_computes_it() -> None:
    value, slow = TimedValue[int](60), Slow()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(value.get, slow) for _ in range(4)]
        assert slow.started.wait(30)
        slow.go.set()
        assert [answer.result() for answer in answers] == [1] * 4


def test_while_one_computes_a_value_anew_others_have_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed_value, "_PAUSE", 0)
    value, slow = TimedValue[int](), Slow()
    value.get(lambda: 0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(value.get, slow)
        assert slow.started.wait(30)
        assert value.get(lambda: -1) == 0
        slow.go.set()
        assert answer.result() == 1


def test_a_value_is_kept_for_its_time_and_for_a_multiple_of_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("adapterhub.hub.timed_value.time.monotonic", lambda: now[0])

    def slowly() -> float:
        now[0] += 2
        return now[0]

    value = TimedValue[float](5)
    assert value.get(slowly) == 102
    now[0] = 141
    assert value.get(slowly) == 102
    now[0] = 143
    assert value.get(slowly) == 145
