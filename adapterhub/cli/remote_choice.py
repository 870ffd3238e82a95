"""The remote that `--remote` or a URL names, the option itself, and the addresses of refs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from adapterhub.operations.workspace import Workspace
from adapterhub_converters.errors import AdapterhubError, NotFoundError, UsageError

from . import environment, errors

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from adapterhub.remotes.named_remotes import Remote

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT = ""
"""The value of --remote without a name."""


def remote(name: str) -> Remote:
    """Return a remote by its name, or the default one for an empty name."""
    named_remotes = environment.remotes()
    remote_name = name or environment.default_remote()
    hint = (
        f"Name one of {', '.join(named_remotes)}"
        if named_remotes
        else "Add one with `adapterhub remote add NAME URL --default`"
    )
    if not remote_name:
        raise UsageError("--remote", "there is no default remote", hint)
    if remote_name not in named_remotes:
        raise NotFoundError(remote_name[:80], "no remote of this name", hint)
    from adapterhub.remotes.named_remotes import check_url

    # People edit these files, so a URL is checked when it is used.
    check_url(named_remotes[remote_name].url)
    return named_remotes[remote_name]


def trusted_remote(name: str) -> Remote:
    """Return a remote as `remote` does, to send requests to.

    Raises:
        RefusedError: Only the project names the host of the remote.
    """
    named_remote = remote(name)
    if (project_settings := environment.project()) and named_remote.path == project_settings.path:
        from adapterhub.remotes.named_remotes import unused_address

        Workspace(trusts=environment.trusts).admitted_address(unused_address(named_remote.url), named_remote.path)
    return named_remote


def remote_at(text: str) -> Remote:
    """Return a remote by its name or its URL, to send requests to; the default one for an empty text.

    A remote by its URL has no name.
    """
    from adapterhub.remotes.named_remotes import Remote, check_url

    return Remote("", check_url(text), Path()) if "://" in text else trusted_remote(text)


def ref_at_remote(ref: str, name: str | None) -> str:
    """Return the address of a ref on the remote that --remote names; the ref itself without the option."""
    if name is None:
        return ref
    from adapterhub.remotes.named_remotes import address_below

    return address_below(trusted_remote(name).url, ref)


def place_words(name: str | None) -> str:
    """Return --remote, else --registry, as they were given, after a blank, for a command that a message shows."""
    return errors.registry_words() if name is None else f" --remote {name}".rstrip()


def source_at_remote(text: str, name: str | None) -> str:
    """Return what `ref_at_remote` does; but an address, or a path that is written as one, like ./sql, unchanged."""
    from adapterhub.remotes.address_schemes import is_address

    return text if name is None or is_address(text) or text.startswith((".", "/")) else ref_at_remote(text, name)


def _check_remote_name(_context: click.Context, _option: click.Parameter, name: str | None) -> str | None:
    # An eager callback, because it must run before arguments are counted: a REF that was parsed as the name would be reported
    # as missing.
    if name and ("/" in name or ":" in name):
        hint = "Give an address without --remote" if "://" in name else "Write --remote last, or --remote NAME"
        raise UsageError(name[:80], "cannot be the name of a remote", hint)
    return name


def _check_remote_name_or_url(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    return value if value and "://" in value else _check_remote_name(context, option, value)


def _complete_remote(context: click.Context, parameter: click.Parameter, typed: str) -> Sequence[CompletionItem]:
    from .completions import complete_remote  # late: no other run needs it

    return complete_remote(context, parameter, typed)


def _remote_option(
    help_text: str, check: Callable[[click.Context, click.Parameter, str | None], str | None]
) -> Callable[[F], F]:
    return click.option(
        "--remote",
        metavar="[NAME]",
        is_flag=False,
        flag_value=DEFAULT,
        is_eager=True,
        callback=check,
        shell_complete=_complete_remote,
        help=help_text,
    )


remote_option = _remote_option("REF is on this remote; without NAME, on the default one.", _check_remote_name)

served_remote_option = _remote_option(
    "REF is looked up on this remote, a name or a URL; without NAME, on the default one.", _check_remote_name_or_url
)


@contextmanager
def hint_default_remote(source: str) -> Iterator[None]:
    """Add to the error for a ref that the registry doesn't have how to ask the default remote; not for an address."""
    from adapterhub.remotes.address_schemes import is_address

    try:
        yield
    except NotFoundError as error:
        with suppress(AdapterhubError):
            if not is_address(source) and (name := environment.default_remote()) and name in environment.remotes():
                errors.add_hint(error, f"`--remote` asks {name}", separator="; ")
        raise
