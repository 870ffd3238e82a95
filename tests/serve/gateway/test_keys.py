"""Routes and keys of a running gateway: who may ask for what, how much, and from when on."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import llama_server, serving
from tests.support.serving import COUNT, Gateway, Models, Reply

pytestmark = pytest.mark.peer
P = "the quick brown fox "
KEYS = {name: f"ah-key-of-{name}" for name in ("all", "legal", "few", "slow", "none", "brief", "stream")}


def routes(**shares: int) -> str:
    to = ", ".join(f'"team/{name}:prod" = {share}' for name, share in (shares or {"a0": 1}).items())
    sha = {name: hashlib.sha256(key.encode()).hexdigest() for name, key in KEYS.items()}
    return f"""
        [routes.legal]
        to = {{ {to} }}
        [[routes.legal.when]]
        header = "x-stage: beta"
        to = "team/a3:prod"

        [keys.all]
        sha256 = "{sha["all"]}"
        [keys.legal]
        sha256 = "{sha["legal"]}"
        adapters = ["legal", "team/a1"]
        [keys.none]
        sha256 = "{sha["none"]}"
        adapters = ["team/nothing"]
        [keys.few]
        sha256 = "{sha["few"]}"
        requests = "3/3600"
        [keys.slow]
        sha256 = "{sha["slow"]}"
        running = 1
        [keys.brief]
        sha256 = "{sha["brief"]}"
        tokens = "{COUNT + 1}/3600"
        [keys.stream]
        sha256 = "{sha["stream"]}"
        tokens = "{COUNT + 1}/3600"
    """


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("routes") / "routes.toml"


@pytest.fixture(scope="module")
def gateway(models: Models, registry: Path, file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    file.write_text(routes())
    options = ("--program", llama_server.program(), "--route", file)
    with serving.gateway(models.gguf, registry, tmp_path_factory.mktemp("gateway"), *options) as running_gateway:
        yield running_gateway


def by(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[name]}"}


def rewrite_routes(gateway: Gateway, file: Path, text: str, line: str) -> None:
    """Have the gateway read another file, and wait for the line of its log."""
    file.write_text(text)
    before = gateway.log.read_text().count(line)
    gateway.reload()
    while gateway.log.read_text().count(line) == before:
        time.sleep(0.02)


def test_nobody_is_answered_without_a_key(gateway: Gateway) -> None:
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {KEYS['all']}"},
        {"authorization": "Bearer "},
    ):
        reply = gateway.complete("base", P, headers=headers)
        assert (reply.status, reply.document["error"]["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert gateway.get("/v1/models", **headers).status == 401
        assert gateway.get("/metrics", **headers).status == 401
    assert gateway.get("/health").status == gateway.get("/ready").status == 200


def test_a_key_may_ask_for_what_it_has(gateway: Gateway, models: Models) -> None:
    for name, status in {"legal": 200, "team/a1": 200, "team/a0": 404, "base": 404, "team/none": 404}.items():
        assert gateway.complete(name, P, headers=by("legal")).status == status
    assert gateway.complete("team/a0", P, headers=by("all")).text == models.answer(P, 0)
    listed = {model["id"] for model in gateway.get("/v1/models", **by("legal")).document["data"]}
    assert listed == {"legal", "team/a1", "team/a1:prod"}
    assert gateway.get("/metrics", **by("legal")).status == 404
    assert gateway.get("/metrics", **by("all")).status == 200


@pytest.mark.parametrize(
    ("existing", "missing"), [("legal", "legum"), ("base", "basf"), ("team/a0", "team/zz"), ("a/b:x", "a/c:x")]
)
def test_a_key_cannot_find_out_what_others_may_ask_for(gateway: Gateway, existing: str, missing: str) -> None:
    answers = [
        reply.body.replace(name.encode(), b"NAME")
        for name in (existing, missing)
        for reply in (gateway.complete(name, P, headers=by("none")), gateway.get(f"/v1/models/{name}", **by("none")))
    ]
    assert answers[:2] == answers[2:]


def test_a_header_chooses(gateway: Gateway, models: Models) -> None:
    assert gateway.complete("legal", P, headers=by("all")).text == models.answer(P, 0)
    beta = gateway.complete("legal", P, headers={**by("all"), "X-Stage": "beta"})
    assert beta.text == models.answer(P, 3)
    assert beta.version.startswith("team/a3@sha256:")


def test_one_request_too_many(gateway: Gateway) -> None:
    replies = [gateway.complete("legal", P, headers=by("few")), gateway.get("/v1/models", **by("few"))]  # lists count, too
    replies += [gateway.complete("legal", P, headers=by("few")) for _ in range(2)]
    assert [reply.status for reply in replies] == [200, 200, 200, 429]
    assert 0 < int(replies[-1].headers["retry-after"]) <= 3600
    error = replies[-1].document["error"]
    assert (error["code"], error["message"]) == ("rate_limit_exceeded", "More than 3 requests in 3,600 seconds")


def test_one_request_too_many_at_once(gateway: Gateway) -> None:
    replies: list[Reply] = []

    def ask() -> None:
        replies.append(gateway.complete("legal", P, count=300, headers=by("slow")))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {reply.status for reply in replies} == {200, 429}, [reply.body for reply in replies]
    assert gateway.complete("legal", P, headers=by("slow")).status == 200


@pytest.mark.parametrize(("key", "stream"), [("brief", False), ("stream", True)])
def test_more_tokens_than_a_key_has(gateway: Gateway, key: str, stream: bool) -> None:
    replies = [gateway.complete("base", "x", headers=by(key), stream=stream) for _ in range(2)]
    assert [reply.status for reply in replies] == [200, 429]  # of the prompt, a token
    assert 0 < int(replies[1].headers["retry-after"]) <= 3600
    assert replies[1].document["error"]["message"] == f"More than {COUNT + 1} tokens in 3,600 seconds"


def test_routes_change_without_a_restart(gateway: Gateway, file: Path, models: Models) -> None:
    rewrite_routes(gateway, file, routes(a1=1), "1 routes and 7 keys")
    assert gateway.complete("legal", P, headers=by("all")).text == models.answer(P, 1)
    rewrite_routes(gateway, file, "[routes.legal]\nto = 7", "the routes stay as they were")
    assert gateway.complete("legal", P, headers=by("all")).text == models.answer(P, 1)
    rewrite_routes(gateway, file, routes(a0=1, a2=1), "1 routes and 7 keys")
    by_user: dict[str, set[str]] = {}
    for number in range(20):
        for _ in range(2):
            reply = gateway.complete("legal", P, headers=by("all"), user=f"user {number}")
            assert reply.text == models.answer(P, int(reply.version[6]))
            by_user.setdefault(f"user {number}", set()).add(reply.version[:7])
    assert all(len(versions) == 1 for versions in by_user.values())
    assert set(Counter(version for versions in by_user.values() for version in versions)) == {"team/a0", "team/a2"}
    rewrite_routes(gateway, file, routes(), "1 routes and 7 keys")


def test_no_key_is_in_the_log(gateway: Gateway) -> None:
    gateway.complete("legal", P, headers=by("all"))
    gateway.complete("legal", P, headers={"authorization": "Bearer a-wrong-key-that-somebody-typed"})
    log = gateway.log.read_text()
    assert '"key": "all"' in log
    assert "ah-key-of" not in log
    assert "somebody-typed" not in log
