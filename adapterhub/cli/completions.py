"""The words that a shell completes at TAB: refs, remotes and names of other kinds.

`commands/completion.py` prints the script by which a shell asks for them.
"""

from __future__ import annotations

import string
from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem

from adapterhub_converters.errors import AdapterhubError

from . import environment
from .options import Settings
from .registry_choice import open_registry

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
    try:
        with open_registry(context.find_object(Settings) or Settings()) as registry:
            rows = registry.list()
    except AdapterhubError:
        return []
    return completions({str(row.ref) for row in rows} | {row.name for row in rows}, typed)


def complete_remote(_context: click.Context, _parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the remotes that begin with the typed text, for a shell."""
    try:
        return completions(environment.remotes(), typed)
    except AdapterhubError:
        return []
