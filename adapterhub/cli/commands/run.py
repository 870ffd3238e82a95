"""`adapterhub run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from adapterhub.cli import inputs, output
from adapterhub.cli.environment import prepare_torch
from adapterhub.cli.options import Settings, adapter_swapped_with_base, answer_options, base_option, command
from adapterhub.cli.registry_choice import workspace
from adapterhub_converters.containers.open_file import read_bytes
from adapterhub_converters.errors import LocalIOError, UsageError

_MAX_PROMPT = 1 << 20  # the most bytes of a prompt


@command(
    "run",
    example="""
    adapterhub run ./sql --base ./Qwen3-0.6B "List all customers in Berlin"
    adapterhub run team/sql:prod "List all customers in Berlin"
    adapterhub run team/sql:prod --base hf://Qwen/Qwen3-0.6B "List all customers" --no-base
    adapterhub run ./sql -p "List all customers in Berlin"
    adapterhub run ./sql --base smollm2.gguf --prompt-file question.txt --temperature 0.7 --seed 1
    adapterhub run smollm2.gguf "List all customers in Berlin" --max-tokens 64""",
)
@click.argument("source", metavar="SRC")
@click.argument("prompt", metavar="[PROMPT]", required=False)
@base_option(
    "its folder with the weights, a GGUF file, a name in the Hub's cache, or hf://org/model. [default: the one SRC records]"
)
@click.option("-p", "--prompt", "option", metavar="TEXT", help="Prompt to answer, as PROMPT.")
@click.option("--prompt-file", "file", metavar="FILE", help="Read the prompt from FILE; - for stdin.")
@answer_options(hottest=100)
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the model's chat template.")
@click.option("--no-base", is_flag=True, help="Do not show the answer of the base alone.")
@adapter_swapped_with_base
@click.pass_obj
def run(
    settings: Settings,
    /,
    *,
    source: str,
    prompt: str | None,
    base: str | None,
    option: str | None,
    file: str | None,
    no_base: bool,
    **generation_options: Any,
) -> None:
    """Try an adapter: answer a prompt with it, and with the base alone.

    SRC is an adapter, or a base alone on this machine, which answers by itself.
    A Hugging Face folder runs in torch (pip install 'adapterhub[train]'), a GGUF file in llama.cpp (pip install
    'adapterhub[run]'), for which the adapter is converted. The prompt is a message in the model's chat template, unless there
    is none. Without PROMPT it is read from stdin.
    """
    from adapterhub.operations import generate

    prepare_torch()
    if prompt is not None and option is not None:
        raise UsageError("--prompt", "the prompt is an argument already", "Leave one of them out")
    text = _prompt(option if prompt is None else prompt, file)
    adapter: str | None = source
    if base is None and inputs.is_local_base(source, settings):
        adapter, base = None, source
    if adapter is None and no_base:
        raise UsageError("--no-base", f"{source} is a base, and no adapter is named", "Leave it out")
    compare = adapter is not None and not no_base
    screen = _Screen(compare=compare, is_visible=not settings.as_json)
    result = generate.generate(
        adapter, text, base=base, compare=compare, on_text=screen.show, workspace=workspace(settings), **generation_options
    )
    screen.end()
    document: dict[str, Any] = {
        "source": adapter,
        "base": result.base,
        "engine": result.engine,
        "prompt": result.prompt,
        "text": result.text,
    }
    document |= {"base_text": result.base_text, "tokens": result.tokens}
    # The screen has already shown the text.
    output.emit(document, as_json=settings.as_json, text=lambda: None)


class _Screen:
    """A screen that shows text as it arrives; with two answers, each has a heading."""

    def __init__(self, *, compare: bool, is_visible: bool) -> None:
        self._compare, self._is_visible = compare, is_visible
        self._adapted: bool | None = None
        self._stream = output.Stream()

    def show(self, adapted: bool, piece: str) -> None:
        """Write a piece of an answer."""
        if not self._is_visible:
            return
        if adapted != self._adapted:
            self._begin(adapted)
        self._stream.write(piece)

    def _begin(self, adapted: bool) -> None:
        if self._adapted is not None:
            self._stream.end()
            output.write()
        self._adapted = adapted
        if self._compare:
            output.write(output.color("with the adapter:" if adapted else "base alone:", "bold"))

    def end(self) -> None:
        """End the last line."""
        if self._adapted is not None:
            self._stream.end()


def _prompt(argument: str | None, file: str | None) -> str:
    if argument is not None and file is not None:
        raise UsageError("--prompt-file", "the prompt is an argument already", "Leave one of them out")
    if argument is not None:
        return argument
    if file is None and sys.stdin.isatty():
        raise UsageError("PROMPT", "is missing", "Write it in quotes, or name a file with --prompt-file")
    try:
        raw = read_bytes(Path(file)) if file not in (None, "-") else sys.stdin.buffer.read(_MAX_PROMPT + 1)
    except OSError as error:
        raise LocalIOError(str(file), (error.strerror or str(error)).lower()) from error
    if len(raw) > _MAX_PROMPT:
        raise UsageError(file or "stdin", f"more than {_MAX_PROMPT} bytes, too many for a prompt")
    try:
        return raw.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(file or "stdin", "not UTF-8 text") from error
