"""The bill of materials of an adapter: CycloneDX 1.7 (ECMA-424), with its base, parents, data and files by digest.

cyclonedx-python-lib has no class for model cards, so the JSON is written here, and tests validate it against the official
schema. It depends on no clock and no machine: the same version has the same bill. What is not recorded is left out, or marked
as such. It is not a legal statement.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from adapterhub.digest import Digest
from adapterhub.manifest import licensing
from adapterhub.manifest.document import AdapterManifest, BaseInfo, DataSource, TrainingData
from adapterhub.manifest.licensing import CombinedLicense, LicensedPart
from adapterhub.version import __version__
from adapterhub_converters import safe_regex
from adapterhub_converters.lazy_dataclass import dataclass

from .statement import hub_purl

SPEC = "1.7"
_SCHEMA = f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json"
_MODEL = "machine-learning-model"
PREFIX = "adapterhub:"
"""The prefix of adapterhub's own property names."""
UNRECORDED = "not recorded"
"""The value of a required field that is not recorded."""
_URI = safe_regex.Pattern(r"[A-Za-z][A-Za-z0-9+.-]*:[A-Za-z0-9._~:/?#@!$&'()*+,;=%-]+")


@dataclass(frozen=True)
class Ancestor:
    """An adapter that this one was made from, directly or not; `manifest` is None if it is not available."""

    digest: Digest
    name: str
    manifest: AdapterManifest | None = None


@dataclass(frozen=True)
class BilledAdapter:
    """An adapter and what its bill of materials says of it, in any format.

    Attributes:
        name: Its name, with or without a namespace.
        digest: The digest of its OCI manifest.
        manifest: Its adapter.json.
        ancestors: The adapters that it was made from, and those that they were made from.
        base_license: The license of the base model, which adapter.json does not have.
        supplier: The name of its supplier, in place of the one in its adapter.json.
        created: The time of the bill, in ISO 8601 and UTC; None where no time is given.
    """

    name: str
    digest: Digest
    manifest: AdapterManifest
    ancestors: Sequence[Ancestor] = ()
    base_license: str | None = None
    supplier: str | None = None
    created: str | None = None

    @property
    def datasets(self) -> list[TrainingData]:
        """The training data of the adapter and its ancestors, each once."""
        return list(dict.fromkeys(dataset for manifest in self._manifests for dataset in training_data(manifest)))

    @property
    def sources(self) -> list[DataSource]:
        """The declared sources of data of the adapter and its ancestors, each once."""
        return list(dict.fromkeys(source for manifest in self._manifests for source in manifest.data_sources or ()))

    @property
    def _manifests(self) -> list[AdapterManifest]:
        return [self.manifest, *(ancestor.manifest for ancestor in self.ancestors if ancestor.manifest)]


@dataclass(frozen=True, repr=False)
class Bill:
    """A bill of materials.

    Attributes:
        document: The CycloneDX JSON.
        license: The combined license.
    """

    document: Mapping[str, Any]
    license: CombinedLicense

    def dump(self) -> str:
        """Return the document as text."""
        return dump(self.document)

    def __repr__(self) -> str:
        return f"<Bill {self.document['metadata']['component']['name']}: {self.license.expression or 'no license recorded'}>"


def dump(document: Mapping[str, Any]) -> str:
    """Return the JSON of a bill as text."""
    return json.dumps(document, indent=2, ensure_ascii=True) + "\n"


def bill(billed: BilledAdapter) -> Bill:
    """Return the bill of materials of a version, which without a time in `created` has none."""
    name, digest, manifest, datasets = billed.name, billed.digest, billed.manifest, billed.datasets
    license_ = licensing.combine(_licensed_parts(billed))
    base = _base_component(manifest.base, billed.base_license)
    parents = [_ancestor_component(ancestor) for ancestor in billed.ancestors]
    dataset_components = [_dataset_component(number, dataset) for number, dataset in enumerate(datasets, start=1)]
    dataset_components += [_source_component(number, source) for number, source in enumerate(billed.sources, start=1)]
    component = {
        **_adapter_component(name, digest, manifest),
        "licenses": _own_licenses(manifest, license_),
        "components": [_file_component(entry.path, entry.digest, entry.size) for entry in manifest.files],
        "pedigree": {"ancestors": [base, *parents], "notes": _notes(manifest)},
        "modelCard": _model_card(manifest, dataset_components),
        "properties": _properties({**_facts(manifest), **_license_facts(manifest, license_), **_data_totals(datasets)}),
    }
    adapter = component["bom-ref"]
    document = {
        "$schema": _SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        # A UUID derived from name and digest, so that the same version always has the same bill.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'adapterhub:{name}@{digest}')}",
        "version": 1,
        "metadata": {
            **({"timestamp": billed.created} if billed.created else {}),
            "tools": {"components": [{"type": "application", "name": "adapterhub", "version": __version__}]},
            "component": {key: value for key, value in component.items() if value},
            **_supplier(billed.supplier or manifest.supplier, manifest.contact),
        },
        "components": dataset_components,
        "dependencies": [
            {"ref": adapter, "dependsOn": sorted({entry["bom-ref"] for entry in (base, *parents, *dataset_components)})},
        ],
    }
    return Bill(document, license_)


def _licensed_parts(billed: BilledAdapter) -> list[LicensedPart]:
    """Return the adapter, its base and its ancestors with their licenses."""
    manifest = billed.manifest
    base = manifest.base.repo or (manifest.base.fingerprint or UNRECORDED)[:19]
    parts = [LicensedPart("adapter", billed.name, manifest.license), LicensedPart("base", base, billed.base_license)]
    return [
        *parts,
        *(
            LicensedPart("parent", ancestor.name, ancestor.manifest.license if ancestor.manifest else None)
            for ancestor in billed.ancestors
        ),
        *(LicensedPart("data", dataset_name(dataset), dataset.license) for dataset in billed.datasets),
        *(LicensedPart("data", source_name(source), source.license) for source in billed.sources),
    ]


def training_data(manifest: AdapterManifest) -> tuple[TrainingData, ...]:
    """Return the training data that a manifest records."""
    return (manifest.training.data if manifest.training else None) or ()


def dataset_name(dataset: TrainingData) -> str:
    """Return the name of a data set with its split."""
    return " ".join(filter(None, (dataset.name or dataset.path or UNRECORDED, dataset.split)))


def source_name(source: DataSource) -> str:
    """Return the name of a source of data."""
    return source.name or source.address or f"{source.kind} data without a name"


def as_uri(text: str | None) -> str | None:
    """Return a text if it is a URI, which adapter.json does not require of it; else None."""
    return text if text and _URI.fullmatch(text) else None


# ---- components


def _supplier(name: str | None, contact: str | None) -> dict[str, Any]:
    """Return the supplier as a part of the metadata; empty without a name and an address."""
    address = (contact or "").removeprefix("mailto:")
    supplier: dict[str, Any] = {"name": name} if name else {}
    if as_uri(address):
        supplier["url"] = [address]
    elif address:
        supplier["contact"] = [{"name": address}]
    return {"supplier": supplier} if supplier else {}


def _adapter_component(name: str, digest: Digest, manifest: AdapterManifest) -> dict[str, Any]:
    """Return the component of an adapter."""
    space, _, last = name.rpartition("/")
    return {
        "type": _MODEL,
        "bom-ref": f"adapter@{digest}",
        "group": space,
        "name": last,
        "version": digest,
        "description": manifest.description or "",
        "hashes": [_hash(digest)],
        "externalReferences": [{"type": "distribution", "url": url}] if (url := as_uri(manifest.download_location)) else [],
    }


def _base_component(base: BaseInfo, license_: str | None) -> dict[str, Any]:
    """Return the component of the base model."""
    facts = {
        "fingerprint": base.fingerprint, "tokenizer": base.tokenizer_digest, "chat-template": base.chat_template_digest,
        "quantization": base.quantization,
    }  # fmt: skip
    details = {
        "group": (base.repo or "").rpartition("/")[0],
        "version": base.revision,
        "purl": hub_purl(base.repo, base.revision),
        "licenses": _licenses(licensing.expression(license_)),
        "properties": _properties({f"base:{key}": value for key, value in facts.items()}),
    }
    name = (base.repo or base.model_type or UNRECORDED).rpartition("/")[2]
    return {"type": _MODEL, "bom-ref": "base", "name": name, **{key: value for key, value in details.items() if value}}


def _ancestor_component(ancestor: Ancestor) -> dict[str, Any]:
    """Return the component of an ancestor, which is only its name and digest if there is no manifest."""
    if ancestor.manifest is None:
        return {
            "type": _MODEL,
            "bom-ref": f"adapter@{ancestor.digest}",
            "name": ancestor.name,
            "hashes": [_hash(ancestor.digest)],
        }
    component = _adapter_component(ancestor.name, ancestor.digest, ancestor.manifest)
    component["licenses"] = _licenses(licensing.expression(ancestor.manifest.license))
    return {key: value for key, value in component.items() if value}


def _file_component(path: str, digest: Digest, size: int) -> dict[str, Any]:
    """Return the component of a file."""
    properties = _properties({"size": size})
    return {"type": "file", "bom-ref": f"file:{path}", "name": path, "hashes": [_hash(digest)], "properties": properties}


def _dataset_component(number: int, dataset: TrainingData) -> dict[str, Any]:
    """Return the component of a data set."""
    facts = {"split": dataset.split, "documents": dataset.documents, "tokens": dataset.tokens, "size": dataset.size}
    details = {
        "hashes": [_hash(dataset.digest)] if dataset.digest else [],
        "licenses": _licenses(licensing.expression(dataset.license)),
        "data": [{"type": "dataset", "name": dataset_name(dataset)}],
        "properties": _properties({f"data:{key}": value for key, value in facts.items()}),
    }
    name = dataset.name or dataset.path or UNRECORDED
    return {
        "type": "data",
        "bom-ref": f"data-{number}",
        "name": name,
        **{key: value for key, value in details.items() if value},
    }


def _source_component(number: int, source: DataSource) -> dict[str, Any]:
    """Return the component of a source of data that the owner declares."""
    name, url = source_name(source), as_uri(source.address)
    facts = {
        "kind": source.kind,
        "address": None if url else source.address,
        "collected-from": source.collected_from,
        "collected-until": source.collected_until,
        "rights-reserved": source.rights_reserved,
        "personal-data": source.personal_data,
    }
    data = {
        "type": "dataset",
        "name": name,
        "contents": {"url": url} if url else {},
    }
    details = {
        "licenses": _licenses(licensing.expression(source.license)),
        "data": [{key: value for key, value in data.items() if value}],
        "properties": _properties({f"data:{key}": value for key, value in facts.items()}),
    }
    component = {"type": "data", "bom-ref": f"source-{number}", "name": name}
    return component | {key: value for key, value in details.items() if value}


def _hash(digest: Digest) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest.removeprefix("sha256:")}


def _licenses(expression: str) -> list[dict[str, str]]:
    return [{"expression": expression}] if expression else []


def _own_licenses(manifest: AdapterManifest, license_: CombinedLicense) -> list[dict[str, str]]:
    """Return the license that the owner declares, and the combined one unless that lacks a part."""
    declared = licensing.expression(manifest.license)
    declared_licenses = [{"expression": declared, "acknowledgement": "declared"}] if declared else []  # codespell:ignore
    is_complete = license_.expression and not license_.missing
    return (
        [*declared_licenses, {"expression": license_.expression, "acknowledgement": "concluded"}]  # codespell:ignore
        if is_complete
        else declared_licenses
    )


def _properties(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the facts that have a value as CycloneDX properties, with prefixed names and values as text."""
    return [{"name": f"{PREFIX}{key}", "value": _text(value)} for key, value in facts.items() if value not in (None, "", [])]


def _text(value: Any) -> str:
    """Return a value as text: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


# ---- facts about the adapter


def _model_card(manifest: AdapterManifest, sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return CycloneDX's model card: architecture, data sets, metrics, what the adapter is for and what it took."""
    parameters = {
        "task": manifest.task,
        "architectureFamily": manifest.base.model_type,
        "modelArchitecture": manifest.base.architecture,
        "datasets": [{"ref": dataset["bom-ref"]} for dataset in sets],
    }
    metrics = (manifest.training.metrics if manifest.training else None) or {}
    performance_metrics = [{"type": key, "value": _text(value)} for key, value in sorted(metrics.items())]
    for evaluation in manifest.evaluations or ():
        data = " ".join(filter(None, (evaluation.dataset, evaluation.split)))
        performance_metrics.append(
            {"type": evaluation.metric, "value": _text(evaluation.value), **({"slice": data} if data else {})}
        )
    considerations = {
        "useCases": [manifest.intended_use] if manifest.intended_use else [],
        "technicalLimitations": [manifest.limitations] if manifest.limitations else [],
        "environmentalConsiderations": _energy(manifest.energy_kwh),
    }
    card = {
        "modelParameters": {key: value for key, value in parameters.items() if value},
        "quantitativeAnalysis": {"performanceMetrics": performance_metrics} if performance_metrics else {},
        "considerations": {key: value for key, value in considerations.items() if value},
    }
    return {key: value for key, value in card.items() if value}


def _energy(kwh: float | None) -> dict[str, Any]:
    """Return the energy of the training; its providers, which CycloneDX requires a list of, are not recorded."""
    if kwh is None:
        return {}
    cost = {"value": kwh, "unit": "kWh"}
    return {"energyConsumptions": [{"activity": "fine-tuning", "energyProviders": [], "activityEnergyCost": cost}]}


def _facts(manifest: AdapterManifest) -> dict[str, Any]:
    """Return the facts of adapter.json that become properties."""
    training = manifest.training
    return {
        "method": manifest.method, "r": manifest.max_rank or None, "alpha": manifest.alpha, "targets": list(manifest.targets),
        "replaced": list(manifest.replaced), "parameters": manifest.parameters, "dtype": manifest.dtype,
        "format": manifest.format,
        "released": manifest.released, "expires": manifest.expires,
        "download-location": None if as_uri(manifest.download_location) else manifest.download_location,
        "languages": list(manifest.languages or ()), "trigger-words": list(manifest.trigger_words or ()),
        "tokenizer": manifest.tokenizer_digest, "chat-template": manifest.chat_template_digest,
        "training:created": training.created if training else None,
        "training:seed": training.seed if training else None,
        "training:versions": dict(training.versions) if training and training.versions else None,
        "training:config": dict(training.config) if training and training.config else None,
    }  # fmt: skip


def _license_facts(manifest: AdapterManifest, license_: CombinedLicense) -> dict[str, Any]:
    """Return the declared and the combined license, with the reasons."""
    return {
        "license:declared": licensing.expression(manifest.license) or UNRECORDED,
        "license:combined": license_.expression or UNRECORDED,
        "license:reasons": list(license_.reasons),
        "license:missing": list(license_.missing),
    }


def _data_totals(datasets: Sequence[TrainingData]) -> dict[str, Any]:
    """Return the totals of the training data, for the numbers that every data set has."""
    return {"data:sources": len(datasets)} | {
        f"data:{key}": sum(values)
        for key in ("documents", "tokens", "size")
        if datasets and all(values := [getattr(dataset, key) for dataset in datasets])
    }


def _notes(manifest: AdapterManifest) -> str:
    """Describe how the adapter was made."""
    recipe = manifest.recipe
    if recipe is not None:
        weights = {parent.digest: parent.weight for parent in manifest.parents if parent.weight is not None}
        summary = {"kind": recipe.kind, "method": recipe.method, "parameters": recipe.parameters, "weights": weights}
        return _text({key: dict(value) if isinstance(value, Mapping) else value for key, value in summary.items() if value})
    return "trained" if manifest.training else "how it was made is not recorded"
