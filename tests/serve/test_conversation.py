"""A conversation over the reference host: who answers, what each has heard, what an end before the end leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapterhub.operations import generate
from adapterhub.operations.workspace import Workspace
from adapterhub.serve.conversation import STOPPED, Conversation, ModelAnswer
from adapterhub.serve.engines.in_process import torch_host
from adapterhub.serve.gateway.gateway import Gateway
from adapterhub.serve.gateway.gateway_settings import GatewaySettings
from adapterhub_converters import bases
from adapterhub_converters.errors import LocalIOError, NotFoundError, RefusedError, UsageError
from tests.support.serving import Models

P = "the quick brown fox "
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
COUNT = 12


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as open_runner:
        yield open_runner


@pytest.fixture(scope="module")
def open_conversation(
    models: Models, registry: Path, tmp_path_factory: pytest.TempPathFactory, runner: asyncio.Runner
) -> Iterator[Gateway]:
    workspace = Workspace(registry=registry, cache=tmp_path_factory.mktemp("cache"))
    settings = GatewaySettings(base=bases.read_base(models.base), base_name="base", workspace=workspace)
    gateway = Gateway(settings, torch_host(models.base, slots=4))
    runner.run(gateway.start())
    yield gateway
    runner.run(gateway.close())


@pytest.fixture
def conversation(open_conversation: Gateway) -> Conversation:
    return Conversation(open_conversation, ["base"], options={"max_tokens": COUNT, "temperature": 0.0, "seed": 0})


def test_both_sides_go_on_from_their_own_answers(conversation: Conversation, runner: asyncio.Runner, models: Models) -> None:
    """What was said before there were two is the same for both."""
    heard = CHAT.format(P)
    [first] = runner.run(conversation.ask(P))
    assert (first.version, first.text) == ("base", models.answer(heard, ends=True))
    heard += first.text + "<|im_end|>\n" + CHAT.format("and?")
    for model, side in (("team/a0:prod", 0), ("team/a1", 1)):
        assert runner.run(conversation.use(model, side)).startswith(f"team/a{side}@sha256:")
    second = runner.run(conversation.ask("and?"))
    assert [answered.text for answered in second] == [models.answer(heard, number, ends=True) for number in (0, 1)]
    third = runner.run(conversation.ask("so?"))
    for number, (before, answered) in enumerate(zip(second, third, strict=True)):
        whole = heard + before.text + "<|im_end|>\n" + CHAT.format("so?")
        assert answered.text == models.answer(whole, number, ends=True)
    conversation.clear()
    del conversation.models[1:]
    [again] = runner.run(conversation.ask(P))
    assert again.text == models.answer(CHAT.format(P), 0, ends=True)


def test_pieces_are_the_answer_and_facts_come_at_its_end(conversation: Conversation, runner: asyncio.Runner) -> None:
    conversation.system = "be brief"
    pieces: list[str] = []
    ended: list[ModelAnswer] = []
    [answered] = runner.run(conversation.ask(P, lambda _, piece: pieces.append(piece), lambda _, facts: ended.append(facts)))
    assert ("".join(pieces), ended) == (answered.text, [answered])
    assert answered.tokens is not None
    assert 0 < answered.tokens <= COUNT
    assert answered.finish in ("stop", "length")


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_answer_is_that_of_a_prompt_which_is_run(
    conversation: Conversation, runner: asyncio.Runner, models: Models, temperature: float
) -> None:
    conversation.options = {"max_tokens": COUNT, "temperature": temperature, "seed": 3}
    runner.run(conversation.use("team/a1", 0))
    runner.run(conversation.use("base", 1))
    answers = [answered.text for answered in runner.run(conversation.ask(P))]
    alone = generate.generate(models.adapter(1), P, base=models.base, max_tokens=COUNT, temperature=temperature, seed=3)
    assert answers == [alone.text, alone.base_text]


def test_a_blend_is_named_with_its_weights(conversation: Conversation, runner: asyncio.Runner) -> None:
    assert runner.run(conversation.use("team/a0*0.5+team/a1*0.5")).count("*0.5") == 2


@pytest.mark.parametrize(
    ("model", "error"), [("team/none", NotFoundError), ("team/a0:none", NotFoundError), ("./a0", UsageError), ("", UsageError)]
)
def test_who_is_not_there_changes_nothing(
    conversation: Conversation, runner: asyncio.Runner, model: str, error: type[Exception]
) -> None:
    with pytest.raises(error):
        runner.run(conversation.use(model))
    assert conversation.models == ["base"]


def test_a_question_that_fails_is_not_part_of_what_was_said(
    conversation: Conversation, runner: asyncio.Runner, models: Models
) -> None:
    conversation.options = {**conversation.options, "max_tokens": 5000}
    with pytest.raises(RefusedError, match="have at most 2,048"):
        runner.run(conversation.ask("too long"))
    conversation.options = {**conversation.options, "max_tokens": COUNT}
    [answered] = runner.run(conversation.ask(P))
    assert answered.text == models.answer(CHAT.format(P), ends=True)


def test_a_cancellation_keeps_what_came(conversation: Conversation, runner: asyncio.Runner, models: Models) -> None:
    conversation.options = {**conversation.options, "max_tokens": 1900}
    runner.run(conversation.use("team/a0", 1))

    async def stop() -> list[ModelAnswer]:
        def enough(_side: int, _piece: str) -> None:
            asking.cancel()

        asking = asyncio.create_task(conversation.ask("hello", enough))
        return await asking

    stopped = runner.run(stop())
    assert STOPPED in [answered.finish for answered in stopped]
    conversation.options = {**conversation.options, "max_tokens": COUNT}
    heard = CHAT.format("hello") + "{}<|im_end|>\n" + CHAT.format("and?")
    for number, before, answered in zip((None, 0), stopped, runner.run(conversation.ask("and?")), strict=True):
        assert answered.text == models.answer(heard.format(before.text), number, ends=True)


def test_an_engine_that_is_gone_is_an_error_of_its_own(
    models: Models, registry: Path, tmp_path: Path, runner: asyncio.Runner
) -> None:
    settings = GatewaySettings(bases.read_base(models.base), "base", Workspace(registry=registry, cache=tmp_path))
    never_started = Gateway(settings, torch_host(models.base, slots=1))
    with pytest.raises(LocalIOError, match="torch: does not answer for now"):
        runner.run(Conversation(never_started, ["base"]).ask(P))
    runner.run(never_started.close())
