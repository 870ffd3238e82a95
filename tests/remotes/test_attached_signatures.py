"""A signed version arrives with its signature at every kind of place, or the command says that it stays behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from adapterhub.remotes import address_schemes
from tests.conftest import Run
from tests.hub.conftest import serving
from tests.support.adapters import Make
from tests.support.hub_server import TOKEN, Hub
from tests.support.registry import docker_config

CARD = "---\nbase_model: org/tiny\nlibrary_name: peft\nlicense: mit\ntags: [lora]\npipeline_tag: text-generation\n---\n# SQL\n"


@dataclass(frozen=True)
class Place:
    """An empty place.

    Attributes:
        address: The address for the version.
        keeps: How many of the two claims it has room for: a signature and an attestation.
        env: What a command needs to reach it.
    """

    address: str
    keeps: int
    env: Mapping[str, str]


class Kinds:
    """Makes a place of each kind; `KINDS` names them."""

    def __init__(self, request: pytest.FixtureRequest, folder: Path, stack: ExitStack) -> None:
        self._request, self._folder, self._stack = request, folder, stack

    def layout(self) -> Place:
        return Place("layout://box:team/sql:v1", 2, {})

    def archive(self) -> Place:
        return Place("layout://box.tar:team/sql:v1", 2, {})

    def skopeo(self) -> Place:
        return Place("oci:box:v1", 2, {})

    def file(self) -> Place:
        return Place(f"file://{self._folder}/bucket/team/sql", 0, {})

    def s3(self) -> Place:
        server = self._request.getfixturevalue("moto")
        return Place(f"s3://{server.bucket()}/team/sql", 0, server.environ)

    def hugging_face(self) -> Place:
        hub = self._stack.enter_context(Hub())
        return Place("hf://team/sql", 1, {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(self._folder / "hf")})

    def our_hub(self) -> Place:
        hub = self._stack.enter_context(serving(self._folder / "hub"))
        return Place("hf://team/sql", 2, {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token})

    def oci(self) -> Place:
        hub = self._stack.enter_context(serving(self._folder / "hub"))
        host = urlsplit(hub.url).netloc
        config = docker_config(self._folder / "docker", host, hub.token)
        return Place(f"oci+http://{host}/team/sql:v1", 2, {"DOCKER_CONFIG": str(config.parent)})

    def docker_registry(self) -> Place:
        return Place(f"oci://{self._request.getfixturevalue('host')}/carried/sql:v1", 2, {})


KINDS = [name for name in vars(Kinds) if not name.startswith("_")]
PEERS = ("s3", "docker_registry")


@pytest.fixture
def kinds(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kinds]:
    with ExitStack() as stack:
        yield Kinds(request, tmp_path, stack)


@pytest.fixture
def signed(run: Run, make: Make) -> str:
    """The ref of a version that is signed and attested."""
    run("key", "generate", "team")
    folder = make("sql")
    (folder / "README.md").write_text(CARD)
    run("push", folder, "team/sql")
    run("sign", "team/sql", "--key", "team.key")
    run("attest", "team/sql", "--scan", "--key", "team.key")
    return "team/sql"


def test_every_remote_has_its_kind_here(kinds: Kinds) -> None:
    modules = {address_schemes.module_name(f"{scheme}://") for scheme in address_schemes.schemes()}
    addresses = [getattr(kinds, name)().address for name in KINDS if name not in PEERS]
    assert {address_schemes.module_name(address) for address in addresses} == modules


@pytest.mark.parametrize("way", ["push", "copy"])
@pytest.mark.parametrize("kind", [pytest.param(name, marks=pytest.mark.peer) if name in PEERS else name for name in KINDS])
def test_a_signature_arrives_and_comes_back_or_its_loss_is_said(
    kinds: Kinds, run: Run, signed: str, kind: str, way: str
) -> None:
    place = getattr(kinds, kind)()
    sent = run(way, signed, place.address, env=place.env)
    assert ("behind" in sent.stderr) == (place.keeps < 2)
    verify = ("--key", "team.pub", "--signed-as", signed)
    if not place.keeps:
        assert "is not signed" in run("verify", place.address, *verify, env=place.env, code=1).stdout
        return
    # Into another registry: this one has the signatures of these bytes, whatever their name.
    env = {**place.env, "ADAPTERHUB_REGISTRY": "other"}
    run("init", "other")
    run("copy", place.address, "back/sql", env=env)
    for source in (place.address, "back/sql"):
        run("verify", source, *verify, env=env)
        run("verify", source, *verify[:2], "--attestations", env=env, code=int(place.keeps < 2))


@pytest.mark.parametrize("out", ["box.tar", "box"])
def test_a_bundle_has_the_signatures_of_its_versions(run: Run, signed: str, out: str) -> None:
    env = {"ADAPTERHUB_REGISTRY": "other"}
    run("bundle", signed, "-o", out)
    run("init", "other")
    run("copy", f"layout://{out}:team/sql:v1", "back/sql", env=env)
    run("verify", "back/sql", "--key", "team.pub", "--signed-as", signed, env=env)
    run("verify", "back/sql", "--attestations", "--key", "team.pub", env=env)
