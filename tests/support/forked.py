"""`adapterhub ARGS…` as a process forked from one that has imported it already.

A process in all that a test can see (its folder, environment, streams, signals and exit code), without the tenth of a second to
several that Python takes to import what a command needs, and the tenth to free it again, object by object, for which every page
that was shared is copied. What is about the start or the end of an interpreter wants one of its own.

    python -m tests.forked SOCKET MODULE…      # serves until its stdin is closed
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import pkgutil
import runpy
import select
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What the interpreter, or a library as it is loaded, reads once.
_AT_START = ("PYTHON", "LD_", "LC_", "LANG", "TZ", "MALLOC_", "OMP_", "OPENBLAS_", "MKL_", "CUDA_")
_NOT_IMPORTED = (
    "adapterhub.generation", "adapterhub.training", "adapterhub.remotes.hub.writer",
    "adapterhub.serve.host", "adapterhub.serve.engines.in_process",
)  # fmt: skip
_LIBRARIES = ("HF_", "TRANSFORMERS_", "MPL")  # read as those who train are imported


class Forked:
    """A server of processes, started when it is first asked for one: `run`, in several threads at once if they like."""

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str], open_until: contextlib.ExitStack) -> None:
        self._environment, self._modules, self._open_until = environment, modules, open_until
        self._names = (*_AT_START, *(_LIBRARIES if "torch" in modules else ()))

    def can(self, environment: Mapping[str, str]) -> bool:
        """Whether an interpreter that started in this environment would be like the server's."""
        return self._read_at_start(environment) == self._read_at_start(self._environment)

    def _read_at_start(self, environment: Mapping[str, str]) -> dict[str, str]:
        return {key: value for key, value in environment.items() if key.startswith(self._names)}

    @functools.cached_property
    def _address(self) -> str:
        return self._open_until.enter_context(_serving(self._environment, self._modules))

    def run(
        self, args: Sequence[str], cwd: Path, environment: Mapping[str, str], first: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run one to its end; `first` is Python that it executes before."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            code = self.exit_code(args, cwd, environment, first, streams=(out.fileno(), err.fileno()))
            out.seek(0)
            err.seek(0)
            texts = [io.TextIOWrapper(file, encoding="utf-8").read() for file in (out, err)]
        return subprocess.CompletedProcess(list(args), code, *texts)

    def exit_code(
        self, args: Sequence[str], cwd: Path, environment: Mapping[str, str], first: str = "", *, streams: tuple[int, int]
    ) -> int:
        """Run one to its end with these descriptors for its stdout and stderr."""
        asked = json.dumps({"args": list(args), "cwd": str(cwd), "environment": dict(environment), "first": first}).encode()
        with socket.socket(socket.AF_UNIX) as server:
            server.settimeout(300)
            server.connect(self._address)
            socket.send_fds(server, [len(asked).to_bytes(8, "little")], list(streams))
            server.sendall(asked)
            return int(server.makefile().readline())


@contextlib.contextmanager
def _serving(environment: Mapping[str, str], modules: Sequence[str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # the address of a socket has to be short
        command = [sys.executable, "-m", "tests.support.forked", f"{folder}/s", *modules]
        with subprocess.Popen(command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdin
            assert process.stdout
            assert process.stdout.readline() == b"ready\n"
            yield f"{folder}/s"
            process.stdin.close()


# ---- the server


def _ours() -> None:
    """Import our modules without torch and huggingface_hub, so that the only imports left are those a command should avoid."""
    import adapterhub
    import adapterhub_converters

    sys.modules["pandas"] = None  # type: ignore[assignment]  # which sqlite-utils imports, half of the memory, if it is there
    for package in (adapterhub, adapterhub_converters):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda _: None):
            if not found.name.endswith("__main__") and not found.name.startswith(_NOT_IMPORTED):
                with contextlib.suppress(ImportError):
                    importlib.import_module(found.name)
    del sys.modules["pandas"]


def _asked(connection: socket.socket) -> dict[str, Any]:
    size, streams, _, _ = socket.recv_fds(connection, 8, 2)
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)
    asked: dict[str, Any] = json.loads(connection.makefile("rb").read(int.from_bytes(size, "little")))
    return asked


def _serve(listener: socket.socket) -> dict[str, Any] | None:
    """In each process that was asked for, what was asked; None in the server at its end."""
    running: dict[int, tuple[int, socket.socket]] = {}  # a descriptor of the process: its id, and who waits for its exit code
    while sys.stdin not in (ready := select.select([listener, sys.stdin, *running], [], [])[0]):
        for descriptor in running.keys() & set(ready):
            process, waiting = running.pop(descriptor)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            with contextlib.suppress(OSError), waiting:  # nobody waits any more
                waiting.sendall(f"{code}\n".encode())
            os.close(descriptor)
        if listener in ready:
            connection, _ = listener.accept()
            process = os.fork()
            if not process:
                listener.close()
                for descriptor, (_, waiting) in running.items():
                    waiting.close()
                    os.close(descriptor)
                with connection:
                    asked = _asked(connection)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.environ.clear()
                os.environ.update(asked["environment"])
                os.chdir(asked["cwd"])
                return asked
            running[os.pidfd_open(process)] = process, connection
    return None


def _run(asked: dict[str, Any]) -> int:
    """Run the command line as the interpreter would, up to what it does before it frees its memory; the exit code."""
    sys.argv[1:] = asked["args"]
    code: object = 0
    try:
        exec(asked["first"], {})
        runpy.run_module("adapterhub", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        return 120
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    address, *modules = sys.argv[1:]
    for module in modules:
        with contextlib.suppress(ImportError):  # of an extra that isn't installed
            importlib.import_module(module)
    _ours()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    print("ready", flush=True)
    gc.freeze()  # else a collection writes to every page that is shared
    asked = _serve(listener)
    if asked is not None:
        os._exit(_run(asked))
