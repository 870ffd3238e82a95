"""`adapterhub chat`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from adapterhub.cli import engines, errors, inputs, output
from adapterhub.cli.completions import complete_ref
from adapterhub.cli.conversation_models import RegistryModels, open_models
from adapterhub.cli.environment import prepare_torch
from adapterhub.cli.options import Settings, adapter_swapped_with_base, answer_options, base_option, command
from adapterhub.cli.views.answer_columns import WIDE, OneByOne, SideBySide
from adapterhub_converters import safe_regex
from adapterhub_converters.errors import AdapterhubError, UsageError

if TYPE_CHECKING:
    from adapterhub.serve.conversation import Conversation, ModelAnswer

_MAX_LINE = 1 << 20  # the most bytes of a line
_DIGEST = safe_regex.Pattern(r"(sha256:[0-9a-f]{12})[0-9a-f]+")
_HELP = {
    "/adapter REF": "answer with this version, or a blend of several, from now on",
    "/base": "answer with the base alone",
    "/compare NAME": "answer with NAME too, a ref or the base's name; without NAME, no longer",
    "/system TEXT": "set the system message; without TEXT, none",
    "/clear": "forget what was said",
    "/help": "show this",
    "/quit": "end; so does Ctrl-D. Ctrl-C stops an answer",
    "//TEXT": "say /TEXT",
}
_WORDS = [word.split()[0] for word in _HELP if not word.startswith("//")]


@command(
    "chat",
    example="""
    adapterhub chat team/sql:prod --base smollm2.gguf
    adapterhub chat team/sql:v3 --base ./Qwen3-0.6B --engine torch --compare team/sql:v2
    adapterhub chat ./sql --base smollm2.gguf < questions.txt
    adapterhub chat smollm2.gguf""",
)
@click.argument("source", metavar="SRC")
@base_option("as for `adapterhub serve`. [default: the one SRC records]")
@click.option(
    "--compare", metavar="NAME", shell_complete=complete_ref, help="Another ref, or the base's name, that answers as well."
)
@answer_options(hottest=2)
@engines.engine_options
@adapter_swapped_with_base
@click.pass_obj
def chat(
    settings: Settings,
    /,
    *,
    source: str,
    base: str | None,
    compare: str | None,
    system: str | None,
    max_tokens: int,
    temperature: float,
    seed: int,
    **engine_settings: Any,
) -> None:
    """Talk to an adapter on its base, or to two of them side by side.

    SRC is an adapter, a blend of versions like team/sql:v2*0.7+team/tone*0.3, or a base alone. Without --engine-url, an engine
    of `adapterhub serve` is started for this conversation. /help lists what you can change during it: the version that answers,
    the one it is compared with, the system message. In a pipe, each line is one turn.
    """
    from adapterhub.http_server import logs
    from adapterhub.serve.conversation import Conversation
    from adapterhub.serve.gateway.gateway import Gateway
    from adapterhub.serve.gateway.gateway_settings import GatewaySettings

    prepare_torch()
    if settings.debug:
        logs.log_to_stderr("adapterhub.serve", as_json=False)
    logging.getLogger("adapterhub.serve").addHandler(
        logging.NullHandler()
    )  # an error is reported by its turn; without a handler, logging would print it again
    options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    base, model = (base, source) if base is not None else inputs.base_and_model(source, settings, may_be_path=True)
    # Each answer comes from another version, or after the one before.
    with (
        engines.open_engine(base, settings, parallel=1, **engine_settings) as chosen,
        open_models([model, compare or ""], chosen.name, settings) as models,
        asyncio.Runner() as runner,
    ):
        names = [models.name_of(text) for text in (model or chosen.name, compare) if text]  # before the engine starts
        gateway_settings = GatewaySettings(base=chosen.spec, base_name=chosen.name, workspace=models.workspace)
        gateway = Gateway(gateway_settings, chosen.engine)
        conversation = Conversation(gateway, [chosen.name], system, options)
        try:
            runner.run(conversation.start())
            if chosen.facts:
                output.say(output.one_line(chosen.facts))
            session = _ChatSession(conversation, runner, models, settings)
            for side, name in enumerate(names):
                session.use(name, side)
            session.go_on()
        finally:
            runner.run(gateway.close())
    if settings.as_json:
        output.write_json({"base": chosen.name, "engine": chosen.engine.name, "turns": session.turns})


class _ChatSession:
    """A conversation at a terminal or in a pipe.

    Attributes:
        turns: The prompts and answers, for `--json`; else empty.
    """

    def __init__(self, conversation: Conversation, runner: asyncio.Runner, models: RegistryModels, settings: Settings) -> None:
        self._conversation, self._runner, self._models = conversation, runner, models
        self._as_json = settings.as_json
        self._is_person = sys.stdin.isatty() and output.is_terminal() and not settings.as_json
        self.turns: list[dict[str, Any]] = []

    def go_on(self) -> None:
        """Take lines until there are no more. An error is shown to a person, and ends a pipe."""
        if self._is_person:
            self._note("/help lists the commands; Ctrl-D ends")
        for line in _typed_lines() if self._is_person else _piped_lines():
            try:
                if not self._take_line(line):
                    return
            except AdapterhubError as error:
                if not self._is_person:
                    raise
                errors.say(error)

    def _take_line(self, line: str) -> bool:
        """Do what a line says; return False at the end."""
        if line.startswith("/") and not line.startswith("//"):
            return self._run_command(*line.split(maxsplit=1))
        if line.strip():
            self._ask(line.removeprefix("/") if line.startswith("//") else line)
        return True

    def _run_command(self, word: str, argument: str = "") -> bool:
        argument, conversation = argument.strip(), self._conversation
        match word:
            case "/adapter" if argument:
                self.use(self._models.name_of(argument), 0)
            case "/adapter":
                raise UsageError(word, "needs the name of an adapter", "Write /adapter team/sql:v3, or /base for none")
            case "/base":
                self.use(conversation.gateway.settings.base_name, 0)
            case "/compare" if argument:
                self.use(self._models.name_of(argument), 1)
            case "/compare":
                del conversation.models[1:]
                self._note(f"{conversation.models[0]} alone")
            case "/system":
                conversation.system = argument or None
                self._note("the system message is set" if argument else "no system message")
            case "/clear":
                conversation.clear()
                self._note("what was said is forgotten")
            case "/help":
                output.write_pairs(_HELP)
            case "/quit" | "/exit":  # the word of other programs
                return False
            case _:
                close = difflib.get_close_matches(word.lower(), _WORDS, 1)
                raise UsageError(word[:40], "no such command", f"Did you mean {close[0]}?" if close else "See /help")
        return True

    def use(self, model: str, side: int) -> None:
        """Let a model answer from now on, first or beside it, and note which version it is."""
        self._note(self._short(self._runner.run(self._conversation.use(model, side))))

    def _ask(self, text: str) -> None:
        from adapterhub.serve.conversation import STOPPED

        if self._as_json:
            answers = self._runner.run(self._conversation.ask(text))
            self.turns.append({"prompt": text, "answers": [dataclasses.asdict(answered) for answered in answers]})
        else:
            answers = self._show_answers(text)
        if not self._is_person and any(answered.finish == STOPPED for answered in answers):
            raise KeyboardInterrupt  # ends a pipe

    def _show_answers(self, text: str) -> list[ModelAnswer]:
        """Ask, and show the answers as they arrive: in columns if a person's terminal has room for two."""
        models, screen = self._conversation.models, output.width() or 0
        columns = self._is_person and len(models) > 1 and screen >= WIDE
        view = SideBySide(models, screen) if columns else OneByOne(models, self._note)
        try:
            request = self._conversation.ask(text, view.show, lambda side, answered: view.end(side, self._facts(answered)))
            return self._runner.run(request)
        except AdapterhubError:
            view.close()
            raise

    def _facts(self, answered: ModelAnswer) -> str:
        """Return which version answered, with how many tokens and in what time."""
        tokens = "" if answered.tokens is None else output.plural(answered.tokens, "token")
        ended = {"length": "cut at --max-tokens", "stop": ""}.get(answered.finish, answered.finish)
        facts = (self._short(answered.version or answered.model), tokens, f"{answered.seconds:.1f} s", ended)
        return ", ".join(fact for fact in facts if fact)

    def _short(self, version: str) -> str:
        return _DIGEST.sub(r"\1", version) if self._is_person else version

    def _note(self, text: str) -> None:
        """Print a line about the conversation: dim on a terminal, on stderr for a pipe."""
        text = output.one_line(text)
        if self._is_person:
            output.write(output.color(text, "dim"))
        else:
            output.say(text)


def _typed_lines() -> Iterator[str]:
    """Yield the lines that a person types, until Ctrl-D or Ctrl-C."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - `input` uses it from then on: editing, and the lines before
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            output.write()
            return
        except UnicodeDecodeError:
            output.say("error: not UTF-8 text")
            continue
        # A lone surrogate represents a byte that is not UTF-8, which a model cannot be given.
        yield line.encode(errors="surrogateescape").decode(errors="replace")


def _piped_lines() -> Iterator[str]:
    """Yield the lines of stdin."""
    while line := sys.stdin.buffer.readline(_MAX_LINE + 1):
        if len(line) > _MAX_LINE:
            raise UsageError("stdin", f"a line of more than {_MAX_LINE} bytes, too many for a prompt")
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError("stdin", "not UTF-8 text") from error
