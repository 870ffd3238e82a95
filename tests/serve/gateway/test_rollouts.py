"""Rollouts in a running gateway: shares, steps and the way back, in the registry's log, over restarts and several gateways."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any, cast

import httpx2
import pytest
from starlette.applications import Starlette

from adapterhub.digest import Digest
from adapterhub.evidence import rollout_rules
from adapterhub.evidence.sequential_test import PairCounts
from adapterhub.manifest.release_statement import ReleaseStatement
from adapterhub.manifest.rollout_state import DONE, PAUSED, ROLLED_BACK, RUNNING, RolloutState
from adapterhub.operations.local_registry import Registry
from adapterhub.operations.workspace import Workspace
from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry as StoredRegistry
from adapterhub.registry.releases import release_moves
from adapterhub.registry.releases import rollouts as rollout_log
from adapterhub.serve.engines import Blend, EngineAnswer
from adapterhub.serve.gateway.app import create_app
from adapterhub.serve.gateway.gateway import Gateway
from adapterhub.serve.gateway.gateway_settings import GatewaySettings
from adapterhub.serve.gateway.lookup import ResolvedVersion
from adapterhub_converters.bases import read_hf
from adapterhub_converters.errors import RefusedError
from tests.support import folders

from .test_versions import Holder

ROUTE = """
[routes.sql]
to = "team/sql:prod"
candidate = "team/sql:v2"
steps = [{ share = 50, for = "10m" }, { share = 80, for = "30m" }, 100]
bounds = { errors = 30 }
"""


class Arms(Holder):
    """An engine that answers, but fails for some versions."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: set[str] = set()
        self.slow: set[str] = set()
        self.go_on = asyncio.Event()  # ends the waiting of the slow
        self.numbers = count()

    async def request(self, path: str, body: Any, blend: Blend) -> EngineAnswer:
        model = blend[0][0].model
        document = {"model": model, "choices": [{"finish_reason": "stop", "text": ""}]}
        document |= {"id": f"cmpl-{next(self.numbers)}", "usage": {"prompt_tokens": 2, "completion_tokens": 3}}

        async def whole() -> AsyncIterator[bytes]:
            if model in self.slow:
                await self.go_on.wait()
            yield json.dumps(document).encode()

        return EngineAnswer(500 if model in self.bad else 200, "application/json", whole(), model=model)


class Running:
    """A running gateway with its engine and a client, whose clock only a test moves."""

    client: httpx2.AsyncClient

    def __init__(self, gateway: Gateway, engine: Arms) -> None:
        self.gateway, self.engine = gateway, engine
        self.now = 0.0
        self.own_clock = gateway.rollouts._clock
        gateway.rollouts._clock = lambda: self.now

    async def ask(self, times: int, **fields: Any) -> Counter[str]:
        """Ask so many times; return how often each version answered."""
        body = {"model": "sql", "prompt": "x", **fields}
        answers = [await self.client.post("/v1/completions", json=body) for _ in range(times)]
        return Counter(answer.headers["x-adapterhub-version"] for answer in answers)

    async def look(self) -> None:
        """Look at the log, as the gateway does once in a while."""
        await self.gateway.rollouts.refresh(self.gateway.routes)

    @property
    def document(self) -> dict[str, Any]:
        [document] = self.gateway.rollouts.documents()
        return document


@pytest.fixture
def versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Digest]:
    """The digests of `team/sql:v1`, which is `prod`, and `team/sql:v2`."""
    monkeypatch.chdir(tmp_path)
    digests = []
    with Registry(tmp_path / "registry") as registry:
        for alpha in (2, 8):
            folders.adapter(tmp_path / f"sql{alpha}", folders.pairs(2), lora_alpha=alpha)
            digests.append(registry.push(tmp_path / f"sql{alpha}", "team/sql").digest)
        registry.tag("team/sql:v1", "prod")
    (tmp_path / "routes.toml").write_text(ROUTE)
    folders.base(tmp_path / "base")
    return digests


@asynccontextmanager
async def running(folder: Path, name: str = "one") -> AsyncIterator[Running]:
    """Run a gateway that looks at the log only when a test says so."""
    workspace = Workspace(registry=folder / "registry", cache=folder / name)
    base = read_hf(folder / "base")
    settings = GatewaySettings(base, "base", workspace, routes=folder / "routes.toml", usage=folder / "usage.db", poll=3600)
    engine = Arms()
    started = Running(Gateway(settings, engine), engine)
    app = cast(Starlette, create_app(started.gateway))
    transport = httpx2.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost") as started.client,
    ):
        while not started.gateway.ready:
            await asyncio.sleep(0.005)
        yield started


def run(folder: Path, test: Callable[[Running], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with running(folder) as gateway:
            await asyncio.wait_for(test(gateway), 60)

    asyncio.run(main())


def state(folder: Path, digest: Digest) -> RolloutState:
    """Return the state in the registry's log."""
    with StoredRegistry.open(folder / "registry") as registry:
        logged = rollout_log.state_of(registry.index, Ref("team/sql", digest=digest), "sql")
        assert logged is not None
        return logged


def test_a_candidate_gets_its_share_and_more_at_each_step_until_it_has_all(versions: list[Digest], tmp_path: Path) -> None:
    stable, candidate = (f"team/sql@{digest}" for digest in versions)

    async def test(gateway: Running) -> None:
        counts = await gateway.ask(200)
        assert 60 < counts[candidate] < 140
        assert counts.total() == 200 == counts[candidate] + counts[stable]
        await gateway.look()
        assert state(tmp_path, versions[1]).step == 0
        gateway.now = 601
        await gateway.look()
        assert (state(tmp_path, versions[1]).step, gateway.document["share"]) == (1, 80)
        gateway.now = 601 + 1799
        await gateway.look()
        assert state(tmp_path, versions[1]).state == RUNNING
        gateway.now += 2
        await gateway.look()
        assert state(tmp_path, versions[1]).state == DONE
        assert await gateway.ask(20) == {candidate: 20}

    run(tmp_path, test)


def test_too_few_requests_hold_a_step_and_it_says_how_many_are_needed(versions: list[Digest], tmp_path: Path) -> None:
    async def test(gateway: Running) -> None:
        await gateway.ask(10)
        gateway.now = 100_000
        await gateway.look()
        assert state(tmp_path, versions[1]).step == 0
        [bound] = gateway.document["bounds"]
        assert bound["text"].startswith("cannot tell yet: ")

    run(tmp_path, test)


def test_a_candidate_that_fails_more_often_is_rolled_back_by_itself_with_the_reason_in_the_log(
    versions: list[Digest], tmp_path: Path
) -> None:
    stable, candidate = (f"team/sql@{digest}" for digest in versions)

    async def test(gateway: Running) -> None:
        gateway.engine.bad = {candidate}
        await gateway.ask(80)
        await gateway.look()
        logged = state(tmp_path, versions[1])
        assert logged.state == ROLLED_BACK
        assert logged.reason.startswith("errors: requests fail more often: in ")
        assert await gateway.ask(20) == {stable: 20}
        with StoredRegistry.open(tmp_path / "registry") as registry:
            last = [*registry.store.log.entries("team/sql")][-1]
        assert (last.op, last.digest, last.number) == ("rollout", versions[1], 2)

    run(tmp_path, test)


def test_failures_of_both_arms_are_no_reason_to_roll_back(versions: list[Digest], tmp_path: Path) -> None:
    async def test(gateway: Running) -> None:
        gateway.engine.bad = {f"team/sql@{digest}" for digest in versions}
        await gateway.ask(100)
        await gateway.look()
        assert state(tmp_path, versions[1]).state == RUNNING

    run(tmp_path, test)


@pytest.mark.parametrize("field", ["safety_identifier", "prompt_cache_key", "user"])
def test_a_client_stays_with_its_arm_and_counts_once(versions: list[Digest], tmp_path: Path, field: str) -> None:
    async def test(gateway: Running) -> None:
        for name in ("ada", "bo", "cy"):
            assert len(await gateway.ask(5, **{field: name})) == 1
        assert sum(count.total for count in gateway.gateway.rollouts._tracks["sql"].evidence.counts.values()) <= 1

    run(tmp_path, test)


def test_a_client_stays_with_its_arm_by_a_header_that_the_route_names(versions: list[Digest], tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text(f'{ROUTE}sticky = ["X-Session", "user"]\n')

    async def test(gateway: Running) -> None:
        async def version(session: str, user: str) -> str:
            body, headers = {"model": "sql", "prompt": "x", "user": user}, {"x-session": session}
            answer = await gateway.client.post("/v1/completions", json=body, headers=headers)
            return str(answer.headers["x-adapterhub-version"])

        arms = {session: await version(session, "first") for session in map(str, range(30))}
        assert {*arms.values()} == {f"team/sql@{digest}" for digest in versions}
        for session, arm in arms.items():
            assert {await version(session, user) for user in ("second", "third")} == {arm}

    run(tmp_path, test)


def test_a_restarted_gateway_goes_on_at_its_step_with_its_evidence(versions: list[Digest], tmp_path: Path) -> None:
    async def first(gateway: Running) -> None:
        await gateway.ask(200)
        gateway.now = 601
        await gateway.look()
        gateway.now += 1000
        await gateway.look()

    async def second(gateway: Running) -> None:
        assert (gateway.document["step"], gateway.document["share"]) == (2, 80)
        gateway.now = 799
        await gateway.look()
        assert state(tmp_path, versions[1]).state == RUNNING
        gateway.now = 801
        await gateway.look()
        assert state(tmp_path, versions[1]).state == DONE

    run(tmp_path, first)
    before = state(tmp_path, versions[1])
    assert (before.step, before.seconds) == (1, 1000)
    assert sum(before.counts["errors"]) > 50
    run(tmp_path, second)


def test_several_gateways_add_their_evidence_and_follow_one_state(versions: list[Digest], tmp_path: Path) -> None:
    stable, candidate = (f"team/sql@{digest}" for digest in versions)

    async def main() -> None:
        async with AsyncExitStack() as stack:
            gateways = [await stack.enter_async_context(running(tmp_path, name)) for name in ("one", "two")]
            for gateway in gateways:
                gateway.engine.bad = {candidate}
            request_count = 0
            while state(tmp_path, versions[1]).state == RUNNING:
                request_count += 8
                for gateway in gateways:
                    await gateway.ask(8)
                    await gateway.look()
            assert sum(state(tmp_path, versions[1]).counts["errors"]) > 6
            assert request_count <= 40
            for gateway in gateways:
                await gateway.look()
                assert await gateway.ask(10) == {stable: 10}

    asyncio.run(main())


def test_the_time_of_a_step_is_counted_once_for_all_gateways(versions: list[Digest], tmp_path: Path) -> None:
    async def main() -> None:
        async with AsyncExitStack() as stack:
            gateways = [await stack.enter_async_context(running(tmp_path, name)) for name in ("one", "two")]
            for gateway in gateways:
                await gateway.ask(100)
                await gateway.look()
            for now in range(0, 590, 59):
                for gateway in gateways:
                    gateway.now = float(now)
                    await gateway.look()
            assert state(tmp_path, versions[1]).step == 0
            assert state(tmp_path, versions[1]).seconds <= 590

    asyncio.run(main())


@pytest.mark.parametrize("seconds", [-400 * 86400.0, 400 * 86400.0])
def test_a_clock_that_jumps_neither_skips_a_step_nor_holds_it(
    versions: list[Digest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """The time of a step is not that of the day, nor are entries of the log compared by theirs."""

    async def test(gateway: Running) -> None:
        start = gateway.own_clock()
        await gateway.ask(200)
        jumped = time.time() + seconds
        monkeypatch.setattr(time, "time", lambda: jumped)
        for wait, step in ((0, 0), (500, 0), (601, 1), (601 + 1700, 1)):
            gateway.now = gateway.own_clock() - start + wait
            await gateway.look()
            assert state(tmp_path, versions[1]).step == step

    run(tmp_path, test)


def test_a_gateway_without_its_registry_keeps_its_step_and_says_so(
    versions: list[Digest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, candidate = (f"team/sql@{digest}" for digest in versions)
    registry = tmp_path / "registry"

    async def test(gateway: Running) -> None:
        await gateway.ask(200)
        registry.rename(tmp_path / "elsewhere")
        gateway.now = 100_000
        await gateway.look()
        assert gateway.document["share"] == 50
        assert gateway.document["cut_off"]
        assert "the rollout of sql stays as it is, at 50 %" in caplog.text
        gateway.gateway.rollouts._tracks["sql"].evidence.counts["errors"] += PairCounts(500, 0, 0)
        await gateway.look()
        assert gateway.document["share"] == 0
        (tmp_path / "elsewhere").rename(registry)
        await gateway.look()
        assert gateway.document["cut_off"] is None
        assert state(tmp_path, versions[1]).state == ROLLED_BACK
        assert candidate not in await gateway.ask(10)

    run(tmp_path, test)


def test_a_withdrawn_candidate_leaves_at_once_and_stays_away(versions: list[Digest], tmp_path: Path) -> None:
    stable = f"team/sql@{versions[0]}"

    async def test(gateway: Running) -> None:
        with StoredRegistry.open(tmp_path / "registry") as registry:
            release_moves.withdraw(registry.ledger, Ref.parse("team/sql:v2"), ReleaseStatement("a leaked key"))
        assert await gateway.ask(30) == {stable: 30}
        await gateway.look()
        logged = state(tmp_path, versions[1])
        assert (logged.state, logged.reason) == (ROLLED_BACK, "v2 was withdrawn: a leaked key")

    run(tmp_path, test)


def test_a_step_without_a_time_waits_for_a_person(versions: list[Digest], tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text(ROUTE.replace('{ share = 50, for = "10m" }', "50"))

    async def test(gateway: Running) -> None:
        gateway.now = 100_000
        await gateway.look()
        assert state(tmp_path, versions[1]).state == PAUSED
        with StoredRegistry.open(tmp_path / "registry") as registry:
            ref = Ref("team/sql", digest=versions[1])
            rollout_log.change(registry.ledger, ref, "sql", lambda logged: logged and rollout_rules.resume(logged))
        await gateway.look()
        assert (gateway.document["state"], gateway.document["share"]) == (RUNNING, 80)

    run(tmp_path, test)


def test_a_gateway_of_a_remote_is_refused_because_it_has_no_log_to_write(versions: list[Digest], tmp_path: Path) -> None:
    workspace = Workspace(registry=tmp_path / "registry", cache=tmp_path / "cache")
    routes, remote = tmp_path / "routes.toml", "oci://registry.example/adapters"
    gateway = Gateway(GatewaySettings(read_hf(tmp_path / "base"), "base", workspace, remote=remote, routes=routes), Arms())
    with pytest.raises(RefusedError, match="has a rollout") as refused:
        asyncio.run(gateway.start())
    assert refused.value.code == "rollout-needs-registry"


def test_another_stable_version_begins_the_comparison_again(versions: list[Digest], tmp_path: Path) -> None:
    async def test(gateway: Running) -> None:
        await gateway.ask(100)
        await gateway.look()
        folders.adapter(tmp_path / "third", folders.pairs(2), lora_alpha=16)
        with Registry(tmp_path / "registry") as registry:
            third = registry.push(tmp_path / "third", "team/sql:prod").digest
        await gateway.look()
        logged = state(tmp_path, versions[1])
        assert (logged.stable, logged.counts) == (f"team/sql@{third}", {})
        with Registry(tmp_path / "registry") as registry:
            registry.tag("team/sql:v2", "prod")
        await gateway.look()
        assert gateway.gateway.rollouts.documents() == []  # the candidate is what the route means now

    run(tmp_path, test)


async def finish(gateway: Running) -> None:
    """Bring the rollout to its end."""
    await gateway.ask(200)
    for _ in range(2):
        gateway.now += 1801
        await gateway.look()


@pytest.mark.parametrize("is_done", [True, False])
@pytest.mark.parametrize("is_running", [True, False])
@pytest.mark.parametrize("way", ["rollback", "tag", "newer"])
def test_a_candidate_that_was_promoted_and_is_the_stable_version_no_longer_gets_nothing(
    versions: list[Digest], tmp_path: Path, way: str, is_done: bool, is_running: bool
) -> None:
    """After the promotion of a candidate, rolling `prod` back led all requests of the route to the bad version again."""
    prod = Ref.parse("team/sql:prod")

    def move_away(registry: StoredRegistry) -> Digest:
        if way == "rollback":
            return release_moves.rollback(registry.ledger, prod, "wrong dates")[1].digest
        if way == "tag":
            return registry.tag(Ref.parse("team/sql:v1"), "prod").digest
        folders.adapter(tmp_path / "third", folders.pairs(2), lora_alpha=16)
        return registry.push(tmp_path / "third", prod).digest

    async def test(gateway: Running) -> None:
        await gateway.ask(10)
        await gateway.look()
        if is_done:
            await finish(gateway)
        assert state(tmp_path, versions[1]).state == (DONE if is_done else RUNNING)
        with StoredRegistry.open(tmp_path / "registry") as registry:
            registry.tag(Ref.parse("team/sql:v2"), "prod")
            if is_running:
                await gateway.look()
            stable = move_away(registry)
        await gateway.look()
        assert await gateway.ask(20) == {f"team/sql@{stable}": 20}
        logged = state(tmp_path, versions[1])
        assert (logged.state, logged.reason) == (ROLLED_BACK, "team/sql:prod was moved to it, and away from it")
        with StoredRegistry.open(tmp_path / "registry") as registry:
            ref = Ref("team/sql", digest=versions[1])
            rollout_log.change(registry.ledger, ref, "sql", lambda logged: logged and rollout_rules.resume(logged))
        await gateway.look()
        assert (state(tmp_path, versions[1]).state, gateway.document["share"]) == (RUNNING, 50)

    run(tmp_path, test)


def test_a_candidate_is_not_rolled_back_by_the_move_that_makes_it_the_stable_version(
    versions: list[Digest], tmp_path: Path
) -> None:
    """The version that the tag meant was found before the move, and the log was read after it."""

    async def test(gateway: Running) -> None:
        await gateway.look()
        find = gateway.gateway.rollouts._find

        async def find_before_move(ref: Ref) -> ResolvedVersion:
            version = await find(ref)
            if ref.tag == "prod":
                with StoredRegistry.open(tmp_path / "registry") as registry:
                    registry.tag(Ref.parse("team/sql:v2"), "prod")
            return version

        gateway.gateway.rollouts._find = find_before_move
        await gateway.look()
        assert state(tmp_path, versions[1]).state == RUNNING

    run(tmp_path, test)


def test_a_rollout_that_is_done_begins_again_with_another_stable_version(versions: list[Digest], tmp_path: Path) -> None:
    async def test(gateway: Running) -> None:
        await finish(gateway)
        assert state(tmp_path, versions[1]).state == DONE
        folders.adapter(tmp_path / "third", folders.pairs(2), lora_alpha=16)
        with Registry(tmp_path / "registry") as registry:
            third = registry.push(tmp_path / "third", "team/sql:prod").digest
        await gateway.look()
        logged = state(tmp_path, versions[1])
        assert (logged.state, logged.step, logged.stable) == (RUNNING, 0, f"team/sql@{third}")

    run(tmp_path, test)


def test_a_candidate_that_is_the_stable_version_is_said_once_when_the_gateway_starts(
    versions: list[Digest], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Registry(tmp_path / "registry") as registry:
        registry.tag("team/sql:v2", "prod")

    async def test(gateway: Running) -> None:
        await gateway.look()
        [line] = [record.getMessage() for record in caplog.records if "the rollout of sql" in record.getMessage()]
        reason = f"team/sql:v2 is what team/sql:prod means already, team/sql@{versions[1]}"
        assert line == f"the rollout of sql waits: {reason}"

    run(tmp_path, test)
