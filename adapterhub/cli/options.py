"""The program's words: which commands there are, and what each of them understands besides its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

PROGRAM = "adapterhub"
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

# Command to the module of this package that holds it, in the order in which an adapter meets them.
COMMANDS = {
    "init": "registry", "train": "train", "eval": "eval", "validate": "validate", "fix": "fix", "diff": "diff",
    "convert": "convert", "formats": "formats", "merge": "merge", "materialize": "variants",
    "verify-merge": "proofs", "extract": "proofs", "base": "base",
    "push": "registry", "pull": "registry", "copy": "remotes", "bundle": "bundle",
    "attach": "attach", "attached": "attach",
    "remote": "remote", "login": "login", "logout": "login", "lock": "lock",
    "list": "registry", "search": "search", "find": "find", "show": "registry",
    "tag": "refs", "rm": "refs", "log": "refs", "deprecate": "refs", "keep": "housekeeping", "gc": "housekeeping",
    "lineage": "lineage", "rebuild": "lineage", "verify": "registry", "fsck": "registry",
    "pack": "storage", "unpack": "storage", "du": "usage", "completion": "completion",
}  # fmt: skip


@dataclass
class Settings:
    """What every command understands."""

    registry: str | None = None
    as_json: bool = False
    debug: bool = False


class Command(click.Command):
    """A command with an example in its help, and with the options that all commands share, wherever they are written."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example
        self.params += [
            click.Option(
                ["--json", "as_json"], is_flag=True, expose_value=False, callback=_set, help="One JSON document, for programs."
            ),
            click.Option(
                ["--registry"],
                metavar="DIR",
                expose_value=False,
                callback=_set,
                help="The registry to use: a folder, or the registry.db in it.",
            ),
            click.Option(["--debug"], is_flag=True, expose_value=False, callback=_set, hidden=True, help="Show tracebacks."),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; of an option that lacks its value click doesn't say whose it is."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The example, as it is typed."""
        formatter.write_paragraph()
        formatter.write_text("Example:")
        for line in self.example.strip().splitlines():
            formatter.write(f"  $ {line.strip()}\n")


class Group(Command, click.Group):
    """Commands of one subject, like `adapterhub base add`."""

    command_class = Command


def _set(context: click.Context, option: click.Parameter, value: Any) -> None:
    if value:
        setattr(context.ensure_object(Settings), str(option.name), value)


def command(name: str, *, short: str, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a function a command of the program; `short` is its line in the program's help."""
    return click.command(name, cls=Command, short_help=short, example=example)


class _Program(click.Group):
    """Commands whose modules are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".commands.{COMMANDS[cmd_name]}", __package__)
        found = getattr(module, cmd_name.replace("-", "_") if cmd_name != "list" else "list_")
        return found if isinstance(found, click.Command) else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise click.UsageError(f"there is no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


def _version(context: click.Context, _option: click.Parameter, value: bool) -> None:
    if value:
        from adapterhub import __version__

        click.echo(f"{PROGRAM} {__version__}")
        context.exit()


@click.group(
    PROGRAM,
    cls=_Program,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
@click.option("--registry", metavar="DIR", expose_value=False, callback=_set, help="The registry to use.")
@click.option("--debug", is_flag=True, expose_value=False, callback=_set, help="Show tracebacks.")
@click.pass_context
def app(context: click.Context) -> None:
    """Package, check, convert, merge, version and train LoRA adapters.

    An adapter is a folder (PEFT, MLX), a .gguf file, or a ref like team/sql:v2 in a registry; every command takes any of them,
    and most take one elsewhere, like oci://registry.example/team/sql:v2.
    The registry is --registry, else $ADAPTERHUB_REGISTRY, else the nearest registry.db upwards, else your data folder.
    """
    context.ensure_object(Settings)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
