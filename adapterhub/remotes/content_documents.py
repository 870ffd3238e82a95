"""What versions were made from, contain, and take on disk as JSON, and back: the answers of `lineage`, `find` and `du`.

`--json` prints these documents, and the API of a hub answers them. `version_documents` has the others of a `Catalog`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterhub.index.tensor_search import Share
from adapterhub.index.version_search import Holder, parse_digest_prefix
from adapterhub.maintenance.disk_usage import BaseUsage, Usage, UsageReport
from adapterhub.registry.content_search import ContentMatches, FileContents
from adapterhub.store.tensor_digests import Tensor
from adapterhub_converters.errors import FormatError

from .answer_fields import Fields
from .catalog import ContentAnswer, ContentQuery, Deprecations, DiskUsage, SizedModel
from .version_documents import read_rows, row_document

if TYPE_CHECKING:
    from adapterhub.registry.lineage_graph import Lineage, Node


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
    fields = Fields(document, location)
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


def _checked_node(fields: Fields) -> dict[str, Any]:
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


def content_answer_document(answer: ContentAnswer) -> dict[str, Any]:
    """Return the document of a search by contents."""
    return {"found": [_matches_document(item, answer.deprecations) for item in answer.matches]}


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


def read_content_answer(document: object, location: str, source: str) -> tuple[ContentMatches, dict[tuple[str, int], str]]:
    """Read the only result in the document of a search by contents, and the deprecations of its versions."""
    results = list(Fields(document, location).objects("found"))
    if len(results) != 1:
        raise FormatError(location, "the hub's answer is not of its API")
    holders = list(results[0].objects("holders"))
    tensors = results[0].object("tensors") if results[0].values.get("tensors") is not None else None
    shares = list(tensors.objects("holders")) if tensors else []
    rows, deprecations = read_rows([item.object("adapter") for item in (*holders, *shares)])
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
    return Fields(document, location).count("unlisted")


def content_query_document(query: ContentQuery) -> dict[str, Any]:
    """Return the document of something to search for, without what it is called here."""
    contents = query.contents
    if isinstance(contents, str):
        return {"digest": contents}
    tensors = [[tensor.digest, tensor.size] for tensor in contents.tensors]
    return {"version": contents.version or None, "files": list(contents.files), "tensors": tensors}


def read_content_query(document: object, location: str) -> ContentQuery:
    """Read the document of something to search for."""
    fields = Fields(document, location)
    if "digest" in fields.values:
        return ContentQuery(fields.text("digest"), parse_digest_prefix(fields.text("digest")))
    version = fields.digest("version") if fields.values.get("version") is not None else ""
    tensors = []
    for item in fields.value("tensors", list):
        pair = Fields(dict(zip(("digest", "size"), item, strict=False)) if isinstance(item, list) else None, location)
        tensors.append(Tensor("", "", (), pair.count("size"), pair.digest("digest")))
    files = [Fields({"digest": digest}, location).digest("digest") for digest in fields.texts("files")]
    return ContentQuery("", FileContents(version, tuple(files), tuple(tensors)))


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
    fields = Fields(document, location)
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


def _usage(fields: Fields, name: str) -> Usage:
    return Usage(name, *(fields.count(key) for key in ("versions", "adapters", "files", "distinct", "stored")))
