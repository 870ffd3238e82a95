"""A real registry on 127.0.0.1: Debian's docker-registry, open or behind a password."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import need_program

USER, PASSWORD = "user", "not-a-secret-7"
_HTPASSWD = "user:$2b$04$bcZtFHwnFeE4rzr.eI5wQ.j.1xzEtSGZbxCQ0fkZBrnVoQV7IOury\n"


@contextmanager
def running(folder: Path, *, password: bool = False, tls: bool = False, ipv6: bool = False) -> Iterator[str]:
    """Serve from a folder; `host:port`. `tls`: with a certificate that `certificate` made there."""
    program = need_program("docker-registry")
    with socket.socket(socket.AF_INET6 if ipv6 else socket.AF_INET) as free:
        free.bind(("::1" if ipv6 else "127.0.0.1", 0))
        host = f"{'[::1]' if ipv6 else '127.0.0.1'}:{free.getsockname()[1]}"
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}},
        "http": {"addr": host, "secret": "test"},
    }
    if password:
        (folder / "htpasswd").write_text(_HTPASSWD)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}
    if tls:
        config["http"]["tls"] = {"certificate": str(folder / "cert.pem"), "key": str(folder / "key.pem")}  # type: ignore[index]
    (folder / "config.yml").write_text(json.dumps(config))
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
    try:
        _wait(f"http{'s' if tls else ''}://{host}/v2/", process, folder / "log")
        yield host
    finally:
        process.kill()
        process.wait()


def certificate(folder: Path) -> Path:
    """A certificate of its own authority for registry.test and 127.0.0.1, made in a folder, with its key."""
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    words += " -keyout key.pem -out cert.pem -addext subjectAltName=DNS:registry.test,IP:127.0.0.1"
    subprocess.run([need_program("openssl"), *words.split()], cwd=folder, check=True, capture_output=True)
    return folder / "cert.pem"


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        try:
            urllib.request.urlopen(url, timeout=10, context=ssl._create_unverified_context()).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        else:
            return


def docker_config(folder: Path, host: str, password: str = PASSWORD) -> Path:
    """A config.json as `docker login` writes it; its folder is what DOCKER_CONFIG names."""
    folder.mkdir(exist_ok=True)
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return folder / "config.json"


def listed(table: str) -> list[str]:
    """The first cells of a table that `list` printed, without its head."""
    return [line.split()[0] for line in table.splitlines()[1:]]
