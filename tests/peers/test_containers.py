"""deploy/Dockerfile builds, and its images answer as an unprivileged user with a read-only root, beside a real engine."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest

from adapterhub.http_server.binding import free_port
from tests.conftest import need_module
from tests.support import containers, llama_server, serving
from tests.support.containers import Builder
from tests.test_deploy import DEPLOY, parsed

_ROOTLESS = "without root, buildah needs a machine set up for that"
pytestmark = [pytest.mark.peer, pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason=_ROOTLESS)]

ENDED = (0, 128 + signal.SIGTERM)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builder]:
    containers.check_namespaces()
    builder = Builder(tmp_path_factory.mktemp("images") / "store")
    yield builder
    builder.close()


def wait_until_ready(process: Popen[str], port: int) -> None:
    """Wait until /ready is 200; fail with the output of the container when that ends."""
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10).close()
        except OSError:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        else:
            return


def check_user(process: Popen[str], root: Path) -> None:
    """Assert that the process is of the image's user, without capabilities, and that it cannot write into its root."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    assert status["Uid"].split() == status["Gid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == 0
    options = [
        line.split()[5] for line in Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines() if line.split()[4] == "/"
    ]
    assert "ro" in options[-1].split(",")


def named_volumes(file: str, service: str) -> list[str]:
    """The paths of the volumes that compose makes for a service, which begin as folders of the image."""
    mounts = (mount.split(":") for mount in parsed((DEPLOY / file).read_text())["services"][service]["volumes"])
    return [path for name, path, *_ in mounts if name[0] not in "./$"]


@pytest.mark.parametrize(
    ("target", "file", "service"), [("serve", "compose.serve.yaml", "gateway"), ("hub", "compose.yaml", "hub-1")]
)
def test_volumes_begin_as_folders_of_the_user(builder: Builder, target: str, file: str, service: str) -> None:
    image = builder.image(target)
    assert {*named_volumes(file, service)} == {*image.config["Volumes"]}
    assert {(image.root / path[1:]).stat().st_uid for path in image.config["Volumes"]} == {10001}


def test_a_gateway_answers_by_keys_and_is_healthy(builder: Builder, tmp_path: Path) -> None:
    for module in ("torch", "transformers", "peft"):
        need_module(module)
    models = serving.make_models(tmp_path, adapters=1)
    for file in models.adapter(0).iterdir():
        file.chmod(0o644)  # safetensors writes files for their owner alone, and the image's user is another
    routes = tmp_path / "routes.toml"
    routes.write_text(f'[keys.ada]\nsha256 = "{hashlib.sha256(b"secret").hexdigest()}"\n')
    image, port = builder.image("serve"), free_port()
    mounts = {"/base.gguf": models.gguf, "/routes.toml": routes, "/adapter": models.adapter(0)}
    with image.container(*image.config["Entrypoint"], "push", "/adapter", "team/a0:prod", mounts=mounts) as process:
        assert process.wait(120) == 0, process.communicate()[0]
    with llama_server.alone(models.gguf) as url:
        words = ["serve", "/base.gguf", "--engine", "llama.cpp", "--engine-url", url, "--host", "0.0.0.0", "--port", port]
        words += ["--behind-proxy", "--route", "/routes.toml"]
        with image.container(*image.config["Entrypoint"], *words, mounts=mounts) as process:
            wait_until_ready(process, port)
            check_user(process, image.root)
            assert image.health(port) == 0
            body = {"model": "base", "prompt": "the quick ", "max_tokens": 4, "temperature": 0, "logit_bias": serving.BIAS}
            request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request)
            request.add_header("Authorization", "Bearer secret")
            with urllib.request.urlopen(request) as answer:
                assert json.load(answer)["choices"][0]["text"] == models.answer("the quick ", None, 4)
        assert process.returncode in ENDED
    assert image.health(port) != 0


def test_a_hub_starts_as_its_image_says_and_is_healthy(builder: Builder) -> None:
    image, port = builder.image("hub"), free_port()
    with image.container(*image.config["Entrypoint"], *image.config["Cmd"], "--port", port) as process:
        wait_until_ready(process, port)
        check_user(process, image.root)
        assert image.health(port) == 0
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/")
    assert process.returncode in ENDED


def test_the_image_of_vllm_has_the_plugin_that_vllm_looks_for(builder: Builder) -> None:
    image = builder.image("vllm")
    assert image.config["Entrypoint"] == ["vllm", "serve"]
    script = (
        "from importlib.metadata import entry_points as all; [p] = all(group='vllm.general_plugins'); print(p.value); p.load()"
    )
    with image.container("python3", "-c", script) as process:
        output = process.communicate(timeout=60)[0]
    assert (process.returncode, output) == (0, "adapterhub.cli.vllm_settings:register\n")
