"""Signing and verifying by Sigstore: a short-lived key, a certificate of its holder, and an entry in a public log.

The package `sigstore` does both, so that the rules for certificates, timestamps and logs are those of its makers. What a bundle
claims is first compared with the accepted identities, using only `cryptography`: a stranger's bundle costs no more than that.
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
_MAX_CONFIG = 4 << 20  # bytes of a trust config; that of the public Sigstore has about ten thousand
_DAY = 24 * 60 * 60
_SIGN_AGAIN_HINT = "Have it signed again"
_NOT_ACCEPTED_HINT = "Have it signed by somebody who is accepted, or accept this identity if you trust it"
_CONFIG_HINT = "Pass a client trust config or, to verify, a trusted root, in the JSON of Sigstore"
_MAX_CHARACTERS = 160  # of a foreign text in an error
_INVALID_BUNDLE_ERRORS = (
    ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError,
    InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType,
    x509.InvalidVersion,
)  # fmt: skip
"""What `sigstore` (besides its own errors) and `cryptography` raise for a part of a bundle that is missing or unexpected."""


def check_extra() -> None:
    """Raise MissingExtraError if the package `sigstore` is not installed."""
    try:
        import sigstore  # noqa: F401
    except ImportError as error:
        problem = "signatures by an identity need sigstore, which is not installed"
        raise MissingExtraError("", problem, "pip install 'adapterhub[sigstore]'") from error


# ---- verifying


def claimed_identity(certificate: bytes, location: str) -> Identity:
    """Return the identity that a certificate in DER claims; FormatError if it has none. Nothing is verified."""
    try:
        extensions = x509.load_der_x509_certificate(certificate).extensions
        issuer = extensions.get_extension_for_oid(_ISSUER).value
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        subjects: list[str] = [*names.get_values_for_type(x509.RFC822Name)]
        subjects += names.get_values_for_type(x509.UniformResourceIdentifier)
        subjects += [name.value.decode() for name in names.get_values_for_type(x509.OtherName) if name.type_id == _USER]
        if len(subjects) != 1 or not isinstance(issuer, x509.UnrecognizedExtension):
            raise ValueError(f"{len(subjects)} names")
        return Identity(subjects[0], issuer.value.decode())
    except (*_INVALID_BUNDLE_ERRORS, ParameterError) as error:
        problem = "its certificate does not have one name with its issuer, as those from Sigstore do"
        raise FormatError(location, problem, _SIGN_AGAIN_HINT) from error


def verify(raw: bytes, payload: bytes, certificate: bytes, identities: Iterable[Identity], location: str) -> Identity:
    """Return the one of `identities` that signed a payload, given a bundle that was parsed already.

    Args:
        raw: The bundle.
        payload: The statement in it.
        certificate: The certificate in it, in DER.
        identities: The accepted identities.
        location: The name of what is signed, for errors.

    Raises:
        IntegrityError: Somebody else signed it, or the signature cannot be proven: the certificate is not from this Sigstore or
            was not valid when the log recorded the signature, or the log has something else.
        MissingExtraError: One of the identities may have signed it, but the package `sigstore` is not installed.
    """
    claim, accepted = claimed_identity(certificate, location), list(identities)
    if not accepted:
        problem = f"is signed without a key, by {_one_line(claim.title)}, and only keys are accepted"
        raise IntegrityError(location, problem, _NOT_ACCEPTED_HINT, code=CODE)
    matching = [identity for identity in accepted if identity.id == claim.id]
    if not matching:
        issuers = [identity.issuer for identity in accepted if identity.name == claim.name]
        instead = f", not of {_one_line(issuers[0])}" if issuers else ""
        raise IntegrityError(
            location, f"is signed by {_one_line(claim.title)}{instead}, which is not accepted", _NOT_ACCEPTED_HINT, code=CODE
        )
    check_extra()
    reasons = []
    for identity in matching:  # the same identity may be accepted from several Sigstores
        reason = _rejection_reason(raw, payload, identity)
        if not reason:
            return identity
        reasons.append(reason)
    raise IntegrityError(location, f"the signature is not by {claim.title}: {'; '.join(reasons)}", _SIGN_AGAIN_HINT, code=CODE)


def _rejection_reason(raw: bytes, payload: bytes, identity: Identity) -> str:
    """Return why a bundle does not prove that an identity signed a payload; empty if it does."""
    from sigstore.errors import CertValidationError, Error
    from sigstore.models import Bundle
    from sigstore.verify import Verifier, policy

    verifier = Verifier(trusted_root=_trusted_root(identity.trust_config))
    try:
        expected = policy.Identity(identity=identity.name, issuer=identity.issuer)
        _, verified_payload = verifier.verify_dsse(Bundle.from_json(raw), expected)
    except CertValidationError as error:
        return _one_line(f"its certificate is of another Sigstore, or was not valid when the log recorded it: {error}")
    except (Error, *_INVALID_BUNDLE_ERRORS) as error:
        return _one_line(str(error) or type(error).__name__)
    # sigstore parses the bundle itself; both parsers must have seen the same bytes.
    return "" if verified_payload == payload else "its payload can be read in two ways"


def _one_line(text: str) -> str:
    """Return a text as one line of bounded length."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_CHARACTERS else f"{line[:_MAX_CHARACTERS]}…"


# ---- the certificates and logs of a Sigstore


def _trusted_root(path: Path | None) -> TrustedRoot:
    """Return the trusted root of a trust config, of a trusted root's file, or of the public Sigstore."""
    from sigstore.models import TrustedRoot

    if path is None:
        return _public_config(int(time.time() // _DAY)).trusted_root
    text = json_file.read_text(path, _MAX_CONFIG)
    if str(json_file.parse_object(text.encode(), str(path)).get("mediaType")).startswith(_ROOT_TYPE):
        with _config_errors(path):
            return TrustedRoot.from_file(str(path))
    config = _config(path)
    with _config_errors(path):
        return config.trusted_root


def _config(path: Path | None) -> ClientTrustConfig:
    """Return the trust config in a file, or that of the public Sigstore."""
    from sigstore.models import ClientTrustConfig

    if path is None:
        return _public_config(int(time.time() // _DAY))
    text = json_file.read_text(path, _MAX_CONFIG)
    with _config_errors(path):
        return ClientTrustConfig.from_json(text)


@contextmanager
def _config_errors(path: Path) -> Iterator[None]:
    """Convert the errors of reading a trust config into FormatError."""
    from pydantic import ValidationError
    from sigstore.errors import Error

    try:
        yield
    except ValidationError as error:  # its text has several lines, with URLs
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise FormatError(
            str(path), f"not a trust config: {_one_line(f'{place}: ' * bool(place) + first['msg'])}", _CONFIG_HINT
        ) from error
    except (Error, *_INVALID_BUNDLE_ERRORS) as error:
        raise FormatError(str(path), f"not a trust config: {_one_line(str(error))}", _CONFIG_HINT) from error


@lru_cache(maxsize=1)
def _public_config(_day: int) -> ClientTrustConfig:
    """Return the trust config of the public Sigstore, fetched once a day: its keys change every few months."""
    from sigstore.errors import Error
    from sigstore.models import ClientTrustConfig

    try:
        return ClientTrustConfig.production()
    except (Error, OSError, *_INVALID_BUNDLE_ERRORS) as error:
        hint = "Try again, or name the trust config of a private Sigstore"
        raise RemoteError("Sigstore", f"its keys could not be updated: {_one_line(str(error))}", hint) from error


# ---- signing


def ambient_token() -> str | None:
    """Return the identity token that this machine gives its jobs, as GitHub, GitLab and Google do; None elsewhere."""
    check_extra()
    from sigstore.oidc import IdentityError, detect_credential

    try:
        return detect_credential()  # type: ignore[no-any-return]
    except IdentityError as error:
        hint = "Allow the job to ask for one, such as by `id-token: write`"
        raise RefusedError("identity token", _one_line(str(error)), hint) from error


class KeylessSigner:
    """A signer by identity, whose certificate is issued at the first signature and lasts ten minutes.

    Attributes:
        public: The identity, as the token claims it and, after a signature, as the certificate has it.
    """

    def __init__(self, token: str, trust_config: Path | None = None) -> None:
        """Parse the token.

        Raises:
            ParameterError: It is not an identity token, or is not valid now.
        """
        check_extra()
        from sigstore.oidc import IdentityError, IdentityToken

        try:
            self._token = IdentityToken(token)
            self.public = Identity(self._token.identity, self._token.federated_issuer, trust_config)
        except IdentityError as error:
            problem = f"is not one that Sigstore takes: {_one_line(str(error))}"
            raise ParameterError("identity_token", problem, "Get a new one, for the audience sigstore") from error
        # Read now, so that a malformed trust config fails before anything is signed.
        self._config = _config(trust_config)

    def __repr__(self) -> str:
        return f"<KeylessSigner {self.public.title}>"

    def sign_payload(self, payload: bytes, location: str) -> bytes:
        """Return a bundle with a signed in-toto statement, which Sigstore's log has published by then.

        Raises:
            RemoteError: Sigstore does not certify the identity, or did not record the signature.
        """
        from sigstore.dsse import Statement

        with self._sigstore_errors():
            from sigstore.sign import SigningContext

            with SigningContext.from_trust_config(self._config).signer(self._token) as signer:
                bundle = signer.sign_dsse(Statement(payload))
        raw: bytes = bundle.to_json().encode()
        certificate = bundle.signing_certificate.public_bytes(Encoding.DER)
        # The certificate may spell the identity differently than the token; verifiers compare with the certificate.
        certified = claimed_identity(certificate, location)
        self.public = Identity(certified.name, certified.issuer, self.public.trust_config)
        verify(raw, payload, certificate, [self.public], location)
        return raw

    @contextmanager
    def _sigstore_errors(self) -> Iterator[None]:
        """Convert what Sigstore raises while it signs into errors of this package."""
        from sigstore.oidc import ExpiredIdentity

        try:
            yield
        except ExpiredIdentity as error:
            raise ParameterError("identity_token", "has expired", "Get a new one") from error
        except Exception as error:
            reason = _one_line(str(error) or str(error.__cause__ or type(error).__name__))
            raise RemoteError("Sigstore", f"did not sign for {self.public.title}: {reason}", "Try again") from error
