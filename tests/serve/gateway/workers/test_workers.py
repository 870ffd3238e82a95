"""A gateway of three workers in front of the real llama-server: killed workers, and limits that are those of one gateway."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from adapterhub.ref import Ref
from adapterhub.registry.registry import Registry
from adapterhub.registry.releases import rollouts
from tests.conftest import Run
from tests.support import llama_server, serving
from tests.support.serving import COUNT, Gateway, Models, Reply

pytestmark = pytest.mark.peer
P = "the quick brown fox "
PROMPT_TOKENS = len(P)
WORKERS = 3


def running(models: Models, registry: Path, folder: Path, *options: object) -> Any:
    options = ("--program", llama_server.program(), "--workers", WORKERS, *options)
    return serving.gateway(models.gguf, registry, folder / "gateway", *options)


@pytest.fixture(scope="module")
def gateway(models: Models, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with running(models, registry, tmp_path_factory.mktemp("workers")) as running_gateway:
        yield running_gateway


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(gateway: Gateway) -> list[int]:
    """The workers, which are the children of one child of the gateway."""
    for pid in gateway.children():
        if (
            b"adapterhub" in Path(f"/proc/{pid}/cmdline").read_bytes()
            and b"llama" not in os.readlink(f"/proc/{pid}/exe").encode()
        ):
            return children(pid)
    return []


def ports(pid: int, port: int) -> set[int]:
    """The ports of the clients that a process is connected to."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            inodes.add(os.readlink(entry))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    local = f":{port:04X}"
    return {int(row[2].partition(":")[2], 16) for row in rows if row[1].endswith(local) and f"socket:[{row[9]}]" in inodes}


class Stream:
    """A streamed answer on a connection of its own, of which the first bytes have been read."""

    def __init__(self, gateway: Gateway, model: str, count: int) -> None:
        parts = urlsplit(gateway.url)
        self.connection = http.client.HTTPConnection(str(parts.hostname), parts.port)
        request_body = {"model": model, "prompt": P, "max_tokens": count, "temperature": 0, "stream": True}
        request_body |= {"logit_bias": serving.BIAS}
        headers = {"content-type": "application/json", **gateway.headers}
        self.connection.request("POST", "/v1/completions", json.dumps(request_body), headers)
        self.port = self.connection.sock.getsockname()[1]
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        self.first = self.answer.read(10)

    def read_rest(self) -> str | None:
        """The text of the whole answer; None if it was cut off."""
        try:
            raw = self.first + self.answer.read()
        except (http.client.HTTPException, OSError):
            return None
        finally:
            self.connection.close()
        lines = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
        if lines[-1] != "[DONE]":
            return None
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])


def metric(gateway: Gateway, name: str) -> float:
    page = gateway.get("/metrics").body.decode()
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith((f"{name} ", f"{name}{{")))


def test_answers_are_those_of_one_process(gateway: Gateway, models: Models) -> None:
    names = {"base": None, "team/a0": 0, "team/a1:prod": 1}

    def ask(name: str) -> Reply:
        return gateway.complete(name, P)

    with ThreadPoolExecutor(6) as pool:
        for name, reply in zip([*names] * 6, pool.map(ask, [*names] * 6), strict=True):
            assert reply.text == models.answer(P, names[name])
            assert reply.version.startswith("base" if name == "base" else f"{name.partition(':')[0]}@sha256:")
    assert gateway.complete("team/none", P).status == 404
    assert gateway.get("/v1/models/team/a0").version == gateway.complete("team/a0", P).version
    assert [gateway.get(path).status for path in ("/", "/health", "/v1/models", "/api/tags", "/nothing")] == [200] * 4 + [404]


def test_a_killed_worker_takes_its_own_streams_only(gateway: Gateway, models: Models) -> None:
    count, before = 300, workers(gateway)
    assert len(before) == WORKERS
    expected = models.answer(P, 0)  # far on, rounding decides
    port = int(str(urlsplit(gateway.url).port))
    streams = [Stream(gateway, "team/a0", count) for _ in range(6)]
    by_worker = {pid: ports(pid, port) for pid in before}
    victim = max(by_worker, key=lambda pid: len(by_worker[pid] & {stream.port for stream in streams}))
    lost = by_worker[victim]
    os.kill(victim, signal.SIGKILL)
    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(Stream.read_rest, streams))
    for stream, text in zip(streams, texts, strict=True):
        # A stream may have been over before its worker was killed.
        assert text.startswith(expected) if text is not None else stream.port in lost
    while gateway.get("/ready").document["workers"] != {"running": WORKERS, "of": WORKERS}:
        time.sleep(0.05)
    after = workers(gateway)
    assert victim not in after
    assert set(before) - {victim} < set(after)
    # What the killed worker was answering runs no longer, and keeps no version.
    while metric(gateway, "adapterhub_requests_running"):
        time.sleep(0.05)
    assert gateway.complete("team/a0", P).text == models.answer(P, 0)


def test_metrics_are_of_all_workers(gateway: Gateway) -> None:
    before, tokens = metric(gateway, "adapterhub_requests_total"), metric(gateway, "adapterhub_tokens_total")
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: gateway.complete("team/a1", P), range(24)))
    assert [reply.status for reply in replies] == [200] * 24
    while metric(gateway, "adapterhub_requests_total") != before + 24:
        time.sleep(0.02)
    # Cached ones count by themselves too.
    assert metric(gateway, "adapterhub_tokens_total") - tokens >= 24 * (PROMPT_TOKENS + COUNT)


# ---- limits


KEYS = {name: f"ah-key-of-{name}" for name in ("few", "two", "day", "window", "all")}


def key_tables(**limits: str) -> str:
    tables = [(name, hashlib.sha256(KEYS[name].encode()).hexdigest(), limit) for name, limit in limits.items()]
    return "".join(f'[keys.{name}]\nsha256 = "{sha}"\n{limit}\n' for name, sha, limit in tables)


def ask_as(gateway: Gateway, key: str, **fields: Any) -> Reply:
    return gateway.complete("team/a0", P, headers={"authorization": f"Bearer {KEYS[key]}"}, **fields)


@pytest.fixture(scope="module")
def limited(models: Models, registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("limited")
    answer = PROMPT_TOKENS + COUNT
    limits = {
        "few": 'requests = "20/3600"',
        "two": "running = 2",
        "day": f"tokens_per_day = {4 * answer + 1}",
        "window": f'tokens = "{4 * answer + 1}/3600"',
        "all": "",
    }
    (folder / "routes.toml").write_text(key_tables(**limits))
    options = ("--route", folder / "routes.toml", "--usage-file", folder / "usage.db", "--poll", 0.2)
    with running(models, registry, folder, *options) as running_gateway:
        yield running_gateway


def test_a_limit_of_requests_is_that_of_one_gateway(limited: Gateway) -> None:
    with ThreadPoolExecutor(12) as pool:
        statuses = Counter(pool.map(lambda _: ask_as(limited, "few", count=1).status, range(60)))
    assert statuses == {200: 20, 429: 40}


def test_a_limit_of_requests_at_once_is_that_of_one_gateway(limited: Gateway) -> None:
    limited.headers["authorization"] = f"Bearer {KEYS['two']}"
    streams = [Stream(limited, "team/a0", 1000) for _ in range(2)]
    del limited.headers["authorization"]
    assert [ask_as(limited, "two").status for _ in range(6)] == [429] * 6
    for stream in streams:
        stream.connection.close()
    while ask_as(limited, "two").status == 429:
        time.sleep(0.05)


@pytest.mark.parametrize("key", ["day", "window"])
def test_a_budget_of_tokens_is_used_up_exactly(limited: Gateway, key: str) -> None:
    """Each answer has as many tokens, and comes from any worker; what one has answered, all others count at once."""
    statuses = [ask_as(limited, key, stream=number % 2 == 0).status for number in range(12)]
    # The limit is that of four answers and a token, so that the fifth one begins, and no other.
    assert statuses == [200] * 5 + [429] * 7


def test_the_record_has_every_token_of_every_worker(run: Run, limited: Gateway) -> None:
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: ask_as(limited, "all"), range(18)))
    assert [reply.status for reply in replies] == [200] * 18
    file = limited.log.parent.parent / "usage.db"

    def recorded() -> dict[str, Any]:
        rows = json.loads(run("usage", "--usage-file", file, "--by", "key", "--json").stdout)["rows"]
        return next((row for row in rows if row["key"] == "all"), {})

    while recorded().get("requests") != 18:
        time.sleep(0.2)
    assert (recorded()["answer_tokens"], recorded()["estimated"]) == (18 * COUNT, 0)


def test_a_changed_route_file_reaches_all_workers(limited: Gateway) -> None:
    file = limited.log.parent.parent / "routes.toml"
    text = file.read_text()
    file.write_text(text + '[routes.legal]\nto = "team/a2:prod"\n')
    limited.reload()
    headers = {"authorization": f"Bearer {KEYS['all']}"}
    replies = [limited.complete("legal", P, count=1, headers=headers) for _ in range(9)]
    assert {reply.version.partition("@")[0] for reply in replies} == {"team/a2"}


ROLLOUT = """
[routes.legal]
to = "team/a0:prod"
candidate = "team/a1:prod"
steps = [{ share = 50, for = "10m" }, 100]
bounds = { feedback = 60 }
false_rollback = 0.2
"""


def test_feedback_at_any_worker_rolls_a_candidate_back_at_all(models: Models, tmp_path: Path) -> None:
    serving.registry(tmp_path / "registry", models, 2).close()
    (tmp_path / "routes.toml").write_text(ROLLOUT)
    options = ("--route", tmp_path / "routes.toml", "--usage-file", tmp_path / "usage.db", "--poll", 0.1)
    with running(models, tmp_path / "registry", tmp_path, *options) as gateway:
        answers = 0
        while (document := gateway.get("/v1/rollouts").document["data"][0])["state"] != "rolled back":
            assert answers < 400, document
            reply = gateway.complete("legal", P, count=1)
            feedback = {"id": reply.document["id"], "score": int(reply.version.startswith("team/a0@"))}
            assert gateway.post("/v1/feedback", feedback).status == 200
            answers += 1
        time.sleep(1)  # until every worker has looked at the log
        versions = {gateway.complete("legal", P, count=1).version.partition("@")[0] for _ in range(12)}
        assert versions == {"team/a0"}
    with Registry.open(tmp_path / "registry") as registry:
        row = registry.row(Ref("team/a1"))
        logged = rollouts.state_of(registry.index, Ref(row.name, digest=row.digest), "legal")
    assert logged is not None
    assert logged.reason.startswith("feedback: answers are found bad more often: in ")


# ---- start and end


def test_all_workers_finish_their_answers_when_it_ends(models: Models, registry: Path, tmp_path: Path) -> None:
    with running(models, registry, tmp_path) as gateway:
        streams = [Stream(gateway, "team/a0", 300) for _ in range(5)]
        pids = [*workers(gateway), *gateway.children()]
        gateway.process.send_signal(signal.SIGTERM)
        with ThreadPoolExecutor(5) as pool:
            texts = list(pool.map(Stream.read_rest, streams))
        assert all(text is not None and text.startswith(models.answer(P, 0)) for text in texts)
        assert gateway.process.wait(60) == 143
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_nothing_is_left_of_a_gateway_that_was_killed(models: Models, registry: Path, tmp_path: Path) -> None:
    """Of its folder for temporary files, the next gateway leaves nothing."""
    options = ("--program", llama_server.program(), "--workers", WORKERS)
    with tempfile.TemporaryDirectory() as temporary:  # the path of a socket has at most 107 bytes
        for _ in range(2):
            environ = {"TMPDIR": temporary}
            with serving.gateway(models.gguf, registry, tmp_path / "gateway", *options, env=environ) as gateway:
                assert len(list(Path(temporary).glob(".adapterhub-host.*"))) == 1
                pids = [*workers(gateway), *gateway.children()]
                gateway.process.kill()
                gateway.process.wait(60)
                while any(Path(f"/proc/{pid}").exists() for pid in pids):
                    time.sleep(0.05)


def test_an_engine_that_cannot_start_is_told_once(run: Run, models: Models, registry: Path, tmp_path: Path) -> None:
    words = ("serve", models.gguf, "--registry", registry, "--program", llama_server.program(), "--port", 0, "--workers", 2)
    result = run(*words, "--", "--no-such-option", code=6)
    assert result.stderr.count("[refused]") == 1
    assert "before it was ready" in result.stderr


# ---- other engines


def test_workers_ask_an_engine_in_the_host_through_it(models: Models, registry: Path, tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text(key_tables(all="", window=f'tokens = "{2 * (PROMPT_TOKENS + COUNT) + 1}/3600"'))
    options = ("--engine", "torch", "--workers", 2, "--route", tmp_path / "routes.toml")
    with serving.gateway(models.base, registry, tmp_path / "gateway", *options) as gateway:
        assert [ask_as(gateway, "window", stream=number % 2 == 0).status for number in range(6)] == [200] * 3 + [429] * 3
        gateway.headers["authorization"] = f"Bearer {KEYS['all']}"
        for name, number in (("base", None), ("team/a0", 0), ("team/a1", 1)):
            assert gateway.complete(name, P).text == models.answer(P, number)
            assert Stream(gateway, name, COUNT).read_rest() == models.answer(P, number)
        assert gateway.complete("team/a0", P, no_such_field=1).status == 400
        stream = Stream(gateway, "team/a0", 1500)
        stream.connection.close()
        while metric(gateway, "adapterhub_requests_running"):
            time.sleep(0.02)


def test_a_kill_while_many_ask_costs_only_what_ran(gateway: Gateway, models: Models) -> None:
    """A client that asks again after a broken connection gets the right answer."""
    expected, broken, answers = models.answer(P, 0), Counter[str](), Counter[str]()
    until = time.monotonic() + 3

    def ask(_: int) -> None:
        while time.monotonic() < until:
            try:
                reply = gateway.complete("team/a0", P)
            except (OSError, http.client.HTTPException):
                broken["connections"] += 1
            else:
                answers["right" if reply.status == 200 and reply.text == expected else f"{reply.status} {reply.body!r}"] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        time.sleep(0.7)
        os.kill(workers(gateway)[0], signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert set(answers) == {"right"}
    assert broken["connections"] <= 2 * 6
