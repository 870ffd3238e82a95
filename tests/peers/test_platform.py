"""What a platform engineer does with `deploy/` alone: from the first start to a restored backup, in one walk."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from adapterhub.hub.settings import HubSettings, Provider
from tests.hub.accounts.test_sign_in import session, sign_in
from tests.hub.conftest import Running, serving
from tests.support.adapters import write_adapter
from tests.support.issuer import issuing
from tests.support.object_stores import Server
from tests.support.postgres import Postgres
from tests.test_deploy import DEPLOY, parsed

pytestmark = pytest.mark.peer
API = "/api/adapterhub/v1"


def adapterhub(env: dict[str, str], words: str) -> str:
    """What a command prints, run as `docker compose run --rm hub-1` does."""
    result = subprocess.run(
        [sys.executable, "-m", "adapterhub", *shlex.split(words)], env=env, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@contextmanager
def started(service: dict[str, Any], env: dict[str, str], folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """A process of the hub with the words of a service of compose.yaml, but for its address."""
    words = [*service["command"][:-1], f"http://127.0.0.1:{port}", "--port", str(port)]
    assert words[:2] == ["hub", "start"]
    command = [sys.executable, "-m", "adapterhub", "--registry", str(folder), *words]
    with open(folder.with_suffix(".log"), "ab") as log:
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline(), folder.with_suffix(".log").read_text()
        assert requests.get(f"http://127.0.0.1:{port}/ready", timeout=60).status_code == 200
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_a_hub_is_started_used_backed_up_upgraded_and_restored(tmp_path: Path, postgres: Postgres, moto: Server) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    services = parsed((DEPLOY / "compose.yaml").read_text())["services"]
    with ExitStack() as stack:
        issuer = stack.enter_context(issuing())
        upstream = stack.enter_context(serving(tmp_path / "upstream"))
        base = HfApi(endpoint=upstream.url, token=upstream.token)
        base.create_repo("org/base")
        base.upload_file(path_or_fileobj=b'{"model_type": "llama"}', path_in_repo="config.json", repo_id="org/base")
        # What hub.env has.
        env = {**os.environ, **moto.environ, "ADAPTERHUB_DATABASE": postgres.database()}
        env |= {"ADAPTERHUB_BLOBS": f"s3://{moto.bucket()}/hub", "ADAPTERHUB_OIDC_ISSUER": issuer.url}
        env |= {"ADAPTERHUB_OIDC_CLIENT": "the hub", "ADAPTERHUB_UPSTREAM": upstream.url.replace("http", "hub+http", 1)}
        ports = {name: free_port() for name in ("hub-1", "hub-2")}
        urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        processes = {
            name: stack.enter_context(started(services[name], env, tmp_path / name, port)) for name, port in ports.items()
        }
        # The first token, as compose.yaml says; everything else goes by the API.
        root = adapterhub(env, f"--registry {tmp_path / 'shell'} hub token create root --role admin").split()[0]

        def ask(method: str, path: str, token: str = root, *, at: str = "hub-1", **fields: Any) -> requests.Response:
            headers = {"authorization": f"Bearer {token}"}
            return requests.request(method, f"{urls[at]}{path}", headers=headers, json=fields or None, timeout=60)

        def invite(account: str, role: str) -> str:
            answer = ask("POST", f"{API}/accounts", account=account, roles={"team": role})
            assert answer.status_code == 201, answer.text
            return str(answer.json()["token"])

        # Single sign-on: whoever is in the group writes in the namespace.
        rule: dict[str, Any] = {"issuer": issuer.url, "claims": {"groups": "ml"}, "namespace": "team", "role": "write"}
        assert ask("POST", f"{API}/admissions", **rule).status_code == 201
        settings = HubSettings(tmp_path, provider=Provider(issuer.url, "the hub"))
        running = Running(urls["hub-1"], settings, root)
        person = session(running, sign_in(running, issuer, sub="1", preferred_username="eve", groups=["ml"]))
        assert "eve" in person.get("/-/account").text
        # Invited people push, propose and accept.
        bob, ada = invite("bob", "write"), invite("ada", "read")
        writer, reader = (HfApi(endpoint=urls["hub-1"], token=token) for token in (bob, ada))
        writer.create_repo("team/sql")
        writer.upload_folder(repo_id="team/sql", folder_path=write_adapter(tmp_path / "first", 1))
        reader.upload_folder(repo_id="team/sql", folder_path=write_adapter(tmp_path / "second", 2), create_pr=True)
        writer.merge_pull_request("team/sql", 1)
        versions = ask("GET", f"{API}/versions?prefix=team/sql", at="hub-2").json()["adapters"]
        assert len(versions) == 2
        # The base of another hub, through this one.
        config = hf_hub_download("org/base", "config.json", endpoint=urls["hub-2"], token=bob, cache_dir=tmp_path / "cache")
        assert Path(config).read_text() == '{"model_type": "llama"}'
        # Taken down in one process, gone in the other.
        withdrawal = f"{API}/names/team/sql/versions/v1/withdrawal"
        assert ask("PUT", withdrawal, message="a leaked key").status_code == 200
        assert ask("GET", "/team/sql.v1/resolve/main/adapter_config.json", bob, at="hub-2").status_code == 410
        adapterhub(env, f"--registry {tmp_path / 'shell'} hub backup {tmp_path / 'hub.tar'}")
        # One process is replaced while the other serves.
        processes["hub-1"].send_signal(signal.SIGTERM)
        processes["hub-1"].wait(60)
        assert ask("GET", "/api/models/team/sql", bob, at="hub-2").status_code == 200
        stack.enter_context(started(services["hub-1"], env, tmp_path / "hub-1", ports["hub-1"]))
        assert ask("GET", "/api/models/team/sql", bob).status_code == 200
        # Restored elsewhere, with its accounts and what was taken down.
        place = {**env, "ADAPTERHUB_DATABASE": postgres.database(), "ADAPTERHUB_BLOBS": f"s3://{moto.bucket()}/hub"}
        adapterhub(place, f"--registry {tmp_path / 'restored'} hub load-backup {tmp_path / 'hub.tar'}")
        assert "team/sql:v2" in adapterhub(place, f"--registry {tmp_path / 'restored'} list")
        port = free_port()
        with started(services["hub-1"], place, tmp_path / "again", port):
            urls["again"] = f"http://127.0.0.1:{port}"
            assert ask("GET", "/team/sql.v1/resolve/main/adapter_config.json", bob, at="again").status_code == 410
            assert ask("GET", "/team/sql/resolve/main/adapter_config.json", bob, at="again").ok
