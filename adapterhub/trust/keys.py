"""Keys of signers, in PEM: ECDSA on P-256, P-384 and P-521, as in OpenSSF model signing, and Ed25519.

The algorithm of a signature follows from the key that the verifier trusts, never from what was signed.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Union

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from adapterhub import user_files
from adapterhub.identity import Identity
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import (
    FormatError,
    LocalIOError,
    NotFoundError,
    OutputExistsError,
    ParameterError,
    RefusedError,
    UsageError,
)
from adapterhub_converters.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from .keyless import KeylessSigner

_CURVES: dict[str, tuple[type[ec.EllipticCurve], type[hashes.HashAlgorithm]]] = {
    "p256": (ec.SECP256R1, hashes.SHA256),
    "p384": (ec.SECP384R1, hashes.SHA384),
    "p521": (ec.SECP521R1, hashes.SHA512),
}
"""The curve and the hash of signatures by each kind of key (sigstore, `PublicKeyDetails`)."""
ED25519 = "ed25519"
KINDS = (*_CURVES, ED25519)
PUBLIC_SUFFIXES = (".pem", ".pub")
_MAX_KEY, _MAX_KEYS = 64 << 10, 1000  # bytes of a file; files in a folder, and in all sources together
_PEM = "-----BEGIN "
_HINT = f"Pass a key in PEM: {', '.join(KINDS)}"

_Public = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
_Private = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@dataclass(frozen=True, eq=False)
class PublicKey:
    """The key of a trusted signer.

    Attributes:
        source: The file that it was read from.
    """

    source: str
    _key: _Public

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return _kind_of(self._key, self.source)

    @property
    def pem(self) -> bytes:
        """The key as a PEM file."""
        return self._key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)

    @property
    def id(self) -> str:
        """The sha256 of the PEM in hexadecimal digits, by which a bundle names its key."""
        return hashlib.sha256(self.pem).hexdigest()

    @property
    def hints(self) -> tuple[str, str]:
        """What bundles name the key by: model_signing its id, cosign the sha256 of its DER in base64."""
        der = self._key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        return self.id, base64.b64encode(hashlib.sha256(der).digest()).decode()

    @property
    def title(self) -> str:
        """A phrase that names the key in a sentence."""
        return f"the {self.kind} key {self.id[:16]}…"

    def document(self) -> dict[str, str | None]:
        """Return the signer as JSON."""
        return {"key": self.id, "type": self.kind}

    def verifies(self, signature: bytes, message: bytes) -> bool:
        """Return whether a signature of a message is by this key."""
        try:
            if isinstance(self._key, ed25519.Ed25519PublicKey):
                self._key.verify(signature, message)
            else:
                self._key.verify(signature, message, ec.ECDSA(_CURVES[self.kind][1]()))
        except InvalidSignature:
            return False
        return True


TrustedSigner = PublicKey | Identity
"""A trusted signer: the owner of a key, or an identity certified by Sigstore."""


class KeySigner(Protocol):
    """A signing key, wherever it is stored."""

    @property
    def public(self) -> PublicKey:
        """The key that verifies its signatures."""

    def sign(self, message: bytes) -> bytes:
        """Return the signature of a message: DER for ECDSA, 64 bytes for Ed25519."""


@dataclass(frozen=True, eq=False, repr=False)
class PrivateKey:
    """A signing key from a file."""

    source: str
    _key: _Private

    @property
    def public(self) -> PublicKey:
        """The key that verifies its signatures."""
        return PublicKey(self.source, self._key.public_key())

    def sign(self, message: bytes) -> bytes:
        """Return the signature of a message: DER for ECDSA, 64 bytes for Ed25519."""
        if isinstance(self._key, ed25519.Ed25519PrivateKey):
            return self._key.sign(message)
        return self._key.sign(message, ec.ECDSA(_CURVES[self.public.kind][1]()))


Signer = Union[KeySigner, "KeylessSigner"]
"""Anything that signs: a private key, or an identity."""


def _kind_of(key: object, location: str) -> str:
    """Return the kind of a key; RefusedError for an unsupported one."""
    if isinstance(key, ed25519.Ed25519PublicKey | ed25519.Ed25519PrivateKey):
        return ED25519
    curve = getattr(key, "curve", None)
    for kind, (curve_class, _) in _CURVES.items():
        if isinstance(curve, curve_class):
            return kind
    raise RefusedError(
        location, f"a key of the kind {getattr(curve, 'name', type(key).__name__)}, which is not supported", _HINT
    )


# ---- generating


def generate(path: Path, kind: str = "p256", passphrase: bytes | None = None) -> tuple[Path, PublicKey]:
    """Write a new pair of keys, `PATH.key`, which only its owner can read, and `PATH.pub`.

    Args:
        path: The files without their suffixes.
        kind: One of `KINDS`.
        passphrase: Encrypts the private key; None leaves it unencrypted.

    Returns:
        The path of the private key, and the public key.

    Raises:
        OutputExistsError: One of the files exists.
    """
    if kind not in KINDS:
        raise ParameterError("kind", f"unknown kind of key {kind!r}", f"Known kinds: {', '.join(KINDS)}")
    key: _Private = ed25519.Ed25519PrivateKey.generate() if kind == ED25519 else ec.generate_private_key(_CURVES[kind][0]())
    private_path, public_path = path.with_name(f"{path.name}.key"), path.with_name(f"{path.name}.pub")
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    public_key = PublicKey(str(public_path), key.public_key())
    # Checked for both files before either is written, so that no pair is left half written.
    for file in (private_path, public_path):
        if file.exists() or file.is_symlink():
            raise OutputExistsError(str(file))
    _write_new(private_path, pem, private=True)
    _write_new(public_path, public_key.pem)
    return private_path, public_key


def _write_new(path: Path, pem: bytes, *, private: bool = False) -> None:
    """Write a key into a new file; OutputExistsError if it exists by now."""

    def new_text(old: str) -> str:
        if old:
            raise OutputExistsError(str(path))
        return pem.decode()

    user_files.change(path, new_text, private=private, follow=False)


# ---- reading


def read_private(path: Path, passphrase: bytes | None = None) -> PrivateKey:
    """Read a private key that only its owner can read.

    Raises:
        ParameterError: It is encrypted and the passphrase is missing (code `passphrase-required`) or wrong, or it is not
            encrypted but a passphrase is given.
        LocalIOError: Others can read the file.
    """
    text = _one_pem(user_files.read(path, private=True), str(path))
    try:
        key = serialization.load_pem_private_key(text.encode(), passphrase)
    except TypeError as error:
        if passphrase is None:
            problem = f"{path} is encrypted"
            raise ParameterError("passphrase", problem, "Pass its passphrase", code="passphrase-required") from error
        raise ParameterError("passphrase", f"{path} is not encrypted", "Leave it out") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        # A wrong passphrase and a malformed key raise the same error; only the text tells them apart.
        if passphrase is not None and "ENCRYPTED" in text:
            raise ParameterError("passphrase", f"is not that of {path}", "Try again") from error
        raise FormatError(str(path), "not a private key in PEM", _HINT) from error
    _kind_of(key, str(path))
    return PrivateKey(str(path), key)  # type: ignore[arg-type]  # one of the kinds above


def read_public(path: Path) -> PublicKey:
    """Read a public key; RefusedError for an unsupported kind, and for a private key."""
    return parse_public(json_file.read_text(path, _MAX_KEY), str(path))


def parse_public(text: str, location: str) -> PublicKey:
    """Parse the PEM of a public key."""
    text = _one_pem(text, location)
    # Refused rather than used: a private key does not belong where public keys are kept.
    if "PRIVATE KEY" in text:
        raise RefusedError(location, "a private key, where a public one is required", "Pass the public key that belongs to it")
    try:
        key = serialization.load_pem_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormatError(location, "not a public key in PEM", _HINT) from error
    _kind_of(key, location)
    return PublicKey(location, key)  # type: ignore[arg-type]  # one of the kinds above


def _one_pem(text: str, location: str) -> str:
    """Return `text` if it has exactly one PEM block."""
    if not text:
        raise NotFoundError(location, "no such key", "Generate a pair of keys first")
    if text.count(_PEM) != 1:  # a second key would be ignored silently
        raise FormatError(location, f"{text.count(_PEM)} keys in PEM where one is expected", _HINT)
    return text


_SignerSource = str | os.PathLike[str] | Identity


def read_trusted(signers: _SignerSource | Iterable[_SignerSource]) -> Sequence[TrustedSigner]:
    """Read the public keys in files, and in folders those named *.pub or *.pem; identities are returned as they are."""
    several = [signers] if isinstance(signers, str | os.PathLike | Identity) else signers
    sources = list(dict.fromkeys(signer if isinstance(signer, Identity) else Path(signer) for signer in several))
    files = {file: None for path in sources if isinstance(path, Path) for file in _key_files(path)}
    if len(files) > _MAX_KEYS:
        raise UsageError(
            str(next(iter(files))), f"{len(files)} keys, over the limit of {_MAX_KEYS}", "Name fewer folders of keys"
        )
    # Each key once, even if several files have it.
    public_keys: dict[str, PublicKey] = {}
    for key in map(read_public, files):
        public_keys.setdefault(key.id, key)
    return [*public_keys.values(), *(source for source in sources if isinstance(source, Identity))]


def _key_files(path: Path) -> list[Path]:
    """Return the files of public keys that a path names, sorted by name."""
    if not path.is_dir():
        return [path]
    try:
        files = sorted(file for file in path.iterdir() if file.suffix in PUBLIC_SUFFIXES)
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error
    if not files or len(files) > _MAX_KEYS:
        problem = f"{len(files)} keys, over the limit of {_MAX_KEYS}" if files else "no public key in it, *.pub or *.pem"
        raise UsageError(str(path), problem, "Name a folder of public keys")
    return files
