"""What is pushed to a hub is at the targets of its operator, under the same digests, wherever a process was killed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import urllib3

from adapterhub.bases.hub_address import Hub as HuggingFace
from adapterhub.hub import gates, replication
from adapterhub.hub.accounts import accounts
from adapterhub.hub.hub import Hub
from adapterhub.hub.hub_database import HubDatabase
from adapterhub.hub.operations import health
from adapterhub.hub.replica import Replica
from adapterhub.hub.settings import HubSettings, Replication
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.project import settings_file
from adapterhub.ref import Ref
from adapterhub.registry import packaging
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import release_moves
from adapterhub.registry.repository_documents import Repository
from adapterhub.remotes.remote_address import UserSettings
from adapterhub.store.store import Entry
from adapterhub_converters.errors import AdapterhubError
from tests.hub.conftest import Running, serving
from tests.hub.killing import Killable, assert_sound
from tests.support import registry as docker_registry
from tests.support.adapters import Make

SQL = Ref.parse("team/sql")


def user(token: str | None = None, docker: Path | None = None) -> UserSettings:
    """The logins of an operator: a token for every host, or docker's config.json."""
    return UserSettings(docker, lambda: HuggingFace("http://localhost:1", None), login=lambda _host, _plain: token)


def to_hub(target: Running, pattern: str = "team/*") -> Replication:
    """The replication to another hub, with a token of a member who may write."""
    return Replication(pattern, target.url.replace("http://", "hub+http://"), user(target.token))


@contextmanager
def source_hub(folder: Path, *targets: Replication) -> Iterator[Hub]:
    """A hub whose replication the test runs itself."""
    with closing(Hub(HubSettings(registry=folder, replications=targets))) as hub:
        yield hub


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Registry]:
    """The registry of the hub that replicates."""
    with Registry.init(tmp_path / "source") as registry:
        registry.author = "ada"
        yield registry


def push(registry: Registry, folder: Path, ref: str, message: str) -> None:
    """Push with a message."""
    registry.publish(packaging.package(folder), Ref.parse(ref), message=message)


def versions(registry: Registry) -> list[tuple[int, str, tuple[str, ...], str | None]]:
    """The versions of team/sql: number, digest, tags, and why each is withdrawn."""
    return [(row.number, row.digest, row.tags, row.withdrawn) for row in registry.list("team/sql")]


def test_every_move_of_a_name_is_made_at_another_hub(tmp_path: Path, source: Registry, make: Make) -> None:
    with serving(tmp_path / "target") as target, source_hub(tmp_path / "source", to_hub(target)) as hub:
        (place,) = hub.settings.replications

        def check() -> None:
            hub.replicator.replicate(place)
            with target.registry() as registry:
                assert versions(registry) == versions(source)
                assert registry.deprecations(["team/sql"]) == source.deprecations(["team/sql"])

        push(source, make("a1", 1), "team/sql:beta", "first")
        source.push(make("a2", 2), SQL)
        source.tag(Ref.parse("team/sql:v1"), "prod")
        check()
        source.tag(Ref.parse("team/sql:v2"), "prod")
        source.rm(Ref.parse("team/sql:beta"))
        source.deprecate(Ref.parse("team/sql:v1"), "too small")
        source.push(make("a3", 3), SQL)
        check()
        release_moves.withdraw(source.ledger, Ref.parse("team/sql:v3"), ReleaseStatement("a leaked key"))
        check()
        release_moves.undo_withdrawal(source.ledger, Ref.parse("team/sql:v3"))
        source.deprecate(Ref.parse("team/sql:v1"), undo=True)
        check()
        with target.registry() as registry:
            entries = registry.log(SQL)
            assert [entry.message for entry in entries if entry.op == "push"] == ["", "", "first"]
        (state,) = replication.states(hub.database)
        assert (state.waiting, state.failing) == (0, 0)
        # What is removed here stays there.
        source.rm(SQL)
        hub.replicator.replicate(place)
        with target.registry() as registry:
            assert len(versions(registry)) == 3
        assert replication.states(hub.database)[0].waiting == 0


def test_an_oci_registry_gets_versions_under_their_numbers_and_tags(tmp_path: Path, source: Registry, make: Make) -> None:
    with docker_registry.running(tmp_path, password=True) as host:
        login = user(docker=docker_registry.docker_config(tmp_path / "docker", host))
        place = Replication("*", f"oci+http://{host}/copies", login)
        with source_hub(tmp_path / "source", place) as hub:
            source.push(make("a1", 1), Ref.parse("team/sql:prod"))
            source.push(make("a2", 2), SQL)
            hub.replicator.replicate(place)
            source.tag(Ref.parse("team/sql:v2"), "prod")
            hub.replicator.replicate(place)

            def digest(tag: str) -> str | None:
                headers = urllib3.make_headers(basic_auth=f"{docker_registry.USER}:{docker_registry.PASSWORD}")
                headers["accept"] = "application/vnd.oci.image.manifest.v1+json"
                url = f"http://{host}/v2/copies/team/sql/manifests/{tag}"
                return urllib3.request("HEAD", url, headers=headers).headers.get("docker-content-digest")

            digests = {number: version_digest for number, version_digest, *_ in versions(source)}
            numbers = {"v1": 1, "v2": 2, "latest": 2, "prod": 2}
            assert {tag: digest(tag) for tag in numbers} == {tag: digests[number] for tag, number in numbers.items()}
            assert replication.states(hub.database)[0].waiting == 0


@pytest.mark.parametrize("way", ["private", "gated", "members"])
def test_what_not_everybody_may_read_is_private_there_or_not_sent(
    way: str, tmp_path: Path, source: Registry, make: Make
) -> None:
    source.push(make("a1", 1), SQL)
    with (
        serving(tmp_path / "target") as target,
        docker_registry.running(tmp_path) as host,
        closing(HubDatabase(tmp_path / "source")) as database,
    ):
        if way == "members":
            accounts.set_namespace(database, accounts.Namespace("team", "members"))
        elif way == "gated":
            gates.set_gate(database, "team/sql", gates.Gate("manual"))
        registry_place = Replication("*", f"oci+http://{host}", user())
        with source_hub(tmp_path / "source", to_hub(target), registry_place) as hub:
            if way == "private":
                hub.workers.worker().repositories.change("team/sql", lambda state: replace(state or Repository(), private=True))
            for place in hub.settings.replications:
                hub.replicator.replicate(place)
            assert urllib3.request("GET", f"{target.url}/api/models/team/sql").status == 404
            listed = urllib3.request("GET", f"http://{host}/v2/_catalog").json()
            assert listed == {"repositories": []}
            hub.replicator.replicate(replace(registry_place, with_private=True))
        assert urllib3.request("GET", f"http://{host}/v2/_catalog").json() == {"repositories": ["team/sql"]}
        with target.registry() as registry:
            assert versions(registry) == versions(source)


def test_a_name_that_becomes_private_becomes_so_there_and_is_never_made_public(
    tmp_path: Path, source: Registry, make: Make
) -> None:
    source.push(make("a1", 1), SQL)
    with serving(tmp_path / "target") as target, source_hub(tmp_path / "source", to_hub(target)) as hub:
        (place,) = hub.settings.replications
        for private, status in ((False, 200), (True, 404), (False, 404)):
            hub.workers.worker().repositories.change(
                "team/sql", lambda state, private=private: replace(state or Repository(), private=private)
            )
            hub.replicator.replicate(place)
            assert urllib3.request("GET", f"{target.url}/api/models/team/sql").status == status


def make_private(hub: Hub) -> None:
    """Make team/sql private."""
    hub.workers.worker().repositories.change("team/sql", lambda state: replace(state or Repository(), private=True))


def test_what_another_process_has_made_private_is_never_public_at_a_target(
    tmp_path: Path, source: Registry, make: Make
) -> None:
    with (
        serving(tmp_path / "target") as target,
        source_hub(tmp_path / "source", to_hub(target)) as hub,
        source_hub(tmp_path / "source") as other_hub,
    ):
        hub.hidden_names(hub.workers.worker(), None)
        make_private(other_hub)
        source.push(make("a1", 1), SQL)
        hub.replicator.replicate(*hub.settings.replications)
        assert urllib3.request("GET", f"{target.url}/api/models/team/sql").status == 404
        with target.registry() as registry:
            assert versions(registry) == versions(source)


def test_a_name_that_becomes_private_while_it_is_sent_is_not_sent_on_before_it_is_private_there(
    tmp_path: Path, source: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        source.push(make(f"a{seed}", seed), SQL)
    replay = Replica.replay
    with serving(tmp_path / "target") as target, source_hub(tmp_path / "source", to_hub(target)) as hub:

        def replay_and_hide(replica: Replica, entries: Sequence[Entry]) -> Iterator[tuple[int, AdapterhubError | None]]:
            for step in replay(replica, entries):
                make_private(hub)
                yield step

        with monkeypatch.context() as patch:
            patch.setattr(Replica, "replay", replay_and_hide)
            hub.replicator.replicate(*hub.settings.replications)
        with target.registry() as registry:
            assert [row[:2] for row in versions(registry)] == [row[:2] for row in versions(source)[1:]]
        (state,) = replication.states(hub.database)
        assert (state.waiting, state.failing) == (1, 0)
        hub.replicator.replicate(*hub.settings.replications)
        assert urllib3.request("GET", f"{target.url}/api/models/team/sql").status == 404
        with target.registry() as registry:
            assert versions(registry) == versions(source)


def test_whether_a_name_is_private_is_read_for_that_name_and_not_for_all_namespaces(
    tmp_path: Path, source: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2, 3):
        source.push(make(f"a{seed}", seed), SQL)
    with serving(tmp_path / "target") as target, source_hub(tmp_path / "source", to_hub(target)) as hub:
        for number in range(50):
            accounts.set_namespace(hub.database, accounts.Namespace(f"closed{number}", "members"))
        select, row_counts = HubDatabase.select, list[int]()

        def counted(database: HubDatabase, sql: str, *values: Any) -> list[Any]:
            rows = select(database, sql, *values)
            row_counts.append(len(rows))
            return rows

        with monkeypatch.context() as patch:
            patch.setattr(HubDatabase, "select", counted)
            hub.replicator.replicate(*hub.settings.replications)
        assert max(row_counts) < 5
        with target.registry() as registry:
            assert versions(registry) == versions(source)


def test_only_names_of_the_pattern_are_sent(tmp_path: Path, source: Registry, make: Make) -> None:
    for name in ("team/sql", "team/chat", "red/sql"):
        source.push(make(name.replace("/", "-"), len(name)), Ref.parse(name))
    with serving(tmp_path / "target") as target, source_hub(tmp_path / "source", to_hub(target, "*/sql")) as hub:
        hub.replicator.replicate(*hub.settings.replications)
        with target.registry() as registry:
            assert sorted({row.name for row in registry.list()}) == ["red/sql", "team/sql"]


def test_what_a_target_refuses_is_said_and_tried_again(
    tmp_path: Path, source: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replication, "_FIRST_RETRY", 0.0)
    for name in ("team/a", "team/b", "team/c", "team/d"):
        source.push(make(name.replace("/", "-"), ord(name[-1])), Ref.parse(name))
    with serving(tmp_path / "target") as target:
        token = target.make_token("bob", "read")
        place = replace(to_hub(target), user=user(token))
        with source_hub(tmp_path / "source", place) as hub:
            hub.replicator.replicate(place)
            (state,) = replication.states(hub.database)
            assert (state.waiting, state.failing) == (4, 0)
            hub.replicator.replicate(place)
            (state,) = replication.states(hub.database)
            # Of a target that denies everything, three names are tried at a time.
            assert (state.waiting, state.failing, "needs the role write in team" in state.error) == (4, 3, True)
            (check,) = [check for check in health.diagnosis(hub.settings) if check.name == "replication"]
            assert (check.state, "3 of 4 names fail" in check.what) == (health.WARNING, True)
            complete = state.complete
            hub.replicator.replicate(replace(place, user=user(target.token)))
            (state,) = replication.states(hub.database)
            assert (state.waiting, state.failing, state.error, state.complete > complete) == (0, 0, "", True)
        with target.registry() as registry:
            assert len(registry.list()) == 4


def test_a_tag_moves_at_a_target_only_to_what_meets_the_requirements_there_and_a_withdrawal_gets_through(
    tmp_path: Path, source: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replication, "_FIRST_RETRY", 0.0)
    rules = "[promote.prod.require]\napprovals = 1\n"
    policy = settings_file.parse(rules, tmp_path / "adapterhub.toml").policy
    for seed in (1, 2):
        push(source, make(f"a{seed}", seed), "team/sql", "")
    source.tag(Ref("team/sql", number=2), "prod")
    release_moves.withdraw(source.ledger, Ref("team/sql", number=1), ReleaseStatement("a leaked key"))
    with serving(tmp_path / "target", policy=policy) as target, source_hub(tmp_path / "source", to_hub(target)) as hub:
        (place,) = hub.settings.replications
        with target.registry() as registry:
            push(registry, make("a1", 1), "team/sql", "")
        hub.replicator.replicate(place)
        (state,) = replication.states(hub.database)
        assert (state.waiting, "approvals: 0 of 1" in state.error) == (1, True)
        with target.registry() as registry:
            assert [row[2:] for row in versions(registry)] == [(("latest",), None), ((), "a leaked key")]
            registry.author = "bob"
            release_moves.approve(registry.ledger, Ref("team/sql", number=2), "prod", ReleaseStatement("fine", "", "bob"))
        hub.replicator.replicate(place)
        with target.registry() as registry:
            assert versions(registry)[0][2] == ("latest", "prod")


def test_a_refused_move_holds_up_no_later_one_and_is_made_when_it_may_be(tmp_path: Path, source: Registry, make: Make) -> None:
    """A tag that was protected at the target kept every later version, and a withdrawal, from it."""
    source.push(make("a1", 1), Ref.parse("team/sql:prod"))
    with serving(tmp_path / "target") as target, source_hub(tmp_path / "source", to_hub(target)) as hub:
        (place,) = hub.settings.replications
        hub.replicator.replicate(place)
        with target.registry() as registry:
            registry.protect(Ref.parse("team/sql:prod"))
        source.push(make("a2", 2), Ref.parse("team/sql:prod"))
        source.push(make("a3", 3), SQL)
        source.deprecate(Ref.parse("team/sql:v1"), "too small")
        hub.replicator.replicate(place)

        def copies() -> tuple[list[str], str, str]:
            with target.registry() as registry:
                tags = [registry.resolve(Ref.parse(f"team/sql:{tag}")).digest for tag in ("prod", "latest")]
                assert registry.deprecations(["team/sql"]) == source.deprecations(["team/sql"])
                return [digest for _, digest, *_ in versions(registry)], *tags

        digests = [digest for _, digest, *_ in versions(source)]
        by_number = {number: digest for number, digest, *_ in versions(source)}
        assert copies() == (digests, by_number[1], by_number[3])
        hub.replicator.replicate(place)  # not due: nothing is tried
        (state,) = replication.states(hub.database)
        assert (state.waiting, state.failing, "prod" in state.error) == (1, 1, True)
        assert hub.database.select("SELECT tries FROM replicated") == [(1,)]
        source.push(make("a4", 4), SQL)
        hub.replicator.replicate(place)  # what is new does not wait
        assert copies()[2] == {number: digest for number, digest, *_ in versions(source)}[4]
        with target.registry() as registry:
            registry.protect(Ref.parse("team/sql:prod"), on=False)
        hub.database.execute("UPDATE replicated SET due = 0")
        hub.replicator.replicate(place)
        with target.registry() as registry:
            assert versions(registry) == versions(source)
        (state,) = replication.states(hub.database)
        assert (state.waiting, state.failing, state.error) == (0, 0, "")


def test_a_retry_of_a_refused_move_moves_no_other_tag_back(
    tmp_path: Path, source: Registry, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more entries after it than are replayed at a time, each retry led `prod` through its earlier versions."""
    monkeypatch.setattr(replication, "_MAX_ENTRIES", 2)
    for seed in (1, 2, 3):
        push(source, make(f"a{seed}", seed), "team/sql", "")
    source.tag(Ref("team/sql", number=1), "fixed")
    with serving(tmp_path / "target") as target, source_hub(tmp_path / "source", to_hub(target)) as hub:
        (place,) = hub.settings.replications
        hub.replicator.replicate(place)
        with target.registry() as registry:
            registry.protect(Ref.parse("team/sql:fixed"))
        source.tag(Ref("team/sql", number=2), "fixed")
        for number in (1, 2, 3):
            source.tag(Ref("team/sql", number=number), "prod")
        source.deprecate(Ref("team/sql", number=1), "too small")
        source.deprecate(Ref("team/sql", number=1), "", undo=True)
        release_moves.withdraw(source.ledger, Ref("team/sql", number=1), ReleaseStatement("a leaked key"))
        release_moves.undo_withdrawal(source.ledger, Ref("team/sql", number=1))
        hub.replicator.replicate(place)

        def log() -> list[tuple[str, int, tuple[str, ...]]]:
            with target.registry() as registry:
                return [(entry.op, entry.number, entry.tags) for entry in registry.store.log.entries("team/sql")]

        first = log()
        hub.database.execute("UPDATE replicated SET due = 0")
        hub.replicator.replicate(place)
        assert hub.database.select("SELECT tries FROM replicated") == [(2,)]
        assert log() == first


def test_what_a_target_refused_is_made_again_after_it_did_not_answer(tmp_path: Path, source: Registry, make: Make) -> None:
    source.push(make("a1", 1), Ref.parse("team/sql:prod"))
    source.push(make("a2", 2), SQL)
    with serving(tmp_path / "target") as target, source_hub(tmp_path / "source", to_hub(target)) as hub:
        (place,) = hub.settings.replications
        hub.replicator.replicate(place)
        # As a try leaves it that is killed after a refusal.
        hub.database.execute("UPDATE replicated SET seq = 2, refused = 1, tries = 1, due = 0")
        denied = replace(place, user=user("hf_" + "x" * 40))
        hub.replicator.replicate(denied)
        assert hub.database.select("SELECT seq, refused, tries FROM replicated") == [(0, 0, 2)]
        hub.database.execute("UPDATE replicated SET due = 0")
        hub.replicator.replicate(place)
        assert hub.database.select("SELECT seq, refused, tries FROM replicated") == [(2, 0, 0)]
        with target.registry() as registry:
            assert versions(registry) == versions(source)


def test_a_removed_name_of_members_is_looked_at_once(tmp_path: Path, source: Registry, make: Make) -> None:
    source.push(make("a1", 1), SQL)
    with serving(tmp_path / "target") as target, source_hub(tmp_path / "source", to_hub(target)) as hub:
        (place,) = hub.settings.replications
        hub.replicator.replicate(place)
        accounts.set_namespace(hub.database, accounts.Namespace("team", "members"))
        source.rm(SQL)
        hub.replicator.replicate(place)
        assert list(hub.replicator._pending_names(hub.workers.worker(), place)) == []


def test_a_hub_of_others_is_no_target(tmp_path: Path, source: Registry, make: Make) -> None:
    source.push(make("a1", 1), SQL)
    with docker_registry.running(tmp_path) as host:
        place = Replication("*", f"hub+http://{host}", user())
        with source_hub(tmp_path / "source", place) as hub:
            hub.replicator.replicate(place)
            assert "is no hub that runs adapterhub" in replication.states(hub.database)[0].error


def test_a_log_of_a_backup_is_sent_again_and_nothing_twice(tmp_path: Path, source: Registry, make: Make) -> None:
    source.push(make("a1", 1), Ref.parse("team/sql:prod"))
    with serving(tmp_path / "target") as target, source_hub(tmp_path / "source", to_hub(target)) as hub:
        (place,) = hub.settings.replications
        hub.replicator.replicate(place)
        hub.database.execute("UPDATE replicated SET seq = 7")
        hub.replicator.replicate(place)
        assert hub.database.select("SELECT seq FROM replicated") == [(1,)]
        with target.registry() as registry:
            assert [entry.op for entry in registry.log(SQL)] == ["push"] or versions(registry) == versions(source)
            assert len(registry.list()) == 1


@pytest.mark.parametrize("seed", range(2))
def test_a_hub_that_is_killed_anywhere_loses_nothing_and_sends_nothing_twice(seed: int, tmp_path: Path, make: Make) -> None:
    chance = random.Random(seed)
    with serving(tmp_path / "target") as target:
        source = Killable(tmp_path / "source", replicate=(to_hub(target).url, target.token))
        source.start()
        with closing(Registry.open(source.folder)) as registry:
            for number in range(12):
                registry.push(make(f"a{number}", number), Ref.parse(f"team/n{number % 3}:t{number}"))
        for _ in range(4):
            time.sleep(chance.random())  # the moment of the kill
            source.kill()
            _end_claims(source.folder)
            source.start()
        with closing(Registry.open(source.folder)) as registry, target.registry() as copies:

            def listed(registry: Registry) -> list[Any]:
                registry.refresh()
                return [(row.name, row.number, row.digest, row.tags) for row in registry.list()]

            wait_until(lambda: listed(copies) == listed(registry))
            for name in ("team/n0", "team/n1", "team/n2"):
                assert sum(entry.op == "push" for entry in copies.log(Ref.parse(name))) == 4
        source.kill()
        assert_sound(source.folder)


def test_the_metrics_say_how_far_a_target_is_behind(tmp_path: Path, make: Make) -> None:
    with serving(tmp_path / "target") as target:
        place = to_hub(target)
        with serving(tmp_path / "source", replications=(place,)) as source:
            with source.registry() as registry:
                registry.push(make("a1", 1), SQL)

            def numbers() -> dict[str, float]:
                headers = {"authorization": f"Bearer {source.token}"}
                text = urllib3.request("GET", f"{source.url}/metrics", headers=headers).data.decode()
                samples = (line.rpartition(" ") for line in text.splitlines() if line.startswith("hub_replication"))
                return {series: float(value) for series, _, value in samples}

            label = f'target="{place.key}"'
            wait_until(lambda: f"hub_replication_lag_seconds{{{label}}}" in numbers())
            wait_until(lambda: _is_copied(target))
            wait_until(lambda: numbers()[f'hub_replication_names{{state="waiting",{label}}}'] == 0)


def _end_claims(folder: Path) -> None:
    """End what a killed process has claimed, as a minute would."""
    with closing(HubDatabase(folder)) as database:
        database.execute("DELETE FROM jobs")


def _is_copied(target: Running) -> bool:
    try:
        with target.registry() as registry:
            return bool(registry.list("team/sql"))
    except AdapterhubError:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that is done in another thread."""
    while not condition():
        time.sleep(0.05)
