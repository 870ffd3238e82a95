"""A gateway on a remote: a moved tag is answered within the time of a poll, and what is there while the remote is away."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.operations import tag
from adapterhub.operations.local_registry import Registry
from adapterhub.operations.workspace import Workspace
from adapterhub.ref import Ref
from adapterhub.registry.releases import release_moves
from tests.conftest import Run
from tests.hub import killing
from tests.hub.conftest import serving as serving_hub
from tests.support import llama_server, registry, serving
from tests.support.serving import Models

pytestmark = pytest.mark.peer
P = "the quick brown fox "


def test_tags_of_a_remote_are_read_again_and_an_outage_takes_nothing_away(models: Models, tmp_path: Path) -> None:
    with ExitStack() as away:
        url = f"oci://{away.enter_context(registry.running(tmp_path))}/adapters"
        digests = [str(ah.push(models.adapter(number), f"{url}/team/sql").digest) for number in (0, 1)]
        tag.tag(f"{url}/team/sql:v1", "prod", Workspace())
        config = tmp_path / "gateway/config/adapterhub/config.toml"
        config.parent.mkdir(parents=True)
        config.write_text(f'[remotes.hub]\nurl = "{url}"\n')
        options = ("--program", llama_server.program(), "team/*", "--remote", "hub", "--poll", 0.2)
        with serving.gateway(models.gguf, tmp_path / "none", tmp_path / "gateway", *options) as gateway:
            first = gateway.complete("team/sql:prod", P)
            assert (first.text, first.version) == (models.answer(P, 0), f"team/sql@{digests[0]}")
            by_remote = gateway.complete("hub/team/sql:prod", P)
            assert (by_remote.text, by_remote.version) == (first.text, first.version)
            for unknown in ("team/none", "hub/team/none", "mirror/team/sql:prod"):
                assert gateway.complete(unknown, P).status == 404
            names = [model["id"] for model in gateway.get("/v1/models").document["data"]]
            assert names == ["base", "team/sql:prod"]
            assert "/v1/models lists names at a remote once they have been asked for" in gateway.log.read_text()

            tag.tag(f"{url}/team/sql:v2", "prod", Workspace())
            while f"team/sql@{digests[1]} is ready" not in gateway.log.read_text():  # before it is asked for
                time.sleep(0.05)
            moved = gateway.complete("team/sql:prod", P)
            assert (moved.text, moved.version) == (models.answer(P, 1), f"team/sql@{digests[1]}")
            assert b"adapterhub_names_up 1.0" in gateway.get("/metrics").body

            away.close()
            while b"adapterhub_names_up 0.0" not in gateway.get("/metrics").body:
                time.sleep(0.05)
            assert gateway.complete("team/sql:prod", P).text == models.answer(P, 1)
            assert gateway.complete(f"team/sql@{digests[0]}", P).text == models.answer(P, 0)
            lost = gateway.complete("team/sql:v7", P)
            assert (lost.status, lost.document["error"]["code"]) == (503, "service_unavailable")
            assert gateway.log.read_text().count("its last known tags are used") == 1


def test_what_is_removed_at_a_hub_is_served_no_longer_by_its_digest_either(models: Models, tmp_path: Path) -> None:
    with Registry(tmp_path / "hub") as hub_registry:
        digest = hub_registry.push(models.adapter(0), "team/sql:prod").digest
        with killing.killable_hub(tmp_path / "hub") as hub:
            options = ("--program", llama_server.program(), "--remote", f"hub+{hub.url}", "--poll", 0.2)
            with serving.gateway(models.gguf, tmp_path / "none", tmp_path / "gateway", *options) as gateway:
                assert gateway.complete(f"team/sql@{digest}", P).text == models.answer(P, 0)
                hub_registry.remove("team/sql")
                while (reply := gateway.complete(f"team/sql@{digest}", P)).status == 200:
                    time.sleep(0.05)
                assert (reply.status, reply.document["error"]["code"]) == (404, "model_not_found")
            with serving.gateway(models.gguf, tmp_path / "none", tmp_path / "gateway", *options) as gateway:
                assert gateway.complete(f"team/sql@{digest}", P).status == 404


def test_what_is_withdrawn_at_a_hub_is_refused_by_a_running_gateway_with_the_reason(models: Models, tmp_path: Path) -> None:
    with serving_hub(tmp_path / "hub") as hub:
        with hub.registry() as registry_of_hub:
            version = registry_of_hub.push(models.adapter(0), Ref.parse("team/sql:prod"))
        options = ("--program", llama_server.program(), "--remote", f"hub+{hub.url}", "--poll", 0.2)
        with serving.gateway(models.gguf, tmp_path / "none", tmp_path / "gateway", *options) as gateway:
            for name in ("team/sql:prod", f"team/sql@{version.digest}"):
                assert gateway.complete(name, P).text == models.answer(P, 0)
            with hub.registry() as registry_of_hub:
                release_moves.withdraw(registry_of_hub.ledger, Ref.parse("team/sql:v1"), ReleaseStatement("a leaked key"))
            for name in ("team/sql:prod", f"team/sql@{version.digest}"):
                while (reply := gateway.complete(name, P, count=1)).status == 200:
                    time.sleep(0.05)
                assert (reply.status, reply.document["error"]["code"]) == (410, "withdrawn")
                assert "a leaked key" in reply.document["error"]["message"]


def test_a_remote_that_is_not_there_by_name(run: Run, models: Models) -> None:
    words = ("serve", models.gguf, "--program", llama_server.program(), "--port", 0)
    assert "no remote of this name" in run(*words, "--remote", "nowhere", code=3).stderr
