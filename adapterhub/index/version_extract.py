"""The indexed data of a version in registry.db: columns for lists, words and facets for search, and its files.

All of it comes from the version's own blobs: manifest, adapter.json and model card. A manifest from another registry may refer
to documents that were never checked, so a value of the wrong type is left out, without affecting the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

from adapterhub.digest import Digest
from adapterhub.manifest import card, oci_manifest
from adapterhub.manifest.card import Card
from adapterhub.manifest.document import AdapterManifest, Training
from adapterhub.manifest.oci_manifest import Manifest
from adapterhub.store.store import Store
from adapterhub_converters.adapter_files import ADAPTER_JSON, is_weights
from adapterhub_converters.containers import json_file
from adapterhub_converters.containers.json_file import is_number
from adapterhub_converters.errors import AdapterhubError, RemoteError
from adapterhub_converters.lazy_dataclass import dataclass

# In this order, `queries` selects the columns and `replay` inserts them.
COLUMNS: dict[str, type] = {
    "size": int, "base": str, "revision": str, "method": str, "r": int, "least_r": int, "alpha": float, "format": str,
    "dtype": str, "parameters": int, "license": str, "description": str,
}  # fmt: skip
# Bytes of the index for one of a text, and for one of a document with the shortest facets that have an effect.
_TEXT_COST, _FACET_COST = 3, 8
_FRONT_MATTER = 2048  # bytes of a card's front matter with many short facets
INDEXED = (ADAPTER_JSON, *card.NAMES)
"""The files of a version that are indexed, in lowercase."""
MAX_FACET, MAX_TEXT, MAX_WORDS = 1_000, 32_768, 1 << 20  # characters; texts are cut off there, a longer facet is left out
MAX_REASON = 200  # characters of the reason why nothing of a version is indexed
# Kind of facet to the keys of a model card's front matter with the same meaning.
CARD_FACETS = {
    "base": ("base_model",), "license": ("license", "license_name"), "language": ("language", "languages"), "tag": ("tags",),
    "task": ("pipeline_tag",), "dataset": ("datasets",),
}  # fmt: skip
_UNSEARCHED = {"base-name", "container", "library", "pipeline"}  # kinds of facets that other kinds or most versions repeat
# The Hub's task ("pipeline tag") for PEFT's (`peft.TaskType`).
_PIPELINES = {
    "CAUSAL_LM": "text-generation", "SEQ_2_SEQ_LM": "text2text-generation", "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification", "QUESTION_ANS": "question-answering", "FEATURE_EXTRACTION": "feature-extraction",
}  # fmt: skip
_IMAGE_FORMATS = ("diffusers", "kohya")


@dataclass(frozen=True)
class VersionExtract:
    """The indexed data of a version.

    Attributes:
        columns: In the order of COLUMNS; None for an unknown value.
        parents: Refs of the adapters it was made from; digests where no ref was recorded.
        parent_digests: Digests of these.
        facets: Kind and value, each pair once.
        metrics: Metrics at the end of its training.
        files: Path, digest and size in bytes.
        title: Name in adapter.json and title of the model card.
        prose: Text of the model card.
        unindexed: Why there is nothing else; empty if there is.
    """

    columns: tuple[object, ...] = (None,) * len(COLUMNS)
    parents: tuple[str, ...] = ()
    parent_digests: tuple[Digest, ...] = ()
    facets: tuple[tuple[str, str], ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    files: tuple[tuple[str, Digest, int], ...] = ()
    title: str = ""
    prose: str = ""
    unindexed: str = ""

    @property
    def description(self) -> str:
        """The description in adapter.json."""
        # The last of COLUMNS.
        return str(self.columns[-1] or "")[:MAX_TEXT]

    @property
    def weights(self) -> tuple[Digest, ...]:
        """Digests of the files of weights."""
        return tuple(digest for path, digest, _ in self.files if is_weights(path))

    @property
    def words(self) -> str:
        """The facets as text, so that a search by words finds them."""
        return " ".join(value for kind, value in self.facets if kind not in _UNSEARCHED)[:MAX_WORDS]


def indexed_bytes(path: str, size: int) -> int:
    """Return about how many bytes the index takes for a file of a version: the texts of documents, their words and facets."""
    if path == ADAPTER_JSON:
        return _FACET_COST * size
    if path.lower() not in card.NAMES or size > card.MAX_BYTES:
        return 0
    return _TEXT_COST * min(size, 4 * card.MAX_PROSE) + _FACET_COST * min(size, _FRONT_MATTER)


def read(store: Store, digest: Digest) -> VersionExtract:
    """Return the indexed data of the version with manifest `digest`; if a document cannot be read, only the reason."""
    try:
        manifest = oci_manifest.parse(store.read_document(digest), digest)
        model_card = _card(store, manifest)
        # Its files are those of the manifest, which has them checked.
        document = {**(_document(store, manifest) or {}), "files": []}
        adapter_json = card.with_card(AdapterManifest.salvage(document), model_card)
    except RemoteError:  # of a store that fetches blobs: the documents exist, and can be read another time
        raise
    except AdapterhubError as error:
        return VersionExtract(unindexed=error.what[:MAX_REASON])
    values = {"size": manifest.size, "base": adapter_json.base.repo, "revision": adapter_json.base.revision}
    # The rank of an adapter is its largest.
    values |= {"r": adapter_json.max_rank or None, "least_r": adapter_json.least_rank or None}
    values["parameters"] = adapter_json.parameters or None  # 0 where an unchecked document has none
    return VersionExtract(
        tuple(_column(values[key] if key in values else getattr(adapter_json, key), kind) for key, kind in COLUMNS.items()),
        tuple(_text(parent.ref) or _text(parent.digest) for parent in adapter_json.parents),
        # A merge may name the same parent twice.
        tuple(dict.fromkeys(_text(parent.digest) for parent in adapter_json.parents)),
        tuple(sorted(set(_facets(adapter_json, model_card)))),
        dict(_metrics(adapter_json.training)),
        tuple((layer.path, layer.digest, layer.size) for layer in manifest.layers),
        " ".join(filter(None, (_text(adapter_json.name), _text(model_card.title))))[:MAX_TEXT],
        _text(model_card.prose),
    )


def adapter_manifest(store: Store, manifest: Manifest) -> AdapterManifest | None:
    """Return the usable part of a version's adapter.json, completed from its model card; None without adapter.json."""
    document = _document(store, manifest)
    return None if document is None else card.with_card(AdapterManifest.salvage(document), _card(store, manifest))


def _document(store: Store, manifest: Manifest) -> Mapping[str, Any] | None:
    """Return the content of an adapter.json, which may never have been checked; None if there is none."""
    layer = manifest.adapter_json
    return None if layer is None else json_file.parse_object(store.read_document(layer.digest), layer.digest)


def _card(store: Store, manifest: Manifest) -> Card:
    try:
        return card.decode(store.read_document(manifest.card.digest)) if manifest.card else Card()
    except RemoteError:
        raise
    except AdapterhubError:
        return Card()


def _facets(manifest: AdapterManifest, model_card: Card) -> Iterator[tuple[str, str]]:
    base, training = manifest.base, manifest.training
    values_by_kind: dict[str, list[str | None]] = {
        "base": [base.repo],
        "model_type": [base.model_type],
        "architecture": [base.architecture],
        "method": [manifest.method],
        "task": [manifest.task],
        "format": [manifest.format],
        "dtype": [manifest.dtype],
        "license": [manifest.license],
        "target": list(manifest.targets),
        "dataset": [item.name for item in (training.data if training else None) or ()],
    }
    for kind, keys in CARD_FACETS.items():
        # The card fills in what adapter.json lacks; if both have a value, the declared one may be newer.
        if not any(values_by_kind.get(kind, ())):
            values_by_kind[kind] = list(model_card.values(*keys))
    # The card names these two as the Hub does; otherwise, the library is the one that reads the format.
    library = "diffusers" if manifest.format in _IMAGE_FORMATS else "peft"
    values_by_kind["pipeline"] = [*(model_card.values("pipeline_tag")[:1] or [_PIPELINES.get(manifest.task or "")])]
    values_by_kind["library"] = [*(model_card.values("library_name")[:1] or [library])]
    values_by_kind["container"] = ["gguf" if manifest.format == "gguf" else "safetensors"]
    for kind, values in values_by_kind.items():
        for value in map(_text, values):
            if value and len(value) <= MAX_FACET:
                yield kind, value
                if kind == "base":
                    yield "base-name", value.rpartition("/")[2]


def _metrics(training: Training | None) -> Iterator[tuple[str, float]]:
    for name, value in ((training.metrics if training else None) or {}).items():
        if is_number(value) and abs(value) < 1e308:
            yield _text(name), float(value)


def _text(value: object) -> str:
    """Return text in a form that SQLite can store, including in NOCASE columns; empty for another type."""
    return value.encode(errors="replace").decode().replace("\0", " ") if isinstance(value, str) else ""


def _column(value: object, kind: type) -> object:
    """Return `value` if SQLite can store it in a column of that type, else None."""
    if isinstance(value, str):
        return value if kind is str and value and value.encode(errors="replace").decode() == value else None
    if not is_number(value) or (kind is int and not isinstance(value, int)):
        return None
    return value if kind is not str and abs(value) < 2**63 else None


def dump_parents(extract: VersionExtract) -> str:
    """Return the parents as the column of `versions` has them."""
    return json.dumps(extract.parents)
