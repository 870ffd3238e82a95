"""What versions were made from, contain and take on disk, as JSON and back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from adapterhub.maintenance.disk_usage import BaseUsage, Usage, UsageReport
from adapterhub.registry.content_search import ContentMatches, FileContents
from adapterhub.remotes import content_documents
from adapterhub.remotes.catalog import ContentAnswer, ContentQuery, DiskUsage, SizedModel
from adapterhub.store.tensor_digests import Tensor
from adapterhub_converters.errors import FormatError
from tests.remotes.test_hub_catalog import DIGEST, NODE

QUERIES = [
    ContentQuery("x", "sha256:" + "ab" * 8),
    ContentQuery("", FileContents("", (DIGEST,), ())),
    ContentQuery("", FileContents(DIGEST, (DIGEST,), (Tensor("", "", (), 8, DIGEST),))),
]


def as_json(document: Any) -> Any:
    return json.loads(json.dumps(document))


@pytest.mark.parametrize("query", QUERIES)
def test_what_is_searched_for_comes_back_without_its_name_here(query: ContentQuery) -> None:
    again = content_documents.read_content_query(as_json(content_documents.content_query_document(query)), "hub")
    assert again.contents == query.contents


def test_disk_usage_comes_back_and_a_base_of_unknown_size_has_no_whole_models() -> None:
    usage = Usage("team/sql", 2, 2, 4, 100, 60)
    bases = [BaseUsage("org/known", None, usage), BaseUsage("org/unknown", None, usage)]
    model = SizedModel("/models/known", "org/known", None, 1000)
    document = as_json(content_documents.usage_document(DiskUsage(UsageReport([usage], bases, usage, 7, 1), [model])))
    assert [base["whole_models"] for base in document["bases"]] == [2000, None]
    again = content_documents.read_usage({**document, "models": content_documents.models_document([model])}, "hub")
    assert again.models == [model]
    assert (again.report.names[0], again.report.repeated, again.report.unlisted) == (usage, 7, 1)


def test_a_lineage_has_no_edge_to_an_adapter_that_is_not_in_it() -> None:
    edge = {"parent": DIGEST, "child": DIGEST, "weight": 1.0, "method": None}
    document = {"digest": DIGEST, "nodes": [NODE], "edges": [edge], "models": []}
    assert content_documents.read_lineage(document, "hub") == document
    other_digest = "sha256:" + "b" * 64
    for changed in (
        {"digest": other_digest},
        {"edges": [{**edge, "parent": other_digest}]},
        {"edges": [{**edge, "child": other_digest}]},
    ):
        with pytest.raises(FormatError):
            content_documents.read_lineage({**document, **changed}, "hub")


def test_an_answer_about_one_file_has_one_result() -> None:
    matches = ContentMatches("a.safetensors", [], 0, 0, [])
    for count in (0, 1, 2):
        document = as_json(content_documents.content_answer_document(ContentAnswer([matches] * count, {}, 0)))
        if count == 1:
            assert content_documents.read_content_answer(document, "hub", "a.safetensors") == (matches, {})
        else:
            with pytest.raises(FormatError, match="not of its API"):
                content_documents.read_content_answer(document, "hub", "a.safetensors")
