"""Several servers with vLLM's API as one engine: which one answers, and who answers instead of one that does not."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from adapterhub.serve.engines import Blend, Engine, EngineAnswer, EngineDownError, MissingVersionError
from adapterhub.serve.engines.engine_client import Client
from adapterhub.serve.engines.engine_pool import SPREAD, EnginePool
from adapterhub.serve.engines.pooled_engine import EngineAddress
from adapterhub.serve.engines.vllm import Vllm
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.bases import BaseSpec
from adapterhub_converters.errors import RefusedError, UsageError
from tests.serve.engines.test_vllm import Server
from tests.support.folders import base

BODY = {"prompt": "x"}


class Peer(Server):
    """A vLLM that answers requests with a status of its own, or breaks the connection at some of them."""

    def __init__(self) -> None:
        super().__init__("0.33.0")
        self.status = self.health = 200
        self.load_status = self.probes = 0
        self.breaks = False

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, object]:
        if path == "/health":
            return self.health, {}
        if path == "/v1/load_lora_adapter" and self.load_status:
            return self.load_status, {}
        if path == "/v1/completions" and body["prompt"] == "x":
            self.requested_models.append(body["model"])
            if self.breaks:
                raise asyncio.IncompleteReadError(b"", 1)  # which ends the connection
            return self.status, {"model": body["model"]}
        self.probes += path == "/v1/completions"
        return super().answer(path, body)


class Lab:
    """Peers, their addresses by name, and versions of adapters."""

    def __init__(self, folder: Path, spec: BaseSpec) -> None:
        self.folder, self.spec = folder, spec
        self.peers: dict[str, Peer] = {}
        self.urls: dict[str, str] = {}

    def version(self, letter: str) -> PreparedVersion:
        return PreparedVersion(f"team/{letter}:v1", f"team/{letter}", f"sha256:{letter * 64}", "vllm", self.folder, 4)

    def addresses(self, names: str = "", **weights: float) -> list[EngineAddress]:
        return [EngineAddress(self.urls[name], name, weights.get(name, 1.0)) for name in names or self.urls]

    def open(self, address: EngineAddress) -> Engine:
        return Vllm(Client(address.url), None, base=self.spec, folder=self.folder, slots=4)

    def other_base(self) -> str:
        """The folder of a base of the same shapes with another template."""
        shutil.copytree(self.folder / "base", self.folder / "instruct", dirs_exist_ok=True)
        (self.folder / "instruct/tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
        return str(self.folder / "instruct")

    def request_counts(self) -> dict[str, int]:
        return {name: len(peer.requested_models) for name, peer in self.peers.items()}


@asynccontextmanager
async def laboratory(folder: Path, names: str = "ab") -> AsyncIterator[Lab]:
    async with AsyncExitStack() as stack:
        lab = Lab(folder, base(folder / "base"))
        for name in names:
            lab.peers[name] = Peer()
            lab.urls[name] = await stack.enter_async_context(lab.peers[name].running())
        yield lab


@asynccontextmanager
async def started(lab: Lab, fixed: list[EngineAddress], *listed: EngineAddress) -> AsyncIterator[EnginePool]:
    pool = EnginePool(lab.open, fixed, listed)
    try:
        await pool.start()
        yield pool
    finally:
        await pool.close()


async def status(pool: EnginePool, *served: PreparedVersion) -> tuple[int, str]:
    """The status of an answer, and the name of the engine that gave it."""
    for version in served:
        await pool.ensure(version)
    answer = await pool.request("/v1/completions", BODY, tuple((version, 1.0) for version in served))
    async for _ in answer.body:
        pass
    await answer.close()
    return answer.status, answer.engine


def up(pool: EnginePool) -> dict[str, bool]:
    return {member.address.name: member.is_up for member in pool.members}


def run(folder: Path, use: Callable[[Lab], Awaitable[None]], names: str = "ab") -> None:
    async def main() -> None:
        async with laboratory(folder, names) as lab:
            await use(lab)

    asyncio.run(main())


def test_a_version_stays_with_the_engine_that_has_it_and_versions_are_spread(tmp_path: Path) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses()) as pool:
            for _ in range(3):
                answers = [await status(pool, lab.version(letter)) for letter in "cdef"]
                assert answers == [(200, "a"), (200, "b"), (200, "a"), (200, "b")]
        assert [len(peer.loads) for peer in lab.peers.values()] == [2, 2]

    run(tmp_path, use)


def test_a_version_gets_a_second_engine_once_the_first_is_busier_by_the_margin(tmp_path: Path) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses()) as pool:
            version = lab.version("c")
            await pool.ensure(version)
            answers = [await pool.request("/v1/completions", BODY, ((version, 1.0),)) for _ in range(SPREAD + 5)]
            # From then on both have it, and the less busy one answers.
            assert [answer.engine for answer in answers] == ["a"] * SPREAD + ["b"] * SPREAD + ["a"]
            assert [member.running for member in pool.members] == [SPREAD + 1, SPREAD]
            for answer in answers:
                await answer.close()
                await answer.close()
            assert [member.running for member in pool.members] == [0, 0]

    run(tmp_path, use)


def test_requests_are_shared_by_weight(tmp_path: Path) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses(a=1, b=3)) as pool:
            answers = [await pool.request("/v1/completions", BODY, ()) for _ in range(40)]
            assert [sum(answer.engine == name for answer in answers) for name in "ab"] == [10, 30]
            for answer in answers:
                await answer.close()
            assert pool.requests == {"a": 10, "b": 30}

    run(tmp_path, use)


def test_an_engine_with_another_base_is_never_asked_until_it_has_the_right_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def use(lab: Lab) -> None:
        lab.peers["a"].root = lab.other_base()
        async with started(lab, lab.addresses()) as pool:
            assert [await status(pool) for _ in range(20)] == [(200, "b")] * 20
            assert up(pool) == {"a": False, "b": True}
            assert lab.request_counts() == {"a": 0, "b": 20}
            lab.peers["a"].root = str(tmp_path / "base")
            while not up(pool)["a"]:
                await asyncio.sleep(0.05)
            for member in pool.members:
                member.running = 7 * (member.address.name == "b")
            assert await status(pool) == (200, "a")

    with caplog.at_level("INFO"):
        run(tmp_path, use)
    assert "the engine a is left out: http://127.0.0.1" in caplog.text
    assert "has the base" in caplog.text
    assert "the engine a is in use" in caplog.text


def test_an_engine_with_other_weights_than_the_first_one_is_never_asked_until_it_has_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a path or a name says nothing, as of a server on another machine."""

    async def use(lab: Lab) -> None:
        lab.peers["b"].probabilities = {"lot": -0.6, "time": -2.5, "man": -2.0}
        async with started(lab, lab.addresses()) as pool:
            answers = [await pool.request("/v1/completions", BODY, ()) for _ in range(10)]
            assert [answer.engine for answer in answers] == ["a"] * 10
            lab.peers["b"].probabilities = {"lot": -0.6, "time": -1.45, "man": -2.0}  # up to rounding
            while not up(pool)["b"]:
                await asyncio.sleep(0.05)
            assert await status(pool) == (200, "b")
            for answer in answers:
                await answer.close()

    run(tmp_path, use)
    assert "answers with other weights than the engine a. Start it with the same base" in caplog.text


def test_if_none_has_the_base_the_start_fails_as_with_one(tmp_path: Path) -> None:
    async def use(lab: Lab) -> None:
        for peer in lab.peers.values():
            peer.root = lab.other_base()
        with pytest.raises(RefusedError, match="has the base") as refused:
            async with started(lab, lab.addresses()):
                pass
        assert refused.value.code == "engine-base"

    run(tmp_path, use)


def test_nobody_answers_at_the_start(tmp_path: Path) -> None:
    async def use(lab: Lab) -> None:
        with pytest.raises(EngineDownError):
            async with started(lab, [EngineAddress("http://127.0.0.1:1", "a"), EngineAddress("http://127.0.0.1:2", "b")]):
                pass

    run(tmp_path, use)


@pytest.mark.parametrize("code", [502, 503])
def test_another_engine_answers_for_one_that_is_not_available(tmp_path: Path, code: int) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses()) as pool:
            lab.peers["a"].status = code
            assert await status(pool, lab.version("c")) == (200, "b")
            lab.peers["b"].status = code
            assert (await status(pool, lab.version("c")))[0] == code  # as one engine would have it
            assert [member.running for member in pool.members] == [0, 0]

    run(tmp_path, use)


@pytest.mark.parametrize("code", [502, 503])
def test_another_engine_loads_a_version_for_one_that_is_not_available(tmp_path: Path, code: int) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses()) as pool:
            lab.peers["a"].load_status = code
            assert await status(pool, lab.version("c")) == (200, "b")
            assert up(pool) == {"a": False, "b": True}

    run(tmp_path, use)


def test_a_look_at_the_health_costs_an_engine_no_token(tmp_path: Path) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses()) as pool:
            for _ in range(30):
                assert await pool.healthy()
        assert [peer.probes for peer in lab.peers.values()] == [1, 1]

    run(tmp_path, use)


def test_a_hanging_engine_delays_no_look_at_the_health_of_the_pool(tmp_path: Path) -> None:
    async def hang(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses()) as pool:
            hanging = await asyncio.start_server(hang, "127.0.0.1", 0)
            async with contextlib.AsyncExitStack() as stack:
                stack.callback(hanging.close)
                first, second = pool.members
                url = f"http://127.0.0.1:{hanging.sockets[0].getsockname()[1]}"
                first.engine = Vllm(Client(url), None, base=lab.spec, folder=lab.folder, slots=4)
                stack.push_async_callback(first.engine.close)
                health = asyncio.ensure_future(pool.healthy())
                look = asyncio.ensure_future(first.look())
                finished, _ = await asyncio.wait([health, look], return_when=asyncio.FIRST_COMPLETED)
                assert finished == {health}
                assert health.result()
                assert second.is_up
                look.cancel()
                await asyncio.wait([look])

    run(tmp_path, use)


def test_another_engine_answers_for_one_that_was_started_without_the_version(tmp_path: Path) -> None:
    class Fixed(Vllm):
        """One that has the version only if it was started as `b`, as llama-servers with several lists do."""

        async def request(self, path: str, body: Mapping[str, Any], blend: Blend) -> EngineAnswer:
            if blend and self.client.url != urls["b"]:
                raise MissingVersionError(blend[0][0].model, "was started without it")
            return await super().request(path, body, blend)

    urls: dict[str, str] = {}

    async def use(lab: Lab) -> None:
        def open_engine(address: EngineAddress) -> Engine:
            return Fixed(Client(address.url), None, base=lab.spec, folder=lab.folder, slots=4)

        urls.update(lab.urls)
        pool = EnginePool(open_engine, lab.addresses())
        await pool.start()
        assert await status(pool, lab.version("c")) == (200, "b")
        assert up(pool) == {"a": True, "b": True}
        urls["b"] = ""
        with pytest.raises(MissingVersionError) as refused:
            await status(pool, lab.version("c"))
        assert refused.value.code == "engine-without-version"
        await pool.close()

    run(tmp_path, use)


@pytest.mark.parametrize("code", [400, 404, 422, 429, 500, 504])
def test_what_an_engine_refuses_no_other_is_asked(tmp_path: Path, code: int) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses()) as pool:
            lab.peers["a"].status = code
            assert await status(pool) == (code, "a")
            assert lab.request_counts() == {"a": 1, "b": 0}
            assert up(pool) == {"a": True, "b": True}

    run(tmp_path, use)


def test_another_engine_answers_for_one_that_breaks_off_which_is_left_out_until_its_pause_is_over(tmp_path: Path) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses()) as pool:
            lab.peers["a"].breaks = True
            assert [await status(pool) for _ in range(5)] == [(200, "b")] * 5
            assert pool.requests == {"a": 1, "b": 5}
            assert up(pool) == {"a": False, "b": True}
            lab.peers["a"].breaks = False
            while not up(pool)["a"]:
                await asyncio.sleep(0.05)
            assert await status(pool) == (200, "a")

    run(tmp_path, use)


def test_the_pause_grows_with_each_failure_until_a_request_is_answered(tmp_path: Path) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses("a")) as pool:
            [member] = pool.members
            pauses = []
            for _ in range(4):
                member.is_up = True  # as it is once its pause is over
                before = asyncio.get_running_loop().time()
                member.fail("it breaks off")
                member.fail("it breaks off")  # the same failure, seen by another request
                pauses.append(round(member._retry_at - before, 1))
            member.succeed()
            member.is_up = True
            member.fail("it breaks off")
            assert pauses == [0.5, 1, 2, 5]
            assert round(member._retry_at - asyncio.get_running_loop().time(), 1) == 0.5

    run(tmp_path, use)


def test_a_request_that_ends_engines_ends_two_at_most(tmp_path: Path) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses()) as pool:
            for peer in lab.peers.values():
                peer.breaks = True
            with pytest.raises(EngineDownError):
                await status(pool)
            assert lab.request_counts() == {"a": 2, "b": 2, "c": 0, "d": 0}  # a client repeats what an idle connection broke
            assert pool.requests == {"a": 1, "b": 1}

    run(tmp_path, use, "abcd")


def test_the_last_engine_is_asked_even_if_it_was_left_out(tmp_path: Path) -> None:
    """As it is without others: a server that has just come back answers at once."""

    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses("a")) as pool:
            pool.members[0].fail("it broke off")
            assert await status(pool) == (200, "a")

    run(tmp_path, use)


def test_a_pool_answers_while_one_engine_does(tmp_path: Path) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses()) as pool:
            for codes in ((200, 200), (503, 200), (200, 503), (503, 503), (200, 200)):
                lab.peers["a"].health, lab.peers["b"].health = codes
                assert await pool.healthy() == (200 in codes)

    run(tmp_path, use)


def test_an_engine_is_named_once(tmp_path: Path) -> None:
    lab = Lab(tmp_path, base(tmp_path / "base"))
    for second in (EngineAddress("http://a", "b"), EngineAddress("http://b", "a")):
        with pytest.raises(UsageError, match="is given more than once") as refused:
            EnginePool(lab.open, [EngineAddress("http://a", "a"), second])
        assert refused.value.code == "engine-twice"


def test_a_removed_engine_gets_no_request_and_is_closed_after_its_last_answer(tmp_path: Path) -> None:
    async def use(lab: Lab) -> None:
        a, b = lab.addresses()
        async with started(lab, [], a, b) as pool:
            [leaving, _] = pool.members
            answer = await pool.request("/v1/completions", BODY, ())
            assert answer.engine == "a"
            pool.change([b])
            assert [await status(pool) for _ in range(5)] == [(200, "b")] * 5
            assert up(pool) == {"b": True}
            assert b"".join([piece async for piece in answer.body]) == b'{"model": "base"}'
            client = cast(Vllm, leaving.engine).client
            assert client.is_connected
            await answer.close()
            while client.is_connected:
                await asyncio.sleep(0.01)

    run(tmp_path, use)


@pytest.mark.parametrize("is_killed", [False, True])
def test_an_engine_that_is_removed_while_it_loads_a_version_ends_that_and_if_it_is_killed_another_one_loads(
    tmp_path: Path, is_killed: bool
) -> None:
    async def use(lab: Lab) -> None:
        a, b = lab.addresses()
        has_begun, going_on = asyncio.Event(), asyncio.Event()

        async def wait(path: str, body: Mapping[str, Any]) -> None:
            if path == "/v1/load_lora_adapter":
                has_begun.set()
                await going_on.wait()
                if is_killed:
                    raise asyncio.IncompleteReadError(b"", 1)  # which ends the connection

        # One peer of two waits, in this test alone: a class of its own would say no more.
        lab.peers["a"].wait = wait  # type: ignore[method-assign]
        async with started(lab, [], a, b) as pool:
            client = cast(Vllm, pool.members[0].engine).client
            load = asyncio.create_task(pool.ensure(lab.version("c")))
            await has_begun.wait()
            pool.change([b])
            await asyncio.sleep(0.1)
            going_on.set()
            await load
            assert [len(peer.loads) for peer in lab.peers.values()] == ([0, 1] if is_killed else [1, 0])
            assert await status(pool, lab.version("c")) == (200, "b")
            while client.is_connected:
                await asyncio.sleep(0.01)
            assert not pool.members[0].running

    run(tmp_path, use)


def test_an_added_engine_is_compared_and_joins_and_another_weight_is_no_other_engine(tmp_path: Path) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, lab.addresses("a")) as pool:
            [first] = pool.members
            lab.peers["b"].root = lab.other_base()
            pool.change(lab.addresses("b", b=3))
            while pool.members[1].error is None:
                await asyncio.sleep(0.01)
            assert up(pool) == {"a": True, "b": False}
            lab.peers["b"].root = ""
            while not up(pool)["b"]:
                await asyncio.sleep(0.01)
            pool.change(lab.addresses("b", b=2))
            assert (pool.members[0], [member.address.weight for member in pool.members]) == (first, [1, 2])
            assert up(pool) == {"a": True, "b": True}

    run(tmp_path, use)


@pytest.mark.parametrize("names", ["", "aa"])
def test_a_list_without_an_engine_or_with_one_twice_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, names: str
) -> None:
    async def use(lab: Lab) -> None:
        async with started(lab, [], *lab.addresses()) as pool:
            pool.change([address for name in names for address in lab.addresses(name)])
            assert up(pool) == {"a": True, "b": True}

    run(tmp_path, use)
    assert "the engines stay as they were: " in caplog.text


def test_an_engine_that_cannot_be_opened_is_left_out_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def use(lab: Lab) -> None:
        def open_engine(address: EngineAddress) -> Engine:
            if address.key_variable:
                raise UsageError(address.name, "its key should be in $KEY, which is not set")
            return lab.open(address)

        pool = EnginePool(open_engine, lab.addresses("a"))
        await pool.start()
        pool.change([dataclasses.replace(address, key_variable="KEY") for address in lab.addresses("b")])
        assert up(pool) == {"a": True}
        await pool.close()

    run(tmp_path, use)
    assert "the engine b is left out: b: its key should be in $KEY, which is not set" in caplog.text
