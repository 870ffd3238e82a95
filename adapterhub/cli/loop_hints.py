"""The command line that does for several adapters what a command does for one: the hint of an error about them.

People write `push A B team/` as for rsync, and `pull 'team/*'`. The hint is a line that can be pasted: a loop of the shell, or
the command with the names that a pattern matches.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from glob import iglob
from itertools import islice
from pathlib import Path

import click

from adapterhub.ref import is_name, is_pattern, is_tag
from adapterhub_converters.adapter_files import adapters_at
from adapterhub_converters.errors import AdapterhubError, UsageError

from .errors import reword
from .options import Settings
from .registry_choice import workspace

# Commands whose last argument is a place, in which each adapter gets a name of its own.
_WITH_PLACE = {"push", "copy", "convert"}
# Commands whose one argument is an adapter, and that make no sense in a loop.
_ALONE = {"chat", "rebuild", "served"}
_ADAPTERS = {"source", "ref", "name"}  # names of the arguments that are adapters
_PATTERN_CODES = {"invalid-ref", "no-such-file", "not-found", "no-such-adapter"}
_PLACE_CODES = {"invalid-ref", "invalid-usage"}
_MAX_SOURCES = 50
_MIN_PATTERN, _MAX_LISTED = 5, 10_000
_VARIABLE, _LAST_PART = '"$a"', '"${a##*/}"'  # of the shell


def error_with_loop(error: click.UsageError, words: Sequence[str]) -> UsageError | None:
    """Return the error for more arguments than a command takes, if they are adapters; else None.

    Args:
        error: The error of click.
        words: The words of the command line after the command's name.
    """
    context = error.ctx
    if context is None or type(error) is not click.UsageError or not _takes_one_adapter(context.command):
        return None
    command = context.command
    values, surplus, _ = command.make_parser(context).parse_args([*words])
    if not surplus:
        return None
    sources = [str(values[argument.name]) for argument in _arguments(command)] + surplus
    if _is_name_and_tag(sources):
        line = [f"{word}:{sources[1]}" if word == sources[0] else word for word in words]
        line.remove(sources[1])
        problem = "the name and its tag are one word"
        return UsageError(str(command.name), problem, f"Write `{context.command_path} {shlex.join(line)}`")
    place = sources.pop() if command.name in _WITH_PLACE else ""
    problem = "takes one adapter, and a name for it" if place else "takes one adapter"
    return UsageError(str(command.name), problem, f"Write {_loop(context.command_path, words, sources, place)}")


def _is_name_and_tag(words: Sequence[str]) -> bool:
    """Return whether words are `team/sql prod`, as other commands take a tag of its own."""
    return len(words) == 2 and is_name(words[0]) and is_tag(words[1]) and not Path(words[1]).exists()


def hint_at_names(error: AdapterhubError, context: click.Context, words: Sequence[str]) -> None:
    """Replace the hint of an error about a pattern, or about a namespace to push to, by a command line that is accepted.

    Args:
        error: The error of the command.
        context: The context of the program.
        words: The words of the command line after the command's name.
    """
    program = context.command
    name = context.invoked_subcommand
    command = program.get_command(context, name) if isinstance(program, click.Group) and name else None
    if command is None or error.where not in words:
        return
    path = f"{context.command_path} {name}"
    is_place = command.name in _WITH_PLACE and error.where.endswith("/")
    pattern = "".join(words[: words.index(error.where)][-1:]) if is_place else error.where
    if error.code not in (_PLACE_CODES if is_place else _PATTERN_CODES):
        return
    if is_pattern(pattern) and not Path(pattern).exists():
        sources = _matches(pattern, context.ensure_object(Settings))
        reword(error)
        if not sources:
            options = "".join(f" {word}" for word in _place_words(words))
            error.hint = f"No adapter and no file matches {pattern}; `adapterhub list{options}` shows the adapters"
        elif _arguments(command)[0].nargs == -1:
            error.hint = f"Write `{path} {shlex.join(_replaced(words, pattern, sources))}`"
        elif _takes_one_adapter(command):
            place = error.where if is_place else "".join(words[words.index(pattern) + 1 :][: command.name in _WITH_PLACE])
            error.hint = f"Write {_loop(path, words, sources, place, pattern=pattern)}"
    elif is_place and (source := next((w for w in words if Path(w).exists()), "")):
        reword(error)
        sources = [str(folder) for folder in adapters_at(Path(source))]
        error.hint = f"Write {_loop(path, words, sources, error.where, pattern=source)}"


def _arguments(command: click.Command) -> list[click.Argument]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Argument)]


def _takes_one_adapter(command: click.Command) -> bool:
    """Return whether a command takes one adapter, which a loop could give it in turn."""
    arguments = _arguments(command)
    if not arguments or any(argument.nargs != 1 for argument in arguments):
        return False
    return command.name in _WITH_PLACE or (
        len(arguments) == 1 and arguments[0].name in _ADAPTERS and command.name not in _ALONE
    )


def _matches(pattern: str, settings: Settings) -> list[str]:
    """Return the names of the registry that match a pattern, at most one more than are shown, else the paths."""
    try:
        with workspace(settings).open_registry() as registry:
            names = dict.fromkeys(row.name for row in registry.list() if fnmatchcase(row.name, pattern))
    except AdapterhubError:
        names = {}
    return [*names][: _MAX_SOURCES + 1] or sorted(islice(iglob(pattern), _MAX_LISTED))


def _place_words(words: Sequence[str]) -> list[str]:
    """Return the options of a command line that say where its adapters are, with their values."""
    place = []
    for option in ("--registry", "--remote"):
        if option in words:
            value = "".join(words[words.index(option) + 1 :][:1])
            place += [option, *([shlex.quote(value)] if value and not value.startswith("-") and not is_pattern(value) else [])]
    return place


def _replaced(words: Sequence[str], word: str, names: Sequence[str]) -> list[str]:
    """Return words with names in the place of one of them."""
    position = words.index(word)
    return [*words[:position], *names[:_MAX_SOURCES], *words[position + 1 :]]


def _loop(path: str, words: Sequence[str], sources: Sequence[str], place: str, *, pattern: str = "") -> str:
    """Return a loop that gives a command each source in turn, and each result the last part of the source's name.

    Args:
        path: The program and the command.
        words: The words after them, with the sources, or with `pattern` in place of them.
        sources: The adapters.
        place: The word that is where the results go; empty for none.
    """
    sources = [source.rstrip("/") or source for source in sources]
    if len(sources) == 1:
        return f"`{path} {_in_turn(words, pattern, place, shlex.quote(sources[0]), shlex.quote(Path(sources[0]).name))}`"
    shown = _shell_pattern(sources) or shlex.join(sources[:_MAX_SOURCES]) + (" …" if sources[_MAX_SOURCES:] else "")
    replaced = {pattern} if pattern else {*sources, *(f"{source}/" for source in sources)}
    first = next(position for position, word in enumerate(words) if word in replaced)
    rest = [word for position, word in enumerate(words) if word not in replaced or position == first]
    return f"`for a in {shown}; do {path} {_in_turn(rest, words[first], place, _VARIABLE, _LAST_PART)}; done`"


def _shell_pattern(sources: Sequence[str]) -> str:
    """Return the pattern that a shell expands to these paths, if they are many, and all in one folder; else empty."""
    folder = Path(sources[0]).parent
    pattern = f"{shlex.quote(str(folder))}/*"
    if len(sources) < _MIN_PATTERN or not folder.is_dir():
        return ""
    names = sorted(name for name in islice(os.listdir(folder), _MAX_LISTED) if not name.startswith("."))
    return pattern if [str(folder / name) for name in names] == sorted(sources) else ""


def _in_turn(words: Sequence[str], source: str, place: str, variable: str, name: str) -> str:
    """Return words with a variable in the place of a source, and a name at the end of each place for a result."""
    line = []
    for position, word in enumerate(words):
        if word == source:
            line.append(variable)
        elif word == place or (position and words[position - 1] in ("-o", "--output")):
            line.append(f"{shlex.quote(word.rstrip('/') + '/')}{name}")
        else:
            line.append(shlex.quote(word))
    return " ".join(line)
