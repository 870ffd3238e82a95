"""Attestations: signed in-toto statements about a version, which anyone with the inputs can compute again.

The subject is the digest of the version's manifest, so that a statement is about these bytes whatever their name is. A training
is attested by SLSA provenance (slsa.dev/spec/v1.0/provenance), results of tests by in-toto's test-result, a bill of materials
by CycloneDX; no standard predicate expresses the other claims.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest, is_hex
from adapterhub_converters.containers import json_file
from adapterhub_converters.errors import AdapterhubError, FormatError, IntegrityError
from adapterhub_converters.lazy_dataclass import dataclass

from . import bundle
from .statement import PREDICATE_TYPE, STATEMENT_TYPE

if TYPE_CHECKING:
    from .keys import Signer, TrustedSigner

FITS, MERGE, TRAINING, TESTS, SCAN, BILL = "fits", "merge", "training", "tests", "scan", "bill"
TYPES: Mapping[str, str] = {
    FITS: "urn:adapterhub:attestation:fits:1",
    MERGE: "urn:adapterhub:attestation:merge:1",
    TRAINING: "https://slsa.dev/provenance/v1",
    TESTS: "https://in-toto.io/attestation/test-result/v0.1",
    SCAN: "urn:adapterhub:attestation:scan:1",
    BILL: "https://cyclonedx.org/bom",
}
"""The type of the predicate of each kind of attestation."""
CODE = "attestation"
_STATEMENT_TYPES = (STATEMENT_TYPE, "https://in-toto.io/Statement/v0.1")  # of equal meaning; cosign writes the earlier one
_KINDS = {type_: kind for kind, type_ in TYPES.items()}
_MAX_REASONS = 5  # in an error


def kind_of(type_: str) -> str:
    """Return the kind of attestation with a given type of predicate; empty for an unknown type."""
    return _KINDS.get(type_, "")


@dataclass(frozen=True)
class Attestation:
    """A statement about a version.

    Attributes:
        type: The type of the predicate, a URI.
        name: The name of the version when it was attested; informative only.
        digest: The digest of its manifest.
        predicate: The claim.
    """

    type: str
    name: str
    digest: Digest
    predicate: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """One of the keys of `TYPES`; empty for an unknown type."""
        return kind_of(self.type)

    def dump(self) -> bytes:
        """Return the statement as canonical JSON."""
        document = {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": self.name, "digest": {"sha256": self.digest.removeprefix("sha256:")}}],
            "predicateType": self.type,
            "predicate": self.predicate,
        }
        return json_file.canonical_bytes(document)

    def sign(self, key: Signer) -> bytes:
        """Return a bundle with the signed statement."""
        return bundle.sign_payload(self.dump(), key, self.name)

    def check(self, kind: str, digest: Digest, location: str) -> None:
        """Raise IntegrityError unless the statement is of this kind and about this manifest."""
        if not self.kind:
            raise IntegrityError(location, f"attests {self.type[:80]!r}, which is not known here", code=CODE)
        if self.kind != kind:
            raise IntegrityError(location, f"attests {self.kind}, not {kind}", code=CODE)
        if self.digest != digest:
            raise IntegrityError(location, f"the attestation is about {self.digest[:19]}…, not about {digest[:19]}…", code=CODE)
        # A signed failure is evidence too, but never what a policy asks for.
        if kind == TESTS and self.predicate.get("result") != "PASSED":
            raise IntegrityError(location, "attests tests that did not pass", code=CODE)


@dataclass(frozen=True, repr=False)
class VerifiedAttestation:
    """An attestation whose signature was verified, and its trusted signer."""

    attestation: Attestation
    signer: TrustedSigner

    @property
    def kind(self) -> str:
        """One of the keys of `TYPES`; empty for an unknown type."""
        return self.attestation.kind

    @property
    def predicate(self) -> Mapping[str, Any]:
        """The claim."""
        return self.attestation.predicate

    def __repr__(self) -> str:
        return f"<VerifiedAttestation {self.attestation.digest[:19]}: {self.kind} by {self.signer.title}>"


def parse(raw: bytes, location: str) -> Attestation:
    """Parse a statement about one manifest, with any type of predicate; FormatError for any other form."""
    document = json_file.parse_object(raw, location)
    type_, subjects, predicate = (document.get(key) for key in ("predicateType", "subject", "predicate"))
    # Signatures of files have a predicate type of their own, and are parsed by `statement`.
    if document.get("_type") not in _STATEMENT_TYPES or not isinstance(type_, str) or type_ == PREDICATE_TYPE:
        raise FormatError(location, f"does not attest a statement of the type {STATEMENT_TYPE}")
    # One subject with one digest: anything else could be read as a statement about other bytes.
    if not isinstance(subjects, list) or len(subjects) != 1 or not isinstance(subjects[0], dict):
        raise FormatError(location, "does not attest exactly one subject")
    name, digests = subjects[0].get("name"), subjects[0].get("digest")
    sha256 = digests.get("sha256") if isinstance(digests, dict) and len(digests) == 1 else None
    if not isinstance(sha256, str) or not is_hex(sha256):
        raise FormatError(location, "attests a subject whose digest is not sha256 alone")
    if not isinstance(predicate, dict):
        raise FormatError(location, "attests nothing: predicate is not an object")
    return Attestation(type_, name if isinstance(name, str) else "", f"sha256:{sha256}", predicate)


def verify(raw: bytes, signers: Iterable[TrustedSigner], location: str) -> VerifiedAttestation:
    """Return what a bundle attests, if one of `signers` signed it; raises the errors of `bundle.verify_payload`."""
    payload, signer = bundle.verify_payload(raw, signers, location)
    return VerifiedAttestation(parse(payload, location), signer)


def base_fingerprint(attestation: Attestation) -> str:
    """Return the fingerprint of the base that an attestation is about; empty if it names none."""
    base = attestation.predicate.get("base")
    fingerprint = base.get("fingerprint") if isinstance(base, dict) else None
    return fingerprint if isinstance(fingerprint, str) else ""


def trained_base(attestation: Attestation) -> tuple[str, str | None, list[Digest]]:
    """Return the base that a provenance of a training names: its name, its revision, and the digests of its weight files."""
    definition = attestation.predicate.get("buildDefinition")
    resources = definition.get("resolvedDependencies") if isinstance(definition, dict) else None
    name, revision, weights = "", None, []
    for resource in resources if isinstance(resources, list) else ():
        annotations = resource.get("annotations") if isinstance(resource, dict) else None
        if isinstance(annotations, dict) and annotations.get("role") == "base":
            digest = resource.get("digest")
            if isinstance(digest, dict):
                weights.append(f"sha256:{digest.get('sha256')}")
            else:
                name, revision = str(resource.get("name")), annotations.get("revision")
    return name, revision if isinstance(revision, str) else None, weights


def builder(attestation: Attestation) -> str:
    """Return the id of the builder that a provenance names; empty if it names none."""
    details = attestation.predicate.get("runDetails")
    named = details.get("builder") if isinstance(details, Mapping) else None
    name = named.get("id") if isinstance(named, Mapping) else None
    return name if isinstance(name, str) else ""


def billed(attestation: Attestation) -> tuple[str, str | None]:
    """Return the name of the adapter in a bill of materials, and the license of its base; empty and None without them."""
    component = _member(_member(attestation.predicate, "metadata"), "component")
    ancestors = _member(component, "pedigree").get("ancestors")
    base = ancestors[0] if isinstance(ancestors, list) and ancestors else None
    licenses = base.get("licenses") if isinstance(base, dict) else None
    license_ = (
        licenses[0].get("expression") if isinstance(licenses, list) and licenses and isinstance(licenses[0], dict) else None
    )
    name = "/".join(filter(None, (str(component.get("group", "")), str(component.get("name", "")))))
    return name, license_ if isinstance(license_, str) else None


def _member(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an object in an object; empty if it is something else."""
    member = value.get(name)
    return member if isinstance(member, dict) else {}


def measured(attestation: Attestation, metric: str) -> tuple[float | None, list[Digest]]:
    """Return the value of a metric that a test result has, None without one, and the digests of the data it was measured on."""
    evaluation, data = attestation.predicate.get("evaluation"), attestation.predicate.get("configuration")
    metrics = evaluation.get("metrics") if isinstance(evaluation, dict) else None
    value = metrics.get(metric) if isinstance(metrics, dict) else None
    digests = [item.get("digest") for item in data if isinstance(item, dict)] if isinstance(data, list) else []
    return (
        float(value) if json_file.is_number(value) else None,
        [f"sha256:{digest.get('sha256') if isinstance(digest, dict) else None}" for digest in digests],
    )


def attestation_bundles(bundles: Iterable[bytes]) -> list[bytes]:
    """Return the bundles that claim to attest something, leaving out signatures; nothing is verified.

    Those that cannot be parsed are among them, for the reasons.
    """
    return [raw for raw in bundles if bundle.predicate_type(raw) not in (PREDICATE_TYPE, bundle.COSIGN_TYPE)]


def find_accepted(
    bundles: Sequence[bytes],
    kind: str,
    signers: Sequence[TrustedSigner],
    digest: Digest,
    location: str,
    *,
    check: Callable[[Attestation], object] = lambda _: None,
) -> VerifiedAttestation:
    """Return the first attestation of a kind that one of `signers` signed, that is about this manifest and that passes `check`.

    Raises:
        IntegrityError: There is no such attestation; with the reason for each rejected one.
    """
    candidates, reasons = attestation_bundles(bundles), []
    for raw in candidates:
        try:
            attested = verify(raw, signers, location)
            attested.attestation.check(kind, digest, location)
            check(attested.attestation)
        except AdapterhubError as error:
            reasons.append(error.what)
        else:
            return attested
    problem = f"has no attestation {kind!r}"
    if reasons:
        problem += f" that is accepted, of {len(candidates)}: {'; '.join(dict.fromkeys(reasons[:_MAX_REASONS]))}"
    raise IntegrityError(location, problem, "Have it attested by a signer who is accepted", code=CODE)
