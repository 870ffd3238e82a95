"""A vLLM of somebody's own before 0.33, by its answers: what keeps the base apart there, or a refusal. tests/peers has vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adapterhub as ah
from adapterhub.serve.engines import EngineAnswer, EngineDownError, command_lines
from adapterhub.serve.engines.attached_base import PROBE
from adapterhub.serve.engines.engine_client import Client
from adapterhub.serve.engines.server_process import Process
from adapterhub.serve.engines.vllm import Vllm
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub_converters.adapter import LowRank
from adapterhub_converters.bases import BaseSpec, read_base
from adapterhub_converters.errors import RefusedError
from tests.support.folders import base


class Server:
    """The paths of vLLM that say what it has, and the one that loads; it sees the files here, or it does not."""

    def __init__(self, version: str, *, sees: bool = True) -> None:
        self.version, self.sees = version, sees
        self.loaded_adapters: dict[str, str] = {}
        self.requested_models: list[str] = []
        self.root = self.metrics = ""
        self.probabilities = {"lot": -0.5, "time": -1.5, "man": -2.0}
        self.loads: list[Mapping[str, Any]] = []

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, object]:
        if path == "/v1/load_lora_adapter":
            self.loads.append(body)
        match path:
            case "/version":
                return 200, {"version": self.version}
            case "/metrics":
                return 200, self.metrics
            case "/v1/models":
                models = [{"id": name, "root": root, "parent": "base"} for name, root in self.loaded_adapters.items()]
                return 200, {"data": [{"id": "base", "root": self.root, "max_model_len": 512}, *models]}
            case "/v1/load_lora_adapter" if not self.sees:  # vLLM 0.32: entrypoints/openai/models/serving.py
                problem = f"Loading lora {body['lora_name']} failed: No adapter found for {body['lora_path']}"
                return 404, {"error": {"message": problem, "type": "NotFoundError", "param": None, "code": 404}}
            case "/v1/load_lora_adapter" if body["lora_name"] in self.loaded_adapters:
                return 400, {"error": {"message": f"The lora adapter '{body['lora_name']}' has already been loaded."}}
            case "/v1/load_lora_adapter":
                self.loaded_adapters[body["lora_name"]] = body["lora_path"]
                return 200, "Success"
        if body["model"] not in {"base", *self.loaded_adapters}:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "type": "NotFoundError"}}
        if body["prompt"] == PROBE:
            return 200, {"choices": [{"logprobs": {"top_logprobs": [self.probabilities]}}]}
        self.requested_models.append(body["model"])
        return 200, {}

    async def wait(self, path: str, body: Mapping[str, Any]) -> None:
        """Return once it is to answer a request."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError):
                while True:
                    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                    length = next((int(line[16:]) for line in head.split("\r\n") if line.startswith("content-length: ")), 0)
                    path, posted = head.split(" ")[1], json.loads(await reader.readexactly(length) or b"{}")
                    await self.wait(path, posted)
                    status, document = self.answer(path, posted)
                    body = json.dumps(document).encode()
                    writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def ask_base(server: Server, folder: Path, *, has_plugin: bool = False) -> list[str]:
    """By which names the base was asked for, with a gateway that starts now."""
    spec = base(folder / "base") if not (folder / "base").exists() else read_base(folder / "base")

    async def main() -> None:
        async with server.running() as url:
            engine = Vllm(Client(url), None, base=spec, folder=folder / "zeros", slots=4, has_plugin=has_plugin)
            try:
                await engine.start()
                await engine.request("/v1/completions", {"prompt": "x"}, ())
            finally:
                await engine.close()

    asyncio.run(main())
    return server.requested_models


async def at_once() -> bool:
    return True


def test_a_version_is_loaded_once_under_its_own_name_and_never_in_place(tmp_path: Path) -> None:
    """In place, vLLM up to 0.32 would read the folder again at every step; by a name twice, it would end."""
    server, spec = Server("0.33.0"), base(tmp_path / "base")
    served = [PreparedVersion("team/sql:v1", "team/sql", f"sha256:{digit * 64}", "vllm", tmp_path / digit, 4) for digit in "ab"]

    async def main() -> None:
        async with server.running() as url:
            engine = Vllm(Client(url), None, base=spec, folder=tmp_path, slots=4)
            await engine.start()
            for version in served * 2:
                await engine.ensure(version)
                await engine.request("/v1/completions", {"prompt": "x"}, ((version, 1.0),))
                await engine.forget(version)
            await engine.close()

    asyncio.run(main())
    assert server.loads == [{"lora_name": version.model, "lora_path": str(version.path)} for version in served]
    assert server.requested_models == [version.model for version in served * 2]


def test_what_it_forgot_when_it_was_started_again_is_loaded_once_more(tmp_path: Path) -> None:
    server, spec = Server("0.32.0"), base(tmp_path / "base")
    served = PreparedVersion("team/sql:v1", "team/sql", f"sha256:{'a' * 64}", "vllm", tmp_path, 4)

    async def main() -> list[int]:
        async with server.running() as url:
            engine = Vllm(Client(url), None, base=spec, folder=tmp_path / "zeros", slots=4)
            await engine.start()
            await engine.ensure(served)
            statuses = []
            for blend in (((served, 1.0),), ()):
                server.loaded_adapters.clear()
                answer = await engine.request("/v1/completions", {"prompt": "x"}, blend)
                statuses.append(answer.status)
                await answer.close()
            await engine.close()
            return statuses

    assert asyncio.run(main()) == [200, 200]
    assert server.requested_models == [served.model, *server.loaded_adapters]


def test_a_request_that_was_refused_before_another_one_loaded_its_version_again_is_sent_again(tmp_path: Path) -> None:
    server, spec = Server("0.32.0"), base(tmp_path / "base")
    served = PreparedVersion("team/sql:v1", "team/sql", f"sha256:{'a' * 64}", "vllm", tmp_path, 4)
    body = {"prompt": "x"}

    async def main() -> None:
        async with server.running() as url:
            engine = Vllm(Client(url), None, base=spec, folder=tmp_path / "zeros", slots=4)
            await engine.start()
            await engine.ensure(served)
            server.loaded_adapters.clear()
            statuses = []

            async def ask_slowly() -> EngineAnswer:
                answer = await engine.client.request("/v1/completions", body, served.model)
                statuses.append(answer.status)
                if answer.status == 404:
                    first = await engine.request("/v1/completions", body, ((served, 1.0),))
                    statuses.append(first.status)
                    await first.close()
                return answer

            answer = await engine.request_loaded(ask_slowly, served.model, served.path)
            await answer.close()
            await engine.close()
            assert (answer.status, statuses) == (200, [404, 200, 200])

    asyncio.run(main())


def test_a_request_that_it_refuses_is_not_a_version_that_it_forgot(tmp_path: Path) -> None:
    class Picky(Server):
        def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, object]:
            return (400, {}) if body.get("prompt") == "x" else super().answer(path, body)

    server, spec = Picky("0.33.0"), base(tmp_path / "base")
    served = PreparedVersion("team/sql:v1", "team/sql", f"sha256:{'a' * 64}", "vllm", tmp_path, 4)

    async def main() -> int:
        async with server.running() as url:
            engine = Vllm(Client(url), None, base=spec, folder=tmp_path, slots=4)
            await engine.start()
            await engine.ensure(served)
            answer = await engine.request("/v1/completions", {"prompt": "x"}, ((served, 1.0),))
            await answer.close()
            await engine.close()
            return answer.status

    assert asyncio.run(main()) == 400
    assert len(server.loads) == 1


def started(server: Server, spec: BaseSpec, folder: Path) -> int:
    """The tokens of a conversation that an engine reports once it has started on a server."""

    async def main() -> int:
        async with server.running() as url:
            engine = Vllm(Client(url), None, base=spec, folder=folder, slots=4)
            try:
                await engine.start()
                return engine.context
            finally:
                await engine.close()

    return asyncio.run(main())


def test_a_server_with_another_base_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    spec, server = base(tmp_path / "base"), Server("0.33.0")
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    server.root = str(tmp_path / "copy")
    assert started(server, spec, tmp_path) == 512  # a copy at another path
    shutil.copytree(tmp_path / "base", tmp_path / "instruct")
    (tmp_path / "instruct/tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    server.root = str(tmp_path / "instruct")
    with pytest.raises(RefusedError, match="has the base .*instruct, and this one is .*base") as refused:
        started(server, spec, tmp_path)
    assert refused.value.code == "engine-base"
    server.root = "team/Base-Instruct"
    with pytest.raises(RefusedError, match="has the base team/Base-Instruct, and this one is team/base"):
        started(server, dataclasses.replace(spec, repo="team/base"), tmp_path)
    assert started(server, dataclasses.replace(spec, repo="Team/base-instruct"), tmp_path) == 512


def test_a_server_that_comes_back_with_other_weights_answers_nobody(tmp_path: Path) -> None:
    spec, server = base(tmp_path / "base"), Server("0.33.0")

    async def main() -> None:
        async with server.running() as url:
            engine = Vllm(Client(url), None, base=spec, folder=tmp_path, slots=4)
            await engine.start()
            for probabilities in ({"lot": -0.6, "time": -1.45, "man": -2.0}, {"lot": -0.6, "time": -2.5, "man": -2.0}):
                await engine.client.close()  # as a restart does
                server.probabilities = probabilities
                answer = await engine.request("/v1/completions", {"prompt": "x"}, ())
                await answer.close()

    with pytest.raises(EngineDownError, match="answers with other weights than before; restart the gateway if it should"):
        asyncio.run(main())
    assert server.requested_models == ["base"]


@pytest.mark.parametrize("has_plugin", [False, True])
def test_before_0_33_the_base_is_asked_for_by_zeros_that_stay_for_gateways_to_come(tmp_path: Path, has_plugin: bool) -> None:
    server = Server("0.32.0")
    for _ in range(2):
        names = ask_base(server, tmp_path, has_plugin=has_plugin)
    assert len(names) == 2
    assert {*names} == server.loaded_adapters.keys()
    [(name, root)] = server.loaded_adapters.items()
    assert name.startswith("adapterhub-zero-")
    [(target, delta)] = ah.load(root).deltas.items()
    assert isinstance(delta, LowRank)
    assert not np.concatenate([delta.lora_A.ravel(), delta.lora_B.ravel()]).any()
    assert delta.shape == read_base(tmp_path / "base").tensors[f"{target}.weight"].shape


def test_after_a_new_start_the_zeros_are_loaded_again_though_the_cache_was_emptied(tmp_path: Path) -> None:
    server, spec = Server("0.32.0"), base(tmp_path / "base")

    async def main() -> None:
        async with server.running() as url:
            process = Process([sys.executable, "-c", "import time; time.sleep(600)"], {}, at_once)
            engine = Vllm(Client(url), process, base=spec, folder=tmp_path / "zeros", slots=4)
            await engine.start()
            shutil.rmtree(tmp_path / "zeros")
            server.loaded_adapters.clear()
            process.before_start()
            await engine.request("/v1/completions", {"prompt": "x"}, ())
            await engine.close()

    asyncio.run(main())
    assert server.requested_models == [*server.loaded_adapters]
    assert [Path(root).is_dir() for root in server.loaded_adapters.values()] == [True]


def cache_config(block_size: int, *, by_user: bool = False) -> str:
    """The lines of vLLM's metrics about its cache."""
    labels = f'block_size="{block_size}",cache_dtype="auto",engine="0",user_specified_block_size="{by_user}"'
    return f"# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{{{labels}}} 1.0\n"


@pytest.mark.parametrize(
    ("version", "metrics", "mixes"),
    [
        ("0.32.0+cpu", "", True),
        ("0.32.1.dev3+gabc123.cpu", cache_config(16), True),
        ("0.32.0+cu129", "", False),
        ("0.32.1.dev3+gabc123.rocm721", "", False),
        ("0.32.0", cache_config(16), False),
        ("0.32.0", cache_config(128), True),
        ("0.32.0", cache_config(16, by_user=True), True),
        ("0.32.0", "", True),
    ],
)
def test_the_zeros_are_only_for_builds_that_may_be_for_cpus(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: str, metrics: str, mixes: bool
) -> None:
    server = Server(version)
    server.metrics = metrics
    [name] = ask_base(server, tmp_path)
    assert name.startswith("adapterhub-zero-" if mixes else "base")
    is_unsure = mixes and "cpu" not in version
    assert ("does not say whether it computes on a CPU" in caplog.text) == is_unsure


@pytest.mark.parametrize("version", ["0.33.0", "0.40.1.dev3", "unknown"])
def test_later_ones_are_asked_for_the_base_itself(tmp_path: Path, version: str) -> None:
    assert ask_base(Server(version, sees=False), tmp_path) == ["base"]


@pytest.mark.parametrize("has_plugin", [False, True])
def test_one_before_0_33_that_does_not_see_the_zeros_is_refused(tmp_path: Path, has_plugin: bool) -> None:
    server = Server("0.32.0", sees=False)
    zeros = r"the adapter of zeros that prevents it cannot be loaded: .*No adapter found.* Use vLLM 0\.33 or later, or one that"
    says = rf"is older than 0\.33, which answers for the base with adapters of the same batch; {zeros}"
    with pytest.raises(RefusedError, match=says):
        ask_base(server, tmp_path, has_plugin=has_plugin)
    assert server.requested_models == []


class Full(Server):
    """One that loads no adapter of this rank, as vLLM 0.32 refuses it."""

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, object]:
        problem = "LoRA rank 4 is greater than max_lora_rank 2."
        return (400, {"error": {"message": problem}}) if path == "/v1/load_lora_adapter" else super().answer(path, body)


def test_what_it_does_not_load_is_refused_with_its_reason(tmp_path: Path) -> None:
    spec, digest = base(tmp_path / "base"), f"sha256:{'a' * 64}"

    async def main() -> None:
        async with Full("0.33.0").running() as url:
            engine = Vllm(Client(url), None, base=spec, folder=tmp_path, slots=4)
            await engine.start()
            try:
                await engine.ensure(PreparedVersion("team/sql:v1", "team/sql", digest, "vllm", tmp_path, 4))
            finally:
                await engine.close()

    with pytest.raises(RefusedError) as refused:
        asyncio.run(main())
    assert refused.value.what == "vLLM cannot load it (LoRA rank 4 is greater than max_lora_rank 2.)"
    assert (refused.value.code, refused.value.hint) == ("rank-above-max", "Start vLLM with --max-lora-rank 8")


@pytest.mark.parametrize(
    ("rank", "hint"),
    [(65, "Start vLLM with --max-lora-rank 128"), (600, "Lower its rank; vLLM takes 512 at most")],
)
def test_a_rank_above_its_maximum_is_refused_before_it_is_loaded(tmp_path: Path, rank: int, hint: str) -> None:
    spec, server = base(tmp_path / "base"), Server("0.33.0")
    served = PreparedVersion("team/sql:v1", "team/sql", f"sha256:{'a' * 64}", "vllm", tmp_path, rank)

    async def main() -> None:
        async with server.running() as url:
            engine = Vllm(Client(url), None, base=spec, folder=tmp_path, slots=4, max_rank=64)
            await engine.start()
            try:
                await engine.ensure(served)
            finally:
                await engine.close()

    with pytest.raises(RefusedError, match=f"team/sql:v1: has rank {rank}, and vLLM was started for 64. {hint}") as refused:
        asyncio.run(main())
    assert refused.value.code == "rank-above-max"
    assert not server.loads


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--scheduling-policy", "priority"], True),
        (["--enforce-eager", "--scheduling_policy=priority"], True),
        (["--scheduling-policy", "fcfs", "--x", "priority"], False),
        ([], False),
    ],
)
def test_it_has_priorities_if_it_was_started_with_them(words: list[str], expected: bool) -> None:
    assert command_lines.vllm_has_priorities(words) == expected


def test_the_maximum_rank_is_not_known_where_words_of_the_user_may_change_it() -> None:
    assert command_lines.vllm_max_rank(65) == 128
    assert command_lines.vllm_max_rank(65, ["--enforce-eager"]) == 128
    for words in (["--max-lora-rank", "256"], ["--max_lora_rank=256"], ["--config", "vllm.yaml"]):
        assert command_lines.vllm_max_rank(65, words) == 0


class Fixed(Server):
    """One that was started without the path that loads adapters."""

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, object]:
        return (404, {"detail": "Not Found"}) if path == "/v1/load_lora_adapter" else super().answer(path, body)


def test_one_that_loads_no_adapters_is_told_how_to_be_started(tmp_path: Path) -> None:
    server, spec = Fixed("0.33.0"), base(tmp_path / "base")

    async def main() -> None:
        async with server.running() as url:
            engine = Vllm(Client(url), None, base=spec, folder=tmp_path, slots=4)
            await engine.start()
            try:
                await engine.ensure(PreparedVersion("team/sql:v1", "team/sql", f"sha256:{'a' * 64}", "vllm", tmp_path, 4))
            finally:
                await engine.close()

    with pytest.raises(RefusedError, match=r"http://\S+: does not load adapters while it runs") as refused:
        asyncio.run(main())
    assert refused.value.hint == "Start it with LoRA enabled, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
