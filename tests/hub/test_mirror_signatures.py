"""A mirror takes the signatures of what it fetches along, and its policy may require them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapterhub.project.policy import Policy
from adapterhub.registry import signature_policy
from adapterhub.registry.repository_records import Repositories
from tests.conftest import Run
from tests.hub.conftest import serving
from tests.hub.mirrors import NAME, files_of, mirroring, push_upstream, refused, sha, versions
from tests.support.hub_models import publish
from tests.support.hub_server import Hub

FRESH = 0.0  # `main` is looked at with each request
Make = Callable[..., Path]


@pytest.fixture
def upstream() -> Iterator[Hub]:
    """A small Hugging Face Hub."""
    with Hub() as hub:
        yield hub


@pytest.fixture
def signed(run: Run, adapter: Make) -> Path:
    """The folder of an adapter with its `model.sig`."""
    folder = adapter(1)
    run("key", "generate", "team")
    run("describe", folder)
    run("sign", folder, "--key", "team.key", "--name", NAME)
    return folder


def test_the_signature_in_a_repository_is_mirrored_and_the_next_commit_too(
    tmp_path: Path, run: Run, signed: Path, adapter: Make, upstream: Hub
) -> None:
    publish(upstream, NAME, files_of(signed))
    with mirroring(tmp_path / "mirror", upstream.url, age=FRESH) as (hub, sending):
        sha(sending)
        run("verify", f"hub+{hub.url}/{NAME}", "--key", "team.pub")
        push_upstream(upstream, adapter(2))  # which is fetched though something was attached here
        sha(sending)
        assert [version.number for version in versions(hub)] == [2, 1]
        assert "is not signed" in run("verify", f"hub+{hub.url}/{NAME}", "--key", "team.pub", code=1).stdout


def test_so_are_signatures_and_attestations_of_another_hub_of_ours(tmp_path: Path, run: Run, signed: Path) -> None:
    with serving(tmp_path / "upstream") as origin:
        env = {"HF_ENDPOINT": origin.url, "HF_TOKEN": origin.token}
        run("push", signed, f"hf://{NAME}", env=env)
        run("attest", f"hf://{NAME}", "--scan", "--key", "team.key", env=env)
        with mirroring(tmp_path / "mirror", origin.url) as (hub, sending):
            sha(sending)
            run("verify", f"hub+{hub.url}/{NAME}", "--key", "team.pub")
            run("verify", f"hub+{hub.url}/{NAME}", "--attestations", "--key", "team.pub")


def test_what_anybody_attaches_at_the_upstream_is_kept_up_to_a_number_besides_what_is_required(
    tmp_path: Path, run: Run, signed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand claims of 64 kB about each version were fetched, attached and served."""
    monkeypatch.setattr(signature_policy, "MAX_UNREQUESTED", 1)
    policy = Policy("adapterhub.toml", signers=(("org/*", (tmp_path / "team.pub",)),))
    with serving(tmp_path / "upstream") as origin:
        env = {"HF_ENDPOINT": origin.url, "HF_TOKEN": origin.token}
        run("push", signed, f"hf://{NAME}", env=env)
        run("key", "generate", "other")
        for key in ("other", "team"):
            run("attest", f"hf://{NAME}", "--scan", "--key", f"{key}.key", env=env)
        for folder, rules, count in (("mirror", None, 1), ("strict", policy, 2)):
            with mirroring(tmp_path / folder, origin.url, policy=rules) as (hub, sending):
                sha(sending)
                with hub.registry() as registry:
                    document = Repositories(registry).get(NAME)
                assert document
                assert len(document.manifests) == count
                run("verify", f"hub+{hub.url}/{NAME}", "--key", "team.pub", code=None if rules is None else 0)


def test_a_mirror_with_required_signers_has_what_they_signed_alone(
    tmp_path: Path, run: Run, signed: Path, adapter: Make, upstream: Hub
) -> None:
    publish(upstream, NAME, files_of(signed))
    push_upstream(upstream, adapter(2), "org/other")
    policy = Policy("adapterhub.toml", signers=(("org/*", (tmp_path / "team.pub",)),))
    with mirroring(tmp_path / "mirror", upstream.url, policy=policy) as (_, sending):
        sha(sending)
        assert "is not signed" in refused(sending.ask("GET", "/api/models/org/other/revision/main"))
