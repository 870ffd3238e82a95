"""Signers: a key in a file, or a key that never leaves its hardware, through PKCS #11.

A key in hardware is named by a URI (RFC 7512) that also names the vendor's library, which is loaded into this process:

    pkcs11:token=team;object=release?module-path=/usr/lib/softhsm/libsofthsm2.so

Only ECDSA on the curves of `keys` is used: the digest is computed here, and the hardware signs it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import utils

from adapterhub_converters.errors import LocalIOError, NotFoundError, ParameterError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import keys
from .keys import PublicKey

if TYPE_CHECKING:
    from .keys import Signer

SCHEME = "pkcs11:"
_PATH_ATTRIBUTES, _QUERY_ATTRIBUTES = ("token", "serial", "object", "id"), ("module-path",)
_HASHES = {"p256": hashlib.sha256, "p384": hashlib.sha384, "p521": hashlib.sha512}
_HINT = "Write it like pkcs11:token=NAME;object=NAME?module-path=/usr/lib/LIBRARY.so"


def read(key: str | os.PathLike[str] | Signer, passphrase: bytes | None = None) -> Signer:
    """Return the signer that a path or the URI of a key in hardware names; a signer is returned as it is.

    Args:
        key: A private key in PEM, or `pkcs11:…`.
        passphrase: The passphrase of the key, or the PIN of its token.

    Raises:
        ParameterError: The passphrase or the PIN is missing (code `passphrase-required`) or wrong.
        NotFoundError: There is no such token, or no such key.
    """
    if not isinstance(key, str | os.PathLike):
        return key
    text = os.fspath(key)
    return HardwareKey.find(text, passphrase) if text.startswith(SCHEME) else keys.read_private(Path(text), passphrase)


@dataclass(frozen=True)
class _Uri:
    """The parts of a PKCS #11 URI, as bytes where any are allowed."""

    text: str
    module: str
    token: dict[str, Any]
    key: dict[str, Any]


def _parse(text: str) -> _Uri:
    """Parse a PKCS #11 URI, refusing what would be ignored."""
    # Searched before anything is parsed, so that no error quotes the PIN.
    before, pin, _ = text.partition("pin-value=")
    if pin:
        raise UsageError(f"{before[:200]}{pin}…", "a PIN in a URI ends up in logs", "Leave pin-value out; the PIN is asked for")
    path, _, query = text.removeprefix(SCHEME).partition("?")
    attributes: dict[str, bytes] = {}
    for supported, part, separator in ((_PATH_ATTRIBUTES, path, ";"), (_QUERY_ATTRIBUTES, query, "&")):
        for attribute in part.split(separator) if part else ():
            name, equals, value = attribute.partition("=")
            if name not in supported:
                raise UsageError(text[:200], f"{name[:80]!r} is not supported, only {', '.join(supported)}", _HINT)
            if not equals or name in attributes:
                raise UsageError(text[:200], f"{name!r} {'is given twice' if equals else 'has no value'}", _HINT)
            attributes[name] = unquote_to_bytes(value)
    try:
        texts = {name: value.decode() for name, value in attributes.items() if name != "id"}
    except UnicodeDecodeError as error:
        raise UsageError(text[:200], "is not UTF-8", _HINT) from error
    if "module-path" not in texts or not {"token", "serial"} & texts.keys() or not {"object", "id"} & attributes.keys():
        raise UsageError(text[:200], "does not name a library, a token and a key", _HINT)
    token = {"token_label": texts.get("token"), "token_serial": attributes.get("serial")}
    key = {"label": texts.get("object"), "id": attributes.get("id")}
    return _Uri(text, texts["module-path"], *({k: v for k, v in part.items() if v is not None} for part in (token, key)))


@dataclass(frozen=True, eq=False, repr=False)
class HardwareKey:
    """A signing key that never leaves its hardware; each signature opens its own session."""

    uri: _Uri
    public: PublicKey
    _pin: bytes = field(repr=False)

    @classmethod
    def find(cls, text: str, pin: bytes | None) -> HardwareKey:
        """Look up a key; raises the errors of `read`."""
        uri = _parse(text)
        if pin is None:
            raise ParameterError("passphrase", f"{text} needs its PIN", "Pass it", code="passphrase-required")
        # The public half is read from the token once; signing needs it to choose the hash.
        with _session(uri, pin) as (session, pkcs11):
            from pkcs11.util.ec import encode_ec_public_key

            public = session.get_key(object_class=pkcs11.ObjectClass.PUBLIC_KEY, key_type=pkcs11.KeyType.EC, **uri.key)
            key = serialization.load_der_public_key(encode_ec_public_key(public))
        public_key = PublicKey(text, key)  # type: ignore[arg-type]  # a curve that is not known is refused by its kind
        # Read only to refuse an unsupported curve now rather than at the first signature.
        _ = public_key.kind
        return cls(uri, public_key, pin)

    def sign(self, message: bytes) -> bytes:
        """Return the DER signature of a message."""
        digest = _HASHES[self.public.kind](message).digest()
        with _session(self.uri, self._pin) as (session, pkcs11):
            key = session.get_key(object_class=pkcs11.ObjectClass.PRIVATE_KEY, key_type=pkcs11.KeyType.EC, **self.uri.key)
            raw = key.sign(digest, mechanism=pkcs11.Mechanism.ECDSA)
        # PKCS #11 returns r and s side by side; bundles have the DER form.
        half = len(raw) // 2
        return utils.encode_dss_signature(int.from_bytes(raw[:half]), int.from_bytes(raw[half:]))


@contextmanager
def _session(uri: _Uri, pin: bytes) -> Iterator[tuple[Any, Any]]:
    """Yield a logged-in session of a token and the package `pkcs11`, closing the session at the end."""
    import pkcs11
    from pkcs11 import exceptions

    try:
        with pkcs11.lib(uri.module).get_token(**uri.token).open(user_pin=pin.decode("utf-8", "replace")) as session:
            yield session, pkcs11
    except (exceptions.PinIncorrect, exceptions.PinInvalid, exceptions.PinLenRange) as error:
        raise ParameterError(
            "passphrase", f"is not the PIN of {uri.text}", "Try again; a token locks after some tries"
        ) from error
    except (exceptions.NoSuchToken, exceptions.NoSuchKey, exceptions.MultipleTokensReturned) as error:
        raise NotFoundError(
            uri.text, "no such token, or no such key on it, or several", "List them with its own tool"
        ) from error
    except exceptions.PKCS11Error as error:
        raise LocalIOError(uri.text, f"{type(error).__name__} {str(error)[:200]}".strip()) from error
