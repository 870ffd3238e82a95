"""Keys and passphrases of the commands that sign and verify."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub_converters.errors import ParameterError, UsageError

if TYPE_CHECKING:
    from adapterhub.trust.attestation import Attested
    from adapterhub.trust.keys import Signer

_LONGEST = 1024  # bytes of a passphrase; OpenSSL takes no more


@dataclass(frozen=True)
class Passphrase:
    """Where a passphrase comes from: stdin, or else a person on a terminal. No option takes it: others could see it."""

    wanted: bool
    from_stdin: bool

    def new(self) -> bytes | None:
        """The passphrase for a new key; None where none is wanted."""
        if self.from_stdin:
            return _line(sys.stdin.read(_LONGEST + 1))
        return self._asked(confirm=True) if self.wanted else None

    def existing(self) -> bytes | None:
        """The passphrase of a key, from stdin; None if it is not there."""
        return _line(sys.stdin.read(_LONGEST + 1)) if self.from_stdin else None

    def _asked(self, *, confirm: bool = False) -> bytes:
        if not sys.stdin.isatty():
            raise UsageError(
                "passphrase", "is missing, and there is no terminal to ask on", "Pipe it in with --passphrase-stdin"
            )
        return _line(str(click.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)))

    def asked(self) -> bytes:
        """The passphrase of a key that is encrypted, from a terminal."""
        return self._asked()


def _line(text: str) -> bytes:
    secret = text.removesuffix("\n").removesuffix("\r").encode()
    if not secret or len(secret) > _LONGEST or b"\n" in secret:
        raise UsageError("passphrase", f"is empty, not one line, or over {_LONGEST} bytes", "Pass it as a single line")
    return secret


def private_key(path: Path, passphrase: Passphrase) -> Signer:
    """Read a private key, or find one in hardware; a person is asked for the passphrase or the PIN that it needs."""
    from adapterhub.trust import signers

    try:
        return signers.read(path, passphrase.existing())
    except ParameterError as error:
        if error.code != "passphrase-required":
            raise
    return signers.read(path, passphrase.asked())


def attested(one: Attested) -> dict[str, object]:
    """An attestation as JSON."""
    return {
        "kind": one.kind or None,
        "type": one.attestation.type,
        "key": one.key.id,
        "predicate": one.predicate,
    }


_OPTIONS = (
    click.option("--passphrase", "wanted", is_flag=True, help="Encrypt the key with a passphrase, asked for on a terminal."),
    click.option(
        "--passphrase-stdin",
        "from_stdin",
        is_flag=True,
        help="Read the passphrase of the key, or the PIN of its hardware, from stdin.",
    ),
)


def passphrase_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option for a passphrase, as the argument `passphrase`; `new` ones can also be asked for."""

    @functools.wraps(function)
    def call(*args: Any, wanted: bool = False, from_stdin: bool, **kwargs: Any) -> Any:
        return function(*args, passphrase=Passphrase(wanted, from_stdin), **kwargs)

    return _OPTIONS[1](call)


def new_passphrase_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `passphrase_options`, with the one that asks for it."""
    return _OPTIONS[0](passphrase_options(function))


own_key = click.option(
    "--key",
    metavar="PEM",
    required=True,
    type=click.Path(path_type=Path),
    help="Key, in PEM: your private one, or the pkcs11: URI of one in hardware.",
)
accepted_keys = click.option(
    "--key",
    "keys",
    metavar="PEM",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Key, in PEM: a public one that must have signed it, or a folder of them; repeatable.",
)
parent_keys = click.option(
    "--parent-key",
    "parents",
    metavar="PEM",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Key, in PEM: a public one that must have signed each parent of a merge; repeatable. [default: that of --key]",
)
signed_as = click.option("--signed-as", metavar="NAME", help="Accept a signature for another name.")
