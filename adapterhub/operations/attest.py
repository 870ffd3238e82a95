"""Attestations that others can compute again: a version fits a base, was rebuilt from parents, or was trained as recorded.

A predicate is a function of the version and its inputs alone, so that anybody who has the inputs computes the same one. It also
records who computed it and with which program; these fields are not compared. The statements themselves are in
`adapterhub.trust.attestation`, signatures of files in `operations.sign`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest, sha256_file
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import TRAINER, AdapterManifest, Parent, TrainingData
from adapterhub.registry.signature_policy import LIMIT, signed_files
from adapterhub.trust import attestation, bundle
from adapterhub.trust.attestation import BILL, FITS, MERGE, SCAN, TESTS, TRAINING, TYPES, Attestation, VerifiedAttestation
from adapterhub.trust.statement import hub_purl
from adapterhub.version import __version__
from adapterhub_converters.errors import (
    AdapterhubError,
    IntegrityError,
    NotFoundError,
    ParameterError,
    RefusedError,
    UsageError,
)
from adapterhub_converters.lazy_dataclass import dataclass

from . import base_sources, bom, rebuild, signature_checks, source_names, sources
from .workspace import StrPath, Workspace, as_list

if TYPE_CHECKING:
    from adapterhub.maintenance.findings import Finding
    from adapterhub.registry.registry import Registry
    from adapterhub.trust.keys import Signer, TrustedSigner
    from adapterhub_converters.bases import BaseSpec

    from .signature_checks import Signable

BUILDER = "urn:adapterhub:trainer"
"""The id of adapterhub's own trainer as the builder in the provenance that it signs at the end of its run."""
RECORD = "urn:adapterhub:record"
"""The builder in the provenance of a training by the trainer's record, signed by somebody who has read it."""
_BUILD = "urn:adapterhub:build:train:1"
# Facts of the base that go into the predicate. Its name and revision do too, but are not compared: the digests identify it.
_BASE = ("fingerprint", "architecture", "model_type", "tokenizer_digest", "chat_template_digest", "quantization")
_UNCOMPARED: Mapping[str, tuple[str, ...]] = {  # patterns of fields that differ between honest computations
    FITS: ("checker.*", "base.repo", "base.revision", "base.uri"),
    MERGE: ("rebuilder.*", "parents.*.signer", "parents.*.name"),
    TRAINING: ("runDetails.builder.id", "runDetails.metadata.finishedOn", "buildDefinition.resolvedDependencies.*.uri"),
    SCAN: ("scanner.*",),
    BILL: ("metadata.tools.*",),
}
_SHOWN = 5  # differences quoted in one finding: its message is a line of a terminal


@dataclass(frozen=True)
class Inputs:
    """Inputs that attestations are computed from, besides the version.

    Attributes:
        base: The model that the version fits or was trained on.
        parents: Public keys, one of which must have signed each parent of a merge.
        data: Files that the version was trained on.
        builder: The URI of the system that trained it; None if adapterhub's own trainer recorded it.
        base_license: The license of the base in a bill; None for that of the model card of `base`.
        billed_name: The name of the version in a bill; None for its own.
    """

    base: StrPath | BaseSpec | None = None
    parents: Sequence[StrPath] = ()
    data: Sequence[StrPath] = ()
    builder: str | None = None
    base_license: str | None = None
    billed_name: str | None = None


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
        attestations = [_attestation(kind, version, inputs, trusted, workspace) for kind in kinds]
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
    return Attestation(TYPES[TRAINING], name, digest, _training(source, BUILDER))


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
        recomputed = _attestation(
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


# ---- predicates


def _attestation(
    kind: str, version: Signable, inputs: Inputs, signers: Sequence[TrustedSigner], workspace: Workspace
) -> Attestation:
    if kind == MERGE:
        predicate = _merge(version, signers, workspace)
    elif kind == BILL:
        bill = bom.bom(
            version.pinned,
            base=inputs.base,
            base_license=inputs.base_license,
            name=inputs.billed_name,
            workspace=workspace,
        )
        predicate = dict(bill.document)
    else:
        # By digest: a tag could move between the predicate and the signature.
        with (
            sources.open_source(version.pinned, workspace, for_report=True) as source,
            sources.relabel_errors(source.folder, version.location),
        ):
            if kind == FITS:
                predicate = _fits(source, inputs, workspace)
            else:
                predicate = _scan(source) if kind == SCAN else _training(source, inputs.builder)
    return Attestation(TYPES[kind], version.name, version.digest, predicate)


def _scan(source: sources.Source) -> dict[str, Any]:
    """Return the problems that a scan of the files finds. Raise RefusedError if one of them is an error."""
    from adapterhub.checks.scan import scan

    report = scan(source.path, display_name=".")
    errors = [problem for problem in report.problems if report.fails(problem)]
    if errors:
        listed = "; ".join(f"{problem.where}: {problem.what}" for problem in errors[:_SHOWN])
        raise RefusedError(source.location, f"its scan is not clean: {listed}", "Remove what the scan finds, and push that")
    problems = [
        {"code": problem.code, "severity": problem.severity, "where": problem.where, "what": problem.what}
        for problem in report.problems
    ]
    return {"scanner": {"name": "adapterhub", "version": __version__}, "result": "PASSED", "problems": problems}


def _fits(source: sources.Source, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
    """Return the digests of the base and the verdict of each runtime on the adapter. Raise RefusedError if it does not fit."""
    from adapterhub import checks
    from adapterhub.registry import packaging
    from adapterhub_converters.bases import BaseSpec

    base = inputs.base
    spec = base if isinstance(base, BaseSpec) else base_sources.read_base(base or "", workspace)
    if not spec.fingerprint:
        raise RefusedError(spec.source, "its tensors are not known, so it has no digest", "Name a base with its weights")
    report = checks.check(source.path, base=spec, limit=_SHOWN, display_name=source.location)
    packaging.raise_or_collect_errors(report, spec, force=False, try_storing=None)
    return {
        "base": {
            "repo": spec.repo,
            "revision": spec.revision,
            **_uri(spec.repo, spec.revision),
            "config": dict(spec.config),
            **{name: getattr(spec, name) for name in _BASE},
        },
        "checker": {"name": "adapterhub", "version": __version__},
        "verdicts": {
            name: {"version": verdict.version, "verdict": verdict.verdict, "reasons": list(verdict.reasons)}
            for name, verdict in report.verdicts.items()
        },
    }


def _merge(version: Signable, signers: Sequence[TrustedSigner], workspace: Workspace) -> dict[str, Any]:
    """Return the recipe and the parents with their signers. Raise RefusedError if a rebuild gives other bytes."""
    if source_names.is_address(version.pinned):
        raise RefusedError(
            version.location, "is rebuilt from its parents, which are not in the registry", "Copy it and them to the registry"
        )
    rebuilt = rebuild.rebuild(version.pinned, workspace)
    if rebuilt.differences:
        names = ", ".join(difference.name for difference in rebuilt.differences[:_SHOWN])
        raise RefusedError(
            version.location, f"is not what its recipe makes of its parents: {names}", "Merge them again, and push that"
        )
    with workspace.open_registry() as registry:
        # A recipe may name one parent many times; its signature is verified once.
        manifest = registry.adapter_manifest(version.digest)
        parents = manifest.parents if manifest else ()
        signer_ids = {
            digest: _signer(registry, digest, signers) for digest in dict.fromkeys(parent.digest for parent in parents)
        }
    recipe = manifest.to_dict().get("recipe") if manifest else None
    return {
        "recipe": recipe,
        "parents": [
            {**_parent_descriptor(parent), "weight": parent.weight, "signer": signer_ids[parent.digest]} for parent in parents
        ],
        "rebuilder": {"name": "adapterhub", "version": __version__},
    }


def _signer(registry: Registry, digest: Digest, signers: Sequence[TrustedSigner]) -> str:
    """Return the id of the signer of a parent. Raise IntegrityError if none of `signers` signed it."""
    versions = registry.versions_with(digest)
    label = str(versions[0].ref) if versions else digest
    manifest = oci_manifest.parse(registry.store.read_document(digest), label)
    bundles = registry.store.signatures.read(digest, LIMIT)
    return bundle.find_accepted(bundles, signers, signed_files(manifest), None, label).signer.id


def _training(source: sources.Source, builder: str | None) -> dict[str, Any]:
    """Return the SLSA provenance (v1) of the training that adapter.json records.

    Raises:
        RefusedError: There is no record of a training, an input has no digest, or the builder did not record it.
    """
    manifest = AdapterManifest.read(source.folder)
    training = manifest.training if manifest else None
    if manifest is None or training is None or training.config is None:
        raise RefusedError(source.location, "has no record of a training", "Attest what adapterhub trained")
    if builder in (None, BUILDER, RECORD) and training.recorder != TRAINER:
        recorder = f"by {training.recorder[:64]}" if training.recorder else "by nobody that it names"
        problem = f"its training was recorded {recorder}, and not by adapterhub's trainer"
        raise RefusedError(source.location, problem, "Name what trained it, as its builder", code="other-recorder")
    data = [_data_descriptor(datum, source.location) for datum in training.data or ()]
    weights = [
        {
            "name": weights_file.path,
            "digest": _digest_set(weights_file.digest),
            "annotations": {"role": "base", "size": weights_file.size},
        }
        for weights_file in training.weights or ()
    ]
    base = manifest.base
    if not data or not (weights or base.fingerprint):
        raise RefusedError(
            source.location, "its training does not record its data and its base", "Attest what adapterhub trained"
        )
    base_annotations = {
        "role": "base",
        "revision": base.revision,
        "fingerprint": base.fingerprint,
        "quantization": base.quantization,
    }
    parents = [{**_parent_descriptor(parent), "annotations": {"role": "parent"}} for parent in manifest.parents]
    return {
        "buildDefinition": {
            "buildType": _BUILD,
            "externalParameters": {"config": training.config},
            "internalParameters": {"seed": training.seed},
            "resolvedDependencies": [
                {"name": base.repo or "base", **_uri(base.repo, base.revision), "annotations": base_annotations},
                *weights,
                *data,
                *parents,
            ],
        },
        "runDetails": {
            "builder": {"id": builder or RECORD, "version": dict(training.versions or {})},
            "metadata": {"finishedOn": training.created} if training.created else {},
        },
    }


def _uri(repo: str | None, revision: str | None) -> dict[str, str]:
    """Return the package URL of a base as a member of its descriptor; empty for one without a name."""
    purl = hub_purl(repo, revision)
    return {"uri": purl} if purl else {}


def _data_descriptor(datum: TrainingData, location: str) -> dict[str, Any]:
    name = datum.path or datum.name or "data"
    if not datum.digest:
        raise RefusedError(location, f"its training records no digest of {name}", "Attest a training on files")
    facts = {
        "split": datum.split,
        "size": datum.size,
        "documents": datum.documents,
        "tokens": datum.tokens,
        "license": datum.license,
    }
    recorded_facts = {key: value for key, value in facts.items() if value is not None}
    return {"name": name, "digest": _digest_set(datum.digest), "annotations": {"role": "data", **recorded_facts}}


def _parent_descriptor(parent: Parent) -> dict[str, Any]:
    return {"name": parent.ref or "parent", "digest": _digest_set(parent.digest)}


def _digest_set(digest: Digest) -> dict[str, str]:
    return {"sha256": digest.removeprefix("sha256:")}


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
        if _digest_set(sha256_file(path)) not in data:
            yield f"{path} is not among its data"
    if isinstance(inputs.base, str | os.PathLike):
        folder = base_sources.weights(inputs.base, workspace)
        local_files = {path.name: path for path in (folder.iterdir() if folder.is_dir() else [folder])}
        for name, digest in weights.items():
            if name not in local_files:
                yield f"{name} is not in {folder}"
            elif _digest_set(sha256_file(local_files[name])) != digest:
                yield f"{name} in {folder} has other bytes"
