"""Forking workers, and starting those again that have ended.

Only a process with one thread and no event loop can fork safely at any time. So the host forks one such process before it
starts anything, which forks the workers, and waits: for the end of a worker, or for the host to close a pipe, as the kernel
does when the host is killed. No signal is passed on: a terminal and a service manager may send theirs to all processes at once.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from adapterhub_converters.lazy_dataclass import dataclass

log = logging.getLogger("adapterhub.serve.workers")

_SHORT_LIFE, _PAUSE = 5.0, 1.0  # seconds; a worker that ends sooner is started again after a pause
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class WorkerProcesses:
    """The process that forks the workers, seen from the host.

    Attributes:
        pid: Its number.
        stop_end: The end of a pipe whose closing it waits for.
        life_end: The end of a pipe that is closed when it ends.
    """

    pid: int
    stop_end: int
    life_end: int
    is_stopped: bool = False

    def stop(self) -> None:
        """Let all workers finish their requests and end, and wait for that."""
        if not self.is_stopped:
            self.is_stopped = True
            os.close(self.stop_end)
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)


def fork_workers(count: int, work: Callable[[int, bool], object], stop_accepting: Callable[[], object]) -> WorkerProcesses:
    """Start workers, each of which has to end once a pipe is closed.

    Args:
        work: Called in each of them with the end of the pipe, and whether it replaces one that has ended.
        stop_accepting: Called in the process that forks them once the workers are to end.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    stop_end, host_stop_end = os.pipe()
    host_life_end, life_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(host_stop_end)
        os.close(host_life_end)
        _run_and_exit(lambda: _ForkServer(count, work, stop_end, life_end).run(stop_accepting))
    os.close(stop_end)
    os.close(life_end)
    return WorkerProcesses(pid, host_stop_end, host_life_end)


class _ForkServer:
    """The process that forks the workers."""

    def __init__(self, count: int, work: Callable[[int, bool], object], stop_end: int, life_end: int) -> None:
        self._count, self._work, self._stop_end, self._life_end = count, work, stop_end, life_end
        self._worker_stop_end, self._workers_end = os.pipe()
        self._workers: dict[int, tuple[int, float]] = {}  # number and start of each, by a pipe that is closed when it ends

    def run(self, stop_accepting: Callable[[], object]) -> None:
        """Start the workers, again and again, until the host closes its pipe; then wait for their end."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        for _ in range(self._count):
            self._start(is_replacement=False)
        while self._stop_end not in (readable := select.select([self._stop_end, *self._workers], [], [])[0]):
            for life_end in readable:
                self._start_again(life_end)
        stop_accepting()
        os.close(self._workers_end)
        for pid, _ in self._workers.values():
            os.waitpid(pid, 0)

    def _start(self, *, is_replacement: bool) -> None:
        life_end, worker_life_end = os.pipe()
        pid = os.fork()
        if not pid:
            for end in (self._stop_end, self._life_end, self._workers_end, life_end, *self._workers):
                os.close(end)
            _run_and_exit(lambda: self._work(self._worker_stop_end, is_replacement))
        os.close(worker_life_end)
        self._workers[life_end] = pid, time.monotonic()

    def _start_again(self, life_end: int) -> None:
        """Replace a worker that has ended."""
        pid, started = self._workers.pop(life_end)
        os.close(life_end)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        log.error("the worker %d has ended (%d); starting another one", pid, code)
        if time.monotonic() - started < _SHORT_LIFE:
            select.select([self._stop_end], [], [], _PAUSE)
        self._start(is_replacement=True)


def _run_and_exit(work: Callable[[], object]) -> NoReturn:
    """Do the work of a forked process, and end it without what its parent still has to do."""
    code = 1
    try:
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - nothing of the parent may go on here
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
