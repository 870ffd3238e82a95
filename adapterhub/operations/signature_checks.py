"""The signatures of adapters, where they are stored.

A folder has `model.sig`, the registry has files in its store, and an address has OCI referrers. A version is signed by the
digests in its manifest, and its signature is compared with them before a file is fetched: a fetched file either has its digest
or is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from adapterhub import user_files
from adapterhub.manifest.package_files import SIGNATURE
from adapterhub.registry.signature_policy import LIMIT, check, in_folder, is_about, signed_files
from adapterhub.trust import bundle, statement
from adapterhub_converters.errors import IntegrityError, NotFoundError, RefusedError, RemoteError, UsageError
from adapterhub_converters.lazy_dataclass import dataclass

from . import source_names
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.identity import Identity
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.registry.registry import Version
    from adapterhub.remotes.protocol import Source
    from adapterhub.remotes.remote_address import RemoteAddress
    from adapterhub.trust.bundle import SignedStatement
    from adapterhub.trust.keys import Signer, TrustedSigner


@dataclass(frozen=True)
class Signable:
    """Something that can be signed, and its signatures.

    Attributes:
        location: Its ref, its address, or the path of its folder.
        name: The name it is signed as: that of a ref, of a repository at an address, or of the folder.
        pinned: The ref or the address of exactly this version; empty for a folder.
        digest: The digest of its manifest; empty for a folder.
        files: Digests by path.
        read: Returns its signatures, unverified.
        add: Stores a signature; returns False if it was there already.
    """

    location: str
    name: str
    pinned: str
    digest: Digest
    files: Mapping[str, Digest]
    read: Callable[[], Sequence[bytes]]
    add: Callable[[bytes], bool]


@contextmanager
def open_signable(source: StrPath, workspace: Workspace) -> Iterator[Signable]:
    """Open what a folder, a ref or an address names, with its signatures, until the context ends."""
    if source_names.is_address(source):
        from adapterhub.remotes import attached_signatures
        from adapterhub.remotes.remote_address import name_of, parse

        place = parse(os.fspath(source))
        with workspace.connect(place) as remote:
            manifest = remote.manifest(place.reference)
            yield Signable(
                str(place),
                name_of(place),
                f"{place.repository}@{manifest.digest}",
                manifest.digest,
                signed_files(manifest),
                lambda: attached_signatures.stored(remote, manifest.digest),
                lambda raw: attached_signatures.attach(remote, manifest, raw),
            )
        return
    path, ref = source_names.resolve(source, workspace)
    if ref is None:
        yield _folder(Path(source) if path is None else path)
        return
    with workspace.open_registry() as registry, registry.lease_version(ref) as version:
        manifest, signature_store = registry.oci_manifest(version), registry.store.signatures
        yield Signable(
            str(version.ref),
            version.name,
            f"{version.name}@{version.digest}",
            version.digest,
            signed_files(manifest),
            lambda: signature_store.read(manifest.digest, LIMIT),
            lambda raw: signature_store.add(manifest.digest, raw),
        )


def _folder(folder: Path) -> Signable:
    """Return what can be signed in a folder."""
    files, name = statement.files_in(folder), folder.absolute().resolve().name
    return Signable(str(folder), name, "", "", files, lambda: in_folder(folder), lambda raw: write(folder, raw))


def write(folder: Path, signature: bytes) -> bool:
    """Write the signature of the files in a folder, replacing an earlier one; return False if it was there already."""
    return user_files.change(
        folder / SIGNATURE, lambda old: None if old == signature.decode() else signature.decode(), follow=False
    )


# ---- signing and verifying


def sign(source: StrPath, key: Signer, workspace: Workspace, *, name: str | None = None) -> tuple[Signable, bool]:
    """Sign what a folder, a ref or an address names, and store the signature there.

    Args:
        source: What to sign.
        key: The key to sign with.
        workspace: The registry, the credentials.
        name: The name to sign it as, instead of its own.

    Returns:
        What was signed, and whether the signature is new; an ECDSA signature always is.
    """
    from adapterhub.trust.statement import Statement

    with open_signable(source, workspace) as signable:
        if not signable.files:
            raise NotFoundError(signable.location, "has no files to sign", "Name a folder with an adapter")
        return signable, signable.add(bundle.sign(Statement(name or signable.name, signable.files), key))


def verify(
    source: StrPath, keys: Sequence[TrustedSigner], workspace: Workspace, *, name: str | None = None
) -> tuple[Signable, SignedStatement]:
    """Return what a folder, a ref or an address names, and its signature by one of `keys`.

    Args:
        source: What was signed.
        keys: The keys of trusted signers.
        workspace: The registry, the credentials.
        name: The name it must have been signed as. By default its own name; a folder may have any.

    Raises:
        IntegrityError: There is no such signature, or it covers other files or another name.
    """
    with open_signable(source, workspace) as signable:
        expected = name or (signable.name if signable.digest else None)
        digest = signable.digest or None
        return signable, bundle.find_accepted(signable.read(), keys, signable.files, expected, signable.location, digest=digest)


# ---- requiring


@dataclass(frozen=True)
class VersionNames:
    """The names of a version.

    Attributes:
        location: The name used in errors.
        name: The name that the policy checks: that of a ref, or a whole address.
        signed_as: The name that the policy requires it to be signed as.
        origin: The namespace it comes from, for keys that are known there; empty if it does not come from elsewhere.
        own_name: The name it is signed as where it comes from.
    """

    location: str
    name: str
    signed_as: str
    origin: str = ""
    own_name: str = ""

    @classmethod
    def of_version(cls, version: Version, location: str, *, into: str = "") -> VersionNames:
        """Return the names of a version of the registry; `into` is the name it is copied to."""
        name = into or version.name
        return cls(location, name, name, version.name.partition("/")[0], version.name)

    @classmethod
    def of_address(cls, place: RemoteAddress, location: str = "", name: str | None = None, *, into: str = "") -> VersionNames:
        """Return the names of an address; `name` is the ref on a remote that the address was derived from, `into` as above."""
        from adapterhub.remotes.remote_address import name_of, namespace_of

        own_name, origin = name_of(place), quote(namespace_of(place), safe="/:@")
        return cls(location or str(place), into or name or place.repository, into or own_name, origin, own_name)


@dataclass(frozen=True)
class Demand:
    """What a user requires of the signatures of a version.

    Attributes:
        keys: Files or folders of keys, and identities, one of which must have signed it. Empty accepts the keys of the policy
            and those known for its namespace; None requires no more than these do.
        signed_as: The name it must have been signed as, if not its own; the policy does not accept another.
        remember: Record the key as known for the namespace from now on.
    """

    keys: Sequence[StrPath | Identity] | None = None
    signed_as: str = ""
    remember: bool = False


NO_DEMAND = Demand()


def needs_signature(names: VersionNames, workspace: Workspace, demand: Demand = NO_DEMAND) -> bool:
    """Return whether a version must be signed or attested.

    Raises:
        UsageError: The user wants it signed, but no keys are given or known.
    """
    policy = workspace.rules()
    rules = policy.signing_rules(names.name) if policy else []
    if any(not rule.attestation for rule in rules) or _known_signers(names.origin, workspace) or demand.keys:
        return True
    if demand.keys is not None:
        problem = "no keys are known to verify a signature with"
        raise UsageError(names.location, problem, "Name the keys or identities to accept", code="keys-required")
    return bool(rules)


def require(
    source: Source,
    reference: str,
    names: VersionNames,
    workspace: Workspace,
    demand: Demand = NO_DEMAND,
    *,
    supplied: Sequence[bytes] = (),
) -> SignedStatement | None:
    """Verify the signatures that a version must have, before its files are fetched.

    The policy requires signatures for its name, the user for the namespace it comes from and by `demand`. They are searched
    among the `supplied` signatures that came with the version and those stored with it.

    Returns:
        One of the required signatures, preferring the one that the user requires; None if none is required.

    Raises:
        IntegrityError: A requirement of `demand` is not met.
        RefusedError: A requirement of the policy is not met, or the signer is not the one known for the namespace.
    """
    if not needs_signature(names, workspace, demand):
        return None
    from adapterhub.remotes import attached_signatures

    manifest = source.manifest(reference)
    signatures = [*supplied, *attached_signatures.stored(source, manifest.digest)]
    signed = check(
        workspace.rules(), manifest, lambda: signatures, name=names.name, location=names.location, signed_as=names.signed_as
    )
    name = demand.signed_as or names.own_name or names.name

    def accepted_signature(keys: Sequence[TrustedSigner]) -> SignedStatement:
        files = signed_files(manifest)
        return bundle.find_accepted(signatures, keys, files, name, names.location, digest=manifest.digest)

    if known_signers := _known_signers(names.origin, workspace):
        signed = _verify_by_known(accepted_signature, known_signers, names, workspace)
    # Last, so that the signature returned is the one that the user asked for.
    if demand.keys:
        from adapterhub.trust.keys import read_trusted

        signed = accepted_signature(read_trusted(demand.keys))
    if signed and demand.remember and names.origin and workspace.known_signers is not None:
        from adapterhub.trust.known_signers import KnownSigners

        if KnownSigners(Path(workspace.known_signers)).keep(names.origin, signed.signer):
            workspace.tell(f"{names.origin}: from now on, what comes from there must be signed by {signed.signer.title}")
    return signed


def _known_signers(origin: str, workspace: Workspace) -> Sequence[TrustedSigner]:
    """Return the signers that the user has accepted for a namespace."""
    if not origin or workspace.known_signers is None or not Path(workspace.known_signers).exists():
        return ()
    from adapterhub.trust.known_signers import KnownSigners  # needs cryptography

    return KnownSigners(Path(workspace.known_signers)).signers_of(origin)


def _verify_by_known(
    accepted_signature: Callable[[Sequence[TrustedSigner]], SignedStatement],
    signers: Sequence[TrustedSigner],
    names: VersionNames,
    workspace: Workspace,
) -> SignedStatement:
    """Verify a signature by the known signers of the namespace, explaining a changed signer."""
    try:
        return accepted_signature(signers)
    except IntegrityError as error:
        problem = f"{error.what}; {names.origin} is known to be signed by {signers[0].title}"
        hint = f"If its owner says that the signer has changed, remove the line from {workspace.known_signers}"
        raise RefusedError(names.location, problem, hint, code="known-signer") from error


# ---- where signatures are


def carried_signatures(source: Source, manifest: Manifest, workspace: Workspace) -> list[bytes]:
    """Return the signatures at a place that are about a version, to go along with it; a note says if they cannot be read."""
    from adapterhub.remotes import attached_signatures

    try:
        return [raw for raw in attached_signatures.stored(source, manifest.digest) if is_about(raw, manifest)]
    except RemoteError as error:
        workspace.tell(f"{error.where}: its signatures stay behind: {error.what}")
        return []


def write_carried(folder: Path, manifest: Manifest, signatures: Sequence[bytes], workspace: Workspace) -> None:
    """Write a signature that came with a version beside its files, unless one is there; a note says what a folder cannot have.

    Args:
        folder: Has the files of the version.
        manifest: The manifest of the version.
        signatures: Its signatures and attestations, unverified.
        workspace: Is told the note.
    """
    of_files = [raw for raw in signatures if bundle.predicate_type(raw) == statement.PREDICATE_TYPE]
    if of_files and not any(is_about(raw, manifest) for raw in in_folder(folder)):
        write(folder, of_files[0])
    present = in_folder(folder) if signatures else ()
    if left_out := sum(raw not in present for raw in signatures):
        subject = "1 signature or attestation stays" if left_out == 1 else f"{left_out} signatures and attestations stay"
        workspace.tell(f"{subject} behind: a folder has one {SIGNATURE}, of its files")
