"""Attest what others can compute again: that a version fits a base, was rebuilt from its parents, or was trained as it records.

A predicate is a function of the version and its inputs alone, so that anybody who has the inputs computes the same one. It also
records who computed it and with which program, which is not compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapterhub_converters.errors import (
    AdapterhubError,
    IntegrityError,
    NotFoundError,
    ParameterError,
    RefusedError,
    UsageError,
)

from . import base_sources, combining, sources
from .digest import Digest, sha256_file
from .manifest import oci_manifest
from .manifest.document import AdapterManifest, Parent, TrainingData
from .registry.signatures import LIMIT, files_of
from .sharing import signatures
from .trust import attestation, bundle
from .trust.attestation import FITS, MERGE, TRAINING, TYPES, Attestation, Attested
from .version import __version__
from .workspace import StrPath, Workspace, listed

if TYPE_CHECKING:
    from adapterhub.maintenance.findings import Finding
    from adapterhub.registry.registry import Registry
    from adapterhub.sharing.signatures import Signable
    from adapterhub.trust.keys import Signer, TrustedSigner
    from adapterhub_converters.bases import BaseSpec

BUILDER = "urn:adapterhub:trainer"
"""The default id of the builder in the provenance of a training."""
_BUILD = "urn:adapterhub:build:train:1"
_BASE = ("fingerprint", "architecture", "model_type", "tokenizer_digest", "chat_template_digest", "quantization")
_UNCOMPARED: Mapping[str, tuple[str, ...]] = {  # who computed it, and names of inputs
    FITS: ("checker.*", "base.repo", "base.revision"),
    MERGE: ("rebuilder.*", "parents.*.signer", "parents.*.name"),
    TRAINING: ("runDetails.builder.id",),
}
_SHOWN = 5  # differences in a finding


@dataclass(frozen=True)
class Inputs:
    """What attestations are computed from, besides the version.

    Attributes:
        base: The model that the version fits, or that it was trained on.
        parents: Keys, one of which must have signed each parent of a merge.
        data: Files that it was trained on.
        builder: The URI of what trained it.
    """

    base: StrPath | BaseSpec | None = None
    parents: Sequence[StrPath] = ()
    data: Sequence[StrPath] = ()
    builder: str = BUILDER


def attest(
    ref: str,
    key: StrPath | Signer,
    *,
    fits: StrPath | BaseSpec | None = None,
    merge: bool = False,
    training: bool = False,
    parents: StrPath | Sequence[StrPath] = (),
    builder: str = BUILDER,
    passphrase: bytes | None = None,
    workspace: Workspace | None = None,
) -> tuple[Attested, ...]:
    """Compute statements about a version, sign them, and attach them to it as signatures are.

    Args:
        ref: A ref of the registry, or an address.
        key: Your private key, as for `sign`.
        fits: Attest that it fits this base model, with the verdict of each runtime.
        merge: Attest that a rebuild from its parents, each of them signed, gives the same bytes.
        training: Attest the config, the data and the base of its training, as adapter.json records them: SLSA's provenance.
        parents: Public keys, one of which must have signed each parent; by default that of `key`.
        builder: The URI of what trained it, in the provenance.
        passphrase: That of the key, if it is encrypted; the PIN of its hardware.
        workspace: The registry, the credentials.

    Raises:
        RefusedError: One of the claims does not hold. Nothing is signed.
        IntegrityError: A parent is not signed.

    Example:
        >>> [one.kind for one in ah.attest("team/sql", "team.key", fits="./tiny")]
        ['fits']
    """
    from adapterhub.trust import keys, signers

    here, secret, by = workspace or Workspace(), signers.read(key, passphrase), listed(parents)
    kinds = [kind for kind, wanted in ((FITS, fits is not None), (MERGE, merge), (TRAINING, training)) if wanted]
    if not kinds:
        raise ParameterError("fits", "nothing to attest", "Choose what to attest", code="nothing-to-attest")
    trusted = keys.trusted(by) if by else [secret.public]
    with _opened(ref, here) as found:
        inputs = Inputs(fits, by, builder=builder)
        made = [_attestation(kind, found, inputs, trusted, here) for kind in kinds]
        for one in made:
            found.add(one.sign(secret))
    return tuple(Attested(one, secret.public) for one in made)


def verify(
    source: StrPath, keys: Sequence[TrustedSigner], workspace: Workspace, *, inputs: Inputs | None = None
) -> tuple[Signable, list[Attested], list[Finding]]:
    """Verify the attestations of a version and, with `inputs`, compute them again.

    Returns:
        The version, what one of `keys` attests about it, and the findings: an error if there is no attestation, or if one
        comes out differently now; a note for each that is not accepted, since anybody can attach one.
    """
    from adapterhub.maintenance.findings import Finding

    found, attested, findings = _accepted(source, keys, workspace)
    if not attested:
        reasons = f" that is accepted: {'; '.join(one.what for one in findings[:_SHOWN])}" if findings else ""
        return found, [], [Finding(attestation.CODE, "error", found.where, f"has no attestation{reasons}")]
    for one in attested if inputs else ():
        findings += _compared(one.attestation, found, inputs or Inputs(), keys, workspace, others=attested)
    return found, attested, findings


def _accepted(
    source: StrPath, keys: Sequence[TrustedSigner], workspace: Workspace
) -> tuple[Signable, list[Attested], list[Finding]]:
    from adapterhub.maintenance.findings import Finding

    attested, findings = [], []
    with _opened(source, workspace) as found:
        for raw in attestation.among(found.read()):
            try:
                one = attestation.verify(raw, keys, found.where)
                one.attestation.check(one.kind, found.digest, found.where)
                attested.append(one)
            except AdapterhubError as error:
                findings.append(Finding(attestation.CODE, "note", found.where, error.what))
    return found, attested, findings


@contextmanager
def _opened(source: StrPath, workspace: Workspace) -> Iterator[Signable]:
    with signatures.opened(source, workspace) as found:
        if not found.digest:
            raise UsageError(found.where, "is a folder, and only versions have attestations", "Push it, and name the version")
        yield found


def _compared(
    known: Attestation,
    found: Signable,
    inputs: Inputs,
    keys: Sequence[TrustedSigner],
    workspace: Workspace,
    *,
    others: Sequence[Attested],
) -> Iterator[Finding]:
    """Yield what is different when an attestation is computed again."""
    from adapterhub.maintenance.findings import Finding
    from adapterhub.trust.keys import trusted

    kind, signers = known.kind, trusted(inputs.parents) if inputs.parents else keys
    if kind == FITS and inputs.base is None:
        what = f"{kind}: cannot be computed again without the base {attestation.base_of(known)[:19]}…"
        yield Finding(attestation.CODE, "error", found.where, what, "Name the base", "attested-base")
        return
    try:
        again = _attestation(kind, found, inputs, signers, workspace)
    except (RefusedError, IntegrityError, NotFoundError) as error:
        yield Finding(attestation.CODE, "error", found.where, f"{kind}: cannot be computed again: {error.what}", error.hint)
        return
    old, new = attestation.base_of(known), attestation.base_of(again)
    if old != new and any(attestation.base_of(one.attestation) == new for one in others):  # it fits several bases
        what = f"{kind}: is about another base, {old[:19]}…, and was not compared"
        yield Finding(attestation.CODE, "note", found.where, what)
        return
    wrong = list(_differences(known, again))
    if kind == TRAINING:
        wrong += _other_inputs(again, inputs, workspace)
        if inputs.base is None or not inputs.data:
            what = f"{kind}: compared with the record in adapter.json, and not with the bytes of every input"
            yield Finding(attestation.CODE, "note", found.where, what, "Name the base and the data to compare their bytes")
    if wrong:
        more = f" (and {len(wrong) - _SHOWN} more)" if wrong[_SHOWN:] else ""
        what = f"{kind}: is another statement when it is computed again: {'; '.join(wrong[:_SHOWN])}{more}"
        yield Finding(attestation.CODE, "error", found.where, what)


def _differences(known: Attestation, again: Attestation) -> Iterator[str]:
    ignored = _UNCOMPARED[known.kind]
    old, new = (dict(_leaves(attestation.parse(one.dump(), "").predicate)) for one in (known, again))
    for path in sorted(old.keys() | new.keys()):
        name, (was, now) = ".".join(path), (repr(one[path]) if path in one else "absent" for one in (old, new))
        if was != now and not any(fnmatchcase(name, pattern) for pattern in ignored):
            yield f"{name[:80]} is {was[:60]}, and now {now[:60]}"


def _leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """The values of a document by their paths."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, item in items:
        yield from _leaves(item, (*path, str(key)))
    if not items:
        yield path, value


# ---- predicates


def _attestation(
    kind: str, found: Signable, inputs: Inputs, signers: Sequence[TrustedSigner], workspace: Workspace
) -> Attestation:
    if kind == MERGE:
        predicate = _merge(found, signers, workspace)
    else:
        with sources.opened(found.pinned, workspace) as source, sources.naming(source.folder, found.where):
            predicate = _fits(source, inputs, workspace) if kind == FITS else _training(source, inputs.builder)
    return Attestation(TYPES[kind], found.name, found.digest, predicate)


def _fits(source: sources.Source, inputs: Inputs, workspace: Workspace) -> dict[str, Any]:
    """The digests of the base, and the verdict of each runtime on the adapter; RefusedError if it does not fit."""
    from adapterhub import checks
    from adapterhub.registry import publish
    from adapterhub_converters.bases import BaseSpec

    base = inputs.base
    spec = base if isinstance(base, BaseSpec) else base_sources.read_base(base or "", workspace)
    if not spec.fingerprint:
        raise RefusedError(spec.where, "its tensors are not known, so it has no digest", "Name a base with its weights")
    report = checks.check(source.path, base=spec, limit=_SHOWN, where=source.where)
    publish.errors_of(report, spec, force=False, forced=None)
    return {
        "base": {
            "repo": spec.repo,
            "revision": spec.revision,
            "config": dict(spec.config),
            **{name: getattr(spec, name) for name in _BASE},
        },
        "checker": {"name": "adapterhub", "version": __version__},
        "verdicts": {
            name: {"version": one.version, "verdict": one.verdict, "reasons": list(one.reasons)}
            for name, one in report.verdicts.items()
        },
    }


def _merge(found: Signable, signers: Sequence[TrustedSigner], workspace: Workspace) -> dict[str, Any]:
    """The recipe, and the parents with their signers; RefusedError if a rebuild gives other bytes."""
    if sources.is_address(found.pinned):
        raise RefusedError(
            found.where, "is rebuilt from its parents, which are not in the registry", "Copy it and them to the registry"
        )
    rebuilt = combining.rebuild(found.pinned, workspace)
    if rebuilt.differences:
        names = ", ".join(one.name for one in rebuilt.differences[:_SHOWN])
        raise RefusedError(
            found.where, f"is not what its recipe makes of its parents: {names}", "Merge them again, and push that"
        )
    with workspace.opened() as registry:
        manifest = registry.adapter_manifest(found.digest)
        parents = manifest.parents if manifest else ()
        signed = {digest: _signer(registry, digest, signers) for digest in dict.fromkeys(one.digest for one in parents)}
    recipe = manifest.to_dict().get("recipe") if manifest else None
    return {
        "recipe": recipe,
        "parents": [{**_described(one), "weight": one.weight, "signer": signed[one.digest]} for one in parents],
        "rebuilder": {"name": "adapterhub", "version": __version__},
    }


def _signer(registry: Registry, digest: Digest, signers: Sequence[TrustedSigner]) -> str:
    """The id of the signer of a parent; IntegrityError if it is none of `signers`."""
    held = registry.holding(digest)
    where = str(held[0].ref) if held else digest
    made = oci_manifest.parse(registry.store.read_document(digest), where)
    bundles = registry.store.signatures.read(digest, LIMIT)
    return bundle.accepted(bundles, signers, files_of(made), None, where).signer.id


def _training(source: sources.Source, builder: str) -> dict[str, Any]:
    """SLSA provenance, v1, of the training that adapter.json records; RefusedError if the digest of an input is missing."""
    manifest = AdapterManifest.read(source.folder)
    training = manifest.training if manifest else None
    if manifest is None or training is None or training.config is None:
        raise RefusedError(source.where, "has no record of a training", "Attest what adapterhub trained")
    data = [_datum(one, source.where) for one in training.data or ()]
    weights = [
        {"name": one.path, "digest": _digests(one.digest), "annotations": {"role": "base", "size": one.size}}
        for one in training.weights or ()
    ]
    base = manifest.base
    if not data or not (weights or base.fingerprint):
        raise RefusedError(source.where, "its training does not record its data and its base", "Attest what adapterhub trained")
    about = {"role": "base", "revision": base.revision, "fingerprint": base.fingerprint, "quantization": base.quantization}
    parents = [{**_described(one), "annotations": {"role": "parent"}} for one in manifest.parents]
    return {
        "buildDefinition": {
            "buildType": _BUILD,
            "externalParameters": {"config": training.config},
            "internalParameters": {"seed": training.seed},
            "resolvedDependencies": [{"name": base.repo or "base", "annotations": about}, *weights, *data, *parents],
        },
        "runDetails": {
            "builder": {"id": builder, "version": dict(training.versions or {})},
            "metadata": {"finishedOn": training.created},
        },
    }


def _datum(one: TrainingData, where: str) -> dict[str, Any]:
    name = one.path or one.name or "data"
    if not one.digest:
        raise RefusedError(where, f"its training records no digest of {name}", "Attest a training on files")
    more = {"split": one.split, "size": one.size, "documents": one.documents, "tokens": one.tokens, "license": one.license}
    known = {key: value for key, value in more.items() if value is not None}
    return {"name": name, "digest": _digests(one.digest), "annotations": {"role": "data", **known}}


def _described(parent: Parent) -> dict[str, Any]:
    return {"name": parent.ref or "parent", "digest": _digests(parent.digest)}


def _digests(digest: Digest) -> dict[str, str]:
    return {"sha256": digest.removeprefix("sha256:")}


def _other_inputs(again: Attestation, inputs: Inputs, workspace: Workspace) -> Iterator[str]:
    """Yield the files of the base and the data that are here and differ from those of the training."""
    listed = again.predicate["buildDefinition"]["resolvedDependencies"]
    data = [one["digest"] for one in listed if one["annotations"]["role"] == "data"]
    weights = {one["name"]: one["digest"] for one in listed if one["annotations"]["role"] == "base" and "digest" in one}
    for path in map(Path, inputs.data):
        if _digests(sha256_file(path)) not in data:
            yield f"{path} is not among its data"
    if isinstance(inputs.base, str | os.PathLike):
        folder = base_sources.weights(inputs.base, workspace)
        here = {path.name: path for path in (folder.iterdir() if folder.is_dir() else [folder])}
        for name, digest in weights.items():
            if name not in here:
                yield f"{name} is not in {folder}"
            elif _digests(sha256_file(here[name])) != digest:
                yield f"{name} in {folder} has other bytes"
