"""A command whose options may also come from variables and from a TOML file: `hub start`.

The command line comes first, then the variables, then the file, then the defaults. No error repeats a value of the file: some
are secrets, such as the password in the address of a database.
"""

from __future__ import annotations

import difflib
import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from adapterhub_converters.containers import json_file, toml_file
from adapterhub_converters.errors import UsageError

from . import environment
from .options import Command


class ConfiguredCommand(Command):
    """A command with the option `--config TOML`, and with a variable for each of its options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for option in self.params:
            if isinstance(option, click.Option) and option.envvar is None:
                option.envvar = f"{environment.PREFIX}{key_of(option).upper()}"
        self.params.append(
            click.Option(
                ["--config"],
                metavar="TOML",
                type=click.Path(path_type=Path),
                envvar=environment.CONFIG,
                is_eager=True,
                expose_value=False,
                callback=_use_config,
                help="File with options, like `behind_proxy = true`.",
            )
        )


def key_of(option: click.Option) -> str:
    """Return the key of an option in the file, such as `behind_proxy`."""
    return max(option.opts, key=len).removeprefix("--").replace("-", "_")


def _use_config(context: click.Context, _option: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    options = {
        key_of(option): option
        for option in context.command.params
        if isinstance(option, click.Option) and not (option.is_eager or option.hidden)
    }
    values = read(path, options)
    context.default_map = {str(options[key].name): value for key, value in values.items()}


def read(path: Path, options: Mapping[str, click.Option]) -> dict[str, Any]:
    """Return the values of a file by key; relative paths in it start at its folder.

    Args:
        options: The options by key.

    Raises:
        UsageError: The file is not TOML, has an unknown key, or a value that its option does not take.
    """
    text = json_file.read_text(path)
    values = {}
    for key, value in toml_file.parse(text, str(path)).items():
        line = toml_file.line_of(text, "", key)
        location = f"{path}:{line}" if line else str(path)
        if key not in options:
            close = difflib.get_close_matches(key.replace("-", "_"), options, 1)
            hint = f"Did you mean {close[0]!r}?" if close else f"Known keys: {', '.join(options)}"
            raise UsageError(location, f"{key[:80]!r} is unknown", hint, code="invalid-config")
        option = options[key]
        is_path = isinstance(option.type, click.Path) or option.name == "registry"
        if is_path and isinstance(value, str) and value:
            values[key] = str(path.absolute().parent / os.path.expanduser(value))
        else:
            values[key] = value
        if problem := _kind_problem(option, values[key]) or _value_problem(option, values[key]):
            raise UsageError(location, f"{key!r} {problem}", code="invalid-config")
    return values


def _kind_problem(option: click.Option, value: object) -> str:
    """Return what is wrong with the kind of a value; empty if nothing is."""
    if option.is_flag:
        return "" if isinstance(value, bool) else "is neither true nor false"
    if option.multiple:
        return "" if isinstance(value, list) and all(map(_is_line, value)) else "is not a list of strings of one line"
    if isinstance(option.type, click.types.IntParamType):
        return "" if type(value) is int else "is not a whole number"
    if isinstance(option.type, click.types.FloatParamType):
        return "" if json_file.is_number(value) else "is not a number"
    return "" if _is_line(value) else "is not a string of one line"


def _value_problem(option: click.Option, value: Any) -> str:
    """Return what is wrong with a value of the right kind, without repeating it; empty if nothing is."""
    if isinstance(option.type, click.Path):
        # The path may be a secret that was written in place of the name of its file.
        return "" if Path(value).exists() else "names no file"
    try:
        option.type_cast_value(click.Context(click.Command("")), value)
    except click.BadParameter:
        choices = option.type.choices if isinstance(option.type, click.Choice) else ()
        return f"is none of {', '.join(map(str, choices))}" if choices else "is out of range"
    return ""


def _is_line(value: object) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()
