"""A store that the settings of the environment cannot open: one line that says what to set, without a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support.adapters import write_adapter
from tests.support.forward_proxy import ForwardProxy
from tests.support.object_stores import SECRET, Server

pytestmark = pytest.mark.peer


@pytest.mark.parametrize(
    ("store", "env", "settings"),
    [
        ("s3://bucket", {}, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL unless it is Amazon's"),
        ("s3://bucket", {"AWS_ACCESS_KEY_ID": "x"}, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL unless"),
        ("az://box", {}, "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
    ],
)
def test_without_credentials_it_is_told_what_to_set(run: Run, store: str, env: dict[str, str], settings: str) -> None:
    env = {**env, "HTTP_PROXY": "http://127.0.0.1:9"}  # so that no cloud which this runs in has any
    error = run("list", f"{store}/team/sql", env=env, code=5).stderr
    assert error.startswith(f"error: {store}: credentials are missing. Set {settings}")
    assert error.endswith("  [access-denied]\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_store_on_this_machine_is_reached_without_the_proxy(run: Run, moto: Server, tmp_path: Path, host: str) -> None:
    with ForwardProxy() as proxy:
        url = f"http://{proxy.address}"
        env = {**moto.environ, "AWS_ENDPOINT_URL": moto.url.replace("127.0.0.1", host), "NO_PROXY": "", "no_proxy": ""}
        env |= dict.fromkeys(["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"], url)
        address = f"s3://{moto.bucket()}/team/sql"
        run("push", write_adapter(tmp_path / "sql"), address, env=env)
        run("pull", address, "-o", "out", env=env)
        assert proxy.requests == []


@pytest.mark.parametrize(
    ("address", "env", "message"),
    [
        ("s3://bucket/team/sql", {"AWS_ENDPOINT_URL": "http://example.invalid"},
         "http://example.invalid is plain HTTP, which is refused. Use https, or set AWS_ALLOW_HTTP=true"),
        ("s3://bucket/team/sql", {"AWS_ALLOW_HTTP": "perhaps"}, "settings in AWS_… cannot be used"),
        ("s3://bucket/team/sql", {"AWS_CA_BUNDLE": "nowhere.pem"}, "AWS_CA_BUNDLE names it"),
        ("az://box/team/sql", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": f"!{SECRET}"}, "AZURE_STORAGE"),
        ("gs://bucket/team/sql", {"GOOGLE_SERVICE_ACCOUNT_KEY": f"{{{SECRET}"}, "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)  # fmt: skip
def test_unusable_settings_are_reported_without_a_secret(address: str, env: dict[str, str], message: str, run: Run) -> None:
    env = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": SECRET, **env}
    result = run("list", address, env=env, code=None)
    assert result.returncode in (5, 8)
    assert message in result.stderr
    assert SECRET not in result.stderr
    assert len(result.stderr.splitlines()) == 1
