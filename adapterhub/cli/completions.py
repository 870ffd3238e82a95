"""The words that a shell completes at TAB: refs, remotes, bases, tags, files and names of other kinds.

`commands/completion.py` prints the script by which a shell asks for them. What a parameter takes is known by its metavar.
"""

from __future__ import annotations

import os
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import click
from click.shell_completion import CompletionItem

from adapterhub_converters.errors import AdapterhubError

from . import environment
from .options import Settings
from .registry_choice import open_registry

if TYPE_CHECKING:
    from adapterhub.registry.registry import Registry

_T = TypeVar("_T")

# Characters of a word that no shell interprets.
_PLAIN = frozenset(f"{string.ascii_letters}{string.digits}._:/@-")


def completions(names: Iterable[str], typed: str) -> list[CompletionItem]:
    """Return the names that begin with the typed text.

    They come from the files of a clone, and the shell shows them and puts them into its line as they are. Names that could
    control the terminal or run a command there are left out.
    """
    return [CompletionItem(name) for name in sorted(names) if name.startswith(typed) and _PLAIN.issuperset(name)]


def complete_ref(context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the refs that begin with the typed text, for a shell."""
    rows = _from_registry(context, lambda registry: registry.list())
    return completions({str(row.ref) for row in rows} | {row.name for row in rows}, typed)


def _complete_tagged_ref(context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the refs that begin with the typed text; once a name is written, by its tags too."""
    rows = _from_registry(context, lambda registry: registry.list())
    tagged = {f"{row.name}:{tag}" for row in rows for tag in row.tags} if ":" in typed else set()
    return completions({str(row.ref) for row in rows} | {row.name for row in rows} | tagged, typed)


def _complete_tag(context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the tags of the registry that begin with the typed text."""
    rows = _from_registry(context, lambda registry: registry.list())
    return completions({tag for row in rows for tag in row.tags}, typed)


def _complete_base(context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the names of bases in the registry that begin with the typed text, and files."""
    from adapterhub.bases import registered_bases

    return _files(typed) + completions(_from_registry(context, registered_bases.names), typed)


def _complete_source(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return refs that begin with the typed text, and files."""
    return _files(typed) + _complete_tagged_ref(context, parameter, typed)


def _from_registry(context: click.Context, read: Callable[[Registry], Sequence[_T]]) -> Sequence[_T]:
    """Return what is read from the registry; nothing if that fails, because a shell must not be disturbed."""
    try:
        with open_registry(context.find_object(Settings) or Settings()) as registry:
            return read(registry)
    except AdapterhubError:
        return ()


def _files(typed: str) -> list[CompletionItem]:
    """Return the item by which a shell completes paths. It comes first: click's script for bash drops the words before it."""
    return [CompletionItem(typed, type="file")]


def _complete_file(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    return _files(typed)


def _complete_folder(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    return [CompletionItem(typed, type="dir")]


def _complete_config(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the TOML files of a folder, where there are some; else any file."""
    folder, _, beginning = typed.rpartition("/")
    try:
        entries = [entry.name for entry in os.scandir(folder or ".") if entry.name.endswith(".toml") and entry.is_file()]
    except OSError:
        entries = []
    prefix = typed[: len(typed) - len(beginning)]
    return completions((f"{prefix}{name}" for name in entries), typed) or _files(typed)


def _complete_code(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    from .explained_codes import codes

    return completions(codes(), typed)


_COMPLETERS: Mapping[str, Callable[[click.Context, click.Parameter, str], list[CompletionItem]]] = {
    **dict.fromkeys(("SRC", "A", "B", "FROM", "TO"), _complete_source),
    **dict.fromkeys(("REF", "PREFIX"), _complete_tagged_ref),
    **dict.fromkeys(("FILE", "OUT", "DST", "PEM", "PNG", "FINETUNED"), _complete_file),
    "BASE": _complete_base,
    "CODE": _complete_code,
    "CONFIG": _complete_config,
    "DIR": _complete_folder,
    "TAG": _complete_tag,
}
"""First word of a metavar to what completes it, where the command names nothing else."""
# The same for parameters whose metavar means something else in other commands.
_OF_COMMANDS: Mapping[str, Mapping[str, Callable[[click.Context, click.Parameter, str], list[CompletionItem]]]] = {
    "base rm": {"NAME": _complete_base},
    "keep": {"NAME": complete_ref},
    "verify-merge": {"MODEL": _complete_file},
}


def complete_by_metavar(command: click.Command, path: str) -> None:
    """Let each parameter of a command, of the words `path`, and of those below it complete what its metavar names."""
    for name, inner in command.commands.items() if isinstance(command, click.Group) else ():
        complete_by_metavar(inner, f"{path} {name}")
    for parameter in command.params:
        metavar = (parameter.metavar or str(parameter.name).upper()).lstrip("[")
        word = metavar[: next((i for i, letter in enumerate(metavar) if not letter.isupper()), len(metavar))]
        completer = _OF_COMMANDS.get(path, {}).get(word) or _COMPLETERS.get(word)
        takes_value = not isinstance(parameter, click.Option) or not parameter.is_flag
        if completer and takes_value and parameter._custom_shell_complete is None and not metavar[len(word) :].startswith("="):
            parameter._custom_shell_complete = completer


def complete_remote(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the remotes that begin with the typed text, for a shell."""
    try:
        return completions(environment.remotes(), typed)
    except AdapterhubError:
        return []
