"""Work in a process forked from this one, which is killed, or in which strace makes one system call fail."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from adapterhub_converters.errors import LocalIOError
from tests.conftest import need_program

# A system call, and those that do the same in an open folder.
_CALLS = {"rename": "rename,renameat,renameat2", "unlink": "unlink,unlinkat", "link": "link,linkat", "mkdir": "mkdir,mkdirat"}
_PR_SET_PTRACER, _ANY = 0x59616D61, ctypes.c_ulong(-1)  # prctl(2): where only a process's parents may trace it


def fork(work: Callable[[], object]) -> int:
    """A process that does some work and exits 0, as a LocalIOError does, or 1 with a traceback; its id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except LocalIOError as error:
        os._exit(error.exit_code)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def finished(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def under_strace(inject: str, work: Callable[[], object]) -> int:
    """The exit code of some work in which one system call fails or kills, as strace's `inject` says: 0, 8 or -9.

    Calls are counted from where the work begins.
    """
    call, _, fault = inject.partition(":")
    call = _CALLS.get(call, call)
    read_end, write_end = os.pipe()

    def waiting() -> None:
        os.close(write_end)
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)
        os.read(read_end, 1)
        os.close(read_end)
        work()

    command = [need_program("strace"), "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:{fault}"]
    child = fork(waiting)
    os.close(read_end)
    with subprocess.Popen([*command, "-p", str(child)]) as strace:
        while "\nTracerPid:\t0\n" in Path(f"/proc/{child}/status").read_text():
            assert strace.poll() is None, "strace has ended"
            time.sleep(0.001)
        os.close(write_end)
        (code,) = finished([child])
    assert code != 1
    return code
