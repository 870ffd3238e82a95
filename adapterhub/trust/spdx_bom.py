"""The bill of materials of an adapter in SPDX 3.0.1, with its profiles for AI and for data sets (spdx.github.io/spdx-spec).

It has the same facts as the bill in CycloneDX (`cyclonedx_bom`), and depends on no clock either: the time that SPDX requires is
given, or is that of the training. The profile `ai` requires a supplier, a day of release and a place to download of each AI
package: without them, the document does not claim to conform to it, and bases and ancestors, of which less is known, are
packages whose purpose is a model. What is not recorded is left out, or is one of SPDX's own words for that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adapterhub.digest import Digest
from adapterhub.manifest import licensing
from adapterhub.manifest.document import AdapterManifest, BaseInfo, DataSource, DeclaredEvaluation, TrainingData
from adapterhub.version import __version__
from adapterhub_converters.errors import RefusedError
from adapterhub_converters.lazy_dataclass import dataclass

from .cyclonedx_bom import UNRECORDED, BilledAdapter, as_uri, dataset_name, source_name, training_data
from .statement import hub_purl

SPDX_VERSION = "3.0.1"
_CONTEXT = f"https://spdx.org/rdf/{SPDX_VERSION}/spdx-context.jsonld"
_NO_LICENSE = f"https://spdx.org/rdf/{SPDX_VERSION}/terms/ExpandedLicensing/NoAssertionLicense"
_CREATION = "_:creation"  # the blank node that all elements refer to
_AI_FACTS = ("suppliedBy", "releaseTime", "software_downloadLocation")
"""What the profile `ai` requires of a package, and an adapter need not have."""

Node = dict[str, Any]


@dataclass(frozen=True)
class _Package:
    """A package and what it is related to: a relationship and the ids at its other end."""

    node: Node
    declared_license: str
    relations: Sequence[tuple[str, Sequence[str]]] = ()


def spdx_bill(billed: BilledAdapter) -> Node:
    """Return the SPDX document of a version, whose time without one in `created` is that of the training.

    Raises:
        RefusedError: No time is known.
    """
    name, digest, manifest = billed.name, billed.digest, billed.manifest
    created = billed.created or (manifest.training.created if manifest.training else None)
    if not created:
        raise RefusedError(
            name, "SPDX requires the time of a bill, and no training records one", "Give the time", code="no-time"
        )
    ids = f"urn:adapterhub:bill:{digest.removeprefix('sha256:')}:"
    supplier = billed.supplier or manifest.supplier
    agent = f"{ids}supplier" if supplier else f"{ids}adapterhub"
    adapter = _adapter(f"{ids}adapter", name, digest, manifest) | ({"suppliedBy": agent} if supplier else {})
    packages = list(_packages(ids, adapter, billed))
    elements = [
        {"type": "Organization", "spdxId": agent, "name": supplier}
        if supplier
        else {"type": "SoftwareAgent", "spdxId": agent, "name": f"adapterhub {__version__}"},
        *(package.node for package in packages),
        *(
            _file(node_id, entry.path, entry.digest)
            for node_id, entry in zip(_file_ids(ids, manifest), manifest.files, strict=True)
        ),
        *_licenses_and_relations(ids, packages),
    ]
    profiles = ["core", "software", "simpleLicensing"]
    if all(fact in adapter for fact in _AI_FACTS):
        profiles.append("ai")
    document = {
        "type": "SpdxDocument",
        "spdxId": f"{ids}document",
        "name": f"bill of materials of {name}",
        "profileConformance": profiles,
        "rootElement": [adapter["spdxId"]],
        "element": [element["spdxId"] for element in elements],
    }
    creation = {"type": "CreationInfo", "@id": _CREATION, "specVersion": SPDX_VERSION, "created": created, "createdBy": [agent]}
    return {
        "@context": _CONTEXT,
        "@graph": [creation, *({**element, "creationInfo": _CREATION} for element in (document, *elements))],
    }


# ---- packages


def _packages(ids: str, adapter: Node, billed: BilledAdapter) -> Iterator[_Package]:
    """Yield the adapter, its base, its ancestors and the data of all of them."""
    base_id, manifest, ancestors = f"{ids}base", billed.manifest, billed.ancestors
    datasets = {dataset: f"{ids}data-{number}" for number, dataset in enumerate(billed.datasets, start=1)}
    sources = {source: f"{ids}source-{number}" for number, source in enumerate(billed.sources, start=1)}
    parents = {ancestor.digest: f"{ids}adapter-{ancestor.digest[7:19]}" for ancestor in ancestors}

    def relations(of: AdapterManifest) -> list[tuple[str, Sequence[str]]]:
        made_from = [parents[parent.digest] for parent in of.parents if parent.digest in parents]
        trained_on = [datasets[dataset] for dataset in training_data(of)] + [
            sources[source] for source in of.data_sources or ()
        ]
        return [("dependsOn", [base_id]), ("descendantOf", made_from), ("trainedOn", trained_on)]

    yield _Package(
        adapter, licensing.expression(manifest.license), [*relations(manifest), ("contains", _file_ids(ids, manifest))]
    )
    yield _Package(_base(base_id, manifest.base), licensing.expression(billed.base_license))
    for ancestor in ancestors:
        node, known = _package(parents[ancestor.digest], ancestor.name, ancestor.digest), ancestor.manifest
        yield _Package(node, licensing.expression(known.license) if known else "", relations(known) if known else ())
    for dataset, node_id in datasets.items():
        yield _Package(_dataset(node_id, dataset), licensing.expression(dataset.license))
    for source, node_id in sources.items():
        yield _Package(_source(node_id, source), licensing.expression(source.license))


def _package(node_id: str, name: str, version: str | None) -> Node:
    """Return the package of a model; a version that is a digest is its hash too."""
    node: Node = {"type": "software_Package", "spdxId": node_id, "name": name, "software_primaryPurpose": "model"}
    if version:
        node["software_packageVersion"] = version
    return node | ({"verifiedUsing": [_hash(version)]} if version and version.startswith("sha256:") else {})


def _adapter(node_id: str, name: str, digest: Digest, manifest: AdapterManifest) -> Node:
    training = manifest.training
    hyperparameters = {
        "method": manifest.method, "r": manifest.max_rank, "alpha": manifest.alpha, "targets": manifest.targets,
        "dtype": manifest.dtype, "seed": training.seed if training else None,
    }  # fmt: skip
    metrics = dict((training.metrics if training else None) or {})
    evaluations = [_entry(_evaluation_title(evaluation), evaluation.value) for evaluation in manifest.evaluations or ()]
    personal_data = [source.personal_data for source in manifest.data_sources or ()]
    facts = {
        "description": manifest.description,
        "releaseTime": _midnight(manifest.released),
        "validUntilTime": _midnight(manifest.expires),
        "builtTime": training.created if training else None,
        "software_downloadLocation": manifest.download_location,
        "ai_typeOfModel": [
            *([f"{manifest.method} adapter"] if manifest.method else []),
            *filter(None, (manifest.base.model_type, manifest.base.architecture)),
        ],
        "ai_domain": [manifest.task] if manifest.task else [],
        "ai_hyperparameter": _entries(hyperparameters),
        "ai_metric": [*_entries(metrics), *evaluations],
        "ai_informationAboutTraining": _text(dict(training.config)) if training and training.config else None,
        "ai_informationAboutApplication": manifest.intended_use,
        "ai_limitation": manifest.limitations,
        "ai_energyConsumption": _energy(manifest.energy_kwh),
        "ai_useSensitivePersonalInformation": _sensitive(personal_data) if personal_data else None,
    }
    return _package(node_id, name, digest) | {"type": "ai_AIPackage"} | {key: value for key, value in facts.items() if value}


def _evaluation_title(evaluation: DeclaredEvaluation) -> str:
    data = " ".join(filter(None, (evaluation.dataset, evaluation.split)))
    return f"{evaluation.metric} ({data})" if data else evaluation.metric


def _midnight(day: str | None) -> str | None:
    """Return the first moment of a day, in UTC."""
    return f"{day}T00:00:00Z" if day else None


def _sensitive(has_personal_data: Sequence[bool | None]) -> str:
    """Return whether sources have sensitive personal data, in SPDX's words: without personal data, they have none."""
    return "no" if all(answer is False for answer in has_personal_data) else "noAssertion"


def _energy(kwh: float | None) -> Node | None:
    """Return the energy of the training."""
    if kwh is None:
        return None
    quantity = {"type": "ai_EnergyConsumptionDescription", "ai_energyQuantity": kwh, "ai_energyUnit": "kilowattHour"}
    return {"type": "ai_EnergyConsumption", "ai_finetuningEnergyConsumption": [quantity]}


def _base(node_id: str, base: BaseInfo) -> Node:
    purl = hub_purl(base.repo, base.revision)
    node = _package(node_id, base.repo or base.model_type or UNRECORDED, base.revision)
    return node | ({"software_packageUrl": purl} if purl else {})


def _dataset(node_id: str, dataset: TrainingData) -> Node:
    node: Node = {"type": "dataset_DatasetPackage", "spdxId": node_id, "name": dataset_name(dataset)}
    node |= {"dataset_datasetType": ["noAssertion"], "software_primaryPurpose": "data"}
    return node | ({"verifiedUsing": [_hash(dataset.digest)]} if dataset.digest else {})


def _source(node_id: str, source: DataSource) -> Node:
    """Return the data set of a source that the owner declares."""
    days = " ".join(filter(None, (source.collected_from, "to" if source.collected_until else None, source.collected_until)))
    collection = "; ".join(filter(None, (source.kind, days and f"collected {days}", source.rights_reserved)))
    node: Node = {
        "type": "dataset_DatasetPackage",
        "spdxId": node_id,
        "name": source_name(source),
        "dataset_datasetType": ["noAssertion"],
        "software_primaryPurpose": "data",
        "dataset_dataCollectionProcess": collection,
        "dataset_hasSensitivePersonalInformation": _sensitive([source.personal_data]),
    }
    url = as_uri(source.address)
    return node | ({"software_downloadLocation": url} if url else {})


def _file(node_id: str, path: str, digest: Digest) -> Node:
    return {"type": "software_File", "spdxId": node_id, "name": path, "verifiedUsing": [_hash(digest)]}


def _file_ids(ids: str, manifest: AdapterManifest) -> list[str]:
    return [f"{ids}file-{number}" for number in range(1, len(manifest.files) + 1)]


def _hash(digest: Digest) -> Node:
    return {"type": "Hash", "algorithm": "sha256", "hashValue": digest.removeprefix("sha256:")}


def _entries(facts: Mapping[str, Any]) -> list[Node]:
    """Return the facts that have a value as dictionary entries, with values as text."""
    present = {key: value for key, value in facts.items() if value not in (None, "", (), [])}
    return [_entry(key, value) for key, value in sorted(present.items())]


def _entry(key: str, value: Any) -> Node:
    return {"type": "DictionaryEntry", "key": key, "value": _text(value)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


# ---- relationships


def _licenses_and_relations(ids: str, packages: Sequence[_Package]) -> Iterator[Node]:
    """Yield each license once, and the relationships of the packages."""
    expressions = sorted({package.declared_license for package in packages} - {""})
    license_ids = {text: f"{ids}license-{number}" for number, text in enumerate(expressions, start=1)}
    for text, node_id in license_ids.items():
        yield {
            "type": "simplelicensing_LicenseExpression",
            "spdxId": node_id,
            "simplelicensing_licenseExpression": text,
        }
    number = 0
    for package in packages:
        license_id = license_ids.get(package.declared_license, _NO_LICENSE)
        # Nobody but the owner has looked at it, so that what is concluded is left open.
        licenses = [("hasDeclaredLicense", [license_id]), ("hasConcludedLicense", [_NO_LICENSE])]
        for kind, targets in (*package.relations, *licenses):
            if targets:
                number += 1
                yield {
                    "type": "Relationship",
                    "spdxId": f"{ids}relation-{number}",
                    "from": package.node["spdxId"],
                    "relationshipType": kind,
                    "to": list(targets),
                }
