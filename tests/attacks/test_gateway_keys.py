"""What the holder of a key of a gateway can take: no more than the key's limits, and no evidence of others."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from adapterhub.operations.workspace import Workspace
from adapterhub.serve.engines import Blend, EngineAnswer
from adapterhub.serve.gateway import rollout_evidence, route_file
from adapterhub.serve.gateway.front import GatewayRequest
from adapterhub.serve.gateway.gateway import Gateway
from adapterhub.serve.gateway.gateway_settings import GatewaySettings
from adapterhub.serve.gateway.openai_errors import ProblemError
from adapterhub.serve.gateway.rollout_evidence import Evidence
from adapterhub_converters.errors import UsageError
from tests.serve.gateway.test_versions import Holder
from tests.support import folders

HEADERS = {"authorization": "Bearer ah-key-of-ada"}
SHA256 = hashlib.sha256(b"ah-key-of-ada").hexdigest()
ASKED, TOKENS = 12, 100  # requests at once, and tokens of each
NO_LIMITS = {"sha256", "adapters", "priority"}


class Engine(Holder):
    """An engine that answers nothing before all have asked."""

    async def request(self, path: str, body: Any, blend: Blend) -> EngineAnswer:
        async def body_of_nothing() -> Any:
            yield b""

        await asyncio.sleep(0.2)
        return EngineAnswer(200, "application/json", body_of_nothing())


def names_of_a_key(tmp_path: Path) -> set[str]:
    """Return what a key may have in a route file, as the error about anything else lists it."""
    (tmp_path / "routes.toml").write_text("[keys.ada]\nother = 1\n")
    with pytest.raises(UsageError) as error:
        route_file.read(tmp_path / "routes.toml")
    return set(error.value.hint.removeprefix("There are ").split(", "))


def answered_at_once(tmp_path: Path, limits: str, body: dict[str, Any]) -> int:
    """Return how many of requests at the same time are answered, each of which takes TOKENS."""
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "routes.toml").write_text(f"[keys.ada]\nsha256 = '{SHA256}'\n{limits}\n")
    workspace = Workspace(registry=tmp_path / "registry", cache=tmp_path / "cache")
    settings = GatewaySettings(folders.base(tmp_path / "base"), "base", workspace, routes=tmp_path / "routes.toml")

    async def ask(gateway: Gateway) -> bool:
        request = GatewayRequest("/v1/completions", HEADERS)
        status = 200
        try:
            async with gateway.enter(request):
                with gateway.meter(request, body) as usage:
                    async with gateway.open_answer(request, body):
                        usage.count({"usage": {"prompt_tokens": 10, "completion_tokens": TOKENS - 10}})
                    await gateway.settle(request)
        except ProblemError as error:
            status = error.status
        gateway.record_end(request, status, None, 0.0)
        return status == 200

    async def main() -> int:
        gateway = Gateway(settings, Engine())
        await gateway.start()
        try:
            at_once = sum(await asyncio.gather(*(ask(gateway) for _ in range(ASKED))))
            in_turn = 0
            while await ask(gateway):  # what was reserved and not taken is given back
                in_turn += 1
                assert in_turn < 50
            return at_once * 1000 + in_turn
        finally:
            await gateway.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_requests_at_the_same_time_take_no_more_than_those_in_turn(tmp_path: Path) -> None:
    body = {"model": "base", "prompt": "x", "max_tokens": TOKENS}
    answered = {}
    for name in sorted(names_of_a_key(tmp_path) - NO_LIMITS - {"running"}):
        limit = "'3/3600'" if name == "requests" else f"'{3 * TOKENS}/3600'" if name == "tokens" else 3 * TOKENS
        answered[name] = answered_at_once(tmp_path / name, f"{name} = {limit}", body)
    assert "tokens" in answered
    assert {name: total // 1000 + total % 1000 for name, total in answered.items()} == dict.fromkeys(answered, 3), answered


@pytest.mark.parametrize("body", [{}, {"max_tokens": 10**30}, {"n": 10**30}, {"max_tokens": -1}, {"prompt": ["x"] * 5000}])
def test_an_answer_without_a_limit_is_expected_to_be_long(tmp_path: Path, body: dict[str, Any]) -> None:
    body = {"model": "base", "prompt": "x", **body}
    assert answered_at_once(tmp_path, f"tokens = '{3 * TOKENS}/3600'", body) // 1000 == 1


def test_no_key_ends_the_evidence_of_others_by_names_that_it_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in vars(rollout_evidence) if name.startswith("_MAX_")]:
        monkeypatch.setattr(rollout_evidence, name, 100)
    evidence = Evidence({"errors": 5.0, "feedback": 5.0})
    assert evidence.admit("mallory", "the first", "the first", is_candidate=True)
    evidence.admit("ada", "ada", "of ada", is_candidate=True)
    for number in range(1000):
        evidence.admit("mallory", f"unit {number}", f"request {number}", is_candidate=bool(number % 2))
    assert not evidence.admit("ada", "ada", "again", is_candidate=True)  # it has counted, and is remembered
    for number in range(40):
        assert evidence.admit("ada", f"unit {number}", f"request {number}", is_candidate=False)
    evidence.add_feedback("ada", "of ada", is_candidate=True, is_bad=True)
    evidence.add_feedback("ada", "request 1", is_candidate=False, is_bad=False)
    assert evidence.counts["feedback"].worse == 1
    remembered = [evidence._units, evidence._requests]
    assert [sum(map(len, names._by_key.values())) for names in remembered] == [100, 100]
