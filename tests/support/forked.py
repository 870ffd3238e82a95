"""`adapterhub ARGS…` as a process forked from one that has imported it already.

A process in all that a test can see (its folder, environment, streams, signals and exit code), without the tenth of a second to
several that Python takes to import what a command needs. What is about the start itself wants an interpreter of its own.

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
import pty
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What the interpreter, or a library as it is loaded, reads once.
_AT_START = ("PYTHON", "LD_", "LC_", "LANG", "TZ", "MALLOC_", "OMP_", "OPENBLAS_", "MKL_", "CUDA_")
_NOT_IMPORTED = (
    "adapterhub.evaluation", "adapterhub.generation", "adapterhub.training", "adapterhub.remotes.hub.hub_writer",
    "adapterhub.serve.torch_engine", "adapterhub.serve.engines.in_process",
)  # fmt: skip
_LIBRARIES = ("HF_", "TRANSFORMERS_", "MPL")  # read as those who train are imported


class Forked:
    """A server of processes, started when it is first asked for one: `run`, in several threads at once if they like."""

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str], open_until: contextlib.ExitStack) -> None:
        self._environment, self._modules, self._open_until = environment, modules, open_until
        self._names = (*_AT_START, *(_LIBRARIES if "torch" in modules else ()))

    def suits(self, environment: Mapping[str, str]) -> bool:
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

    def on_terminals(
        self,
        args: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str],
        first: str = "",
        *,
        typed: str = "",
        count: int = 1,
    ) -> tuple[int, list[str]]:
        """Run one to its end on a terminal, at which something is typed; its code, and what that and a second one show.

        The second terminal, of two, is that of stderr.
        """
        ends = [pty.openpty() for _ in range(count)]
        outputs = [bytearray() for _ in ends]
        readers = [threading.Thread(target=_read, args=(end[0], text)) for end, text in zip(ends, outputs, strict=True)]
        for reader in readers:
            reader.start()
        os.write(ends[0][0], typed.encode())
        code = self.exit_code(args, cwd, environment, first, streams=(ends[0][1], ends[-1][1], ends[0][1]))
        for end in ends:
            os.close(end[1])
        for reader in readers:
            reader.join()
        for end in ends:
            os.close(end[0])
        return code, [text.decode().replace("\r\n", "\n") for text in outputs]

    def exit_code(
        self, args: Sequence[str], cwd: Path, environment: Mapping[str, str], first: str = "", *, streams: tuple[int, ...]
    ) -> int:
        """Run one to its end with these descriptors for its stdout and stderr, and a third for stdin, which else is empty."""
        return self.start(args, cwd, environment, first, streams=streams)[1]()

    def start(
        self, args: Sequence[str], cwd: Path, environment: Mapping[str, str], first: str = "", *, streams: tuple[int, ...]
    ) -> tuple[int, Callable[[], int]]:
        """Start one; return the number of its process, and what waits for its end and returns its exit code."""
        request = json.dumps({"args": list(args), "cwd": str(cwd), "environment": dict(environment), "first": first}).encode()
        server = socket.socket(socket.AF_UNIX)
        server.settimeout(300)
        server.connect(self._address)
        socket.send_fds(server, [len(request).to_bytes(8, "little")], list(streams))
        server.sendall(request)
        lines = server.makefile()
        number = int(lines.readline())

        def end() -> int:
            with server, lines:
                try:
                    return int(lines.readline())
                except TimeoutError:
                    os.kill(number, signal.SIGKILL)
                    raise

        return number, end


def _read(descriptor: int, text: bytearray) -> None:
    with contextlib.suppress(OSError):
        while piece := os.read(descriptor, 65536):
            text += piece


@contextlib.contextmanager
def _serving(environment: Mapping[str, str], modules: Sequence[str]) -> Iterator[str]:
    short = "/tmp" if os.access("/tmp", os.W_OK) else None  # the address of a socket has 108 bytes
    with tempfile.TemporaryDirectory(dir=short) as folder:
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

    # sqlite-utils imports pandas if it is there: half of the memory.
    without = sys.modules.setdefault("pandas", None) is None  # type: ignore[arg-type]
    for package in (adapterhub, adapterhub_converters):
        for module_info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda _: None):
            if not module_info.name.endswith("__main__") and not module_info.name.startswith(_NOT_IMPORTED):
                with contextlib.suppress(ImportError):
                    importlib.import_module(module_info.name)
    if without:
        del sys.modules["pandas"]


def _read_request(connection: socket.socket) -> dict[str, Any]:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    size, streams, _, _ = socket.recv_fds(connection, 8, 3)
    for number, stream in zip((1, 2, 0), streams, strict=False):
        os.dup2(stream, number)
        os.close(stream)
    request: dict[str, Any] = json.loads(connection.makefile("rb").read(int.from_bytes(size, "little")))
    return request


def _serve(listener: socket.socket) -> dict[str, Any] | None:
    """In each process that was asked for, what was asked; None in the server at its end."""
    running: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of a process: its number, and who waits for its end
    while True:
        ready = select.select([listener, sys.stdin, *running], [], [])[0]
        for process in [process for process in ready if process in running]:
            child, connection = running.pop(process)
            os.close(process)
            with connection, contextlib.suppress(BrokenPipeError):
                connection.sendall(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
        if sys.stdin in ready:
            return None
        if listener in ready:
            connection, _ = listener.accept()
            child = os.fork()
            if not child:
                break
            running[os.pidfd_open(child)] = child, connection
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(f"{child}\n".encode())
    for process, (_, other_connection) in running.items():
        os.close(process)
        other_connection.close()
    listener.close()
    with connection:
        request = _read_request(connection)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    return request


def _leave(codes: list[object]) -> None:
    """End a process with the code of its command, before Python frees, page by page, all that the server has imported.

    Registered first, to run after all that the command registers. Any other end is Python's own: an exception, a code that is
    a text, a stream that cannot be flushed.
    """
    if codes and isinstance(codes[0], int):
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(codes[0])


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
    request = _serve(listener)
    if request is not None:
        sys.argv[1:] = request["args"]
        codes: list[object] = []
        atexit.register(_leave, codes)
        try:
            exec(request["first"], {})
            runpy.run_module("adapterhub", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            codes.append(end.code or 0)
            raise
