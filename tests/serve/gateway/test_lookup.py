"""What refs mean at a remote: asked again after some seconds, and known while the remote is away."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import adapterhub as ah
from adapterhub.bases import hub_address
from adapterhub.http.http_errors import DeniedError
from adapterhub.hub.storage.from_settings import open_database
from adapterhub.manifest import oci_manifest
from adapterhub.operations import copy, tag
from adapterhub.operations.workspace import Workspace
from adapterhub.ref import LATEST, Ref
from adapterhub.registry.registry import Registry
from adapterhub.remotes import named_remotes, remote_address
from adapterhub.remotes.protocol import OpenRemote
from adapterhub.remotes.remote_address import RemoteAddress
from adapterhub.serve.gateway.lookup import RegistryLookup, RemoteLookup
from adapterhub.serve.gateway.openai_errors import problem_of
from adapterhub.serve.model_names import AllowedNames
from adapterhub_converters.errors import AdapterhubError, NotFoundError, RefusedError, RemoteError
from tests.hub.conftest import serving
from tests.hub.web.conftest import hide
from tests.support import registry
from tests.support.adapters import Make
from tests.support.hub_server import TOKEN, Hub


@dataclass
class Remote:
    """A registry or a hub with two versions of `team/sql`, and `:prod` at the first; its URL, and the clock of who looks."""

    url: str
    workspace: Workspace
    digests: list[str]
    stack: ExitStack
    now: float = 0.0
    lookup: RemoteLookup = field(init=False)

    def __post_init__(self) -> None:
        self.lookup = RemoteLookup(self.workspace, self.url, 5.0, clock=lambda: self.now)

    def find(self, text: str) -> str:
        async def look_up() -> str:
            return (await self.lookup.find(Ref.parse(text))).digest

        return asyncio.run(look_up())

    def move(self, number: int) -> None:
        address = named_remotes.address_below(self.url, f"team/sql@{self.digests[number - 1]}")
        tag.tag(address, "prod", self.workspace)


@pytest.fixture(params=["oci", "hf", "hub"])
def remote(request: pytest.FixtureRequest, make: Make, tmp_path: Path) -> Iterator[Remote]:
    with ExitStack() as stack:
        url, workspace = "hf://", Workspace()
        if request.param == "oci":
            url = f"oci://{stack.enter_context(registry.running(tmp_path))}/adapters"
        elif request.param == "hf":
            address = hub_address.Hub(stack.enter_context(Hub()).url, TOKEN)
            workspace = Workspace(hub=lambda: address)
        else:
            running = stack.enter_context(serving(tmp_path / "hub"))
            address = hub_address.Hub(running.url, running.token)
            url, workspace = running.url.replace("http", "hub+http"), Workspace(hub=lambda: address)
        remote_address = named_remotes.address_below(url, "team/sql")
        digests = [str(ah.push(make(f"a{seed}", seed), remote_address, workspace=workspace).digest) for seed in (1, 2)]
        opened_remote = Remote(url, workspace, digests, stack)
        opened_remote.move(1)
        yield opened_remote
        opened_remote.lookup.close()


def test_a_moved_tag_is_seen_when_the_time_is_over(remote: Remote) -> None:
    first, second = remote.digests
    assert [remote.find(f"team/sql{ref}") for ref in (":prod", "", f"@{second[:16]}")] == [first, second, second]
    remote.move(2)
    assert remote.find("team/sql:prod") == first
    remote.now += 5.0
    assert remote.find("team/sql:prod") == second
    assert remote.lookup.is_up


def test_what_is_known_stays_while_the_remote_is_away(
    remote: Remote, quick: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a request that waits no longer for the remote, and for those that are told of its failure."""
    first, second = remote.digests
    assert remote.find("team/sql:prod") == first
    assert remote.find(f"team/sql@{second}") == second
    remote.stack.close()
    for patience in (0.02, 60.0, 60.0):
        monkeypatch.setattr("adapterhub.serve.gateway.lookup._PATIENCE", patience)
        remote.now += 5.0
        assert remote.find("team/sql:prod") == first
    assert remote.find(f"team/sql@{second}") == second
    assert not remote.lookup.is_up
    for ref in ("team/other", f"team/other@{first}"):
        with pytest.raises(RemoteError):
            remote.find(ref)
    remote.lookup._answers.clear()
    assert remote.find(f"team/sql@{second}") == second  # the remote confirmed it once, as it would have been after a restart
    assert not remote.lookup.is_up
    assert [record.levelname for record in caplog.records if record.name == "adapterhub.serve.lookup"] == ["WARNING"]
    assert "its last known tags are used" in caplog.text


def test_names_can_be_looked_up_until_the_remote_is_away_and_none_is_known(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    def can_find() -> bool:
        return asyncio.run(remote.lookup.can_find())

    assert can_find()  # not asked yet
    with monkeypatch.context() as patched:
        answer_with(RemoteError("v", "is away"), remote, "team/sql:prod", patched)
        with pytest.raises(RemoteError):
            remote.find("team/sql:prod")
        assert not can_find()
    remote.now += 5.0
    assert can_find()  # because it asked again
    remote.stack.close()
    remote.now += 5.0
    assert remote.find("team/sql:prod") == remote.digests[0]
    assert not remote.lookup.is_up
    assert can_find()


def answer_with(error: AdapterhubError, remote: Remote, ref: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the remote answer every lookup with an error."""
    place = remote_address.parse(named_remotes.address_below(remote.url, ref))
    with remote.workspace.connect(place) as connected:
        kind = type(connected)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(kind, "resolve", fail)


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("error", [NotFoundError("v", "is gone"), DeniedError("v", "HTTP 403: no longer a member")])
def test_what_was_removed_or_closed_there_is_served_no_longer_by_its_digest_either(
    remote: Remote, error: AdapterhubError, restarts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = f"team/sql@{remote.digests[0]}"
    assert remote.find(ref) == remote.digests[0]
    with monkeypatch.context() as patched:
        answer_with(error, remote, ref, patched)
        remote.now += 5.0
        if restarts:
            remote.lookup._answers.clear()
        with pytest.raises(type(error)):
            remote.find(ref)
    remote.stack.close()
    if restarts:
        remote.lookup._answers.clear()
    with pytest.raises((NotFoundError, RemoteError)):  # what the remote confirmed earlier no longer counts
        remote.find(ref)


def test_a_name_that_asks_for_a_login_is_unknown_and_its_remote_not_away(make: Make, tmp_path: Path) -> None:
    """A registry tells a client without an account 401 for a name that it lacks, as for one that is private."""
    with serving(tmp_path / "hub") as running, ExitStack() as stack:
        with running.registry() as registry:
            digest = registry.push(make("a", 1), Ref.parse("team/sql")).digest
        url, workspace = running.url.replace("http", "oci+http"), Workspace()
        remote = Remote(url, workspace, [str(digest)], stack)
        with pytest.raises(DeniedError) as denied:
            remote.find("team/none")
        assert remote.lookup.is_up
        assert (problem_of(denied.value, "team/none").status, remote.find("team/sql")) == (404, digest)
        remote.lookup.close()


@pytest.mark.parametrize("kind", ["hub+http", "oci+http", "htpasswd"])
def test_a_login_that_is_refused_is_no_answer_about_a_name(
    kind: str, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once the token of a gateway had expired, every name was unknown to its clients, and the gateway was ready."""
    with ExitStack() as stack:
        if kind == "htpasswd":
            host = stack.enter_context(registry.running(tmp_path, password=True))
            url, right, wrong = f"oci+http://{host}", registry.PASSWORD, "changed"
        else:
            running = stack.enter_context(serving(tmp_path / "hub"))
            host, url = running.url.partition("://")[2], running.url.replace("http", kind)
            right = running.make_token("ada", "write", namespaces=["team"])
            wrong = running.make_token("ada", "write", lifetime=-1)
            with running.registry() as opened:
                for name in ("team/sql", "bank/sql"):
                    opened.push(make(f"of {name}", 2), Ref.parse(name))
                    hide(running, name)
        may_read, is_refused = (
            Workspace(docker=registry.docker_config(tmp_path / login, host, login)) for login in (right, wrong)
        )
        digest = str(ah.push(make("a", 1), named_remotes.address_below(url, "team/sql"), workspace=may_read).digest)
        remote = Remote(url, may_read, [digest], stack)
        assert remote.find("team/sql") == digest
        for name in ("bank/sql", "team/none"):  # one that exists, where it is a hub, is answered as one that does not
            with pytest.raises((NotFoundError, DeniedError)) as unknown:
                remote.find(name)
            assert problem_of(unknown.value, name).status == 404
        assert remote.lookup.is_up
        remote.lookup.close()

        remote = Remote(url, is_refused, [digest], stack)
        for name in ("team/sql", "bank/sql", "team/none"):
            with pytest.raises(DeniedError) as refused:
                remote.find(name)
            problem = problem_of(refused.value, name)
            assert (problem.status, "refuses the login of this gateway" in problem.message) == (503, True)
        assert not remote.lookup.is_up
        assert not asyncio.run(remote.lookup.can_find())
        assert caplog.text.count("the login of this gateway is refused") == 1
        remote.lookup.close()


def test_what_is_not_there_is_not_asked_for_again_at_once(remote: Remote) -> None:
    for ref in ("team/none", "team/sql:none", f"team/none@{remote.digests[0]}"):
        with pytest.raises(NotFoundError):
            remote.find(ref)
    existing, new = (named_remotes.address_below(remote.url, name) for name in ("team/sql", "team/none"))
    copy.copy(existing, new, remote.workspace)
    with pytest.raises(NotFoundError):
        remote.find("team/none")
    remote.now += 5.0
    assert remote.find("team/none") == remote.digests[1]


def test_a_digest_in_an_image_layout_is_of_those_names_alone_that_lead_to_it(make: Make, tmp_path: Path) -> None:
    url = f"layout://{tmp_path}/layout"
    names = ("team/sql", "team/secret")
    digests = [
        str(ah.push(make(f"a{at}", at), f"{url}:{name}:v1", workspace=Workspace()).digest) for at, name in enumerate(names)
    ]
    with ExitStack() as stack:
        remote = Remote(url, Workspace(cache=tmp_path / "cache"), digests, stack)
        stack.callback(remote.lookup.close)
        for name, digest, other_digest in zip(names, digests, reversed(digests), strict=True):
            assert {remote.find(f"{name}:v1"), remote.find(f"{name}@{digest}"), remote.find(f"{name}@{digest[:20]}")} == {
                digest
            }
            for unknown in (f"{name}@{other_digest}", f"{name}@{other_digest[:20]}", f"team/none@{digest}"):
                with pytest.raises(NotFoundError):
                    remote.find(unknown)


@pytest.mark.parametrize("protocol", ["hub+http", "oci+http"])
def test_a_hub_that_is_asked_again_and_again_counts_no_reads_and_gets_no_new_connections(
    protocol: str, make: Make, tmp_path: Path
) -> None:
    now, opened = 0.0, []

    class Counting(Workspace):
        def connect(self, address_: RemoteAddress) -> OpenRemote:
            opened.append(address_)
            return super().connect(address_)

    with serving(tmp_path / "hub") as hub, ExitStack() as stack:
        with hub.registry() as registry_of_hub:
            version = registry_of_hub.push(make("a1", 1), Ref.parse("team/sql:prod"))
        url = hub.url.replace("http", protocol, 1)
        lookup = RemoteLookup(Counting(policy=None), url, 1.0, clock=lambda: now)
        stack.callback(lookup.close)
        for _ in range(5):
            for ref in ("team/sql:prod", "team/sql", f"team/sql@{version.digest}"):
                assert asyncio.run(lookup.find(Ref.parse(ref))).digest == version.digest
            now += 1.0
        assert [place.repository for place in opened] == [f"{url}/team/sql"]
    with closing(open_database(hub.settings)) as database:
        assert not database.select("SELECT * FROM downloads") + database.select("SELECT * FROM reads")


def test_connections_are_kept_for_so_many_names_and_closed_in_the_end(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterhub.serve.gateway.lookup._MAX_IDLE", 2)
    with serving(tmp_path / "hub") as hub:
        names = [f"team/a{number}" for number in range(4)]
        with hub.registry() as registry_of_hub:
            for name in names:
                registry_of_hub.push(make("a1", 1), Ref(name))
        lookup = RemoteLookup(Workspace(policy=None), hub.url.replace("http", "hub+http", 1), 1.0)
        for name in names:
            asyncio.run(lookup.find(Ref(name)))
        with pytest.raises(NotFoundError):
            asyncio.run(lookup.find(Ref("team/none")))
        assert [address.rpartition("/")[2] for address in lookup._idle] == ["a2", "a3"]
        lookup.close()
        assert not lookup._idle


def test_names_leave_its_memory_flat_and_those_that_were_found_are_listed(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapterhub.serve.gateway.lookup._MAX_CACHED", 4)
    for number in range(9):
        with pytest.raises(NotFoundError):
            remote.find(f"team/none-{number}")
    remote.find("team/sql:prod")
    assert len(remote.lookup._answers) == 4
    listed = asyncio.run(remote.lookup.list_refs(AllowedNames(("team/*",))))
    assert [(ref, version.digest) for ref, version in listed] == [("team/sql:prod", remote.digests[0])]
    assert asyncio.run(remote.lookup.list_refs(AllowedNames(("other/*",)))) == []


def test_a_registry_lists_a_bare_name_once_with_the_version_that_it_means(make: Make, tmp_path: Path) -> None:
    workspace = Workspace(registry=tmp_path / "registry")
    first = ah.push(make("one", seed=1), "team/sql", workspace=workspace)
    ah.push(make("two", seed=2), "team/sql:prod", workspace=workspace)
    with Registry.open(tmp_path / "registry") as registry, registry.store.lease("push"):
        manifest = oci_manifest.parse(registry.store.read_document(first.digest), "")
        registry.push_manifest(manifest, Ref("team/sql"), tags=(LATEST,))  # as a revert of `main` on a hub does
    lookup = RegistryLookup(workspace)
    try:
        listed = asyncio.run(lookup.list_refs(AllowedNames(())))
        version = asyncio.run(lookup.find(Ref.parse("team/sql")))
    finally:
        lookup.close()
    assert sorted(ref for ref, _ in listed) == ["team/sql", "team/sql:prod"]
    assert dict(listed)["team/sql"] == version
    assert version.digest == first.digest


def test_a_hub_that_may_not_be_asked_is_refused_at_the_start(tmp_path: Path) -> None:
    def offline() -> hub_address.Hub:
        raise RemoteError("HF_HUB_OFFLINE", "is set, so nothing is fetched", code=hub_address.OFFLINE)

    lookup = RemoteLookup(Workspace(hub=offline, cache=tmp_path), "hf://", 5.0)
    with pytest.raises(RefusedError, match="HF_HUB_OFFLINE: is set, so nothing is fetched") as refused:
        asyncio.run(lookup.check())
    assert refused.value.code == hub_address.OFFLINE
    lookup.close()
