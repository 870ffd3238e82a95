"""The versions of a running vLLM: which names are found, refused, remembered and held. tests/peers has vLLM itself."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import adapterhub as ah
from adapterhub.remotes import named_remotes
from adapterhub.serve import vllm_plugin, vllm_rank
from adapterhub.serve.model_names import AllowedNames
from adapterhub.serve.prepared_versions import PreparedVersion
from adapterhub.serve.resolving import served_folder
from adapterhub.serve.vllm_plugin import ServedVersions, Settings
from adapterhub_converters.errors import LocalIOError, NotFoundError, RefusedError, RemoteError
from tests.support import registry
from tests.support.folders import Shapes, adapter, base, pairs

Q: Shapes = pairs(2)


class Server:
    """What vLLM asks of the resolver, and what the operator is told."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.workspace = ah.Workspace(registry=folder / "registry", policy=None, cache=folder / "cache")
        self.log_lines: list[str] = []
        self.base = str(folder / "base")
        chosen = Settings(AllowedNames.from_patterns(["team/*"]), lambda: self.workspace)
        self.versions = ServedVersions(replace(chosen, **settings), lambda form, *values: self.log_lines.append(form % values))

    def find(self, *models: str) -> list[PreparedVersion | None]:
        """The versions of names that are asked for at once."""

        async def all_of_them() -> list[PreparedVersion | None]:
            return list(await asyncio.gather(*(self.versions.find(model, self.base) for model in models)))

        return asyncio.run(all_of_them())

    def push(self, name: str, **config: Any) -> str:
        """Push an adapter; its digest."""
        folder = Path(f"{name.replace('/', '-').replace(':', '-')}-{time.monotonic_ns()}")
        return str(ah.push(adapter(folder, Q, **config), name, workspace=self.workspace).digest)


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Server]:
    monkeypatch.chdir(tmp_path)
    base(tmp_path / "base")
    return lambda **settings: Server(tmp_path, **settings)


def test_every_name_of_a_version_leads_to_its_folder(start: Callable[..., Server]) -> None:
    server = start()
    first, second = server.push("team/sql"), server.push("team/sql", lora_alpha=8)
    paths = server.find(f"team/sql@{first}", "team/sql:v1", "sql:v1", f"sql@{second}", "team/sql:v2")
    assert [served and served.digest for served in paths] == [first, first, first, second, second]


def test_a_text_that_is_no_name_is_left_to_other_resolvers(start: Callable[..., Server]) -> None:
    server = start()
    assert server.find("GPT-4", "a,b", "", "x" * 5000, "../../etc/passwd", "team/sql:v1\n") == [None] * 6
    assert not Path("cache").exists()


@pytest.mark.parametrize(
    ("model", "code"),
    [
        ("team/sql", "moving-tag"),
        ("sql", "moving-tag"),
        ("team/sql:prod", "moving-tag"),
        ("team/sql:^1.2", "moving-tag"),
        ("team/sql@sha256:5f5f5f", "moving-tag"),
        ("other/sql:v1", "not-served"),
        ("team/sql:v1*0.5+team/sql:v2*0.5", "blend"),
        ("team/sql:v1*0.5", "blend"),
    ],
)
def test_what_has_no_fixed_meaning_or_is_forbidden_is_refused_before_anything_is_read(
    start: Callable[..., Server], model: str, code: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        start().find(model)
    assert caught.value.code == code
    if code == "moving-tag":
        assert caught.value.what == "may mean another version later, which vLLM would not notice"
        assert caught.value.hint == "Name a version, like team/sql:v3, or a digest"
    assert not Path("cache").exists()


def test_a_rank_above_the_maximum_of_vllm_is_refused_with_the_option_to_raise(
    start: Callable[..., Server], tmp_path: Path
) -> None:
    server = start()
    server.push("team/sql")
    server.versions.max_rank = 1
    with pytest.raises(
        RefusedError, match="has rank 2, and vLLM was started for 1. Start vLLM with --max-lora-rank 8"
    ) as caught:
        server.find("team/sql:v1")
    assert caught.value.code == "rank-above-max"
    [folder] = (tmp_path / "cache").glob("served/sha256-*/*")
    os.utime(folder, (1, 1))
    assert served_folder(server.workspace).sweep().folders == 1  # it is not held
    server.versions.max_rank = 0
    assert server.find("sql:v1") != [None]


def test_a_version_with_a_template_of_its_own_is_refused_unless_clients_send_it(
    start: Callable[..., Server],
) -> None:
    server = start()
    adapter(Path("own"), Q)
    Path("own/chat_template.jinja").write_text("{{ messages }}")
    ah.push("own", "team/own", workspace=server.workspace)
    with pytest.raises(RefusedError, match="vLLM asks all adapters as it asks the base. Serve it through a gateway") as refused:
        server.find("team/own:v1")
    assert refused.value.code == "own-chat-template"
    [served] = start(clients_render=True).find("team/own:v1")
    assert served is not None
    assert served.prompt.template == "{{ messages }}"


def test_the_maximum_rank_is_that_of_the_server_that_calls() -> None:
    class OpenAIServingModels:  # vLLM 0.32: entrypoints/openai/models/serving.py
        def __init__(self, lora: object) -> None:
            self.engine_client = SimpleNamespace(vllm_config=SimpleNamespace(lora_config=lora))

        async def resolve_lora(self) -> int:
            async def resolve() -> int:
                return vllm_rank.maximum_of_caller()

            return await resolve()

    assert asyncio.run(OpenAIServingModels(SimpleNamespace(max_lora_rank=32)).resolve_lora()) == 32
    assert asyncio.run(OpenAIServingModels(None).resolve_lora()) == 0


def test_a_pinned_tag_means_what_it_meant_first(start: Callable[..., Server]) -> None:
    server = start(pin=True)
    old, before = server.push("team/sql:prod"), server.find("team/sql:prod")
    server.push("team/sql:prod", lora_alpha=8)
    assert server.find("team/sql:prod") == before
    assert before[0] is not None
    assert before[0].digest == old
    assert start(pin=True).find("team/sql:prod") != before  # a process that starts now


def test_what_was_refused_is_remembered_for_a_while(start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = start()
    server.push("team/other")
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for _ in range(2):
        with pytest.raises(NotFoundError, match="no such adapter"):
            server.find("team/sql:v1")
    assert len(server.log_lines) == 1
    server.push("team/sql")
    with pytest.raises(NotFoundError):
        server.find("team/sql:v1")
    now = 111.0
    assert server.find("team/sql:v1") != [None]


def test_unknown_names_leave_no_more_than_a_bounded_memory(
    start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_plugin, "_MAX_REFUSALS", 8)
    server = start()
    server.push("team/sql")
    for number in range(1, 40):
        with pytest.raises(NotFoundError):
            server.find(f"team/none{number}:v1")
    assert (len(server.versions._refusals), len(server.versions._work), len(server.versions._served)) == (8, 0, 0)
    monkeypatch.setattr(vllm_plugin, "_MAX_NAMES", 1)
    server.find("team/sql:v1")
    with pytest.raises(RefusedError, match="1 other names were asked for"):
        server.find("sql:v1")
    assert server.find("team/sql:v1") != [None]


def test_a_request_does_not_wait_for_ever_and_the_next_one_joins_the_work(start: Callable[..., Server]) -> None:
    go = threading.Event()
    requests = []

    def slow(ref: str) -> str:
        requests.append(ref)
        go.wait(10)
        return ref

    server = start(address=slow, patience=0.05)
    digest = server.push("team/sql")
    for _ in range(2):
        with pytest.raises(RemoteError, match="not ready after 0 s. Ask again"):
            server.find("team/sql:v1")
    go.set()
    server.versions.settings = replace(server.versions.settings, patience=60)
    (served,) = server.find("team/sql:v1")
    assert served is not None
    assert (served.digest, requests) == (digest, ["team/sql:v1"])


def test_what_was_served_is_held_until_the_process_ends(start: Callable[..., Server]) -> None:
    server = start()
    server.push("team/sql")
    server.find("team/sql:v1")
    folder = served_folder(server.workspace)
    assert folder.sweep(unused=-1).in_use == 1
    del server
    assert folder.sweep(unused=-1).folders in (0, 1)  # once its lease is closed, which ends with the process at the latest


def test_versions_of_a_remote_are_pulled_once(start: Callable[..., Server], host: str) -> None:
    requests = []

    def address(ref: str) -> str:
        requests.append(ref)
        return f"oci://{host}/{ref}"

    server = start(address=address)
    digest = server.push("team/sql")
    ah.push("team/sql", f"oci://{host}/team/sql:v1", workspace=server.workspace)
    for _ in range(2):
        (served,) = server.find("team/sql:v1")
        assert served is not None
        assert served.model == f"team/sql@{digest}"
    assert requests == ["team/sql:v1"]
    with pytest.raises(NotFoundError, match="v9"):
        server.find("team/sql:v9")


def test_a_digest_is_served_under_those_names_alone_that_the_remote_has_for_it(
    start: Callable[..., Server], quick: None, tmp_path: Path
) -> None:
    with registry.running(tmp_path) as host:
        address_of = {"address": f"oci://{host}/{{}}".format}
        server = start(**address_of)
        digest = server.push("team/secret")
        ah.push("team/secret", f"oci://{host}/team/secret:v1", workspace=server.workspace)
        assert server.find(f"team/secret@{digest}") != [None]
        with pytest.raises(NotFoundError):
            server.find(f"team/open@{digest}")
    # It was asked once: the answer counts while the remote is away, also after a restart.
    assert start(**address_of).find(f"team/secret@{digest}") != [None]
    for model in (f"team/open@{digest}", "team/secret:v1"):
        with pytest.raises(RemoteError):
            start(**address_of).find(model)


def test_so_it_is_from_an_image_layout_where_digests_have_no_names(start: Callable[..., Server], tmp_path: Path) -> None:
    url = f"layout://{tmp_path}/layout"
    server = start(address=partial(named_remotes.address_below, url))
    digest = server.push("team/secret")
    ah.push("team/secret", f"{url}:team/secret:v1", workspace=server.workspace)
    assert server.find(f"team/secret@{digest}") != [None]
    with pytest.raises(NotFoundError):
        server.find(f"team/open@{digest}")


def test_a_misfit_is_refused_by_the_name_of_its_module(start: Callable[..., Server]) -> None:
    server = start()
    folder = adapter(Path("misfit"), {**Q, **pairs(1, module="model.layers.{}.other.x_proj")})
    ah.push(folder, "team/misfit", workspace=server.workspace)
    with pytest.raises(RefusedError, match=r"team/misfit:v1: vllm: refused: .*model\.layers\.0\.other\.x_proj") as caught:
        server.find("team/misfit:v1")
    assert caught.value.code == "runtime"
    assert server.log_lines == [f"'team/misfit:v1' is not served: {str(caught.value)!a}"]


def test_without_the_base_nothing_is_served(start: Callable[..., Server], tmp_path: Path) -> None:
    server = start()
    server.push("team/sql")
    server.base = "org/model-that-is-nowhere"
    with pytest.raises(LocalIOError, match="the base model cannot be read, so no adapter fits it"):
        server.find("team/sql:v1")
    named = start(base=str(tmp_path / "base"))
    named.base = server.base
    assert named.find("team/sql:v1") != [None]


def test_a_registry_that_is_gone_is_no_answer_about_its_adapters(start: Callable[..., Server]) -> None:
    server = start()
    server.push("team/sql")
    served = server.find("team/sql:v1")
    Path("registry").rename("elsewhere")
    with pytest.raises(LocalIOError, match="no registry there"):
        server.find("team/sql:v2")
    assert server.find("team/sql:v1") == served
