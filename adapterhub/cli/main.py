"""The program: its commands, loaded when they are asked for, and one run as a process with signals, errors and exit codes."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from itertools import pairwise
from types import FrameType
from typing import NoReturn

import click

from adapterhub_converters.errors import AdapterhubError, LocalIOError, MissingExtraError, UsageError

from . import errors, output
from .options import Settings, set_shared


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with a code of docs/exit-codes.md."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    sys.exit(run(arguments))


PROGRAM = "adapterhub"


EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


EXIT_TERMINATED, EXIT_PIPE = 143, 141


# Module to the extra of pyproject.toml that brings it.
_EXTRAS = {
    "torch": "train", "transformers": "train", "tokenizers": "train", "safetensors": "train", "matplotlib": "train",
    "bitsandbytes": "demo", "obstore": "objectstore", "peft": "dev",
}  # fmt: skip


# In the order in which an adapter meets them. Each is a module of `commands`, with a dash as an underscore.
COMMANDS = (
    "init", "train", "eval", "validate", "fix", "diff", "convert", "formats", "merge", "materialize", "verify-merge", "extract",
    "base", "push", "pull", "copy", "bundle", "attach", "attached", "remote", "login", "logout", "lock", "list", "search",
    "find", "show", "tag", "rm", "log", "deprecate", "keep", "gc", "lineage", "rebuild", "verify", "fsck", "pack", "unpack",
    "du", "completion",
)  # fmt: skip


class _Program(click.Group):
    """Commands whose modules are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        found = getattr(importlib.import_module(f".commands.{name}", __package__), name if name != "list" else "list_")
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
@click.option("--registry", metavar="DIR", expose_value=False, callback=set_shared, help="The registry to use.")
@click.option("--debug", is_flag=True, expose_value=False, callback=set_shared, help="Show tracebacks.")
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


def run(arguments: list[str]) -> int:
    """The exit code of a command line."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of numbers that overflow: what comes of them is checked
    warnings.simplefilter("ignore", FutureWarning)  # from library to programmer: who types commands can't follow it
    try:
        code = _invoke(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        return EXIT_PIPE
    except Exception as error:  # noqa: BLE001 - the last line of defense: no traceback reaches a user
        return _report(error, arguments)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    # As an exception, so that temporary folders are removed and locks released on the way out.
    sys.exit(EXIT_TERMINATED)


def _close_stdout() -> None:
    # The interpreter flushes stdout once more at exit, which would complain again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _invoke(arguments: list[str]) -> int:
    if f"_{PROGRAM.upper()}_COMPLETE" in os.environ:
        app.main(arguments, prog_name=PROGRAM)
    try:
        with app.make_context(PROGRAM, list(arguments)) as context:
            result = app.invoke(context)
            return result if isinstance(result, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.Abort:
        return EXIT_INTERRUPTED


def _report(error: Exception, arguments: list[str]) -> int:
    known = errors.in_words_of_the_command_line(translate(error))
    debug = "--debug" in arguments or bool(os.environ.get("ADAPTERHUB_DEBUG"))
    if debug:
        traceback.print_exception(error)
    if known is None:
        where = "" if debug else _crash_report(error, arguments)
        known = AdapterhubError(
            type(error).__name__, str(error) or "no message", f"This is a bug; report: {where}" if where else ""
        )
    line = output.one_line(f"error: {known}")
    if _wants_json(arguments):
        output.write_json({"error": output.error_document(known)})
    print(line, file=sys.stderr)
    return known.exit_code


def translate(error: Exception) -> AdapterhubError | None:
    """The error of ours that an exception is, or None for a bug."""
    if isinstance(error, AdapterhubError):
        return None if type(error) is AdapterhubError else error
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else PROGRAM
        return UsageError("", error.format_message().rstrip("."), f"`{command} --help` says how")
    if isinstance(error, ImportError):
        module = (error.name or "").partition(".")[0]
        return _missing(module) if module in _EXTRAS else None
    if isinstance(error, MemoryError):
        return LocalIOError("memory", "there is not enough of it", "Close other programs, or use a smaller model")
    if isinstance(error, OSError):
        return LocalIOError(
            str(error.filename or "disk"), _reason(error), "Free some space" if error.errno == errno.ENOSPC else ""
        )
    return None


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()


def _missing(module: str) -> MissingExtraError:
    extra = _EXTRAS[module]
    return MissingExtraError("", f"this needs {module}, which isn't installed", f"pip install 'adapterhub[{extra}]'")


def _wants_json(arguments: list[str]) -> bool:
    # Read from the words themselves: the error may be that they could not be parsed.
    return any(word in ("--json", "--format=json") for word in arguments) or ("--format", "json") in pairwise(arguments)


def _crash_report(error: Exception, arguments: list[str]) -> str:
    """Where the traceback lies for who reports the bug; empty if it could not be written."""
    from adapterhub import __version__

    text = [f"adapterhub {__version__}, Python {sys.version}, {sys.platform}\n", f"arguments: {arguments}\n\n"]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="adapterhub-crash-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.writelines([*text, *traceback.format_exception(error)])
            return file.name
    except OSError:
        return ""
