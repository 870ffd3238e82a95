"""Attestations that others can compute again: a version fits a base, was rebuilt from parents, or was trained as recorded.

What each claims is computed in `attest_predicates`. The statements themselves are in `adapterhub.trust.attestation`, signatures
of files in `operations.sign`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from adapterhub.digest import sha256_file
from adapterhub.manifest import oci_manifest
from adapterhub.trust import attestation
from adapterhub.trust.attestation import BILL, FITS, MERGE, SCAN, TESTS, TRAINING, TYPES, Attestation, VerifiedAttestation
from adapterhub_converters.errors import (
    AdapterhubError,
    IntegrityError,
    NotFoundError,
    ParameterError,
    RefusedError,
    UsageError,
)

from . import base_sources, signature_checks, sources
from .attest_predicates import BUILDER, Inputs, compute_attestation, digest_set, training_predicate
from .workspace import StrPath, Workspace, as_list

if TYPE_CHECKING:
    from adapterhub.maintenance.findings import Finding
    from adapterhub.trust.keys import Signer, TrustedSigner
    from adapterhub_converters.bases import BaseSpec

    from .signature_checks import Signable

_UNCOMPARED: Mapping[str, tuple[str, ...]] = {  # patterns of fields that differ between honest computations
    FITS: ("checker.*", "base.repo", "base.revision", "base.uri"),
    MERGE: ("rebuilder.*", "parents.*.signer", "parents.*.name"),
    TRAINING: ("runDetails.builder.id", "runDetails.metadata.finishedOn", "buildDefinition.resolvedDependencies.*.uri"),
    SCAN: ("scanner.*",),
    BILL: ("metadata.tools.*",),
}
_SHOWN = 5  # differences quoted in one finding: its message is a line of a terminal


def attest(
    ref: str,
    key: StrPath | Signer,
    *,
    fits: StrPath | BaseSpec | None = None,
    merge: bool = False,
    training: bool = False,
    scan: bool = False,
    bill: bool = False,
    parents: StrPath | Sequence[StrPath] = (),
    builder: str | None = None,
    base_license: str | None = None,
    passphrase: bytes | None = None,
    workspace: Workspace | None = None,
) -> tuple[VerifiedAttestation, ...]:
    """Compute statements about a version, sign them, and attach them to it as signatures are.

    Args:
        ref: A ref of the registry, or an address.
        key: Your private key, as for `sign`.
        fits: Attest that it fits this base model, with the verdict of each runtime.
        merge: Attest that a rebuild from its parents, each of them signed, gives the same bytes.
        training: Attest the config, the data and the base of its training, as adapter.json records them: SLSA's provenance.
        scan: Attest that a scan of its files finds no error.
        bill: Attest its bill of materials, as CycloneDX.
        parents: Public keys, one of which must have signed each parent; by default that of `key`.
        builder: The URI of what trained it, in the provenance; required unless adapterhub's own trainer recorded the training.
            The trainer itself is named only by `trained`.
        base_license: The license of the base, in a bill; by default that of the model card of `fits`.
        passphrase: The passphrase of the key, if it is encrypted, or the PIN of its hardware.
        workspace: The registry and the credentials.

    Raises:
        RefusedError: One of the claims does not hold. Nothing is signed.
        IntegrityError: A parent is not signed.

    Example:
        >>> [statement.kind for statement in ah.attest("team/sql", "team.key", fits="./tiny")]
        ['fits']
    """
    from adapterhub.trust import keys, signers

    workspace, signer, parent_keys = workspace or Workspace(), signers.read(key, passphrase), as_list(parents)
    requests = {FITS: fits is not None, MERGE: merge, TRAINING: training, SCAN: scan, BILL: bill}
    kinds = [kind for kind, requested in requests.items() if requested]
    if not kinds:
        raise ParameterError("fits", "nothing to attest", "Choose what to attest", code="nothing-to-attest")
    if builder == BUILDER:
        problem = "is named only in what the trainer signs itself, at the end of its run"
        raise RefusedError(builder, problem, "Sign the training when it runs, or leave the builder out", code="other-builder")
    trusted = keys.read_trusted(parent_keys) if parent_keys else [signer.public]
    with _open_version(ref, workspace) as version:
        inputs = Inputs(fits, parent_keys, builder=builder, base_license=base_license)
        attestations = [compute_attestation(kind, version, inputs, trusted, workspace) for kind in kinds]
        # Sign only after every predicate was computed: a claim that does not hold leaves nothing behind.
        for statement in attestations:
            version.add(statement.sign(signer))
    return tuple(VerifiedAttestation(statement, signer.public) for statement in attestations)


def trained(folder: Path, name: str) -> Attestation:
    """Return the provenance of a training that has just ended, with adapterhub's trainer as its builder.

    Args:
        folder: What the trainer wrote. The statement is about the version that a push of it makes.
        name: The name that it is going to have.
    """
    from adapterhub.manifest import derive, folder_contents

    source = sources.Source(folder, folder, str(folder))
    contents = folder_contents.read_folder(folder)
    digest = oci_manifest.complete(contents.files, *derive.draft_contents(contents).finalize(contents.files)).digest
    return Attestation(TYPES[TRAINING], name, digest, training_predicate(source, BUILDER))


def add(statement: Attestation, signed: bytes, ref: str, key: Signer, workspace: Workspace) -> VerifiedAttestation:
    """Attach a statement that `key` has signed to the version that it is about; RefusedError if `ref` is another one."""
    with _open_version(ref, workspace) as version:
        if version.digest != statement.digest:
            problem = f"is {version.digest[:19]}…, and the training ended with {statement.digest[:19]}…"
            raise RefusedError(version.location, problem, "Attest the version by its record", code="other-version")
        version.add(signed)
    return VerifiedAttestation(statement, key.public)


def verify(
    source: StrPath, keys: Sequence[TrustedSigner], workspace: Workspace, *, inputs: Inputs | None = None
) -> tuple[Signable, list[VerifiedAttestation], list[Finding]]:
    """Verify the attestations of a version and, with `inputs`, compute them again.

    Returns:
        The version, its attestations by one of `keys`, and the findings: an error if there is no attestation or if one comes
        out differently now, and a note for each that is not accepted, because anybody can attach one.
    """
    from adapterhub.maintenance.findings import Finding

    version, attested, findings = _accepted_attestations(source, keys, workspace)
    if not attested:
        reasons = f" that is accepted: {'; '.join(finding.what for finding in findings[:_SHOWN])}" if findings else ""
        return version, [], [Finding(attestation.CODE, "error", version.location, f"has no attestation{reasons}")]
    for signed in attested if inputs else ():
        findings += _comparison_findings(signed.attestation, version, inputs or Inputs(), keys, workspace, accepted=attested)
    return version, attested, findings


def _accepted_attestations(
    source: StrPath, keys: Sequence[TrustedSigner], workspace: Workspace
) -> tuple[Signable, list[VerifiedAttestation], list[Finding]]:
    from adapterhub.maintenance.findings import Finding

    attested, findings = [], []
    with _open_version(source, workspace) as version:
        for raw in attestation.attestation_bundles(version.read()):
            try:
                signed = attestation.verify(raw, keys, version.location)
                signed.attestation.check(signed.kind, version.digest, version.location)
                attested.append(signed)
            except AdapterhubError as error:
                findings.append(Finding(attestation.CODE, "note", version.location, error.what))
    return version, attested, findings


@contextmanager
def _open_version(source: StrPath, workspace: Workspace) -> Iterator[Signable]:
    with signature_checks.open_signable(source, workspace) as version:
        if not version.digest:
            raise UsageError(
                version.location, "is a folder, and only versions have attestations", "Push it, and name the version"
            )
        yield version


def _comparison_findings(
    recorded: Attestation,
    version: Signable,
    inputs: Inputs,
    keys: Sequence[TrustedSigner],
    workspace: Workspace,
    *,
    accepted: Sequence[VerifiedAttestation],
) -> Iterator[Finding]:
    """Compute an attestation again and yield a finding for each way in which it differs.

    Args:
        recorded: The attestation as it was signed.
        version: The version that it is about.
        inputs: The inputs to compute it from.
        keys: The accepted signers, also of the parents of a merge unless `inputs` names others.
        accepted: All accepted attestations of the version; one of them may be about the base at hand.
    """
    from adapterhub.maintenance.findings import Finding
    from adapterhub.trust.keys import read_trusted

    kind, signers = recorded.kind, read_trusted(inputs.parents) if inputs.parents else keys
    if kind == TESTS:
        message = f"{kind}: what the signer measured, which cannot be computed again from the version"
        yield Finding(attestation.CODE, "note", version.location, message)
        return
    if kind == FITS and inputs.base is None:
        message = f"{kind}: cannot be computed again without the base {attestation.base_fingerprint(recorded)[:19]}…"
        yield Finding(attestation.CODE, "error", version.location, message, "Name the base", "attested-base")
        return
    if kind == BILL:
        name, base_license = attestation.billed(recorded)
        inputs = replace(inputs, billed_name=name, base_license=base_license if inputs.base is None else None)
    try:
        recomputed = compute_attestation(
            kind, version, replace(inputs, builder=attestation.builder(recorded) or None), signers, workspace
        )
    except (RefusedError, IntegrityError, NotFoundError) as error:
        yield Finding(
            attestation.CODE, "error", version.location, f"{kind}: cannot be computed again: {error.what}", error.hint
        )
        return
    old, new = attestation.base_fingerprint(recorded), attestation.base_fingerprint(recomputed)
    if old != new and any(
        attestation.base_fingerprint(other.attestation) == new for other in accepted
    ):  # a version may fit several bases
        message = f"{kind}: is about another base, {old[:19]}…, and was not compared"
        yield Finding(attestation.CODE, "note", version.location, message)
        return
    differences = list(_differences(recorded, recomputed))
    if kind == TRAINING:
        differences += _input_differences(recomputed, inputs, workspace)
        if inputs.base is None or not inputs.data:
            message = f"{kind}: compared with the record in adapter.json, and not with the bytes of every input"
            yield Finding(
                attestation.CODE, "note", version.location, message, "Name the base and the data to compare their bytes"
            )
    if differences:
        remainder = f" (and {len(differences) - _SHOWN} more)" if differences[_SHOWN:] else ""
        message = f"{kind}: is another statement when it is computed again: {'; '.join(differences[:_SHOWN])}{remainder}"
        yield Finding(attestation.CODE, "error", version.location, message)


# Both sides are compared as parsed JSON: a tuple and a list, or two orders of keys, are no difference.
def _differences(recorded: Attestation, recomputed: Attestation) -> Iterator[str]:
    ignored = _UNCOMPARED[recorded.kind]
    old, new = (dict(_leaves(attestation.parse(statement.dump(), "").predicate)) for statement in (recorded, recomputed))
    for path in sorted(old.keys() | new.keys()):
        name, (before, after) = ".".join(path), (repr(leaves[path]) if path in leaves else "absent" for leaves in (old, new))
        if before != after and not any(fnmatchcase(name, pattern) for pattern in ignored):
            yield f"{name[:80]} is {before[:60]}, and now {after[:60]}"


def _leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """Yield each leaf of a JSON document with its path. An empty list or object is a leaf too."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, item in items:
        yield from _leaves(item, (*path, str(key)))
    if not items:
        yield path, value


def _input_differences(recomputed: Attestation, inputs: Inputs, workspace: Workspace) -> Iterator[str]:
    """Yield a line for each local file of the base or the data that differs from those of the training."""
    dependencies = recomputed.predicate["buildDefinition"]["resolvedDependencies"]
    data = [dependency["digest"] for dependency in dependencies if dependency["annotations"]["role"] == "data"]
    weights = {
        dependency["name"]: dependency["digest"]
        for dependency in dependencies
        if dependency["annotations"]["role"] == "base" and "digest" in dependency
    }
    for path in map(Path, inputs.data):
        if digest_set(sha256_file(path)) not in data:
            yield f"{path} is not among its data"
    if isinstance(inputs.base, str | os.PathLike):
        folder = base_sources.weights(inputs.base, workspace)
        local_files = {path.name: path for path in (folder.iterdir() if folder.is_dir() else [folder])}
        for name, digest in weights.items():
            if name not in local_files:
                yield f"{name} is not in {folder}"
            elif digest_set(sha256_file(local_files[name])) != digest:
                yield f"{name} in {folder} has other bytes"
