"""Signers that a user has accepted for a namespace: from then on, everything from there must be signed by one of them.

They are kept in a file of lines `SCOPE KIND KEY`, as ssh keeps the keys of hosts: the namespace, and the key without the first
and last line of its PEM; for an identity, the name, the issuer and, of a private Sigstore, the path of its trust config, each
URL-encoded. This detects a namespace that somebody else took over after its owner had left.
"""

from __future__ import annotations

import binascii
from pathlib import Path
from urllib.parse import quote, unquote

from adapterhub import identity, user_files
from adapterhub.identity import Identity
from adapterhub_converters.errors import ParameterError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from .keys import TrustedSigner, parse_public

_HUGGING_FACE = "huggingface.co"
# Schemes whose addresses begin with a bucket or a path, not with a host.
_OWN_PLACES = ("s3", "gs", "az", "file", "layout")
_HEAD = "# Who signs what comes from where, one key a line. Remove a line to forget it.\n"
_BEGIN, _END = "-----BEGIN PUBLIC KEY-----\n", "\n-----END PUBLIC KEY-----\n"


@dataclass(frozen=True)
class KnownSigners:
    """The signers in a file, which need not exist."""

    path: Path

    def signers_of(self, scope: str) -> list[TrustedSigner]:
        """Return the signers that are known for a namespace."""
        lines, place = user_files.read(self.path).splitlines(), _place(scope)
        return [_parse_line(line, self.path) for line in lines if _place(line.split(" ")[0]) == place]

    def keep(self, scope: str, signer: TrustedSigner) -> bool:
        """Remember a signer of a namespace; return False if it was known already."""
        # A line is appended rather than replaced: a namespace may have several signers.
        line = f"{scope} {signer.kind} {_key_text(signer)}\n"
        return user_files.change(self.path, lambda text: None if line in text else (text or _HEAD) + line)


def _place(scope: str) -> str:
    """Return the place of a namespace, by whatever protocol its address names it; a namespace without an address as it is."""
    scheme, is_address, rest = scope.partition("://")
    if not is_address or scheme in _OWN_PLACES:
        return scope
    host, slash, path = f"{_HUGGING_FACE}/{rest}".partition("/") if scheme == "hf" else rest.partition("/")
    host = host.lower()
    for port in (":443", ":80"):
        host = host.removesuffix(port)
    return f"//{host}{slash}{path}"


def _key_text(signer: TrustedSigner) -> str:
    """Return the text of a signer in a line of the file."""
    if not isinstance(signer, Identity):
        return "".join(signer.pem.decode().splitlines()[1:-1])
    config = [str(signer.trust_config.absolute())] if signer.trust_config else []
    return " ".join(quote(part, safe="/:@") for part in (signer.name, signer.issuer, *config))


def _parse_line(line: str, path: Path) -> TrustedSigner:
    """Parse a line of the file."""
    try:
        _scope, kind, *parts = line.split(" ")
        if kind == identity.KIND:
            name, issuer, *config = map(unquote, parts)
            if len(config) > 1:
                raise ValueError(config)
            return Identity(name, issuer, Path(config[0]) if config else None)
        (key,) = parts
        binascii.a2b_base64(key, strict_mode=True)
    except (ValueError, ParameterError) as error:  # an error, because skipping a damaged line would accept any signer
        raise UsageError(str(path), f"{line[:80]!r} is not a namespace, a kind and a key", "Remove the line") from error
    return parse_public(f"{_BEGIN}{key}{_END}", str(path))
