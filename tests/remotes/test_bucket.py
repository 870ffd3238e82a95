"""A bucket that cannot be reached or opened: one line that says how, without a secret."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conftest import Run
from tests.support.adapters import write_adapter
from tests.support.object_stores import SECRET, Server

pytestmark = pytest.mark.peer


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "sql")


def test_wrong_credentials_are_reported_without_a_secret(rclone: Server, adapter: Path, run: Run) -> None:
    bucket, env = rclone.bucket(), {**rclone.environ, "AWS_SECRET_ACCESS_KEY": "wrong-" + SECRET}
    for words in (("push", "sql", f"s3://{bucket}/team/sql"), ("pull", f"s3://{bucket}/team/sql", "-o", "out")):
        result = run(*words, env=env, code=5)
        assert f"s3://{bucket}: the store refuses (403" in result.stderr
        assert "AWS_SECRET_ACCESS_KEY" in result.stderr
        assert not any(secret in result.stderr + result.stdout for secret in (SECRET, rclone.environ["AWS_ACCESS_KEY_ID"]))
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("server", ["moto", "rclone"])
def test_a_missing_bucket_is_reported_with_how_to_create_it(
    request: pytest.FixtureRequest, server: str, adapter: Path, run: Run
) -> None:
    env = request.getfixturevalue(server).environ
    for words in (("push", "sql", "s3://no-such/team/sql"), ("list", "s3://no-such/team/sql")):
        assert "aws s3 mb s3://no-such" in run(*words, env=env, code=3).stderr


def test_an_unreachable_server_is_reported(run: Run) -> None:
    env = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    assert "127.0.0.1:9 does not answer" in run("list", "s3://bucket/team/sql", env=env, code=5).stderr


def test_without_obstore_one_line_explains_how_to_install_it(tmp_path: Path, run: Run) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "without/sitecustomize.py").write_text("import sys\nsys.modules['obstore'] = None\n")
    path = f"{tmp_path / 'without'}:{':'.join(sys.path)}"
    result = run("list", f"file://{tmp_path}/team/sql", env={"PYTHONPATH": path}, code=9)
    assert "pip install 'adapterhub[objectstore]'" in result.stderr
