"""The program: commands loaded on demand, and one run as a process with its signals, errors and exit code."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence, Set
from itertools import pairwise
from types import FrameType
from typing import NoReturn, TextIO

import click

from adapterhub_converters.errors import AdapterhubError, LocalIOError, MissingExtraError, UsageError

from . import errors, output, suggestions
from .options import Settings, set_shared
from .suggestions import refuse_unknown


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with a code of docs/exit-codes.md."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    sys.exit(run(arguments))


PROGRAM = "adapterhub"
_COMPLETE = f"_{PROGRAM.upper()}_COMPLETE"  # set by the script of a shell that asks for words
EXIT_INTERRUPTED, EXIT_PIPE, EXIT_TERMINATED = 130, 141, 143  # 128 + the signal, as shells count
# Module to the extras of pyproject.toml that bring it. An extra with the command's name is named in the error, else the first
# one.
_EXTRAS = {
    "torch": ("train",), "transformers": ("train",), "tokenizers": ("train",), "safetensors": ("train",), "peft": ("dev",),
    "llguidance": ("train",),
    "bitsandbytes": ("demo",), "jinja2": ("train", "hub", "run", "serve"), "matplotlib": ("plot",), "obstore": ("objectstore",),
    "starlette": ("hub", "serve"), "uvicorn": ("hub", "serve"), "prometheus_client": ("hub", "serve"), "httpcore2": ("serve",),
    "nh3": ("hub",), "lz4": ("hub",), "markdown_it": ("hub",), "markupsafe": ("hub",),
    "psycopg": ("postgres",), "psycopg_pool": ("postgres",), "cryptography": ("sign",), "pkcs11": ("pkcs11",),
    "sigstore": ("sigstore",), "opentelemetry": ("otel",), "pydantic": ("sigstore",),
}  # fmt: skip


# The summary of each command, by purpose. A command is the module of its name in `commands`, with an underscore for a dash; the
# summaries are here, so that the program's help imports none of these modules.
GROUPS = {
    "Use": {
        "run": "Try an adapter: answer a prompt with and without it.",
        "chat": "Talk to an adapter, or to two side by side.",
        "serve": "Serve a base model with versions of adapters.",
        "usage": "Sum the requests and tokens that were served.",
        "resolve": "Prepare a version for a runtime such as vLLM.",
    },
    "Create": {
        "train": "Train an adapter (QLoRA).",
        "eval": "Measure an adapter on held-out data.",
        "merge": "Merge adapters, or adapters into a base model.",
        "extract": "Extract an adapter from a full fine-tune.",
        "convert": "Convert an adapter to another format.",
        "describe": "Write or renew adapter.json in a folder.",
        "rebuild": "Rebuild a merged model or an adapter from its record.",
    },
    "Check": {
        "validate": "Check adapters for problems.",
        "fix": "Repair known defects in a copy.",
        "diff": "Compare two adapters.",
        "scan": "Look for code and misleading content in an adapter.",
        "verify-merge": "Prove that a merged model contains its adapters.",
        "explain": "Explain a code of a check or an error.",
    },
    "Share": {
        "push": "Store an adapter as a new version.",
        "pull": "Write the files of a version, verified.",
        "copy": "Copy a version to or from another registry.",
        "bundle": "Export versions to one file for offline use.",
        "key": "Generate keys to sign with.",
        "sign": "Sign an adapter.",
        "attest": "Sign claims about a version that anyone can recompute.",
        "bom": "Write a bill of materials of an adapter.",
        "policy": "Compare versions with the policies.",
        "attach": "Attach files to a version in an OCI registry, or list them.",
        "lock": "Lock the versions that a project uses.",
        "remote": "Manage other registries by name.",
        "login": "Log in to a registry.",
        "logout": "Log out of a registry.",
        "hub": "Serve a registry to a team.",
    },
    "Release": {
        "promote": "Point a tag at a version that meets its requirements.",
        "approve": "Approve a version for a tag.",
        "rollback": "Point a tag at the version it had before.",
        "withdraw": "Withdraw a version from every use.",
        "rollout": "Follow the rollout of a version by a gateway.",
    },
    "Find": {
        "list": "List versions.",
        "show": "Show an adapter.",
        "search": "Search adapters by words, fields or contents.",
        "lineage": "Show the parents and the children of an adapter.",
        "log": "Show the history of a name.",
        "served": "Show which version gave an answer.",
    },
    "Maintain": {
        "info": "Show which registry, settings and programs are in use.",
        "init": "Create a registry.",
        "base": "Manage base models by name.",
        "tag": "Point a tag at a version.",
        "mv": "Rename a name, with its history.",
        "rm": "Remove a tag or a name.",
        "restore": "Restore a name that was removed.",
        "deprecate": "Mark a version as deprecated.",
        "keep": "Choose which versions gc keeps.",
        "gc": "Remove unused data.",
        "verify": "Compare bytes with digests and signatures.",
        "audit": "Verify the logs, and sign checkpoints of them.",
        "fsck": "Check a whole registry, and repair it.",
        "pack": "Compress stored versions.",
        "du": "Show disk usage.",
        "completion": "Print a completion script for a shell.",
    },
}
FIRST_SCREEN = frozenset({
    "run", "chat", "serve", "train", "eval", "merge", "convert", "validate", "fix", "diff", "explain", "push", "pull", "copy",
    "login", "sign", "lock", "hub", "promote", "list", "show", "search", "log", "tag", "rm", "gc", "verify", "info",
})  # fmt: skip
"""Commands that the program's help lists; `adapterhub help --all` lists every one."""
_RESUMABLE = {"push", "pull", "copy"}
COMMANDS = tuple(name for group in GROUPS.values() for name in group)
_ALL = f"{__name__}.all"


class _Program(click.Group):
    """The group of all commands, whose modules are imported when they are needed."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does; `help COMMAND` is `COMMAND --help`, and `help --all` is the help with every command."""
        if args[:1] and args[0] in ("help", *ctx.help_option_names) and args[1:] == ["--all"]:
            ctx.meta[_ALL] = True
            args = ["--help"]
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        name = cmd_name.replace("-", "_")
        # `list` is a built-in function of Python, so the command's function is `list_`.
        command_ = getattr(importlib.import_module(f".commands.{name}", __package__), name if name != "list" else "list_")
        if isinstance(command_, click.Command) and _COMPLETE in os.environ:
            from .completions import complete_by_metavar  # late: no other run needs it

            complete_by_metavar(command_, cmd_name)
        return command_ if isinstance(command_, click.Command) else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        refuse_unknown(ctx, args[0], COMMANDS)
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands of the first screen, or with `help --all` the options and every command."""
        if ctx.meta.get(_ALL):
            super().format_help(ctx, formatter)
            return
        self.format_usage(ctx, formatter)
        formatter.write_paragraph()
        formatter.write_text(str(self.help).partition("\n")[0])
        self._write_groups(formatter, FIRST_SCREEN)
        formatter.write_paragraph()
        formatter.write_text(
            "To begin: `adapterhub validate ./my-adapter` checks one, `adapterhub push ./my-adapter team/name` stores it. "
            f"`adapterhub COMMAND --help` shows options and examples, `adapterhub help --all` all {len(COMMANDS)} commands."
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self._write_groups(formatter, frozenset(COMMANDS))
        formatter.write_paragraph()
        formatter.write_text(
            "`adapterhub COMMAND --help` shows options and examples. To begin: `adapterhub validate ./my-adapter` checks one, "
            "`adapterhub push ./my-adapter team/name` stores it, and `adapterhub info` shows where."
        )

    @staticmethod
    def _write_groups(formatter: click.HelpFormatter, names: Set[str]) -> None:
        name_width = max(map(len, names))
        for title, group in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(name_width), summary) for name, summary in group.items() if name in names])


def _version(context: click.Context, _option: click.Parameter, value: bool) -> None:
    if value:
        from adapterhub.version import __version__

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
@click.option("--registry", metavar="DIR", expose_value=False, callback=set_shared, help="Registry to use.")
@click.option("--json", "as_json", is_flag=True, expose_value=False, callback=set_shared, help="Print one JSON document.")
@click.option("--debug", is_flag=True, expose_value=False, callback=set_shared, help="Show tracebacks.")
@click.pass_context
def app(context: click.Context) -> None:
    """Package, check, convert, merge, version and train LoRA adapters.

    An adapter is a folder (PEFT, MLX), a .gguf file, or a ref in a registry like team/sql:v2. Every command takes all three;
    most also take an address like oci://registry.example/team/sql:v2.
    The registry is --registry, else $ADAPTERHUB_REGISTRY, else the nearest registry.db in this folder or above it, else the
    one in your data folder.
    """
    context.ensure_object(Settings)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's warnings about overflow; results are checked
    warnings.simplefilter("ignore", FutureWarning)  # for programmers, not for users of a command
    code, reported = 0, False
    try:
        try:
            code = _invoke(arguments)
        except (BrokenPipeError, KeyboardInterrupt):
            raise
        except Exception as error:  # noqa: BLE001 - the last line of defense: users see no traceback
            reportable = _reportable_error(error, arguments)
            code, reported = reportable.exit_code, True
            _report(reportable, arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        resumes = "; the same command resumes. Until then, hidden files may remain"
        output.say(f"interrupted{resumes if _RESUMABLE.intersection(arguments[:1]) else ''}")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        code = EXIT_PIPE
        _discard(sys.stderr)  # it may be the broken pipe
    except OSError as error:  # as when stdout is a file on a full disk
        if not reported:
            code = LocalIOError.exit_code
            errors.say(LocalIOError("stdout", (error.strerror or str(error)).lower()))
    else:
        return code
    _discard(sys.stdout)
    return code


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    # Exit by an exception, so that temporary folders are removed and locks released on the way out.
    sys.exit(EXIT_TERMINATED)


def _discard(stream: TextIO) -> None:
    # The interpreter flushes the stream once more at exit, which would fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _invoke(arguments: list[str]) -> int:
    # click completes words in `main`, not in `make_context`.
    if _COMPLETE in os.environ:
        app.main(arguments, prog_name=PROGRAM)
    try:
        with app.make_context(PROGRAM, list(arguments)) as context:
            try:
                result = app.invoke(context)
            except (click.UsageError, AdapterhubError) as error:
                raise _error_about_several(error, context, arguments) from error
            # A command returns its exit code, or None for success.
            return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.Abort:
        return EXIT_INTERRUPTED


def _error_about_several(
    error: click.UsageError | AdapterhubError, context: click.Context, arguments: list[str]
) -> click.UsageError | AdapterhubError:
    """Return the error of a command, with the command line that does for several adapters what it does for one."""
    from . import loop_hints  # which only an error needs

    command = context.invoked_subcommand
    place = arguments.index(command) if command in arguments else len(arguments)
    words = [*arguments[place + 1 :], *(arguments[:place] if "--" not in arguments else ())]
    if isinstance(error, click.UsageError):
        return loop_hints.error_with_loop(error, words) or error
    loop_hints.hint_at_names(error, context, words)
    return error


def _reportable_error(error: Exception, arguments: list[str]) -> AdapterhubError:
    """Return the error to report for any exception; for a bug, it names a file with the traceback."""
    reportable = translate(error, arguments)
    debug = "--debug" in arguments or bool(os.environ.get("ADAPTERHUB_DEBUG"))
    if debug:
        # Printed by `say`, because a traceback can contain texts from others.
        for row in "".join(traceback.format_exception(error)).splitlines():
            output.say(row)
    if reportable is None:
        report_path = "" if debug else _crash_report(error, arguments)
        reportable = AdapterhubError(
            type(error).__name__, str(error) or "no message", f"This is a bug; report: {report_path}" if report_path else ""
        )
    return errors.reword(reportable)


def _report(error: AdapterhubError, arguments: list[str]) -> None:
    errors.say(error)
    if _wants_json(arguments):
        output.write_json({"error": output.error_document(error)})


def _usage_error(error: click.UsageError) -> UsageError:
    """Return click's error in one sentence, with what was meant or where to look as its hint."""
    command = error.ctx.command_path if error.ctx else PROGRAM
    if isinstance(error, click.NoSuchOption):
        near = suggestions.near_options(error.option_name, error.ctx.command if error.ctx else app)
        hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"See `{command} --help`"
        return UsageError("", error.message.rstrip("."), hint)
    message, separator, suggestion = error.format_message().rstrip(".").partition(". Did you mean ")
    return UsageError("", message, f"Did you mean {suggestion}" if separator else f"See `{command} --help`")


def translate(error: Exception, arguments: Sequence[str] = ()) -> AdapterhubError | None:
    """Return the error to report for an exception of a command line, or None for a bug."""
    if isinstance(error, AdapterhubError):
        return None if type(error) is AdapterhubError else error
    if isinstance(error, click.UsageError):
        return _usage_error(error)
    if isinstance(error, ImportError):
        return _unloadable(error) or _missing_extra((error.name or "").partition(".")[0], arguments)
    if isinstance(error, MemoryError):
        return LocalIOError("memory", "out of memory", "Close other programs, or use a smaller model", code="out-of-memory")
    if isinstance(error, OSError):
        reason = (error.strerror or str(error) or type(error).__name__).lower()
        hint = "Free some space" if error.errno == errno.ENOSPC else ""
        return _unloadable(error) or LocalIOError(str(error.filename or "disk"), reason, hint)
    return None


def _unloadable(error: ImportError | OSError) -> MissingExtraError | None:
    """Return the error for a package that lacked a library as it was imported; None for any other error."""
    # The loader's errors have no number, unlike those of files.
    if isinstance(error, ModuleNotFoundError) or getattr(error, "errno", None) is not None:
        return None
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    packages = (frame.f_globals["__name__"].partition(".")[0] for frame in frames)
    package = next((package for package in packages if not package.startswith(("__main__", PROGRAM))), "")
    problem = f"is installed, but cannot be loaded ({str(error).partition(chr(10))[0]})"
    hint = "Install a build of it for this machine, and the libraries that it needs"
    return MissingExtraError(package, problem, hint) if package else None


def _missing_extra(module: str, arguments: Sequence[str]) -> MissingExtraError | None:
    """Return the error for a module that is not installed; None for a module that every installation has."""
    extras = _EXTRAS.get(module, ())
    extra = next((extra for extra in extras if extra in arguments), "".join(extras[:1]))
    hint = f"Run `pip install 'adapterhub[{extra}]'`"
    return MissingExtraError("", f"requires {module}, which is not installed", hint) if extra else None


def _wants_json(arguments: list[str]) -> bool:
    # Read from the arguments themselves, because the error may be that they could not be parsed.
    return any(word in ("--json", "--format=json") for word in arguments) or ("--format", "json") in pairwise(arguments)


def _crash_report(error: Exception, arguments: list[str]) -> str:
    """Write the traceback to a file for a bug report; return its path, or an empty text if it could not be written."""
    from adapterhub.version import __version__

    text = [f"adapterhub {__version__}, Python {sys.version}, {sys.platform}\n", f"arguments: {arguments}\n\n"]
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="adapterhub-crash-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.writelines([*text, *traceback.format_exception(error)])
            return file.name
    except OSError:
        return ""
