"""A bill of materials of an adapter: CycloneDX 1.7 (ECMA-424), its base, parents, data and files by digest.

cyclonedx-python-lib has no class for model cards, so the JSON is written here, and tests validate it against the official
schema. It depends on no clock and no machine: the same version has the same bill. What is not recorded is left out, or marked
as such. It is no legal statement.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapterhub.digest import Digest
from adapterhub.manifest.document import AdapterManifest, BaseInfo, TrainingData
from adapterhub.version import __version__

from . import licensing
from .licensing import Combined, Part

SPEC = "1.7"
_SCHEMA = f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json"
_MODEL = "machine-learning-model"
PREFIX = "adapterhub:"
"""That of the names of its own properties."""
UNRECORDED = "not recorded"
"""The value of what is not."""


@dataclass(frozen=True)
class Ancestor:
    """An adapter that this one was made from, at whatever distance; `manifest` is None where it is not at hand."""

    digest: Digest
    name: str
    manifest: AdapterManifest | None = None


@dataclass(frozen=True, repr=False)
class Bill:
    """A bill of materials.

    Attributes:
        document: CycloneDX's JSON.
        license: The combined license.
    """

    document: Mapping[str, Any]
    license: Combined

    def dump(self) -> str:
        """The document as text."""
        return json.dumps(self.document, indent=2, ensure_ascii=True) + "\n"

    def __repr__(self) -> str:
        return f"<Bill {self.document['metadata']['component']['name']}: {self.license.expression or 'no license recorded'}>"


def bill(
    name: str,
    digest: Digest,
    manifest: AdapterManifest,
    *,
    ancestors: Sequence[Ancestor] = (),
    base_license: str | None = None,
) -> Bill:
    """Return the bill of a version.

    Args:
        name: Its name, with a namespace or without.
        digest: Of its OCI manifest.
        manifest: Its adapter.json.
        ancestors: The adapters that it was made from, and theirs.
        base_license: The license of the base model, which adapter.json does not have.
    """
    manifests = [manifest, *(one.manifest for one in ancestors if one.manifest)]
    data = list(dict.fromkeys(one for found in manifests for one in _data(found)))
    license_ = licensing.combined([*_parts(name, manifest, ancestors, base_license), *(_data_part(one) for one in data)])
    base, parents = _base(manifest.base, base_license), [_ancestor(one) for one in ancestors]
    sets = [_dataset(number, one) for number, one in enumerate(data, start=1)]
    component = {
        **_adapter(name, digest, manifest),
        "licenses": _own_licenses(manifest, license_),
        "components": [_file(entry.path, entry.digest, entry.size) for entry in manifest.files],
        "pedigree": {"ancestors": [base, *parents], "notes": _notes(manifest)},
        "modelCard": _model_card(manifest, sets),
        "properties": _properties({**_facts(manifest), **_license_facts(manifest, license_), **_summary(data)}),
    }
    adapter = component["bom-ref"]
    document = {
        "$schema": _SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'adapterhub:{name}@{digest}')}",
        "version": 1,
        "metadata": {
            "tools": {"components": [{"type": "application", "name": "adapterhub", "version": __version__}]},
            "component": {key: value for key, value in component.items() if value},
        },
        "components": sets,
        "dependencies": [
            {"ref": adapter, "dependsOn": sorted({one["bom-ref"] for one in (base, *parents, *sets)})},
        ],
    }
    return Bill(document, license_)


def _parts(name: str, manifest: AdapterManifest, ancestors: Sequence[Ancestor], base_license: str | None) -> list[Part]:
    base = manifest.base.repo or (manifest.base.fingerprint or UNRECORDED)[:19]
    parts = [Part("adapter", name, manifest.license), Part("base", base, base_license)]
    return parts + [Part("parent", one.name, one.manifest.license if one.manifest else None) for one in ancestors]


def _data(manifest: AdapterManifest) -> tuple[TrainingData, ...]:
    return (manifest.training.data if manifest.training else None) or ()


def _data_part(one: TrainingData) -> Part:
    return Part("data", _name_of(one), one.license)


def _name_of(one: TrainingData) -> str:
    return " ".join(filter(None, (one.name or one.path or UNRECORDED, one.split)))


# ---- components


def _adapter(name: str, digest: Digest, manifest: AdapterManifest) -> dict[str, Any]:
    space, _, last = name.rpartition("/")
    return {
        "type": _MODEL,
        "bom-ref": f"adapter@{digest}",
        "group": space,
        "name": last,
        "version": digest,
        "description": manifest.description or "",
        "hashes": [_hash(digest)],
    }


def _base(base: BaseInfo, license_: str | None) -> dict[str, Any]:
    facts = {
        "fingerprint": base.fingerprint, "tokenizer": base.tokenizer_digest, "chat-template": base.chat_template_digest,
        "quantization": base.quantization,
    }  # fmt: skip
    known = {
        "group": (base.repo or "").rpartition("/")[0],
        "version": base.revision,
        "licenses": _licenses(licensing.expression(license_)),
        "properties": _properties({f"base:{key}": value for key, value in facts.items()}),
    }
    name = (base.repo or base.model_type or UNRECORDED).rpartition("/")[2]
    return {"type": _MODEL, "bom-ref": "base", "name": name, **{key: value for key, value in known.items() if value}}


def _ancestor(one: Ancestor) -> dict[str, Any]:
    if one.manifest is None:
        return {"type": _MODEL, "bom-ref": f"adapter@{one.digest}", "name": one.name, "hashes": [_hash(one.digest)]}
    found = _adapter(one.name, one.digest, one.manifest)
    found["licenses"] = _licenses(licensing.expression(one.manifest.license))
    return {key: value for key, value in found.items() if value}


def _file(path: str, digest: Digest, size: int) -> dict[str, Any]:
    properties = _properties({"size": size})
    return {"type": "file", "bom-ref": f"file:{path}", "name": path, "hashes": [_hash(digest)], "properties": properties}


def _dataset(number: int, one: TrainingData) -> dict[str, Any]:
    facts = {"split": one.split, "documents": one.documents, "tokens": one.tokens, "size": one.size}
    known = {
        "hashes": [_hash(one.digest)] if one.digest else [],
        "licenses": _licenses(licensing.expression(one.license)),
        "data": [{"type": "dataset", "name": _name_of(one)}],
        "properties": _properties({f"data:{key}": value for key, value in facts.items()}),
    }
    name = one.name or one.path or UNRECORDED
    return {"type": "data", "bom-ref": f"data-{number}", "name": name, **{key: value for key, value in known.items() if value}}


def _hash(digest: Digest) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest.removeprefix("sha256:")}


def _licenses(expression: str) -> list[dict[str, str]]:
    return [{"expression": expression}] if expression else []


def _own_licenses(manifest: AdapterManifest, license_: Combined) -> list[dict[str, str]]:
    """The license that the owner declares, and the combined one, unless that lacks a part."""
    declared = licensing.expression(manifest.license)
    found = [{"expression": declared, "acknowledgement": "declared"}] if declared else []  # codespell:ignore
    whole = license_.expression and not license_.missing
    return [*found, {"expression": license_.expression, "acknowledgement": "concluded"}] if whole else found  # codespell:ignore


def _properties(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """Facts that have a value as CycloneDX properties: prefixed names, and texts as values."""
    return [{"name": f"{PREFIX}{key}", "value": _text(value)} for key, value in facts.items() if value not in (None, "", [])]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


# ---- what is known of the adapter


def _model_card(manifest: AdapterManifest, sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    parameters = {
        "task": manifest.task,
        "architectureFamily": manifest.base.model_type,
        "modelArchitecture": manifest.base.architecture,
        "datasets": [{"ref": one["bom-ref"]} for one in sets],
    }
    metrics = (manifest.training.metrics if manifest.training else None) or {}
    measured = [{"type": key, "value": _text(value)} for key, value in sorted(metrics.items())]
    card = {
        "modelParameters": {key: value for key, value in parameters.items() if value},
        "quantitativeAnalysis": {"performanceMetrics": measured} if measured else {},
    }
    return {key: value for key, value in card.items() if value}


def _facts(manifest: AdapterManifest) -> dict[str, Any]:
    training = manifest.training
    return {
        "method": manifest.method, "r": manifest.r, "alpha": manifest.alpha, "targets": list(manifest.targets),
        "replaced": list(manifest.replaced), "parameters": manifest.parameters, "dtype": manifest.dtype,
        "format": manifest.format,
        "training:created": training.created if training else None,
        "training:seed": training.seed if training else None,
        "training:versions": dict(training.versions) if training and training.versions else None,
        "training:config": dict(training.config) if training and training.config else None,
    }  # fmt: skip


def _license_facts(manifest: AdapterManifest, license_: Combined) -> dict[str, Any]:
    return {
        "license:declared": licensing.expression(manifest.license) or UNRECORDED,
        "license:combined": license_.expression or UNRECORDED,
        "license:reasons": list(license_.reasons),
        "license:missing": list(license_.missing),
    }


def _summary(data: Sequence[TrainingData]) -> dict[str, Any]:
    """Totals of the training data, of the numbers that every source has."""
    return {"data:sources": len(data)} | {
        f"data:{key}": sum(values)
        for key in ("documents", "tokens", "size")
        if data and all(values := [getattr(one, key) for one in data])
    }


def _notes(manifest: AdapterManifest) -> str:
    recipe = manifest.recipe
    if recipe is not None:
        weights = {parent.digest: parent.weight for parent in manifest.parents if parent.weight is not None}
        how = {"kind": recipe.kind, "method": recipe.method, "parameters": recipe.parameters, "weights": weights}
        return _text({key: dict(value) if isinstance(value, Mapping) else value for key, value in how.items() if value})
    return "trained" if manifest.training else "how it was made is not recorded"
