"""One run as a process: signals, errors as one line or one document, and the exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import traceback
import warnings
from itertools import pairwise
from types import FrameType

import click

from adapterhub_converters.errors import AdapterhubError, LocalIOError, MissingExtraError, UsageError

from . import errors, output
from .options import EXIT_INTERRUPTED, PROGRAM, app

# Module to the extra of pyproject.toml that brings it.
_EXTRAS = {
    "torch": "train", "transformers": "train", "tokenizers": "train", "safetensors": "train", "matplotlib": "train",
    "bitsandbytes": "demo", "obstore": "objectstore", "peft": "dev",
}  # fmt: skip
EXIT_TERMINATED, EXIT_PIPE = 143, 141


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
