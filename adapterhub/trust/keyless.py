"""Signing and verifying by Sigstore: a key that lives for minutes, a certificate of who had it, and an entry of a public log.

The package `sigstore` does both, so that the rules for certificates, timestamps and logs are those of its makers. What a bundle
claims is compared with the identities that are accepted first, by `cryptography` alone: a stranger's bundle costs no more.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from adapterhub.identity import Identity
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import (
    FormatError,
    IntegrityError,
    MissingExtraError,
    ParameterError,
    RefusedError,
    RemoteError,
)

if TYPE_CHECKING:
    from sigstore.models import ClientTrustConfig, TrustedRoot

CODE = "signature"
_ISSUER, _USER = (x509.ObjectIdentifier(f"1.3.6.1.4.1.57264.1.{arc}") for arc in (1, 7))  # sigstore/fulcio, docs/oid-info.md
_ROOT_TYPE = "application/vnd.dev.sigstore.trustedroot"
_MAX_CONFIG = 4 << 20  # bytes of a trust config; that of the public Sigstore has ten thousand
_DAY = 24 * 60 * 60
_AGAIN = "Have it signed again"
_UNKNOWN = "Have it signed by somebody who is accepted, or accept this identity if you trust it"
_CONFIG = "Pass a client trust config or, to verify, a trusted root, in the JSON of Sigstore"
_SHOWN = 160  # characters of a foreign text in an error
_INVALID = (
    ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError,
    InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
)  # fmt: skip
"""What the package raises, besides its own errors, for a bundle with a part missing or of another kind than it expects."""


def check_extra() -> None:
    """MissingExtraError where the package `sigstore` is not installed."""
    try:
        import sigstore  # noqa: F401
    except ImportError as error:
        what = "signatures by an identity need sigstore, which is not installed"
        raise MissingExtraError("", what, "pip install 'adapterhub[sigstore]'") from error


# ---- verifying


def claimed(certificate: bytes, where: str) -> Identity:
    """Return the identity that a certificate in DER claims; FormatError for one without. Nothing is verified."""
    try:
        extensions = x509.load_der_x509_certificate(certificate).extensions
        issuer = extensions.get_extension_for_oid(_ISSUER).value
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found: list[str] = [*names.get_values_for_type(x509.RFC822Name)]
        found += names.get_values_for_type(x509.UniformResourceIdentifier)
        found += [one.value.decode() for one in names.get_values_for_type(x509.OtherName) if one.type_id == _USER]
        if len(found) != 1 or not isinstance(issuer, x509.UnrecognizedExtension):
            raise ValueError(f"{len(found)} names")
        return Identity(found[0], issuer.value.decode())
    except (*_INVALID, ParameterError) as error:
        what = "its certificate does not have one name and the issuer of it, as those of Sigstore do"
        raise FormatError(where, what, _AGAIN) from error


def verify(raw: bytes, payload: bytes, certificate: bytes, identities: Iterable[Identity], where: str) -> Identity:
    """Return the one of `identities` that signed a payload, by a bundle that was parsed already.

    Args:
        raw: The bundle.
        payload: The statement in it.
        certificate: The certificate in it, in DER.
        identities: Those that are accepted.
        where: The name of what is signed, in errors.

    Raises:
        IntegrityError: It is signed by somebody else, or that cannot be shown: the certificate is not one of this Sigstore or
            was not valid when the log recorded the signature, or the log has something else.
        MissingExtraError: It may be by one of them, and the package `sigstore` is not installed.
    """
    claim, accepted = claimed(certificate, where), list(identities)
    if not accepted:
        what = f"is signed without a key, by {_shown(claim.title)}, and only keys are accepted"
        raise IntegrityError(where, what, _UNKNOWN, code=CODE)
    those = [one for one in accepted if one.id == claim.id]
    if not those:
        issuers = [one.issuer for one in accepted if one.name == claim.name]
        instead = f", not of {_shown(issuers[0])}" if issuers else ""
        raise IntegrityError(where, f"is signed by {_shown(claim.title)}{instead}, which is not accepted", _UNKNOWN, code=CODE)
    check_extra()
    reasons = []
    for one in those:  # of several Sigstores
        reason = _invalid(raw, payload, one)
        if not reason:
            return one
        reasons.append(reason)
    raise IntegrityError(where, f"the signature is not by {claim.title}: {'; '.join(reasons)}", _AGAIN, code=CODE)


def _invalid(raw: bytes, payload: bytes, identity: Identity) -> str:
    """The reason why a bundle does not show that an identity signed a payload; empty if it does."""
    from sigstore.errors import CertValidationError, Error
    from sigstore.models import Bundle
    from sigstore.verify import Verifier, policy

    verifier = Verifier(trusted_root=_trusted_root(identity.trust_config))
    try:
        asked = policy.Identity(identity=identity.name, issuer=identity.issuer)
        _, signed = verifier.verify_dsse(Bundle.from_json(raw), asked)
    except CertValidationError as error:
        return _shown(f"its certificate is of another Sigstore, or was not valid when the log recorded it: {error}")
    except (Error, *_INVALID) as error:
        return _shown(str(error) or type(error).__name__)
    return "" if signed == payload else "its payload can be read in two ways"


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


# ---- whom Sigstore's certificates and logs are


def _trusted_root(path: Path | None) -> TrustedRoot:
    from sigstore.models import TrustedRoot

    if path is None:
        return _public(int(time.time() // _DAY)).trusted_root
    text = json_file.read_text(path, _MAX_CONFIG)
    if str(json_file.parse_object(text.encode(), str(path)).get("mediaType")).startswith(_ROOT_TYPE):
        with _reading(path):
            return TrustedRoot.from_file(str(path))
    config = _config(path)
    with _reading(path):
        return config.trusted_root


def _config(path: Path | None) -> ClientTrustConfig:
    """The trust config in a file, or that of the public Sigstore."""
    from sigstore.models import ClientTrustConfig

    if path is None:
        return _public(int(time.time() // _DAY))
    text = json_file.read_text(path, _MAX_CONFIG)
    with _reading(path):
        return ClientTrustConfig.from_json(text)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    from pydantic import ValidationError
    from sigstore.errors import Error

    try:
        yield
    except ValidationError as error:  # whose text has several lines, with addresses
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise FormatError(
            str(path), f"not a trust config: {_shown(f'{place}: ' * bool(place) + first['msg'])}", _CONFIG
        ) from error
    except (Error, *_INVALID) as error:
        raise FormatError(str(path), f"not a trust config: {_shown(str(error))}", _CONFIG) from error


@lru_cache(maxsize=1)
def _public(_day: int) -> ClientTrustConfig:
    """That of the public Sigstore, which is asked for once a day: its keys change every few months."""
    from sigstore.errors import Error
    from sigstore.models import ClientTrustConfig

    try:
        return ClientTrustConfig.production()
    except (Error, OSError, *_INVALID) as error:
        hint = "Try again, or name the trust config of a private Sigstore"
        raise RemoteError("Sigstore", f"its keys could not be updated: {_shown(str(error))}", hint) from error


# ---- signing


def ambient_token() -> str | None:
    """Return the identity token that this machine gives its jobs, as GitHub, GitLab and Google do; None elsewhere."""
    check_extra()
    from sigstore.oidc import IdentityError, detect_credential

    try:
        return detect_credential()  # type: ignore[no-any-return]
    except IdentityError as error:
        hint = "Allow the job to ask for one, such as by `id-token: write`"
        raise RefusedError("identity token", _shown(str(error)), hint) from error


class KeylessSigner:
    """A signer by identity: it has a certificate from the first signature on, for ten minutes.

    Attributes:
        public: The identity, as the token claims it and, after a signature, as the certificate has it.
    """

    def __init__(self, token: str, trust_config: Path | None = None) -> None:
        """Raise ParameterError for a token that is none, or is not valid now."""
        check_extra()
        from sigstore.oidc import IdentityError, IdentityToken

        try:
            self._token = IdentityToken(token)
            self.public = Identity(self._token.identity, self._token.federated_issuer, trust_config)
        except IdentityError as error:
            what = f"is not one that Sigstore takes: {_shown(str(error))}"
            raise ParameterError("identity_token", what, "Get a new one, for the audience sigstore") from error
        self._config = _config(trust_config)

    def __repr__(self) -> str:
        return f"<KeylessSigner {self.public.title}>"

    def seal(self, payload: bytes, where: str) -> bytes:
        """Return a bundle with the signature of an in-toto statement; the log of Sigstore has published it by then.

        Raises:
            RemoteError: Sigstore does not certify the identity, or did not record the signature.
        """
        from sigstore.dsse import Statement

        with self._asking():
            from sigstore.sign import SigningContext

            with SigningContext.from_trust_config(self._config).signer(self._token) as signer:
                made = signer.sign_dsse(Statement(payload))
        raw: bytes = made.to_json().encode()
        certificate = made.signing_certificate.public_bytes(Encoding.DER)
        found = claimed(certificate, where)
        self.public = Identity(found.name, found.issuer, self.public.trust_config)
        verify(raw, payload, certificate, [self.public], where)
        return raw

    @contextmanager
    def _asking(self) -> Iterator[None]:
        from sigstore.oidc import ExpiredIdentity

        try:
            yield
        except ExpiredIdentity as error:
            raise ParameterError("identity_token", "has expired", "Get a new one") from error
        except Exception as error:
            said = _shown(str(error) or str(error.__cause__ or type(error).__name__))
            raise RemoteError("Sigstore", f"did not sign for {self.public.title}: {said}", "Try again") from error
