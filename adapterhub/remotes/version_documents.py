"""Versions, lists of them and logs of names as JSON, and back.

`--json` prints these documents, and the API of a hub answers them. `content_documents` has the others of a `Catalog`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.index.queries import VersionRow
from adapterhub.index.version_search import SearchResult
from adapterhub.registry.version_lookup import RestoreResult, Version
from adapterhub.store.ref_log import Entry

from .answer_fields import Fields
from .catalog import Deprecations, Listing, SearchAnswer

if TYPE_CHECKING:
    from adapterhub.manifest.keep_rule import KeepRule
    from adapterhub.registry.shown_version import VersionDocument


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
        "withdrawn": row.withdrawn,
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


def _row(fields: Fields) -> VersionRow:
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
        fields.optional_text("withdrawn"),
    )


def read_rows(parts: Sequence[Fields]) -> tuple[list[VersionRow], dict[tuple[str, int], str]]:
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
    fields = Fields(document, location)
    deprecations = {
        (item.name("name"), item.optional_count("number") or 0): item.text("message") for item in fields.objects("deprecations")
    }
    return Listing(read_rows(list(fields.objects("adapters")))[0], deprecations)


def search_document(answer: SearchAnswer) -> dict[str, Any]:
    """Return the document of a search."""
    result = answer.result
    adapters = [row_document(row, answer.deprecations) for row in result.rows]
    return {"adapters": adapters, "total": result.total, "facets": result.facets}


def read_search(document: object, location: str) -> SearchAnswer:
    """Read the document of a search, in which `has_more` says that `total` is not all."""
    fields = Fields(document, location)
    rows, deprecations = read_rows(list(fields.objects("adapters")))
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
    fields = Fields(document, location)
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
    fields = Fields(document, location)
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
        "withdrawn": fields.optional_text("withdrawn"),
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
    fields = Fields(document, location)
    return RestoreResult(fields.name("restored"), fields.counts("versions"), fields.counts("lost"))


def read_number(document: object, location: str) -> int:
    """Read the number of a version that was deprecated; 0 for a whole name."""
    return Fields(document, location).optional_count("number") or 0


# ---- logs


def retention_document(name: str, rule: KeepRule | None) -> dict[str, Any]:
    """Return the document of which versions of a name a gc keeps."""
    return {"name": name, "keep": rule.last if rule else None, "ttl": rule.ttl or None if rule else None}


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
        "ttl": entry.ttl or None,
    }


def read_log(document: object, location: str) -> list[Entry]:
    """Read the document of a log."""
    fields = Fields(document, location)
    name = fields.name("name")
    return [_entry(name, item) for item in fields.objects("entries")]


def _entry(name: str, fields: Fields) -> Entry:
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
        ttl=fields.optional_count("ttl") or 0,
    )
