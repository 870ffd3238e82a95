"""The predicates of attestations: what is claimed of a version, computed from it and from the inputs alone.

Whoever has the inputs computes the same one. It also records who computed it and with which program; these fields are not
compared (`operations.attest`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.digest import Digest
from adapterhub.manifest import oci_manifest
from adapterhub.manifest.document import TRAINER, AdapterManifest, Parent, TrainingData
from adapterhub.registry.signature_policy import LIMIT, signed_files
from adapterhub.trust import bundle
from adapterhub.trust.attestation import BILL, FITS, MERGE, SCAN, TYPES, Attestation
from adapterhub.trust.statement import hub_purl
from adapterhub.version import __version__
from adapterhub_converters.errors import (
    RefusedError,
)
from adapterhub_converters.lazy_dataclass import dataclass

from . import base_sources, bom, rebuild, source_names, sources
from .workspace import StrPath, Workspace

if TYPE_CHECKING:
    from adapterhub.registry.registry import Registry
    from adapterhub.trust.keys import TrustedSigner
    from adapterhub_converters.bases import BaseSpec

    from .signature_checks import Signable

BUILDER = "urn:adapterhub:trainer"
"""The id of adapterhub's own trainer as the builder in the provenance that it signs at the end of its run."""
RECORD = "urn:adapterhub:record"
"""The builder in the provenance of a training by the trainer's record, signed by somebody who has read it."""
_BUILD = "urn:adapterhub:build:train:1"
# Facts of the base that go into the predicate. Its name and revision do too, but are not compared: the digests identify it.
_BASE = ("fingerprint", "architecture", "model_type", "tokenizer_digest", "chat_template_digest", "quantization")
_MAX_SHOWN = 5  # problems of a scan that an error quotes: it is one line


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


def compute_attestation(
    kind: str, version: Signable, inputs: Inputs, signers: Sequence[TrustedSigner], workspace: Workspace
) -> Attestation:
    """Compute the attestation of a kind about a version.

    Args:
        kind: One of `TYPES`, except that of tests.
        version: The version.
        inputs: What it is computed from besides.
        signers: Whose signature each parent of a merge must have.
        workspace: Where the base and the parents are looked up.

    Raises:
        RefusedError: The claim does not hold, or nothing records it.
    """
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
                predicate = _scan(source) if kind == SCAN else training_predicate(source, inputs.builder)
    return Attestation(TYPES[kind], version.name, version.digest, predicate)


def _scan(source: sources.Source) -> dict[str, Any]:
    """Return the problems that a scan of the files finds. Raise RefusedError if one of them is an error."""
    from adapterhub.checks.scan import scan

    report = scan(source.path, display_name=".")
    errors = [problem for problem in report.problems if report.fails(problem)]
    if errors:
        listed = "; ".join(f"{problem.where}: {problem.what}" for problem in errors[:_MAX_SHOWN])
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
    report = checks.check(source.path, base=spec, limit=_MAX_SHOWN, display_name=source.location)
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
        names = ", ".join(difference.name for difference in rebuilt.differences[:_MAX_SHOWN])
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


def training_predicate(source: sources.Source, builder: str | None) -> dict[str, Any]:
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
            "digest": digest_set(weights_file.digest),
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
    return {"name": name, "digest": digest_set(datum.digest), "annotations": {"role": "data", **recorded_facts}}


def _parent_descriptor(parent: Parent) -> dict[str, Any]:
    return {"name": parent.ref or "parent", "digest": digest_set(parent.digest)}


def digest_set(digest: Digest) -> dict[str, str]:
    """Return a digest as in-toto has it, by its algorithm."""
    return {"sha256": digest.removeprefix("sha256:")}
