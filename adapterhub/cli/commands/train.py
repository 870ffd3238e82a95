"""`adapterhub train`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from adapterhub.cli import inputs, output, publish
from adapterhub.cli.environment import (
    cache_folder,
)
from adapterhub.cli.options import Settings, command
from adapterhub.cli.views import train_plan
from adapterhub.cli.views import training as view
from adapterhub_converters.errors import LocalIOError, OutputExistsError, UsageError

if TYPE_CHECKING:
    from adapterhub.train import InitialAdapter


@command(
    "train",
    short="Train an adapter (QLoRA).",
    example="""
    adapterhub train --init sql.toml
    adapterhub train --explain learning_rate
    adapterhub train sql.toml -o ./sql
    adapterhub train sql.toml --plan
    adapterhub train more.toml --from team/sql:prod --push team/sql""",
)
@click.argument("config", metavar="[CONFIG]", required=False)
@click.option("-o", "--output", "out", metavar="OUT", help="The adapter's folder to make. [default: CONFIG without .toml]")
@click.option("--plan", "plan_only", is_flag=True, help="Say how much memory it would take, and with other settings; no more.")
@click.option("--force", is_flag=True, help="Start even if it will not fit into the memory that is free.")
@click.option(
    "--init", "new", metavar="[FILE]", is_flag=False, flag_value="train.toml", help="Write a config with every key explained."
)
@click.option(
    "--explain", "about", metavar="[KEY]", is_flag=False, flag_value="", help="Say why the defaults are what they are."
)
@click.option("--from", "start", metavar="SRC", help="Go on with this adapter: a ref, a folder; it must fit BASE and lora.")
@click.option("--push", "ref", metavar="REF", help="Push the result to REF, as `adapterhub push` does.")
@click.pass_obj
def train(
    settings: Settings,
    /,
    *,
    config: str | None,
    out: str | None,
    plan_only: bool,
    force: bool,
    new: str | None,
    about: str | None,
    start: str | None,
    ref: str | None,
) -> int:
    """Train a LoRA adapter on a base held in four bits (QLoRA), and record how it came to be.

    CONFIG is a TOML file: base, data, lora, train, card. Before, it says what is trained and how much memory that will
    take, and refuses what cannot fit (exit 6); after, the held-out perplexity before and after, and what it took. Ctrl-C leaves
    a checkpoint beside OUT, and the same command goes on from it. A push that fails leaves OUT as it is.
    Needs the extra: pip install 'adapterhub[train]'.
    """
    from adapterhub import train as trainer

    if new is not None or about is not None or config is None:
        return _aside(settings, config, new, about)
    # torch's OpenMP reads it when it is loaded. Its threads wait for each other in a busy loop; where another program
    # has one of the cores that costs a factor of 30, with a short wait of 4. No number depends on it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    read = trainer.read_config(Path(config))
    if plan_only:
        return train_plan.show(settings, read, force=force)
    if ref:
        publish.check(ref)
    target = Path(out) if out else Path(Path(config).stem)
    with _given(start, settings) as first, view.Screen(read) as screen:
        result = trainer.run(read, target, on_event=screen.show, force=force, start=first, cache=cache_folder())
    if os.environ.get("TORCHELASTIC_RUN_ID") and os.environ.get("RANK", "0") != "0":
        return 0  # of several processes the first speaks
    document = view.document(result, screen.ready)
    if ref:
        document["pushed"] = publish.push_trained(settings, target, ref)
    output.emit(document, as_json=settings.as_json, text=lambda: view.text(result, document.get("pushed")))
    return 0


def _aside(settings: Settings, config: str | None, new: str | None, about: str | None) -> int:
    """What trains nothing."""
    if sum(given is not None for given in (config, new, about)) != 1:
        raise UsageError("train", "takes one of CONFIG, --init and --explain", "`adapterhub train --init` writes a CONFIG")
    return _init(settings, new) if new is not None else _explain(settings, about or "")


@contextmanager
def _given(text: str | None, settings: Settings) -> Iterator[InitialAdapter | None]:
    """The adapter to start from."""
    if text is None:
        yield None
        return
    with inputs.opened(text, settings) as found:
        yield inputs.given(found)


def _init(settings: Settings, path: str) -> int:
    """Write a config with every key; nothing is overwritten."""
    from adapterhub.train import explain

    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(explain.template())
    except FileExistsError as error:
        raise OutputExistsError(path) from error
    except OSError as error:
        raise LocalIOError(path, error.strerror or str(error)) from error
    text = f"made {path}; fill in its paths, then run `adapterhub train {path}`"
    output.emit({"config": str(Path(path))}, as_json=settings.as_json, text=lambda: output.write(text))
    return 0


def _explain(settings: Settings, wanted: str) -> int:
    """Say what the keys are for."""
    from adapterhub.train import explain as known

    found = known.explain(wanted or None)

    def text() -> None:
        for number, item in enumerate(found):
            if number:
                output.write()
            default = f" = {item.default}" if item.default else ", needed" if item.needed else ", not set by default"
            output.write(f"[{item.section}] {item.key}{default}")
            for line in output.wrapped(item.why, output.width()):
                output.write(line)

    output.emit({"keys": [dataclasses.asdict(item) for item in found]}, as_json=settings.as_json, text=text)
    return 0
