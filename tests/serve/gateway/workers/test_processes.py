"""Forked workers: replaced when they end, and ended with the one that forked them."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from adapterhub.operations.workspace import Workspace
from adapterhub.serve.gateway import server
from adapterhub.serve.gateway.gateway_settings import GatewaySettings
from adapterhub.serve.gateway.workers.processes import fork_workers
from adapterhub_converters.errors import RefusedError


def numbers(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.glob("[0-9]*")}


def write_and_wait(folder: Path, stop_end: int, is_replacement: bool) -> None:
    (folder / str(os.getpid())).touch()
    os.read(stop_end, 1)
    (folder / f"end-{os.getpid()}-{is_replacement}").touch()


def test_a_worker_that_ends_is_replaced_and_all_end_with_the_pipe(tmp_path: Path) -> None:
    processes = fork_workers(2, partial(write_and_wait, tmp_path), (tmp_path / "stop").touch)
    while len(first := numbers(tmp_path)) < 2:
        time.sleep(0.01)
    victim = min(first)
    os.kill(victim, signal.SIGKILL)
    while len(numbers(tmp_path)) < 3:
        time.sleep(0.01)
    processes.stop()
    assert (tmp_path / "stop").exists()
    ends = {f"end-{pid}-{pid not in first}" for pid in numbers(tmp_path) - {victim}}
    assert {path.name for path in tmp_path.glob("end-*")} == ends
    assert os.read(processes.life_end, 1) == b""


def test_signals_that_all_processes_get_do_not_end_the_one_that_forks(tmp_path: Path) -> None:
    processes = fork_workers(1, partial(write_and_wait, tmp_path), lambda: None)
    while not numbers(tmp_path):
        time.sleep(0.01)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(processes.pid, number)
    processes.stop()
    assert len(list(tmp_path.glob("end-*"))) == 1


def test_without_fork_several_workers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "fork")
    settings = GatewaySettings(cast(Any, None), "base", Workspace(registry=tmp_path))
    with pytest.raises(RefusedError, match="this system has no fork") as refused:
        server.serve(settings, cast(Any, None), ready=print, workers=2)
    assert refused.value.code == "workers-need-fork"
