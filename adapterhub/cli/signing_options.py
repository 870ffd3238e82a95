"""Options for signers, keys and passphrases of the commands that sign and verify."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from adapterhub.identity import Identity
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import ParameterError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from adapterhub.trust.attestation import VerifiedAttestation
    from adapterhub.trust.keys import Signer, TrustedSigner

_MAX_PASSPHRASE = 1024  # bytes of a passphrase; OpenSSL takes no more
_MAX_TOKEN = 64 << 10  # bytes of an identity token


@dataclass(frozen=True)
class Passphrase:
    """A source of a passphrase: stdin, or else a person on a terminal.

    No option takes the passphrase itself: others on the machine could read it.
    """

    for_new_key: bool
    from_stdin: bool

    def new(self) -> bytes | None:
        """Return the passphrase for a new key; None if none is wanted."""
        if self.from_stdin:
            return _line(sys.stdin.read(_MAX_PASSPHRASE + 1))
        # Asked twice: a mistyped passphrase would make the key useless.
        return self._prompt(confirm=True) if self.for_new_key else None

    def existing(self) -> bytes | None:
        """Return the passphrase of a key, from stdin; None if it is not passed there."""
        return _line(sys.stdin.read(_MAX_PASSPHRASE + 1)) if self.from_stdin else None

    def _prompt(self, *, confirm: bool = False) -> bytes:
        if not sys.stdin.isatty():
            raise UsageError(
                "passphrase", "is missing, and there is no terminal to ask on", "Pipe it in with --passphrase-stdin"
            )
        return _line(str(click.prompt("Passphrase", hide_input=True, confirmation_prompt=confirm, err=True)))

    def from_terminal(self) -> bytes:
        """Ask on a terminal for the passphrase of an encrypted key."""
        return self._prompt()


def _line(text: str) -> bytes:
    secret = text.removesuffix("\n").removesuffix("\r").encode()
    if not secret or len(secret) > _MAX_PASSPHRASE or b"\n" in secret:
        raise UsageError("passphrase", f"is empty, not one line, or over {_MAX_PASSPHRASE} bytes", "Pass it as a single line")
    return secret


@dataclass(frozen=True)
class SignerOption:
    """The signer that the options of a command name.

    Attributes:
        key: The path of a private key, or the URI of one in hardware; None to sign by an identity.
        token_file: The file of an identity token, `-` for stdin; None for the token of the machine.
    """

    key: Path | None
    passphrase: Passphrase
    token_file: str | None = None
    trust_config: Path | None = None

    def read(self) -> Signer:
        """Read the key, asking on a terminal for its passphrase or PIN; without a key, get the identity's token."""
        from adapterhub.trust import signers

        if self.key is None:
            return self._keyless()
        try:
            # Only the key tells whether it needs a passphrase, so a person is not asked before.
            return signers.read(self.key, self.passphrase.existing())
        except ParameterError as error:
            if error.code != "passphrase-required":
                raise
        return signers.read(self.key, self.passphrase.from_terminal())

    def renewed(self, signer: Signer) -> Signer:
        """Return `signer`, which `read` returned, with the identity's present token: they expire while a model is trained."""
        is_on_stdin = self.token_file == "-"  # noqa: S105 - not a password
        return signer if self.key is not None or is_on_stdin else self._keyless()

    def _keyless(self) -> Signer:
        from adapterhub.trust import keyless

        source = self.token_file
        if source is None:
            token = keyless.ambient_token() or ""
        else:
            token = sys.stdin.read(_MAX_TOKEN) if source == "-" else json_file.read_text(Path(source), _MAX_TOKEN)
        if not token.strip():
            problem = "is missing, and this machine gives its jobs none"
            raise UsageError("identity token", problem, "Pass its file as --identity-token, or run it in a job that has one")
        return keyless.KeylessSigner(token.strip(), self.trust_config)


def attestation_document(attestation: VerifiedAttestation) -> dict[str, object]:
    """Return an attestation as JSON."""
    return {
        "kind": attestation.kind or None,
        "type": attestation.attestation.type,
        "predicate": attestation.predicate,
        "signer": attestation.signer.document(),
    }


def signer_line(signer: TrustedSigner) -> str:
    """Return a signer in a line: a key with its file, or an identity."""
    return signer.title if isinstance(signer, Identity) else f"{signer.source} ({signer.kind} key {signer.id[:16]}…)"


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
    """Add the option for a passphrase, as the argument `passphrase`."""

    @functools.wraps(function)
    def call(*args: Any, wanted: bool = False, from_stdin: bool, **kwargs: Any) -> Any:
        return function(*args, passphrase=Passphrase(wanted, from_stdin), **kwargs)

    return _OPTIONS[1](call)


def new_passphrase_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `passphrase_options`, and the one that asks for a new passphrase."""
    return _OPTIONS[0](passphrase_options(function))


_trust_config = click.option(
    "--trust-config",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Trust config, in JSON, of a private Sigstore. [default: the public one]",
)
_SIGNER_OPTIONS = (
    click.option(
        "--key",
        metavar="PEM",
        type=click.Path(path_type=Path),
        help="Key, in PEM: your private one, or the pkcs11: URI of one in hardware.",
    ),
    click.option("--keyless", is_flag=True, help="Sign by your identity, which Sigstore certifies and its log publishes."),
    click.option(
        "--identity-token",
        "token",
        metavar="FILE",
        help="Identity token of --keyless: a file, or - for stdin. [default: the machine's, as CI systems have it]",
    ),
    _trust_config,
    passphrase_options,
)


def required_signer(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for the user's signer, as the argument `signer`."""
    return _signer_argument(function, is_required=True)


def optional_signer(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for the user's signer, as the argument `signer`; None if none is named."""
    return _signer_argument(function, is_required=False)


def _signer_argument(function: Callable[..., Any], *, is_required: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(
        *args: Any,
        key: Path | None,
        keyless: bool,
        token: str | None,
        trust_config: Path | None,
        passphrase: Passphrase,
        **kwargs: Any,
    ) -> Any:
        if (is_required or key is not None) and (key is None) != keyless:
            raise UsageError("--key or --keyless", "one of them is required", "Pass the one that names the signer")
        if (token or trust_config) and not keyless:
            raise UsageError(
                "--identity-token and --trust-config", "require --keyless", "Pass --keyless too", code="conflicting-options"
            )
        signer = SignerOption(key, passphrase, token, trust_config) if key is not None or keyless else None
        return function(*args, signer=signer, **kwargs)

    return functools.reduce(lambda command_, option: option(command_), reversed(_SIGNER_OPTIONS), call)


_ACCEPTED_SIGNER_OPTIONS = (
    click.option(
        "--key",
        "keys",
        metavar="PEM",
        multiple=True,
        type=click.Path(path_type=Path),
        help="Key, in PEM: a public one that must have signed it, or a folder of them; repeatable.",
    ),
    click.option(
        "--identity",
        metavar="WHO",
        help="Identity that must have signed it: an email address or a URI, as in its Sigstore certificate.",
    ),
    click.option("--issuer", metavar="URL", help="Issuer of the tokens of --identity."),
    _trust_config,
)


def accepted_signers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options for the accepted signers, as the argument `keys`: paths and an identity."""

    @functools.wraps(function)
    def call(
        *args: Any, keys: tuple[Path, ...], identity: str | None, issuer: str | None, trust_config: Path | None, **kwargs: Any
    ) -> Any:
        if (identity is None) != (issuer is None):
            raise UsageError(
                "--identity and --issuer", "require each other", "Pass both, or neither", code="conflicting-options"
            )
        if trust_config and identity is None:
            raise UsageError("--trust-config", "requires --identity", "Pass --identity too", code="conflicting-options")
        identities = (Identity(identity, issuer, trust_config),) if identity is not None and issuer is not None else ()
        return function(*args, keys=(*keys, *identities), **kwargs)

    return functools.reduce(lambda command_, option: option(command_), reversed(_ACCEPTED_SIGNER_OPTIONS), call)


parent_keys = click.option(
    "--parent-key",
    "parents",
    metavar="PEM",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Key, in PEM: a public one that must have signed each parent of a merge; repeatable. [default: --key]",
)
signed_as = click.option("--signed-as", metavar="NAME", help="Accept a signature for another name.")
