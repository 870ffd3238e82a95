"""Signatures of adapters where they are: `model.sig` in a folder, files of the registry's store, OCI referrers at an address.

A version is signed by the digests in its manifest, and its signature is compared with them before a file is fetched: what is
fetched has these digests or is an error.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from adapterhub import sources, user_files
from adapterhub.manifest.package_files import SIGNATURE
from adapterhub.registry.signatures import LIMIT, check, files_of, in_folder, is_about
from adapterhub.store.signatures import UNREADABLE, Sized, bounded
from adapterhub.trust import attestation, bundle
from adapterhub.workspace import StrPath, Workspace
from adapterhub_converters.errors import FormatError, IntegrityError, NotFoundError, RefusedError, UsageError

if TYPE_CHECKING:
    from adapterhub.digest import Digest
    from adapterhub.identity import Identity
    from adapterhub.manifest.oci_manifest import Manifest
    from adapterhub.registry.registry import Version
    from adapterhub.remotes.location import Place
    from adapterhub.remotes.protocol import Connected, Source
    from adapterhub.trust.bundle import Signed
    from adapterhub.trust.keys import Signer, TrustedSigner


_ATTESTATION = "attestation.sigstore.json"
"""The name of the file that an attestation is attached as; that of a signature is `model.sig`, as in a folder."""


@dataclass(frozen=True)
class Signable:
    """Something that has signatures.

    Attributes:
        where: Its ref, its address, or the path of its folder.
        name: What it is signed as: the name of a ref or at an address, or of the folder.
        pinned: The ref or the address of just this version; empty for a folder.
        digest: Of its manifest; empty for a folder.
        files: Path to digest.
        read: Returns its signatures, none of them verified.
        add: Stores one; returns False if it was there.
    """

    where: str
    name: str
    pinned: str
    digest: Digest
    files: Mapping[str, Digest]
    read: Callable[[], Sequence[bytes]]
    add: Callable[[bytes], bool]


@contextmanager
def opened(source: StrPath, workspace: Workspace) -> Iterator[Signable]:
    """What a folder, a ref or an address names, with its signatures, until the context ends."""
    if sources.is_address(source):
        from adapterhub.remotes.location import name_of, parse

        place = parse(os.fspath(source))
        with workspace.connect(place) as remote:
            made = remote.manifest(place.reference)
            yield Signable(
                str(place),
                name_of(place),
                f"{place.repository}@{made.digest}",
                made.digest,
                files_of(made),
                lambda: stored(remote, made.digest),
                lambda raw: _attach(remote, made, raw),
            )
        return
    path, ref = sources.resolve(source, workspace)
    if ref is None:
        yield _folder(Path(source) if path is None else path)
        return
    with workspace.opened() as registry, registry.reading(ref) as version:
        made, kept = registry.oci_manifest(version), registry.store.signatures
        yield Signable(
            str(version.ref),
            version.name,
            f"{version.name}@{version.digest}",
            version.digest,
            files_of(made),
            lambda: kept.read(made.digest, LIMIT),
            lambda raw: kept.add(made.digest, raw),
        )


def _folder(folder: Path) -> Signable:
    from adapterhub.trust import statement

    files, name = statement.files_in(folder), folder.absolute().resolve().name
    return Signable(str(folder), name, "", "", files, lambda: in_folder(folder), lambda raw: write(folder, raw))


def write(folder: Path, signature: bytes) -> bool:
    """Write the signature of the files in a folder, in place of an earlier one; return False if it was there."""
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
        name: What to sign it as, in place of its own name.

    Returns:
        What was signed, and whether the signature is new; one by ECDSA always is.
    """
    from adapterhub.trust.statement import Statement

    with opened(source, workspace) as found:
        if not found.files:
            raise NotFoundError(found.where, "has no files to sign", "Name a folder with an adapter")
        return found, found.add(bundle.sign(Statement(name or found.name, found.files), key))


def verify(
    source: StrPath, keys: Sequence[TrustedSigner], workspace: Workspace, *, name: str | None = None
) -> tuple[Signable, Signed]:
    """Return what a folder, a ref or an address names, and its signature by one of `keys`.

    Args:
        source: What was signed.
        keys: The keys of signers who are trusted.
        workspace: The registry, the credentials.
        name: What it must have been signed as. By default its own name; a folder may have any.

    Raises:
        IntegrityError: There is none, or it is about other files, or for another name.
    """
    with opened(source, workspace) as found:
        expected = name or (found.name if found.digest else None)
        return found, bundle.accepted(found.read(), keys, found.files, expected, found.where)


# ---- requiring


@dataclass(frozen=True)
class Named:
    """The names of a version.

    Attributes:
        where: In errors.
        name: For the policy: that of a ref, or a whole address.
        signed_as: What the policy requires it to be signed as.
        origin: The namespace that it comes from, for keys that are known there; empty where nothing comes.
        own_name: What it is signed as where it comes from.
    """

    where: str
    name: str
    signed_as: str
    origin: str = ""
    own_name: str = ""

    @classmethod
    def of(cls, version: Version, where: str, *, into: str = "") -> Named:
        """Those of a version of the registry; `into` is the name that it is copied to."""
        name = into or version.name
        return cls(where, name, name, version.name.partition("/")[0], version.name)

    @classmethod
    def at(cls, place: Place, where: str = "", name: str | None = None, *, into: str = "") -> Named:
        """Those of an address; `name` is that of the ref on a remote that it was made of, `into` as in `of`."""
        from adapterhub.remotes.location import name_of, namespace_of

        own, origin = name_of(place), quote(namespace_of(place), safe="/:@")
        return cls(where or str(place), into or name or place.repository, into or own, origin, own)


@dataclass(frozen=True)
class Demand:
    """What a user requires of the signatures of a version.

    Attributes:
        keys: Files or folders of keys, and identities, one of which must have signed it; empty for those of the policy and
            those that are known for its namespace, None to require no more than these do.
        signed_as: The name that it must have been signed as, if not its own; the policy does not accept another.
        remember: Have the key known for the namespace from now on.
    """

    keys: Sequence[StrPath | Identity] | None = None
    signed_as: str = ""
    remember: bool = False


NOTHING = Demand()


def wanted(named: Named, workspace: Workspace, demand: Demand = NOTHING) -> bool:
    """Tell whether a version has to be signed or attested; UsageError if the user wants it signed, and nobody says by whom."""
    policy = workspace.rules()
    rules = policy.signed(named.name) if policy else []
    if any(not rule.attestation for rule in rules) or _known(named.origin, workspace) or demand.keys:
        return True
    if demand.keys is not None:
        what = "no keys are known to verify a signature with"
        raise UsageError(named.where, what, "Name the keys or identities to accept", code="keys-required")
    return bool(rules)


def require(
    source: Source,
    reference: str,
    named: Named,
    workspace: Workspace,
    demand: Demand = NOTHING,
    *,
    brought: Sequence[bytes] = (),
) -> Signed | None:
    """Verify the signatures that a version must have, before its files are fetched.

    The policy requires them for its name, the user for the namespace that it comes from, and by `demand`. They are among those
    that were `brought` with it and those where it is.

    Returns:
        One of the signatures that are required, that of the user first; None where none is.

    Raises:
        IntegrityError: What the user requires now is not met.
        RefusedError: What the policy requires is not met, or what is known of the namespace.
    """
    if not wanted(named, workspace, demand):
        return None
    made = source.manifest(reference)
    there = [*brought, *stored(source, made.digest)]
    signed = check(workspace.rules(), made, lambda: there, name=named.name, where=named.where, signed_as=named.signed_as)
    name = demand.signed_as or named.own_name or named.name

    def accepted(keys: Sequence[TrustedSigner]) -> Signed:
        return bundle.accepted(there, keys, files_of(made), name, named.where)

    if known := _known(named.origin, workspace):
        signed = _by_known(accepted, known, named, workspace)
    if demand.keys:
        from adapterhub.trust.keys import trusted

        signed = accepted(trusted(demand.keys))
    if signed and demand.remember and named.origin and workspace.known_signers is not None:
        from adapterhub.trust.known_signers import KnownSigners

        if KnownSigners(Path(workspace.known_signers)).keep(named.origin, signed.signer):
            workspace.tell(f"{named.origin}: from now on, what comes from there must be signed by {signed.signer.title}")
    return signed


def _known(origin: str, workspace: Workspace) -> Sequence[TrustedSigner]:
    """The signers that the user has accepted for a namespace."""
    if not origin or workspace.known_signers is None or not Path(workspace.known_signers).exists():
        return ()
    from adapterhub.trust.known_signers import KnownSigners  # needs cryptography

    return KnownSigners(Path(workspace.known_signers)).of(origin)


def _by_known(
    accepted: Callable[[Sequence[TrustedSigner]], Signed], known: Sequence[TrustedSigner], named: Named, workspace: Workspace
) -> Signed:
    try:
        return accepted(known)
    except IntegrityError as error:
        what = f"{error.what}; {named.origin} is known to be signed by {known[0].title}"
        hint = f"If its owner says that the signer has changed, remove the line from {workspace.known_signers}"
        raise RefusedError(named.where, what, hint, code="known-signer") from error


# ---- where signatures are


def stored(source: Source, digest: Digest) -> list[bytes]:
    """The signatures of a manifest at a place; none where it stores no attachments."""
    from adapterhub.remotes.local import Local
    from adapterhub.remotes.oci import referrers
    from adapterhub.remotes.parallel import unwatched
    from adapterhub.remotes.protocol import Connected

    place = unwatched(source)
    if isinstance(place, Local):
        return place.registry.store.signatures.read(digest, LIMIT)
    referring = place.referring() if isinstance(place, Connected) else None
    if referring is None:
        return []

    def sized() -> Iterator[Sized]:
        for one in referrers.referrers(referring, digest, bundle.MEDIA_TYPE):
            with suppress(*UNREADABLE):  # anybody who can write there can attach anything
                file = referrers.file_of(referring, one, digest, LIMIT)
                yield file.size, partial(referrers.read, referring, one, file)

    return bounded(sized())


def carry(source: Source, remote: Connected, made: Manifest, brought: Sequence[bytes]) -> int:
    """Attach the signatures of a version that was copied to an address, if it stores attachments; return their number.

    They are those that were `brought` and those of the registry; attachments at an address are copied by request only.
    """
    from adapterhub.remotes.local import Local

    there = [*brought, *(stored(source, made.digest) if isinstance(source, Local) else ())]
    if not there or remote.referring() is None:
        return 0
    done = 0
    for raw in there:
        with suppress(FormatError, RefusedError):
            done += is_about(raw, made) and _attach(remote, made, raw)
    return done


def _attach(remote: Connected, made: Manifest, signature: bytes) -> bool:
    from adapterhub.remotes.oci import referrers

    referring = remote.referring()
    if referring is None:
        raise remote.lacking("attachments", "Sign the folder before you push it, or use an OCI registry")
    with tempfile.TemporaryDirectory(prefix="adapterhub-") as temporary:
        file = Path(temporary) / (_ATTESTATION if attestation.among([signature]) else SIGNATURE)
        file.write_bytes(signature)
        referrers.attach(referring, made, bundle.MEDIA_TYPE, [file])
    return True
