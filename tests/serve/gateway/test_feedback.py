"""Feedback to a running gateway, and the log of answers: by id, for the client that got the answer alone, without texts."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from adapterhub.digest import Digest
from adapterhub.manifest.rollout_state import ROLLED_BACK, RUNNING
from adapterhub.serve.gateway import gateway as gateway_module
from adapterhub.serve.usage import answer_log

from .test_rollouts import ROUTE, Running, run, running, state, versions  # noqa: F401

KEYS = "".join(
    f'[keys.{name}]\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\nadapters = ["sql"]\n' for name in ("ada", "bo")
)


@pytest.fixture
def _endless_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an id waited for without end, if it is waited for."""
    monkeypatch.setattr(gateway_module, "_WAITS_FOR_ANSWER", (10**6,))


@pytest.mark.usefixtures("versions", "_endless_waits")
def test_an_answer_is_found_by_its_id_and_by_that_of_its_request(tmp_path: Path) -> None:
    async def test(gateway: Running) -> None:
        answer = await gateway.client.post("/v1/completions", json={"model": "sql", "prompt": "x"})
        request, version = answer.headers["x-request-id"], answer.headers["x-adapterhub-version"]
        for flush in (False, True):
            if flush:
                gateway.gateway._recorder.flush()
            for ident in (request, answer.json()["id"]):
                served = (await gateway.client.get(f"/v1/served/{ident}")).json()
                assert (served["version"], served["route"], served["status"]) == (version, "sql", 200)
                assert (served["prompt_tokens"], served["answer_tokens"], served["score"]) == (2, 3, None)
        missing = await gateway.client.get("/v1/served/none")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "answer_not_found")

    run(tmp_path, test)
    [(answer, feedback)] = answer_log.find_answers(tmp_path / "usage.db", "cmpl-0")
    assert (answer.route, answer.engine, feedback) == ("sql", "holder", None)


@pytest.mark.usefixtures("versions")
def test_feedback_is_kept_by_version_without_its_comment_and_the_last_counts(tmp_path: Path) -> None:
    async def test(gateway: Running) -> None:
        answer = await gateway.client.post("/v1/completions", json={"model": "sql", "prompt": "x"})
        ident, version = answer.json()["id"], answer.headers["x-adapterhub-version"]
        for score in (1, 0.2):
            body = {"id": ident, "score": score, "label": "dates", "comment": "the 31st of June"}
            feedback = await gateway.client.post("/v1/feedback", json=body)
            assert (feedback.status_code, feedback.json()["version"]) == (200, version)
            gateway.gateway._recorder.flush()
        assert (await gateway.client.get(f"/v1/served/{ident}")).json()["score"] == 0.2
        page = (await gateway.client.get("/metrics")).text
        assert (
            f'adapterhub_feedback_total{{arm="{answer_arm(page)}",route="sql",verdict="good",version="{version}"}} 1.0' in page
        )

    run(tmp_path, test)
    [(answer, feedback)] = answer_log.find_answers(tmp_path / "usage.db", "cmpl-0")
    assert feedback is not None
    assert (feedback.score, feedback.label, feedback.comment, feedback.version) == (0.2, "dates", "", answer.version)
    assert answer_log.feedback_counts(tmp_path / "usage.db", answer.version) == (0, 1)
    assert b"June" not in (tmp_path / "usage.db").read_bytes()


@pytest.mark.usefixtures("versions")
def test_a_comment_is_kept_if_the_operator_wants_it(tmp_path: Path) -> None:
    async def test(gateway: Running) -> None:
        gateway.gateway.settings = replace(gateway.gateway.settings, keep_text=True)
        answer = await gateway.client.post("/v1/completions", json={"model": "sql", "prompt": "x"})
        body = {"id": answer.json()["id"], "score": 0, "comment": "the 31st of June"}
        assert (await gateway.client.post("/v1/feedback", json=body)).status_code == 200

    run(tmp_path, test)
    [(_, feedback)] = answer_log.find_answers(tmp_path / "usage.db", "cmpl-0")
    assert feedback is not None
    assert feedback.comment == "the 31st of June"


def test_feedback_that_overtakes_the_record_of_its_answer_counts_and_holds_up_no_other(
    versions: list[Digest],  # noqa: F811
    tmp_path: Path,
) -> None:
    async def test(gateway: Running) -> None:
        async def ask(request: str) -> None:
            body, headers = {"model": "sql", "prompt": "x"}, {"x-request-id": request}
            await gateway.client.post("/v1/completions", json=body, headers=headers)

        await ask("recorded")
        gateway.engine.slow |= {f"team/sql@{digest}" for digest in versions}
        asking = asyncio.create_task(ask("running"))
        while not gateway.gateway.has_unrecorded():
            await asyncio.sleep(0)
        early = asyncio.create_task(gateway.client.post("/v1/feedback", json={"id": "running", "score": 1}))
        assert (await gateway.client.post("/v1/feedback", json={"id": "recorded", "score": 1})).status_code == 200
        assert not early.done()
        gateway.engine.go_on.set()
        assert (await early).json()["id"] == "running"
        await asking

    run(tmp_path, test)


def answer_arm(page: str) -> str:
    """Return the arm in the line of feedback."""
    line = next(line for line in page.splitlines() if line.startswith("adapterhub_feedback_total{"))
    return line.partition('arm="')[2].partition('"')[0]


@pytest.mark.usefixtures("versions")
@pytest.mark.parametrize(
    "body",
    [
        {}, {"id": "x"}, {"id": "x", "score": "good"}, {"id": "x", "score": 2}, {"id": "x", "score": True},
        {"id": 7, "score": 1},
        {"id": "x", "score": 1, "label": "y" * 201}, {"id": "x", "score": 1, "comment": ["y"]},
    ],
)  # fmt: skip
def test_malformed_feedback_is_refused_with_the_field(tmp_path: Path, body: dict[str, object]) -> None:
    async def test(gateway: Running) -> None:
        answer = await gateway.client.post("/v1/feedback", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] in ("id", "score", "label", "comment")

    run(tmp_path, test)


@pytest.mark.usefixtures("versions", "_endless_waits")
def test_a_client_finds_its_own_answers_only(tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text(ROUTE + KEYS)

    async def test(gateway: Running) -> None:
        ada, bo = ({"authorization": f"Bearer {name}"} for name in ("ada", "bo"))
        answer = await gateway.client.post("/v1/completions", json={"model": "sql", "prompt": "x"}, headers=ada)
        path, body = f"/v1/served/{answer.headers['x-request-id']}", {"id": answer.headers["x-request-id"], "score": 0}
        assert (await gateway.client.get(path, headers=ada)).status_code == 200
        assert (await gateway.client.get(path, headers=bo)).status_code == 404
        assert (await gateway.client.post("/v1/feedback", json=body, headers=bo)).status_code == 404
        assert (await gateway.client.get("/v1/rollouts", headers=ada)).status_code == 404

    run(tmp_path, test)


@pytest.mark.usefixtures("versions")
def test_another_client_with_the_same_ids_does_not_hide_an_answer(tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text(ROUTE + KEYS)

    async def test(gateway: Running) -> None:
        ada, bo = ({"authorization": f"Bearer {name}", "x-request-id": "same"} for name in ("ada", "bo"))
        for headers in (ada, *[bo] * answer_log._MAX_MATCHES):
            await gateway.client.post("/v1/completions", json={"model": "sql", "prompt": "x"}, headers=headers)
        gateway.gateway._recorder.flush()
        assert (await gateway.client.get("/v1/served/same", headers=ada)).json()["answer"] == "cmpl-0"

    run(tmp_path, test)


def test_a_client_s_feedback_counts_once_in_a_rollout(versions: list[Digest], tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "routes.toml").write_text(ROUTE.replace("errors = 30", "feedback = 30"))

    async def test(gateway: Running) -> None:
        async def ask(score: float, times: int = 1, **fields: str) -> str:
            answer = await gateway.client.post("/v1/completions", json={"model": "sql", "prompt": "x", **fields})
            bodies = [{"id": answer.headers["x-request-id"], "score": score}] * times
            await asyncio.gather(*(gateway.client.post("/v1/feedback", json=body) for body in bodies))
            return answer.headers["x-adapterhub-version"]

        users = [f"user {number}" for number in range(40)]
        arms = {user: versions[1] in await ask(0, 3, user=user) for user in users}
        unhappy = next(user for user, is_candidate in arms.items() if is_candidate)
        for _ in range(40):
            await ask(0, user=unhappy)
        [track] = gateway.gateway.rollouts._tracks.values()
        total = sum(count.total for count in track.evidence.counts.values())
        assert total <= min(sum(arms.values()), 40 - sum(arms.values()))

    run(tmp_path, test)


def test_answers_that_people_find_bad_roll_a_candidate_back(versions: list[Digest], tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "routes.toml").write_text(ROUTE.replace("errors = 30", "feedback = 30"))

    async def test(gateway: Running) -> None:
        for _ in range(80):
            answer = await gateway.client.post("/v1/completions", json={"model": "sql", "prompt": "x"})
            is_candidate = versions[1] in answer.headers["x-adapterhub-version"]
            body = {"id": answer.json()["id"], "score": 0 if is_candidate else 1}
            assert (await gateway.client.post("/v1/feedback", json=body)).status_code == 200
        await gateway.look()
        assert state(tmp_path, versions[1]).reason.startswith("feedback: answers are found bad more often: in ")
        assert state(tmp_path, versions[1]).state == ROLLED_BACK

    run(tmp_path, test)


def test_feedback_to_another_gateway_with_the_same_record_counts_once_at_the_one_that_answered(
    versions: list[Digest],  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "routes.toml").write_text(ROUTE.replace("errors = 30", "feedback = 30"))

    async def main() -> None:
        async with running(tmp_path, "one") as first, running(tmp_path, "two") as second:
            for number in range(80):
                answer = await first.client.post("/v1/completions", json={"model": "sql", "prompt": "x"})
                is_candidate = versions[1] in answer.headers["x-adapterhub-version"]
                body = {"id": answer.headers["x-request-id"], "score": 0 if is_candidate else 1}
                first.gateway._recorder.flush()  # as after half a second
                for client in (second.client, first.client)[: 2 if number % 8 == 0 else 1]:
                    assert (await client.post("/v1/feedback", json=body)).status_code == 200
                second.gateway._recorder.flush()
            [track] = first.gateway.rollouts._tracks.values()
            await first.gateway.rollouts._read_feedback()
            pairs = track.evidence.counts["feedback"]
            await first.gateway.rollouts._read_feedback()
            assert 10 < track.evidence.counts["feedback"].total == pairs.total <= 40
            await first.look()
            assert state(tmp_path, versions[1]).state == ROLLED_BACK

    asyncio.run(main())


def test_a_record_that_cannot_be_read_is_said_once_and_holds_no_rollout_up(
    versions: list[Digest],  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "routes.toml").write_text(ROUTE.replace("errors = 30", "feedback = 30"))
    (tmp_path / "usage.db").write_bytes(b"no database" * 1000)

    async def test(gateway: Running) -> None:
        for _ in range(3):
            await gateway.look()

    run(tmp_path, test)
    assert state(tmp_path, versions[1]).state == RUNNING
    assert caplog.text.count("feedback that other gateways got is counted later") == 1
