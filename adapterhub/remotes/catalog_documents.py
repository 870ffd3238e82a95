"""The values of a `Catalog` as JSON, which `--json` prints and the API of a hub answers, and back.

What a hub sends is read field by field: a value of a wrong type is a FormatError. Texts may contain anything, as those of an
adapter.json may; commands show them as such.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from adapterhub.digest import Digest, is_hex
from adapterhub.index.queries import VersionRow
from adapterhub.index.tensor_search import Share
from adapterhub.index.version_search import Holder, SearchResult, parse_digest_prefix
from adapterhub.maintenance.disk_usage import BaseUsage, Usage, UsageReport
from adapterhub.ref import RefError, is_tag, parse_name
from adapterhub.registry.content_search import ContentMatches, FileContents
from adapterhub.registry.version_lookup import RestoreResult, Version
from adapterhub.store.ref_log import Entry
from adapterhub.store.tensor_digests import Tensor
from adapterhub_converters.errors import FormatError

from .catalog import Deprecations, DiskUsage, FoundContents, Listing, SearchAnswer, SizedModel, Wanted

if TYPE_CHECKING:
    from adapterhub.registry.lineage_graph import Lineage, Node
    from adapterhub.registry.registry import VersionDocument

T = TypeVar("T")
_MAX_NUMBER = 2**53  # JSON numbers are exact up to there in every program


class _Fields:
    """The fields of a JSON object that another program sent; each method raises FormatError for a value of the wrong type."""

    def __init__(self, value: object, location: str) -> None:
        if not isinstance(value, dict):
            raise FormatError(location, "the hub's answer is not of its API")
        self.values, self.location = value, location

    def error(self, key: str) -> FormatError:
        return FormatError(self.location, f"the hub's answer has no valid {key!r}")

    def value(self, key: str, *kinds: type) -> Any:
        value = self.values.get(key)
        # Not isinstance: `true` is no number, although Python counts it as one.
        if type(value) not in kinds:
            raise self.error(key)
        return value

    def text(self, key: str) -> str:
        return str(self.value(key, str))

    def optional_text(self, key: str) -> str | None:
        value: str | None = self.value(key, str, type(None))
        return value

    def count(self, key: str) -> int:
        value: int = self.value(key, int)
        if not 0 <= value < _MAX_NUMBER:
            raise self.error(key)
        return value

    def optional_count(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.count(key)

    def optional_number(self, key: str) -> float | None:
        value: float | None = self.value(key, int, float, type(None))
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        return self._items(key, str)

    def counts(self, key: str) -> tuple[int, ...]:
        return self._items(key, int)

    def _items(self, key: str, kind: type[T]) -> tuple[T, ...]:
        items = self.value(key, list)
        if any(type(item) is not kind for item in items):
            raise self.error(key)
        return tuple(items)

    def objects(self, key: str) -> Iterator[_Fields]:
        yield from (_Fields(item, self.location) for item in self.value(key, list))

    def object(self, key: str) -> _Fields:
        return _Fields(self.values.get(key), self.location)

    def name(self, key: str) -> str:
        try:
            return parse_name(self.text(key), self.location)
        except RefError as error:
            raise self.error(key) from error

    def digest(self, key: str) -> Digest:
        digest = self.text(key)
        if not digest.startswith("sha256:") or not is_hex(digest[7:]):
            raise self.error(key)
        return digest

    def tags(self, key: str) -> tuple[str, ...]:
        tags = self.texts(key)
        if not all(map(is_tag, tags)):
            raise self.error(key)
        return tags


# ---- versions in lists


def reason_of(row: VersionRow, deprecations: Deprecations) -> str | None:
    """Return why a version is deprecated; None if it is not. A name may be deprecated as a whole, under the number 0."""
    return deprecations.get((row.name, row.number), deprecations.get((row.name, 0)))


def row_document(row: VersionRow, deprecations: Deprecations) -> dict[str, Any]:
    """Return the document of a version in a list."""
    return {
        "ref": str(row.ref),
        "name": row.name,
        "number": row.number,
        "tags": list(row.tags),
        "deprecated": reason_of(row, deprecations),
        "digest": row.digest,
        "size": row.size,
        "time": row.time,
        "base": row.base,
        "revision": row.revision,
        "method": row.method,
        "r": row.r,
        "least_r": row.least_r,
        "alpha": row.alpha,
        "format": row.format,
        "dtype": row.dtype,
        "parameters": row.parameters,
        "license": row.license,
        "description": row.description,
        "parents": list(row.parents),
    }


def _row(fields: _Fields) -> VersionRow:
    return VersionRow(
        fields.name("name"),
        fields.count("number"),
        fields.digest("digest"),
        0,  # bytes of its manifest, which no list shows
        fields.text("time"),
        fields.optional_count("size"),
        fields.optional_text("base"),
        fields.optional_text("revision"),
        fields.optional_text("method"),
        fields.optional_count("r"),
        fields.optional_count("least_r"),
        fields.optional_number("alpha"),
        fields.optional_text("format"),
        fields.optional_text("dtype"),
        fields.optional_count("parameters"),
        fields.optional_text("license"),
        fields.optional_text("description"),
        fields.texts("parents"),
        fields.tags("tags"),
    )


def _rows(parts: Sequence[_Fields]) -> tuple[list[VersionRow], dict[tuple[str, int], str]]:
    """Return versions, and the reasons of those that are deprecated."""
    rows = [_row(fields) for fields in parts]
    reasons = {
        (row.name, row.number): reason
        for row, fields in zip(rows, parts, strict=True)
        if (reason := fields.optional_text("deprecated")) is not None
    }
    return rows, reasons


def listing_document(listing: Listing) -> dict[str, Any]:
    """Return the document of a list, with the deprecations, in which the number of a whole name is null."""
    deprecations = [
        {"name": name, "number": number or None, "message": message}
        for (name, number), message in sorted(listing.deprecations.items())
    ]
    return {"adapters": [row_document(row, listing.deprecations) for row in listing.rows], "deprecations": deprecations}


def read_listing(document: object, location: str) -> Listing:
    """Read the document of a list."""
    fields = _Fields(document, location)
    deprecations = {
        (item.name("name"), item.optional_count("number") or 0): item.text("message") for item in fields.objects("deprecations")
    }
    return Listing(_rows(list(fields.objects("adapters")))[0], deprecations)


def search_document(answer: SearchAnswer) -> dict[str, Any]:
    """Return the document of a search."""
    result = answer.result
    adapters = [row_document(row, answer.deprecations) for row in result.rows]
    return {"adapters": adapters, "total": result.total, "facets": result.facets}


def read_search(document: object, location: str) -> SearchAnswer:
    """Read the document of a search, in which `has_more` says that `total` is not all."""
    fields = _Fields(document, location)
    rows, deprecations = _rows(list(fields.objects("adapters")))
    kinds = fields.object("facets")
    facets = {kind: {value: kinds.object(kind).count(value) for value in kinds.object(kind).values} for kind in kinds.values}
    return SearchAnswer(SearchResult(rows, fields.count("total"), facets, fields.value("has_more", bool)), deprecations)


# ---- one version


def version_document(version: Version) -> dict[str, Any]:
    """Return the document of a version that was pushed or tagged; other commands than a push remove `new` and `skipped`."""
    return {
        "ref": str(version.ref),
        "name": version.name,
        "number": version.number,
        "tags": list(version.tags),
        "deprecated": version.deprecated,
        "digest": version.digest,
        "size": version.size,
        "new": version.new,
        "skipped": list(version.skipped),
    }


def read_version(document: object, location: str, tag: str | None = None) -> Version:
    """Read the document of a version that was named by `tag`."""
    fields = _Fields(document, location)
    return Version(
        fields.name("name"),
        fields.count("number"),
        fields.digest("digest"),
        fields.optional_count("size"),
        fields.tags("tags"),
        tag,
        fields.optional_text("deprecated"),
        new=fields.value("new", bool),
        moved=fields.value("moved", bool),
    )


def read_shown(document: object, location: str) -> VersionDocument:
    """Read the document of `Registry.show`."""
    fields = _Fields(document, location)
    evaluations = []
    for item in fields.objects("evaluations"):
        evaluations.append({**item.values, "name": item.text("name"), "metrics": item.object("metrics").values})
    return {
        "ref": fields.text("ref"),
        "name": fields.name("name"),
        "number": fields.count("number"),
        "tags": list(fields.tags("tags")),
        "protected": list(fields.tags("protected")),
        "deprecated": fields.optional_text("deprecated"),
        "digest": fields.digest("digest"),
        "size": fields.count("size"),
        "time": fields.text("time"),
        "evaluations": evaluations,
        "manifest": fields.object("manifest").values,
        "oci_manifest": fields.object("oci_manifest").values,
    }


def restore_document(result: RestoreResult) -> dict[str, Any]:
    """Return the document of a name that was restored."""
    return {"restored": result.name, "versions": list(result.numbers), "lost": list(result.lost)}


def read_restore(document: object, location: str) -> RestoreResult:
    """Read the document of a name that was restored."""
    fields = _Fields(document, location)
    return RestoreResult(fields.name("restored"), fields.counts("versions"), fields.counts("lost"))


def read_number(document: object, location: str) -> int:
    """Read the number of a version that was deprecated; 0 for a whole name."""
    return _Fields(document, location).optional_count("number") or 0


# ---- logs


def log_document(name: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the document of the log of a name."""
    return {"name": name, "entries": [_entry_document(entry) for entry in entries]}


def _entry_document(entry: Entry) -> dict[str, Any]:
    return {
        "seq": entry.seq,
        "time": entry.time,
        "op": entry.op,
        "number": entry.number or None,
        "numbers": list(entry.numbers),
        "tags": list(entry.tags),
        "digest": entry.digest or None,
        "author": entry.author or None,
        "message": entry.message or None,
        "keep": entry.keep if entry.op == "keep" else None,
    }


def read_log(document: object, location: str) -> list[Entry]:
    """Read the document of a log."""
    fields = _Fields(document, location)
    name = fields.name("name")
    return [_entry(name, item) for item in fields.objects("entries")]


def _entry(name: str, fields: _Fields) -> Entry:
    return Entry(
        name,
        fields.count("seq"),
        fields.text("op"),
        fields.text("time"),
        fields.digest("digest") if fields.values.get("digest") is not None else "",
        number=fields.optional_count("number") or 0,
        tags=fields.tags("tags"),
        message=fields.optional_text("message") or "",
        numbers=fields.counts("numbers"),
        keep=fields.optional_count("keep") or 0,
        author=fields.optional_text("author") or "",
    )


# ---- lineages


def lineage_document(graph: Lineage) -> dict[str, Any]:
    """Return the document of a lineage, which its views show too; the keys are stable."""
    return {
        "digest": graph.root,
        "nodes": [_node_document(node) for node in graph.nodes.values()],
        "edges": [
            {"parent": edge.parent, "child": edge.child, "weight": edge.weight, "method": edge.method} for edge in graph.edges
        ],
        "models": [
            {"name": model.name, "parent": model.parent, "weight": model.weight, "base": model.base} for model in graph.models
        ],
    }


def _node_document(node: Node) -> dict[str, Any]:
    manifest = node.manifest.to_dict() if node.manifest else {}
    return {
        "digest": node.digest,
        "refs": list(node.refs),
        "here": node.manifest is not None,
        "deprecated": dict(node.deprecated),
        "how": node.origin,
        "rank": node.manifest.rank if node.manifest else "",
        "base": manifest.get("base"),
        "data": (manifest.get("training") or {}).get("data") or [],
        "recipe": manifest.get("recipe"),
    }


def read_lineage(document: object, location: str) -> dict[str, Any]:
    """Return the document of a lineage, checked: every edge is between two of its nodes, and there is no model."""
    fields = _Fields(document, location)
    nodes = [_checked_node(item) for item in fields.objects("nodes")]
    digests = {node["digest"] for node in nodes}
    edges = []
    for edge in fields.objects("edges"):
        ends = {"parent": edge.digest("parent"), "child": edge.digest("child")}
        if not digests.issuperset(ends.values()):
            raise edge.error("parent")
        edges.append({**ends, "weight": edge.optional_number("weight"), "method": edge.optional_text("method")})
    if fields.digest("digest") not in digests:
        raise fields.error("digest")
    return {"digest": fields.digest("digest"), "nodes": nodes, "edges": edges, "models": []}


def _checked_node(fields: _Fields) -> dict[str, Any]:
    deprecated = fields.object("deprecated")
    data = [
        {**item.values, **{key: item.optional_text(key) for key in ("name", "path", "digest")}}
        for item in fields.objects("data")
    ]
    base = None
    if fields.values.get("base") is not None:
        item = fields.object("base")
        base = {**item.values, **{key: item.optional_text(key) for key in ("repo", "revision", "fingerprint")}}
    return {
        "digest": fields.digest("digest"),
        "refs": list(fields.texts("refs")),
        "here": fields.value("here", bool),
        "deprecated": {ref: deprecated.text(ref) for ref in deprecated.values},
        "how": fields.text("how"),
        "rank": fields.text("rank"),
        "base": base,
        "data": data,
        "recipe": fields.value("recipe", dict, type(None)),
    }


# ---- contents


def found_document(found: FoundContents) -> dict[str, Any]:
    """Return the document of a search by contents."""
    return {"found": [_matches_document(item, found.deprecations) for item in found.matches]}


def _matches_document(matches: ContentMatches, deprecations: Deprecations) -> dict[str, Any]:
    tensors = None
    if not matches.holders and matches.tensors:
        tensors = {
            "count": matches.tensors,
            "size": matches.size,
            "holders": [_share_document(share, deprecations) for share in matches.shares],
        }
    holders = [_holder_document(holder, deprecations) for holder in matches.holders]
    return {"source": matches.source, "holders": holders, "tensors": tensors}


def _holder_document(holder: Holder, deprecations: Deprecations) -> dict[str, Any]:
    row = row_document(holder.row, deprecations)
    location = {"path": holder.path or None, "tensor": holder.tensor or None, "digest": holder.digest}
    return {"ref": row["ref"], "tags": row["tags"], **location, "adapter": row}


def _share_document(share: Share, deprecations: Deprecations) -> dict[str, Any]:
    row = row_document(share.row, deprecations)
    location = {"path": share.path, "digest": share.digest, "count": share.count, "size": share.size}
    return {"ref": row["ref"], "tags": row["tags"], **location, "adapter": row}


def read_found(document: object, location: str, source: str) -> tuple[ContentMatches, dict[tuple[str, int], str]]:
    """Read the only result in the document of a search by contents, and the deprecations of its versions."""
    results = list(_Fields(document, location).objects("found"))
    if len(results) != 1:
        raise FormatError(location, "the hub's answer is not of its API")
    holders = list(results[0].objects("holders"))
    tensors = results[0].object("tensors") if results[0].values.get("tensors") is not None else None
    shares = list(tensors.objects("holders")) if tensors else []
    rows, deprecations = _rows([item.object("adapter") for item in (*holders, *shares)])
    matches = ContentMatches(
        source,
        [
            Holder(row, item.optional_text("path") or "", item.digest("digest"), item.optional_text("tensor") or "")
            for row, item in zip(rows, holders, strict=False)
        ],
        tensors.count("count") if tensors else 0,
        tensors.count("size") if tensors else 0,
        [
            Share(row, item.text("path"), item.digest("digest"), item.count("count"), item.count("size"))
            for row, item in zip(rows[len(holders) :], shares, strict=True)
        ],
    )
    return matches, deprecations


def read_unlisted(document: object, location: str) -> int:
    """Read how many files of weights could not be searched by their tensors."""
    return _Fields(document, location).count("unlisted")


def wanted_document(wanted: Wanted) -> dict[str, Any]:
    """Return the document of something to search for, without what it is called here."""
    contents = wanted[1]
    if isinstance(contents, str):
        return {"digest": contents}
    tensors = [[tensor.digest, tensor.size] for tensor in contents.tensors]
    return {"version": contents.version or None, "files": list(contents.files), "tensors": tensors}


def read_wanted(document: object, location: str) -> Wanted:
    """Read the document of something to search for."""
    fields = _Fields(document, location)
    if "digest" in fields.values:
        return fields.text("digest"), parse_digest_prefix(fields.text("digest"))
    version = fields.digest("version") if fields.values.get("version") is not None else ""
    tensors = []
    for item in fields.value("tensors", list):
        pair = _Fields(dict(zip(("digest", "size"), item, strict=False)) if isinstance(item, list) else None, location)
        tensors.append(Tensor("", "", (), pair.count("size"), pair.digest("digest")))
    files = [_Fields({"digest": digest}, location).digest("digest") for digest in fields.texts("files")]
    return "", FileContents(version, tuple(files), tuple(tensors))


# ---- disk usage


def usage_document(usage: DiskUsage) -> dict[str, Any]:
    """Return the document of the disk usage of versions, compared with whole models of known sizes."""
    report = usage.report
    return {
        "names": [{"name": row.name, **_usage_numbers(row)} for row in report.names],
        "bases": [
            {
                "repo": base.repo,
                "fingerprint": base.fingerprint,
                **_usage_numbers(base.usage),
                "whole_models": whole_models_size(base, usage.models),
            }
            for base in report.bases
        ],
        "total": _usage_numbers(report.total),
        "tensors": {"repeated": report.repeated, "unlisted": report.unlisted},
    }


def whole_models_size(base: BaseUsage, models: Sequence[SizedModel]) -> int | None:
    """Return the size of the versions on a base as whole models; None if the size of the base is unknown."""
    size = next((model.size for model in models if model.fits(base)), None)
    return None if size is None else size * base.usage.versions


def _usage_numbers(usage: Usage) -> dict[str, int]:
    return {
        "versions": usage.versions,
        "adapters": usage.adapters,
        "files": usage.files,
        "shared": usage.shared_size,
        "distinct": usage.distinct,
        "saved": usage.saved_size,
        "stored": usage.stored,
    }


def models_document(models: Sequence[SizedModel]) -> list[dict[str, Any]]:
    """Return the documents of models whose sizes are known."""
    return [
        {"name": model.location, "repo": model.repo, "fingerprint": model.fingerprint, "size": model.size} for model in models
    ]


def read_usage(document: object, location: str) -> DiskUsage:
    """Read the document of the disk usage of versions, with `models`."""
    fields = _Fields(document, location)
    bases = []
    for item in fields.objects("bases"):
        repo, fingerprint = item.optional_text("repo"), item.optional_text("fingerprint")
        bases.append(BaseUsage(repo, fingerprint, _usage(item, repo or fingerprint or "")))
    tensors = fields.object("tensors")
    report = UsageReport(
        [_usage(item, item.name("name")) for item in fields.objects("names")],
        bases,
        _usage(fields.object("total"), ""),
        tensors.count("repeated"),
        tensors.count("unlisted"),
    )
    models = [
        SizedModel(item.text("name"), item.optional_text("repo"), item.optional_text("fingerprint"), item.count("size"))
        for item in fields.objects("models")
    ]
    return DiskUsage(report, models)


def _usage(fields: _Fields, name: str) -> Usage:
    return Usage(name, *(fields.count(key) for key in ("versions", "adapters", "files", "distinct", "stored")))
