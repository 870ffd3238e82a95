"""Signatures of what is pushed: those that the policy requires of a name, and those that are stored with a version.

Attestations are signatures of statements about a version, and are stored, carried and required as those of its files are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.manifest.package_files import SIGNATURE
from adapterhub.project.policy import Policy, refused
from adapterhub.project.policy import Signed as Rule
from adapterhub.store.signatures import MOST, MOST_BROUGHT
from adapterhub.trust import attestation, bundle, statement
from adapterhub_converters.containers.inside import Inside
from adapterhub_converters.errors import AdapterhubError, IntegrityError, LocalIOError

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.store.store import Store
    from adapterhub.trust.attestation import Attestation
    from adapterhub.trust.bundle import Signed

LIMIT = bundle.MAX_BUNDLE + 1
"""Bytes to read of a signature: one more than a valid one has."""


def files_of(made: Manifest) -> dict[str, Digest]:
    """Path to digest of the files of a version, as they are signed."""
    return {layer.path: layer.digest for layer in made.layers}


def in_folder(folder: Path) -> tuple[bytes, ...]:
    """The signature in a folder, unverified; none without one."""
    path = folder / SIGNATURE
    try:
        return (Inside(folder).read(path, LIMIT),)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    except OSError as error:
        raise LocalIOError(str(path), error.strerror or str(error)) from error


def check(
    policy: Policy | None,
    made: Manifest,
    signatures: Callable[[], Sequence[bytes]],
    *,
    name: str,
    where: str,
    signed_as: str = "",
) -> Signed | None:
    """Verify that a version is signed as the policy requires for its name, and that what it requires is attested.

    Args:
        policy: None where there is none.
        made: The manifest of the version.
        signatures: Returns its signatures and attestations; called only if one is required.
        name: Its name, as the policy knows it.
        where: Its name in errors.
        signed_as: What it was signed as, where that is another name than `name`.

    Returns:
        A signature of its files that is required; None where none is.

    Raises:
        RefusedError: It is not signed so, or not attested (code `against-policy`).
    """
    rules = policy.signed(name) if policy else []
    if not rules:
        return None
    signed, there = None, signatures()
    for rule in rules:
        try:
            signed = _check_rule(policy, rule, made, there, name=signed_as or name, where=where) or signed
        except IntegrityError as error:
            raise refused(where, rule.where, [f"{rule.rule}: {error.what}"], error.hint) from error
    return signed


def _check_rule(
    policy: Policy | None, rule: Rule, made: Manifest, there: Sequence[bytes], *, name: str, where: str
) -> Signed | None:
    """Return the signature that a rule requires, None for an attestation; IntegrityError without it."""
    from adapterhub.trust.keys import trusted  # needs cryptography

    keys = trusted(rule.keys)
    if not rule.attestation:
        return bundle.accepted(there, keys, files_of(made), name, where)
    attestation.accepted(there, rule.attestation, keys, made.digest, where, check=partial(_check_base, policy, where))
    return None


def _check_base(policy: Policy | None, where: str, found: Attestation) -> None:
    """IntegrityError for the attestation that an adapter fits a base which the policy does not allow."""
    if found.kind == attestation.FITS:
        base = attestation.base_of(found)
        if policy and not all(base in bases for bases in policy.base_digests()):
            raise IntegrityError(where, f"the attestation is about the base {base[:19]}…, which is not one of bases")


@dataclass(frozen=True)
class Shown:
    """A signature or an attestation, as it is shown to people.

    Attributes:
        what: `files`, the kind of an attestation, or the type of its predicate.
        signer: Who it claims to be by.
        is_about: Whether it is about this version.
        verified: Whether it is by a signer that the policy requires for the name of the version, and right.
    """

    what: str
    signer: str
    is_about: bool
    verified: bool


def shown(policy: Policy | None, made: Manifest, signatures: Iterable[bytes], name: str) -> list[Shown]:
    """Describe the signatures of a version; those that are no bundles of the form that is read are left out."""
    found = []
    for raw in signatures:
        with suppress(AdapterhubError):
            try:
                signer = bundle.claimed_signer(raw, name)
            except ImportError:  # no cryptography
                signer = "an identity"
            kind = bundle.predicate_type(raw)
            what = "files" if kind == statement.PREDICATE_TYPE else attestation.kind_of(kind) or kind
            found.append(Shown(what, signer, is_about(raw, made), _is_required(policy, made, raw, name)))
    return found


def _is_required(policy: Policy | None, made: Manifest, raw: bytes, name: str) -> bool:
    """Tell whether a bundle alone meets one of the rules of a policy that are about signers."""
    for rule in policy.signed(name) if policy else ():
        with suppress(AdapterhubError):
            _check_rule(policy, rule, made, [raw], name=name, where=name)
            return True
    return False


def known(store: Store, made: Manifest, brought: Iterable[bytes]) -> list[bytes]:
    """Return the signatures of a version that were brought with it, and those that are stored; none is verified."""
    return [*brought, *store.signatures.read(made.digest, LIMIT)]


def keep(store: Store, made: Manifest, signatures: Iterable[bytes], policy: Policy | None = None, name: str = "") -> None:
    """Store the signatures and attestations that came with a version and are about it; by whom is for readers to verify.

    Of all but those that a policy requires for its name, at most MOST_BROUGHT.
    """
    for raw in signatures:
        with suppress(AdapterhubError):  # as where there are too many
            if is_about(raw, made):
                store.signatures.add(made.digest, raw, MOST if _is_required(policy, made, raw, name) else MOST_BROUGHT)


def is_about(raw: bytes, made: Manifest) -> bool:
    """Tell whether a bundle claims to sign the files of a version and no others, or to attest something about it."""
    with suppress(AdapterhubError):
        claimed = bundle.claimed(raw, "")
        if bundle.predicate_type(raw) == statement.PREDICATE_TYPE:
            return statement.parse(claimed, "").files == files_of(made)
        return attestation.parse(claimed, "").digest == made.digest
    return False
