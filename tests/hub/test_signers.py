"""A hub whose policy names signers takes a version only if one of them has signed it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from adapterhub.hub.accounts import accounts
from adapterhub.hub.accounts.accounts import Namespace
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.project.policy import Policy
from adapterhub.trust import keys
from tests.conftest import Run
from tests.hub.conftest import client, serving
from tests.support.registry import docker_config


def test_a_hub_takes_what_its_signers_have_signed(tmp_path: Path, run: Run, adapter: Callable[..., Path]) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    secret, public = keys.generate(tmp_path / "team")
    other_key = keys.generate(tmp_path / "other")[0]
    folder = adapter(1)
    run("describe", folder)
    with serving(tmp_path / "hub", policy=Policy("the hub", signers=(("team/*", (Path(public.source),)),))) as hub:
        host = hub.url.partition("://")[2]
        at = f"oci+http://{host}/team/sql"
        env = {"DOCKER_CONFIG": str(docker_config(tmp_path / "docker", host, hub.token).parent)}
        assert "is not signed" in run("push", folder, at, env=env, code=5).stderr
        run("sign", folder, "--key", other_key, "--name", "team/sql")
        assert "which is not accepted" in run("push", folder, at, env=env, code=5).stderr
        run("sign", folder, "--key", secret, "--name", "team/other")
        assert "the signature is for 'team/other'" in run("push", folder, at, env=env, code=5).stderr
        run("sign", folder, "--key", secret, "--name", "team/sql")
        run("push", folder, at, env=env)
        run("pull", at, "-o", "out", "--require-signature", "--key", public.source, env=env)
        hf = client(hub, tmp_path)
        hf.create_repo("team/hf")
        with pytest.raises(HfHubHTTPError, match="the signature is for 'team/sql'"):
            hf.upload_folder(folder_path=folder, repo_id="team/hf")
        with pytest.raises(HfHubHTTPError, match="is not signed"):
            hf.upload_folder(folder_path=folder, repo_id="team/hf", ignore_patterns="model.sig")
        run("sign", folder, "--key", secret, "--name", "team/hf")
        commit = hf.upload_folder(folder_path=folder, repo_id="team/hf").oid
        assert hf.upload_folder(folder_path=folder, repo_id="team/hf").oid == commit
        user = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
        for address in ("hf://team/hf", f"oci+http://{host}/team/hf"):
            assert "team/hf" in run("verify", address, "--key", public.source, env={**env, **user}).stdout


def test_a_signature_goes_to_a_hub_with_a_push_and_with_a_commit_of_its_own(
    tmp_path: Path, run: Run, adapter: Callable[..., Path]
) -> None:
    secret, public = keys.generate(tmp_path / "ada")
    folder = adapter(1)
    run("describe", folder)
    run("sign", folder, "--key", secret, "--name", "team/sql")
    with serving(tmp_path / "hub") as hub:
        user = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token}
        run("push", folder, "hf://team/sql", env=user)
        run("verify", "hf://team/sql", "--key", public.source, env=user)
        hf = client(hub, tmp_path)
        hf.create_repo("team/hf")
        hf.upload_folder(folder_path=folder, repo_id="team/hf", ignore_patterns="model.sig")
        assert "is not signed" in run("verify", "hf://team/hf", "--key", public.source, env=user, code=1).stdout
        hf.upload_file(path_or_fileobj=folder / "model.sig", path_in_repo="model.sig", repo_id="team/hf")
        run("verify", "hf://team/hf", "--key", public.source, "--signed-as", "team/sql", env=user)
        assert len(list(hf.list_repo_commits("team/hf"))) == 1


def test_a_repository_is_not_moved_to_a_name_that_asks_for_signatures(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    public = keys.generate(tmp_path / "team")[1]
    with serving(tmp_path / "hub", policy=Policy("the hub", signers=(("team/*", (Path(public.source),)),))) as hub:
        hf = client(hub, tmp_path)
        hf.create_repo("free/sql")
        hf.upload_folder(folder_path=adapter(1), repo_id="free/sql")
        with pytest.raises(HfHubHTTPError, match="free/sql:v1: against the policy of the hub: signers.team/\\*: is not signed"):
            hf.move_repo("free/sql", "team/sql")
        hf.move_repo("free/sql", "free/text2sql")


def test_a_namespace_for_adapters_only_takes_signatures_after_the_version(
    tmp_path: Path, run: Run, adapter: Callable[..., Path]
) -> None:
    secret, public = keys.generate(tmp_path / "team")
    run("describe", folder := adapter(1))
    run("sign", folder, "--key", secret, "--name", "team/sql")
    with serving(tmp_path / "hub") as hub:
        with closing(open_database(hub.settings)) as database:
            accounts.set_namespace(database, Namespace("team", adapters_only=True))
        host = hub.url.partition("://")[2]
        env = {"DOCKER_CONFIG": str(docker_config(tmp_path / "docker", host, hub.token).parent)}
        run("push", folder, f"oci+http://{host}/team/sql", env=env)
        run("verify", f"oci+http://{host}/team/sql", "--key", public.source, env=env)
